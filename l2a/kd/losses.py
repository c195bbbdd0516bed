"""Distillation losses, one for each example, and LELP's pseudo-subclasses.

LELP splits each class along directions of the teacher's embedding that its head ignores. Source: Loo et al. (2024),
"Linear projections of teacher embeddings for few-class distillation", arXiv 2409.20449. The outline (null space of the
output weights, PCA in each class, random rotation, tempered softmax times the class probability, one cross-entropy) is
the paper's as others report it; the exact formulas below are our derivation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg, special
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from l2a.data import Doubles, Floats, Ints
from l2a.teacher.labelling import TeacherOutputs
from l2a.teacher.model import Teacher


def soft_label_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(z_T / T) || softmax(z_S / T)), so that the gradient's size hardly depends on T.

    It is float32 (B,), 0 iff both are equal. Source: Hinton, Vinyals and Dean (2015), equation 4 and the remark on T^2.

    Args:
        student_logits: float32 (B, C).
        teacher_logits: float32 (B, C).
        temperature: T, above 0.
    """
    student = nn.functional.log_softmax(student_logits / temperature, dim=1)
    teacher = nn.functional.log_softmax(teacher_logits / temperature, dim=1)
    return nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Soft labels everywhere, cross-entropy where a real label exists: float32 (B,).

    L_i = alpha T^2 KL_i + (1 - alpha) CE_i with a real label, L_i = T^2 KL_i without one. Source: Hinton et al. (2015),
    section 2; which texts have a real label is ours.

    Args:
        student_logits: float32 (B, C).
        teacher_logits: float32 (B, C).
        labels: int64 (B,), -1 where only the teacher's label exists (augmented text).
        temperature: T, above 0.
        alpha: Weight of the soft-label term, 0 to 1.
    """
    soft = soft_label_loss(student_logits, teacher_logits, temperature)
    hard = nn.functional.cross_entropy(student_logits, labels.clamp(min=0), reduction="none")
    real = (labels >= 0).to(soft.dtype)
    return soft * (1 - real * (1 - alpha)) + hard * real * (1 - alpha)


def hidden_state_loss(student_states: Tensor, teacher_states: Tensor, projection: Tensor) -> Tensor:
    """Squared distance of projected student states to teacher states, both on the unit sphere: float32 (B,), 0 to 4.

    Source: the hidden-state loss of TinyBERT (Jiao et al., 2020, equation 8) on pooled states; the normalisation,
    which makes the weight independent of the teacher's scale, is our own.

    Args:
        student_states: float32 (B, h).
        teacher_states: float32 (B, d).
        projection: float32 (h, d), learned and dropped on export.
    """
    projected = nn.functional.normalize(student_states @ projection, dim=1)
    return (projected - nn.functional.normalize(teacher_states, dim=1)).pow(2).sum(1)


def subclass_loss(
    features: Tensor, head: nn.Linear, output: nn.Linear, targets: Tensor, counts: tuple[int, ...]
) -> Tensor:
    """-sum t(c, s) log p(c, s), and a term that teaches the output layer alone what the head says of the classes.

    The second term is KL(folded head || output(features)) with the gradient stopped at both; the body never feels it,
    and the student is an ordinary C-class model at every step (our derivation). The loss is float32 (B,).

    Args:
        features: float32 (B, h), what the student's output layer reads.
        head: The training head, (h) -> (K).
        output: The student's output layer, (h) -> (C).
        targets: float32 (B, K).
        counts: S_c for each class.
    """
    logits = head(features)
    followed = nn.functional.linear(features.detach(), output.weight, output.bias)
    classes = fold(logits.detach(), counts).softmax(dim=1)
    first = nn.functional.cross_entropy(logits, targets, reduction="none")
    second = nn.functional.cross_entropy(followed, classes, reduction="none")
    # Less the entropy of the folded head, which has no gradient here: the term is 0 where the layer follows the head.
    return first.add(second).sub(torch.special.entr(classes).sum(1))


def fold(subclass_logits: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Sum the subclasses' probabilities: z_c = logsumexp_s z(c, s), so that softmax(z)_c = sum_s p(c, s).

    Logits of K subclasses, float32 (B, K), S_c = ``counts[c]`` of class c, become those of C classes, float32 (B, C).
    """
    return torch.stack([part.logsumexp(dim=1) for part in torch.split(subclass_logits, list(counts), dim=1)], dim=1)


