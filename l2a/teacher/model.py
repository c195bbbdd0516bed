"""The teacher: an encoder with a classification head, or a model that is fine-tuned already, and how both are loaded.

A checkpoint is checked when it is opened, from its config and tokenizer alone. No code that it brings is ever run.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from l2a.config import TeacherConfig
from l2a.data.encoding import fit_tokenizer, model_inputs, refuse_long_sequences
from l2a.data.fetch import Artifact, fetch_artifact, fetch_joined
from l2a.util import SILENT, Progress, RunError, UsageError, build, did_you_mean, fingerprint, load_yaml

Names = tuple[str, ...]
GIVE_AN_ENCODER = "give an encoder such as BERT, MPNet, RoBERTa, ELECTRA, DistilBERT, DeBERTa or ModernBERT"


class Teacher(torch.nn.Module):
    """Classifies texts and embeds them.

    Attributes:
        encoder: A model of transformers; where ``head`` is None it classifies and returns logits itself.
        tokenizer: The model's fast tokenizer.
        label_names: The C class names, in the order of the logits.
        head: (d) -> (C) on the mean-pooled last hidden state, or None.
        hidden_size: Width d of the embeddings.
        positions: Longest sequence that it reads, in tokens; None where there is no limit.
        parameters_count: All parameters, embeddings and head included.
    """

    def __init__(self, encoder: Any, tokenizer: Any, label_names: Names, head: torch.nn.Linear | None) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.label_names, self.head = encoder, tokenizer, label_names, head
        self.hidden_size, self.positions = int(encoder.config.hidden_size), usable_positions(encoder)
        self.parameters_count = sum(parameter.numel() for parameter in self.parameters())

    def forward(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify and embed a padded batch.

        Args:
            batch: attention_mask, optionally token_type_ids, int64 (B, L), with either input_ids, int64 (B, L), or
                inputs_embeds, float32 (B, L, d).

        Returns:
            Logits, float32 (B, C), and mean-pooled last hidden states, float32 (B, d).
        """
        outputs = self.encoder(**model_inputs(self.encoder.config, batch), output_hidden_states=self.head is None)
        hidden = outputs.hidden_states[-1] if self.head is None else outputs.last_hidden_state
        pooled = mean_pool(hidden, batch["attention_mask"])
        return (outputs.logits if self.head is None else self.head(pooled)), pooled

    def word_embeddings(self) -> torch.Tensor:
        """Return the word-embedding matrix E, float32 (V, d), detached."""
        return torch.as_tensor(self.encoder.get_input_embeddings().weight).detach().float()

    def fingerprint(self, wanted: Callable[[str], bool] = lambda _: True) -> str:
        """Hash the ``wanted`` weights, class names, tokenizer and settings: the key of everything that it labels."""
        weights = {name: value.cpu().float().numpy() for name, value in self.state_dict().items() if wanted(name)}
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer |= {"truncation": None, "padding": None}  # these change with every call
        left_out = ("_name_or_path", "transformers_version", "dtype")
        config = {name: value for name, value in self.encoder.config.to_dict().items() if name not in left_out}
        settings = json.dumps([tokenizer, config], sort_keys=True, default=str)
        return fingerprint(weights, list(self.label_names), settings)


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Average hidden states, float (B, L, d), over the tokens whose mask, int64 (B, L), is 1; returns float (B, d)."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)


def output_layer(classifier: Any) -> torch.nn.Linear:
    """Find a sequence classifier's last linear layer, of C outputs and with a bias, the one that gives the logits.

    Raises:
        UsageError: If there is none.
    """
    layers = [module for module in classifier.modules() if isinstance(module, torch.nn.Linear)]
    classes = classifier.config.num_labels
    if not layers or layers[-1].out_features != classes or layers[-1].bias is None:
        lack = f"has no linear output layer with a bias for {classes} classes"
        raise UsageError(f"{type(classifier).__name__} {lack}; {GIVE_AN_ENCODER}")
    return layers[-1]


