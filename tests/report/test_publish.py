"""The model card as a hub and a reader have it, and the way of a student to a server that answers as the Hub does."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import httpx2
import pytest
from huggingface_hub import HfApi, ModelCard

from l2a.cli.app import push_command
from l2a.report import page, run_folder
from l2a.report.run_folder import model_facts
from l2a.util import RunError, UsageError, to_json
from l2a.util.files import add_to_folder, output_folder, read_mark
from tests.report.conftest import DATA, EXPORT, HOSTILE, METHODS, MODELS, PART, fill, metrics


def card(folder, place=".", export=None, **changes):
    facts = json.loads((folder / "report.json").read_text())
    return run_folder.model_card(metrics(METHODS, **changes), facts, export or {}, place)


@pytest.fixture
def run(classifier_folder, tmp_path):
    """A finished and exported run with a page and cards; its student works."""
    with output_folder(tmp_path / "run", "run") as folder:
        fill(folder, classes=2)
        shutil.copytree(classifier_folder, folder / "student")
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


NAMES = [
    ("minilm-l6", "sentence-transformers/all-MiniLM-L6-v2", "minilm-l6"), ("google/bert", "google/bert", "google/bert"),
    ("/secret/bert", None, "bert"), ("./bert", None, "bert"), ("models/bert", None, "bert"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "hub", "name"), NAMES)
def test_a_model_has_a_hub_id_or_a_name_without_its_folder(model, hub, name, tmp_path, monkeypatch):
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    facts = model_facts(model)
    assert (facts["hub"], facts["name"]) == (hub, name) and bool(facts["licence"]) == (model == "minilm-l6")


def test_rows_that_beat_the_student_are_named(finished):
    assert "No row was more accurate than l2a_student on this test split." in card(finished)
    ahead = ("cross_domain_teacher (81.0%)", "l2a_without_unlabelled_student (82.0%)", "l2a_student (83.0%)")
    text = card(finished, student="target_only_teacher")
    assert f"More accurate than target_only_teacher on this test split: {', '.join(ahead)}." in text


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
def test_the_snippets_run_where_the_card_lies(classifier_folder, tmp_path, monkeypatch, capsys, is_pair):
    fill(tmp_path, classes=2, is_pair=is_pair)
    shutil.copytree(classifier_folder, tmp_path / "student")
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


class Hub(ThreadingHTTPServer):
    """What the Hub answers to a push: repositories, blobs of large files and commits, all in memory."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answering)
        self.address, self.status = f"http://127.0.0.1:{self.server_port}", None
        self.repos, self.blobs, self.uploads = {}, {}, []
        self.hold, self.holding = threading.Event(), threading.Event()
        self.hold.set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def respond(self, method, path, body):
        kind = path.split("?")[0].split("/")
        if self.status:
            return {"error": "no\nmore"}, self.status
        if path.startswith("/api/repos/create"):
            asked = json.loads(body)
            name = f"me/{asked['name']}"
            status = 409 if name in self.repos else 200
            self.repos.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
            return {"url": f"{self.address}/{name}"}, status
        if path.startswith("/api/validate-yaml"):
            return {"errors": [], "warnings": []}, 200
        if method == "PUT":
            self.uploads.append(kind[-1])
            self.holding.set()
            self.hold.wait(60)
            assert hashlib.sha256(body).hexdigest() == kind[-1]
            self.blobs[kind[-1]] = body
            return {}, 200
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in self.blobs:
                    one["actions"] = {"upload": {"href": f"{self.address}/blob/{one['oid']}"}}
            return {"transfer": "basic", "objects": objects}, 200
        repo = self.repos["/".join(kind[3:5])]
        if "/preupload/" in path:
            files = [{"path": one["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".onnx")) else "regular"}
                     for one in json.loads(body)["files"]]  # fmt: skip
            return {"files": files}, 200
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] in ("file", "lfsFile"):
                    repo["files"][value["path"]] = value.get("oid") or value["content"]
                elif line["key"] == "deletedFile":
                    del repo["files"][value["path"]]
            return {"commitUrl": f"{self.address}/me/x/commit/{'a' * 40}", "commitOid": "a" * 40}, 200
        siblings = [{"rfilename": name} for name in repo["files"]]
        return {"id": "/".join(kind[3:5]), "private": repo["private"], "siblings": siblings}, 200


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content, status = self.server.respond(self.command, self.path, body)
        answer = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, hub.address))
        yield hub
        hub.hold.set()
        hub.shutdown()


def upload(run, private=False):
    return run_folder.push(run_folder.files_to_push(run, "student"), "student", private)


STUDENT = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
EXPORTED = {*STUDENT, "onnx/model.onnx", "onnx/export.json"}


def test_a_push_uploads_the_student_and_its_export_and_none_of_the_data(run, hub):
    (run / "student" / "notes.txt").write_text("not of the run")
    assert upload(run, private=True) == f"{hub.address}/me/student"
    repo = hub.repos["me/student"]
    assert repo["private"] and repo["files"].keys() == EXPORTED
    digest = hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()
    assert repo["files"]["model.safetensors"] == digest
    files = {name: path for name, path in run_folder.files_to_push(run, "student").items() if "onnx" not in name}
    run_folder.push(files, "student")
    assert repo["files"].keys() == STUDENT
    repo["private"] = False
    with pytest.raises(UsageError, match="me/student exists and is public"):
        upload(run, private=True)


@pytest.mark.slow
def test_a_push_after_a_killed_one_uploads_everything(run, hub):
    hub.hold.clear()
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", "from l2a.cli.app import main; main()", "push", str(run), "student", "--private"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as killed:
        assert hub.holding.wait(120)
        killed.send_signal(signal.SIGKILL)
    assert hub.repos["me/student"]["files"] == {}
    hub.hold.set()
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert hub.repos["me/student"]["files"].keys() == EXPORTED and set(hub.blobs) == set(hub.uploads)
    assert f"uploaded: {hub.address}/me/student" in shown
    hub.status = 401
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "the Hub answers 401: the token is not valid" in refused.stderr
    assert refused.stderr.count("\n") == 1 and "hf_secret" not in refused.stderr + shown


REFUSALS = {
    401: "the Hub answers 401: the token is not valid",
    403: "the Hub answers 403: the token may not write",
    418: "the Hub answers 418: ",
    None: "the upload broke off .*efused.; run the same command again",
}


def test_a_refusal_of_the_hub_or_none_is_one_sentence(run, hub, monkeypatch):
    for hub.status, said in REFUSALS.items():
        if hub.status is None:
            monkeypatch.setattr(HfApi, "create_repo", Mock(side_effect=httpx2.ConnectError("Connection\nrefused")))
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
    for folder, repo, said in (
        (run, "a/b/c", "REPO is 'a/b/c'; give"),
        (tmp_path, "me/x", "not the folder of a finish"),
    ):
        with pytest.raises(UsageError, match=said):
            run_folder.files_to_push(folder, repo)
    (run / "student" / "README.md").write_text("---\nmodel-index: [1]\n---\n")
    with pytest.raises(UsageError, match=r"README\.md: its header cannot be read"):
        run_folder.files_to_push(run, "me/student")
    (run / "student" / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"config\.json was changed after the run"):
        run_folder.files_to_push(run, "me/student")
    assert "student/config.json" in read_mark(run / "l2a.json")["files"]
