"""Draws docs/generator/tau.svg: what the temperature tau does to the chains on the shipped domains.

    python benchmarks/generator/tau_figure.py

Target texts are 64 training texts of "tweets", source texts 2,000 of "movies". For each tau it draws how near the
chains' samples are to the target and how many of them are different.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from l2a.config import GeneratorConfig
from l2a.data.domains import load_domain
from l2a.data.examples import normalised_hash
from l2a.experiments.report import COLOURS, STYLE, save_figure
from l2a.generator.chain import Diagnostics, GeneratorInputs, draw_pool, fit_word_average
from l2a.generator.tokens import TokenSpace, build_neighbour_table, vocabulary
from l2a.teacher.labelling import cached_labeller
from l2a.teacher.model import load_encoder
from l2a.util.files import atomic_write_text

FOLDER = Path(__file__).parents[2] / "docs" / "generator"
NUMBERS = Path(__file__).parents[1] / "results" / "generator_tau.json"
TAUS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, float("inf"))
SOURCE, TARGET, POOL, LENGTH, SEED = 2000, 64, 400, 64, 0


def main() -> None:
    """Run the chains at every temperature, then draw."""
    problem = _problem()
    facts = []
    for tau in TAUS:
        config = GeneratorConfig(tau=tau, operators={"augpro_fgsm": 0.0})
        facts.append(draw_pool(problem, config, POOL, np.random.default_rng(SEED))[1])
        print(f"tau {tau}: {facts[-1]['sample_log_density']:.2f}, {facts[-1]['distinct_share']:.0%} different")
    numbers = {str(tau): dict(fact) for tau, fact in zip(TAUS, facts, strict=True)}
    atomic_write_text(NUMBERS, json.dumps(numbers, indent=1) + "\n")
    with matplotlib.rc_context(STYLE):
        save_figure(_draw(facts), FOLDER / "tau.svg")


def _problem() -> GeneratorInputs:
    source, target = load_domain("movies").train, load_domain("tweets")
    rng = np.random.default_rng(SEED)
    far = source.take(np.sort(rng.choice(len(source), SOURCE, replace=False)))
    near = target.train.take(np.sort(rng.choice(len(target.train), TARGET, replace=False)))
    teacher = load_encoder("minilm-l6", source.label_names, SEED)
    labeller, size = cached_labeller(teacher, LENGTH), len(teacher.tokenizer)
    embeddings = teacher.word_embeddings().cpu()[:size]
    return GeneratorInputs(
        source_inputs=tuple(text for text in far.inputs if normalised_hash(text) not in target.test.hashes),
        target_inputs=near.inputs,
        unlabelled={},
        embed=fit_word_average(teacher.tokenizer, embeddings, far.inputs + near.inputs, LENGTH),
        space=TokenSpace(
            teacher.tokenizer,
            build_neighbour_table(embeddings, vocabulary(teacher.tokenizer)),
            embeddings,
            None,
            LENGTH,
        ),
        labeller=labeller,
        forbidden_hashes=target.test.hashes,
    )


def _draw(facts: list[Diagnostics]) -> Figure:
    figure = Figure(figsize=(7.4, 3.2), facecolor="white", layout="constrained", edgecolor="#BBBBBB", linewidth=1.0)
    near, different = figure.subplots(1, 2)
    places, names = range(len(TAUS)), ["plain" if np.isinf(tau) else f"{tau:g}" for tau in TAUS]
    near.plot(places, [fact["sample_log_density"] for fact in facts], "o-", color=COLOURS[0], label="chains' samples")
    plain, target = facts[-1]["proposal_log_density"], facts[0]["target_log_density"]
    near.axhline(plain, color=COLOURS[1], linestyle="--", label="plain proposals")
    near.axhline(target, color="#444444", linestyle=":", label="target texts")
    near.set_ylabel("standardised log target density")
    near.legend(frameon=False, fontsize=8)
    different.plot(
        places, [100 * fact["distinct_share"] for fact in facts], "s-", color=COLOURS[2], label="different texts"
    )
    accepted = [100 * fact["acceptance"]["jump"] for fact in facts]
    different.plot(places, accepted, "^--", color=COLOURS[3], label="accepted jumps")
    different.set_ylabel("%")
    different.set_ylim(0, 105)
    different.legend(frameon=False, fontsize=8)
    for axes in (near, different):
        axes.set_xticks(places, names)
        axes.set_xlabel("tau")
    return figure


if __name__ == "__main__":
    main()
