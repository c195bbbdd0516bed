"""The model card as a hub and a reader have it, and the way of a student to a stand-in of the Hub."""

import json
import shutil
from types import SimpleNamespace

import httpx2
import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard, RepoUrl
from huggingface_hub.errors import HfHubHTTPError
from transformers import BertForSequenceClassification

from l2a.cli.app import push_command
from l2a.report import page, run_folder
from l2a.report.run_folder import export_student, model_facts
from l2a.student.student import class_names
from l2a.util.errors import RunError, UsageError
from l2a.util.files import add_to_folder, output_folder, read_mark, to_json
from tests.conftest import tiny_bert_config
from tests.report.conftest import DATA, EXPORT, HOSTILE, METHODS, MODELS, PART, fill, metrics

NAMES = ("negative", "positive")


def card(folder, place=".", export=None, **changes):
    facts = json.loads((folder / "report.json").read_text())
    return run_folder.model_card(metrics(METHODS, **changes), facts, export or {}, place)


@pytest.fixture(scope="module")
def student(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(tokenizer, **class_names(NAMES)))
    export_student(model, tokenizer, tmp_path_factory.mktemp("made") / "student", "", 32)
    return next(tmp_path_factory.getbasetemp().glob("made*")) / "student"


@pytest.fixture
def run(student, tmp_path):
    """A finished and exported run with a page and cards; its student works."""
    with output_folder(tmp_path / "run", "run") as folder:
        fill(folder, classes=2)
        shutil.copytree(student, folder / "student")
        for name, place in run_folder.CARDS.items():
            (folder / name).write_text(card(folder, place))
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(b"onnx" * 999)
        (folder / "onnx" / "export.json").write_text(to_json(EXPORT))
        (folder / page.PAGE).write_text("an older page")
    return tmp_path / "run"


def test_the_header_is_what_a_hub_reads(finished):
    data = ModelCard(card(finished)).data
    assert (data.pipeline_tag, data.library_name) == ("text-classification", "transformers")
    assert data.base_model == "owner/model"
    assert (data.license, data.license_name, data.language) == ("apache-2.0", None, "en")
    found = {(one.metric_type, one.metric_value, one.dataset_name, one.dataset_split) for one in data.eval_results}
    assert found == {("accuracy", 0.83, HOSTILE[:40], "test"), ("f1", 0.7, HOSTILE[:40], "test")}
    assert data.eval_results[0].dataset_args == {"examples": 200}


def test_no_licence_is_claimed_that_does_not_follow(finished):
    mine = {**DATA, "source": [{**PART, "name": "mine.csv", "licence": "", "language": ""}]}
    text = card(finished, data=mine)
    assert (ModelCard(text).data.license, ModelCard(text).data.license_name) == ("other", "see-the-card")
    assert "follows from what is known of mine.csv." in text
    only = {role: {**facts, "licence": "MIT"} for role, facts in MODELS.items()}
    assert ModelCard(card(finished, models=only)).data.license == "mit"
    assert ModelCard(card(finished, data={**DATA, "target": mine["source"]})).data.language is None


@pytest.mark.parametrize(
    ("model", "hub", "name"),
    [
        ("minilm-l6", "sentence-transformers/all-MiniLM-L6-v2", "minilm-l6"), ("google/bert", "google/bert", None),
        ("/secret/bert", None, "bert"), ("./bert", None, "bert"), ("models/bert", None, "bert"),
    ],
)  # fmt: skip
def test_a_model_has_a_hub_id_or_a_name_without_its_folder(model, hub, name, tmp_path, monkeypatch):
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    facts = model_facts(model)
    assert (facts["hub"], facts["name"]) == (hub, name or model) and bool(facts["licence"]) == (model == "minilm-l6")


def test_rows_that_beat_the_student_are_named(finished):
    assert "No row was more accurate than l2a_student on this test split." in card(finished)
    ahead = ("cross_domain_teacher (81.0%)", "l2a_without_unlabelled_student (82.0%)", "l2a_student (83.0%)")
    assert f"More accurate than target_only_teacher on this test split: {', '.join(ahead)}." in card(
        finished, student="target_only_teacher"
    )


def test_the_card_tells_what_was_measured_and_how_to_repeat_it(finished):
    text, test = card(finished, export=EXPORT), json.loads((finished / "report.json").read_text())["test"]
    facts = ["2026-01-02", "l2a distill --target", "13.0 %", "200 test examples", "ab" * 32, "d5bb07" * 10]
    facts += ["128 labelled", "keeps the temperature 1.500", "A. Author (2020).", "`onnx/model_int8.onnx`"]
    assert all(fact in text for fact in facts)
    assert "model_int8" not in card(finished)
    for line in text.splitlines():  # of a table, whose cells are hostile
        assert not line.startswith("|") or line.replace("\\|", "").count("|") in (5, 6, 4)
    for counts in test["student"]["confusion"]:
        assert f"| {' | '.join(map(str, counts))} |" in text
    for before_or_after in (test["student"], test["calibrated"]):
        assert f"{100 * before_or_after['calibration_error']:.1f} | {before_or_after['log_likelihood']:.3f}" in text


