"""Losses of the general stage: the student's states against the pretrained teacher's, without any label."""

import torch
import torch.nn.functional as F


def sentence_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos between projected sentence representations and the teacher's embeddings.

    The cosine term of DistilBERT (Sanh et al., 2019), here on pooled states.

    Args:
        predicted: float (B, d), the student's representation after its projection.
        target: float (B, d), the teacher's mean-pooled last hidden states.

    Returns:
        A scalar in [0, 2].
    """
    return (1.0 - F.cosine_similarity(predicted, target, dim=-1)).mean()


def token_loss(predicted: torch.Tensor, target: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos between projected hidden states and the teacher's, over the real tokens of the batch.

    The cosine term of DistilBERT (Sanh et al., 2019), after a projection as TinyBERT's hidden-state loss has (Jiao et
    al., 2020, equation 8).

    Args:
        predicted: float (B, L, d).
        target: float (B, L, d).
        attention_mask: int64 (B, L), 1 for real tokens.

    Returns:
        A scalar in [0, 2].
    """
    distances = 1.0 - F.cosine_similarity(predicted, target, dim=-1)
    mask = attention_mask.to(distances.dtype)
    return (distances * mask).sum() / mask.sum()


def similarity_loss(predicted: torch.Tensor, target: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
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
    student, teacher = (_log_neighbours(states, temperature) for states in (predicted, target))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _log_neighbours(states: torch.Tensor, temperature: float) -> torch.Tensor:
    normalised = F.normalize(states.float(), dim=-1)
    count = len(states)
    others = ~torch.eye(count, dtype=torch.bool, device=states.device)
    cosines = (normalised @ normalised.T)[others].view(count, count - 1)
    return torch.log_softmax(cosines / temperature, dim=-1)
