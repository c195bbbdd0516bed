"""General distillation: text and its variants, the teacher's states of it, the student's start, exact resuming."""

import copy
import dataclasses
import math
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from l2a.config import Columns, Count, CountFromZero, Length, Positive, Seed
from l2a.data.domains import load_domain
from l2a.data.encoding import EncodedTexts, bucket_of, encode, fit_tokenizer, inference_batches
from l2a.data.examples import Domain, TextInput, normalised_hash
from l2a.data.readers import SUFFIXES, read_table, texts_of
from l2a.kd.data import Indices, join_encoded
from l2a.student.student import principal_word_vectors, start_by_averaging
from l2a.teacher.model import Teacher, load_encoder, mean_pool
from l2a.util.cards import Checked
from l2a.util.errors import RunError, UsageError
from l2a.util.files import atomic_write_bytes, atomic_write_text, cache_root, cached_folder, fingerprint, output_folder
from l2a.util.progress import SILENT, Progress
from l2a.util.training import best_device, has_fast_bfloat16, mixed_precision, seeded

Words = list[str]
Texts = tuple[TextInput, ...]


@dataclass(frozen=True)
class PretrainConfig(Checked):
    """Settings of the general stage; the student is an ELECTRA, which has factorised embeddings natively.

    Attributes:
        output_dir: Folder of the finished student.
        text: Files of texts and domains, whose train splits are read without labels.
        text_column: Column of the text, or of the first text of a pair; None for the usual names.
        text_pair_column: Column of the second text of a pair.
        protect: Domains whose texts the student must never see, whatever their split.
        teacher: "minilm-l6", a folder, or a Hub id: a pretrained encoder.
        steps: Optimizer steps.
        seed: Of the student's first weights, the variants and the order of the batches.
        max_length: Longest input in tokens.
        variants: Variants of the texts (spans, pairs, mixes, noise) that are labelled as well.
        tokens_per_batch: Padded tokens in a step, at most.
        learning_rate: Peak rate; 5 % of the steps warm up, then it falls linearly to zero.
        checkpoint_every: Steps between checkpoints.
        embedding_size: Width of the word embeddings.
        hidden_size: Width of the layers.
        layers: Number of layers.
        intermediate_size: Width of the feed-forward blocks.
        heads: Attention heads in a layer.
        positions: Longest input that the student can read, in tokens.
        overwrite: Replace a finished student in the output folder.
    """

    output_dir: Path
    text: tuple[str, ...]
    text_column: str | None = None
    text_pair_column: str | None = None
    protect: tuple[str, ...] = ()
    teacher: str = "minilm-l6"
    steps: Count = 4000
    seed: Seed = 0
    max_length: Length = 128
    variants: CountFromZero = 200_000
    tokens_per_batch: Count = 4096
    learning_rate: Positive = 8e-4
    checkpoint_every: Count = 500
    embedding_size: Count = 80
    hidden_size: Count = 128
    layers: Count = 2
    intermediate_size: Count = 512
    heads: Count = 4
    positions: Count = 256
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.heads:
            raise UsageError(f"heads is {self.heads}; give a divisor of hidden_size, which is {self.hidden_size}")
        if bucket_of(self.max_length) > self.positions:
            raise UsageError(
                f"max_length is {self.max_length}, padded to {bucket_of(self.max_length)}; give one that positions "
                f"({self.positions}) can hold, or raise positions"
            )
        if not self.text:
            raise UsageError("text is empty; give --text with a file of texts or a domain, once or more")


def make_variants(texts: Sequence[TextInput], count: int, rng: np.random.Generator) -> tuple[TextInput, ...]:
    """Draw variants of a corpus: half spans, the rest pairs, mixes and noisy spans in equal parts.

    A text is drawn with a chance proportional to the square root of its length, so that long ones give more spans.
    Single texts come first, then pairs.
    """
    sides = [side.split() for text in texts for side in text]
    weights = np.sqrt([len(words) for words in sides])
    chosen = rng.choice(len(sides), size=(count, 2), p=weights / weights.sum())
    kinds = rng.choice(("span", "pair", "mix", "noise"), size=count, p=[0.5, 1 / 6, 1 / 6, 1 / 6])
    made = [_variant(kind, sides[a], sides[b], rng) for kind, (a, b) in zip(kinds, chosen, strict=True)]
    return tuple(sorted((text for text in made if text[0]), key=len))


