"""Builds the student: one of the presets, or any checkpoint."""

from collections.abc import Callable, Mapping, Sequence

from l2a.errors import UsageError
from l2a.examples import TextInput
from l2a.randomness import seeded
from l2a.students.checkpoint import load_checkpoint
from l2a.students.config import StudentConfig
from l2a.students.factorised import build_factorised
from l2a.students.mean_pooled import build_mean_pooled
from l2a.students.narrow import build_narrow, build_scratch
from l2a.students.pruned import build_pruned
from l2a.students.pruned_narrow import build_pruned_narrow
from l2a.students.request import StudentRequest
from l2a.students.student import Student
from l2a.teacher.model import Teacher

PRESETS: Mapping[str, Callable[[StudentRequest], Student]] = {
    "auto": build_narrow,
    "narrow": build_narrow,
    "scratch": build_scratch,
    "pruned": build_pruned,
    "pruned_narrow": build_pruned_narrow,
    "factorised": build_factorised,
    "mean_pooled": build_mean_pooled,
}


def build_student(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], seed: int
) -> Student:
    """Build the student and check its size.

    Args:
        config: The preset or the checkpoint, and the largest share.
        teacher: Gives weights, vocabulary and the size to compare with.
        label_names: The C classes.
        texts: Texts of the domains, without labels: a pruned vocabulary keeps the tokens that they use.
        seed: Draws the weights that are not initialised from the teacher.

    Returns:
        The student in eval mode, on the CPU.

    Raises:
        UsageError: If the checkpoint has no tokenizer, the preset does not suit the teacher or the student is larger
            than allowed.
        RunError: If the checkpoint cannot be loaded.
    """
    with seeded(seed):
        if config.model is not None:
            student = load_checkpoint(config.model, label_names)
        else:
            student = PRESETS[config.preset](StudentRequest(teacher, label_names, texts, config.max_share))
    share = student.parameters_count / teacher.parameters_count
    if share > config.max_share:
        raise UsageError(
            f"student: {student.parameters_count:,} parameters are {share:.1%} of the teacher's "
            f"{teacher.parameters_count:,}; at most {config.max_share:.1%} is allowed (student.max_share)"
        )
    student.model.eval()
    return student
