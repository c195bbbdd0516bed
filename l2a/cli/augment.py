"""The command ``l2a augment``: any operator on any file of texts, without distilling."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from l2a.errors import UsageError


def augment_command(
    input: Annotated[Path, typer.Argument(help="Texts: .txt (one a line), .csv, .tsv, .jsonl or .parquet.")],
    output: Annotated[Path, typer.Argument(help="Where the new texts go: a .jsonl or .parquet file.")],
    operator: Annotated[
        str, typer.Option(help="augpro_mix, augpro_fgsm, knn, eda, tinybert, source or target_only.")
    ] = "augpro_mix",
    degree: Annotated[
        str | None, typer.Option(help='Share of the tokens to change, or "auto"; by default the operator\'s own.')
    ] = None,
    copies: Annotated[int, typer.Option(help="New texts made of each text.")] = 1,
    seed: Annotated[int, typer.Option(help="Decides every random draw.")] = 0,
    source: Annotated[
        str | None, typer.Option(help="File or domain whose texts are mixed in; by default the input itself.")
    ] = None,
    teacher: Annotated[str, typer.Option(help="minilm-l6, a model folder or a Hub id.")] = "minilm-l6",
    student: Annotated[str | None, typer.Option(help="Classifier that augpro_fgsm turns against --teacher.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a step; another size draws other numbers.")] = 256,
    max_length: Annotated[int, typer.Option(help="Tokens read of a text.")] = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show errors only.")] = False,
) -> None:
    """Make new texts from a file of texts; the same command goes on after an interruption."""
    share = _parse_degree(degree)
    from l2a.pipeline.augment_file import AugmentJob, augment_file
    from l2a.progress import RunProgress

    job = AugmentJob(
        input, output, operator, share, copies, seed, source, teacher, student, batch_size, max_length, overwrite
    )
    progress = RunProgress(log_file=None, verbosity=-1 if quiet else 0)
    try:
        written = augment_file(job, progress)
    finally:
        progress.close()
    if not quiet:
        typer.echo(f"{written} texts are in {output}")


def _parse_degree(degree: str | None) -> Literal["auto"] | float | None:
    if degree is None or degree == "auto":
        return degree  # type: ignore[return-value]
    try:
        return float(degree)
    except ValueError as error:
        raise UsageError(f'--degree: {degree!r} came; "auto" or a share above 0 and at most 1 is needed') from error
