"""Which transitions an update learns from."""

import math
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch as th

from sb3_scratch_dqn.common.checks import check_flag, check_fraction, check_number, check_positive
from sb3_scratch_dqn.replay.observations import Array
from sb3_scratch_dqn.replay.sum_tree import SumTree

# Arguments of replay buffers that say how they sample
SAMPLER_SETTINGS = ("prioritized", "alpha", "beta", "beta_final", "epsilon")


class Ring(Protocol):
    """What a sampler needs to know of a buffer; the names are those of SB3's ``ReplayBuffer``."""

    pos: int
    full: bool
    buffer_size: int
    n_envs: int
    optimize_memory_usage: bool

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
    weights: Array


class Borrower(Protocol):
    """Keeps the priorities of a :class:`PrioritizedSampler` for a while, and changes them meanwhile."""

    def written(self, row: int) -> None:
        """New transitions have come into this row."""

    def give_back(self) -> tuple[Array, float]:
        """All values, float64, and the largest of them ever; they are the sampler's again."""


class Sampler(Protocol):
    """Chooses transitions of a ring, and is told what becomes of it.

    :param learns: whether what it is told of one batch changes what it draws for the next
    """

    learns: bool

    def draw(self, buffer: Ring, batch_size: int, n_batches: int = 1) -> Draw:
        """Choose ``batch_size`` transitions, and as many again for each further batch.

        :return: ``B = n_batches * batch_size`` transitions, those that as many calls would have chosen
        :raises ValueError: if the buffer is empty
        """

    def draw_envs(self, buffer: Ring, batch_size: int) -> Array:
        """Choose an environment for each of ``batch_size`` transitions whose rows somebody else chose."""

    def written(self, buffer: Ring, row: int) -> None:
        """A step of every environment was written into this row."""

    def update(self, rows: Array, envs: Array, priorities: th.Tensor) -> None:
        """The priorities of some transitions are known now, each ``(B,)``."""

    def set_progress(self, progress_remaining: float) -> None:
        """So much of the training is left, from 1 to 0."""

    def inherit(self, other: "Sampler", buffer: Ring) -> None:
        """Take the place of another sampler of this buffer, and learn what it knew."""

    def empty_copy(self) -> "Sampler":
        """One of the same kind that knows nothing yet."""

    def bytes_of(self, transitions: int) -> int:
        """The memory that it takes for so many transitions."""


def _refuse_empty(buffer: Ring) -> None:
    if buffer.size() == 0:
        raise ValueError("the replay buffer is empty: add transitions before sampling from it")


class UniformSampler:
    """Every transition is as likely as every other, with replacement.

    It draws from NumPy's global generator what SB3's ``ReplayBuffer`` draws, in the same order, so that both
    choose the same transitions from the same random state.
    """

    learns = False

    def draw(self, buffer: Ring, batch_size: int, n_batches: int = 1) -> Draw:
        """Choose ``n_batches`` times ``batch_size`` transitions.

        :raises ValueError: if the buffer is empty
        """
        _refuse_empty(buffer)
        size = n_batches * batch_size
        weights = np.ones(size, dtype=np.float32)
        if buffer.n_envs == 1 or n_batches == 1:
            # One call of NumPy's draws the same numbers as several do
            return Draw(self._draw_rows(buffer, size), self.draw_envs(buffer, size), weights)
        draws = [(self._draw_rows(buffer, batch_size), self.draw_envs(buffer, batch_size)) for _ in range(n_batches)]
        rows, envs = (np.concatenate(parts) for parts in zip(*draws, strict=True))
        return Draw(rows, envs, weights)

    def _draw_rows(self, buffer: Ring, size: int) -> Array:
        if buffer.optimize_memory_usage and buffer.full:
            # The observation at `pos` already belongs to the step that will be written there next
            return (np.random.randint(1, buffer.buffer_size, size=size) + buffer.pos) % buffer.buffer_size
        return np.random.randint(0, buffer.size(), size=size)

    def draw_envs(self, buffer: Ring, batch_size: int) -> Array:
        """Choose an environment for each of ``batch_size`` transitions."""
        if buffer.n_envs == 1:  # of one number there is nothing to draw, and NumPy's generator stays as it is
            return np.zeros(batch_size, dtype=np.int64)
        return np.random.randint(0, high=buffer.n_envs, size=(batch_size,))

    def written(self, buffer: Ring, row: int) -> None:
        """Nothing to remember."""

    def update(self, rows: Array, envs: Array, priorities: th.Tensor) -> None:
        """Nothing to remember."""

    def set_progress(self, progress_remaining: float) -> None:
        """Nothing changes."""

    def inherit(self, other: Sampler, buffer: Ring) -> None:
        """Nothing to learn."""

    def empty_copy(self) -> "UniformSampler":
        """There is nothing that it could know."""
        return self

    def bytes_of(self, transitions: int) -> int:
        """None."""
        return 0


