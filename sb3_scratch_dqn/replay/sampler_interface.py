"""The interface of samplers, which choose the transitions of an update and their importance weights."""

from typing import NamedTuple, Protocol

import torch as th

from sb3_scratch_dqn.replay.observations import Array


class RingBuffer(Protocol):
    """The attributes of a replay buffer that samplers use; names as in SB3's ``ReplayBuffer``."""

    pos: int
    full: bool
    buffer_size: int
    n_envs: int
    optimize_memory_usage: bool

    def size(self) -> int:
        """Return the number of filled rows."""


class Draw(NamedTuple):
    """``B`` sampled transitions.

    :param rows: rows of the buffer, ``(B,)``
    :param envs: environments, ``(B,)``
    :param weights: importance weights, ``(B,)``
    """

    rows: Array
    envs: Array
    weights: Array


class PriorityOwner(Protocol):
    """Owns the priorities of a :class:`PrioritizedSampler` until the sampler next uses them, and may change them."""

    def on_write(self, row: int) -> None:
        """Handle new transitions in a row."""

    def release(self) -> tuple[Array, float]:
        """Return the priorities to the sampler: all values, float64, and the largest value so far."""


class Sampler(Protocol):
    """Samples transitions of a ring buffer.

    :param uses_priorities: True if the priorities of one batch change how the next is sampled
    """

    uses_priorities: bool

    def draw(self, buffer: RingBuffer, batch_size: int, n_batches: int = 1) -> Draw:
        """Sample one or several batches.

        :param buffer: the buffer
        :param batch_size: transitions in a batch
        :param n_batches: number of batches, concatenated
        :return: ``B = n_batches * batch_size`` transitions, the same that ``n_batches`` calls would sample
        :raises ValueError: if the buffer is empty
        """

    def draw_envs(self, buffer: RingBuffer, batch_size: int) -> Array:
        """Sample an environment for each of ``batch_size`` transitions of given rows, ``(batch_size,)``."""

    def on_write(self, buffer: RingBuffer, row: int) -> None:
        """Handle a step of every environment that was written into ``row``."""

    def update(self, rows: Array, envs: Array, priorities: th.Tensor) -> None:
        """Set the priorities of transitions; each argument is ``(B,)``."""

    def set_progress(self, progress_remaining: float) -> None:
        """Set the remaining fraction of training, from 1 to 0."""

    def copy_priorities_from(self, other: "Sampler", buffer: RingBuffer) -> None:
        """Copy the priorities of another sampler of the same buffer."""

    def empty_copy(self) -> "Sampler":
        """Return a sampler with the same settings and no priorities."""

    def bytes_of(self, transitions: int) -> int:
        """Return the bytes that the sampler takes for this number of transitions."""
