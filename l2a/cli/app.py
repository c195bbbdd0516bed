"""The command line: runs, their students, texts, domains and the cache, and how errors are shown."""

import os
import platform
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, Typer, echo

from l2a import __version__
from l2a.cli import options, research
from l2a.config import Columns, DistillConfig, GeneratorConfig, as_yaml
from l2a.util import Progress, RunError, UsageError, build, errors, files, find_card, list_cards, process_rank

# Help is plain: loading rich for it would double the start-up time.
app = Typer(
    help="Distil a small text classifier for a domain with few labels.", no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
domains_app = Typer(help="List, show and check domains.", no_args_is_help=True)
cache_app = Typer(help="Show or clear the cache.", no_args_is_help=True)
app.add_typer(domains_app, name="domains")
app.add_typer(research.experiment_app, name="experiment")
app.add_typer(research.selector_app, name="selector")
app.add_typer(cache_app, name="cache")
VARIABLES = ("L2A_CACHE", "HF_HOME", "HF_HUB_", "OMP_", "MKL_", "CUDA_VISIBLE", "ACCELERATE_", "WORLD_SIZE", "RANK")
"""Beginnings of the environment variables that change what l2a does."""
FinishedRun = Annotated[Path, Argument(metavar="RUN", help="Output folder of a finished l2a distill.")]
Workers = Annotated[int | None, Option(min=1, help="Processes of a Dask cluster to start on this machine.")]
Address = Annotated[str | None, Option(help="Scheduler of a running Dask cluster: tcp://10.0.0.1:8786.")]
Kinds = Annotated[list[str] | None, Argument(help="Kinds, as `list` names them; all by default.")]
Student = Annotated[str, Argument(metavar="STUDENT", help="A student, run or ONNX folder, or an .onnx file.")]


@app.command("distill")
@options.with_run_options()
def distill_command(
    config: DistillConfig,
    print_config: Annotated[bool, Option("--print-config", help="Print the configuration and stop.")] = False,
    workers: Workers = None, address: Address = None, verbose: options.Verbose = False, quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Distil a small student for the target domain and show how it compares."""
    if print_config:
        echo(as_yaml(config), nl=False)
        return
    from l2a.pipeline.distill import distill

    result = distill(config, verbosity=-1 if quiet else int(verbose), workers=workers, address=address)
    if not quiet and process_rank() == 0:
        print_result(result)


def print_result(result: Any) -> None:
    """Print the comparison and where everything is."""
    from l2a.report import page, run_folder

    options.print_table(run_folder.SHORT_HEADERS, run_folder.short_cells(result.rows), numeric=True)
    times = "CPU time a text on one thread, alone and in batches of 32, median ± half the interquartile range"
    echo(f"95 % bootstrap intervals over the test examples; ms: {times}")
    echo(page.verdict(result.metrics))
    agreement = [facts["selector"].get("tier_correlation") for facts in result.metrics.get("rounds", [])]
    if agreement and None not in agreement:
        values = ", ".join(f"{value:.2f}" for value in agreement)
        echo(f"selector: rank correlation of its fast reward with real distillation {values}, one a round")
    folder = result.output_dir
    echo(f"model ({result.student}): {folder / 'student'}    evidence: {folder / 'metrics.json'}")
    if (folder / "report.html").exists():
        echo(f"page: {folder / 'report.html'}")


@app.command("report")
def report_command(run: FinishedRun) -> None:
    """Draw the page of a finished run again, as report.html in its folder."""
    from l2a.report.page import renew_page

    echo(f"page: {renew_page(run)}")


@app.command("predict")
def predict_command(
    student: Student,
    file: Annotated[str, Argument(help="A .csv, .tsv, .jsonl, .parquet or .txt file, also .gz or .xz; or -.")],
    output: Annotated[Path | None, Option(help="File to write; standard output by default.")] = None,
    threshold: Annotated[float, Option(min=0, max=1, help="Leave labels of a lower probability empty.")] = 0.0,
    text_column: options.TextColumn = None, text_pair_column: options.TextPairColumn = None,
    format: Annotated[str, Option(help="Of standard input: csv, tsv, jsonl or txt.")] = "txt",
    workers: Workers = None, address: Address = None,
    overwrite: options.Overwrite = False, quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Classify a file: its lines get a label, a confidence and the probability of each class."""
    source = None if file == "-" else Path(file).expanduser()
    if output and output.exists() and (not overwrite or (source and source.exists() and output.samefile(source))):
        raise UsageError(f"--output {output} exists; name another file, or add --overwrite if it is not the input")
    from l2a.serving.classifier import Classifier, predict_file
    from l2a.util.cluster import open_client

    with Progress(verbosity=-1 if quiet else 0) as progress, open_client(workers, address) as client:
        columns, classifier = Columns(text_column, text_pair_column), Classifier.from_pretrained(student)
        done = predict_file(classifier, source, output, columns, threshold, f".{format}", progress, client)
        left = f", {done.abstained:,} left without a label" if threshold else ""
        progress.say(f"{done.lines:,} lines, {done.broken:,} broken ones kept{left}: {output or 'standard output'}")


@app.command("evaluate")
def evaluate_command(
    student: Student,
    domain: Annotated[str, Argument(help="A labelled file or any domain; its test split is used if it has one.")],
    output: Annotated[Path | None, Option(help="File for all errors, such as errors.csv.")] = None,
    text_column: options.TextColumn = None, text_pair_column: options.TextPairColumn = None,
    label_column: options.LabelColumn = None,
) -> None:  # fmt: skip
    """Show accuracy, macro-F1, the confusion matrix, each class's scores and the most confident errors."""
    from l2a.serving.classifier import Classifier, evaluate, labelled_texts, write_rows

    classifier = Classifier.from_pretrained(student)
    columns = Columns(text_column, text_pair_column, label_column)
    found = evaluate(classifier, *labelled_texts(domain, columns, classifier.engine.folder.parent))
    for name, value in (("accuracy", found.metrics.accuracy), ("macro-F1", found.metrics.macro_f1)):
        echo(f"{name} {value.value:.1%} ({value.low:.1%} to {value.high:.1%}) on {found.confusion.sum():,} texts")
    measured = zip(found.classes, found.scores, found.confusion, strict=True)
    rows = [(name, *(f"{100 * score:.1f}" for score in scores), *map(str, counts)) for name, scores, counts in measured]
    headers = ("class", "precision %", "recall %", "F1 %", *(f"as {name}" for name in found.classes))
    options.print_table(headers, rows, numeric=True)
    for error in found.errors[:5]:
        text = " | ".join(error[side] for side in ("text", "text_pair") if side in error)
        echo(f"{error['confidence']:.3f} {error['predicted']}, not {error['label']}: {text:.90}")
    if output:
        write_rows(found.errors, output)


@app.command("export")
def export_command(
    run: Annotated[str, Argument(metavar="RUN", help="A run folder, or a student folder.")],
    texts: Annotated[str | None, Option(help="Texts to compare on; by default the run's own, some labelled.")] = None,
    static: Annotated[bool, Option("--static", help="Also write one with fixed scales of activations.")] = False,
) -> None:
    """Write the student as ONNX, float32 and int8, into RUN/onnx, if both answer as the PyTorch student does."""
    from l2a.serving.export import comparison_texts, export_onnx

    inputs, known = comparison_texts(run, texts)
    echo(f"writing the models and comparing them on {len(inputs):,} texts, which can take a minute", err=True)
    report = export_onnx(run, inputs, known, static)
    rows = []
    for one in report["models"]:
        agreement = (f"{100 * one['label_agreement']:.1f}", f"{one['largest_logit_difference']:.2g}")
        accuracy = f"{100 * one['accuracy']:.1f}" if "accuracy" in one else ""
        times = [f"{one['latency_ms'][batch]:.2f}" for batch in ("batch_1", "batch_32")]
        rows.append((one["file"], f"{one['bytes'] / 1e6:.2f}", *agreement, accuracy, *times))
    options.print_table(("model", "MB", "labels %", "logits", "accuracy %", "ms", "ms/32"), rows, numeric=True)
    compared = f"compared on {report['texts']:,} texts ({report['labelled']:,} labelled) with PyTorch's"
    limited = "equal labels and the largest difference of a logit over the temperature, both within the limits of"
    echo(f"ONNX opset {report['opset']}, {compared}: {limited} export.json: {Path(run) / 'onnx'}")


@app.command("push")
def push_command(
    run: FinishedRun, repo: Annotated[str, Argument(metavar="REPO", help="Repository of the Hub, OWNER/NAME.")],
    private: Annotated[bool, Option("--private", help="Make a repository that nobody else can see.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check the folder and show what would go.")] = False,
) -> None:  # fmt: skip
    """Upload the student of a run, its card and its ONNX models, if any, to the Hub; none of the run's data."""
    from l2a.report.run_folder import files_to_push, push

    files = files_to_push(run, repo)
    sizes = [(name, f"{path.stat().st_size / 1e6:.3f}") for name, path in files.items()]
    options.print_table(("file", "MB"), sizes, f"{len(sizes)} files", numeric=True)
    echo(f"not uploaded (--dry-run): {repo}" if dry_run else f"uploaded: {push(files, repo, private)}")


@app.command("augment")
def augment_command(
    input: Annotated[Path, Argument(help="Texts: .txt (one per line) or a table such as .csv, .jsonl or .parquet.")],
    output: Annotated[Path, Argument(help="Where the new texts go: a .jsonl or .parquet file.")],
    operator: Annotated[str, Option(help="Such as knn or eda; an unknown name lists all.")] = "augpro_mix",
    degree: Annotated[str | None, Option(help='Share of tokens to change or "auto"; default: the operator\'s.')] = None,
    copies: Annotated[int, Option(min=1, help="New texts per text.")] = 1,
    seed: Annotated[int, Option(min=0, help="Seed of every random draw.")] = 0,
    source: Annotated[str | None, Option(help="File or domain whose texts are mixed in; else the input's.")] = None,
    teacher: options.Encoder = "minilm-l6",
    student: Annotated[str | None, Option(help="For augpro_fgsm: a student with the teacher's labels.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Texts per step; it also changes the random draws.")] = 1024,
    max_length: Annotated[int, Option(min=8, help="Tokens read of each text.")] = 128,
    text_column: options.TextColumn = None, text_pair_column: options.TextPairColumn = None,
    source_text_column: Annotated[str | None, Option(help="Column of the text in --source.")] = None,
    source_text_pair_column: Annotated[str | None, Option(help="Column of its second text, for pairs.")] = None,
    overwrite: options.Overwrite = False, quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Make new texts from a file of texts; the output file appears when all are made."""
    share = None if degree is None else build(GeneratorConfig, {"degree": degree}, "--degree").degree
    from l2a.pipeline.augment import AugmentJob, augment_file

    columns = Columns(text_column, text_pair_column)
    source_columns = Columns(source_text_column or text_column, source_text_pair_column or text_pair_column)
    files, texts = (input, output, operator, share, copies, seed, source), (batch_size, max_length, overwrite)
    job = AugmentJob(*files, teacher, student, *texts, columns, source_columns)
    with Progress(verbosity=-1 if quiet else 0) as progress:
        written = augment_file(job, progress)
    if not quiet:
        echo(f"{written} texts are in {output}")


@app.command("pretrain")
def pretrain_command(
    text: Annotated[list[str], Option(help="Text, labelled or not: file, folder, domain or Hub id; repeatable.")],
    output_dir: Annotated[Path, Option(help="Folder of the student; the same command resumes a run.")],
    protect: Annotated[list[str] | None, Option(help="Domain to keep out, such as a later target; repeatable.")] = None,
    teacher: options.Encoder = "minilm-l6",
    steps: Annotated[int, Option(help="Optimizer steps, of 128 texts each.")] = 4000,
    seed: Annotated[int, Option(help="Seed of initial weights, texts and order.")] = 0,
    max_length: Annotated[int, Option(help="Longest input in tokens.")] = 128,
    learning_rate: Annotated[float, Option(help="Peak learning rate.")] = 8e-4,
    embedding_size: Annotated[int, Option(help="Width of the student's word embeddings.")] = 80,
    hidden_size: Annotated[int, Option(help="Width of its layers.")] = 128,
    layers: Annotated[int, Option(help="Number of its layers.")] = 2,
    overwrite: options.Overwrite = False, verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Distil a small general student from a pretrained encoder, without labels."""
    from l2a.pretrain.trainer import PretrainConfig, pretrain

    numbers = (steps, seed, max_length, learning_rate, embedding_size, hidden_size, layers)
    config = PretrainConfig(output_dir, tuple(text), tuple(protect or ()), teacher, *numbers, overwrite)
    with Progress(verbosity=int(verbose)) as progress:
        folder = pretrain(config, progress)
    echo(f"the general student is in {folder}; use it with: l2a distill --student {folder}")


@domains_app.command("list")
def list_domains() -> None:
    """List the domain cards: the shipped ones and those in ./domains."""
    from l2a.data.domains import load_card

    shown = {}
    for name in list_cards("domains"):
        try:
            card = load_card(name)
            shown[name] = f"{card.description}\nlabels: {_labels(card.labels)}\n{_sizes(card)}\nlicence: {card.licence}"
        except UsageError as error:
            shown[name] = f"note: skipped, because it is not a domain card: {error}"
    options.print_facts(shown)


@domains_app.command("show")
def show_domain(name: Annotated[str, Argument(help="Name of a domain card.")]) -> None:
    """Show one domain card: task, labels, origin, licence, sizes."""
    from l2a.data.domains import load_card

    card = load_card(name)
    origin = f"{card.artifact.package} {card.artifact.version} ({card.artifact.kind})" if card.artifact else card.data
    facts = {"name": card.name, "description": card.description, "task": card.task, "labels": _labels(card.labels)}
    facts |= {"sizes": _sizes(card), "licence": card.licence, "citation": card.citation or "none"}
    options.print_facts(facts | {"origin": origin, "card": find_card("domains", name)})


def _labels(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) or "none, it is text for --unlabelled"


def _sizes(card: Any) -> str:
    return ", ".join(f"{split} {size}" for split, size in card.sizes.items()) or "sizes not given"


def _count(counts: dict[str, int], fact: str) -> str:
    return f"{counts[fact]}" + (f" ({counts[fact] / counts['examples']:.0%})" if fact.startswith("label ") else "")


@domains_app.command("check")
def check(
    path: Annotated[str, Argument(help="A card's name, a file, a folder of splits, or a Hub id name[:config].")],
    text_column: options.TextColumn = None, text_pair_column: options.TextPairColumn = None,
    label_column: options.LabelColumn = None,
) -> None:  # fmt: skip
    """Print sizes, label balance, lengths, duplicates and overlaps, and what is wrong, by line."""
    from l2a.data import domains, readers

    with Progress() as progress:
        found = domains.read_domain(path, Columns(text_column, text_pair_column, label_column), progress=progress)
    if counts := {split: found.counts(split) for split in readers.SPLITS if found.of(split)}:
        kind = "pairs of texts" if found.is_pair else "single texts"
        echo(f"{found.name}: {kind}, labels: {_labels(sorted(found.label_names))}")
        rows = [(fact, *(_count(each, fact) for each in counts.values())) for fact in next(iter(counts.values()))]
        options.print_table(("", *counts), rows)
    lines = [f"note: {note}" for note in found.notes()] + [f"wrong: {problem}" for problem in found.problems[:50]]
    if len(found.problems) > 50:
        lines.append(f"and {len(found.problems) - 50} more problems")
    echo("\n".join(lines if found.problems else [*lines, "nothing is wrong"]))
    raise Exit(2 if found.problems else 0)


@app.command("env")
def env_command(json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """Print what a bug report needs: versions, processor, memory, CUDA, cache and extras."""
    if json:
        echo(files.to_json(_environment(), indent=1))
    else:
        options.print_facts(_environment())


def _environment() -> dict[str, Any]:
    from importlib import metadata

    import psutil
    from packaging.requirements import Requirement

    # Those of the extras too, but for the tools of developers.
    needed = [one.name for one in map(Requirement, metadata.requires("l2a") or ()) if "dev" not in str(one.marker)]
    packages = {name: next((one.version for one in metadata.distributions(name=name)), "absent") for name in needed}
    described = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(": ")[2] for line in described.splitlines() if line.startswith("model name")]
    memory, cached = psutil.virtual_memory(), sum(size for _, size in files.cache_sizes().values())
    facts = {
        "l2a": f"{__version__} in {Path(__file__).parents[1]}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": platform.platform(),
        "processor": f"{(*models, platform.processor())[0]}, {os.cpu_count()} cores",
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free",
        "packages": packages,
        "cache": f"{files.cache_root()}, {cached / 1e6:,.1f} MB",
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)} or "none",
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


@cache_app.command("list")
def list_cache() -> None:
    """Show where the cache is and what it holds."""
    echo(f"{files.cache_root()}")
    for kind, (entries, size) in files.cache_sizes().items():
        echo(f"{kind:<16} {entries:>6} entries {size / 1e6:>10.1f} MB")


@cache_app.command("clear")
def clear(kinds: Kinds = None) -> None:
    """Remove cache entries; what a later run needs is fetched or computed again."""
    echo(f"{files.clear_cache(tuple(kinds or ())) / 1e6:.1f} MB freed")


def _show_version(wanted: bool) -> None:
    if wanted:
        echo(f"l2a {__version__}")
        raise Exit


Version = Annotated[bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")]


@app.callback()
def _options(version: Version = False) -> None:
    """Hold the options that come before a command."""


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
    except (UsageError, RunError) as error:
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except (_Interrupted, KeyboardInterrupt) as error:
        kept = "what is finished, such as teachers and labels, and the last state of the rest are kept"
        again = shlex.join(["l2a", *sys.argv[1:]])
        _fail(f"interrupted; {kept}; go on with: {again}", 128 + (error.args or (signal.SIGINT,))[0])
    except ImportError as error:
        _fail(f"{error}; install what is missing by: pip install 'l2a[experiments,export]'", 2)
    except MemoryError:
        _fail("out of memory; lower kd.batch_size, kd.pool_size or --max-length, or close other programs", 1)
    except OSError as error:
        _fail(errors.os_error_sentence(error), 1)


def _fail(message: str, code: int) -> None:
    # One line whatever a file holds, and nothing in it that a terminal obeys.
    echo("error: " + "".join(char if char.isprintable() else repr(char)[1:-1] for char in message), err=True)
    sys.exit(code)