DIVERGED = (
    "priorities must be finite, but some are not: training diverged (lower learning_rate), or env gave rewards or "
    "observations that are not finite (check_finite=True finds them)"
)

# For arrays and tensors of float64 alike
Numbers = TypeVar("Numbers", npt.NDArray[np.float64], th.Tensor)


def value_of(priorities: Numbers, epsilon: "float | Numbers", alpha: "float | Numbers") -> Numbers:
    """What transitions of these priorities count, ``(B,)``."""
    values: Numbers = (priorities + epsilon) ** alpha
    return values


def importance_weights(values: Numbers, beta: "float | Numbers") -> Numbers:
    """Weights of the losses of a batch, ``(B,)``, from what its transitions count."""
    weights: Numbers = (values.min() / values) ** beta
    return weights


class PrioritizedSampler:
    r"""Transitions by how much there is to learn from them (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

    A transition of priority :math:`p` has a probability :math:`P` in proportion to :math:`(p + \epsilon)^\alpha`
    and the importance weight :math:`(N P)^{-\beta}`, divided by the largest weight of its batch. A batch is stratified:
    one transition from each of ``B`` equal parts of the total. New transitions get the largest priority seen so far.

    :param n_envs: environments, the columns of the buffer
    :param alpha: from 0, uniform, to 1, in proportion to the priority
    :param beta: how much of the bias the weights undo at the beginning of training, from 0 to 1
    :param beta_final: and at the end
    :param epsilon: the priority of a transition from which there is nothing to learn
    """

    learns = True

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
        self._max_value = 1.0  # of (p + epsilon)**alpha
        self._tree = SumTree()
        self._borrower: Borrower | None = None

    @property
    def tree(self) -> SumTree:
        r"""What every transition counts, :math:`(p + \epsilon)^\alpha`."""
        self._call_back()
        return self._tree

    @property
    def max_value(self) -> float:
        """The largest value so far."""
        self._call_back()
        return self._max_value

    @max_value.setter
    def max_value(self, value: float) -> None:
        self._call_back()
        self._max_value = value

    def lend(self, borrower: Borrower) -> tuple[Array, float]:
        """Let somebody else keep the priorities, until the next time that anybody asks here.

        :return: all values, float64, and the largest so far
        """
        values = self.tree.values
        self._borrower = borrower
        return values, self._max_value

    def is_lent_to(self, borrower: Borrower) -> bool:
        """Whether somebody has the priorities."""
        return self._borrower is borrower

    def _call_back(self) -> None:
        if self._borrower is not None:
            borrower, self._borrower = self._borrower, None
            values, self._max_value = borrower.give_back()
            self._tree.reserve(len(values))
            self._tree.set(np.arange(len(values)), values)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the priorities, whoever has them."""
        self._call_back()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read also what was pickled before priorities could be lent."""
        state = {"_borrower": None, **state}
        for name in ("tree", "max_value"):
            if name in state:
                state[f"_{name}"] = state.pop(name)
        vars(self).update(state)

    @property
    def beta_now(self) -> float:
        """How much of the bias the weights undo at this point of the training."""
        return self.beta_final + self.progress_remaining * (self.beta - self.beta_final)

    def draw(self, buffer: Ring, batch_size: int, n_batches: int = 1) -> Draw:
        """Choose ``batch_size`` transitions.

        :param n_batches: must be 1: the priorities of one batch must be known before the next is drawn
        :raises ValueError: if the buffer is empty
        """
        assert n_batches == 1
        tree, parts = self.tree, self.draw_parts(buffer, batch_size)
        places = tree.find(parts)
        weights = importance_weights(tree.values.take(places), self.beta_now)
        rows, envs = (places, np.zeros_like(places)) if self.n_envs == 1 else np.divmod(places, self.n_envs)
        return Draw(rows, envs, weights.astype(np.float32))

    def draw_parts(self, buffer: Ring, batch_size: int, n_batches: int = 1) -> Array:
        """Choose a part of the total, from 0 to 1, for each of ``batch_size`` transitions, in ascending order.

        :param n_batches: for so many batches, what as many calls would draw
        :return: ``(n_batches * batch_size,)``
        :raises ValueError: if the buffer is empty
        """
        _refuse_empty(buffer)
        drawn = np.random.random_sample((n_batches, batch_size))
        parts: Array = ((np.arange(batch_size) + drawn) / batch_size).reshape(-1)
        return parts

    def draw_envs(self, buffer: Ring, batch_size: int) -> Array:
        """Choose an environment for each of ``batch_size`` transitions, all alike."""
        return np.random.randint(0, high=buffer.n_envs, size=(batch_size,))

    def written(self, buffer: Ring, row: int) -> None:
        """Give new transitions the largest priority."""
        if self._borrower is not None:
            self._borrower.written(row)
            return
        self._set_row(row, self.max_value)
        if buffer.optimize_memory_usage:
            # The observation in the row that follows was what came next here: its own transition is gone
            self._set_row((row + 1) % buffer.buffer_size, 0.0)

    def _set_row(self, row: int, value: float) -> None:
        end = (row + 1) * self.n_envs
        self.tree.reserve(end)
        self.tree.set(np.arange(row * self.n_envs, end), value)

    def update(self, rows: Array, envs: Array, priorities: th.Tensor) -> None:
        """Remember the priorities of some transitions, each ``(B,)``.

        :raises ValueError: if there is one that is no number, as after training diverged
        """
        values = value_of(priorities.cpu().double().numpy(), self.epsilon, self.alpha)
        largest = float(values.max())  # which is no number if any of them is none
        if not math.isfinite(largest):
            raise ValueError(DIVERGED)
        self.max_value = max(self.max_value, largest)
        self.tree.set(rows if self.n_envs == 1 else rows * self.n_envs + envs, values)

    def set_progress(self, progress_remaining: float) -> None:
        """Anneal ``beta``."""
        self.progress_remaining = progress_remaining

    def inherit(self, other: Sampler, buffer: Ring) -> None:
        """Take over the priorities; where there were none, all transitions are new."""
        if isinstance(other, PrioritizedSampler):
            self.progress_remaining = other.progress_remaining
        if isinstance(other, PrioritizedSampler) and (other.alpha == self.alpha or other.alpha > 0):
            # Stored are (p + epsilon)**alpha, with the other's alpha
            exponent = self.alpha / other.alpha if other.alpha != self.alpha else 1.0
            values = other.tree.values
            self.max_value = other.max_value**exponent
            self.tree.reserve(len(values))
            self.tree.set(np.arange(len(values)), np.where(values > 0, values**exponent, 0.0))
            return
        oldest = buffer.pos if buffer.full else 0
        for age in range(buffer.size()):
            self.written(buffer, (oldest + age) % buffer.buffer_size)

    def empty_copy(self) -> "PrioritizedSampler":
        """One with the same settings that knows no priorities."""
        other = PrioritizedSampler(self.n_envs, self.alpha, self.beta, self.beta_final, self.epsilon)
        other.progress_remaining = self.progress_remaining
        return other

    def bytes_of(self, transitions: int) -> int:
        """The memory of the tree, which may have room for twice as many values."""
        return 2 * transitions * self._tree.values.itemsize

    def settings(self) -> dict[str, float]:
        """What it is and knows, but for the priorities."""
        names = ("alpha", "beta", "beta_final", "epsilon", "progress_remaining", "max_value")
        return {name: float(getattr(self, name)) for name in names}

    def restore(self, settings: dict[str, float], values: Array, transitions: int) -> None:
        """Know what another sampler knew.

        :param settings: as :meth:`settings` gave them
        :param values: of its tree, ``(transitions,)``
        :param transitions: how many there are
        :raises ValueError: if there are other values than that, or some cannot be
        """
        if values.shape != (transitions,) or values.dtype != self.tree.values.dtype:
            raise ValueError(f"its array 'priorities' must be {transitions} numbers of dtype {self.tree.values.dtype}")
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
    """Make the sampler that settings ask for; the parameters are those of :class:`PrioritizedSampler`."""
    check_flag("prioritized", prioritized)
    return PrioritizedSampler(n_envs, alpha, beta, beta_final, epsilon) if prioritized else UniformSampler()
