"""The closed forms against the exhaustive nearest-neighbour search that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2a.generator import operators
from l2a.generator.tokens import NeighbourTable, find_neighbours, unit_rows

V, D = 300, 48


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def full_table(matrix: torch.Tensor) -> NeighbourTable:
    everything = torch.ones(V, dtype=torch.bool)
    return NeighbourTable(*find_neighbours(matrix, everything, everything, V - 1), everything, everything)


def draw(seed: int, count: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids, partners = torch.randint(0, V, (2, 1, count), generator=generator)
    return ids, partners, torch.zeros(1, count, dtype=torch.int8), torch.rand(1, count, 2, generator=generator)


def eligible_but(*excluded: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(len(excluded[0]), V, dtype=torch.bool)
    for ids in excluded:
        mask.scatter_(1, ids[:, None], False)
    return mask


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), degree=st.floats(0.05, 0.95))
def test_mix_is_the_nearest_row_to_the_interpolated_vector(matrix, seed, degree):
    ids, partners, slots, u = draw(seed)
    weight = operators.mix_weights(u, degree)[0][:, None]
    points = weight * matrix[ids[0]] + (1 - weight) * matrix[partners[0]]
    found = operators.mix_tokens(ids, slots, partners, u, degree)[0]
    ends = ~eligible_but(ids[0], partners[0])
    assert torch.equal(found, operators.exhaustive_projection(points, matrix, ends))
    nearest = operators.exhaustive_projection(points, matrix, torch.ones(64, V, dtype=torch.bool))
    assert (found == nearest).float().mean() > 0.9, "a third row should seldom be nearer than both ends"


@pytest.mark.parametrize("degree", [0.1, 0.3, 0.5, 1.0])
def test_the_weight_falls_below_a_half_with_the_degree_as_probability(degree):
    u = torch.rand(1, 20_000, 2, generator=torch.Generator().manual_seed(0))
    weights = operators.mix_weights(u, degree)
    assert ((weights >= 0) & (weights < 1)).all()
    assert float((weights < 0.5).float().mean()) == pytest.approx(degree, abs=0.01)


def test_between_is_the_nearest_third_row(matrix, full_table):
    ids, partners, slots, u = draw(5)
    weight = u[0, :, 1:]
    points = weight * unit_rows(matrix[ids[0]]) + (1 - weight) * unit_rows(matrix[partners[0]])
    nearest = operators.exhaustive_projection(points, unit_rows(matrix), eligible_but(ids[0], partners[0]))
    found = operators.mix_tokens_between(ids, slots, partners, u, 1.0, full_table, unit_rows(matrix))[0]
    assert torch.equal(found, nearest)


def test_fgsm_takes_the_neighbour_with_the_largest_first_order_gain(matrix, full_table):
    ids, _, slots, _ = draw(6)
    gradients = torch.randn(1, 64, D, generator=torch.Generator().manual_seed(1))
    few = NeighbourTable(full_table.ids[:, :5], full_table.distances[:, :5], *full_table_flags())
    found = operators.fgsm_replacements(ids, slots, gradients, few, matrix)[0]
    for place, token in enumerate(ids[0].tolist()):
        gains = {w: float((matrix[w] - matrix[token]) @ gradients[0, place]) for w in few.ids[token].tolist()}
        assert found[place] == max(gains, key=gains.__getitem__)


def test_fgsm_over_all_rows_is_a_long_step_projected_exhaustively(matrix, full_table):
    ids, _, slots, _ = draw(7)
    gradients = torch.nn.functional.normalize(torch.randn(1, 64, D, generator=torch.Generator().manual_seed(2)), dim=-1)
    rows = unit_rows(matrix)
    nearest = operators.exhaustive_projection(rows[ids[0]] + 1e3 * gradients[0], rows, eligible_but(ids[0]))
    assert torch.equal(operators.fgsm_replacements(ids, slots, gradients, full_table, rows)[0], nearest)


def full_table_flags() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(V, dtype=torch.bool), torch.ones(V, dtype=torch.bool)


def test_closed_slots_and_many_positions_at_once(matrix, full_table, monkeypatch):
    ids, _, slots, _ = draw(8)
    slots[0, ::2] = -1
    gradients = torch.randn(1, 64, D, generator=torch.Generator().manual_seed(4))
    whole = operators.fgsm_replacements(ids, slots, gradients, full_table, matrix)
    monkeypatch.setattr(operators, "POSITIONS_AT_ONCE", 7)
    assert torch.equal(operators.fgsm_replacements(ids, slots, gradients, full_table, matrix), whole)
    assert torch.equal(whole[0, ::2], ids[0, ::2])
