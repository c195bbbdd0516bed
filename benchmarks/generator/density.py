"""Prints the density table of docs/generator.md: does the score rank held-out target text above source text?

    python benchmarks/generator/density.py

On the shipped pairs, from the pretrained encoder's embeddings: fitted on 2,000 source texts and a few target texts,
judged by the area under the ROC curve on 500 other source texts and the target's remaining training texts (at most
500), for the ratio of the domain classifier. Mean of three draws of the target texts.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from l2a.data.domains import load_domain
from l2a.generator.chain import fit_target_density
from l2a.teacher.labelling import cached_labeller
from l2a.teacher.model import load_encoder

PAIRS = (("movies", "tweets"), ("movies", "products"), ("movies", "editorials"))
SHOTS, SEEDS, FITTED, JUDGED = (16, 64, 256), (0, 1, 2), 2000, 500


def main() -> None:
    """Print the table."""
    label = cached_labeller(load_encoder("minilm-l6", ("negative", "positive"), 0), 64)
    print("| pair | target texts | area |\n| --- | ---: | ---: |")
    for source, target in PAIRS:
        far, near = (label(_some(name, count)).embeddings for name, count in ((source, FITTED + JUDGED), (target, 756)))
        for shots in SHOTS:
            area = np.mean([_area(far, near, shots, seed) for seed in SEEDS])
            print(f"| {source} to {target} | {shots} | {area:.2f} |", flush=True)


def _some(name: str, count: int) -> list[tuple[str, ...]]:
    inputs = load_domain(name).train.inputs
    chosen = np.random.default_rng(0).permutation(len(inputs))[:count]
    return [inputs[i] for i in chosen]


def _area(far: NDArray[np.float32], near: NDArray[np.float32], shots: int, seed: int) -> float:
    order = np.random.default_rng(seed).permutation(len(near))
    density = fit_target_density(far[:FITTED], near[order[:shots]])
    others = near[order[shots:]][:JUDGED]
    values = np.concatenate([density.log_density(far[FITTED:]), density.log_density(others)])
    return float(roc_auc_score(np.repeat([0, 1], [len(far) - FITTED, len(others)]), values))


if __name__ == "__main__":
    main()
