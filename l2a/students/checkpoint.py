"""A student that starts from any checkpoint of transformers."""

import torch

from l2a.errors import RunError, UsageError
from l2a.quiet import silence_transformers
from l2a.students.student import Student


def load_checkpoint(model: str, label_names: tuple[str, ...]) -> Student:
    """Load a checkpoint as a classifier.

    Args:
        model: A folder or Hub id.
        label_names: The C classes.

    Returns:
        The student; an output layer of another number of classes is drawn afresh.

    Raises:
        RunError: If it cannot be loaded.
        UsageError: If it has no fast tokenizer or is no encoder.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    silence_transformers()
    names = dict(enumerate(label_names))
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model,
            dtype=torch.float32,
            use_safetensors=True,
            id2label=names,
            label2id={name: i for i, name in names.items()},
            ignore_mismatched_sizes=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"student.model {model!r}: not loadable ({reason}); give a model folder or a Hub id") from error
    if not tokenizer.is_fast:
        raise UsageError(f"student.model {model!r}: it has no fast tokenizer; save tokenizer.json into its folder")
    student = Student(loaded, tokenizer)
    if tokenizer.pad_token_id is None or student.output.bias is None:
        raise UsageError(
            f"student.model {model!r}: a {loaded.config.model_type} without padding token or output bias came; "
            "encoders such as BERT, ELECTRA, DistilBERT or ModernBERT are allowed"
        )
    return student
