"""What the commands share: the options of a run, and how facts are shown."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from l2a.config import load_config, settle

MODELS = "minilm-l6, mpnet-base, a model folder or a Hub id."
Encoder = Annotated[str, Option(help=MODELS)]
TextColumn = Annotated[str | None, Option(help="Column of the (first) text.")]
TextPairColumn = Annotated[str | None, Option(help="Column of the second text of a pair.")]
LabelColumn = Annotated[str | None, Option(help="Column of the label.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an older result.")]
Verbose = Annotated[bool, Option("-v", "--verbose", help="Show every event.")]
Quiet = Annotated[bool, Option("-q", "--quiet", help="Show errors only.")]

RUN_OPTIONS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "target": (str, "Target domain: card, file, folder or Hub id.", ("target",)),
    "source": (str, "Source domain, likewise; movies if the target is shipped.", ("source",)),
    "unlabelled": (list[str], "Unlabelled text: file, folder, domain or Hub id; may be repeated.", ("unlabelled",)),
    "shots": (int, "Labelled target examples per class to train on; by default all (32 if shipped).", ("shots",)),
    "dev_shots": (int, "Target labels per class that judge the teacher, and for validation.", ("dev_shots",)),
    "teacher": (str, MODELS, ("teacher.model",)),
    "fine_tuned_teacher": (bool, "Use the teacher as it is: it already classifies.", ("teacher.fine_tuned",)),
    "student": (str, "Model folder or Hub id to start the student from.", ("student.model",)),
    "selector": (str, "Agent: a card's name (pretrained, ppo, random ...), its path or a policy.", ("selector.agent",)),
    "max_length": (int, "Longest sequence in tokens.", ("max_length",)),
    "seed": (int, "Seed of the few labels and of every random draw.", ("seed",)),
    "output_dir": (str, "Folder of the results.", ("output_dir",)),
    "overwrite": (bool, "Replace a finished run.", ("overwrite",)),
    "compare": (bool, "Also train the rows that need extra training.", ("compare",)),
    "report": (bool, "Draw the page of the run, report.html.", ("report",)),
}
"""Type, help and fields of the configuration of each option; one for one side comes after that for both."""
for _name, _words in {"text": "(first) text", "text_pair": "second text of a pair", "label": "label"}.items():
    _fields = (f"source_columns.{_name}", f"target_columns.{_name}")
    RUN_OPTIONS[f"{_name}_column"] = (str, f"Column of the {_words}, on both sides.", _fields)
    RUN_OPTIONS[f"source_{_name}_column"] = (str, f"Column of the source's {_words}.", _fields[:1])
    RUN_OPTIONS[f"target_{_name}_column"] = (str, f"Column of the target's {_words}.", _fields[1:])


def with_run_options(names: Iterable[str] = RUN_OPTIONS) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options, a preset and a file; what they make is its first argument, ``config``."""
    shared: dict[str, Any] = {"preset": Annotated[str, Option(help="fast, default, full, or any card in ./configs.")]}
    shared["config"] = Annotated[Path | None, Option(help="YAML file that overrides the preset; options override it.")]
    shared |= {name: Annotated[RUN_OPTIONS[name][0] | None, Option(help=RUN_OPTIONS[name][1])] for name in names}
    keyword = inspect.Parameter.KEYWORD_ONLY

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            chosen = {name: value for name in list(shared)[2:] if (value := given.pop(name)) is not None}
            flags = {field: value for name, value in chosen.items() for field in RUN_OPTIONS[name][2]}
            config = load_config(given.pop("preset"), given.pop("config"), flags)
            # A command that names the domains itself settles its configuration.
            command(config=settle(config) if "target" in shared else config, **given)

        parameters = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in shared.items()]
        parameters[0] = parameters[0].replace(default="default")  # of the preset
        _, *own = (one.replace(kind=keyword) for one in inspect.signature(command).parameters.values())  # after config
        with_options.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
        return with_options

    return decorate


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", numeric: bool = False) -> None:
    """Print a table, whatever the terminal's width; numeric columns, all but the first, are aligned to the right."""
    from rich import box, console, table  # not for --help

    columns = [table.Column(name, justify="right" if i and numeric else "left") for i, name in enumerate(headers)]
    shown = table.Table(*columns, box=box.SIMPLE, padding=(0, 1, 0, 0), title=title)
    for row in rows:
        shown.add_row(*row)
    console.Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(shown)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names with what is known of them beside, wrapped to the terminal; lists and mappings come in one piece."""
    from rich import console, table

    shown = table.Table.grid(table.Column(no_wrap=True), table.Column(), padding=(0, 2))
    for name, value in facts.items():
        listed = [f"{key} {item}" for key, item in value.items()] if isinstance(value, Mapping) else value
        shown.add_row(name, ", ".join(map(str, listed)) if isinstance(listed, list) else str(listed))
    console.Console(highlight=False, markup=False, emoji=False).print(shown)
