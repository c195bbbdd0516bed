"""A student for others: its model card, and its way to the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from l2a.report import page
from l2a.util.errors import RunError, UsageError
from l2a.util.files import add_to_folder, sha256_file

CARDS = {"README.md": "student", "student/README.md": "."}
"""The two copies of a model card, and where the student lies as seen from each."""
LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0"}
"""Licences with their names on the Hub; what is made of several may be given on under the last of them."""


def model_card(metrics: Mapping[str, Any], facts: Mapping[str, Any], export: Any, place: str) -> str:
    """Write the card of a distilled student.

    Args:
        metrics: The content of ``metrics.json``.
        facts: The content of ``report.json``.
        export: The content of ``export.json``; an empty mapping before an export.
        place: Where the student lies, seen from the card's folder.

    Returns:
        Markdown with a YAML header that the Hub reads.
    """
    from huggingface_hub import EvalResult, ModelCardData

    data, models = metrics["data"], metrics["models"]
    target, rows = data["target"][0], {row["name"]: row for row in metrics["rows"]}
    student = rows[metrics["student"]]
    licence, reason = _licence(data, models)
    results = [
        EvalResult(
            "text-classification", target["name"], target["name"], metric, round(student[field]["value"], 4),
            dataset_split="test", dataset_args={"examples": facts["test"]["tested"]}, metric_name=name,
        )
        for metric, field, name in (("accuracy", "accuracy", "Accuracy"), ("f1", "macro_f1", "Macro-F1"))
    ]  # fmt: skip
    header = ModelCardData(
        model_name=f"Classifier of {target['name']}", eval_results=results, license=licence,
        license_name="see-the-card" if licence == "other" else None, language=target["language"] or None,
        library_name="transformers", pipeline_tag="text-classification", base_model=models["start"]["hub"],
        tags=["l2a", "knowledge-distillation", "few-shot"], metrics=["accuracy", "f1"],
    )  # fmt: skip
    return page.render(
        Path(__file__).with_name("card.md.jinja"), header=header.to_yaml(), metrics=metrics, facts=facts, data=data,
        models=models, export=export, place=place, reason=reason, rows=rows,
        verdict=page.verdict(metrics), scores=page.class_scores(facts["test"]["student"]["confusion"]),
    )  # fmt: skip


def _licence(data: Mapping[str, Any], models: Mapping[str, Any]) -> tuple[str, str]:
    """The Hub's name of the licence that follows from the parts, and why."""
    parts = [*(part for side in data.values() for part in side), *models.values()]
    if unclear := ", ".join(dict.fromkeys(part["name"] for part in parts if part["licence"] not in LICENCES)):
        fix = "Before you give it on, find out what they allow, and name the licence in the header of this file."
        return "other", f"No licence of the student follows from what is known of {unclear}. {fix}"
    found = [name for name in LICENCES if name in {part["licence"] for part in parts}]
    why = f"follows from those of its parts: {' and '.join(found)}."
    return LICENCES[found[-1]], f"The licence of the student, {found[-1]}, {why}"


def refresh(run: Path) -> None:
    """Draw the page and the model cards of a finished run again after an export; what a user has changed stays.

    Args:
        run: The run's output folder; without the evidence of a page nothing is drawn.

    Raises:
        RunError: If the files of the run are not as it left them.
    """
    try:
        owned = page.check_run(run)
    except UsageError:  # there is no such evidence
        return
    metrics, facts, export = page.read_evidence(run)
    for name, place in {**CARDS, page.PAGE: ""}.items():
        if (run / name).is_file() and sha256_file(run / name) == owned.get(name):
            drawn = model_card(metrics, facts, export, place) if place else page.render_page(run)
            add_to_folder(run, name, drawn.encode("utf-8"))


def files_to_push(run: Path, repo: str) -> dict[str, Path]:
    """Choose and check what a push uploads: the student, its card and its export, nothing of the run's data.

    Args:
        run: The output folder of a finished run.
        repo: Where they would go, "name" or "owner/name".

    Returns:
        Files by their names in the repository.

    Raises:
        UsageError: If the run is not finished, the name is not valid or the card's header cannot be read.
        RunError: If a file is not as the run left it; the card may have been edited.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"REPO is {repo!r}; give owner/name, of letters, digits, '-', '_' and '.'") from error
    wanted = [name for name in page.check_run(run, ()) if name.split("/")[0] in ("student", "onnx")]
    page.check_run(run, [name for name in wanted if name not in CARDS])
    card = run / "student" / "README.md"
    try:
        ModelCard.load(card)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{card}: its header cannot be read ({' '.join(str(error).split())}); correct it") from error
    return {name.removeprefix("student/"): run / name for name in wanted}


def push(files: Mapping[str, Path], repo: str, private: bool = False, endpoint: str | None = None) -> str:
    """Upload a student in one commit; what an interrupted push has uploaded is not sent again.

    Args:
        files: As ``files_to_push`` gives them.
        repo: "name" or "owner/name"; made where it does not exist.
        private: Whether nobody else may see it.
        endpoint: Address of the Hub; by default what HF_ENDPOINT says.

    Returns:
        The address of the repository.

    Raises:
        UsageError: If there is no token, or a private repository is wanted and it is public.
        RunError: If the Hub refuses or cannot be reached.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if (token := get_token()) is None:
        raise UsageError("there is no token of the Hub; log in by `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        place = api.create_repo(repo, private=private or None, exist_ok=True)
        found = api.model_info(place.repo_id)
        if private and not found.private:
            raise UsageError(f"{place.repo_id} exists and is public; make it private on the Hub, or drop --private")
        # An older student's export would not belong to this one.
        old = [one.rfilename for one in found.siblings or () if one.rfilename.startswith("onnx/")]
        gone = [CommitOperationDelete(name) for name in old if name not in files]
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        api.create_commit(place.repo_id, [*added, *gone], commit_message="Upload a student of l2a")
    except UsageError:
        raise
    except HfHubHTTPError as error:
        code = error.response.status_code
        reason = {401: "the token is not valid; log in again by `hf auth login`",
                  403: "the token may not write there; give one that may, or another repository"}  # fmt: skip
        said = reason.get(code, error.server_message or str(error))
        raise RunError(f"{repo}: the Hub answers {code}: {' '.join(said.split())[:200]}") from error
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        why = f"({' '.join(str(error).split())}); run the same command again to go on"
        raise RunError(f"{repo}: the upload broke off {why}") from error
    return str(place)
