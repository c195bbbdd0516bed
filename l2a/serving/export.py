"""A student as ONNX, float32 and int8; a model is kept only if it answers as the PyTorch student does."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from l2a.data import Floats, TextInput
from l2a.evaluation.metrics import measure_latency
from l2a.report import page, run_folder
from l2a.serving.classifier import Engine, batches, labelled_texts, open_student, run, write_temperature
from l2a.util import RunError, UsageError, atomic_write_text, files, sha256_file, to_json

OPSET, REPORT, STATIC = 17, "export.json", "model_int8_static.onnx"
CALIBRATION_TEXTS = 128  # the last of those to compare on
EXACT = {"agreement": 0.999, "difference": 0.01, "accuracy": 0.001}
INT8 = {"agreement": 0.97, "difference": 2.0, "accuracy": 0.01}
TOLERANCES = {"model.onnx": EXACT, "model_int8.onnx": INT8, STATIC: INT8}
"""Least share of equal labels, largest difference of a logit, and largest loss of accuracy."""


def export_onnx(
    student: str, inputs: Sequence[TextInput], labels: Sequence[str] = (), static: bool = False
) -> dict[str, Any]:
    """Write a student as ONNX into its folder ``onnx``, compare it on given texts, and measure it.

    Args:
        student: A run folder or a student folder.
        inputs: N texts to compare on, N at least 1.
        labels: Of the first of them, as many as are known.
        static: Also write a model whose activations have fixed scales, which some of the texts give.

    Returns:
        The content of ``export.json``: "texts", how many of them are "labelled", "opset", "tolerances", and "models",
        each with its bytes, how it compares, and its latencies as ``measure_latency`` gives them; the PyTorch student
        comes first.

    Raises:
        UsageError: If it is no PyTorch student, or the folder holds other files.
        ImportError: If a package of the extra "export" is missing.
        RunError: If a model is beyond its tolerance; it is not kept then.
    """
    folder, original = Path(student).expanduser() / "onnx", open_student(student)
    weights, refused = original.folder / "model.safetensors", list[str]()
    if not isinstance(original.model, torch.nn.Module) or not weights.is_file():
        raise UsageError(f"student {student!r} has no model.safetensors; give a run folder or a student folder")
    if folder.exists() and not (folder / REPORT).exists():
        raise UsageError(f"{folder} holds files that are no export; move it and run again")
    original.model.to("cpu")
    # Divided by the temperature, so that a difference means the same for every student.
    expected = run(original, inputs) / original.temperature
    models = [_compared(expected, expected, original, weights, inputs, labels)]
    with files.atomic_folder(folder) as temporary:
        _write(original, temporary, inputs[-CALIBRATION_TEXTS:] if static else ())
        for path in sorted(temporary.glob("*.onnx")):
            engine = open_student(path, threads=1)
            found = run(engine, inputs) / engine.temperature
            models.append(_compared(expected, found, engine, path, inputs, labels))
            if problem := _beyond(models[-1], models[0], TOLERANCES[path.name], 1 / max(1, len(labels))):
                refused.append(f"{path.name} is refused, on {len(inputs)} texts {problem}")
                del models[-1]
                path.unlink()
        if len(models) == 1:
            raise RunError("; ".join(refused))
        report = dict(texts=len(inputs), labelled=len(labels), opset=OPSET, tolerances=TOLERANCES, models=models)
        atomic_write_text(temporary / REPORT, to_json(report, indent=1) + "\n")
    mark = files.read_mark(folder.parent / files.MARK)
    if mark["kind"]:  # so that a later run in this folder removes what was exported of this one
        others = {name: digest for name, digest in mark["files"].items() if not name.startswith("onnx/")}
        mark["files"] = others | {f"onnx/{path.name}": sha256_file(path) for path in folder.iterdir()}
        files.write_mark(folder.parent, **mark)
        run_folder.refresh(folder.parent)
    if refused:
        raise RunError(f"{'; '.join(refused)}; what is as it should be is in {folder}")
    return report


def _write(engine: Engine, folder: Path, calibration: Sequence[TextInput]) -> None:
    from onnxruntime.quantization import quant_utils, quantize_dynamic

    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((engine.folder / name).read_bytes())
    engine.tokenizer.save(str(folder / "tokenizer.json"))
    write_temperature(folder, engine.temperature)
    example = {name: torch.ones(2, 4, dtype=torch.int64) for name in engine.read}
    axes = {name: {0: "batch", 1: "length"} for name in example} | {"logits": {0: "batch"}}
    with warnings.catch_warnings(action="ignore"):  # the tracer's
        # Tracing takes a fifteenth of the time of the exporter by torch.export, whose graph is no faster.
        torch.onnx.export(
            engine.model, (), str(folder / "model.onnx"), kwargs=example, input_names=list(example),
            output_names=["logits"], dynamic_axes=axes, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    # Unsigned, since processors without VNNI saturate in the products of signed weights.
    options = {"per_channel": True, "weight_type": quant_utils.QuantType.QUInt8}
    logging.disable(logging.WARNING)  # it advises a step that changes nothing here
    try:
        quantize_dynamic(folder / "model.onnx", folder / "model_int8.onnx", **options)
        if calibration:
            _quantise_statically(engine, folder, calibration, options)
    finally:
        logging.disable(logging.NOTSET)


def _quantise_statically(engine: Engine, folder: Path, texts: Sequence[TextInput], options: dict[str, Any]) -> None:
    import onnx
    from onnxruntime import quantization

    inputs = (batch for _, batch in batches(engine, texts))
    reader = SimpleNamespace(get_next=lambda: next(inputs, None))  # all that is asked of a CalibrationDataReader
    graph, model = onnx.load(folder / "model.onnx").graph, folder / STATIC
    narrow = {one.name for one in graph.initializer if len(one.dims) == 2 and one.dims[0] > one.dims[1]}
    # What gelu leaves has a few large entries, which no fixed scale suits: it would cost 2 % of the labels more.
    narrowing = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in narrow]
    quantization.quantize_dynamic(folder / "model.onnx", model, nodes_to_quantize=narrowing, **options)
    # Layer norms and softmax in 8 bits would break the student; signed weights or activations cost 2 % of the labels.
    quantization.quantize_static(
        model, model, reader, op_types_to_quantize=["MatMul", "Gather"],
        activation_type=options["weight_type"], extra_options={"MatMulConstBOnly": True}, **options,
    )  # fmt: skip


def _compared(
    expected: Floats, found: Floats, engine: Engine, file: Path, inputs: Sequence[TextInput], labels: Sequence[str]
) -> dict[str, Any]:
    facts = {
        "file": file.name, "label_agreement": float((expected.argmax(axis=1) == found.argmax(axis=1)).mean()),
        "bytes": file.stat().st_size, "largest_logit_difference": float(np.abs(expected - found).max()),
        "latency_ms": dict(measure_latency(lambda texts: run(engine, texts).argmax(axis=1), inputs[:64])),
    }  # fmt: skip
    said = np.array(engine.names)[found[: len(labels)].argmax(axis=1)]
    return facts | ({"accuracy": float((said == labels).mean())} if len(labels) else {})


def _beyond(found: Mapping[str, Any], original: Mapping[str, Any], limits: Mapping[str, float], one_text: float) -> str:
    """What is beyond the tolerance, or nothing; one labelled text may always be lost, as few of them say little."""
    agreement, difference = found["label_agreement"], found["largest_logit_difference"]
    loss, allowed = original.get("accuracy", 0.0) - found.get("accuracy", 0.0), max(limits["accuracy"], one_text)
    if not agreement >= limits["agreement"]:
        return f"{agreement:.1%} of the labels are the PyTorch student's (at least {limits['agreement']:.1%} must be)"
    if not difference <= limits["difference"]:  # also for a NaN
        return f"a logit differs by {difference:.3g} from the PyTorch student's (allowed: {limits['difference']})"
    return f"it is less accurate by {loss:.1%} (allowed: {allowed:.1%})" if loss > allowed + 1e-9 else ""


def comparison_texts(student: str, reference: str | None) -> tuple[list[TextInput], list[str]]:
    """Read what an export is compared on.

    Args:
        student: The run folder, whose held-out labelled texts and candidates are read where nothing else is named.
        reference: A file with or without labels, or a domain.

    Returns:
        Texts, and the labels of the first of them, as many as there are.

    Raises:
        UsageError: If there are no texts.
        RunError: If a file of the run is not as the run left it.
    """
    folder = Path(student).expanduser()
    if reference:
        return labelled_texts(reference, needed=False)
    if not (folder / "augmentations.parquet").is_file():
        raise UsageError(f"{folder} has no augmentations.parquet, whose texts to compare on; name others by --texts")
    page.check_run(folder)
    held_out = page.read_evidence(folder)[1].get("held_out", [])
    inputs, _ = labelled_texts(str(folder / "augmentations.parquet"), needed=False)
    return [*(tuple(sides) for *sides, _ in held_out), *inputs], [label for *_, label in held_out]
