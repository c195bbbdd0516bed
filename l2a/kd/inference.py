"""Runs a student over texts, and scores what it predicts."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import nn

from l2a.data.encoding import EncodedTexts, encode, inference_batches
from l2a.data.examples import TextInput
from l2a.kd.data import DistillationSet
from l2a.kd.losses import soft_label_loss
from l2a.student.student import Student
from l2a.teacher.labelling import Labeller
from l2a.util.training import broadcast_weights, evaluating, process_rank

CALIBRATION_TEMPERATURES = np.geomspace(0.25, 16.0, 25)


def run_student(student: Student, encoded: EncodedTexts) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run the student over texts, in eval mode; its mode is restored after.

    Args:
        student: Any student.
        encoded: N texts in its tokens.

    Returns:
        Logits, float32 (N, C), and output-layer features, float32 (N, h).
    """
    logits = np.zeros((len(encoded), student.output.out_features), np.float32)
    features = np.zeros((len(encoded), student.output.in_features), np.float32)
    device = student.output.weight.device
    with evaluating(student.model), torch.inference_mode():
        for indices in inference_batches(encoded):
            batch_logits, batch_features = student(encoded.padded(indices, device))
            logits[indices], features[indices] = batch_logits.cpu().numpy(), batch_features.cpu().numpy()
    return logits, features


def calibrated_log_likelihood(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Mean log-probability of the right class at the temperature that suits the logits best.

    A student of a confident teacher grows confident too; without the temperature the score would prefer states that
    are hardly trained over ones that rank better (temperature scaling: Guo et al., 2017).

    Args:
        logits: float32 (N, C).
        labels: int64 (N,).

    Returns:
        A number of nats, at most 0.
    """
    scaled = logits[None].astype(np.float64) / CALIBRATION_TEMPERATURES[:, None, None]
    log_probabilities = log_softmax(scaled, axis=2)
    return float(log_probabilities[:, np.arange(len(labels)), labels].mean(axis=1).max())


HEAD_UPDATES = 300


def fit_output_layer(student: Student, data: DistillationSet) -> None:
    """Fit the output layer on frozen features and soft labels, before the body is trained.

    Full-batch Adam on the cross-entropy. Training the head first keeps a pretrained body from being distorted (Kumar et
    al., 2022, "LP-FT"). Of several processes the first fits it, and all take what it found.

    Args:
        student: Changed in place.
        data: Texts with teacher outputs.
    """
    layer = student.output
    if process_rank() == 0:
        inputs, goals = (
            torch.from_numpy(part) for part in (run_student(student, data.encoded)[1], data.teacher.probabilities())
        )
        weight = torch.zeros(layer.weight.shape, requires_grad=True)
        bias = torch.zeros(layer.bias.shape, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=0.05)
        for _ in range(HEAD_UPDATES):
            loss = nn.functional.cross_entropy(inputs @ weight.T + bias, goals) + 1e-3 * weight.pow(2).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    broadcast_weights([layer.weight, layer.bias])


def embedding_gradients(
    student: Student, labeller: Labeller, inputs: Sequence[TextInput], max_length: int
) -> list[NDArray[np.float32]]:
    """Differentiate KL(p_T || p_S) by each token's embedding: one forward and one backward pass.

    Args:
        student: In any mode; it is differentiated in eval mode.
        labeller: The teacher.
        inputs: N texts.
        max_length: Longest sequence in tokens.

    Returns:
        float32 (L_i, e) for each text, one row a token of the student, special ones included.
    """
    encoded, teacher_logits = encode(student.tokenizer, inputs, max_length), labeller(inputs).logits
    gradients: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(inputs)
    device, table = student.output.weight.device, student.model.get_input_embeddings()
    with evaluating(student.model):
        for indices in inference_batches(encoded):
            batch = encoded.padded(indices, device)
            embeds = table(batch.pop("input_ids")).detach().requires_grad_(True)
            logits, _ = student({**batch, "inputs_embeds": embeds})
            losses = soft_label_loss(logits, torch.from_numpy(teacher_logits[indices]).to(device), 1.0, "none")
            # The sum, not the mean, so that a text's gradient does not depend on its batch.
            (gradient,) = torch.autograd.grad(losses.sum(), embeds)
            for row, index in enumerate(indices):
                gradients[index] = gradient[row, : encoded.lengths[index]].cpu().numpy()
    return gradients