@pytest.mark.parametrize("is_pair", [False, True])
def test_the_snippets_run_where_the_card_lies(student, tmp_path, monkeypatch, capsys, is_pair):
    fill(tmp_path, classes=2, is_pair=is_pair)
    shutil.copytree(student, tmp_path / "student")
    for name, place in run_folder.CARDS.items():
        monkeypatch.chdir((tmp_path / name).parent)
        first, second = (part.split("```")[0] for part in card(tmp_path, place).split("```python\n")[1:])
        assert ('text_pair": "the second' in first) == ('"the second text")' in second) == is_pair
        for snippet in (first, second):
            assert len([line for line in snippet.splitlines() if line]) == 3
            exec(compile(snippet, name, "exec"), {})
        assert "'label': " in (shown := capsys.readouterr().out) and "['negative' 'positive'] [[" in shown


def test_an_export_is_shown_on_the_page_and_on_cards_that_nobody_edited(run):
    (run / "README.md").write_text("my own words")
    run_folder.refresh(run)
    assert (run / "README.md").read_text() == "my own words"
    assert "`onnx/model_int8.onnx` | 11.7" in (run / "student" / "README.md").read_text()
    assert "model_<wbr>int8.onnx" in (drawn := (run / page.PAGE).read_text()) and "<td>81.6</td>" in drawn
    said = card(run, export=EXPORT)
    for words in ("whose logits differ by 0.42 at most", "Of the 38 labelled ones among them (by default held-out",
                  "not its test split), `model.safetensors` classifies 81.6 % rightly, "):  # fmt: skip
        assert words in said
    assert "labelled ones" not in card(run, export={name: EXPORT[name] for name in EXPORT if name != "labelled"})
    assert run_folder.files_to_push(run, "me/student")["README.md"] == run / "student" / "README.md"
    old = json.loads((run / "report.json").read_text()) | {"format": 1}
    add_to_folder(run, "report.json", json.dumps(old).encode())
    run_folder.refresh(run)
    with pytest.raises(UsageError, match="another version of l2a"):
        page.renew_page(run)


class Hub:
    """Stands in for the client of the Hub: repositories with their files, in memory."""

    def __init__(self):
        self.repos, self.error = {}, None

    def create_repo(self, repo, private, exist_ok):
        if self.error:
            raise self.error
        self.repos.setdefault(f"me/{repo}", SimpleNamespace(private=bool(private), files={}))
        return RepoUrl(f"https://huggingface.co/me/{repo}")

    def model_info(self, name):
        siblings = [SimpleNamespace(rfilename=path) for path in self.repos[name].files]
        return SimpleNamespace(private=self.repos[name].private, siblings=siblings)

    def create_commit(self, name, operations, commit_message):
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                self.repos[name].files[operation.path_in_repo] = operation.path_or_fileobj
            else:
                del self.repos[name].files[operation.path_in_repo]


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: hub)
    return hub


def upload(run, private=False):
    return run_folder.push(run_folder.files_to_push(run, "student"), "student", private)


def test_a_push_uploads_the_student_and_its_export_and_none_of_the_data(run, hub):
    (run / "student" / "notes.txt").write_text("not of the run")
    assert upload(run, private=True) == "https://huggingface.co/me/student"
    repo = hub.repos["me/student"]
    expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert repo.private and repo.files.keys() == {*expected, "onnx/model.onnx", "onnx/export.json"}
    assert repo.files["model.safetensors"] == str(run / "student" / "model.safetensors")
    files = {name: path for name, path in run_folder.files_to_push(run, "student").items() if "onnx" not in name}
    run_folder.push(files, "student")
    assert repo.files.keys() == expected
    repo.private = False
    with pytest.raises(UsageError, match="me/student exists and is public"):
        upload(run, private=True)


REQUEST = httpx2.Request("POST", "https://huggingface.co")
REFUSALS = {
    401: "the Hub answers 401: the token is not valid",
    403: "the Hub answers 403: the token may not write",
    418: "the Hub answers 418: ",
    None: "the upload broke off .*efused.; run the same command again",
}


def test_a_refusal_of_the_hub_or_none_is_one_sentence(run, hub):
    for status, said in REFUSALS.items():
        hub.error = httpx2.ConnectError("Connection\nrefused")
        if status:
            hub.error = HfHubHTTPError("no\nmore", response=httpx2.Response(status, request=REQUEST))
        with pytest.raises(RunError, match=f"student: {said}") as caught:
            upload(run)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(run, tmp_path, monkeypatch, capsys):
    push_command(run, "me/student", dry_run=True)
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "7 files" in shown and "not uploaded (--dry-run)" in shown
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="no token of the Hub"):
        push_command(run, "me/student")
    with pytest.raises(UsageError, match=r"REPO is 'a/b/c'; give owner/name"):
        run_folder.files_to_push(run, "a/b/c")
    with pytest.raises(UsageError, match="not the folder of a finished run"):
        run_folder.files_to_push(tmp_path, "me/student")
    (run / "student" / "README.md").write_text("---\nmodel-index: [1]\n---\n")
    with pytest.raises(UsageError, match=r"README\.md: its header cannot be read"):
        run_folder.files_to_push(run, "me/student")
    (run / "student" / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"config\.json was changed after the run"):
        run_folder.files_to_push(run, "me/student")
    assert "student/config.json" in read_mark(run / "l2a.json")["files"]
