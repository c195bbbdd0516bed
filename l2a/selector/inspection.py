"""Shows what a policy learned: which features decide, and how the kept candidates differ from the dropped."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from l2a.config import SelectorConfig
from l2a.data.examples import TextInput
from l2a.selector.environment import SelectionTask, build_task
from l2a.selector.network import TrainedPolicy
from l2a.selector.numerics import Floats
from l2a.selector.problem import OPERATOR_PREFIX, Selection, SelectionProblem, keep_best, measurements
from l2a.selector.reward import surrogate_reward
from l2a.selector.select import score_pool

PERMUTATIONS = 4
TEXTS = 10
OPERATOR = "operator"
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Importance:
    """What a feature is worth to a policy (permutation importance: Breiman, 2001).

    Attributes:
        loss: Surrogate reward, in nats, that is lost on the mean when the feature is shuffled over the candidates.
        changed: Share of the candidates that are then decided on otherwise.
    """

    loss: float
    changed: float


@dataclass(frozen=True)
class Inspection:
    """A policy's choice from one pool, explained.

    Attributes:
        selection: The choice.
        importances: By feature, the most important first; all operators together count as one.
        quartiles: By feature, the quartiles among the kept and among the dropped candidates, in its own units.
        operators: By operator, its share of the kept and of the dropped candidates.
        kept_texts: Up to ten kept candidates with their scores, the best first.
        dropped_texts: Up to ten dropped candidates with their scores, the worst first.
    """

    selection: Selection
    importances: Mapping[str, Importance]
    quartiles: Mapping[str, tuple[Floats, Floats]]
    operators: Mapping[str, tuple[float, float]]
    kept_texts: tuple[tuple[float, TextInput], ...]
    dropped_texts: tuple[tuple[float, TextInput], ...]


def inspect_policy(
    problem: SelectionProblem, policy: TrainedPolicy, config: SelectorConfig, rng: np.random.Generator
) -> Inspection:
    """Explain what a policy keeps of a pool.

    Args:
        problem: The pool and the state of the student.
        policy: Trained here or on other domains.
        config: Keep rate, batch and steps.
        rng: Draws the orders in which candidates are shown, and the permutations.

    Returns:
        The explanation.
    """
    task = build_task(problem, config, policy.feature_names)
    seed = int(rng.integers(2**31))  # every scoring shows the candidates in the same orders
    scores = score_pool(policy, task, config.keep_rate, np.random.default_rng(seed))
    kept = keep_best(scores, config.keep_rate, task.classes)
    by_value = {name: (_quartiles(values[kept]), _quartiles(values[~kept])) for name, values in _measured(problem)}
    order = np.argsort(-scores, kind="stable")
    return Inspection(
        Selection(kept, scores, policy.agent, {}, policy),
        _importances(task, policy, config.keep_rate, seed, rng),
        by_value,
        _operator_shares(problem.pool.operators, kept),
        _texts(problem, scores, [i for i in order if kept[i]][:TEXTS]),
        _texts(problem, scores, [i for i in order[::-1] if not kept[i]][:TEXTS]),
    )


def _importances(
    task: SelectionTask, policy: TrainedPolicy, keep_rate: float, seed: int, rng: np.random.Generator
) -> dict[str, Importance]:
    def keep(matrix: Floats) -> NDArray[np.bool_]:
        shuffled = replace(task, features=replace(task.features, matrix=matrix))
        scores = score_pool(policy, shuffled, keep_rate, np.random.default_rng(seed))
        return keep_best(scores, keep_rate, task.classes)

    def reward(kept: NDArray[np.bool_]) -> float:
        return surrogate_reward(task.surrogate, kept)

    matrix, found = task.features.matrix, {}
    reference = keep(matrix)
    for name, columns in _groups(task.features.names).items():
        others = [keep(_shuffled(matrix, columns, rng)) for _ in range(PERMUTATIONS)]
        loss = reward(reference) - float(np.mean([reward(other) for other in others]))
        found[name] = Importance(loss, float(np.mean([(other != reference).mean() for other in others])))
    return dict(sorted(found.items(), key=lambda item: (-item[1].loss, item[0])))


def _groups(names: tuple[str, ...]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        groups.setdefault(OPERATOR if name.startswith(OPERATOR_PREFIX) else name, []).append(column)
    return groups


def _shuffled(matrix: Floats, columns: list[int], rng: np.random.Generator) -> Floats:
    changed = matrix.copy()
    changed[:, columns] = matrix[rng.permutation(len(matrix))][:, columns]
    return changed


def _measured(problem: SelectionProblem) -> list[tuple[str, Floats]]:
    return [(name, np.asarray(values, np.float32)) for name, values in measurements(problem).items()]


def _quartiles(values: Floats) -> Floats:
    if not len(values):
        return np.full(len(QUARTILES), np.nan, np.float32)
    found: Floats = np.quantile(values, QUARTILES).astype(np.float32)
    return found


def _operator_shares(operators: tuple[str, ...], kept: NDArray[np.bool_]) -> dict[str, tuple[float, float]]:
    names: NDArray[np.str_] = np.array(operators)
    totals = max(int(kept.sum()), 1), max(int((~kept).sum()), 1)
    return {
        name: (float((names[kept] == name).sum() / totals[0]), float((names[~kept] == name).sum() / totals[1]))
        for name in sorted(set(operators))
    }


def _texts(problem: SelectionProblem, scores: Floats, chosen: list[int]) -> tuple[tuple[float, TextInput], ...]:
    return tuple((float(scores[i]), problem.pool.inputs[i]) for i in chosen)
