"""Prints the density table of docs/generator.md: does the score rank held-out target text above source text?

    python benchmarks/generator/density.py

On the shipped pairs, from averages of the pretrained encoder's word embeddings: fitted on 2,000 source texts and a few
target texts, judged by the area under the ROC curve on 500 other source texts and the target's remaining training texts
(at most 500), for the ratio of the domain classifier. Mean of three draws of the target texts.
"""

import numpy as np
from sklearn.metrics import roc_auc_score

from l2a.data.domains import load_domain
from l2a.data.examples import TextInput
from l2a.generator.chain import fit_target_density, fit_word_average
from l2a.teacher.model import Teacher, load_encoder

PAIRS = (("movies", "tweets"), ("movies", "products"), ("movies", "editorials"))
SHOTS, SEEDS, FITTED, JUDGED = (16, 64, 256), (0, 1, 2), 2000, 500


def main() -> None:
    """Print the table."""
    encoder = load_encoder("mpnet-base", ("negative", "positive"), 0)
    print("| pair | target texts | area |\n| --- | ---: | ---: |")
    for source, target in PAIRS:
        far, near = _some(source, FITTED + JUDGED), _some(target, 756)
        for shots in SHOTS:
            area = np.mean([_area(encoder, far, near, shots, seed) for seed in SEEDS])
            print(f"| {source} to {target} | {shots} | {area:.2f} |", flush=True)


def _some(name: str, count: int) -> list[TextInput]:
    inputs = load_domain(name).train.inputs
    chosen = np.random.default_rng(0).permutation(len(inputs))[:count]
    return [inputs[i] for i in chosen]


def _area(encoder: Teacher, far: list[TextInput], near: list[TextInput], shots: int, seed: int) -> float:
    order = np.random.default_rng(seed).permutation(len(near))
    few, others = ([near[i] for i in some] for some in (order[:shots], order[shots : shots + JUDGED]))
    embed = fit_word_average(encoder.tokenizer, encoder.word_embeddings(), far[:FITTED] + few, 64)
    density = fit_target_density(embed(far[:FITTED]), embed(few))
    values = density.log_density(embed(far[FITTED:] + others))
    return float(roc_auc_score(np.repeat([0, 1], [len(far) - FITTED, len(others)]), values))


if __name__ == "__main__":
    main()
