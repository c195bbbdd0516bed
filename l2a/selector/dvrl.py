"""DVRL (Yoon, Arik and Pfister, ICML 2020) as an on-policy algorithm of Stable-Baselines3."""

import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional as F

from l2a.selector.whole_episodes import WholeEpisodes

HIGHEST_MEAN = 0.9
PENALTY = 1000.0


def dvrl_loss(logits: Tensor, kept: Tensor, counts: Tensor, advantages: Tensor) -> Tensor:
    """Loss of the data value estimator for whole episodes, averaged over them (Yoon et al., equation 8 and code).

    Args:
        logits: float32 (T, E, B) of the probability p to keep each candidate.
        kept: float32 (T, E, B), 1 where it was sampled as kept.
        counts: float32 (T, E), 1 for the steps that belong to the episode.
        advantages: float32 (E,), what each episode gained beyond the model that was trained on everything.

    Returns:
        Scalar: advantage * BCE_sum(p, kept) + 1000 * [relu(mean p - 0.9) + relu(0.1 - mean p)].
    """
    entropies = F.binary_cross_entropy_with_logits(logits, kept, reduction="none").sum(dim=2)
    mean = (torch.sigmoid(logits).mean(dim=2) * counts).sum() / counts.sum()
    outside = F.relu(mean - HIGHEST_MEAN) + F.relu(1.0 - HIGHEST_MEAN - mean)
    return ((entropies * counts).sum(dim=0) * advantages).mean() + PENALTY * outside


class DVRL(WholeEpisodes):
    """REINFORCE over one whole episode of each environment an update, against a fixed baseline.

    The baseline is what keeping everything gains. The paper's estimator also reads |y - y_val|; here
    the candidates' features hold KL(p_T || p_S) in its place (our adaptation), and an episode stands for the paper's
    batch. There is no critic; rewards must come in nats.
    """

    def train(self) -> None:
        """Take one step on the loss of the first episode of each environment."""
        assert isinstance(self.env, VecEnv)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        buffer = self.rollout_buffer
        in_first = self.in_first_episode()
        gains = (buffer.rewards * in_first).sum(axis=0) - self.env.get_attr("gains_of_everything")[0]
        seen = torch.from_numpy(buffer.observations).flatten(0, 1)
        logits = self.policy.mlp_extractor.forward_actor(seen).reshape(buffer.actions.shape)
        kept, counts = torch.from_numpy(buffer.actions).float(), torch.from_numpy(in_first).float()
        loss = dvrl_loss(logits, kept, counts, torch.from_numpy(gains).float())
        self.policy.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.policy.optimizer.step()
        self.logger.record("train/loss", loss.item())
        self.logger.record("train/gain_over_everything", float(gains.mean()))
