"""The commands ``l2a predict``, ``l2a evaluate`` and ``l2a export``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from l2a.cli.options import Overwrite, Quiet, TextColumn, TextPairColumn, print_table
from l2a.config import Columns
from l2a.util.errors import UsageError
from l2a.util.progress import Progress

StudentArgument = Annotated[
    str, typer.Argument(metavar="STUDENT", help="A student folder, a run folder, an ONNX folder or an .onnx file.")
]


def predict_command(
    student: StudentArgument,
    file: Annotated[str, typer.Argument(help="A .csv, .tsv, .jsonl, .parquet or .txt file, also .gz or .xz; or -.")],
    output: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Leave labels of a lower probability empty.")] = 0.0,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    format: Annotated[str, typer.Option(help="Of standard input: csv, tsv, jsonl or txt.")] = "txt",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Classify a file: its lines get a label, a confidence and the probability of each class."""
    source = None if file == "-" else Path(file).expanduser()
    if output and output.exists() and (not overwrite or (source and source.exists() and output.samefile(source))):
        raise UsageError(f"--output {output}: it exists; name another file, or add --overwrite if it is not the input")
    from l2a.serving.classifier import Classifier
    from l2a.serving.predict import predict_file

    with Progress(verbosity=-1 if quiet else 0) as progress:
        columns = Columns(text_column, text_pair_column)
        classifier = Classifier.from_pretrained(student)
        done = predict_file(classifier, source, output, columns, threshold, f".{format}", progress)
        left = f", {done.abstained:,} left without a label" if threshold else ""
        progress.say(f"{done.lines:,} lines, {done.broken:,} broken ones kept{left}: {output or 'standard output'}")


def evaluate_command(
    student: StudentArgument,
    domain: Annotated[str, typer.Argument(help="A labelled file or any domain; its test split is used if it has one.")],
    output: Annotated[Path | None, typer.Option(help="File for all errors, such as errors.csv.")] = None,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
) -> None:
    """Show accuracy, macro-F1, the confusion matrix, each class's scores and the most confident errors."""
    from l2a.serving.classifier import Classifier
    from l2a.serving.predict import evaluate, labelled_texts, write_rows

    classifier = Classifier.from_pretrained(student)
    columns = Columns(text_column, text_pair_column, label_column)
    inputs, labels = labelled_texts(domain, columns, classifier.engine.folder.parent)
    found = evaluate(classifier, inputs, labels)
    for name, value in (("accuracy", found.metrics.accuracy), ("macro-F1", found.metrics.macro_f1)):
        typer.echo(f"{name} {value.value:.1%} ({value.low:.1%} to {value.high:.1%}) on {len(labels):,} texts")
    rows = [
        (name, *(f"{100 * score:.1f}" for score in scores), *map(str, counts))
        for name, scores, counts in zip(found.classes, found.scores, found.confusion, strict=True)
    ]
    headers = ("class", "precision %", "recall %", "F1 %", *(f"as {name}" for name in found.classes))
    print_table(headers, rows, justify="right")
    for error in found.errors[:5]:
        text = " | ".join(error[side] for side in ("text", "text_pair") if side in error)
        typer.echo(f"{error['confidence']:.3f} {error['predicted']}, not {error['label']}: {text:.90}")
    if output:
        write_rows(found.errors, output)


def export_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a student folder.")],
    texts: Annotated[
        str | None, typer.Option(help="Texts to compare on, with labels or without; by default the run's candidates.")
    ] = None,
) -> None:
    """Write the student as ONNX, float32 and int8, into RUN/onnx, if both answer as the PyTorch student does."""
    from l2a.serving.export import comparison_texts, export_onnx

    report = export_onnx(run, *comparison_texts(run, texts))
    measured: dict[str, Callable[[Any], str]] = {
        "model": lambda model: model["file"],
        "MB": lambda model: f"{model['bytes'] / 1e6:.2f}",
        "labels %": lambda model: f"{100 * model['label_agreement']:.1f}",
        "difference": lambda model: f"{model['largest_probability_difference']:.2g}",
        "accuracy %": lambda model: f"{100 * model['accuracy']:.1f}" if "accuracy" in model else "",
        "ms": lambda model: f"{model['latency_ms']['batch_1']:.2f}",
        "ms/32": lambda model: f"{model['latency_ms']['batch_32']:.2f}",
    }
    rows = [[show(model) for show in measured.values()] for model in report["models"]]
    print_table(list(measured), rows, justify="right")
    typer.echo(f"ONNX opset {report['opset']}, compared on {report['texts']:,} texts: {Path(run) / 'onnx'}")
