import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest

from benchmarks import kills
from l2a.cli.app import print_result
from l2a.config import as_yaml, override
from l2a.pipeline.data import load_run_data
from l2a.pipeline.distill import distill
from l2a.pipeline.methods import compared_methods, run_method
from l2a.pipeline.session import RunContext
from l2a.selector.algorithms import load_policy
from l2a.serving.export import comparison_texts
from l2a.util import files
from l2a.util.errors import RunError, UsageError


def test_a_run_leaves_a_complete_folder(config, result):
    names = {"student", "selector", "augmentations.parquet", "metrics.json", "README.md", "log.jsonl", "report.html"}
    assert names <= {path.name for path in result.output_dir.iterdir()}
    explained = json.loads((result.output_dir / "report.json").read_text())["policy"]
    assert {it["feature"] for it in explained} >= {"teacher_entropy", "operator"}
    selector = {path.name for path in (result.output_dir / "selector").iterdir()}
    assert selector == {"policy.json", "policy.safetensors", "selection.json"}
    facts = load_policy(result.output_dir / "selector").facts
    assert facts["pairs"] == [f"{config.source}:{config.target}"] and facts["reward_curve"]
    metrics = json.loads((result.output_dir / "metrics.json").read_text())
    assert [row["name"] for row in metrics["rows"]] == [method.name for method in compared_methods(config)]
    for row in metrics["rows"]:
        assert row["accuracy"].keys() == row["macro_f1"].keys() == {"value", "low", "high"}
        assert row["latency_ms"].keys() >= {"batch_1", "batch_1_spread", "batch_32", "batch_32_spread"}
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
    expected = {"parameter_share", "labels_used", "seconds_by_stage", "peak_memory_mb", "seed", "versions", "command"}
    assert expected <= metrics.keys() and metrics["labels_used"] == 2 * (8 + 6 + 6)
    drawn = pd.read_parquet(result.output_dir / "augmentations.parquet")
    assert drawn.groupby("round")["kept"].mean().round(1).tolist() == [0.5] * config.kd.rounds
    inputs, labels = comparison_texts(str(result.output_dir), None)
    held_out = load_run_data(config).held_out_labels
    assert labels == [held_out.label_names[label] for label in held_out.labels]
    assert inputs == [*held_out.inputs, *((text,) for text in drawn["text"])]


@pytest.mark.slow
def test_one_seed_gives_one_result_and_another_seed_other_shots(config, result, tmp_path):
    again = distill(override(config, {"output_dir": str(tmp_path / "again")}))
    assert [row.metrics for row in again.rows] == [row.metrics for row in result.rows]
    other = load_run_data(override(config, {"seed": 1})).splits.train.inputs
    assert other != load_run_data(config).splits.train.inputs


def test_a_finished_run_is_not_overwritten(config, result):
    with pytest.raises(UsageError, match="--overwrite"):
        distill(config)


def test_a_failed_run_leaves_its_log_and_nothing_else(config, tmp_path, monkeypatch):
    monkeypatch.setattr("l2a.pipeline.run.compared_methods", Mock(side_effect=RunError("the loss is nan")))
    with pytest.raises(RunError, match=r"nan; the log is .*failed\.log\.jsonl"):
        distill(override(config, {"compare": False, "output_dir": str(tmp_path / "run")}))
    left = {path.name for path in (tmp_path / "run").iterdir() if path.name != ".l2a.lock"}
    assert left == {"failed.log.jsonl"}


@pytest.mark.slow
def test_a_second_run_trains_no_teacher(config, result, monkeypatch, tmp_path):
    monkeypatch.setattr("l2a.teacher.finetune.fine_tune", lambda *_, **__: pytest.fail("a teacher was trained again"))
    changed = {"output_dir": str(tmp_path / "second"), "selector.agent": "random", "report": False}
    assert distill(override(config, changed)).rows[1].metrics == result.rows[1].metrics
    assert not (tmp_path / "second" / "report.html").exists() and (tmp_path / "second" / "report.json").exists()


