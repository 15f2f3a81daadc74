"""Whether the support of C51 holds the returns of the environment.

What lies outside of it is clipped to its ends: values stay there, and training goes on as if nothing was wrong.
"""

import math
import warnings

from sb3_scratch_dqn.replay.observations import Array
from sb3_scratch_dqn.values.heads import CategoricalHead

# Episodes with returns outside of the support before it is said, so that the range that is suggested is no single case
_EPISODES = 10


class SupportMonitor:
    """Follows the discounted returns of all steps, and warns once if some lie outside of the support.

    :param head: whose support it is
    :param n_envs: number of environments
    """

    def __init__(self, head: CategoricalHead, n_envs: int) -> None:
        self.head = head
        self._rewards: list[list[float]] = [[] for _ in range(n_envs)]  # of the current episodes
        self._lowest, self._highest = math.inf, -math.inf
        self._lowest_reward, self._highest_reward = math.inf, -math.inf
        self._episodes_outside = 0
        self._told = False

    def step(self, rewards: Array, dones: Array, gamma: float) -> None:
        """Take in one step of every environment.

        :param rewards: ``(n_envs,)``
        :param dones: whether its episode ended, ``(n_envs,)``
        :param gamma: discount of one step
        """
        if self._told:
            return
        for env, (reward, done) in enumerate(zip(rewards.tolist(), dones.tolist(), strict=True)):
            self._rewards[env].append(reward)
            if done:
                self._end_episode(self._rewards[env], gamma)
                self._rewards[env] = []

    def _end_episode(self, rewards: list[float], gamma: float) -> None:
        """Compute the return of each step of an episode; a truncated one may have had larger ones."""
        lowest = highest = value = 0.0
        for reward in reversed(rewards):
            value = reward + gamma * value
            lowest, highest = min(lowest, value), max(highest, value)
        self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)
        self._lowest_reward = min(self._lowest_reward, *rewards)
        self._highest_reward = max(self._highest_reward, *rewards)
        # Half the distance of two atoms is the error that the head makes anyway
        margin = (self.head.v_max - self.head.v_min) / (self.head.n_outputs - 1) / 2
        if lowest < self.head.v_min - margin or highest > self.head.v_max + margin:
            self._episodes_outside += 1
        if self._episodes_outside == _EPISODES and not self._told:
            self._tell(gamma)

    def _tell(self, gamma: float) -> None:
        self._told = True
        low, high = min(self._lowest, self.head.v_min), max(self._highest, self.head.v_max)
        bounds = ""
        if gamma < 1:
            ends = (min(self._lowest_reward, 0.0) / (1 - gamma), max(self._highest_reward, 0.0) / (1 - gamma))
            bounds = (
                f"; with rewards from {self._lowest_reward:.4g} to {self._highest_reward:.4g}, no return can leave "
                f"v_min={ends[0]:.4g}, v_max={ends[1]:.4g}"
            )
        warnings.warn(
            f"head_kwargs=dict(v_min={self.head.v_min:.4g}, v_max={self.head.v_max:.4g}) does not hold the returns, "
            f"which were {self._lowest:.4g} to {self._highest:.4g} (discounted) so far: values outside are clipped. "
            f"head_kwargs=dict(v_min={_below(low):.4g}, v_max={-_below(-high):.4g}) would hold these{bounds}",
            stacklevel=2,
        )


def _below(value: float) -> float:
    """Round down to two digits."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    return math.floor(value / unit + 1e-9) * unit
