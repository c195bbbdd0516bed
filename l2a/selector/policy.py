"""A learned policy, free of the library that trained it."""

from dataclasses import dataclass

import torch

from l2a.selector.network import CandidateNetwork
from l2a.selector.numerics import Floats


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy that can score the candidates of any pool.

    Attributes:
        network: The shared network.
        feature_names: Columns of the candidates' fixed features that it was trained on, in order.
        agent: Name of the card that trained it.
    """

    network: CandidateNetwork
    feature_names: tuple[str, ...]
    agent: str

    @torch.no_grad()
    def logits(self, observations: Floats) -> Floats:
        """Score batches of candidates.

        Args:
            observations: float32 (E, B * candidate_width + state_width), see ``Episodes.observe``.

        Returns:
            float32 (E, B), logits of the probability to keep each candidate.
        """
        scores: Floats = self.network(torch.from_numpy(observations))[0].numpy()
        return scores
