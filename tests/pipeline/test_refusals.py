"""What can be refused is refused before anything is trained, and bad data before torch is loaded."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from l2a.config import override
from l2a.kd.trainer import Score
from l2a.pipeline import methods
from l2a.pipeline.data import load_run_data
from l2a.pipeline.distill import distill
from l2a.pipeline.session import RunContext, _passes
from l2a.pipeline.students import TrainedStudent, finish
from l2a.util.errors import RunError, UsageError
from tests.conftest import make_examples, write_domain


def test_bad_data_are_refused_before_torch_is_loaded(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "one", "label": "a"}\n')
    source = write_domain(tmp_path / "source.jsonl", 60, seed=1)
    code = (
        "import sys\nfrom l2a.pipeline.distill import distill\n"
        "try:\n    distill(target=sys.argv[1], source=sys.argv[2], output_dir=sys.argv[3])\n"
        "except ValueError as error:\n    print(type(error).__name__)\n"
        "sys.exit(bool({'torch', 'transformers', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    arguments = [str(tmp_path / "bad.jsonl"), str(source), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "UsageError"), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selector.agent": "pppo"}, "pppo"),
        ({"student.model": "no/such/folder"}, "no/such/folder"),
        ({"student.max_share": 0.0001}, "max_share"),
        ({"max_length": 4096}, "max_length"),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_training(config, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("l2a.pipeline.session.fine_tuned", lambda *_, **__: pytest.fail("a teacher was trained"))
    with pytest.raises((UsageError, RunError), match=message):
        distill(override(config, {"output_dir": str(tmp_path / "run"), **changes}))


def test_the_output_folder_is_tried_before_the_data_are_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr("l2a.pipeline.distill.load_run_data", lambda *arguments: pytest.fail("the data were read"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        distill(override(config, {"output_dir": str(tmp_path / "file" / "run")}))


def test_a_users_own_labels_are_all_used_and_those_left_aside_are_counted(config):
    every, few = (load_run_data(override(config, {"shots": shots})).splits for shots in (None, 8))
    assert (every.labels_used, every.labels_ignored, few.labels_used, few.labels_ignored) == (120, 0, 40, 80)
    assert len(every.reward) == len(every.validation) == 2 * 6 and len(every.train) == 120 - 24


def test_many_labels_are_not_read_as_often_as_few():
    found = [_passes(epochs, make_examples(count)) for epochs, count in ((20.0, 128), (20.0, 6400), (0.5, 64))]
    assert found == [20.0, 5.0, 0.5]


@pytest.mark.slow
def test_the_student_that_validation_prefers_is_saved_under_its_own_name(config, tmp_path, monkeypatch):
    def scored(session, rounds):
        score = Score(0.2 if rounds else 0.1, np.array([-2.0 if rounds else -1.0]))
        return dataclasses.replace(finish(session, rounds), score=score)

    monkeypatch.setattr("l2a.pipeline.students.finish", scored)
    changed = override(config, {"output_dir": str(tmp_path / "run"), "selector.agent": "random", "compare": True})
    saved, metrics = distill(changed).student, json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert saved == metrics["student"] == "plain_kd_student"
    assert metrics["validation_log_likelihood"] == {"plain_kd_student": -1.0, "l2a_student": -2.0}
    assert metrics["divergence"] == {"plain_kd_student": 0.1, "l2a_student": 0.2}
    assert "`plain_kd_student`, chosen by" in (tmp_path / "run" / "README.md").read_text()
    assert len(metrics["rounds"]) == config.kd.rounds


# 10 are unlabelled texts; 60 are source texts, since they would take most of the former
@pytest.mark.parametrize("apart", [10, 60])
def test_students_with_and_without_unlabelled_text_are_compared_on_the_same_texts(config, apart, tmp_path, monkeypatch):
    lines = (f"a battery {text} {number:b}" for number, (text,) in enumerate(make_examples(120, seed=7).inputs))
    (tmp_path / "more.txt").write_text("\n".join(lines) + "\n")
    changes = {"unlabelled": [str(tmp_path / "more.txt")], "kd.divergence_size": apart}
    context, asked = RunContext(override(config, changes)), []

    def logits(context, sharpness, texts):
        asked.append(texts)
        return sharpness * context.labeller(texts).logits

    monkeypatch.setattr(methods, "student_logits", logits)
    found = methods.rescored(context, {
        "plain_kd_student": TrainedStudent(-1.0, (), Score(0.1, np.zeros(0))),
        "l2a_student": TrainedStudent(1.0, (), Score(0.2, np.zeros(0))),
    })  # fmt: skip
    assert asked[0] == asked[1] and set() < {*asked[0]} <= {*context.set_apart[0]}
    for trained_on in (context.source, context.without_unlabelled.source, context.data.splits.train):
        assert not {*asked[0]} & {*trained_on.inputs}
    plain, l2a = (found[name].score.divergence for name in ("plain_kd_student", "l2a_student"))
    assert plain > l2a == pytest.approx(0, abs=1e-6)
