"""One tiny whole run, shared by the tests that only read it."""

from functools import partial

import pytest
import torch

from l2a.config import DistillConfig, override
from l2a.evaluation.metrics import measure_latency
from l2a.pipeline.distill import distill
from tests.conftest import write_domain

QUICK = partial(measure_latency, seconds=0.05)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """A cache that these tests share, so that teachers are trained once."""
    folder = tmp_path_factory.mktemp("shared-cache")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2A_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def use_shared_cache(private_cache, shared_cache, monkeypatch):
    monkeypatch.setenv("L2A_CACHE", str(shared_cache))
    monkeypatch.setattr("l2a.pipeline.run.measure_latency", QUICK)


@pytest.fixture(scope="session")
def config(shared_cache, encoder_folder, tmp_path_factory):
    """A whole run on tiny data with tiny models: seconds, not minutes."""
    folder = tmp_path_factory.mktemp("data")
    source = write_domain(folder / "source.jsonl", 140, seed=1, prefix="the story ")
    target = write_domain(folder / "target.jsonl", 150, seed=2, prefix="this phone ")
    return override(
        DistillConfig(),
        {
            "source": str(source), "target": str(target), "shots": 8, "dev_shots": 6, "max_length": 24,
            "output_dir": str(folder / "run"), "teacher.model": str(encoder_folder), "teacher.learning_rate": 1e-3,
            "teacher.frozen_layers": 0, "teacher.source_epochs": 4, "teacher.learns_from": "both",
            "student.max_share": 0.9, "kd.warmup_steps": 20, "kd.rounds": 2, "kd.round_steps": 10, "kd.pool_size": 32,
            "kd.learning_rate": 1e-3, "generator.chains": 8, "selector.agent": "ppo", "selector.training_steps": 64,
            "selector.real_evaluations": 3, "selector.batch": 8, "selector.episode_steps": 4,
            "selector.tier_correlation": -1.0,
        },
    )  # fmt: skip


@pytest.fixture(scope="session")
def result(config, shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l2a.pipeline.run.measure_latency", QUICK)
        return distill(config)
