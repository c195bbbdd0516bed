"""The commands ``l2a predict``, ``l2a evaluate`` and ``l2a export``."""

from pathlib import Path
from typing import Annotated

import typer

from l2a.cli.options import Overwrite, Quiet, TextColumn, TextPairColumn
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
    threshold: Annotated[float, typer.Option(help="Leave labels of a lower probability empty.")] = 0.0,
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
