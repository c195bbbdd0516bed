"""The finished student as an ordinary transformers folder: float16 weights, tokenizer and a model card."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from l2a.files import atomic_write_bytes, atomic_write_text
from l2a.pretraining.config import PretrainConfig
from l2a.pretraining.model import GeneralStudent

OUTPUT_LAYER = "classifier.out_proj."


def save_student(model: GeneralStudent, tokenizer: Any, folder: Path) -> None:
    """Write the student without its projections.

    The output layer is left out: ``AutoModelForSequenceClassification`` draws a fresh one for any number of labels.

    Args:
        model: The trained student.
        tokenizer: The tokenizer it shares with the teacher.
        folder: Receives config.json, model.safetensors and the tokenizer's files.
    """
    classifier: Any = model.classifier
    weights = {
        name: value.detach().to(torch.float16).cpu().contiguous()
        for name, value in classifier.state_dict().items()
        if not name.startswith(OUTPUT_LAYER)
    }
    atomic_write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    classifier.config.architectures = [type(classifier).__name__]
    # Stored in float16, loaded in float32: fine-tuning in half precision diverges.
    classifier.config.dtype = torch.float32
    classifier.config.save_pretrained(folder)
    _plain_tokenizer(tokenizer, int(classifier.config.max_position_embeddings)).save_pretrained(folder)


def _plain_tokenizer(tokenizer: Any, positions: int) -> Any:
    plain = copy.deepcopy(tokenizer)
    plain.model_max_length = positions
    # The last call's truncation and padding would be saved along and surprise those who use the file on its own.
    plain.backend_tokenizer.no_truncation()
    plain.backend_tokenizer.no_padding()
    return plain


def write_card(folder: Path, config: PretrainConfig, facts: Mapping[str, Any]) -> None:
    """Write README.md: what the model is, how it was made and from what.

    Args:
        folder: The model's folder.
        config: Settings of the run.
        facts: Counts, file hashes and versions, as JSON can hold them.
    """
    text = " ".join(f"--text {name}" for name in config.text)
    protect = " ".join(f"--protect {name}" for name in config.protect)
    shape = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(config.student).items())
    command = (
        f"l2a pretrain --teacher {config.teacher} {text} {protect} --steps {config.steps} --seed {config.seed} "
        f"--max-length {config.max_length} --variants {config.variants} --tokens-per-batch {config.tokens_per_batch} "
        f"--learning-rate {config.learning_rate} {shape} --output-dir {config.output_dir.name}"
    )
    atomic_write_text(folder / "README.md", _CARD.format(command=" ".join(command.split()), facts=_table(facts)))


def _table(facts: Mapping[str, Any]) -> str:
    rows = (f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |" for name, value in facts.items())
    return "\n".join(["| fact | value |", "| --- | --- |", *rows])


_CARD = """---
library_name: transformers
pipeline_tag: text-classification
---
# General student

A small sequence classifier without a task: its body was distilled, on unlabelled text, from the teacher's hidden states
(sentence embeddings, the batch's similarity matrix, token states). Its output layer is not part of the checkpoint;
`AutoModelForSequenceClassification.from_pretrained(folder, num_labels=...)` draws a fresh one to be trained.

    {command}

{facts}
"""
