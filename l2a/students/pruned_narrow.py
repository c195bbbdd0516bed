"""A narrow BERT over the part of the teacher's vocabulary that the domains use: fewer tokens, wider and more layers."""

from l2a.students.narrow import fresh_bert, start_from_words
from l2a.students.request import StudentRequest
from l2a.students.student import Student
from l2a.students.vocabulary import (
    choose_tokens,
    count_tokens,
    keep_tokens,
    needed_tokens,
    refuse_other_tokenizers,
)
from l2a.teacher.labelling import token_vectors

VOCABULARY_SHARE = 1 / 4
"""Part of the teacher's vocabulary that is kept."""


def build_pruned_narrow(request: StudentRequest) -> Student:
    """Build a narrow BERT that starts by averaging the teacher's vectors of the tokens that it keeps.

    Args:
        request: The student wanted.

    Returns:
        The student, of twice the layers that a narrow one with all tokens has.

    Raises:
        UsageError: If the vocabulary is not WordPiece, or if the budget does not hold the student.
    """
    full = request.teacher.tokenizer
    refuse_other_tokenizers(full, "pruned_narrow")
    counts = count_tokens(full, request.texts)
    size = max(int(VOCABULARY_SHARE * len(full)), int(needed_tokens(full, counts).sum()))
    kept = choose_tokens(full, counts, size)
    tokenizer = keep_tokens(full, kept)
    student = Student(fresh_bert(request, "pruned_narrow", tokenizer, 2 * request.layers), tokenizer)
    start_from_words(student, token_vectors(request.teacher)[kept], request.of_pairs)
    return student
