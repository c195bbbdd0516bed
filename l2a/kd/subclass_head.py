"""The student's training head over subclasses, and how it becomes an ordinary output layer again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from l2a.kd.lelp import owners


def subclass_head(output: nn.Linear, counts: Sequence[int]) -> nn.Linear:
    """Make the training head: every subclass starts as its class, so that folding gives the output layer exactly.

    Args:
        output: The student's output layer, (h) -> (C).
        counts: S_c for each class.

    Returns:
        (h) -> (K), on the same device.
    """
    owner = torch.from_numpy(owners(counts)).to(output.weight.device)
    sizes = torch.tensor(counts, dtype=output.weight.dtype, device=output.weight.device)
    head = nn.Linear(output.in_features, len(owner)).to(output.weight.device)
    with torch.no_grad():
        head.weight.copy_(output.weight[owner])
        head.bias.copy_((output.bias - sizes.log())[owner])
    return head


def fold(subclass_logits: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Sum the subclasses' probabilities: z_c = logsumexp_s z(c, s), so that softmax(z)_c = sum_s p(c, s).

    Args:
        subclass_logits: float32 (B, K).
        counts: S_c for each class.

    Returns:
        float32 (B, C).
    """
    return torch.stack([part.logsumexp(dim=1) for part in torch.split(subclass_logits, list(counts), dim=1)], dim=1)


def subclass_loss(
    features: torch.Tensor,
    head: nn.Linear,
    output: nn.Linear,
    targets: torch.Tensor,
    counts: Sequence[int],
) -> torch.Tensor:
    """-sum t(c, s) log p(c, s), and a term that teaches the output layer alone what the head says of the classes.

    The second term is the cross-entropy of output(features) against the folded head, with the gradient stopped at
    both; the body never feels it, and the student is an ordinary C-class model at every step (our derivation).

    Args:
        features: float32 (B, h), what the student's output layer reads.
        head: The training head, (h) -> (K).
        output: The student's output layer, (h) -> (C).
        targets: float32 (B, K).
        counts: S_c for each class.

    Returns:
        float32 (), mean over the B examples.
    """
    logits = head(features)
    followed = functional.linear(features.detach(), output.weight, output.bias)
    classes = fold(logits.detach(), counts).softmax(dim=1)
    return functional.cross_entropy(logits, targets) + functional.cross_entropy(followed, classes)


@dataclass(frozen=True)
class FoldParity:
    """How well an output layer of C classes stands in for a head of subclasses.

    Attributes:
        agreement: Share of texts with the same most probable class.
        probability_difference: Mean absolute difference of the class probabilities.
    """

    agreement: float
    probability_difference: float


def fold_parity(class_logits: torch.Tensor, folded_logits: torch.Tensor) -> FoldParity:
    """Compare an output layer with the folded head.

    Args:
        class_logits: float (N, C).
        folded_logits: float (N, C).

    Returns:
        The parity on these texts.
    """
    agreement = (class_logits.argmax(dim=1) == folded_logits.argmax(dim=1)).double().mean()
    difference = (class_logits.softmax(dim=1) - folded_logits.softmax(dim=1)).abs().mean()
    return FoldParity(agreement.item(), difference.item())


def refit_output_layer(
    output: nn.Linear, head: nn.Linear, counts: Sequence[int], features: NDArray[np.float32]
) -> FoldParity:
    """Fit the output layer to the folded head on fixed features; logsumexp is not linear, so it is a best fit.

    The cross-entropy against the folded probabilities is convex in the layer: L-BFGS from where it stands.

    Args:
        output: (h) -> (C), changed in place.
        head: (h) -> (K), the trained head.
        counts: S_c for each class.
        features: float32 (N, h), of training texts.

    Returns:
        The parity on these texts.
    """
    inputs = torch.from_numpy(features).double()
    weight, bias = (p.detach().cpu().double().requires_grad_() for p in (output.weight, output.bias))
    with torch.no_grad():
        folded = fold(functional.linear(inputs, head.weight.cpu().double(), head.bias.cpu().double()), counts)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(functional.linear(inputs, weight, bias), folded.softmax(dim=1))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        output.weight.copy_(weight)
        output.bias.copy_(bias)
        return fold_parity(functional.linear(inputs, weight, bias), folded)
