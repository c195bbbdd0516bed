"""Trains the agent `pretrained` and the policies of a card of selectors, each on all its pairs but one.

    python benchmarks/selector/policies.py --data-root DATA

They go to ``agents/pretrained`` and ``benchmarks/selector/policies/without_PAIR``; a folder that holds a policy is left
alone, so that an interrupted run goes on where it was. Each pair gives one pool a seed.
"""

import argparse
from pathlib import Path

from l2a.config import DistillConfig, override
from l2a.experiments.card import ExperimentCard, Pair, load_experiment, variant_config
from l2a.pipeline.policies import prepare_pair, train_selector
from l2a.selector.reward import surrogate_only

AGENT = Path(__file__).parents[2] / "agents" / "pretrained"
SHIPPED = "sentiment_sentence/"
"""Domains that the package names too: the agent that it ships shall never have seen them."""


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True, help="folder of the card's domain files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "policies")
    parser.add_argument("--card", default="selectors", help="its row `ppo` gives pairs and budget")
    parser.add_argument("--seeds", type=int, default=1, help="pools of each pair")
    options = parser.parse_args()
    card = load_experiment(options.card)
    configs = {
        pair.name: [config_of(card, pair, options.data_root, seed) for seed in range(options.seeds)]
        for pair in card.pairs
    }
    wanted = {f"without_{left_out}": [name for name in configs if name != left_out] for left_out in configs}
    wanted["pretrained"] = [pair.name for pair in card.pairs if not pair.source.startswith(SHIPPED)]
    folders = {name: AGENT if name == AGENT.name else options.output / name for name in wanted}
    missing = {name: pairs for name, pairs in wanted.items() if not (folders[name] / "policy.json").exists()}
    needed = configs if missing else {}
    problems = {
        name: [surrogate_only(prepare_pair(config).problem) for config in pools] for name, pools in needed.items()
    }
    for name, pairs in missing.items():
        pools = [problem for pair in pairs for problem in problems[pair]]
        # As many steps for each pool as a run takes for its own.
        steps = {"selector.training_steps": len(pools) * configs[pairs[0]][0].selector.training_steps}
        of_pools = [override(config, steps) for pair in pairs for config in configs[pair]]
        trained = train_selector(of_pools, folders[name], overwrite=True, problems=pools)
        print(f"{name}: {trained.steps} steps", flush=True)


def config_of(card: ExperimentCard, pair: Pair, data_root: str, seed: int) -> DistillConfig:
    """Configure the card's own PPO row for one pair."""
    texts = pair.unlabelled if card.variants["ppo"].unlabelled else ()
    places = {"source": pair.source, "target": pair.target, "unlabelled": texts, "data_root": data_root}
    return override(variant_config(card, "ppo", pair.name), {**places, "shots": card.shots[0], "seed": seed})


if __name__ == "__main__":
    main()
