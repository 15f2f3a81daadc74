"""Uniform and prioritized sampling."""

import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch as th

from sb3_scratch_dqn.common.checks import check_bool, check_fraction, check_number, check_positive
from sb3_scratch_dqn.replay.observations import Array
from sb3_scratch_dqn.replay.sampler_interface import Draw, PriorityOwner, RingBuffer, Sampler
from sb3_scratch_dqn.replay.sum_tree import SumTree

# Arguments of ScratchReplayBuffer that select and configure the sampler
SAMPLER_SETTINGS = ("prioritized", "alpha", "beta", "beta_final", "epsilon")


def _check_not_empty(buffer: RingBuffer) -> None:
    if buffer.size() == 0:
        raise ValueError("the replay buffer is empty: add transitions before sampling from it")


class UniformSampler:
    """Samples all transitions with equal probability, with replacement.

    It draws the same numbers from NumPy's global generator as SB3's ``ReplayBuffer``, in the same order. So both sample
    the same transitions given the same random state.
    """

    uses_priorities = False

    def draw(self, buffer: RingBuffer, batch_size: int, n_batches: int = 1) -> Draw:
        """Sample ``n_batches`` times ``batch_size`` transitions; parameters as in :class:`Sampler`.

        :raises ValueError: if the buffer is empty
        """
        _check_not_empty(buffer)
        size = n_batches * batch_size
        weights = np.ones(size, dtype=np.float32)
        if buffer.n_envs == 1 or n_batches == 1:
            # One call of NumPy's generator draws the same numbers as several calls
            return Draw(self._draw_rows(buffer, size), self.draw_envs(buffer, size), weights)
        draws = [(self._draw_rows(buffer, batch_size), self.draw_envs(buffer, batch_size)) for _ in range(n_batches)]
        rows, envs = (np.concatenate(parts) for parts in zip(*draws, strict=True))
        return Draw(rows, envs, weights)

    def _draw_rows(self, buffer: RingBuffer, size: int) -> Array:
        if buffer.optimize_memory_usage and buffer.full:
            # The observation at `pos` already belongs to the next step to be written
            return (np.random.randint(1, buffer.buffer_size, size=size) + buffer.pos) % buffer.buffer_size
        return np.random.randint(0, buffer.size(), size=size)

    def draw_envs(self, buffer: RingBuffer, batch_size: int) -> Array:
        """Sample an environment for each of ``batch_size`` transitions, ``(batch_size,)``."""
        if buffer.n_envs == 1:  # with one environment, NumPy's generator draws nothing either
            return np.zeros(batch_size, dtype=np.int64)
        return np.random.randint(0, high=buffer.n_envs, size=(batch_size,))

    def on_write(self, buffer: RingBuffer, row: int) -> None:
        """Do nothing: uniform sampling keeps no state."""

    def update(self, rows: Array, envs: Array, priorities: th.Tensor) -> None:
        """Do nothing: uniform sampling keeps no state."""

    def set_progress(self, progress_remaining: float) -> None:
        """Do nothing: uniform sampling does not change during training."""

    def copy_priorities_from(self, other: Sampler, buffer: RingBuffer) -> None:
        """Do nothing: uniform sampling uses no priorities."""

    def empty_copy(self) -> "UniformSampler":
        """Return this sampler, which has no state."""
        return self

    def bytes_of(self, transitions: int) -> int:
        """Return 0: uniform sampling keeps no state."""
        return 0


DIVERGED = (
    "priorities must be finite, but some are not: training diverged (lower learning_rate), or env gave rewards or "
    "observations that are not finite (check_finite=True finds them)"
)

# float64 arrays or tensors
Numbers = TypeVar("Numbers", npt.NDArray[np.float64], th.Tensor)


def scaled_priorities(priorities: Numbers, epsilon: "float | Numbers", alpha: "float | Numbers") -> Numbers:
    r"""Return :math:`(p + \epsilon)^\alpha` of priorities, ``(B,)``, to which probabilities are proportional."""
    values: Numbers = (priorities + epsilon) ** alpha
    return values


def importance_weights(values: Numbers, beta: "float | Numbers") -> Numbers:
    """Return the importance weights of a batch, ``(B,)``, from its scaled priorities, ``(B,)``."""
    weights: Numbers = (values.min() / values) ** beta
    return weights


