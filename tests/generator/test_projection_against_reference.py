"""The closed forms against the exhaustive nearest-neighbour search that they stand for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from l2a.generator import tokens as operators
from l2a.generator.tokens import NeighbourTable, Slots, find_neighbours

V, D, COUNT = 300, 48, 64
EVERYTHING = torch.ones(V, dtype=torch.bool)


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def full_table(matrix: torch.Tensor) -> NeighbourTable:
    return NeighbourTable(find_neighbours(matrix, EVERYTHING, EVERYTHING, V - 1), EVERYTHING, EVERYTHING)


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, partners = torch.randint(0, V, (2, COUNT), generator=generator)
    return ids, partners


def exhaustive(points: torch.Tensor, rows: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(points, rows)
    return distances.scatter(1, excluded[:, None], torch.inf).argmin(dim=1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), degree=st.floats(0.05, 0.95))
def test_mix_is_the_nearest_row_to_the_interpolated_vector(matrix, seed, degree):
    """lambda, the weight of the own token, falls below a half with the degree as probability."""
    ids, partners = draw(seed)
    decide = torch.rand(COUNT, generator=torch.Generator().manual_seed(seed + 1))
    weight = torch.where(decide < degree, decide / (2 * degree), 0.5 + (decide - degree) / (2 * (1 - degree)))[:, None]
    nearest = torch.cdist(weight * matrix[ids] + (1 - weight) * matrix[partners], matrix).argmin(dim=1)
    found = torch.where(decide < degree, partners, ids)
    ends = torch.stack([ids, partners], dim=1)
    points = weight * matrix[ids] + (1 - weight) * matrix[partners]
    to_ends = (points[:, None] - matrix[ends]).norm(dim=2).argmin(dim=1)
    assert torch.equal(found, ends.gather(1, to_ends[:, None])[:, 0])
    assert (found == nearest).float().mean() > 0.9, "a third row should seldom be nearer than both ends"


def test_fgsm_takes_the_neighbour_with_the_largest_first_order_gain(matrix, full_table):
    ids, _ = draw(6)
    gradients = torch.randn(COUNT, D, generator=torch.Generator().manual_seed(1))
    few = NeighbourTable(full_table.ids[:, :5], EVERYTHING, EVERYTHING)
    found = operators.steepest_neighbours(ids, gradients, few.ids, matrix)
    for place, token in enumerate(ids.tolist()):
        gains = {w: float((matrix[w] - matrix[token]) @ gradients[place]) for w in few.ids[token].tolist()}
        assert found[place] == max(gains, key=gains.__getitem__)


def test_fgsm_over_all_rows_is_a_long_step_projected_exhaustively(matrix, full_table, monkeypatch):
    ids, _ = draw(7)
    gradients = torch.nn.functional.normalize(torch.randn(COUNT, D, generator=torch.Generator().manual_seed(2)), dim=-1)
    rows = torch.nn.functional.normalize(matrix, dim=-1)
    nearest = exhaustive(rows[ids] + 1e3 * gradients, rows, ids)
    assert torch.equal(operators.steepest_neighbours(ids, gradients, full_table.ids, rows), nearest)
    monkeypatch.setattr(operators, "POSITIONS_AT_ONCE", 7)
    assert torch.equal(operators.steepest_neighbours(ids, gradients, full_table.ids, rows), nearest)


def test_knn_draws_each_neighbour_alike(full_table):
    few = NeighbourTable(full_table.ids[:, :4], EVERYTHING, EVERYTHING)
    places = np.arange(COUNT).repeat(400)
    choice = np.random.default_rng(0).random(len(places), dtype=np.float32)
    store = SimpleNamespace(ids=draw(8)[0].numpy(), space=SimpleNamespace(neighbours=few))
    slots = Slots(store, places, places, places, places, choice)
    found = operators.knn(slots)
    ranks = (few.ids.numpy()[store.ids[places]] == found[:, None]).mean(axis=0)
    assert ranks == pytest.approx(0.25, abs=0.02) and ranks.sum() == 1