def usable_positions(model: Any) -> int | None:
    """Count the tokens that a model of transformers, also without weights, can read at once; None without a limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin number positions from one above the padding's id, so that some rows cannot be used.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    return None if limit is None or limit < 1 else int(limit)


@dataclass(frozen=True)
class Packaged:
    """A pretrained encoder that comes as one package, or as several with the pieces of one zip file.

    Attributes:
        hub: Its name on the Hub.
        licence: Of its weights.
        folder: Where the model lies among the members.
        parts: The packages.
        members: The model's files in the zip file, where there are several parts.
        masked_words: Whether its weights have a masked-language-model head.
    """

    hub: str
    licence: str
    folder: str
    parts: tuple[Artifact, ...]
    members: tuple[str, ...] = ()
    masked_words: bool = False


_FILE = Path(__file__).with_name("packaged.yaml")
PACKAGED = {name: build(Packaged, facts, f"{_FILE}: {name}") for name, facts in load_yaml(_FILE).items()}
"""Models by the name that a setting gives them."""


def locate(model: str, progress: Progress = SILENT, field: str = "teacher.model") -> str:
    """Turn a packaged model's name, a folder or a Hub id into a folder, or the Hub id itself, which transformers loads.

    Raises:
        RunError: If a packaged model cannot be fetched.
        UsageError: If it looks like a path but is no folder.
    """
    if (packaged := PACKAGED.get(model)) is not None:
        if packaged.members:
            return str(fetch_joined(packaged.parts, packaged.members, progress) / packaged.folder)
        return str(fetch_artifact(packaged.parts[0], progress) / packaged.folder)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model.startswith((".", "/", "~")) or path.exists() or ("/" not in model and "-" not in model):
        hint, names = did_you_mean(model, PACKAGED), ", ".join(PACKAGED)
        raise UsageError(f"{field} {model!r}: no such folder{hint}; give a model folder, a Hub id, or one of {names}")
    return model


class Checkpoint:
    """An encoder of which config, tokenizer and the length of the weights were read and checked, but no weights.

    Attributes:
        name: How the user calls it, with the setting that names it.
        location: A folder or a Hub id.
        config: Its config of transformers.
        tokenizer: Its fast tokenizer, fitted to the config.
    """

    def __init__(self, field: str, model: str, progress: Progress = SILENT) -> None:
        """Open what a setting names: "minilm-l6", a folder, or a Hub id.

        Raises:
            RunError: If it cannot be fetched.
            UsageError: If it is broken or of no use here.
        """
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of fresh heads
        self.name, self.location = f"{field} {model!r}", locate(model, progress, field)
        tensors, size = self._check_files(Path(self.location))
        with self._reading("its config"):
            self.config = transformers.AutoConfig.from_pretrained(self.location, trust_remote_code=False)
        # With the package kernels, transformers would fetch and run what the first names; the second names weights.
        self.config._attn_implementation = self.config.transformers_weights = None
        kind, decodes = self.config.model_type, getattr(self.config, "is_decoder", False)
        known = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        encodes = kind in known and not self.config.is_encoder_decoder and not decodes
        self._require(encodes, f"a {kind} model is not an encoder; {GIVE_AN_ENCODER}")
        with self._reading("its tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.location, trust_remote_code=False)
        fix = "set tokenizer.pad_token on one that has tokenizer.json, and save it again"
        usable = tokenizer.is_fast and tokenizer.pad_token_id is not None
        self._require(usable, f"its tokenizer has no padding token or is not a fast one; {fix}")
        self.tokenizer = fit_tokenizer(tokenizer, self.config)
        layers, fix = getattr(self.config, "num_hidden_layers", 0), "save config.json and model.safetensors together"
        self._require(layers <= tensors, f"config.json has {layers} layers, the weights only {tensors} tensors; {fix}")
        empty = self.load(transformers.AutoModel, weights=False)
        wanted = sum(parameter.numel() for parameter in empty.parameters())
        self._require(wanted <= size, f"config.json has {wanted} parameters, the weights only {size} bytes; {fix}")
        last, table = max(tokenizer.get_vocab().values()), empty.get_input_embeddings()
        numbers = f"numbers tokens up to {last}, but the model has embeddings for {table.num_embeddings}"
        fix = "call model.resize_token_embeddings(len(tokenizer)) and save both again"
        self._require(last < table.num_embeddings, f"its tokenizer {numbers}; {fix}")

    @property
    def label_names(self) -> Names:
        """The names that its config gives to the classes."""
        return tuple(str(self.config.id2label[i]) for i in range(self.config.num_labels))

    def load(self, auto_class: Any, weights: bool = True, fresh_head: bool = False) -> Any:
        """Load the model in eval mode and float32.

        Args:
            auto_class: An auto class of transformers.
            weights: False makes it without memory for its weights, to count them and to look at its layers.
            fresh_head: Whether what stands above the encoder may be missing in the weights.

        Raises:
            UsageError: If weights are damaged or missing.
            RunError: If they cannot be fetched.
        """
        if not weights:
            with self._reading("the model"), torch.device("meta"):
                return auto_class.from_config(self.config, trust_remote_code=False)
        with self._reading("its weights"):
            options = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": fresh_head}
            options |= {"config": self.config, "trust_remote_code": False, "output_loading_info": True}
            model, found = auto_class.from_pretrained(self.location, **options)
        keys = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        needed = f"{model.base_model_prefix}." if fresh_head else ""
        wrong = sorted(key for key in keys if "pooler." not in key and key.startswith(needed))
        fix = "save config.json and model.safetensors together"
        self._require(not wrong, f"its weights lack {', '.join(wrong[:3])} in the shape of config.json; {fix}")
        return model.eval()

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise UsageError(f"{self.name}: {otherwise}")

    def _check_files(self, folder: Path) -> tuple[float, float]:
        """Refuse a folder in which something is missing or cut short; count the weights' tensors and bytes."""
        from safetensors import safe_open

        if not folder.is_dir():
            return float("inf"), float("inf")
        needed = {"config": ["config.json"], "tokenizer": ["tokenizer.json", "vocab.*", "*.model"]}
        for part, names in (needed | {"weights": ["*.safetensors"]}).items():
            there, wanted = any(any(folder.glob(name)) for name in names), " or ".join(names)
            self._require(there, f"the folder has no {part} ({wanted}); save it there with save_pretrained")
        files, tensors = sorted(folder.glob("*.safetensors")), 0
        for path in files:
            with self._reading(path.name), safe_open(path, "pt") as opened:
                tensors += len(opened.keys())
        for path in folder.glob("*.index.json"):  # transformers unpickles what it names otherwise
            with self._reading(path.name):
                shards = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
            fix = "save it again with save_pretrained"
            self._require(shards <= {file.name for file in files}, f"{path.name} names other files than its own; {fix}")
        return tensors, sum(file.stat().st_size for file in files)

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Tell in one sentence what is wrong with a part; transformers raises almost any error for a broken file."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # that of tokenizers
                raise
            kind: type[UsageError | RunError] = UsageError
            reason = f"{part} cannot be read ({' '.join(str(error).split())[:200]})"
            fix = "save config.json, model.safetensors and tokenizer.json again with save_pretrained"
            if "trust_remote_code" in str(error):
                reason, fix = "it needs its own code, which l2a never runs", "give a model that is part of transformers"
            elif not Path(self.location).is_dir():  # the network may be the reason
                kind, fix = RunError, "check the name and the network"
            raise kind(f"{self.name}: {reason}; {fix}") from error


