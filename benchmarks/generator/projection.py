"""The projection by the table of neighbours against the nearest of all rows, on the same tokens."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2a.data.domains import load_domain
from l2a.generator.tokens import (
    FROZEN,
    TokenSpace,
    build_neighbour_table,
    find_neighbours,
    steepest_neighbours,
    token_kinds,
    vocabulary,
)
from l2a.teacher.model import load_encoder

NEIGHBOURS = 16


def measure_projection(seed: int, smoke: bool) -> dict[str, Any]:
    """Measure the closed form of mixing and the projection by the table on open tokens of the shipped domain "movies".

    Args:
        seed: Draws tokens, partners, weights and directions.
        smoke: Fewer tokens, one round.

    Returns:
        For each its speed, that of the exhaustive search, and how often they agree; in front the ratio by the table.
    """
    teacher = load_encoder("minilm-l6", ("text",), 0)
    names = vocabulary(teacher.tokenizer)
    embeddings = teacher.word_embeddings().cpu()[: len(names)]
    started = time.perf_counter()
    find_neighbours(embeddings, *token_kinds(names), NEIGHBOURS) if not smoke else None
    one_off = time.perf_counter() - started
    table, rows = build_neighbour_table(embeddings, names, NEIGHBOURS), torch.nn.functional.normalize(embeddings, dim=1)
    store = TokenSpace(teacher.tokenizer, table, embeddings, None, 128).tokenize(
        load_domain("movies").train.inputs[:2000]
    )
    ids = torch.from_numpy(store.ids[store.slots != FROZEN])
    ids = ids[table.word_start[ids]]
    rng = torch.Generator().manual_seed(seed)
    count, rounds = (64, 1) if smoke else (512, 3)
    own, other = ids[torch.randperm(len(ids), generator=rng)[: 2 * count]].view(2, count)
    weight = torch.rand(count, 1, generator=rng)
    directions = torch.nn.functional.normalize(torch.randn(count, rows.shape[1], generator=rng), dim=1)
    step = float((rows[own, None] - rows[table.ids[own].long()]).norm(dim=2).median())
    eligible = (table.allowed & table.word_start).repeat(count, 1)
    eligible[torch.arange(count), own] = False
    interpolated, moved = weight * rows[own] + (1 - weight) * rows[other], rows[own] + step * directions
    any_row = torch.ones_like(eligible)
    measured = {
        "mix": _compare(
            lambda: torch.where(weight[:, 0] < 0.5, other, own),
            lambda: exhaustive_projection(interpolated, rows, any_row),
            rounds,
        ),
        "fgsm": _compare(
            lambda: steepest_neighbours(own, directions, table.ids, rows),
            lambda: exhaustive_projection(moved, rows, eligible),
            rounds,
        ),
    }
    nearest = exhaustive_projection(moved, rows, eligible)
    measured["fgsm"] |= {
        "directions": f"drawn at random; steps of {step:.3f}, the median way to a neighbour",
        "nearest_row_is_in_the_table": float((table.ids[own] == nearest[:, None]).any(dim=1).float().mean()),
        "note": "the table's winner has the largest first-order gain, the exhaustive search also prizes nearness",
    }
    facts = {"tokens": count, "rows": len(rows), "neighbours": NEIGHBOURS, "search_for_the_table_seconds": one_off}
    return {
        "projection_speedup": {
            "value": float(measured["fgsm"]["speedup"]), "target": 100, **facts, "by_projection": measured,
        }
    }  # fmt: skip


def exhaustive_projection(points: Tensor, rows: Tensor, eligible: Tensor) -> Tensor:
    """Find the nearest eligible row for every point by looking at all rows: the slow reference."""
    return torch.cdist(points, rows).masked_fill(~eligible, torch.inf).argmin(dim=1)


def _compare(fast: Callable[[], Tensor], exhaustive: Callable[[], Tensor], rounds: int) -> dict[str, Any]:
    found, fast_seconds = _best_time(fast, 10 * rounds)
    nearest, slow_seconds = _best_time(exhaustive, rounds)
    return {
        "tokens_per_second": len(found) / fast_seconds,
        "exhaustive_tokens_per_second": len(found) / slow_seconds,
        "speedup": slow_seconds / fast_seconds,
        "agreement": float((found == nearest).float().mean()),
    }


def _best_time(work: Callable[[], Tensor], rounds: int) -> tuple[Tensor, float]:
    result, seconds = work(), []
    for _ in range(rounds):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return result, float(np.min(seconds))
