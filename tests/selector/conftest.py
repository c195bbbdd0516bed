"""A small synthetic problem: half of the candidates carry wrong labels, and the features betray which."""

import random

import numpy as np
import pytest
import torch
import yaml

from l2a.config import SelectorConfig
from l2a.generator.chain import CandidatePool
from l2a.selector.problem import SelectionProblem
from l2a.selector.reward import Views, fit_surrogate
from l2a.teacher.labelling import TeacherOutputs

SMALL = SelectorConfig(batch=8, episode_steps=4)
QUICK = SelectorConfig(agent="ppo", batch=16, episode_steps=4, training_steps=256, snapshots=2, real_evaluations=0)


def rng():
    return np.random.default_rng(0)


def make_problem(size=512, classes=2, seed=0, width=16, **changes):
    """Candidates x ~ N(0, 1) with labels from a linear rule; the ones far from the target have random labels.

    The student's states are the features; those of the reward texts have right labels.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(width, classes)).astype(np.float32)
    features = rng.normal(size=(size, width)).astype(np.float32)
    is_bad = rng.random(size) < 0.5
    logits = 2.0 * features @ truth
    logits[is_bad] = 2.0 * rng.normal(size=(int(is_bad.sum()), width)).astype(np.float32) @ truth
    density = np.where(is_bad, -3.0, 0.0) + rng.normal(size=size)
    pool = CandidatePool(
        inputs=tuple((f"text number {i}" + " word" * (i % 7),) for i in range(size)),
        origins=tuple(f"source:{i}" for i in range(size)),
        operators=tuple(str(o) for o in rng.choice(["source", "knn"], size)),
        degrees=rng.random(size).astype(np.float32),
        teacher=TeacherOutputs(logits.astype(np.float32), rng.normal(size=(size, 24)).astype(np.float32)),
        log_density=density.astype(np.float32),
        domain_probability=rng.random(size).astype(np.float32),
        max_target_cosine=rng.random(size).astype(np.float32),
    )
    start = (0.1 * rng.normal(size=(width, classes))).astype(np.float32)
    judged = rng.normal(size=(200, width)).astype(np.float32)
    reward_texts = Views(judged, judged @ start, 2.0 * judged @ truth)
    surrogate = fit_surrogate(Views(features, features @ start, pool.teacher.logits), [], 1.0, reward_texts)
    changes = {"surrogate": lambda: surrogate, "oracle": lambda: (~is_bad).astype(np.float32), **changes}
    problem = SelectionProblem(pool, lambda: features @ start, **changes)
    return problem, ~is_bad


@pytest.fixture
def problem():
    return make_problem()[0]


@pytest.fixture
def write_card(tmp_path, monkeypatch):
    """Writes a card into the folder ``agents`` of the working directory."""
    (tmp_path / "agents").mkdir()
    monkeypatch.chdir(tmp_path)

    def write(name="mine", **card):
        (tmp_path / "agents" / f"{name}.yaml").write_text(yaml.safe_dump({"description": "A trial.", **card}))

    return write


def global_generators():
    """The state of the generators that nothing of the project may touch."""
    numpy_state = np.random.get_state()[1].tobytes()  # noqa: NPY002
    return numpy_state, torch.get_rng_state().numpy().tobytes(), random.getstate()
