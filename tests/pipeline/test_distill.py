import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import kills
from l2a.cli.app import print_result
from l2a.config import as_yaml, override
from l2a.data.examples import HeldOut, normalised_hash
from l2a.evaluation.metrics import measure_latency
from l2a.kd.trainer import KDTrainer
from l2a.pipeline.data import load_run_data
from l2a.pipeline.distill import distill
from l2a.pipeline.methods import METHODS, compared_methods, run_method
from l2a.pipeline.session import RunContext
from l2a.selector.algorithms import load_facts
from l2a.serving.export import comparison_texts
from l2a.util import files
from l2a.util.errors import RunError, UsageError


def test_a_run_leaves_a_complete_folder(config, result):
    names = {path.name for path in result.output_dir.iterdir()}
    assert {"student", "selector", "augmentations.parquet", "metrics.json", "README.md", "log.jsonl"} <= names
    assert {"report.html", "report.json"} <= names
    explained = json.loads((result.output_dir / "report.json").read_text())["policy"]
    assert {it["feature"] for it in explained} >= {"teacher_entropy", "operator"}
    selector = {path.name for path in (result.output_dir / "selector").iterdir()}
    assert selector == {"policy.json", "policy.safetensors", "selection.json"}
    facts = load_facts(result.output_dir / "selector")
    assert facts["pairs"] == [f"{config.source}:{config.target}"] and facts["reward_curve"]
    metrics = json.loads((result.output_dir / "metrics.json").read_text())
    assert [row["name"] for row in metrics["rows"]] == [method.name for method in compared_methods(config)]
    for row in metrics["rows"]:
        assert row["accuracy"].keys() == row["macro_f1"].keys() == {"value", "low", "high"}
        assert row["latency_ms"].keys() >= {"batch_1", "batch_1_spread", "batch_32", "batch_32_spread"}
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
    expected = {"parameter_share", "labels_used", "seconds_by_stage", "peak_memory_mb", "seed", "versions", "command"}
    assert expected <= metrics.keys()
    assert metrics["labels_used"] == 2 * (8 + 6 + 6)
    drawn = pd.read_parquet(result.output_dir / "augmentations.parquet")
    inputs, labels = comparison_texts(str(result.output_dir), None)
    held_out = load_run_data(config).held_out_labels
    assert labels == [held_out.label_names[label] for label in held_out.labels]
    assert inputs == [*held_out.inputs, *((text,) for text in drawn["text"])]