def load_encoder(
    model: str, label_names: Names, seed: int = 0, progress: Progress = SILENT, weights: bool = True
) -> Teacher:
    """Load a pretrained encoder under a fresh classification head, not yet fine-tuned, in eval mode.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        label_names: The C classes of the new head.
        seed: Draws the head's weights.
        progress: Shows the download.
        weights: False gives a teacher without memory for its weights, for checks.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the model is broken or no encoder with a fast tokenizer.
    """
    checkpoint = Checkpoint("teacher.model", model, progress)
    encoder = checkpoint.load(transformers.AutoModel, weights)
    if "pooler" in dict(encoder.named_children()):
        encoder.pooler = None  # mean pooling is used; an untouched pooler would only be counted and hashed
    head = torch.nn.Linear(encoder.config.hidden_size, len(label_names), device=encoder.device)
    if weights:
        torch.nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        torch.nn.init.zeros_(head.bias)
    return Teacher(encoder, checkpoint.tokenizer, label_names, head).eval()


def load_fine_tuned(model: str, label_names: Names, progress: Progress = SILENT, weights: bool = True) -> Teacher:
    """Load a model that already classifies, its C classes brought into the given order by name, in eval mode.

    The other arguments are those of ``load_encoder``.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the model is broken, no encoder with a fast tokenizer, or its class names differ.
    """
    checkpoint = Checkpoint("teacher.model", model, progress)
    names = checkpoint.label_names
    if sorted(names) != sorted(label_names):
        both = f"its labels are {', '.join(names)}, the target's are {', '.join(label_names)}"
        raise UsageError(f"{checkpoint.name}: {both}; rename the labels of one, or set teacher.fine_tuned to false")
    classifier = checkpoint.load(transformers.AutoModelForSequenceClassification, weights)
    order, layer = [names.index(name) for name in label_names], output_layer(classifier)
    layer.weight.data, layer.bias.data = layer.weight.data[order], layer.bias.data[order]
    return Teacher(classifier, checkpoint.tokenizer, label_names, head=None).eval()


def check_teacher(config: TeacherConfig, label_names: Names, max_length: int, progress: Progress = SILENT) -> Teacher:
    """Refuse a teacher that cannot be used, before anything is trained.

    Returns:
        The teacher without memory for its weights: enough to choose a student's size by.

    Raises:
        RunError: If it cannot be fetched.
        UsageError: If it is broken, of no use here, or reads texts of less than ``max_length`` tokens.
    """
    load: Callable[..., Teacher] = load_fine_tuned if config.fine_tuned else load_encoder
    teacher = load(config.model, label_names, progress=progress, weights=False)
    refuse_long_sequences(f"teacher.model {config.model!r}", teacher.positions, max_length)
    return teacher
