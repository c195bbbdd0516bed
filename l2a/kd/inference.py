"""Runs a student over texts, and scores what it predicts."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax

from l2a.encoding import EncodedTexts, inference_batches
from l2a.students.student import Student

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
    training, device = student.model.training, student.output.weight.device
    student.model.eval()
    with torch.inference_mode():
        for indices in inference_batches(encoded):
            batch_logits, batch_features = student(encoded.padded(indices, device))
            logits[indices], features[indices] = batch_logits.cpu().numpy(), batch_features.cpu().numpy()
    student.model.train(training)
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