@pytest.mark.slow
def test_the_student_loads_without_this_package(result):
    code = (
        "import sys; sys.modules['l2a'] = None\n"
        "from transformers import pipeline\n"
        "print(pipeline('text-classification', model=sys.argv[1])('the film was good')[0]['label'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(result.output_dir / "student")],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.stdout.split()[-1] in ("negative", "positive")


def test_no_candidate_is_a_held_out_target_text(config, result):
    data = load_run_data(config)
    frame = pd.read_parquet(result.output_dir / "augmentations.parquet")
    for held_out in (data.splits.reward, data.splits.validation, data.target.test.reveal()):
        assert not set(frame["text"]) & {text for (text,) in held_out.inputs}
    assert frame.groupby("round")["kept"].mean().round(1).unique().tolist() == [0.5]
    assert set(frame.columns) >= {"text", "origin", "operator", "degree", "teacher_probabilities", "selector_score"}


@pytest.mark.slow
def test_one_seed_gives_one_result_and_another_seed_other_shots(config, result, tmp_path):
    again = distill(override(config, {"output_dir": str(tmp_path / "again")}))
    first, second = ([dataclasses.asdict(row.metrics) for row in run.rows] for run in (result, again))
    assert first == second
    other = load_run_data(override(config, {"seed": 1})).splits.train.inputs
    assert other != load_run_data(config).splits.train.inputs


@pytest.mark.slow
def test_the_test_split_stays_closed_until_the_final_evaluation(config, monkeypatch):
    def refuse(held_out):
        raise AssertionError("the test split was opened")

    monkeypatch.setattr(HeldOut, "reveal", refuse)
    context = RunContext(override(config, {"unlabelled": [config.target], "generator.operator": "knn"}))
    fitted = [method.fit(context) for method in METHODS.values()]
    assert len(fitted) == len(METHODS)


def test_a_finished_run_and_foreign_files_are_not_overwritten(config, result, tmp_path):
    with pytest.raises(UsageError, match="--overwrite"):
        distill(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds other files"):
        distill(override(config, {"output_dir": str(tmp_path / "mine"), "overwrite": True}))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_failed_run_leaves_its_log_and_nothing_else(config, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RunError("the loss is nan")

    monkeypatch.setattr("l2a.pipeline.run.compared_methods", fail)
    with pytest.raises(RunError, match=r"nan; the log is .*failed\.log\.jsonl"):
        distill(override(config, {"compare": False, "output_dir": str(tmp_path / "run")}))
    left = {path.name for path in (tmp_path / "run").iterdir() if path.name != ".l2a.lock"}
    assert left == {"failed.log.jsonl"}


@pytest.mark.slow
def test_a_second_run_trains_no_teacher(config, result, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise AssertionError("a cached teacher was trained again")

    monkeypatch.setattr("l2a.teacher.finetune.fine_tune", fail)
    changed = {"output_dir": str(tmp_path / "second"), "selector.agent": "random", "report": False}
    assert distill(override(config, changed)).rows[1].metrics == result.rows[1].metrics
    assert not (tmp_path / "second" / "report.html").exists() and (tmp_path / "second" / "report.json").exists()


@pytest.mark.parametrize("agent", ["nearest", "a2c"])
def test_every_kind_of_selector_runs(config, agent):
    changed = override(config, {"selector.agent": agent, "kd.rounds": 1, "kd.warmup_steps": 5})
    assert len(run_method(changed, "l2a_student").predictions) == 30


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_leaves_the_same_bytes(tmp_path):
    kills.make_inputs(tmp_path / "inputs")
    shutil.copytree(tmp_path / "inputs", tmp_path / "whole")
    started = time.monotonic()
    assert kills.run_until_done("distill", tmp_path / "whole", [])[:2] == (0, 0)
    seconds = time.monotonic() - started
    for share in (0.7, 0.3, 0.1):  # a busy machine may be several times faster the second time
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(tmp_path / "inputs", tmp_path / "killed")
        hit, code, said = kills.run_until_done("distill", tmp_path / "killed", [share * seconds, 0.2 * seconds])
        if hit:
            break
    assert hit and not code, said
    assert kills.digest(tmp_path / "killed") == kills.digest(tmp_path / "whole")
    assert not (tmp_path / "killed" / "out" / files.CHECKPOINT).exists()


@pytest.mark.slow
def test_plain_distillation_makes_as_many_updates(config, monkeypatch):
    steps, original = [], KDTrainer.train

    def count(self, sets, shares, number, *rest):
        steps.append(number)
        return original(self, sets, shares, number, *rest)

    monkeypatch.setattr(KDTrainer, "train", count)
    quick = override(config, {"selector.agent": "random"})
    run_method(quick, "plain_kd_student")
    plain = sum(steps)
    steps.clear()
    run_method(quick, "l2a_student")
    assert plain == sum(steps) == quick.kd.total_steps


@pytest.mark.parametrize(
    ("method", "said"), [("l2a_studnt", "did you mean 'l2a_student'"), ("plain_kd_unlabelled_student", "--unlabelled")]
)
def test_methods_that_are_unknown_or_lack_unlabelled_text_are_refused(config, method, said):
    with pytest.raises(UsageError, match=said):
        run_method(config, method)


@pytest.mark.slow
def test_unlabelled_text_is_reported_with_and_without(config, tmp_path):
    domain = load_run_data(config).target
    lines = [*(text for (text,) in domain.train.inputs), *(text for (text,) in domain.test.reveal().inputs)]
    (tmp_path / "more.txt").write_text("\n".join([*lines, "this phone is bad"]) + "\n")
    changes = {"unlabelled": [str(tmp_path / "more.txt")], "compare": True, "selector.agent": "random"}
    with_text = override(config, {**changes, "output_dir": str(tmp_path / "run")})
    rows = {row.name for row in distill(with_text).rows}
    assert rows >= {"plain_kd_unlabelled_student", "l2a_without_unlabelled_student"}
    data = load_run_data(with_text)
    assert data.unlabelled and not {normalised_hash(text) for text in data.unlabelled} & data.forbidden
    assert "unlabelled: more.txt" in data.files


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


def test_a_subclass_objective_runs(config):
    changed = override(config, {"kd.objective": "lelp", "kd.warmup_steps": 5, "kd.rounds": 1})
    assert len(run_method(changed, "plain_kd_student").predictions) == 30


@pytest.mark.slow
def test_a_run_in_two_processes_gives_what_one_gives(config, tmp_path):
    accuracies = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        changes = {"output_dir": str(out), "selector.agent": "pretrained", "kd.round_steps": 30, "compare": False}
        (tmp_path / "config.yaml").write_text(as_yaml(override(config, changes)))
        torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611", "-m"]
        command = [sys.executable, "-m", *(torchrun if processes == 2 else []), "l2a", "distill"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        arguments = [*command, "--config", str(tmp_path / "config.yaml")]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
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
    without = dataclasses.replace(result, metrics={**result.metrics, "rounds": [{"selector": {}}]})
    print_result(without)
    assert "rank correlation" not in capsys.readouterr().out


def test_all_labels_can_be_trained_on(config, tmp_path, monkeypatch):
    every = override(config, {"dev_shots": 0, "selector.agent": "all", "kd.warmup_steps": 5, "kd.rounds": 1})
    context = RunContext(every)
    assert not len(context.data.held_out_labels) and len(context.data.splits.train) == context.data.splits.labels_used
    monkeypatch.setattr("l2a.pipeline.run.measure_latency", partial(measure_latency, seconds=0.05))
    result = distill(override(every, {"output_dir": str(tmp_path / "run")}))
    assert result.metrics["validation_log_likelihood"] == {} and result.metrics["divergence"]["l2a_student"] > 0
    for name in ("report.html", "README.md"):
        assert "texts set apart." in (tmp_path / "run" / name).read_text()
