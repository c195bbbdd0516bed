"""A student as ONNX, float32 and int8; a model is kept only if it answers as the PyTorch student does."""

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from l2a.data import TextInput
from l2a.evaluation.metrics import measure_latency
from l2a.report.run_folder import refresh
from l2a.serving.classifier import Classifier, labelled_texts, run, write_temperature
from l2a.util import RunError, UsageError, atomic_write_text, files, sha256_file, to_json

OPSET = 17
REPORT = "export.json"


class Tolerance(NamedTuple):
    """Least share of equal labels, largest difference of a probability, and largest loss of accuracy."""

    agreement: float
    difference: float
    accuracy: float


TOLERANCES = {"model.onnx": Tolerance(0.999, 0.001, 0.001), "model_int8.onnx": Tolerance(0.97, 0.3, 0.01)}


def export_onnx(student: str, inputs: Sequence[TextInput], labels: Sequence[str] = ()) -> dict[str, Any]:
    """Write a student as ONNX into its folder ``onnx``, compare it on given texts, and measure it.

    Args:
        student: A run folder or a student folder.
        inputs: N texts to compare on, N at least 1.
        labels: Their N labels, or none.

    Returns:
        The content of ``export.json``: "texts", "opset", "tolerances", and "models", each with its bytes, how it
        compares, and its latencies as ``measure_latency`` gives them; the PyTorch student comes first.

    Raises:
        UsageError: If it is no PyTorch student, a package is missing, or the folder holds other files.
        RunError: If a model is beyond its tolerance; it is not kept then.
    """
    folder, original = Path(student).expanduser() / "onnx", Classifier.from_pretrained(student)
    weights, refused = original.engine.folder / "model.safetensors", list[str]()
    if not isinstance(original.engine.model, torch.nn.Module) or not weights.is_file():
        raise UsageError(f"student {student!r} has no model.safetensors; give a run folder or a student folder")
    if folder.exists() and not (folder / REPORT).exists():
        raise UsageError(f"{folder} holds files that are no export; move it and run again")
    original.engine.model.to("cpu")
    models = [_compared(original, original, weights, inputs, labels)]
    with files.atomic_folder(folder) as temporary:
        _write(original, temporary)
        for name, tolerance in TOLERANCES.items():
            models.append(_compared(original, Classifier(temporary / name, 1), temporary / name, inputs, labels))
            if problem := _beyond(models[-1], models[0], tolerance):
                refused.append(f"{name} is refused, on {len(inputs)} texts {problem}")
                del models[-1]
                (temporary / name).unlink()
        if len(models) == 1:
            raise RunError(refused[0])
        tolerances = {name: tolerance._asdict() for name, tolerance in TOLERANCES.items()}
        report = {"texts": len(inputs), "opset": OPSET, "tolerances": tolerances, "models": models}
        atomic_write_text(temporary / REPORT, to_json(report, indent=1) + "\n")
    mark = files.read_mark(folder.parent / files.MARK)
    if mark["kind"]:  # so that a later run in this folder removes what was exported of this one
        others = {name: digest for name, digest in mark["files"].items() if not name.startswith("onnx/")}
        mark["files"] = others | {f"onnx/{path.name}": sha256_file(path) for path in folder.iterdir()}
        atomic_write_text(folder.parent / files.MARK, to_json({"format": 1, **mark}, indent=1) + "\n")
        refresh(folder.parent)
    if refused:
        raise RunError(f"{refused[0]}; the other model is in {folder}")
    return report


def _write(original: Classifier, folder: Path) -> None:
    try:
        from onnxruntime.quantization import quant_utils, quantize_dynamic
    except ImportError as error:
        raise UsageError(f"export: {error.name} is missing; install it by: pip install 'l2a[export]'") from error
    engine = original.engine
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(engine.folder / name, folder / name)
    engine.tokenizer.save(str(folder / "tokenizer.json"))
    write_temperature(folder, engine.temperature)
    example = {name: torch.ones(2, 4, dtype=torch.int64) for name in engine.read}
    axes = {name: {0: "batch", 1: "length"} for name in example} | {"logits": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's
        # Tracing takes a fifteenth of the time of the exporter by torch.export, whose graph is no faster.
        torch.onnx.export(
            engine.model, (), str(folder / "model.onnx"), kwargs=example, input_names=list(example),
            output_names=["logits"], dynamic_axes=axes, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    logging.disable(logging.WARNING)  # it advises a step that changes nothing here
    # Unsigned, since processors without VNNI saturate in the products of signed weights.
    kind = quant_utils.QuantType.QUInt8
    quantize_dynamic(folder / "model.onnx", folder / "model_int8.onnx", per_channel=True, weight_type=kind)
    logging.disable(logging.NOTSET)


def _compared(
    original: Classifier, other: Classifier, file: Path, inputs: Sequence[TextInput], labels: Sequence[str]
) -> dict[str, Any]:
    expected, found = original.predict_proba(inputs), other.predict_proba(inputs)
    latency = measure_latency(lambda texts: run(other.engine, texts).argmax(axis=1), inputs[:64])
    facts = {
        "file": file.name, "bytes": file.stat().st_size, "latency_ms": dict(latency),
        "label_agreement": float((expected.argmax(axis=1) == found.argmax(axis=1)).mean()),
        "largest_probability_difference": float(np.abs(expected - found).max()),
    }  # fmt: skip
    accuracy = {"accuracy": float((other.classes_[found.argmax(axis=1)] == labels).mean())} if len(labels) else {}
    return facts | accuracy


def _beyond(found: dict[str, Any], original: dict[str, Any], tolerance: Tolerance) -> str:
    """What is beyond the tolerance, or nothing."""
    agreement, difference = found["label_agreement"], found["largest_probability_difference"]
    if not agreement >= tolerance.agreement:
        return f"{agreement:.1%} of the labels are the PyTorch student's (at least {tolerance.agreement:.1%} must be)"
    if not difference <= tolerance.difference:  # also for a NaN
        return f"a probability differs by {difference:.3g} from the PyTorch student's (allowed: {tolerance.difference})"
    loss = original.get("accuracy", 0.0) - found.get("accuracy", 0.0)
    return f"it is less accurate by {loss:.1%} (allowed: {tolerance.accuracy:.1%})" if loss > tolerance.accuracy else ""


def comparison_texts(student: str, reference: str | None) -> tuple[list[TextInput], list[str]]:
    """Read what an export is compared on.

    Args:
        student: The run folder, whose candidates are read where nothing else is named.
        reference: A file with or without labels, or a domain.

    Returns:
        Texts, and their labels or none.

    Raises:
        UsageError: If there are no texts.
    """
    path = Path(reference or Path(student) / "augmentations.parquet").expanduser()
    if reference is None and not path.is_file():
        raise UsageError(f"{path}: there is no such file of texts to compare on; name one by --texts")
    return labelled_texts(str(path), needed=False)
