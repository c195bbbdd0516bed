"""Knowledge distillation: trains the student on cached teacher outputs and keeps its best state."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import nn

from l2a.encoding import EncodedTexts, encode, inference_batches
from l2a.errors import RunError
from l2a.examples import Examples
from l2a.kd.config import KDConfig
from l2a.kd.data import DistillationSet, join, mixture_batches, refuse_constant_targets
from l2a.kd.losses import distillation_loss, hidden_state_loss
from l2a.optimisation import adamw, linear_schedule
from l2a.progress import SILENT, Progress
from l2a.students.student import Student

CALIBRATION_TEMPERATURES = np.geomspace(0.25, 16.0, 25)


class KDTrainer:
    """One student's training over several calls, with one optimiser, one schedule and one best state.

    Attributes:
        student: Trained in place; in eval mode between calls.
        steps_done: Updates so far.
        best_score: Calibrated log-likelihood of the best state on the model-choice split.
    """

    def __init__(
        self, student: Student, config: KDConfig, choice: Examples, teacher_width: int, max_length: int, seed: int
    ) -> None:
        """Prepare the optimiser.

        Args:
            student: The student.
            config: Loss, rates and budget; the schedule spans ``config.total_steps``.
            choice: The split that chooses the model; it is never trained on.
            teacher_width: d of the teacher's embeddings.
            max_length: Longest sequence in tokens.
            seed: Order of the data and dropout.
        """
        self.student = student
        self.steps_done = 0
        self.best_score = -np.inf
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._choice = (encode(student.tokenizer, choice.inputs, max_length), choice.labels)
        generator = torch.Generator().manual_seed(seed)
        width = student.output.in_features
        start = torch.randn(width, teacher_width, generator=generator) / width**0.5
        self._projection = nn.Parameter(start.to(self._device))
        parameters = [*student.model.parameters(), self._projection]
        self._optimizer = adamw([(parameters, config.learning_rate)])
        self._schedule = linear_schedule(self._optimizer, config.total_steps)
        self._best: dict[str, torch.Tensor] = {}

    def train(
        self,
        sets: Sequence[DistillationSet],
        shares: Sequence[float],
        steps: int,
        progress: Progress = SILENT,
        stage: str = "distil",
    ) -> None:
        """Update the student on a mixture of sets.

        Args:
            sets: Texts with teacher outputs, each in the student's tokens.
            shares: Share that each set contributes to every 16 batches.
            steps: Updates to make.
            progress: Shows the steps; gets the score of every look at the model-choice split.
            stage: Name shown to the user.

        Raises:
            RunError: If the teacher's outputs are constant or the loss is not finite.
        """
        data = join(sets)
        refuse_constant_targets(data)
        sizes = [len(part) for part in sets]
        batches = mixture_batches(sizes, shares, data.encoded.lengths, self._config.batch_size, steps, self._rng)
        with torch.random.fork_rng(devices=[]), progress.stage(stage, steps) as advance:
            torch.manual_seed(self._seed + self.steps_done)  # dropout, the same wherever the call starts
            self.student.model.train()
            for indices in batches:
                self._step(data, indices)
                advance(1)
                if self.steps_done % self._config.evaluate_every == 0:
                    self.look(progress)
        if self.steps_done % self._config.evaluate_every:
            self.look(progress)
        self.student.model.eval()

    def _step(self, data: DistillationSet, indices: NDArray[np.int64]) -> None:
        batch = _to_device(data.encoded.padded(indices), self._device)
        logits, features = self.student(batch)
        teacher_logits = torch.from_numpy(data.teacher.logits[indices]).to(self._device)
        labels = torch.from_numpy(data.labels[indices]).to(self._device)
        loss = distillation_loss(logits, teacher_logits, labels, self._config.temperature, self._config.alpha)
        if self._config.hidden_weight:
            states = torch.from_numpy(data.teacher.embeddings[indices]).to(self._device)
            loss = loss + self._config.hidden_weight * hidden_state_loss(features, states, self._projection)
        if not torch.isfinite(loss):
            raise RunError(f"kd: the loss is {loss.item()} at step {self.steps_done}; lower kd.learning_rate")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.student.model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.steps_done += 1

    def look(self, progress: Progress = SILENT) -> float:
        """Score the student on the model-choice split and keep its state if it is the best so far.

        Args:
            progress: Gets the score.

        Returns:
            Calibrated log-likelihood.
        """
        encoded, labels = self._choice
        logits, _ = run_student(self.student, encoded)
        score = calibrated_log_likelihood(logits, labels)
        progress.event("model_choice", step=self.steps_done, log_likelihood=score)
        if score > self.best_score:
            self.best_score, self._best = score, self.student.snapshot()
        return score

    def restore_best(self) -> None:
        """Load the state that scored best on the model-choice split."""
        if self._best:
            self.student.restore(self._best)

    @property
    def _device(self) -> torch.device:
        return self.student.output.weight.device


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
            batch_logits, batch_features = student(_to_device(encoded.padded(indices), device))
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


def fit_head(
    features: NDArray[np.float32], targets: NDArray[np.float32], steps: int = 300
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fit a linear head on fixed features and soft labels by full-batch Adam on the cross-entropy.

    Args:
        features: float32 (N, h).
        targets: float32 (N, C), class probabilities.
        steps: Updates.

    Returns:
        Weight, float32 (C, h), and bias, float32 (C,).
    """
    inputs, goals = torch.from_numpy(features), torch.from_numpy(targets)
    weight = torch.zeros(goals.shape[1], inputs.shape[1], requires_grad=True)
    bias = torch.zeros(goals.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(inputs @ weight.T + bias, goals) + 1e-3 * weight.pow(2).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weight.detach().numpy(), bias.detach().numpy()


def fit_output_layer(student: Student, data: DistillationSet) -> None:
    """Fit the output layer on frozen features and soft labels, before the body is trained.

    Training the head first keeps a pretrained body from being distorted (Kumar et al., 2022, "LP-FT").

    Args:
        student: Changed in place.
        data: Texts with teacher outputs.
    """
    weight, bias = fit_head(run_student(student, data.encoded)[1], data.teacher.probabilities())
    with torch.no_grad():
        student.output.weight.copy_(torch.from_numpy(weight))
        student.output.bias.copy_(torch.from_numpy(bias))


def _to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
