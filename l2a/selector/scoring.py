"""Runs a trained policy over a whole pool."""

import numpy as np
from numpy.typing import NDArray

from l2a.selector.episodes import Episodes, SelectionTask
from l2a.selector.numerics import Floats
from l2a.selector.policy import TrainedPolicy

PASSES = 4


def score_pool(policy: TrainedPolicy, task: SelectionTask, keep_rate: float, rng: np.random.Generator) -> Floats:
    """Score every candidate the way the policy was trained: in episodes, each over a random part of the pool.

    The pool is cut into episodes several times in different orders; in each batch the best-scored share is kept, so
    that the state moves as it did in training; a candidate's score is its mean logit.

    Args:
        policy: The policy.
        task: The pool and the shape of an episode.
        keep_rate: Share that is kept in each batch.
        rng: Draws the orders.

    Returns:
        float32 (N,), mean logits.
    """
    orders = np.concatenate([_cut(task, rng) for _ in range(PASSES)])
    episodes = Episodes(task, len(orders))
    episodes.reset(np.arange(len(orders)), orders)
    totals, counts = np.zeros(len(task)), np.zeros(len(task))
    for _ in range(task.steps):
        batch, logits = episodes.batch(), policy.logits(episodes.observe())
        np.add.at(totals, batch, logits)
        np.add.at(counts, batch, 1.0)
        episodes.step(_best_of_each_batch(logits, keep_rate))
    return (totals / counts).astype(np.float32)


def _cut(task: SelectionTask, rng: np.random.Generator) -> NDArray[np.int64]:
    # The last episode is filled up with candidates of the first: an episode is never longer than the pool, so none
    # is shown twice in one.
    shown = task.steps * task.batch
    order = rng.permutation(len(task))
    return np.concatenate([order, order[: -len(order) % shown]]).reshape(-1, shown)


def _best_of_each_batch(logits: Floats, keep_rate: float) -> NDArray[np.bool_]:
    kept = np.zeros(logits.shape, bool)
    best = np.argsort(-logits, axis=1, kind="stable")[:, : max(1, round(keep_rate * logits.shape[1]))]
    np.put_along_axis(kept, best, True, axis=1)
    return kept