TEXTS_PER_SUBCLASS = 4
# Texts of a class, at most, that its directions are fitted on; memory then does not grow with the data.
FIT_TEXTS = 20_000


@dataclass(frozen=True)
class LELPSubclasses:
    """Directions that split C classes into K = S_1 + ... + S_C subclasses.

    Attributes:
        counts: S_c for each class; class c has the columns that follow those of the classes before it.
        means: float64 (C, d), mu_c, the mean embedding of the texts that the teacher puts in class c.
        directions: float64 (d, K), columns U, orthogonal to all output weights and orthonormal in a class (unless the
            class has fewer dimensions than subclasses).
        rms: float64 (C,), root mean square of U_c'(h - mu_c) over the texts of class c and its directions.
    """

    counts: tuple[int, ...]
    means: Doubles
    directions: Doubles
    rms: Doubles

    def scores(self, embeddings: Floats) -> Doubles:
        """Place texts along the directions: r = U_c'(h - mu_c) / rms_c, where U_c'P = U_c' spares the projection.

        The embeddings are float32 (N, d), the scores float64 (N, K).
        """
        owner = owners(self.counts)
        centres = (self.means[owner] * self.directions.T).sum(axis=1)
        return np.asarray((embeddings @ self.directions - centres) / self.rms[owner])


def teacher_output_weight(teacher: Teacher, outputs: TeacherOutputs) -> Doubles:
    """Read the weight that turns embeddings into logits, float64 (C, d).

    A teacher with a head of its own inside may read another state than the mean-pooled one; the linear map that best
    fits its logits of N texts, in ``outputs``, then stands in for the weight.
    """
    if teacher.head is not None:
        return np.asarray(teacher.head.weight.detach().cpu(), np.float64)
    few = outputs.take(_thinned(np.arange(len(outputs))))
    centred = few.embeddings - few.embeddings.mean(axis=0, dtype=np.float64)
    return np.asarray(linalg.lstsq(centred, few.logits - few.logits.mean(axis=0))[0].T)


def fit_subclasses(
    outputs: TeacherOutputs, output_weight: Doubles, objective: str, count: int, rng: np.random.Generator
) -> LELPSubclasses:
    """Fit the subclasses on texts that the teacher has embedded; classes are the teacher's own decisions.

    With P the projection onto the null space of W and X_c = {P(h - mu_c)}, U_c is the top-S_c right singular vectors
    of X_c times a random orthonormal Q, so that the directions have equal variance in expectation. "Random directions"
    draws U_c uniformly in the null space instead; the sizes are the same for both.

    Args:
        outputs: The teacher's outputs for N texts.
        output_weight: float64 (C, d), W.
        objective: "lelp" or its control "lelp_random_directions".
        count: S; S_c is at most a quarter of the texts of class c and the width of the null space, and at least 1.
        rng: Draws Q or the random directions.
    """
    seen = linalg.orth(output_weight.T)  # (d, rank)
    assigned = outputs.logits.argmax(axis=1)
    sizes = np.bincount(assigned, minlength=outputs.logits.shape[1]) // TEXTS_PER_SUBCLASS
    counts = tuple(int(size) for size in np.clip(sizes, 1, max(1, min(count, len(seen) - seen.shape[1]))))
    rows = [outputs.take(_thinned(np.flatnonzero(assigned == c))).embeddings for c in range(len(counts))]
    with threadpool_limits(limits=1, user_api="blas"):  # small problems: more threads only get in the way
        fits = [_fit_class(part, seen, size, objective, rng) for part, size in zip(rows, counts, strict=True)]
    means, directions, rms = zip(*fits, strict=True)
    return LELPSubclasses(counts, np.stack(means), np.concatenate(directions, axis=1), np.array(rms))


