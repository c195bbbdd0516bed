"""What a run of the chains has brought in: candidates, and the counts for the diagnostics."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.generator.chain import ChainStep
from l2a.generator.diagnostics import effective_sample_size
from l2a.generator.labelled import FORBIDDEN, LabelledTexts
from l2a.generator.lifted import MOVES, LiftedStates


@dataclass(frozen=True)
class Candidate:
    """One text of the pool and how it was made.

    Attributes:
        row: Of the text among the labelled texts.
        base: Index of the base text, source texts first.
        operator: Index into ``OPERATORS``.
        degree: Share of changed tokens.
    """

    row: int
    base: int
    operator: int
    degree: float


class Harvest:
    """Collects different texts from the chains' states.

    Attributes:
        candidates: By normalised hash, in the order of the first visit.
        steps: Steps seen.
    """

    def __init__(
        self, initial: LiftedStates, labelled: LabelledTexts, excluded_hashes: AbstractSet[str], size: int
    ) -> None:
        """Start before the first step.

        Args:
            initial: The states that the chains start in, drawn from the base law.
            labelled: The texts of the rows.
            excluded_hashes: Normalised hashes of texts that are no candidates, though the chains may visit them.
            size: Candidates wanted.
        """
        self.candidates: dict[str, Candidate] = {}
        self.steps = 0
        self._labelled, self._excluded, self._size = labelled, excluded_hashes, size
        self._rows = initial.row
        self._plain_rows = [initial.row]
        self._sampled_rows: list[NDArray[np.int64]] = []
        self._offered = np.zeros(len(MOVES), dtype=np.int64)
        self._accepted = np.zeros(len(MOVES), dtype=np.int64)

    @property
    def is_full(self) -> bool:
        """Whether all candidates wanted have been found."""
        return len(self.candidates) >= self._size

    def count(self, step: ChainStep[LiftedStates]) -> None:
        """Count what a step offered and accepted.

        Args:
            step: Of all chains.
        """
        moves, proposed = step.proposal.moves, step.proposal.states.row
        changes_text = proposed != self._rows
        self._offered += np.bincount(moves[changes_text], minlength=len(MOVES))
        self._accepted += np.bincount(moves[changes_text & step.accepted], minlength=len(MOVES))
        self._plain_rows.append(proposed[moves == MOVES.index("jump")])
        self._rows = step.states.row
        self.steps += 1

    def collect(self, states: LiftedStates) -> int:
        """Take the texts that the chains are in.

        Args:
            states: Of all chains, after the burn-in.

        Returns:
            How many of them are new candidates.
        """
        before = len(self.candidates)
        self._sampled_rows.append(states.row)
        for row, base, operator, degree in zip(
            states.row.tolist(), states.base.tolist(), states.operator.tolist(), states.degree.tolist(), strict=True
        ):
            if row == FORBIDDEN or self.is_full:
                continue
            key = self._labelled.hashes[row]
            if key not in self._excluded:
                self.candidates.setdefault(key, Candidate(row, base, operator, degree))
        return len(self.candidates) - before

    def acceptance(self) -> dict[str, float]:
        """Return the accepted share, by kind of move, of the proposals that would have changed the text."""
        shares = self._accepted / np.maximum(self._offered, 1)
        return dict(zip(MOVES, shares.tolist(), strict=True))

    def plain_log_density(self) -> float:
        """Return the mean log density of the draws from the base law: the starts and all jumps proposed."""
        return _finite_mean(self._labelled.densities(np.concatenate(self._plain_rows)))

    def sample_log_density(self) -> float:
        """Return the mean log density of the chains' samples."""
        return _finite_mean(self._labelled.densities(np.concatenate(self._sampled_rows)))

    def effective_sample_size(self) -> float:
        """Return the effective sample size of the log density over all chains."""
        trace = np.stack([self._labelled.densities(rows) for rows in self._sampled_rows])
        allowed = np.isfinite(trace).all(axis=0)
        return effective_sample_size(trace[:, allowed]) if allowed.any() else 0.0

    def distinct_share(self) -> float:
        """Return the share of different texts among the chains' samples."""
        rows = np.concatenate(self._sampled_rows)
        return len(np.unique(rows)) / len(rows)


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