class PrioritizedSampler:
    r"""Samples transitions by priority (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

    A transition of priority :math:`p` has a probability :math:`P` proportional to :math:`(p + \epsilon)^\alpha`, its
    scaled priority, and the importance weight :math:`(N P)^{-\beta}`, divided by the largest weight of its batch.
    Sampling is stratified: a batch has one transition from each of ``B`` equal parts of the total. New transitions get
    the largest priority seen so far.

    :param n_envs: number of environments
    :param alpha: exponent of the priorities, from 0 (uniform) to 1 (proportional)
    :param beta: exponent of the importance weights at the beginning of training, from 0 (none) to 1 (unbiased)
    :param beta_final: exponent of the importance weights at the end of training; linear in between
    :param epsilon: added to every priority, above 0
    :raises ValueError: if an argument is out of range
    """

    uses_priorities = True

    def __init__(
        self, n_envs: int, alpha: float = 0.6, beta: float = 0.4, beta_final: float = 1.0, epsilon: float = 1e-6
    ) -> None:
        check_fraction("alpha", alpha)
        check_fraction("beta", beta)
        check_fraction("beta_final", beta_final)
        check_number("epsilon", epsilon)
        check_positive("epsilon", epsilon)
        self.n_envs = n_envs
        self.alpha = alpha
        self.beta = beta
        self.beta_final = beta_final
        self.epsilon = epsilon
        self.progress_remaining = 1.0
        self._max_value = 1.0  # the largest scaled priority so far
        self._tree = SumTree()
        self._owner: PriorityOwner | None = None

    @property
    def tree(self) -> SumTree:
        """The scaled priorities of all transitions, at index ``row * n_envs + env``."""
        self._reclaim()
        return self._tree

    @property
    def max_value(self) -> float:
        """The largest scaled priority so far."""
        self._reclaim()
        return self._max_value

    @max_value.setter
    def max_value(self, value: float) -> None:
        self._reclaim()
        self._max_value = value

    def transfer_to(self, owner: PriorityOwner) -> tuple[Array, float]:
        """Transfer the priorities to another owner, until this sampler next uses them.

        :param owner: the new owner
        :return: all scaled priorities, float64, and the largest so far
        """
        values = self.tree.values
        self._owner = owner
        return values, self._max_value

    def is_owned_by(self, owner: PriorityOwner) -> bool:
        """Return True if the priorities were transferred to ``owner`` and this sampler has not used them since."""
        return self._owner is owner

    def _reclaim(self) -> None:
        """Take the priorities back from their owner, if there is one."""
        if self._owner is not None:
            owner, self._owner = self._owner, None
            values, self._max_value = owner.release()
            self._tree.reserve(len(values))
            self._tree.set(np.arange(len(values)), values)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the priorities, after taking them back from their owner."""
        self._reclaim()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied sampler; older pickles have other attribute names."""
        state = {"_owner": None, **state}
        state.pop("_borrower", None)  # always None
        for name in ("tree", "max_value"):
            if name in state:
                state[f"_{name}"] = state.pop(name)
        vars(self).update(state)

    @property
    def beta_now(self) -> float:
        """The current exponent of the importance weights."""
        return self.beta_final + self.progress_remaining * (self.beta - self.beta_final)

    def draw(self, buffer: RingBuffer, batch_size: int, n_batches: int = 1) -> Draw:
        """Sample ``batch_size`` transitions; parameters as in :class:`Sampler`.

        :param n_batches: must be 1, because the next batch depends on the priorities of this one
        :raises ValueError: if the buffer is empty
        """
        assert n_batches == 1
        tree, fractions = self.tree, self.draw_fractions(buffer, batch_size)
        indices = tree.find(fractions)
        weights = importance_weights(tree.values.take(indices), self.beta_now)
        rows, envs = (indices, np.zeros_like(indices)) if self.n_envs == 1 else np.divmod(indices, self.n_envs)
        return Draw(rows, envs, weights.astype(np.float32))

    def draw_fractions(self, buffer: RingBuffer, batch_size: int, n_batches: int = 1) -> Array:
        """Draw stratified fractions of the total of all scaled priorities, which :meth:`SumTree.find` takes.

        Parameters as in :class:`Sampler`; several batches get the same fractions as that many calls would draw.

        :return: ``(n_batches * batch_size,)``, from 0 to 1, ascending in each batch
        :raises ValueError: if the buffer is empty
        """
        _check_not_empty(buffer)
        drawn = np.random.random_sample((n_batches, batch_size))
        fractions: Array = ((np.arange(batch_size) + drawn) / batch_size).reshape(-1)
        return fractions

    def draw_envs(self, buffer: RingBuffer, batch_size: int) -> Array:
        """Sample an environment for each of ``batch_size`` transitions with equal probability, ``(batch_size,)``."""
        return np.random.randint(0, high=buffer.n_envs, size=(batch_size,))

    def on_write(self, buffer: RingBuffer, row: int) -> None:
        """Set the priorities of the new transitions in ``row`` to the largest so far."""
        if self._owner is not None:
            self._owner.on_write(row)
            return
        self._set_row(row, self.max_value)
        if buffer.optimize_memory_usage:
            # This write replaced the observation in the following row, so the transition there is no longer valid
            self._set_row((row + 1) % buffer.buffer_size, 0.0)

    def _set_row(self, row: int, value: float) -> None:
        end = (row + 1) * self.n_envs
        self.tree.reserve(end)
        self.tree.set(np.arange(row * self.n_envs, end), value)

    def update(self, rows: Array, envs: Array, priorities: th.Tensor) -> None:
        """Set the priorities of transitions; each argument is ``(B,)``.

        :raises ValueError: if a priority is not finite, for example after training diverged
        """
        values = scaled_priorities(priorities.cpu().double().numpy(), self.epsilon, self.alpha)
        largest = float(values.max())  # not finite if any value is not
        if not math.isfinite(largest):
            raise ValueError(DIVERGED)
        self.max_value = max(self.max_value, largest)
        self.tree.set(rows if self.n_envs == 1 else rows * self.n_envs + envs, values)

    def set_progress(self, progress_remaining: float) -> None:
        """Set the remaining fraction of training, 1 to 0, on which :attr:`beta_now` depends."""
        self.progress_remaining = progress_remaining

    def copy_priorities_from(self, other: Sampler, buffer: RingBuffer) -> None:
        """Copy the priorities of another sampler; if it has none, all transitions get the priority of new ones."""
        if isinstance(other, PrioritizedSampler):
            self.progress_remaining = other.progress_remaining
        if isinstance(other, PrioritizedSampler) and (other.alpha == self.alpha or other.alpha > 0):
            # The tree has (p + epsilon)**other.alpha
            exponent = self.alpha / other.alpha if other.alpha != self.alpha else 1.0
            values = other.tree.values
            self.max_value = other.max_value**exponent
            self.tree.reserve(len(values))
            self.tree.set(np.arange(len(values)), np.where(values > 0, values**exponent, 0.0))
            return
        oldest = buffer.pos if buffer.full else 0
        for age in range(buffer.size()):
            self.on_write(buffer, (oldest + age) % buffer.buffer_size)

    def empty_copy(self) -> "PrioritizedSampler":
        """Return a sampler with the same settings and no priorities."""
        other = PrioritizedSampler(self.n_envs, self.alpha, self.beta, self.beta_final, self.epsilon)
        other.progress_remaining = self.progress_remaining
        return other

    def bytes_of(self, transitions: int) -> int:
        """Return the bytes of the tree, which may be allocated for twice as many transitions."""
        return 2 * transitions * self._tree.values.itemsize

    def settings(self) -> dict[str, float]:
        """Return all settings and state except the priorities, for a file."""
        names = ("alpha", "beta", "beta_final", "epsilon", "progress_remaining", "max_value")
        return {name: float(getattr(self, name)) for name in names}

    def restore(self, settings: dict[str, float], values: Array, transitions: int) -> None:
        """Load the state of another sampler from a file.

        :param settings: the settings that its :meth:`settings` returned
        :param values: the scaled priorities of its tree, ``(transitions,)``
        :param transitions: number of transitions in the buffer
        :raises ValueError: if shape, dtype or values are invalid
        """
        if values.shape != (transitions,) or values.dtype != self.tree.values.dtype:
            raise ValueError(
                f"its array 'priorities' has shape {values.shape} and dtype {values.dtype}, "
                f"but must have shape {(transitions,)} and dtype {self.tree.values.dtype}"
            )
        max_value, progress_remaining = settings["max_value"], settings["progress_remaining"]
        if not (np.isfinite(values).all() and (values >= 0).all() and 0 < max_value < np.inf):
            raise ValueError("its array 'priorities' must be finite numbers of at least 0")
        if transitions > 0 and not values.any():
            raise ValueError("its array 'priorities' must not be all 0")
        check_number("progress_remaining", progress_remaining)
        self.max_value, self.progress_remaining = max_value, progress_remaining
        self.tree.reserve(transitions)
        self.tree.set(np.arange(transitions), values)


def make_sampler(
    n_envs: int,
    prioritized: bool = False,
    alpha: float = 0.6,
    beta: float = 0.4,
    beta_final: float = 1.0,
    epsilon: float = 1e-6,
) -> Sampler:
    """Create a :class:`PrioritizedSampler` if ``prioritized`` is true, else a :class:`UniformSampler`.

    :param n_envs: number of environments
    :param prioritized: whether to sample by priority; uniform sampling ignores the parameters below
    :param alpha: exponent of the priorities
    :param beta: exponent of the importance weights at the beginning of training
    :param beta_final: exponent of the importance weights at the end of training
    :param epsilon: added to every priority
    :return: the sampler
    :raises ValueError: if an argument is invalid
    """
    check_bool("prioritized", prioritized)
    return PrioritizedSampler(n_envs, alpha, beta, beta_final, epsilon) if prioritized else UniformSampler()
