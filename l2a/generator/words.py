"""The words of a text, for operators that replace, insert, swap or delete whole words.

Only runs of two letters or more count. Numbers, marks, user names, bracketed tokens such as "[SEP]" and what an
apostrophe or a hyphen joins stay as they are, so that no operator touches what a model reads as a special token.
"""

import re
from collections.abc import Sequence

from l2a.examples import TextInput

WORD = re.compile(r"(?<![\w'\u2019@#/\[\-])[^\W\d_]{2,}(?![\w'\u2019@/\]\-])")

Span = tuple[int, int]
"""First and past-the-last character of a word in its side of the text."""


def find_words(side: str) -> list[Span]:
    """Find the words of one side that may change.

    Args:
        side: The text.

    Returns:
        Their places, in order.
    """
    return [match.span() for match in WORD.finditer(side)]


def replace_spans(side: str, spans: Sequence[Span], replacements: Sequence[str]) -> str:
    """Write new words into their places; every other character stays.

    Args:
        side: The text.
        spans: Places that do not overlap, in order.
        replacements: One text for each.

    Returns:
        The changed text.
    """
    parts, end = [], 0
    for (start, stop), replacement in zip(spans, replacements, strict=True):
        parts += [side[end:start], replacement]
        end = stop
    return "".join([*parts, side[end:]])


def in_the_case_of(word: str, replacement: str) -> str:
    """Give a replacement the capitals of the word that it replaces.

    Args:
        word: The word in the text.
        replacement: In any case.

    Returns:
        The replacement, in capitals or with a first capital as the word has them.
    """
    if word.isupper():
        return replacement.upper()
    return replacement[:1].upper() + replacement[1:] if word[:1].isupper() else replacement


def count_words(text_input: TextInput) -> int:
    """Count what blanks separate: the base of the share of words that an operator changed.

    Args:
        text_input: One or two strings.

    Returns:
        Words of all sides, at least 1.
    """
    return max(1, sum(len(side.split()) for side in text_input))
