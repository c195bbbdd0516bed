"""The command line: runs and their students, the cache, the other groups of commands, and how errors are shown."""

import importlib.metadata
import os
import platform
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from l2a import __version__
from l2a.cli import options
from l2a.cli.data import augment_command, domains_app, pretrain_command
from l2a.cli.options import Overwrite, Quiet, TextColumn, TextPairColumn, Verbose, print_table, with_run_options
from l2a.cli.research import experiment_app, selector_app
from l2a.config import Columns, DistillConfig, as_yaml
from l2a.util.errors import RunError, UsageError, os_error_sentence
from l2a.util.files import cache_root, cache_sizes, clear_cache, to_json
from l2a.util.progress import Progress, process_rank

app = typer.Typer(
    help="Distil a small text classifier for a domain with few labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: loading rich for it would double the start-up time
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(domains_app, name="domains")
app.add_typer(experiment_app, name="experiment")
app.add_typer(selector_app, name="selector")
cache_app = typer.Typer(help="Show or clear the cache.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
VARIABLES = ("L2A_CACHE", "HF_HOME", "HF_HUB_", "OMP_", "MKL_", "CUDA_VISIBLE", "ACCELERATE_", "WORLD_SIZE", "RANK")
"""Beginnings of the environment variables that change what l2a does."""
Student = Annotated[str, typer.Argument(metavar="STUDENT", help="A student, run or ONNX folder, or an .onnx file.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"l2a {__version__}")
        raise typer.Exit


@app.command("distill")
@with_run_options()
def distill_command(
    config: DistillConfig,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration and stop.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Distil a small student for the target domain and show how it compares."""
    if print_config:
        typer.echo(as_yaml(config), nl=False)
        return
    from l2a.pipeline.distill import distill

    result = distill(config, verbosity=-1 if quiet else int(verbose))
    if not quiet and process_rank() == 0:
        print_result(result)


def print_result(result: Any) -> None:
    """Print the comparison and where everything is."""
    from l2a.report.page import verdict
    from l2a.report.run_folder import SHORT_HEADERS, short_cells

    print_table(SHORT_HEADERS, short_cells(result.rows), justify="right")
    typer.echo(
        "95 % bootstrap intervals over the test examples; ms: CPU time a text on one thread, alone and in batches of "
        "32, median ± half the interquartile range"
    )
    typer.echo(verdict(result.metrics))
    agreement = [facts["selector"].get("tier_correlation") for facts in result.metrics.get("rounds", [])]
    if agreement and None not in agreement:
        values = ", ".join(f"{value:.2f}" for value in agreement)
        typer.echo(f"selector: rank correlation of its fast reward with real distillation {values}, one a round")
    student, metrics = result.output_dir / "student", result.output_dir / "metrics.json"
    typer.echo(f"model ({result.student}): {student}    evidence: {metrics}")
    if (result.output_dir / "report.html").exists():
        typer.echo(f"page: {result.output_dir / 'report.html'}")


@app.command("report")
def report_command(run: Annotated[Path, typer.Argument(help="Output folder of a finished l2a distill.")]) -> None:
    """Draw the page of a finished run again, as report.html in its folder."""
    from l2a.report.page import renew_page

    typer.echo(f"page: {renew_page(run)}")


@app.command("predict")
def predict_command(
    student: Student,
    file: Annotated[str, typer.Argument(help="A .csv, .tsv, .jsonl, .parquet or .txt file, also .gz or .xz; or -.")],
    output: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Leave labels of a lower probability empty.")] = 0.0,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    format: Annotated[str, typer.Option(help="Of standard input: csv, tsv, jsonl or txt.")] = "txt",
    workers: options.Workers = None,
    address: options.Address = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Classify a file: its lines get a label, a confidence and the probability of each class."""
    source = None if file == "-" else Path(file).expanduser()
    if output and output.exists() and (not overwrite or (source and source.exists() and output.samefile(source))):
        raise UsageError(f"--output {output} exists; name another file, or add --overwrite if it is not the input")
    from l2a.serving.classifier import Classifier
    from l2a.serving.predict import predict_file
    from l2a.util.cluster import open_client

    with Progress(verbosity=-1 if quiet else 0) as progress, open_client(workers, address) as client:
        columns = Columns(text_column, text_pair_column)
        classifier = Classifier.from_pretrained(student)
        done = predict_file(classifier, source, output, columns, threshold, f".{format}", progress, client)
        left = f", {done.abstained:,} left without a label" if threshold else ""
        progress.say(f"{done.lines:,} lines, {done.broken:,} broken ones kept{left}: {output or 'standard output'}")


@app.command("evaluate")
def evaluate_command(
    student: Student,
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


@app.command("export")
def export_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a student folder.")],
    texts: Annotated[str | None, typer.Option(help="Texts to compare on; by default the run's candidates.")] = None,
) -> None:
    """Write the student as ONNX, float32 and int8, into RUN/onnx, if both answer as the PyTorch student does."""
    from l2a.serving.export import comparison_texts, export_onnx

    report = export_onnx(run, *comparison_texts(run, texts))
    rows = [
        (one["file"], f"{one['bytes'] / 1e6:.2f}", f"{100 * one['label_agreement']:.1f}",
         f"{one['largest_probability_difference']:.2g}", f"{100 * one['accuracy']:.1f}" if "accuracy" in one else "",
         *(f"{one['latency_ms'][size]:.2f}" for size in ("batch_1", "batch_32"))) for one in report["models"]
    ]  # fmt: skip
    print_table(("model", "MB", "labels %", "difference", "accuracy %", "ms", "ms/32"), rows, justify="right")
    typer.echo(f"ONNX opset {report['opset']}, compared on {report['texts']:,} texts: {Path(run) / 'onnx'}")


@app.command("push")
def push_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a finished l2a distill.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hub, OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that nobody else can see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the folder and show what would go.")] = False,
) -> None:
    """Upload the student of a run, its card and its ONNX models, if any, to the Hub; none of the run's data."""
    from l2a.report.publish import files_to_push, push

    files = files_to_push(run, repo)
    sizes = [(name, f"{path.stat().st_size / 1e6:.3f}") for name, path in files.items()]
    print_table(("file", "MB"), sizes, f"{len(sizes)} files", justify="right")
    typer.echo(f"not uploaded (--dry-run): {repo}" if dry_run else f"uploaded: {push(files, repo, private)}")


app.command("augment")(augment_command)
app.command("pretrain")(pretrain_command)


@app.command("env")
def env_command(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print what a bug report needs: versions, processor, memory, CUDA, cache and extras."""
    facts = _environment()
    if json:
        typer.echo(to_json(facts, indent=1))
        return
    for name, value in facts.items():
        listed = value.items() if isinstance(value, dict) else [("", value)]
        typer.echo(f"{name:<12}{', '.join(f'{part} {found}'.strip() for part, found in listed)}")


def _environment() -> dict[str, Any]:
    import psutil
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name as plain

    installed = importlib.metadata.distributions()
    versions: dict[str, str] = {plain(each.metadata["Name"]): each.version for each in installed}
    needed, memory = map(Requirement, importlib.metadata.requires("l2a") or ()), psutil.virtual_memory()
    described = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = re.findall(r"^model name\s*: (.*)", described, re.MULTILINE)
    facts = {
        "l2a": f"{__version__} in {Path(__file__).parents[1]}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": platform.platform(),
        "processor": f"{(*models, platform.processor())[0]}, {os.cpu_count()} cores",
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free",
        "packages": {  # those of the extras too, but for the tools of developers
            each.name: versions.get(plain(each.name), "absent") for each in needed if "dev" not in str(each.marker)
        },
        "cache": f"{cache_root()}, {sum(size for _, size in cache_sizes().values()) / 1e6:,.1f} MB",
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    }
    try:
        import torch

        from l2a.util.training import arithmetic, best_device
    except (ImportError, OSError) as error:  # a broken installation is a reason to ask
        return facts | {"torch": f"cannot be imported: {error}"}
    device = best_device()
    graphics = torch.cuda.get_device_name(device) if device.type == "cuda" else "no usable GPU"
    kernels = f"{torch.backends.cpu.get_cpu_capability()}, threads {torch.get_num_threads()}"
    cuda = f"{torch.version.cuda or 'none in this torch'}, {graphics}"
    return facts | {"arithmetic": f"{arithmetic(device)}, {kernels}", "cuda": cuda}


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options that come before a command."""


@cache_app.command("list")
def list_cache() -> None:
    """Show where the cache is and what it holds."""
    typer.echo(f"{cache_root()}")
    for kind, (entries, size) in cache_sizes().items():
        typer.echo(f"{kind:<16} {entries:>6} entries {size / 1e6:>10.1f} MB")


@cache_app.command("clear")
def clear(
    kinds: Annotated[list[str] | None, typer.Argument(help="Kinds, as `list` names them; all by default.")] = None,
) -> None:
    """Remove cache entries; what a later run needs is fetched or computed again."""
    typer.echo(f"{clear_cache(tuple(kinds or ())) / 1e6:.1f} MB freed")


class _Interrupted(BaseException):
    """Ctrl-C or a request to end; the command-line library would swallow a KeyboardInterrupt and say nothing."""


def _interrupt(number: int, _: object) -> None:
    raise _Interrupted(number)


def main() -> None:
    """Run the command line: exit code 0 for success, 1 for a failed run, 2 for wrong usage, 128 + a signal's number.

    Signals are exceptions, so that what is half written is cleaned up.
    """
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except UsageError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except (_Interrupted, KeyboardInterrupt) as error:
        kept = "trained teachers, labels, finished cells and the last state of what was in training are kept"
        again = shlex.join(["l2a", *sys.argv[1:]])
        _fail(f"interrupted; {kept}; go on with: {again}", 128 + (error.args or (signal.SIGINT,))[0])
    except MemoryError:
        _fail("out of memory; lower kd.batch_size, kd.pool_size or --max-length, or close other programs", 1)
    except OSError as error:
        _fail(os_error_sentence(error), 1)


def _fail(message: str, code: int) -> None:
    # One line whatever a file holds, and nothing in it that a terminal obeys.
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
    typer.echo(f"error: {shown}", err=True)
    sys.exit(code)
