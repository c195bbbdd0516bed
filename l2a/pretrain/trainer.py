"""General distillation: a small student learns a teacher's states of unlabelled text, and a killed run goes on exactly.

The teacher reads each batch while it is trained on, so that a run needs no room for states, however long the text is.
"""

import shlex
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from l2a.config import Count, Length, Positive, Seed
from l2a.data import Bank, domains, encoding, examples, load_domain, read_bank
from l2a.kd.data import Batch, join_encoded
from l2a.student.student import NO_DROPOUT, Student, attention_heads, classifier_of, start_from_words
from l2a.teacher.labelling import token_vectors
from l2a.teacher.model import Teacher, load_encoder, mean_pool
from l2a.util import SILENT, Allowed, Checked, Progress, RunError, files, training

BATCH_SIZE = 128
Width = Annotated[int, Allowed("an even number of at least 2", lambda value: value >= 2 and value % 2 == 0)]
Texts = Annotated[tuple[str, ...], Allowed("--text with a file, a folder or a domain, once or more", len)]


@dataclass(frozen=True)
class PretrainConfig(Checked):
    """Settings of the general stage; the student is an ELECTRA, whose word embeddings are narrower than its layers.

    Attributes:
        output_dir: Folder of the finished student.
        text: What ``read_bank`` reads: files, folders, domains, Hub ids.
        protect: Domains whose texts the student must never see, whatever their split.
        teacher: "minilm-l6", a folder, or a Hub id: a pretrained encoder.
        steps: Optimizer steps.
        seed: Of the student's first weights, the choice of texts and the order of the batches.
        max_length: Longest input in tokens.
        learning_rate: Peak rate; 5 % of the steps warm up, then it falls linearly to zero.
        embedding_size: Width of the word embeddings.
        hidden_size: Width of the layers; a feed-forward block is four times as wide.
        layers: Number of layers.
        overwrite: Replace a finished student in the output folder.
    """

    output_dir: Path
    text: Texts
    protect: tuple[str, ...] = ()
    teacher: str = "minilm-l6"
    steps: Count = 4000
    seed: Seed = 0
    max_length: Length = 128
    learning_rate: Positive = 8e-4
    embedding_size: Count = 80
    hidden_size: Width = 128
    layers: Count = 2
    overwrite: bool = False


def read_texts(config: PretrainConfig, progress: Progress = SILENT) -> Bank:
    """Read the text of a run, without the protected domains' texts and near copies of them.

    Raises:
        UsageError: If a file or domain cannot be read, or nothing is left.
        RunError: If a domain cannot be fetched.
    """
    protected = [load_domain(name, progress=progress, flag=domains.OF_A_CARD) for name in config.protect]
    texts = [text for domain in protected for part in (domain.train, domain.dev) for text in part.inputs]
    words = examples.held_out_words(texts).union(*(domain.test.words for domain in protected))
    return read_bank(config.text, is_pair=False, progress=progress, held_out_words=words)


def encode_texts(bank: Bank, tokenizer: Any, config: PretrainConfig) -> encoding.EncodedTexts:
    """Tokenise as many texts as the steps can read, and, for a quarter of them, the pair with the text that follows."""
    rng = np.random.default_rng([config.seed, 1])
    rows = rng.permutation(len(bank))[: config.steps * BATCH_SIZE].tolist()
    texts = [bank[row] for row in rows]
    pairs = [bank[row] + bank[(row + 1) % len(bank)] for row in rows[::4]]
    return join_encoded([encoding.encode(tokenizer, part, config.max_length) for part in (texts, pairs)])


