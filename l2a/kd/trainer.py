"""Trains a student on mixtures of labelled texts, runs it and scores what it predicts."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax

from l2a.config import KDConfig
from l2a.data import Doubles, Examples, Floats, Ints, TextInput
from l2a.data.encoding import EncodedTexts, encode, first_texts, inference_batches
from l2a.kd import data as kd_data, losses as kd_losses
from l2a.student.student import Student
from l2a.teacher.labelling import Labeller
from l2a.util import SILENT, Progress, RunError, UsageError, fingerprint, process_count, process_rank, training


def run_student(student: Student, encoded: EncodedTexts, precise: bool = True) -> tuple[Floats, Floats]:
    """Run the student over N texts in its tokens, in eval mode; its mode is restored after.

    Returns:
        Logits, float32 (N, C), and output-layer features, float32 (N, h), computed in float32 if ``precise``, else as
        in training.
    """
    logits = np.zeros((len(encoded), student.output.out_features), np.float32)
    features = np.zeros((len(encoded), student.output.in_features), np.float32)
    device = student.model.device
    precision = nullcontext() if precise else training.mixed_precision(device, student.model.config.hidden_size)
    with training.evaluating(student.model), torch.no_grad(), precision:
        for indices in inference_batches(encoded):
            found = student(encoded.padded(indices, device))
            logits[indices], features[indices] = (part.float().cpu().numpy() for part in found)
    return logits, features


TEMPERATURES = np.geomspace(0.25, 16.0, 25).tolist()  # among which a student's best one is found


def mean_divergence(logits: Floats, taught: Floats, temperatures: Sequence[float] = (1.0,)) -> float:
    """Measure mean KL(teacher || student) over texts, in nats, alike in all processes.

    Args:
        logits: float32 (N, C), the student's, N at least 1.
        taught: float32 (N, C), the teacher's.
        temperatures: Of the student; the one that suits all the texts best counts.
    """
    student, teacher = torch.from_numpy(logits), torch.from_numpy(taught)
    losses = [kd_losses.soft_label_loss(student / by, teacher, 1.0).mean() for by in temperatures]
    return float(training.broadcast(torch.stack(losses).min().numpy()))


def calibrated_log_likelihoods(logits: Floats, labels: Ints) -> Doubles:
    """Log-probability of each text's class, float64 (N,), in nats, at the temperature that suits all of them best.

    A student of a confident teacher grows confident too; without the temperature the score would prefer states that are
    hardly trained over ones that rank better (temperature scaling: Guo et al., 2017).

    Args:
        logits: float32 (N, C).
        labels: int64 (N,), N at least 1.
    """
    scaled = logits[None].astype(np.float64) / np.array(TEMPERATURES)[:, None, None]
    of_labels = log_softmax(scaled, axis=2)[:, np.arange(len(labels)), labels]
    return np.asarray(of_labels[of_labels.mean(axis=1).argmax()])


CLEARLY = 2.0  # standard errors beyond which a few labels are heard against what mostly helps


def standard_error(gains: Doubles) -> float:
    """Say how well the mean of some gains is known: their standard error, infinite for fewer than two."""
    return float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")


@dataclass(frozen=True)
class Score:
    """How good a state of the student is.

    Attributes:
        divergence: Mean KL(teacher || student) on texts that are set apart, in nats, at the temperature that suits the
            student best; None where there are none.
        log_likelihoods: float64 (V,), calibrated, of the validation split's labels.
    """

    divergence: float | None
    log_likelihoods: Doubles

    @property
    def log_likelihood(self) -> float:
        """The mean over the validation split, in nats; not a number where the split is empty."""
        return float(self.log_likelihoods.mean()) if len(self.log_likelihoods) else float("nan")

    def __str__(self) -> str:
        """Say it in words."""
        divergence = "" if self.divergence is None else f"{self.divergence:.3f} nats from it on texts set apart, "
        return f"{divergence}log-likelihood {self.log_likelihood:.3f} on the validation split"

    def beats(self, other: "Score | None") -> bool:
        """Say whether this state is to be kept in place of another.

        The few labels of a validation split cannot tell states apart, many texts without labels can; but the labels
        have a veto: a state that is clearly worse on them is not kept. With neither, the last is.
        """
        if other is None:
            return True
        gains = self.log_likelihoods - other.log_likelihoods
        gain = float(gains.mean()) if len(gains) else 0.0
        if self.divergence is None or other.divergence is None:
            return gain > 0 or not len(gains)
        return self.divergence < other.divergence and gain >= -CLEARLY * standard_error(gains)


def fit_output_layer(student: Student, data: kd_data.DistillationSet) -> None:
    """Fit the output layer in place on frozen features and soft labels, before the body is trained.

    Full-batch Adam on the cross-entropy. Training the head first keeps a pretrained body from being distorted (Kumar et
    al., 2022, "LP-FT"). Of several processes the first fits it, and all take what it found.
    """
    layer = student.output
    if process_rank() == 0:
        inputs = torch.from_numpy(run_student(student, data.encoded, precise=False)[1])
        goals = torch.from_numpy(data.teacher.probabilities())
        weight, bias = (torch.zeros(part.shape, requires_grad=True) for part in (layer.weight, layer.bias))
        optimizer = torch.optim.Adam([weight, bias], lr=0.05)
        for _ in range(300):
            loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, goals) + 1e-3 * weight.pow(2).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        layer.load_state_dict({"weight": weight, "bias": bias})
    training.broadcast_weights([layer.weight, layer.bias])


def embedding_gradients(
    student: Student, labeller: Labeller, inputs: Sequence[TextInput], max_length: int
) -> list[Floats]:
    """Differentiate KL(p_T || p_S) by each token's embedding, in eval mode: one forward and one backward pass.

    Returns:
        float32 (L_i, e) for each of N texts, one row a token of the student, special ones included.
    """
    encoded, teacher_logits = encode(student.tokenizer, inputs, max_length), labeller(inputs).logits
    gradients: list[Floats] = [np.zeros((0, 0), np.float32)] * len(inputs)
    device, table = student.model.device, student.model.get_input_embeddings()
    with training.evaluating(student.model):
        for indices in inference_batches(encoded):
            batch = encoded.padded(indices, device)
            embeds = table(batch.pop("input_ids")).detach().requires_grad_(True)
            logits, _ = student({**batch, "inputs_embeds": embeds})
            losses = kd_losses.soft_label_loss(logits, torch.from_numpy(teacher_logits[indices]).to(device), 1.0)
            # The sum, not the mean, so that a text's gradient does not depend on its batch.
            (gradient,) = torch.autograd.grad(losses.sum(), embeds)
            for row, index in enumerate(indices):
                gradients[index] = gradient[row, : encoded.lengths[index]].cpu().numpy()
    return gradients


Sets = Sequence[kd_data.DistillationSet]
WholeTable = Callable[[], torch.Tensor]


class WeightAverage:
    """Exponential moving average of weights: smoother than any single step (Polyak and Juditsky, 1992).

    The decay grows from 2/11 at the first step to its final value, so that the untrained start is soon forgotten.

    Attributes:
        values: The average of each parameter.
        steps: Updates taken in.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        """Start at the present weights.

        Args:
            parameters: Averaged; their values may change, their shapes not.
            decay: Weight of the past, 0 (no average) to below 1.
        """
        self._weights = [parameter.detach() for parameter in parameters]
        self.values = [weight.clone() for weight in self._weights]
        self._decay, self.steps = decay, 0

    def update(self) -> None:
        """Take the present weights in, after an optimiser step."""
        self.steps += 1
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, self._weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the weights, and the weights back afterwards."""
        present = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self.values)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, present)


class KDTrainer:
    """One student's training over several calls, with one optimiser, one schedule and one best state.

    Attributes:
        student: Trained in place; in eval mode between calls.
        steps_done: Updates so far.
        best: Score of the best state so far.
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
        training.join_processes()
        size, least = config.batch_size, process_count()
        if size < least:
            raise UsageError(f"kd.batch_size is {size}, which {least} processes cannot share; give at least {least}")
        self.student, self.steps_done = student, 0
        self.best: Score | None = None
        self._apart: kd_data.DistillationSet | None = None
        self.read_batch: kd_data.BatchReader = kd_data.read_tokens
        self.config = config
        self._seed = int(training.broadcast(np.array(seed)))
        self._rng = np.random.default_rng(self._seed)
        self._validation = (encode(student.tokenizer, validation.inputs, max_length), validation.labels)
        generator, width = torch.Generator().manual_seed(self._seed), student.output.in_features
        start = torch.randn(width, teacher_width, generator=generator) / width**0.5
        self._projection = torch.nn.Parameter(start.to(student.model.device))
        self._subclasses: kd_losses.LELPSubclasses | None = None
        self._head: torch.nn.Linear | None = None
        self._modules = torch.nn.ModuleList([student.model])  # whose best state is kept
        training.broadcast_weights(student.model.parameters())
        self._start_optimizer()
        self._average: WeightAverage | None = None
        self._best_state: dict[str, torch.Tensor] = {}
        self._whole_table: WholeTable | None = None  # while only a part of it is trained
        self._events: list[dict[str, Any]] = []  # the scores of the present call

    def _start_optimizer(self) -> None:
        rate, table = self.config.peak_rate, self.student.model.get_input_embeddings().weight
        table.requires_grad_(self.config.embedding_rate > 0)
        body = [parameter for parameter in self.student.model.parameters() if parameter is not table]
        head = list(self._head.parameters()) if self._head is not None else []
        groups = [([*body, self._projection, *head], rate), ([table], rate * self.config.embedding_rate)]
        self._optimizer = training.adamw(groups)
        self._schedule = training.linear_schedule(self._optimizer, self.config.total_steps)

    def learn_subclasses(self, subclasses: kd_losses.LELPSubclasses) -> None:
        """Distil by fitted pseudo-subclasses instead of soft labels; to be called before the first step."""
        self._subclasses, self._head = subclasses, kd_losses.subclass_head(self.student.output, subclasses.counts)
        self._modules.append(self._head)
        self._start_optimizer()

    def follow(self, apart: kd_data.DistillationSet) -> None:
        """Choose states by how they follow the teacher on texts that are not trained on; none leaves the labels."""
        self._apart = apart if len(apart) else None

    def on_trial(self, config: KDConfig, order: int = 0) -> "KDTrainer":
        """Make a trainer for steps that will be taken back: the same student and terms of the loss, another budget.

        It knows each weight's second moment from the run, so that its first steps are those of an optimiser under way;
        without momentum, which would push all trials alike.

        Args:
            config: Rates and budget.
            order: Another number gives another order of the texts.

        Returns:
            The trainer, which is to score no states; it starts from copies of the projection and, where subclasses are
            learned, of the head.
        """
        trial = copy.copy(self)
        trial.steps_done, trial._apart, trial.read_batch = 0, None, kd_data.read_tokens
        trial.config, trial._seed = config, self._seed + 1000 * order
        trial._rng = np.random.default_rng(trial._seed)
        trial._projection, trial._head = copy.deepcopy((self._projection, self._head))
        trial._start_optimizer()
        training.carry_second_moments(self._optimizer, trial._optimizer)
        return trial

    def train(
        self, sets: Sets, shares: Sequence[float], steps: int, progress: Progress = SILENT, stage: str = "distil",
        evaluate: bool = True,
    ) -> None:  # fmt: skip
        """Update the student on a mixture of sets.

        Args:
            sets: Texts with teacher outputs, each in the student's tokens.
            shares: Share that each set contributes to every 16 batches.
            steps: Updates to make.
            progress: Shows the steps; gets every score on the validation split.
            stage: Name shown to the user.
            evaluate: Average the weights, score them every so many updates and keep the best; False for trials.

        Raises:
            RunError: If the loss is not finite.
        """
        data, self._events = kd_data.join(sets), []
        checkpoint = progress.checkpoint if evaluate and process_count() == 1 else None
        key = self._key(data, list(map(len, sets)), list(shares), steps) if checkpoint else ""
        dropout = training.seeded(self._seed + self.steps_done)  # the same wherever the call starts
        attention, used = training.plain_attention(self.student.model), self._occurring_rows_alone(data)
        with dropout, attention, progress.stage(stage, steps) as advance, used as self._whole_table:
            trained = training.trained_parameters(self._optimizer)
            self._average = WeightAverage(trained, self.config.average) if evaluate else None
            self.student.model.train()
            loop = training.Loop(checkpoint, key, self._schedule, steps)
            if loop.done:
                self._restore(loop, progress)
            for indices in loop.left(self._batches(data, sets, shares, steps), advance):
                self._step(data, indices)
                if self._average is not None:
                    self._average.update()
                    if self.steps_done % self.config.evaluate_every == 0:
                        self.evaluate(progress)
                loop.update_done(self._beside)
            if evaluate and self.steps_done % self.config.evaluate_every:
                self.evaluate(progress)
        self._average = self._whole_table = None
        self.student.model.eval()

    def _occurring_rows_alone(self, data: kd_data.DistillationSet) -> AbstractContextManager[WholeTable | None]:
        if not self.config.embedding_rate:
            return nullcontext()
        read = [data.encoded, self._validation[0], *([self._apart.encoded] if self._apart is not None else [])]
        return kd_data.compact_embeddings(self.student, self._optimizer, read)

    def _key(self, data: kd_data.DistillationSet, *plan: Any) -> str:
        """Name a call by all that decides its result: the student as it is, the texts, the labels and the settings."""
        read = [data, self._apart] if self._apart is not None else [data]
        texts = [[one.encoded.ids, one.encoded.offsets, one.labels, one.teacher.logits] for one in read]
        chosen_by = [self._validation[0].ids, self._validation[0].offsets, self._validation[1]]
        start = dict.fromkeys((*self.student.model.parameters(), *training.trained_parameters(self._optimizer)))
        weights = [parameter.detach().cpu().numpy() for parameter in start]
        arithmetic = training.arithmetic(self.student.model.device)
        how = [self._seed, self.steps_done, type(self.read_batch).__name__, arithmetic]
        return fingerprint(texts, chosen_by, weights, asdict(self.config), how, plan)

    def _beside(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Give what a checkpoint keeps of a call, beside what its loop knows."""
        tensors = {f"average/{i}": value for i, value in enumerate(self._average.values if self._average else ())}
        tensors |= {f"best/{name}": value for name, value in self._best_state.items()}
        best = None if self.best is None else [self.best.divergence, self.best.log_likelihoods.tolist()]
        return tensors, {"events": self._events, "best": best}

    def _restore(self, loop: training.Loop, progress: Progress) -> None:
        kept, facts = loop.tensors, loop.facts
        if self._average is not None:
            self._average.steps = loop.done
            for i, value in enumerate(self._average.values):
                value.copy_(kept[f"average/{i}"])
        if facts["best"] is not None:
            self.best = Score(facts["best"][0], np.array(facts["best"][1]))
            self._best_state = {name: kept[f"best/{name}"] for name in self._modules.state_dict()}
        self.steps_done, self._events = self.steps_done + loop.done, facts["events"]
        for told in self._events:
            progress.event("validation", **told)

    def _batches(
        self, data: kd_data.DistillationSet, sets: Sets, shares: Sequence[float], steps: int
    ) -> Iterator[Ints]:
        ends = np.cumsum([len(part) for part in sets])
        cycles = [kd_data.cycle(part, self._rng) for part in np.split(np.arange(len(data)), ends[:-1])]
        present = [share if len(part) else 0.0 for share, part in zip(shares, sets, strict=True)]
        size, lengths = self.config.batch_size, data.encoded.lengths
        return kd_data.mixture_batches(cycles, present, lengths, size, steps, self._rng)

    def _step(self, data: kd_data.DistillationSet, indices: Ints) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        mine = indices[process_rank() :: process_count()]
        # Each process counts by its texts, so that the gradient is that of the mean over the whole batch.
        (self._loss(data, mine) * (len(mine) / len(indices))).backward()  # type: ignore[no-untyped-call]
        trained = training.trained_parameters(self._optimizer)
        training.sum_gradients(trained)
        torch.nn.utils.clip_grad_norm_([parameter for parameter in trained if parameter is not self._projection], 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.steps_done += 1

    def _loss(self, data: kd_data.DistillationSet, indices: Ints) -> torch.Tensor:
        """Sum the weighted terms of the loss, each the mean over the texts."""
        config, device = self.config, self.student.model.device
        batch, taught = self.read_batch(self.student, data, indices)
        with training.mixed_precision(device, self.student.model.config.hidden_size):
            logits, features = (part.float() for part in self.student(batch))
        if self._subclasses is not None and self._head is not None:
            softness, counts = (config.temperature, config.subclass_temperature), self._subclasses.counts
            targets = torch.from_numpy(kd_losses.subclass_targets(self._subclasses, taught, *softness)).to(device)
            loss = kd_losses.subclass_loss(features, self._head, self.student.output, targets, counts)
        else:
            soft, labels = (torch.from_numpy(part).to(device) for part in (taught.logits, data.labels[indices]))
            loss = kd_losses.distillation_loss(logits, soft, labels, config.temperature, config.alpha)
        loss = loss.mean()
        if config.hidden_weight:
            states = torch.from_numpy(taught.embeddings).to(device)
            loss = loss + config.hidden_weight * kd_losses.hidden_state_loss(features, states, self._projection).mean()
        if not torch.isfinite(loss):
            texts = first_texts(self.student.tokenizer, data.encoded.padded(indices[:3])["input_ids"])
            where = f"at step {self.steps_done}, in the batch that begins with {texts}"
            fix = "lower kd.learning_rate, or check that the teacher's outputs for these texts are finite"
            raise RunError(f"kd: the loss is {loss.item()} {where}; {fix}")
        return loss

    def evaluate(self, progress: Progress = SILENT) -> Score:
        """Score the student's averaged weights and keep them if they are the best so far; the progress gets the score.

        Of several processes all take the score of the first, so that all keep the same state.
        """
        with self._average.applied() if self._average is not None else nullcontext():
            score = Score(self._divergence(), self._log_likelihoods())
            if score.beats(self.best):
                self.best = score
                self._keep()
        facts = {"step": self.steps_done, "log_likelihood": score.log_likelihood, "divergence": score.divergence}
        self._events.append(facts)
        progress.event("validation", **facts)
        return score

    def _log_likelihoods(self) -> Doubles:
        encoded, labels = self._validation
        if not len(labels):
            return np.zeros(0)
        return training.broadcast(calibrated_log_likelihoods(run_student(self.student, encoded)[0], labels))

    def _divergence(self) -> float | None:
        if self._apart is None:
            return None
        logits = run_student(self.student, self._apart.encoded, precise=False)[0]
        return mean_divergence(logits, self._apart.teacher.logits, TEMPERATURES)

    def _keep(self) -> None:
        self._best_state = copy.deepcopy(self._modules.state_dict())
        if self._whole_table is not None:
            trained = self.student.model.get_input_embeddings().weight
            name = next(name for name, weight in self._modules.named_parameters() if weight is trained)
            self._best_state[name] = self._whole_table()

    def restore_best(self) -> None:
        """Load the state that scored best."""
        if self._best_state:
            self._modules.load_state_dict(self._best_state)

    def refit_output_layer(self, encoded: EncodedTexts) -> dict[str, float] | None:
        """Turn the subclass head, where there is one, into the student's ordinary output layer.

        Returns:
            How well the two agree on the given texts; None for a student that learned no subclasses.
        """
        if self._head is None or self._subclasses is None:
            return None
        features, layer = run_student(self.student, encoded)[1], self.student.output
        parity = kd_losses.refit_output_layer(layer, self._head, self._subclasses.counts, features)
        training.broadcast_weights([layer.weight, layer.bias])
        return parity
