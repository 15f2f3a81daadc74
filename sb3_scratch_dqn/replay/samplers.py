"""Which transitions an update learns from."""

from typing import NamedTuple, Protocol

import numpy as np
import torch as th

from sb3_scratch_dqn.replay.stores import Array


class Ring(Protocol):
    """What a sampler needs to know of a buffer; the names are those of SB3's ``ReplayBuffer``."""

    pos: int
    full: bool
    buffer_size: int
    n_envs: int
    optimize_memory_usage: bool
    device: th.device

    def size(self) -> int:
        """Rows filled."""


class Draw(NamedTuple):
    """``B`` transitions of a buffer.

    :param rows: their rows, ``(B,)``
    :param envs: their environments, ``(B,)``
    :param weights: their importance weights, ``(B,)``
    """

    rows: Array
    envs: Array
    weights: th.Tensor


class UniformSampler:
    """Every transition is as likely as every other, with replacement.

    It draws from NumPy's global generator what SB3's ``ReplayBuffer`` draws, in the same order, so that both
    choose the same transitions from the same random state.
    """

    def draw(self, buffer: Ring, batch_size: int) -> Draw:
        """Choose ``batch_size`` transitions.

        :raises ValueError: if the buffer is empty
        """
        if buffer.size() == 0:
            raise ValueError("the replay buffer is empty: add transitions before sampling from it")
        if buffer.optimize_memory_usage and buffer.full:
            # The observation at `pos` already belongs to the step that will be written there next
            rows = (np.random.randint(1, buffer.buffer_size, size=batch_size) + buffer.pos) % buffer.buffer_size
        else:
            rows = np.random.randint(0, buffer.size(), size=batch_size)
        return Draw(rows, self.draw_envs(buffer, batch_size), th.ones(batch_size, device=buffer.device))

    @staticmethod
    def draw_envs(buffer: Ring, batch_size: int) -> Array:
        """Choose an environment for each of ``batch_size`` transitions."""
        return np.random.randint(0, high=buffer.n_envs, size=(batch_size,))