class GeneralStudent(torch.nn.Module):
    """What is trained of a sequence classifier: all but its output layer, through two projections that are dropped."""

    def __init__(self, classifier: Any, teacher_width: int) -> None:
        """Add projections from the classifier's width to the teacher's, d."""
        super().__init__()
        self.body, self.dense = classifier.base_model, classifier.classifier.dense
        self.sentence_projection = torch.nn.Linear(self.dense.out_features, teacher_width)
        self.token_projection = torch.nn.Linear(self.dense.out_features, teacher_width)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Project what the output layer reads, to float32 (B, d), and the last hidden states, to float32 (B, L, d)."""
        hidden = self.body(**batch).last_hidden_state
        sentence = torch.nn.functional.gelu(self.dense(hidden[:, 0]))
        return self.sentence_projection(sentence).float(), self.token_projection(hidden).float()


def make_classifier(teacher: Teacher, config: PretrainConfig) -> Any:
    """Make the student, without dropout, that starts as a mean over the teacher's vectors of the words.

    Raises:
        UsageError: If its word embeddings are wider than the teacher.
    """
    from transformers import ElectraConfig

    shape = ElectraConfig(
        vocab_size=len(teacher.tokenizer), embedding_size=config.embedding_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.layers, num_attention_heads=attention_heads(config.hidden_size),
        intermediate_size=4 * config.hidden_size, pad_token_id=teacher.tokenizer.pad_token_id,
        max_position_embeddings=max(256, encoding.bucket_of(config.max_length)), **NO_DROPOUT,
    )  # fmt: skip
    student = Student(classifier_of(shape), teacher.tokenizer)
    start_from_words(student, token_vectors(teacher), of_pairs=False)
    # On CPUs the fused attention's backward pass in bfloat16 is several times slower than plain products.
    student.model.set_attn_implementation("eager")
    return student.model


def cosine_distance(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos between projected states and the teacher's, float (N, d).

    The cosine term of DistilBERT (Sanh et al., 2019), after a projection as TinyBERT's hidden-state loss has (Jiao et
    al., 2020, equation 8).
    """
    return (1.0 - torch.nn.functional.cosine_similarity(predicted, target, dim=-1)).mean()


def similarity_loss(predicted: torch.Tensor, target: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
    """Match who is near whom in the batch (our derivation, in the manner of relational distillation).

    Every text's cosines to the others, divided by the temperature, are softmaxed; the loss is the mean over texts of
    KL(teacher || student), and 0 when there is no other text in the batch.

    Args:
        predicted: float (B, d), B >= 1.
        target: float (B, d).
        temperature: Lower looks at nearer neighbours only; 0.05 is the scale that sentence encoders are trained with.
    """
    if len(predicted) < 2:
        return predicted.sum() * 0.0
    others = ~torch.eye(len(predicted), dtype=torch.bool, device=predicted.device)
    states = (torch.nn.functional.normalize(part, dim=-1) for part in (predicted, target))
    cosines = ((part @ part.T)[others].view(len(others), -1) for part in states)
    student, teacher = (torch.log_softmax(part / temperature, dim=-1) for part in cosines)
    return torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distillation_losses(model: GeneralStudent, teacher: Teacher, batch: Batch) -> dict[str, torch.Tensor]:
    """Compare the student's states of a padded batch with the teacher's.

    Returns:
        The three losses and their sum as "total"; the similarity's gradient is the largest by far at equal weights.
    """
    mask = batch["attention_mask"]
    with training.mixed_precision(mask.device):
        with torch.no_grad():
            taught = teacher.encoder(**encoding.model_inputs(teacher.encoder.config, batch)).last_hidden_state.float()
        sentence, tokens = model(batch)
    pooled, is_token = mean_pool(taught, mask), mask.bool()
    losses = {"sentence": cosine_distance(sentence, pooled), "similarity": similarity_loss(sentence, pooled)}
    losses["token"] = cosine_distance(tokens[is_token], taught[is_token])
    return losses | {"total": losses["sentence"] + 0.05 * losses["similarity"] + losses["token"]}


def train(
    model: GeneralStudent, teacher: Teacher, encoded: encoding.EncodedTexts, config: PretrainConfig,
    progress: Progress = SILENT,
) -> None:  # fmt: skip
    """Train in place, on the teacher's device, from the checkpoint of the progress if it has one; losses are recorded.

    Raises:
        RunError: If a loss is not finite.
    """
    words = model.body.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not words]
    # Most words are seen in few steps, so their vectors move faster.
    groups = [([words], 3 * config.learning_rate), (others, config.learning_rate)]
    schedule = training.linear_schedule(training.adamw(groups), config.steps, warmup_share=0.05)
    read = (encoded.ids, encoded.types, encoded.offsets)
    key = files.fingerprint(teacher.fingerprint(), training.arithmetic(words.device), *read)
    loop = training.Loop(progress.checkpoint, key, schedule, config.steps)
    # The order of an epoch is drawn from its number, so that a resumed run reads what a whole one reads.
    rngs = (np.random.default_rng([config.seed, 2, epoch]) for epoch in count())
    epochs = (encoding.training_batches(encoded.lengths, BATCH_SIZE, rng) for rng in rngs)
    with progress.stage("general stage", config.steps) as advance:
        for step, batch in enumerate(loop.left(chain.from_iterable(epochs), advance), start=loop.done + 1):
            losses = distillation_losses(model, teacher, encoded.padded(batch, words.device))
            if not losses["total"].isfinite():
                values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
                few = encoding.first_texts(teacher.tokenizer, encoded.padded(batch[:3])["input_ids"])
                where = f"in the batch that begins with {few}"
                raise RunError(f"the loss of step {step} is not finite ({values}), {where}; lower --learning-rate")
            loop.update(losses["total"], model.parameters())
            if step % 50 == 0:
                progress.event("general stage", step=step, **{name: value.item() for name, value in losses.items()})


