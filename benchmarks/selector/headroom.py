"""How much a selector could gain: what selections of one pool are worth after a whole round.

    python benchmarks/selector/headroom.py --data-root DATA [--card selectors_small_source]

Of one pool are kept the half that the surrogate finds best, the half that it finds worst, the half that a surrogate
finds best which reads half of the target's large dev split in place of the few texts of the reward split, and random
halves. Each is distilled on for a round, from the same student, in two orders of the batches, and judged on the other
half of the dev split. Writes ``benchmarks/results/selector_headroom.json``, a pair at a time, and leaves alone the
pairs that it holds.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from l2a.config import DistillConfig, override
from l2a.data.encoding import encode
from l2a.data.examples import Examples
from l2a.experiments.card import load_experiment, variant_config
from l2a.kd.trainer import calibrated_log_likelihoods, run_student
from l2a.pipeline.policies import PreparedPair, prepare_pair
from l2a.pipeline.session import mixture
from l2a.selector.problem import keep_best
from l2a.selector.reward import REAL_POOL, build_surrogate, candidate_influences, reward_score
from l2a.util.files import atomic_write_text, to_json

RESULTS = Path(__file__).parents[1] / "results" / "selector_headroom.json"
ORDERS = 2


def measure(config: DistillConfig, random_halves: int) -> dict[str, Any]:
    """Judge halves of a pair's first pool.

    Args:
        config: The pair and the budget.
        random_halves: How many of the halves are random.

    Returns:
        What each half is worth after a round, and a round without candidates.
    """
    pair, rng = prepare_pair(config), np.random.default_rng([config.seed, 9])
    dev = pair.session.context.data.target.dev
    order, middle = rng.permutation(len(dev.labels)), len(dev.labels) // 2
    seen, unseen = dev.take(order[:middle]), dev.take(order[middle:])
    candidates = pair.drawn.candidates
    few, session = candidates.take(rng.permutation(len(candidates))[:REAL_POOL]), pair.session
    of_dev = candidate_influences(
        session.trainer, candidates, few, session.labelled(seen.inputs, seen.labels), config.kd
    )
    of_reward = build_surrogate(pair.problem).influences
    scores = {"best_by_reward_split": of_reward, "worst_by_reward_split": -of_reward, "best_by_dev_split": of_dev}
    scores |= {f"random_{i}": rng.random(len(candidates), np.float32) for i in range(random_halves)}
    found: dict[str, Any] = {"judged_on": len(unseen.labels), "best_by_dev_split_reads": middle}
    for name, values in scores.items():
        kept = keep_best(values, config.selector.keep_rate, pair.problem.classes)
        found[name] = after_rounds(pair, np.flatnonzero(kept), unseen)
    found["without_candidates"] = after_rounds(pair, None, unseen)
    found["random"] = mean_of([found.pop(f"random_{i}") for i in range(random_halves)])
    found["rewards_agree"] = float(spearmanr(of_reward, of_dev).statistic)
    return found


def after_rounds(pair: PreparedPair, kept: NDArray[np.int64] | None, judges: Examples) -> dict[str, float]:
    """Judge a round on some candidates, the mean over the orders."""
    return mean_of([after_round(pair, kept, judges, order) for order in range(ORDERS)])


def mean_of(found: list[dict[str, float]]) -> dict[str, float]:
    """Average numbers of the same names."""
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def after_round(pair: PreparedPair, kept: NDArray[np.int64] | None, judges: Examples, order: int) -> dict[str, float]:
    """Distil for as many updates as a round, from the warmed-up student on a schedule of its own, and take it back.

    Args:
        pair: The pair.
        kept: Positions of the candidates, or None for a round without any.
        judges: Labelled target texts.
        order: Number of the order of the batches.

    Returns:
        Accuracy and separation of the judges, and separation of the reward split.
    """
    session, context = pair.session, pair.session.context
    weights, steps = session.student.snapshot(), context.config.kd.round_steps
    trial = replace(context.config.kd, warmup_steps=0, rounds=1, evaluate_every=steps)
    length = context.config.max_length
    trainer = session.trainer.on_trial(
        trial, session.labelled(context.data.splits.validation.inputs, context.data.splits.validation.labels), order
    )
    trainer.train(*mixture(session, None if kept is None else pair.drawn.candidates.take(kept)), steps)
    trainer.restore_best()
    logits = run_student(session.student, encode(session.student.tokenizer, judges.inputs, length))[0]
    result = {
        "accuracy": float(np.mean(logits.argmax(axis=1) == judges.labels)),
        "log_likelihood": float(calibrated_log_likelihoods(logits, judges.labels).mean()),
        "reward": reward_score(session.student, session.reward),
    }
    session.student.restore(weights)
    return result


def main() -> None:
    """Measure the pairs that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True, help="folder of the card's domain files")
    parser.add_argument("--card", default="selectors", help="gives pairs and budget")
    parser.add_argument("--pair", action="append", default=[], help="name in the card, may be repeated; all without it")
    parser.add_argument("--random-halves", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    card = load_experiment(options.card)
    for pair in [one for one in card.pairs if one.name in (options.pair or [every.name for every in card.pairs])]:
        measured = found.setdefault(options.card, {})
        if pair.name not in measured:
            config = variant_config(card, card.students[0], "random", pair.name)
            places = {"source": pair.source, "target": pair.target, "data_root": options.data_root}
            measured[pair.name] = measure(override(config, {**places, "shots": card.shots[0]}), options.random_halves)
            atomic_write_text(options.output, to_json(found, indent=1) + "\n")
            print(options.card, pair.name, measured[pair.name], flush=True)


if __name__ == "__main__":
    main()