@pytest.mark.parametrize(
    "changes", [{"selector.agent": "nearest"}, {"selector.agent": "a2c"}, {"kd.objective": "lelp"}]
)
def test_every_kind_of_selector_and_a_subclass_objective_run(config, changes):
    changed = override(config, {"kd.rounds": 1, "kd.warmup_steps": 5, **changes})
    assert len(run_method(changed, "l2a_student").predictions) == 30


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "predict"])
def test_a_command_that_is_killed_again_and_again_leaves_the_same_bytes(tmp_path, command):
    kills.make_inputs(tmp_path / "inputs")
    shutil.copytree(tmp_path / "inputs", tmp_path / "whole")
    started = time.monotonic()
    assert kills.run_until_done(command, tmp_path / "whole", [])[:2] == (0, 0)
    seconds = time.monotonic() - started
    for share in (0.7, 0.3, 0.1):  # a busy machine may be several times faster the second time
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(tmp_path / "inputs", tmp_path / "killed")
        hit, code, said = kills.run_until_done(command, tmp_path / "killed", [share * seconds, 0.2 * seconds])
        if hit and code != 2:  # as after a kill behind the last rename
            break
    assert hit and not code, said
    assert kills.digest(tmp_path / "killed") == kills.digest(tmp_path / "whole") != {}
    assert not list((tmp_path / "killed").rglob(f"*{files.CHECKPOINT}"))


@pytest.mark.parametrize(
    ("method", "said"), [("l2a_studnt", "did you mean 'l2a_student'"), ("plain_kd_unlabelled_student", "--unlabelled")]
)
def test_methods_that_are_unknown_or_lack_unlabelled_text_are_refused(config, method, said):
    with pytest.raises(UsageError, match=said):
        run_method(config, method)


@pytest.mark.parametrize("compare", [True, False])
def test_what_unlabelled_text_brings_is_shown_with_and_without_comparisons(config, compare):
    def shown(changes):
        return {method.name for method in compared_methods(override(config, {"compare": compare, **changes}))}

    assert ("l2a_without_unlabelled_student" in shown({"unlabelled": ["more.txt"]})) == compare
    assert {"l2a_student", "cross_domain_teacher", "target_only_teacher"} <= shown({})
    assert "l2a_without_unlabelled_student" not in shown({}) and "tfidf_logreg" in shown({})
    assert ("augmented_kd_student" in shown({"generator.operator": "knn"})) == compare
    assert "target_only_teacher" not in shown({"teacher.fine_tuned": True})


def test_a_student_that_reads_less_than_the_texts_is_refused(config, monkeypatch):
    context = RunContext(config)
    student = context.new_student()
    student.model.config.max_position_embeddings = config.max_length - 1
    monkeypatch.setattr("l2a.pipeline.session.build_student", lambda *arguments: student)
    with pytest.raises(UsageError, match=f"the student reads at most {config.max_length - 1} tokens"):
        context.new_student()


@pytest.mark.slow
def test_a_run_in_two_processes_gives_what_one_gives(config, tmp_path):
    accuracies = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        changes = {"output_dir": str(out), "selector.agent": "pretrained", "kd.round_steps": 30, "compare": False}
        (tmp_path / "config.yaml").write_text(as_yaml(override(config, changes)))
        launcher = "torch.distributed.run --nproc_per_node 2 --master_port 29611 -m" if processes == 2 else ""
        command = [sys.executable, "-m", *launcher.split(), "l2a", "distill", "--config", str(tmp_path / "config.yaml")]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("evidence:") == 1  # the first process alone speaks
        rows = json.loads((out / "metrics.json").read_text())["rows"]
        accuracies.append({row["name"]: row["accuracy"]["value"] for row in rows})
    assert accuracies[0]["cross_domain_teacher"] == accuracies[1]["cross_domain_teacher"]
    assert abs(accuracies[0]["l2a_student"] - accuracies[1]["l2a_student"]) < 0.2  # each draws its own dropout


def test_the_summary_shows_how_far_the_two_rewards_agree(result, capsys):
    print_result(result)
    shown = capsys.readouterr().out
    agreement = [facts["selector"]["tier_correlation"] for facts in result.metrics["rounds"]]
    assert f"with real distillation {agreement[0]:.2f}, {agreement[1]:.2f}, one a round" in shown
    print_result(dataclasses.replace(result, metrics={**result.metrics, "rounds": [{"selector": {}}]}))
    assert "rank correlation" not in capsys.readouterr().out


def test_all_labels_can_be_trained_on(config, tmp_path):
    every = override(config, {"dev_shots": 0, "selector.agent": "all", "kd.warmup_steps": 5, "kd.rounds": 1})
    context = RunContext(every)
    assert not len(context.data.held_out_labels) and len(context.data.splits.train) == context.data.splits.labels_used
    result = distill(override(every, {"output_dir": str(tmp_path / "run")}))
    assert result.metrics["validation_log_likelihood"] == {} and result.metrics["divergence"]["l2a_student"] > 0
    for name in ("report.html", "README.md"):
        assert "texts set apart." in (tmp_path / "run" / name).read_text()
