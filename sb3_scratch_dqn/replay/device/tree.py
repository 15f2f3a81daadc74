"""The priorities of a sampler on another device, where updates choose by them and change them without the host.

:class:`DeviceSumTree` is the twin of :class:`~sb3_scratch_dqn.replay.sum_tree.SumTree`. Given the same values and the
same parts of their total it finds the same indices; where a part falls between two values to the last bit, rounding may
choose the other one. Nothing in it depends on values in its shape, or waits for the host.
"""

from collections.abc import Callable

import numpy as np
import torch as th

from sb3_scratch_dqn.replay.device.ring import Outbox
from sb3_scratch_dqn.replay.observations import Array
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler, importance_weights, value_of

# Children of a node: a million values take four levels
WIDTH = 32

# New rows whose values are written at once
_ROWS_AT_ONCE = 16


class DeviceSumTree:
    """Values that are not negative, and their sums, all 0 to begin with.

    :param size: the number of values
    :param device: where they lie
    """

    def __init__(self, size: int, device: th.device) -> None:
        self.size = size
        # From the values up to a single node; each level is (parents, WIDTH), one row for each sum above it
        self.levels: list[th.Tensor] = []
        while not self.levels or len(self.levels[-1]) > 1:
            nodes = len(self.levels[-1]) if self.levels else size
            self.levels.append(th.zeros((-(-nodes // WIDTH), WIDTH), dtype=th.float64, device=device))
        self._positions = th.arange(WIDTH, device=device)
        self._until = (self._positions <= self._positions.unsqueeze(1)).double()  # (WIDTH, WIDTH)

    @property
    def values(self) -> th.Tensor:
        """All values, ``(size,)``."""
        return self.levels[0].view(-1)[: self.size]

    def fill(self, values: Array) -> None:
        """Set the first values, and all others to 0."""
        self.values.zero_()
        self.values[: len(values)].copy_(th.from_numpy(values))
        for children, parents in zip(self.levels, self.levels[1:], strict=False):
            parents.view(-1)[: len(children)].copy_(children.sum(dim=1))

    def set(self, indices: th.Tensor, values: th.Tensor) -> None:
        """Set some values; where an index comes twice, both values must be the same.

        :param indices: ``(B,)``
        :param values: ``(B,)``
        """
        self.levels[0].view(-1).index_copy_(0, indices, values)
        for children, parents in zip(self.levels, self.levels[1:], strict=False):
            indices = indices // WIDTH
            parents.view(-1).index_copy_(0, indices, children.index_select(0, indices).sum(dim=1))

    def find(self, parts: th.Tensor) -> th.Tensor:
        """Find the index at which the running sum of the values first exceeds a part of the total.

        :param parts: ``(B,)``, each from 0 to 1, in ascending order
        :return: ``(B,)``, in ascending order, never the index of a value of 0
        """
        nodes = th.zeros_like(parts, dtype=th.int64)
        sums = parts * self._running(self.levels[-1])[0, -1]
        for level in reversed(self.levels):
            children = level.index_select(0, nodes)  # (B, WIDTH)
            running = self._running(children)
            # A node's sum and that of its children may differ by rounding: what lies beyond belongs to the last of them
            total = running[:, -1]
            sums = th.minimum(sums, total.nextafter(th.zeros_like(total)))
            found = (running > sums.unsqueeze(1)).to(th.uint8).argmax(dim=1)
            sums = sums - (children * (self._positions < found.unsqueeze(1))).sum(dim=1)
            nodes = nodes * WIDTH + found
        return nodes

    def _running(self, children: th.Tensor) -> th.Tensor:
        """Running sums of each row, ``(B, WIDTH)``.

        Each is summed up in the same order, as that of a running sum by many threads is not. So a value of 0 lifts
        nothing, not even by rounding, and the result is the same each time.
        """
        return (children.unsqueeze(1) * self._until).sum(dim=2)


class DevicePriorities:
    """What a :class:`PrioritizedSampler` knows, for as long as it lends it.

    :param rows: of the buffer
    :param n_envs: number of environments
    :param vacates: whether the row that follows a new one loses its transitions, as with shared observations
    :param device: where the priorities are to lie
    """

    def __init__(self, rows: int, n_envs: int, vacates: bool, device: th.device) -> None:
        self.tree = DeviceSumTree(rows * n_envs, device)
        self.max_value = th.ones((), dtype=th.float64, device=device)
        self.diverged = th.zeros((), dtype=th.bool, device=device)  # whether a priority was no number
        self.play: Callable[[], object] = self.write  # or a recording of it
        self._n_envs, self._vacates = n_envs, vacates
        self._used = 0  # values that may be other than 0
        self._new_rows: list[int] = []
        size = _ROWS_AT_ONCE * n_envs
        self._outbox = Outbox((size,), th.int64, device)
        self._new_places = th.zeros(size, dtype=th.int64, device=device)

    def follow(self, sampler: PrioritizedSampler) -> None:
        """Know what the sampler knows: borrow its priorities, or give new transitions the largest one."""
        if sampler.is_lent_to(self):
            self._write_new_rows()
            return
        values, max_value = sampler.lend(self)
        self._new_rows = []
        self._used = min(len(values), self.tree.size)
        self.tree.fill(values[: self._used])
        self.max_value.fill_(max_value)

    def written(self, row: int) -> None:
        """New transitions have come into ``row``."""
        self._new_rows.append(row)

    def give_back(self) -> tuple[Array, float]:
        """All values, float64, and the largest of them ever."""
        self._write_new_rows()
        return self.tree.values[: self._used].cpu().numpy(), self.max_value.item()

    def _write_new_rows(self) -> None:
        rows, self._new_rows = self._new_rows, []
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[begin : begin + _ROWS_AT_ONCE]
            some += some[-1:] * (_ROWS_AT_ONCE - len(some))  # always as many; the last one again is nothing new
            places = np.add.outer(np.array(some) * self._n_envs, np.arange(self._n_envs)).reshape(-1)
            self._outbox.open()[:] = places
            self._outbox.send(self._new_places)
            self.play()
            self._used = min(max(self._used, int(places.max()) + 1 + self._vacates * self._n_envs), self.tree.size)

    def write(self) -> None:
        """Give new transitions the largest priority; can be recorded."""
        places = self._new_places
        self.tree.set(places, self.max_value.expand(len(places)))
        if self._vacates:
            # What an earlier row vacates, the next one fills
            gone = (places[-self._n_envs :] + self._n_envs) % self.tree.size
            self.tree.set(gone, th.zeros_like(gone, dtype=th.float64))

    def draw(self, parts: th.Tensor, beta: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Choose transitions.

        :param parts: as :meth:`PrioritizedSampler.draw_parts` gives them, ``(B,)``
        :param beta: how much of the bias the weights undo
        :return: their places, ``row * n_envs + env``, and their weights, each ``(B,)``
        """
        places = self.tree.find(parts)
        weights = importance_weights(self.tree.values.index_select(0, places), beta)
        return places, weights.float()

    def update(self, places: th.Tensor, priorities: th.Tensor, epsilon: th.Tensor, alpha: th.Tensor) -> None:
        """Remember the priorities of some transitions; if one is no number, only that there was one.

        :param places: as :meth:`draw` gave them, ``(B,)``
        :param priorities: ``(B,)``
        :param epsilon: of the sampler
        :param alpha: likewise
        """
        values = value_of(priorities.double(), epsilon, alpha)
        bad = ~values.isfinite().all()
        self.diverged.logical_or_(bad)
        self.max_value.copy_(th.where(bad, self.max_value, th.maximum(self.max_value, values.max())))
        # Of a transition that comes twice the last priority counts
        values = values.index_select(0, th.searchsorted(places, places, right=True) - 1)
        self.tree.set(places, th.where(bad, self.tree.values.index_select(0, places), values))
