"""The projection by the table of neighbours against the nearest of all rows, on the same tokens."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2a.data.domains import load_domain
from l2a.generator import operators
from l2a.generator.tokens import (
    FROZEN,
    build_neighbour_table,
    find_neighbours,
    token_kinds,
    tokenize_corpus,
    unit_rows,
    vocabulary,
)
from l2a.teacher.load import load_encoder

NEIGHBOURS = 16


def measure_projection(seed: int, smoke: bool) -> dict[str, Any]:
    """Measure the closed form and both table-based projections on open tokens of the shipped domain "movies".

    Args:
        seed: Draws tokens, partners, weights and directions.
        smoke: Fewer tokens, one round.

    Returns:
        For each its speed, that of the exhaustive search, and how often they agree; in front the lower ratio of the
        two by the table.
    """
    teacher = load_encoder("minilm-l6", ("text",), 0)
    names = vocabulary(teacher.tokenizer)
    embeddings = teacher.word_embeddings().cpu()[: len(names)]
    started = time.perf_counter()
    find_neighbours(embeddings, *token_kinds(names), NEIGHBOURS) if not smoke else None
    one_off = time.perf_counter() - started
    table, rows = build_neighbour_table(embeddings, names, NEIGHBOURS), unit_rows(embeddings)
    corpus = tokenize_corpus(load_domain("movies").train.inputs[:2000], teacher.tokenizer, 128, table)
    ids = corpus.ids[corpus.slots != FROZEN]
    ids = ids[table.word_start[ids]]
    rng = torch.Generator().manual_seed(seed)
    count, rounds = (64, 1) if smoke else (512, 3)
    own, other = ids[torch.randperm(len(ids), generator=rng)[: 2 * count]].view(2, count)
    u = torch.rand(1, count, 2, generator=rng)
    slots = torch.zeros(1, count, dtype=torch.int8)
    directions = torch.nn.functional.normalize(torch.randn(count, rows.shape[1], generator=rng), dim=1)
    step = float(table.distances[own].median())

    def between() -> Tensor:
        return operators.mix_tokens_between(own[None], slots, other[None], u, 1.0, table, rows)[0]

    def fgsm() -> Tensor:
        return operators.fgsm_replacements(own[None], slots, directions[None], table, rows)[0]

    def mix() -> Tensor:
        return operators.mix_tokens(own[None], slots, other[None], u, 0.5)[0]

    share = operators.mix_weights(u, 0.5)[0][:, None]
    weight = u[0, :, 1:]
    midpoints = weight * rows[own] + (1 - weight) * rows[other]
    eligible = (table.allowed & table.word_start).repeat(count, 1)
    eligible[torch.arange(count), own] = False
    not_ends = eligible.clone()
    not_ends[torch.arange(count), other] = False
    interpolated = share * rows[own] + (1 - share) * rows[other]
    any_row = torch.ones_like(eligible)
    measured = {
        "mix": _compare(mix, lambda: operators.exhaustive_projection(interpolated, rows, any_row), rounds),
        "mix_between": _compare(between, lambda: operators.exhaustive_projection(midpoints, rows, not_ends), rounds),
        "fgsm": _compare(
            fgsm, lambda: operators.exhaustive_projection(rows[own] + step * directions, rows, eligible), rounds
        ),
    }
    nearest = operators.exhaustive_projection(rows[own] + step * directions, rows, eligible)
    measured["fgsm"] |= {
        "directions": f"drawn at random; steps of {step:.3f}, the median way to a neighbour",
        "nearest_row_is_in_the_table": float((table.ids[own] == nearest[:, None]).any(dim=1).float().mean()),
        "note": "the table's winner has the largest first-order gain, the exhaustive search also prizes nearness",
    }
    speedup = min(float(measured[name]["speedup"]) for name in ("mix_between", "fgsm"))
    facts = {"tokens": count, "rows": len(rows), "neighbours": NEIGHBOURS, "search_for_the_table_seconds": one_off}
    return {"projection_speedup": {"value": speedup, "target": 100, **facts, "by_projection": measured}}


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
