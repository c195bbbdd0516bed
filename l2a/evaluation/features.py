"""Features of the baselines: tf-idf blocks, bags of token vectors, and how the two sides of a pair are joined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from l2a.examples import TextInput

SMALL = 200

EmbedTexts = Callable[[Sequence[str]], NDArray[np.float32]]
"""Embeds N strings as float32 (N, d)."""


@dataclass(frozen=True)
class TfidfFeatures:
    """Fitted tf-idf weights of words, word pairs, and character n-grams inside words.

    Attributes:
        words: 1- and 2-grams of words.
        characters: 2- to 5-grams of characters that do not cross a word's end.
    """

    words: TfidfVectorizer
    characters: TfidfVectorizer

    def __call__(self, inputs: Sequence[TextInput]) -> sparse.csr_matrix:
        """Compute the features of texts.

        Args:
            inputs: N texts, all single or all pairs.

        Returns:
            float32 (N, F), sparse; for pairs, the words of both sides, the words that they share, and their cosine
            similarities by words and by characters.
        """
        words, characters = self._blocks(self.words, inputs), self._blocks(self.characters, inputs)
        if len(words) == 1:
            return sparse.hstack([*words, *characters], format="csr")
        # What the sides share tells more than what they are, and all character n-grams of both would cost too much.
        shared = [first.multiply(second) for first, second in (words, characters)]
        cosines = [sparse.csr_matrix(block.sum(axis=1)) for block in shared]
        return sparse.hstack([*words, shared[0], *cosines], format="csr", dtype=np.float32)

    @staticmethod
    def _blocks(vectorizer: TfidfVectorizer, inputs: Sequence[TextInput]) -> list[sparse.csr_matrix]:
        return [vectorizer.transform([text[side] for text in inputs]) for side in range(len(inputs[0]))]


def fit_tfidf(inputs: Sequence[TextInput]) -> TfidfFeatures:
    """Collect the vocabulary and the document frequencies of texts, without their labels.

    Args:
        inputs: Training texts; above 200, n-grams that only one of them holds are dropped.

    Returns:
        The fitted features.
    """
    texts = [side for text in inputs for side in text]
    minimum = 2 if len(texts) > SMALL else 1
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=minimum, dtype=np.float32)
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=minimum, dtype=np.float32
    )
    return TfidfFeatures(words.fit(texts), characters.fit(texts))


def pair_features(inputs: Sequence[TextInput], embed: EmbedTexts) -> NDArray[np.float32]:
    """Embed texts, joining the sides of a pair as [u; v; |u - v|; u * v] (Conneau et al., 2017).

    Args:
        inputs: N texts, all single or all pairs.
        embed: Embeds single strings.

    Returns:
        float32 (N, d) for single texts, (N, 4 d) for pairs.
    """
    first = embed([text[0] for text in inputs])
    if len(inputs[0]) == 1:
        return first
    second = embed([text[1] for text in inputs])
    return np.concatenate([first, second, np.abs(first - second), first * second], axis=1)
