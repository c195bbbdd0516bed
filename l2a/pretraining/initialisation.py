"""Starts the general student near the teacher, in closed form, before any gradient step (our derivation).

Word vectors are the principal components of each word's average state in the teacher; attention starts as a mean over
all tokens; and the projections into the teacher's space are fitted by ridge regression. On sentences, this start is
already nearer to the teacher than some hundred gradient steps from small random values.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2a.precision import mixed_precision
from l2a.pretraining.model import GeneralStudent, sentence_representation
from l2a.pretraining.shape import StudentShape
from l2a.pretraining.targets import TeacherTargets
from l2a.randomness import seeded
from l2a.students.attention import start_by_averaging

WORDS_PER_CHUNK = 4096
FITTED_TEXTS = 6000


def build_student(vectors: torch.Tensor, pad_token_id: int, shape: StudentShape, seed: int) -> nn.Module:
    """Create a student that starts by averaging given word vectors.

    Args:
        vectors: float32 (V, e), from ``principal_word_vectors``.
        pad_token_id: The padding token of the vocabulary.
        shape: Size of the student.
        seed: Draws every other weight.

    Returns:
        An ``ElectraForSequenceClassification`` with two labels and dropout 0.
    """
    from transformers import ElectraConfig, ElectraForSequenceClassification

    config = ElectraConfig(
        vocab_size=len(vectors),
        embedding_size=shape.embedding_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=pad_token_id,
    )
    with seeded(seed), torch.no_grad():
        student: Any = ElectraForSequenceClassification(config)
        student.electra.embeddings.word_embeddings.weight.copy_(vectors)
        # Inputs of unit variance: with the usual 0.02 the projection behind would have to be large and fragile.
        nn.init.normal_(student.classifier.dense.weight, std=shape.hidden_size**-0.5)
        start_by_averaging(student.electra)
    # On processors the fused attention's backward pass in bfloat16 is several times slower than plain products.
    student.set_attn_implementation("eager")
    return student  # type: ignore[no-any-return]


@torch.inference_mode()
def isolated_word_states(encoder: nn.Module, tokenizer: Any) -> NDArray[np.float32]:
    """Read every vocabulary entry through the teacher, on its own between the special tokens.

    Args:
        encoder: A transformers encoder.
        tokenizer: Its tokenizer.

    Returns:
        float32 (V, d), the last hidden state of each word.
    """
    device = next(encoder.parameters()).device
    ids = torch.arange(encoder.get_input_embeddings().num_embeddings, device=device)  # type: ignore[operator]
    first, last = (torch.full_like(ids, value) for value in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    inputs = torch.stack([first, ids, last], dim=1)
    parts = [encoder(part).last_hidden_state[:, 1] for part in torch.split(inputs, WORDS_PER_CHUNK)]
    return np.asarray(torch.cat(parts).float().cpu().numpy(), dtype=np.float32)


def average_word_states(targets: TeacherTargets, isolated: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average each word's state over its places in the corpus; its isolated state counts as two places.

    Args:
        targets: The labelled corpus.
        isolated: float32 (V, d), which is all there is for words that the corpus lacks.

    Returns:
        float32 (V, d).
    """
    sums, counts = torch.from_numpy(2.0 * isolated), np.full(len(isolated), 2.0, np.float32)
    position = 0
    for part in targets.hidden:
        for start in range(0, len(part), WORDS_PER_CHUNK * 16):
            states = np.array(part[start : start + WORDS_PER_CHUNK * 16])
            ids = targets.encoded.ids[position + start : position + start + len(states)].astype(np.int64)
            sums.index_add_(0, torch.from_numpy(ids), torch.from_numpy(states).float())
            counts += np.bincount(ids, minlength=len(counts)).astype(np.float32)
        position += len(part)
    return np.asarray(sums.numpy() / counts[:, None], dtype=np.float32)


@torch.inference_mode()
def fit_projections(model: GeneralStudent, targets: TeacherTargets, seed: int) -> None:
    """Fit both projections to the teacher by ridge regression on a sample of texts.

    Args:
        model: The student, changed in place.
        targets: The labelled corpus.
        seed: Draws the sample.
    """
    rng = np.random.default_rng([seed, 2])
    sample = rng.choice(len(targets.encoded), min(FITTED_TEXTS, len(targets.encoded)), replace=False)
    sample = sample[np.argsort(targets.encoded.lengths[sample], kind="stable")]
    features: list[list[torch.Tensor]] = [[], [], [], []]
    for batch in np.array_split(sample, max(1, len(sample) // 64)):
        for kept, new in zip(features, _states_of_batch(model, targets, batch), strict=True):
            kept.append(new)
    sentence, pooled, token, states = (torch.cat(parts) for parts in features)
    _ridge(model.sentence_projection, sentence, pooled)
    _ridge(model.token_projection, token, states)


def _states_of_batch(
    model: GeneralStudent, targets: TeacherTargets, batch: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    device = next(model.parameters()).device
    inputs = targets.encoded.padded(batch, device)
    with mixed_precision(device):
        hidden = model.classifier.electra(**inputs).last_hidden_state  # type: ignore[operator]
        sentence = sentence_representation(model.classifier, hidden)
    rows = [torch.from_numpy(targets.states(int(index))).float() for index in batch]
    # One text in eight is enough for the tokens: there are many more of them.
    token = torch.cat([hidden[row, : len(states)].float().cpu() for row, states in enumerate(rows) if row % 8 == 0])
    pooled = torch.stack([states.mean(0) for states in rows])
    return sentence.float().cpu(), pooled, token, torch.cat(rows[::8])


def _ridge(layer: nn.Linear, features: torch.Tensor, targets: torch.Tensor) -> None:
    extended = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    gram = extended.T @ extended
    gram += 1e-5 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram, extended.T @ targets.double()).to(layer.weight)
    layer.weight.copy_(weights[:-1].T)
    layer.bias.copy_(weights[-1])
