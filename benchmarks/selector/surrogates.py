"""How well cheap rewards rank selections, against real distillation steps.

    python benchmarks/selector/surrogates.py --data-root DATA --pair A.jsonl:B.jsonl --seed 0 --seed 1

Sixteen selections of one pool a pair and seed, random and by random linear policies as in a run, the same share of each
class. Writes ``benchmarks/results/selector_surrogates.json``, pool by pool, and leaves alone the pools that it holds.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from l2a.config import DistillConfig, load_config, override
from l2a.kd.data import DistillationSet
from l2a.kd.losses import soft_label_loss
from l2a.kd.trainer import run_student
from l2a.pipeline.policies import PreparedPair, prepare_pair
from l2a.selector.environment import build_task
from l2a.selector.problem import keep_best
from l2a.selector.reward import build_surrogate, influences, surrogate_reward
from l2a.selector.select import random_scores
from l2a.util.files import atomic_write_text, to_json

RESULTS = Path(__file__).parents[1] / "results" / "selector_surrogates.json"
RIDGE = 0.1
Masks = list[NDArray[np.bool_]]


def measure(config: DistillConfig, count: int) -> dict[str, float]:
    """Rank selections of one pool by the real reward and by every surrogate.

    Args:
        config: The pair, the seed and the budget.
        count: How many selections.

    Returns:
        Spearman correlation with the real reward, by surrogate.
    """
    pair = prepare_pair(config)
    task = build_task(pair.problem, config.selector)
    scores = random_scores(task, count, np.random.default_rng([config.seed, 10]))
    masks = [keep_best(values, config.selector.keep_rate, task.classes) for values in scores]
    assert pair.problem.real_reward is not None
    real = [pair.problem.real_reward(mask) for mask in masks]
    ranked = {name: [value(mask) for mask in masks] for name, value in surrogates(pair).items()}
    return {name: float(spearmanr(values, real).statistic) for name, values in ranked.items()}


def surrogates(pair: PreparedPair) -> dict[str, Callable[[NDArray[np.bool_]], float]]:
    """Make every surrogate: a function of a selection, bool (N,)."""
    session, texts = pair.session, pair.drawn.candidates
    student, trainer, used = session.student, session.trainer, build_surrogate(pair.problem)
    even = [torch.ones_like(parameter) for parameter in student.model.parameters()]
    output = [one * float(p is student.output.weight) for one, p in zip(even, student.model.parameters(), strict=True)]
    numbers = {
        "agreement of the output layer's gradients": influences(trainer, texts, output, session.reward),
        "agreement of all gradients": influences(trainer, texts, even, session.reward),
        "influence where the student is": influences(trainer, texts, trainer.moves_per_gradient(texts), session.reward),
    }
    means = {name: _mean_of(values) for name, values in numbers.items()}
    means["influence after a quarter of the steps (used)"] = lambda mask: surrogate_reward(used, mask)
    return {"ridge head on the frozen student": _ridge_head(pair, texts), **means}


def _mean_of(values: NDArray[np.float32]) -> Callable[[NDArray[np.bool_]], float]:
    return lambda mask: float(values[mask].mean())


def _ridge_head(pair: PreparedPair, texts: DistillationSet) -> Callable[[NDArray[np.bool_]], float]:
    """Regress the teacher's labels on the student's features, strongly ridged, and score the reward split."""
    student, reward = pair.session.student, pair.session.reward
    features, judged = (run_student(student, part.encoded)[1] for part in (texts, reward))
    scale = features.std(axis=0).mean() * features.shape[1] ** 0.5
    features, judged = ((part - features.mean(axis=0)) / scale for part in (features, judged))
    targets = texts.teacher.probabilities()

    def gain(mask: NDArray[np.bool_]) -> float:
        x, y = features[mask] - features[mask].mean(axis=0), targets[mask] - targets[mask].mean(axis=0)
        weight = np.linalg.solve(x.T @ x / len(x) + RIDGE * np.eye(x.shape[1]), x.T @ y / len(x))
        logits = torch.from_numpy((judged @ weight).astype(np.float32))
        return -float(soft_label_loss(logits, torch.from_numpy(reward.teacher.logits), 1.0).mean())

    return gain


def main() -> None:
    """Measure the pools that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", help="folder that the pairs' paths start from")
    parser.add_argument("--pair", action="append", default=[], metavar="SOURCE:TARGET", help="may be repeated")
    parser.add_argument("--seed", action="append", type=int, default=[], help="may be repeated")
    parser.add_argument("--selections", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {"by_pool": {}}
    for pair in options.pair:
        for seed in options.seed or [0]:
            source, target = pair.split(":")
            name = f"{pair}, seed {seed}"
            if name not in found["by_pool"]:
                places = {"source": source, "target": target, "data_root": options.data_root, "seed": seed, "shots": 32}
                config = override(load_config("screening"), places)
                found["by_pool"][name] = measure(config, options.selections)
                pools = list(found["by_pool"].values())
                found["mean"] = {key: float(np.mean([pool[key] for pool in pools])) for key in pools[0]}
                atomic_write_text(options.output, to_json(found, indent=1) + "\n")
                print(name, found["by_pool"][name], flush=True)


if __name__ == "__main__":
    main()
