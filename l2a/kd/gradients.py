"""Gradients of the distillation loss with respect to the student's word embeddings, for AugPro-FGSM."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.encoding import encode, inference_batches
from l2a.examples import TextInput
from l2a.kd.losses import soft_label_loss
from l2a.students.student import Student
from l2a.teacher.outputs import Labeller


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
    training, device = student.model.training, student.output.weight.device
    table = student.model.get_input_embeddings()
    student.model.eval()
    for indices in inference_batches(encoded):
        batch = encoded.padded(indices, device)
        embeds = table(batch.pop("input_ids")).detach().requires_grad_(True)
        logits, _ = student({**batch, "inputs_embeds": embeds})
        # The sum, not the mean, so that a text's gradient does not depend on its batch.
        loss = soft_label_loss(logits, torch.from_numpy(teacher_logits[indices]).to(device), 1.0) * len(indices)
        (gradient,) = torch.autograd.grad(loss, embeds)
        for row, index in enumerate(indices):
            gradients[index] = gradient[row, : encoded.lengths[index]].cpu().numpy()
    student.model.train(training)
    return gradients