def _fit_class(
    rows: Floats, seen: Doubles, count: int, objective: str, rng: np.random.Generator
) -> tuple[Doubles, Doubles, float]:
    width = len(seen)
    mean: Doubles = rows.mean(axis=0, dtype=np.float64) if len(rows) else np.zeros(width)
    unseen = rows - mean
    unseen -= (unseen @ seen) @ seen.T
    if objective == "lelp_random_directions":
        drawn = rng.standard_normal((width, count))
        directions = linalg.qr(drawn - seen @ (seen.T @ drawn), mode="economic")[0]
    else:
        _, vectors = linalg.eigh(unseen.T @ unseen, subset_by_index=[width - count, width - 1])
        orthonormal, triangular = linalg.qr(rng.standard_normal((count, count)))
        directions = vectors @ (orthonormal * np.where(np.diag(triangular) < 0, -1.0, 1.0))  # uniform (Mezzadri, 2007)
        directions -= seen @ (seen.T @ directions)  # a class of rank below S_c has directions outside the null space
    rms = float(np.sqrt(np.mean((unseen @ directions) ** 2))) if len(rows) else 1.0
    return mean, directions, max(rms, 1e-6)


def _thinned(indices: Ints) -> Ints:
    return indices[:: max(1, -(-len(indices) // FIT_TEXTS))]


def owners(counts: tuple[int, ...]) -> Ints:
    """Name the class, 0 to C - 1, of each of K subclasses, int64 (K,); class c has S_c = ``counts[c]`` of them."""
    return np.repeat(np.arange(len(counts)), counts)


def subclass_targets(
    subclasses: LELPSubclasses, outputs: TeacherOutputs, temperature: float, subclass_temperature: float
) -> Floats:
    """Soft labels over subclasses: t(c, s) = softmax(z_T / tau)_c softmax(r_c / beta)_s, for any text.

    ``temperature`` is tau, ``subclass_temperature`` beta, both above 0; the higher beta, the more even the split. For N
    texts the labels are float32 (N, K): rows sum to 1, and the sum over a class's columns is its tempered probability.
    """
    scaled = subclasses.scores(outputs.embeddings) / subclass_temperature
    parts = np.split(scaled, np.cumsum(subclasses.counts)[:-1], axis=1)
    inside = np.concatenate([special.softmax(part, axis=1) for part in parts], axis=1)
    return (inside * outputs.probabilities(temperature)[:, owners(subclasses.counts)]).astype(np.float32)


def subclass_head(output: nn.Linear, counts: tuple[int, ...]) -> nn.Linear:
    """Make the training head: every subclass starts as its class, so that folding gives the output layer exactly.

    It is (h) -> (K), with ``counts[c]`` = S_c subclasses of class c, on the device of the output layer, (h) -> (C).
    """
    owner = torch.from_numpy(owners(counts)).to(output.weight.device)
    head = nn.Linear(output.in_features, len(owner)).to(output.weight.device)
    bias = output.bias - output.bias.new_tensor(counts).log()
    head.load_state_dict({"weight": output.weight[owner], "bias": bias[owner]})
    return head


def fold_parity(class_logits: Tensor, folded_logits: Tensor) -> dict[str, float]:
    """Compare an output layer with the folded head, both float (N, C).

    Returns:
        "agreement", the share of texts with the same most probable class, and "probability_difference", the mean
        absolute difference of the class probabilities.
    """
    agreement = (class_logits.argmax(dim=1) == folded_logits.argmax(dim=1)).double().mean()
    difference = (class_logits.softmax(dim=1) - folded_logits.softmax(dim=1)).abs().mean()
    return {"agreement": agreement.item(), "probability_difference": difference.item()}


def refit_output_layer(
    output: nn.Linear, head: nn.Linear, counts: tuple[int, ...], features: Floats
) -> dict[str, float]:
    """Fit the output layer to the folded head on fixed features; logsumexp is not linear, so it is a best fit.

    The cross-entropy against the folded probabilities is convex in the layer: L-BFGS from where it stands. What comes
    back is the ``fold_parity`` on the given texts.

    Args:
        output: (h) -> (C), changed in place.
        head: (h) -> (K), the trained head.
        counts: S_c for each class.
        features: float32 (N, h), of training texts.
    """
    inputs = torch.from_numpy(features).double()
    weight, bias = (p.detach().cpu().double().requires_grad_() for p in (output.weight, output.bias))
    with torch.no_grad():
        folded = fold(nn.functional.linear(inputs, head.weight.cpu().double(), head.bias.cpu().double()), counts)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(nn.functional.linear(inputs, weight, bias), folded.softmax(dim=1))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    output.load_state_dict({"weight": weight, "bias": bias})
    return fold_parity(nn.functional.linear(inputs, weight, bias), folded)
