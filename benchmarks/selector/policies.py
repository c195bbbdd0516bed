"""Trains the policies of the card `transfer`: each on all pairs but one, and one on all.

    python benchmarks/selector/policies.py --data-root DATA

They go to ``policies/without_PAIR`` and ``policies/all``; a folder that holds a policy is left alone, so that an
interrupted run goes on where it was.
"""

import argparse
from pathlib import Path

from l2a.config import DistillConfig, override
from l2a.experiments.card import ExperimentCard, Pair, load_experiment, method_config
from l2a.pipeline.selectors import surrogate_problem, train_on


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True, help="folder of the card's domain files")
    parser.add_argument("--output", type=Path, default=Path("policies"))
    parser.add_argument("--card", default="transfer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    card = load_experiment(options.card)
    configs = {pair.name: config_of(card, pair, options.data_root, options.seed) for pair in card.pairs}
    wanted = {f"without_{left_out}": [name for name in configs if name != left_out] for left_out in configs}
    wanted["all"] = list(configs)
    missing = {name: pairs for name, pairs in wanted.items() if not (options.output / name / "policy.json").exists()}
    problems = {name: surrogate_problem(config) for name, config in configs.items()} if missing else {}
    for name, pairs in missing.items():
        # As many steps for each pair as a run takes for its own.
        steps = {"selector.training_steps": len(pairs) * configs[pairs[0]].selector.training_steps}
        chosen = ([problems[pair] for pair in pairs], [override(configs[pair], steps) for pair in pairs])
        print(f"{name}: {train_on(*chosen, options.output / name).steps} steps", flush=True)


def config_of(card: ExperimentCard, pair: Pair, data_root: str, seed: int) -> DistillConfig:
    """Configure the card's own L2A row for one pair."""
    places = {"source": pair.source, "target": pair.target, "data_root": data_root, "shots": card.shots[0]}
    return override(method_config(card, card.students[0], "l2a", pair.name), {**places, "seed": seed})


if __name__ == "__main__":
    main()
