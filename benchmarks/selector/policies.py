"""Trains the policies of the card `transfer`: each on all pairs but one, and one on all.

    python benchmarks/selector/policies.py --data-root DATA

They go to ``policies/without_PAIR`` and ``policies/all``; a folder that holds a policy is left alone, so that an
interrupted run goes on where it was. Each pair gives one pool a seed: the reward split of one pool is a few dozen
texts, and what only they say shall not be learned.
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
    parser.add_argument("--seeds", type=int, default=2, help="pools of each pair")
    options = parser.parse_args()
    card = load_experiment(options.card)
    configs = {
        pair.name: [config_of(card, pair, options.data_root, seed) for seed in range(options.seeds)]
        for pair in card.pairs
    }
    wanted = {f"without_{left_out}": [name for name in configs if name != left_out] for left_out in configs}
    wanted["all"] = list(configs)
    missing = {name: pairs for name, pairs in wanted.items() if not (options.output / name / "policy.json").exists()}
    needed = configs if missing else {}
    problems = {name: [surrogate_problem(config) for config in pools] for name, pools in needed.items()}
    for name, pairs in missing.items():
        pools = [problem for pair in pairs for problem in problems[pair]]
        # As many steps for each pool as a run takes for its own.
        steps = {"selector.training_steps": len(pools) * configs[pairs[0]][0].selector.training_steps}
        of_pools = [override(config, steps) for pair in pairs for config in configs[pair]]
        print(f"{name}: {train_on(pools, of_pools, options.output / name).steps} steps", flush=True)


def config_of(card: ExperimentCard, pair: Pair, data_root: str, seed: int) -> DistillConfig:
    """Configure the card's own L2A row for one pair."""
    places = {"source": pair.source, "target": pair.target, "data_root": data_root, "shots": card.shots[0]}
    return override(method_config(card, card.students[0], "l2a", pair.name), {**places, "seed": seed})


if __name__ == "__main__":
    main()