def pretrain(config: PretrainConfig, progress: Progress = SILENT) -> Path:
    """Distil a general student, write it and return its folder, ``config.output_dir``.

    An interrupted run with the same settings continues exactly.

    Raises:
        RunError: If the run fails: a full disk, no network, a loss that is not finite.
        UsageError: If a text, a domain or the output folder cannot be used.
    """
    with files.output_folder(config.output_dir, "general student", config.overwrite) as folder:
        settings = asdict(config) | {"output_dir": None, "overwrite": None}
        progress = progress.keeping(files.Checkpoint(config.output_dir / files.CHECKPOINT, settings))
        bank = read_texts(config, progress)
        progress.say(bank.summary)
        training.keep_freed_memory()
        teacher = load_encoder(config.teacher, ("0", "1"), seed=0, progress=progress).to(training.best_device())
        encoding.refuse_long_sequences(f"teacher {config.teacher!r}", teacher.positions, config.max_length)
        with training.seeded(config.seed):
            classifier = make_classifier(teacher, config)
            model = GeneralStudent(classifier, teacher.hidden_size).to(training.best_device())
        longest = classifier.config.max_position_embeddings
        tokenizer = encoding.fit_tokenizer(teacher.tokenizer, classifier.config, longest)
        train(model, teacher, encode_texts(bank, tokenizer, config), config, progress)
        # Without the output layer: AutoModelForSequenceClassification draws a fresh one for any number of classes.
        weights = {name: value for name, value in classifier.state_dict().items() if "out_proj" not in name}
        classifier.save_pretrained(folder, state_dict={name: value.half() for name, value in weights.items()})
        (folder / "model.safetensors").chmod(0o644)  # which safetensors makes private
        encoding.fit_tokenizer(tokenizer, classifier.config).save_pretrained(folder)
        files.atomic_write_text(folder / "README.md", _card(config, classifier.num_parameters(), len(bank)))
    return config.output_dir


def _card(config: PretrainConfig, parameters: int, texts: int) -> str:
    words = ["l2a", "pretrain"]
    for name, value in (vars(config) | {"output_dir": config.output_dir.name, "overwrite": ()}).items():
        for item in value if isinstance(value, tuple) else (value,):
            words += [f"--{name.replace('_', '-')}", str(item)]
    card = Path(__file__).with_name("card.md").read_text("utf-8")
    return card.format(command=shlex.join(words), parameters=f"{parameters:,}", texts=f"{texts:,}")
