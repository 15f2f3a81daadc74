"""Warn if the returns of the environment leave the support of C51.

Returns outside of the support are clipped to its ends: values saturate there, and training continues without an error.
"""

import math
import warnings

import numpy as np
from jaxtyping import Shaped

from sb3_scratch_dqn.values.heads import CategoricalHead

# Number of episodes with returns outside of the support before the warning, so that the suggested support does not rest
# on one of them
_EPISODES = 10


class SupportMonitor:
    """Compute the discounted returns of all steps, and warn once if they leave the support.

    It warns after 10 episodes with returns that exceed the support by more than half the distance of two atoms.

    :param head: the head whose support is checked
    :param n_envs: number of environments
    """

    def __init__(self, head: CategoricalHead, n_envs: int) -> None:
        self.head = head
        self._rewards: list[list[float]] = [[] for _ in range(n_envs)]  # of the current episodes
        self._lowest, self._highest = math.inf, -math.inf
        self._lowest_reward, self._highest_reward = math.inf, -math.inf
        self._episodes_outside = 0
        self._warned = False

    def step(self, rewards: Shaped[np.ndarray, "n_envs"], dones: Shaped[np.ndarray, "n_envs"], gamma: float) -> None:
        """Record one step of every environment.

        :param rewards: rewards of the step
        :param dones: whether the episode ended
        :param gamma: discount of one step
        """
        if self._warned:
            return
        for env, (reward, done) in enumerate(zip(rewards.tolist(), dones.tolist(), strict=True)):
            self._rewards[env].append(reward)
            if done:
                self._end_episode(self._rewards[env], gamma)
                self._rewards[env] = []

    def _end_episode(self, rewards: list[float], gamma: float) -> None:
        """Compute the return of each step of an episode; those of a truncated episode are incomplete."""
        lowest, highest, value = math.inf, -math.inf, 0.0
        for reward in reversed(rewards):
            value = reward + gamma * value
            lowest, highest = min(lowest, value), max(highest, value)
        if not math.isfinite(lowest + highest):  # no support contains these returns
            return
        self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)
        self._lowest_reward = min(self._lowest_reward, *rewards)
        self._highest_reward = max(self._highest_reward, *rewards)
        # Half the distance of two atoms is the head's resolution
        margin = (self.head.v_max - self.head.v_min) / (self.head.n_outputs - 1) / 2
        if lowest < self.head.v_min - margin or highest > self.head.v_max + margin:
            self._episodes_outside += 1
        if self._episodes_outside == _EPISODES and not self._warned:
            self._warn(gamma)

    def _warn(self, gamma: float) -> None:
        self._warned = True
        low, high = min(self._lowest, self.head.v_min), max(self._highest, self.head.v_max)
        bounds = ""
        if gamma < 1:
            ends = (min(self._lowest_reward, 0.0) / (1 - gamma), max(self._highest_reward, 0.0) / (1 - gamma))
            bounds = (
                f"; with rewards from {self._lowest_reward:.4g} to {self._highest_reward:.4g}, all returns are between "
                f"v_min={ends[0]:.4g} and v_max={ends[1]:.4g}"
            )
        warnings.warn(
            f"head_kwargs=dict(v_min={self.head.v_min:.4g}, v_max={self.head.v_max:.4g}) does not contain the returns, "
            f"which were {self._lowest:.4g} to {self._highest:.4g} (discounted) so far: values outside are clipped. "
            f"head_kwargs=dict(v_min={_round_down(low):.4g}, v_max={-_round_down(-high):.4g}) would contain "
            f"them{bounds}",
            stacklevel=2,
        )


def _round_down(value: float) -> float:
    """Round down to two significant digits."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    return math.floor(value / unit + 1e-9) * unit
