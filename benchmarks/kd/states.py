"""Which rule chooses a student's state: divergence from the teacher, labels, both, or the last average.

    python benchmarks/kd/states.py --data-root DATA --run scale:movie_tweet:l2a:0 --run selectors:movie_tweet:random:0

A run is a row of an experiment card on a pair with a seed. It is trained once; every state that the trainer scores is
also judged on target labels that no run reads, and the rules are applied to these scores afterwards. Writes
``benchmarks/results/states.json``, run by run, and leaves alone the runs that it holds. No test split is opened.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from l2a.config import override
from l2a.data import encoding
from l2a.experiments.card import load_experiment, variant_config
from l2a.kd.trainer import CLEARLY, TEMPERATURES, KDTrainer, Score, mean_divergence, run_student, standard_error
from l2a.pipeline.methods import METHODS
from l2a.pipeline.session import RunContext
from l2a.pipeline.students import spare_labels
from l2a.report.run_folder import versions
from l2a.util.files import atomic_write_text, to_json
from l2a.util.progress import Progress

RESULTS = Path(__file__).parents[1] / "results" / "states.json"
State = dict[str, Any]


def record(run: str, data_root: str) -> list[State]:
    """Train the student of one run.

    Args:
        run: "card:pair:variant:seed".
        data_root: Folder of the card's domain files.

    Returns:
        Of each state that was scored: "step", "divergence" at temperature 1, "calibrated" at the best one,
        "log_likelihoods" of the validation split, and "accuracy" on spare labels.
    """
    name, pair_name, variant, seed = run.split(":")
    card = load_experiment(name)
    pair, row = next(one for one in card.pairs if one.name == pair_name), card.variants[variant]
    places = {"source": pair.source, "target": pair.target, "unlabelled": pair.unlabelled if row.unlabelled else ()}
    settings = {**places, "data_root": data_root, "shots": card.shots[0], "seed": int(seed)}
    context = RunContext(override(variant_config(card, variant, pair_name), settings), Progress())
    with watched(context) as states:
        METHODS[row.method].fit(context)
    return states


@contextmanager
def watched(context: RunContext) -> Iterator[list[State]]:
    """Note every state that a student is scored in, and what it is worth."""
    judges, states, evaluate = spare_labels(context)[1], list[State](), KDTrainer.evaluate

    def noted(self: KDTrainer, progress: Progress) -> Score:
        score = evaluate(self, progress)
        with self._average.applied() if self._average is not None else nullcontext():
            texts = encoding.encode(self.student.tokenizer, judges.inputs, context.config.max_length)
            right = run_student(self.student, texts, precise=False)[0].argmax(axis=1) == judges.labels
            found = {"step": self.steps_done, "accuracy": float(right.mean())}
            if self._apart is not None:
                both = run_student(self.student, self._apart.encoded, precise=False)[0], self._apart.teacher.logits
                found |= {"divergence": mean_divergence(*both), "calibrated": mean_divergence(*both, TEMPERATURES)}
        states.append({**found, "log_likelihoods": score.log_likelihoods.tolist()})
        return score

    KDTrainer.evaluate = noted  # type: ignore[method-assign, assignment]
    try:
        yield states
    finally:
        KDTrainer.evaluate = evaluate  # type: ignore[method-assign]


def chosen(states: list[State], measure: str | None, errors: float) -> State:
    """Walk through the states as the trainer does.

    Args:
        states: In their order.
        measure: "divergence", "calibrated" or None for the labels.
        errors: Standard errors by which the labels must fall to refuse a state; infinite for no veto.

    Returns:
        The state that is kept.
    """
    best = states[0]
    for state in states[1:]:
        gains = np.array(state["log_likelihoods"]) - np.array(best["log_likelihoods"])
        gain = float(gains.mean()) if len(gains) else 0.0
        if measure is None or measure not in state:
            better = gain > 0 or not len(gains)
        else:
            allowed = errors == np.inf or not len(gains) or gain >= -errors * standard_error(gains)
            better = state[measure] < best[measure] and allowed
        best = state if better else best
    return best


RULES: dict[str, Callable[[list[State]], State]] = {
    "last average": lambda states: states[-1],
    "labels": lambda states: chosen(states, None, 0.0),
    "divergence, veto at one standard error": lambda states: chosen(states, "divergence", 1.0),
    "divergence, veto at two": lambda states: chosen(states, "divergence", CLEARLY),
    "divergence, no veto": lambda states: chosen(states, "divergence", np.inf),
    "divergence at the best temperature, veto at one": lambda states: chosen(states, "calibrated", 1.0),
    "divergence at the best temperature, veto at two": lambda states: chosen(states, "calibrated", CLEARLY),
    "divergence at the best temperature, no veto": lambda states: chosen(states, "calibrated", np.inf),
    "best of all, by the judges": lambda states: max(states, key=lambda state: state["accuracy"]),
}


def main() -> None:
    """Train the runs that the file does not hold yet, and apply the rules to all that it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True, help="folder of the card's domain files")
    parser.add_argument("--run", action="append", default=[], metavar="CARD:PAIR:VARIANT:SEED", help="may be repeated")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    for run in options.run:
        held = json.loads(options.output.read_text("utf-8"))["states"] if options.output.exists() else {}
        if run not in held:
            held[run] = record(run, options.data_root)
            held |= json.loads(options.output.read_text("utf-8"))["states"] if options.output.exists() else {}
        accuracy = {name: {it: rule(states)["accuracy"] for it, states in held.items()} for name, rule in RULES.items()}
        means = {name: float(np.mean(list(of_runs.values()))) for name, of_runs in accuracy.items()}
        found = {"mean": means, "accuracy": accuracy, "states": held, "versions": versions()}
        atomic_write_text(options.output, to_json(found, indent=1) + "\n")
        print(run, {name: round(100 * of_runs[run], 1) for name, of_runs in accuracy.items()}, flush=True)


if __name__ == "__main__":
    main()