def _variant(kind: str, first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    # Half of the pairs come from one text, so that related sides are as common as unrelated ones.
    partner = first if kind == "pair" and rng.random() < 0.5 else second
    span = random_span(first, rng)
    if kind == "pair":
        return (" ".join(span), " ".join(random_span(partner, rng)))
    if kind == "mix":
        other = random_span(partner, rng)
        swapped = rng.random(len(span)) < rng.uniform(0.1, 0.5)
        span = [other[i] if i < len(other) and swapped[i] else word for i, word in enumerate(span)]
    if kind == "noise":
        span = [word for word in span if rng.random() > 0.15] or span
        i, j = (int(rng.integers(0, len(span))) for _ in range(2))
        span[i], span[j] = span[j], span[i]
    return (" ".join(span),)


def random_span(words: Words, rng: np.random.Generator) -> Words:
    """Cut a contiguous span of 3 to 60 words, or all; its length is log-uniform, so that short ones are common."""
    length = min(len(words), int(math.exp(rng.uniform(math.log(3), math.log(61)))))
    start = int(rng.integers(0, len(words) - length + 1))
    return words[start : start + length]


def read_corpus(config: PretrainConfig, progress: Progress = SILENT) -> tuple[Texts, Texts]:
    """Read all text of a run, without protected texts, and draw its variants.

    Args:
        config: Which files and domains to read, which domains to protect, how many variants.
        progress: Shows downloads.

    Returns:
        Distinct texts, single ones first, then pairs; and texts made from them, in the same order.

    Raises:
        UsageError: If a file or domain cannot be read, or nothing is left.
        RunError: If a domain cannot be fetched.
    """
    columns = Columns(config.text_column, config.text_pair_column)
    read = [_read(name, columns, progress) for name in config.text]
    whole = [load_domain(name, progress=progress) for name in config.protect]
    protected = protected_hashes([part for part in read if isinstance(part, Domain)], whole)
    texts = clean_corpus([part.train.inputs if isinstance(part, Domain) else part for part in read], protected)
    return texts, make_variants(texts, config.variants, np.random.default_rng([config.seed, 1]))


def _read(name: str, columns: Columns, progress: Progress) -> Domain | Texts:
    """Read a file without a column of labels as texts, anything else as a domain, with splits to respect."""
    path = Path(name).expanduser()
    if path.is_file() or path.suffix == ".txt":
        table = read_table(path, (".txt", *SUFFIXES))
        if not table.has_labels:
            return texts_of(table, columns)
    return load_domain(name, columns, progress=progress)


def protected_hashes(domains: Sequence[Domain], whole: Sequence[Domain] = ()) -> frozenset[str]:
    """Hash the texts, and each side of a pair, that a general student must never see.

    Args:
        domains: Domains whose dev and test splits are protected.
        whole: Domains that are protected with their train split too, such as those it will be tried on.

    Returns:
        Normalised hashes.
    """
    every = (*domains, *whole)
    splits = [*(domain.dev for domain in every), *(domain.train for domain in whole)]
    hashes = _hashes(text for split in splits for text in split.inputs)
    return frozenset(hashes.union(*(domain.test.hashes for domain in every)))


def _hashes(texts: Iterable[TextInput]) -> set[str]:
    """Hash texts, and each side of a pair."""
    return {normalised_hash(part) for text in texts for part in (text, *((side,) for side in text))}


def clean_corpus(sources: Sequence[Sequence[TextInput]], protected: AbstractSet[str]) -> Texts:
    """Join texts, without duplicates and without protected ones.

    Args:
        sources: Texts of each file or domain, in order.
        protected: Hashes of ``protected_hashes``; a pair goes when either side is protected.

    Returns:
        Distinct texts: first all single ones, then all pairs, each in the order of the sources.

    Raises:
        UsageError: If nothing is left.
    """
    distinct: dict[str, TextInput] = {}
    for text in (text for source in sources for text in source):
        if not _hashes([text]) & protected:
            distinct.setdefault(normalised_hash(text), text)
    if not distinct:
        raise UsageError("text: no text is left once the protected domains' texts are removed; give other text")
    return tuple(sorted(distinct.values(), key=len))


RECIPE = 1
"""To be raised whenever the same corpus would be labelled otherwise: part of the cache's key."""


@dataclass(frozen=True)
class TeacherTargets:
    """Texts as the teacher reads them, and what it makes of them.

    Attributes:
        encoded: Token ids of N texts.
        hidden: float16 (tokens, d), memory-mapped: the last hidden state of every token in order; the mean over a
            text's tokens is its pooled embedding.
    """

    encoded: EncodedTexts
    hidden: NDArray[np.float16]

    def states(self, index: int) -> NDArray[np.float16]:
        """Read the hidden states of one text, float16 (tokens, d)."""
        return np.array(self.hidden[slice(*self.encoded.offsets[index : index + 2])])

    def padded_hidden(self, batch: Indices, width: int) -> torch.Tensor:
        """Read the states of a batch of B texts, bfloat16 (B, width, d), zero where padded."""
        padded = torch.zeros(len(batch), width, self.hidden.shape[1], dtype=torch.bfloat16)
        for row, index in enumerate(batch):
            states = torch.from_numpy(self.states(int(index)))
            padded[row, : len(states)] = states
        return padded


def label_texts(
    teacher: Teacher, corpus: tuple[Texts, Texts], max_length: int, device: torch.device, progress: Progress = SILENT
) -> TeacherTargets:
    """Run the teacher over the texts and their variants once; the result is cached by content.

    Args:
        teacher: The pretrained teacher; it is left on the processor in float32.
        corpus: The texts and their variants.
        max_length: Longest input in tokens.
        device: Where to compute.
        progress: Shows the tokens done.

    Returns:
        The labelled texts: first the originals, then the variants.

    Raises:
        RunError: If the disk is full.
    """
    # Single texts and pairs are tokenised apart.
    kinds = [[[text for text in texts if len(text) == sides] for sides in (1, 2)] for texts in corpus]
    parts = [join_encoded([encode(teacher.tokenizer, kind, max_length) for kind in both]) for both in kinds]
    encoded = join_encoded(parts)
    dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    shape = (len(encoded.ids), teacher.hidden_size)

    def build(folder: Path) -> None:
        encoder = copy.deepcopy(teacher.encoder).to(device, dtype)
        hidden, start = np.memmap(folder / "hidden.f16", np.float16, "w+", shape=shape), 0
        with progress.stage("label the corpus", len(encoded.ids)) as advance:
            for part in parts:
                for batch in inference_batches(part, tokens_per_batch=4096):
                    advance(_write_batch(encoder, part, batch, hidden[start:]))
                start += len(part.ids)
        hidden.flush()

    tokens = (encoded.ids, encoded.types, encoded.offsets, len(parts[0]))
    folder = cached_folder("pretraining", fingerprint(RECIPE, str(dtype), teacher.fingerprint(), *tokens), build)
    return TeacherTargets(encoded, np.memmap(folder / "hidden.f16", np.float16, "r", shape=shape))


@torch.inference_mode()
def _write_batch(encoder: nn.Module, encoded: EncodedTexts, batch: Indices, hidden: NDArray[np.float16]) -> int:
    inputs = encoded.padded(batch, next(encoder.parameters()).device)
    states = encoder(**inputs).last_hidden_state.to(torch.float16).cpu().numpy()
    for row, index in enumerate(batch):
        start, end = encoded.offsets[index], encoded.offsets[index + 1]
        hidden[start:end] = states[row, : end - start]
    return int(encoded.lengths[batch].sum())


class GeneralStudent(nn.Module):
    """A sequence classifier whose body is trained through two projections; they are dropped on export.

    Attributes:
        classifier: ``ElectraForSequenceClassification``; the ``dense`` layer of its head is trained here too, so that
            the exported head starts from a sentence representation, and only its output layer is fresh.
        sentence_projection: (h) -> (d).
        token_projection: (h) -> (d).
    """

    def __init__(self, classifier: Any, teacher_width: int, seed: int) -> None:
        """Add projections to the teacher's width d, drawn by the seed."""
        super().__init__()
        self.classifier = classifier
        width = int(classifier.config.hidden_size)
        with seeded(seed):
            self.sentence_projection = nn.Linear(width, teacher_width)
            self.token_projection = nn.Linear(width, teacher_width)

    def states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute what the output layer reads, float (B, h), and the last hidden states, float (B, L, h)."""
        hidden = self.classifier.electra(**batch).last_hidden_state
        return nn.functional.gelu(self.classifier.classifier.dense(hidden[:, 0])), hidden

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Project both into the teacher's space: float32 (B, d), sentences, and float32 (B, L, d), tokens."""
        sentence, hidden = self.states(batch)
        return self.sentence_projection(sentence).float(), self.token_projection(hidden).float()


def start_student(teacher: Teacher, targets: TeacherTargets, config: PretrainConfig) -> GeneralStudent:
    """Build the student in the state that training starts from.

    Args:
        teacher: The pretrained teacher.
        targets: The labelled corpus.
        config: Size and seed.

    Returns:
        The student, with its projections fitted.

    Raises:
        UsageError: If the student's word vectors are wider than the teacher.
    """
    vectors = principal_word_vectors(_word_states(teacher, targets), config.embedding_size)
    student = _build_student(vectors, int(teacher.tokenizer.pad_token_id), config)
    model = GeneralStudent(student, teacher.hidden_size, config.seed)
    _fit_projections(model, targets, config.seed)
    return model


def _build_student(vectors: Tensor, pad_token_id: int, settings: PretrainConfig) -> Any:
    """Create a student of two labels and no dropout that starts by averaging given word vectors, float32 (V, e)."""
    from transformers import ElectraConfig, ElectraForSequenceClassification

    config = ElectraConfig(
        vocab_size=len(vectors), embedding_size=settings.embedding_size, hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, pad_token_id=pad_token_id,
        intermediate_size=settings.intermediate_size, max_position_embeddings=settings.positions,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with seeded(settings.seed), torch.no_grad():
        student: Any = ElectraForSequenceClassification(config)
        student.electra.embeddings.word_embeddings.weight.copy_(vectors)
        # Inputs of unit variance: with the usual 0.02 the projection behind would have to be large and fragile.
        nn.init.normal_(student.classifier.dense.weight, std=settings.hidden_size**-0.5)
        start_by_averaging(student.electra)
    # On processors the fused attention's backward pass in bfloat16 is several times slower than plain products.
    student.set_attn_implementation("eager")
    return student


@torch.inference_mode()
def _word_states(teacher: Teacher, targets: TeacherTargets) -> NDArray[np.float32]:
    """Average each word's last hidden state over the corpus, (V, d); that of the word alone counts as two places."""
    ids = torch.arange(teacher.encoder.get_input_embeddings().num_embeddings)
    special = (teacher.tokenizer.cls_token_id, teacher.tokenizer.sep_token_id)
    first, last = (torch.full_like(ids, token) for token in special)
    parts = torch.split(torch.stack([first, ids, last], dim=1), 4096)
    sums = 2.0 * torch.cat([teacher.encoder(part).last_hidden_state[:, 1].float() for part in parts])
    counts = torch.full((len(sums), 1), 2.0)
    for start in range(0, len(targets.hidden), 65_536):
        states = torch.from_numpy(np.array(targets.hidden[start : start + 65_536])).float()
        words = torch.from_numpy(targets.encoded.ids[start : start + len(states)].astype(np.int64))
        sums.index_add_(0, words, states)
        counts += torch.bincount(words, minlength=len(sums))[:, None]
    averages: NDArray[np.float32] = (sums / counts).numpy()
    return averages


@torch.inference_mode()
def _fit_projections(model: GeneralStudent, targets: TeacherTargets, seed: int) -> None:
    """Fit both projections to the teacher by ridge regression on a sample of texts."""
    texts, device = len(targets.encoded), next(model.parameters()).device
    sample = np.random.default_rng([seed, 2]).choice(texts, min(6000, texts), replace=False)
    sample = sample[np.argsort(targets.encoded.lengths[sample], kind="stable")]
    sentences, pooled, tokens, states = [], [], [], []
    for batch in np.array_split(sample, max(1, len(sample) // 64)):
        with mixed_precision(device):
            sentence, hidden = (part.float().cpu() for part in model.states(targets.encoded.padded(batch, device)))
        taught = [torch.from_numpy(targets.states(int(index))).float() for index in batch]
        sentences.append(sentence)
        pooled.append(torch.stack([row.mean(0) for row in taught]))
        # One text in eight is enough for the tokens: there are many more of them.
        states.append(torch.cat(taught[::8]))
        tokens.append(torch.cat([row[: len(few)] for row, few in zip(hidden[::8], taught[::8], strict=True)]))
    _ridge(model.sentence_projection, torch.cat(sentences), torch.cat(pooled))
    _ridge(model.token_projection, torch.cat(tokens), torch.cat(states))


def _ridge(layer: nn.Linear, features: Tensor, targets: Tensor) -> None:
    extended = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    gram = extended.T @ extended
    gram += 1e-5 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram, extended.T @ targets.double()).to(layer.weight)
    layer.weight.copy_(weights[:-1].T)
    layer.bias.copy_(weights[-1])


def epoch_batches(lengths: Indices, tokens_per_batch: int, rng: np.random.Generator) -> list[Indices]:
    """Shuffle one epoch into batches of texts of similar length, each text once.

    Args:
        lengths: int64 (N,), tokens in each text.
        tokens_per_batch: Padded tokens in a batch, at most (a single longer text is a batch of its own).
        rng: Source of the order.

    Returns:
        int64 positions of each batch.
    """
    order = rng.permutation(len(lengths))  # 64 batches' worth of tokens are sorted by length together
    batches: list[list[int]] = []
    for chunk in np.array_split(order, max(1, int(lengths.sum()) // (64 * tokens_per_batch))):
        batches.append([])
        for text in chunk[np.argsort(lengths[chunk], kind="stable")].tolist():
            if bucket_of(int(lengths[text])) * (len(batches[-1]) + 1) > tokens_per_batch and batches[-1]:
                batches.append([])
            batches[-1].append(text)
    return [np.array(batches[position]) for position in rng.permutation(len(batches))]


def batch_stream(
    lengths: Indices, tokens_per_batch: int, seed: int, first_step: int, last_step: int
) -> Iterator[Indices]:
    """Give the positions of the texts of each step from ``first_step`` to before ``last_step``.

    The order of epoch e is drawn from (seed, e), so that a resumed run reads what a whole one reads.
    """
    step, epoch = 0, 0
    while step < last_step:
        batches = epoch_batches(lengths, tokens_per_batch, np.random.default_rng([seed, epoch]))
        yield from batches[max(0, first_step - step) : last_step - step]
        step, epoch = step + len(batches), epoch + 1


CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the parameters and their AdamW moments after ``step`` steps, in place of the last checkpoint."""
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state.get(parameter, {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(folder / CHECKPOINT, save(tensors | {"steps_done": torch.tensor(step)}))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill model and optimizer in place from a checkpoint; return the steps done, 0 if there is none."""
    if not (folder / CHECKPOINT).exists():
        return 0
    tensors = load_file(folder / CHECKPOINT)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        moments = {moment: tensors.get(f"{moment}.{name}") for moment in ("exp_avg", "exp_avg_sq", "step")}
        optimizer.state[parameter] = {
            moment: value.to(parameter.device) for moment, value in moments.items() if value is not None
        }
    return int(tensors["steps_done"])


def checkpoint_folder(config: PretrainConfig, targets: TeacherTargets) -> Path:
    """Name the checkpoint's folder: it lies in the cache, under everything that decides the student."""
    choices = dataclasses.asdict(config) | {"output_dir": str(config.output_dir.resolve())}
    del choices["checkpoint_every"], choices["overwrite"]  # a resumed run may change these
    encoded = targets.encoded
    key = fingerprint(choices, encoded.ids, encoded.types, encoded.offsets, targets.states(0))
    return cache_root() / "checkpoints" / key


def sentence_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cos between projected sentence representations and the teacher's embeddings.

    The cosine term of DistilBERT (Sanh et al., 2019), on float (B, d), the projected states and the pooled targets.
    """
    return (1.0 - F.cosine_similarity(predicted, target, dim=-1)).mean()


def token_loss(predicted: Tensor, target: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of 1 - cos between projected hidden states and the teacher's, over the real tokens of the batch.

    The cosine term of DistilBERT (Sanh et al., 2019), after a projection as TinyBERT's hidden-state loss has (Jiao et
    al., 2020, equation 8), on float (B, L, d).
    """
    distances = 1.0 - F.cosine_similarity(predicted, target, dim=-1)
    mask = attention_mask.to(distances.dtype)
    return (distances * mask).sum() / mask.sum()


def similarity_loss(predicted: Tensor, target: Tensor, temperature: float = 0.05) -> Tensor:
    """Match who is near whom in the batch (our derivation, in the manner of relational distillation).

    Every text's cosines to the others, divided by the temperature, are softmaxed; the loss is the mean over texts of
    KL(teacher || student).

    Args:
        predicted: float (B, d), B >= 1.
        target: float (B, d).
        temperature: Lower looks at nearer neighbours only; 0.05 is the scale that sentence encoders are trained with.

    Returns:
        A scalar >= 0, and 0 when there is no other text in the batch.
    """
    if len(predicted) < 2:
        return predicted.sum() * 0.0
    others = ~torch.eye(len(predicted), dtype=torch.bool, device=predicted.device)
    states = (F.normalize(part.float(), dim=-1) for part in (predicted, target))
    cosines = ((part @ part.T)[others].view(len(others), -1) for part in states)
    student, teacher = (torch.log_softmax(part / temperature, dim=-1) for part in cosines)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def train(
    model: GeneralStudent, targets: TeacherTargets, config: PretrainConfig, folder: Path, progress: Progress = SILENT
) -> None:
    """Train in place, from the checkpoint if there is one.

    Args:
        model: On the device to train on.
        targets: The labelled corpus.
        config: Steps, rate, batch and seed.
        folder: Of the checkpoint.
        progress: Shows the steps and records the losses.

    Raises:
        RunError: If a loss is not finite.
    """
    optimizer = _optimizer(model, config)
    first = load_checkpoint(folder, model, optimizer)
    stream = batch_stream(targets.encoded.lengths, config.tokens_per_batch, config.seed, first, config.steps)
    with progress.stage("general stage", config.steps) as advance:
        advance(first)
        for step, batch in enumerate(stream, start=first):
            losses = _step(model, optimizer, targets, batch, learning_rate(step, config))
            _check_and_log(losses, step, progress)
            advance(1)
            if (step + 1) % config.checkpoint_every == 0:
                save_checkpoint(folder, model, optimizer, step + 1)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Rate of a step: linear warm-up over 5 % of the steps, then linear decay to zero."""
    warm_up = max(1, math.ceil(0.05 * config.steps))
    rising = (step + 1) / warm_up
    falling = (config.steps - step) / max(1, config.steps - warm_up)
    return config.learning_rate * min(rising, falling, 1.0)


def _optimizer(model: GeneralStudent, config: PretrainConfig) -> torch.optim.AdamW:
    words = model.classifier.get_input_embeddings().weight
    matrices, vectors = (
        [p for p in model.parameters() if p is not words and (p.ndim > 1) == is_matrix] for is_matrix in (True, False)
    )
    groups = [  # most words are seen in few steps, so their vectors move faster
        {"params": [words], "weight_decay": 0.0, "relative_rate": 3.0},
        {"params": matrices, "weight_decay": 0.01, "relative_rate": 1.0},
        {"params": vectors, "weight_decay": 0.0, "relative_rate": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _step(
    model: GeneralStudent, optimizer: torch.optim.Optimizer, targets: TeacherTargets, batch: Indices, rate: float
) -> dict[str, Tensor]:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["relative_rate"]
    losses = step_losses(model, targets, batch)
    optimizer.zero_grad()
    losses["total"].backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses


def step_losses(model: GeneralStudent, targets: TeacherTargets, batch: Indices) -> dict[str, Tensor]:
    """Compare the student's states with the teacher's on a batch of B positions.

    Returns:
        The three losses and their sum as "total"; the similarity's gradient is the largest by far at equal weights.
    """
    device = next(model.parameters()).device
    inputs = targets.encoded.padded(batch, device)
    mask = inputs["attention_mask"]
    hidden = targets.padded_hidden(batch, mask.shape[1]).to(device).float()
    with mixed_precision(device):
        sentence, tokens = model(inputs)
    pooled = mean_pool(hidden, mask)
    losses = {
        "sentence": sentence_loss(sentence, pooled),
        "similarity": similarity_loss(sentence, pooled),
        "token": token_loss(tokens, hidden, mask),
    }
    return losses | {"total": losses["sentence"] + 0.05 * losses["similarity"] + losses["token"]}


def _check_and_log(losses: dict[str, Tensor], step: int, progress: Progress) -> None:
    if not losses["total"].isfinite():
        values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        raise RunError(f"the loss of step {step} is not finite ({values}); lower --learning-rate")
    if step % 50 == 0:
        progress.event("general stage", step=step, **{name: value.item() for name, value in losses.items()})


def save_student(model: GeneralStudent, tokenizer: Any, folder: Path) -> None:
    """Write the student without its projections, with the tokenizer that it shares with the teacher.

    The output layer is left out: ``AutoModelForSequenceClassification`` draws a fresh one for any number of labels.
    """
    classifier = model.classifier
    weights = {
        name: value.detach().to(torch.float16).cpu().contiguous()
        for name, value in classifier.state_dict().items()
        if not name.startswith("classifier.out_proj.")
    }
    atomic_write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    classifier.config.architectures = [type(classifier).__name__]
    # Stored in float16, loaded in float32: fine-tuning in half precision diverges.
    classifier.config.dtype = torch.float32
    classifier.config.save_pretrained(folder)
    fit_tokenizer(tokenizer, classifier.config, classifier.config.max_position_embeddings).save_pretrained(folder)


def _write_card(folder: Path, config: PretrainConfig, model: GeneralStudent, targets: TeacherTargets) -> None:
    """Write README.md: what the model is and how it was made."""
    words = ["l2a", "pretrain"]
    for name, value in (vars(config) | {"output_dir": config.output_dir.name}).items():
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            words += [] if item is None or item is False else [flag] if item is True else [flag, str(item)]
    parameters = sum(parameter.numel() for parameter in model.classifier.parameters())
    card = _CARD.format(command=shlex.join(words), parameters=parameters, texts=len(targets.encoded))
    atomic_write_text(folder / "README.md", card)


_CARD = """---
library_name: transformers
pipeline_tag: text-classification
---
# General student

A small sequence classifier without a task: its body was distilled, on unlabelled text, from the teacher's hidden states
(sentence embeddings, the batch's similarity matrix, token states). Its output layer is not part of the checkpoint;
`AutoModelForSequenceClassification.from_pretrained(folder, num_labels=...)` draws a fresh one to be trained.

    {command}

With a head of two classes it has {parameters} parameters. It read {texts} texts and variants of them.
"""


def pretrain(config: PretrainConfig, progress: Progress = SILENT) -> Path:
    """Distil a general student and write it; an interrupted run with the same settings continues exactly.

    Args:
        config: Settings of the run.
        progress: Shows the stages.

    Returns:
        The model's folder, ``config.output_dir``.

    Raises:
        RunError: If the run fails: a full disk, no network, a loss that is not finite.
        UsageError: If a text, a domain or the output folder cannot be used.
    """
    with output_folder(config.output_dir, "general student", config.overwrite) as folder:
        device, corpus = best_device(), read_corpus(config, progress)
        teacher = load_encoder(config.teacher, ("0", "1"), seed=0, progress=progress)
        targets = label_texts(teacher, corpus, config.max_length, device, progress)
        model, checkpoint = start_student(teacher, targets, config).to(device), checkpoint_folder(config, targets)
        train(model, targets, config, checkpoint, progress)
        save_student(model, teacher.tokenizer, folder)
        _write_card(folder, config, model, targets)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return config.output_dir
