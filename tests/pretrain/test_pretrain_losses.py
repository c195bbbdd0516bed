import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2a.pretrain.trainer import sentence_loss, similarity_loss, token_loss

SIZES = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))


def draw(count: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(count, width, generator=generator) for _ in range(2))
    return first, second


@given(SIZES)
@settings(max_examples=20, deadline=None)
def test_losses_are_zero_only_for_the_teachers_directions(sizes: tuple[int, int, int]) -> None:
    predicted, target = draw(*sizes)
    for loss in (sentence_loss, similarity_loss):
        assert loss(3.0 * target, target).item() < 1e-5
        assert loss(predicted, target).item() >= -1e-6
    assert sentence_loss(predicted, target).item() > 1e-4


def test_sentence_loss_equals_its_definition() -> None:
    predicted, target = draw(4, 3, 0)
    cosines = [float(p @ t / p.norm() / t.norm()) for p, t in zip(predicted, target, strict=True)]
    assert abs(sentence_loss(predicted, target).item() - sum(1 - c for c in cosines) / 4) < 1e-6


def test_similarity_loss_ignores_rotation_and_penalises_other_neighbours() -> None:
    predicted, target = draw(6, 4, 1)
    rotation, _ = torch.linalg.qr(draw(4, 4, 2)[0])
    assert similarity_loss(target @ rotation, target).item() < 1e-4
    assert similarity_loss(predicted, target).item() > 0.1


def test_similarity_loss_of_one_text_is_zero_with_a_gradient_path() -> None:
    predicted = torch.ones(1, 3, requires_grad=True)
    loss = similarity_loss(predicted, torch.ones(1, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert predicted.grad is not None


def test_token_loss_does_not_read_padding() -> None:
    predicted, target = (states.view(2, 3, 2) for states in draw(6, 2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = token_loss(predicted, target, mask)
    changed = torch.where(mask.bool().unsqueeze(-1), predicted, torch.full_like(predicted, 7.0))
    assert torch.equal(loss, token_loss(changed, target, mask))
    assert torch.allclose(loss, sentence_loss(predicted[mask.bool()], target[mask.bool()]))
