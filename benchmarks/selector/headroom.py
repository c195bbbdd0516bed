"""How much any selector could gain: what random selections of a pool are worth after a whole round.

    python benchmarks/selector/headroom.py --data-root DATA --pair A.jsonl:B.jsonl

Several random halves of one pool are each distilled on for a round, from the same student, in two orders of the
batches, and judged on the target's large dev split. If two orders of one half differ as much as two halves do, which
candidates are kept does not matter at this budget. Writes ``benchmarks/results/selector_headroom.json``, a pair at a
time, and leaves alone the pairs that it holds.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from l2a.config import DistillConfig, load_config, override
from l2a.encoding import encode
from l2a.files import atomic_write_text
from l2a.jsontext import to_json
from l2a.kd.trainer import run_student
from l2a.pipeline.rewards import reward_score
from l2a.pipeline.selectors import PreparedPair, prepare_pair
from l2a.pipeline.workbench import mixture
from l2a.selector.problem import keep_best

RESULTS = Path(__file__).parents[1] / "results" / "selector_headroom.json"
ORDERS = 2


def measure(config: DistillConfig, selections: int) -> dict[str, Any]:
    """Judge random halves of a pair's first pool.

    Args:
        config: The pair and the budget.
        selections: How many halves.

    Returns:
        Accuracies and scores of each half and order, and what they say.
    """
    pair, rng = prepare_pair(config), np.random.default_rng([config.seed, 9])
    size = len(pair.drawn.pool.inputs)
    rate, classes = config.selector.keep_rate, pair.problem.classes
    halves = [np.flatnonzero(keep_best(rng.random(size, np.float32), rate, classes)) for _ in range(selections)]
    assert pair.problem.real_reward is not None
    second_tier = [pair.problem.real_reward(np.isin(np.arange(size), half)) for half in halves]
    rounds = np.array([[after_round(pair, half, order) for order in range(ORDERS)] for half in halves])
    everything = [after_round(pair, np.arange(size), order) for order in range(ORDERS)]
    nothing = [after_round(pair, None, order) for order in range(ORDERS)]
    return {
        "dev_accuracy_of_halves": rounds[..., 0].tolist(),
        "dev_accuracy_of_all": float(np.mean(everything, axis=0)[0]),
        "dev_accuracy_without_candidates": float(np.mean(nothing, axis=0)[0]),
        **spread(rounds[..., 0]),
        "second_tier_against_dev_accuracy": correlation(second_tier, rounds[..., 0].mean(1)),
        "reward_split_against_dev_accuracy": correlation(rounds[..., 1].mean(1), rounds[..., 0].mean(1)),
        "dev_examples": len(pair.bench.context.data.target.dev),
    }


def after_round(pair: PreparedPair, kept: NDArray[np.int64] | None, order: int) -> tuple[float, float]:
    """Distil for as many updates as a round, from the warmed-up student on a schedule of its own, and take it back.

    Args:
        pair: The pair.
        kept: Positions of the candidates, or None for a round without any.
        order: Number of the order of the batches.

    Returns:
        Accuracy on the dev split, and the score of the reward split.
    """
    bench, context = pair.bench, pair.bench.context
    weights, steps = bench.student.snapshot(), context.config.kd.round_steps
    trial = replace(context.config.kd, warmup_steps=0, rounds=1, evaluate_every=steps)
    length = context.config.max_length
    trainer = bench.trainer.on_trial(trial, context.data.splits.choice, length, order)
    trainer.train(*mixture(bench, None if kept is None else pair.drawn.candidates.take(kept)), steps)
    trainer.restore_best()
    dev = context.data.target.dev
    predicted = run_student(bench.student, encode(bench.student.tokenizer, dev.inputs, length))[0].argmax(1)
    result = float(np.mean(predicted == dev.labels)), reward_score(bench)
    bench.student.restore(weights)
    return result


def spread(accuracy: NDArray[np.float64]) -> dict[str, float]:
    """Split the variance of accuracies (S, R) into that between selections and that between orders of one."""
    within = accuracy.var(axis=1, ddof=1).mean()
    between = max(0.0, accuracy.mean(axis=1).var(ddof=1) - within / accuracy.shape[1])
    return {"deviation_between_selections": between**0.5, "deviation_between_orders": within**0.5}


def correlation(first: Any, second: Any) -> float:
    """Spearman correlation."""
    return float(spearmanr(first, second).statistic)


def main() -> None:
    """Measure the pairs that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", help="folder that the pairs' paths start from")
    parser.add_argument("--pair", action="append", default=[], metavar="SOURCE:TARGET", help="may be repeated")
    parser.add_argument("--source-size", type=int, help="labelled source texts; all without it")
    parser.add_argument("--pool-size", type=int, default=2400, help="as in the card `selectors`")
    parser.add_argument("--selections", type=int, default=10)
    parser.add_argument("--preset", default="screening")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    for pair in options.pair:
        source, target = pair.split(":")
        name = f"{pair}, {options.source_size or 'all'} source texts, {options.pool_size} candidates"
        if name not in found:
            places = {"source": source, "target": target, "data_root": options.data_root}
            sizes = {"source_size": options.source_size, "kd.pool_size": options.pool_size}
            config = override(load_config(options.preset), {**places, **sizes})
            found[name] = measure(config, options.selections)
            atomic_write_text(options.output, to_json(found, indent=1) + "\n")
            print(name, {key: value for key, value in found[name].items() if isinstance(value, float)}, flush=True)


if __name__ == "__main__":
    main()
