"""Makes a text operator by its name, loading only what it reads."""

from collections.abc import Callable

from l2a.generator.eda import Eda
from l2a.generator.lexicons import load_glove, load_wordnet
from l2a.generator.rewrite import TextOperator, copy_bases, copy_partners
from l2a.generator.tinybert import CANDIDATES, MaskedCandidates, TinyBertAugmentation
from l2a.generator.token_rewriting import TokenRewriting, TokenSpace
from l2a.progress import SILENT, Progress


def build_operator(
    name: str,
    space: Callable[[], TokenSpace],
    masked: Callable[[], MaskedCandidates | None],
    progress: Progress = SILENT,
) -> TextOperator:
    """Make a text operator, loading only what it reads.

    Args:
        name: One of ``TEXT_OPERATORS``.
        space: Gives tokens, neighbours and gradients.
        masked: Gives a masked language model, or None where there is none.
        progress: Shows downloads.

    Returns:
        The operator.

    Raises:
        RunError: If a word list cannot be had.
        UsageError: If augpro_fgsm lacks its models.
    """
    if name == "source":
        return copy_partners
    if name == "target_only":
        return copy_bases
    if name == "eda":
        return Eda(load_wordnet(progress))
    if name == "tinybert":
        return TinyBertAugmentation(load_glove(CANDIDATES, progress), masked())
    return TokenRewriting(name, space())
