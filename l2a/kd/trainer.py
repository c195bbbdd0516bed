"""A running average of the student's weights: the state that is judged and kept, smoother than any single step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2a.config import KDConfig
from l2a.data.encoding import EncodedTexts, encode, inference_batches
from l2a.data.examples import Examples
from l2a.kd.attention import AttentionTransfer
from l2a.kd.data import (
    BatchReader,
    DistillationSet,
    Renewal,
    active_vocabulary,
    compact_embeddings,
    cycle,
    join,
    mixture_batches,
    read_tokens,
)
from l2a.kd.inference import calibrated_log_likelihood, run_student
from l2a.kd.lelp import FoldParity, Subclasses, refit_output_layer, subclass_head, subclass_loss, subclass_targets
from l2a.kd.losses import Reduction, distillation_loss, hidden_state_loss
from l2a.student.student import Student
from l2a.teacher.model import Teacher
from l2a.teacher.store import TeacherOutputs
from l2a.util.errors import RunError, UsageError
from l2a.util.progress import SILENT, Progress
from l2a.util.training import (
    adamw,
    adamw_update_derivative,
    broadcast,
    carry_second_moments,
    join_processes,
    linear_schedule,
    mixed_precision,
    process_count,
    process_rank,
    seeded,
    sum_gradients,
)


class WeightAverage:
    """Exponential moving average of trained parameters (Polyak and Juditsky, 1992).

    The decay grows from 2/11 at the first step to its final value, so that the untrained start is soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        """Start at the present weights.

        Args:
            parameters: Averaged; their values may change, their shapes not.
            decay: Weight of the past, 0 (no average) to below 1.
        """
        self._parameters = list(parameters)
        self._decay = decay
        self._steps = 0
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    def update(self) -> None:
        """Take the present weights in, after an optimiser step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the weights, and the weights back afterwards."""
        present = [parameter.detach().clone() for parameter in self._parameters]
        self._load(self._average)
        try:
            yield
        finally:
            self._load(present)

    def _load(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_([parameter.detach() for parameter in self._parameters], list(values))


class KDTrainer:
    """One student's training over several calls, with one optimiser, one schedule and one best state.

    Attributes:
        student: Trained in place; in eval mode between calls.
        steps_done: Updates so far.
        best_score: Calibrated log-likelihood of the best state on the validation split.
        read_batch: Reads the batches of the texts that are trained on.
    """

    def __init__(
        self, student: Student, config: KDConfig, validation: Examples, teacher_width: int, max_length: int, seed: int
    ) -> None:
        """Prepare the optimiser.

        Args:
            student: The student.
            config: Loss, rates and budget; the schedule spans ``config.total_steps``.
            validation: The split that chooses the model; it is never trained on.
            teacher_width: d of the teacher's embeddings.
            max_length: Longest sequence in tokens.
            seed: Order of the data and dropout.

        Raises:
            UsageError: If there are more processes than texts in a batch.
        """
        join_processes()
        if config.batch_size < process_count():
            raise UsageError(
                f"kd.batch_size: {config.batch_size} texts cannot be shared by {process_count()} processes; raise it"
            )
        if config.compile:
            student.model.compile()
        self.student = student
        self.steps_done = 0
        self.best_score = -np.inf
        self.read_batch: BatchReader = read_tokens
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._validation = (encode(student.tokenizer, validation.inputs, max_length), validation.labels)
        generator = torch.Generator().manual_seed(seed)
        width = student.output.in_features
        start = torch.randn(width, teacher_width, generator=generator) / width**0.5
        self._projection = nn.Parameter(start.to(self._device))
        self._subclasses: Subclasses | None = None
        self._head: nn.Linear | None = None
        self._attention: AttentionTransfer | None = None
        self._optimizer, self._schedule = self._fresh_optimizer()
        self._average: WeightAverage | None = None
        self._best: dict[str, torch.Tensor] = {}
        self._best_head: dict[str, torch.Tensor] = {}
        self._looks_without_gain = 0
        self._table: tuple[NDArray[np.int64], torch.Tensor] | None = None

    def _fresh_optimizer(self) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
        rate, table = self._config.learning_rate, self.student.model.get_input_embeddings().weight
        table.requires_grad_(self._config.embedding_rate > 0)
        body = [parameter for parameter in self.student.model.parameters() if parameter is not table]
        head = list(self._head.parameters()) if self._head is not None else []
        groups = [([*body, self._projection, *head], rate), ([table], rate * self._config.embedding_rate)]
        optimizer = adamw(groups)
        return optimizer, linear_schedule(optimizer, self._config.total_steps)

    def learn_subclasses(self, subclasses: Subclasses) -> None:
        """Distil by pseudo-subclasses instead of soft labels; to be called before the first step.

        Args:
            subclasses: Fitted on the teacher's outputs.
        """
        self._subclasses, self._head = subclasses, subclass_head(self.student.output, subclasses.counts)
        self._optimizer, self._schedule = self._fresh_optimizer()

    def learn_attention(self, teacher: Teacher) -> None:
        """Add the attention term, weighted by ``config.attention_weight``.

        Args:
            teacher: Its encoder is copied.

        Raises:
            UsageError: If student and teacher read different tokens.
        """
        self._attention = AttentionTransfer(self.student, teacher)

    def on_trial(self, config: KDConfig, validation: Examples, max_length: int, order: int = 0) -> "KDTrainer":
        """Make a trainer for steps that will be taken back: the same student and terms of the loss, another budget.

        It knows each weight's second moment from the run, so that its first steps are those of an optimiser under way;
        without momentum, which would push all trials alike.

        Args:
            config: Rates and budget.
            validation: The split that its looks score.
            max_length: Longest sequence in tokens.
            order: Another number gives another order of the texts.

        Returns:
            The trainer; it starts from copies of the projection and, where subclasses are learned, of the head.
        """
        seed = self._seed + 1000 * order
        trial = KDTrainer(self.student, config, validation, self._projection.shape[1], max_length, seed)
        trial._projection.data.copy_(self._projection.data)
        trial._attention = self._attention
        if self._subclasses is not None and self._head is not None:
            trial.learn_subclasses(self._subclasses)
            assert trial._head is not None
            trial._head.load_state_dict(self._head.state_dict())
        carry_second_moments(self._optimizer, trial._optimizer)
        return trial

    def train(
        self,
        sets: Sequence[DistillationSet],
        shares: Sequence[float],
        steps: int,
        progress: Progress = SILENT,
        stage: str = "distil",
        renewal: Renewal | None = None,
    ) -> None:
        """Update the student on a mixture of sets.

        Args:
            sets: Texts with teacher outputs, each in the student's tokens.
            shares: Share that each set contributes to every 16 batches.
            steps: Updates to make.
            progress: Shows the steps; gets the score of every look at the validation split.
            stage: Name shown to the user.
            renewal: A set of which only some texts are used, chosen anew every so many updates.

        Raises:
            RunError: If the loss is not finite.
        """
        data = join(sets)
        self._looks_without_gain = 0
        watching = self._attention.watching() if self._attention is not None else nullcontext()
        dropout = seeded(self._seed + self.steps_done)  # the same wherever the call starts
        occurring = self._active_vocabulary_only(data)
        with dropout, progress.stage(stage, steps) as advance, watching, occurring as renumbered:
            self._average = WeightAverage(self._trained_parameters, self._config.average)
            self.student.model.train()
            for indices in self._batches(renumbered, sets, shares, steps, renewal):
                self._step(renumbered, indices)
                self._average.update()
                advance(1)
                if self.steps_done % self._config.evaluate_every == 0:
                    self.evaluate(progress)
                if self._is_out_of_patience():
                    break
            if self.steps_done % self._config.evaluate_every:
                self.evaluate(progress)
            self._average = None
        self.student.model.eval()

    def _batches(
        self,
        data: DistillationSet,
        sets: Sequence[DistillationSet],
        shares: Sequence[float],
        steps: int,
        renewal: Renewal | None,
    ) -> Iterator[NDArray[np.int64]]:
        parts = np.split(np.arange(len(data)), np.cumsum([len(part) for part in sets])[:-1])
        cycles, used = [cycle(part, self._rng) for part in parts], list(parts)
        uses = np.zeros(len(data), np.int64)
        every = renewal.every if renewal is not None else max(steps, 1)
        for done in range(0, steps, every):
            if renewal is not None:
                place = next(number for number, part in enumerate(sets) if part is renewal.pool)
                pool = data.take(parts[place])
                kept = renewal.choose(broadcast(run_student(self.student, pool.encoded)[0])) if done else renewal.kept
                # Only this set starts anew, with those that were used least: the others go on where they were.
                used[place] = parts[place][kept]
                cycles[place] = cycle(used[place], self._rng, uses)
            present = [share if len(part) else 0.0 for share, part in zip(shares, used, strict=True)]
            count, lengths = min(every, steps - done), data.encoded.lengths
            for batch in mixture_batches(cycles, present, lengths, self._config.batch_size, count, self._rng):
                uses[batch] += 1
                yield batch

    @contextmanager
    def _active_vocabulary_only(self, data: DistillationSet) -> Iterator[DistillationSet]:
        if not self._config.embedding_rate:
            yield data
            return
        encoded, labels = self._validation
        vocabulary = self.student.word_embeddings().shape[0]
        tokens = active_vocabulary([data.encoded, encoded], vocabulary)
        with compact_embeddings(self.student, self._optimizer, tokens) as table:
            self._validation, self._table = (tokens.renumber(encoded), labels), (tokens.ids, table)
            try:
                yield replace(data, encoded=tokens.renumber(data.encoded))
            finally:
                self._validation, self._table = (encoded, labels), None

    def _step(self, data: DistillationSet, indices: NDArray[np.int64]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        mine = indices[process_rank() :: process_count()]
        for part in np.array_split(mine, max(1, min(self._config.gradient_accumulation, len(mine)))):
            # Each part counts by its texts, so that the gradient is that of the mean over the whole batch.
            loss = self._loss(data, part) * (len(part) / len(indices))
            loss.backward()  # type: ignore[no-untyped-call]
        sum_gradients(self._trained_parameters)
        nn.utils.clip_grad_norm_([p for p in self._trained_parameters if p is not self._projection], 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.steps_done += 1

    def _loss(self, data: DistillationSet, indices: NDArray[np.int64], reduction: Reduction = "mean") -> torch.Tensor:
        batch, taught = self.read_batch(self.student, data, indices)
        fast = mixed_precision(self._device, on_cpu=False) if self.student.model.training else nullcontext()
        with fast:
            logits, features = self.student(batch)
        loss = self._label_loss(taught, data.labels[indices], logits.float(), features.float(), reduction)
        if self._config.hidden_weight:
            states = torch.from_numpy(taught.embeddings).to(self._device)
            loss = loss + self._config.hidden_weight * hidden_state_loss(
                features.float(), states, self._projection, reduction
            )
        if self._attention is not None:
            tokens = None if self._table is None else torch.from_numpy(self._table[0]).to(self._device)
            loss = loss + self._config.attention_weight * self._attention.loss(batch, tokens, reduction)
        if not torch.isfinite(loss).all():
            raise RunError(f"kd: the loss is {loss.mean().item()} at step {self.steps_done}; lower kd.learning_rate")
        return loss

    def _label_loss(
        self,
        taught: TeacherOutputs,
        classes: NDArray[np.int64],
        logits: torch.Tensor,
        features: torch.Tensor,
        reduction: Reduction,
    ) -> torch.Tensor:
        config = self._config
        if self._head is not None and self._subclasses is not None:
            softness = (config.temperature, config.subclass_temperature)
            targets = torch.from_numpy(subclass_targets(self._subclasses, taught, *softness)).to(self._device)
            if reduction == "none":
                return nn.functional.cross_entropy(self._head(features), targets, reduction="none")
            return subclass_loss(features, self._head, self.student.output, targets, self._subclasses.counts)
        teacher_logits = torch.from_numpy(taught.logits).to(self._device)
        labels = torch.from_numpy(classes).to(self._device)
        return distillation_loss(logits, teacher_logits, labels, config.temperature, config.alpha, reduction)

    @property
    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def losses(self, data: DistillationSet) -> NDArray[np.float32]:
        """Measure the loss of each text, without dropout and in full precision.

        What teaches the output layer to follow a head of subclasses is left out: the student's body does not feel it.

        Args:
            data: N texts.

        Returns:
            float32 (N,), nats.
        """
        found = np.zeros(len(data), np.float32)
        with self._measuring(), torch.no_grad():
            for indices in inference_batches(data.encoded):
                found[indices] = self._loss(data, indices, "none").cpu().numpy()
        return found

    def moves_per_gradient(self, data: DistillationSet) -> list[torch.Tensor]:
        """Say how far each weight moves in the next update for a small change of its gradient, at the peak rate.

        AdamW moves a weight by m / sqrt(v). This is the derivative by the gradient, around the mean gradient of
        ``data``, which enters v too and is clipped as in training.

        Args:
            data: Texts of which an update is made.

        Returns:
            float32 tensors of the shapes of ``student.model.parameters()``, in their order; 0 for what is not trained.
        """
        self._optimizer.zero_grad(set_to_none=True)
        with self._measuring():
            for part in inference_batches(data.encoded):
                (self._loss(data, part) * (len(part) / len(data))).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_([p for p in self._trained_parameters if p is not self._projection], 1.0)
        slopes = adamw_update_derivative(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        clipped = 1.0 / max(float(norm), 1.0)
        return [slopes[p] * clipped if p in slopes else torch.zeros_like(p) for p in self.student.model.parameters()]

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        training = self.student.model.training
        self.student.model.eval()
        try:
            with self._attention.watching() if self._attention is not None else nullcontext():
                yield
        finally:
            self.student.model.train(training)

    def _is_out_of_patience(self) -> bool:
        return self._config.patience is not None and self._looks_without_gain >= self._config.patience

    def evaluate(self, progress: Progress = SILENT) -> float:
        """Score the student's averaged weights on the validation split and keep them if they are the best so far.

        Args:
            progress: Gets the score.

        Returns:
            Calibrated log-likelihood.
        """
        with self._average.applied() if self._average is not None else nullcontext():
            encoded, labels = self._validation
            score = calibrated_log_likelihood(run_student(self.student, encoded)[0], labels)
            self._looks_without_gain += 1
            if score > self.best_score:
                self.best_score, self._looks_without_gain = score, 0
                self._keep()
        progress.event("validation", step=self.steps_done, log_likelihood=score)
        return score

    def _keep(self) -> None:
        self._best = self.student.snapshot()
        if self._head is not None:
            self._best_head = {name: value.detach().clone() for name, value in self._head.state_dict().items()}
        if self._table is not None:
            ids, table = self._table
            whole = table.clone()
            whole[torch.from_numpy(ids).to(table.device)] = self._best[self.student.embeddings_name]
            self._best[self.student.embeddings_name] = whole

    def restore_best(self) -> None:
        """Load the state that scored best on the validation split."""
        if self._best:
            self.student.restore(self._best)
        if self._head is not None and self._best_head:
            self._head.load_state_dict(self._best_head)

    def refit_output_layer(self, encoded: EncodedTexts) -> FoldParity | None:
        """Turn the subclass head, where there is one, into the student's ordinary output layer.

        Args:
            encoded: Texts on which the two shall agree.

        Returns:
            How well they agree; None for a student that learned no subclasses.
        """
        if self._head is None or self._subclasses is None:
            return None
        features = run_student(self.student, encoded)[1]
        return refit_output_layer(self.student.output, self._head, self._subclasses.counts, features)

    @property
    def _device(self) -> torch.device:
        return self.student.output.weight.device
