"""Priorities on another device, where updates sample by them and set them without the host.

:class:`DeviceSumTree` is the counterpart of :class:`~sb3_scratch_dqn.replay.sum_tree.SumTree`. Given the same values
and fractions it finds the same indices, except where a fraction lies within rounding error of the boundary between two
values. No shape depends on values and nothing waits for the host, so that a CUDA graph can capture it.
"""

from collections.abc import Callable

import numpy as np
import torch as th

from sb3_scratch_dqn.replay.device.ring import StagingBuffer
from sb3_scratch_dqn.replay.observations import Array
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler, importance_weights, scaled_priorities

# Number of children of a node: a million values take four levels
WIDTH = 32

# Number of new rows whose values one call writes
_ROWS_PER_WRITE = 16


class DeviceSumTree:
    """Non-negative values and their sums; initially all values are 0.

    :param size: number of values
    :param device: device of the values
    """

    def __init__(self, size: int, device: th.device) -> None:
        self.size = size
        # From the values to a single node; each level is (parents, WIDTH), one row for each sum above it
        self.levels: list[th.Tensor] = []
        while not self.levels or len(self.levels[-1]) > 1:
            nodes = len(self.levels[-1]) if self.levels else size
            self.levels.append(th.zeros((-(-nodes // WIDTH), WIDTH), dtype=th.float64, device=device))
        self._positions = th.arange(WIDTH, device=device)
        self._prefix_mask = (self._positions <= self._positions.unsqueeze(1)).double()  # (WIDTH, WIDTH)

    @property
    def values(self) -> th.Tensor:
        """All values, ``(size,)``."""
        return self.levels[0].view(-1)[: self.size]

    def fill(self, values: Array) -> None:
        """Set the first ``len(values)`` values, and all others to 0."""
        self.values.zero_()
        self.values[: len(values)].copy_(th.from_numpy(values))
        for children, parents in zip(self.levels, self.levels[1:], strict=False):
            parents.view(-1)[: len(children)].copy_(children.sum(dim=1))

    def set(self, indices: th.Tensor, values: th.Tensor) -> None:
        """Set values; if an index occurs twice, both values must be equal.

        :param indices: ``(B,)``
        :param values: ``(B,)``
        """
        self.levels[0].view(-1).index_copy_(0, indices, values)
        for children, parents in zip(self.levels, self.levels[1:], strict=False):
            indices = indices // WIDTH
            parents.view(-1).index_copy_(0, indices, children.index_select(0, indices).sum(dim=1))

    def find(self, fractions: th.Tensor) -> th.Tensor:
        """Return the indices at which the running sum of the values first exceeds fractions of the total.

        :param fractions: ``(B,)``, each from 0 to 1, in ascending order
        :return: ``(B,)``, in ascending order, never the index of a value of 0
        """
        nodes = th.zeros_like(fractions, dtype=th.int64)
        sums = fractions * self._running_sums(self.levels[-1])[0, -1]
        for level in reversed(self.levels):
            children = level.index_select(0, nodes)  # (B, WIDTH)
            running = self._running_sums(children)
            # A node's sum and that of its children may differ by rounding: sums beyond it go to the last child
            total = running[:, -1]
            sums = th.minimum(sums, total.nextafter(th.zeros_like(total)))
            found = (running > sums.unsqueeze(1)).to(th.uint8).argmax(dim=1)
            sums = sums - (children * (self._positions < found.unsqueeze(1))).sum(dim=1)
            nodes = nodes * WIDTH + found
        return nodes

    def _running_sums(self, children: th.Tensor) -> th.Tensor:
        """Return the running sums of each row, ``(B, WIDTH)``.

        All sums of a row add up in the same order, unlike a parallel ``cumsum``. So a value of 0 does not change the
        running sum, not even by rounding, and the result is deterministic.
        """
        return (children.unsqueeze(1) * self._prefix_mask).sum(dim=2)


class DevicePriorities:
    """The priorities of a :class:`PrioritizedSampler` on a device, while this object owns them.

    :param rows: number of rows of the buffer
    :param n_envs: number of environments
    :param clears_next_row: True if a write invalidates the transitions of the following row, as with
        ``optimize_memory_usage``
    :param device: device of the priorities
    """

    def __init__(self, rows: int, n_envs: int, clears_next_row: bool, device: th.device) -> None:
        self.tree = DeviceSumTree(rows * n_envs, device)
        self.max_value = th.ones((), dtype=th.float64, device=device)
        self.diverged = th.zeros((), dtype=th.bool, device=device)  # True after a priority was not finite
        self.run_write_staged: Callable[[], object] = self.write_staged  # or the replay of a CUDA graph of it
        self._n_envs, self._clears_next_row = n_envs, clears_next_row
        self._used = 0  # number of values that may differ from 0
        self._new_rows: list[int] = []
        size = _ROWS_PER_WRITE * n_envs
        self._staging = StagingBuffer((size,), th.int64, device)
        self._new_indices = th.zeros(size, dtype=th.int64, device=device)

    def sync(self, sampler: PrioritizedSampler) -> None:
        """Take over the priorities of a sampler; if already owned, set those of new transitions to the largest."""
        if sampler.is_owned_by(self):
            self._write_new_rows()
            return
        values, max_value = sampler.transfer_to(self)
        self._new_rows = []
        self._used = min(len(values), self.tree.size)
        self.tree.fill(values[: self._used])
        self.max_value.fill_(max_value)

    def on_write(self, row: int) -> None:
        """Handle new transitions in ``row``."""
        self._new_rows.append(row)

    def release(self) -> tuple[Array, float]:
        """Return all values, float64, and the largest value so far, to the sampler."""
        self._write_new_rows()
        return self.tree.values[: self._used].cpu().numpy(), self.max_value.item()

    def _write_new_rows(self) -> None:
        rows, self._new_rows = self._new_rows, []
        for begin in range(0, len(rows), _ROWS_PER_WRITE):
            chunk = rows[begin : begin + _ROWS_PER_WRITE]
            chunk += chunk[-1:] * (_ROWS_PER_WRITE - len(chunk))  # pad to a fixed size by repeating the last row
            indices = np.add.outer(np.array(chunk) * self._n_envs, np.arange(self._n_envs)).reshape(-1)
            self._staging.acquire()[:] = indices
            self._staging.copy_to(self._new_indices)
            self.run_write_staged()
            end = int(indices.max()) + 1 + self._clears_next_row * self._n_envs
            self._used = min(max(self._used, end), self.tree.size)

    def write_staged(self) -> None:
        """Set the priorities of the staged rows to the largest so far; can be captured by a CUDA graph."""
        indices = self._new_indices
        self.tree.set(indices, self.max_value.expand(len(indices)))
        if self._clears_next_row:
            # Only after the last staged row: the next staged row follows each of the others
            cleared = (indices[-self._n_envs :] + self._n_envs) % self.tree.size
            self.tree.set(cleared, th.zeros_like(cleared, dtype=th.float64))

    def draw(self, fractions: th.Tensor, beta: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Sample transitions.

        :param fractions: fractions from :meth:`PrioritizedSampler.draw_fractions`, ``(B,)``
        :param beta: exponent of the importance weights
        :return: flat indices ``row * n_envs + env`` and importance weights, each ``(B,)``
        """
        indices = self.tree.find(fractions)
        weights = importance_weights(self.tree.values.index_select(0, indices), beta)
        return indices, weights.float()

    def update(self, indices: th.Tensor, priorities: th.Tensor, epsilon: th.Tensor, alpha: th.Tensor) -> None:
        """Set the priorities of transitions; if one is not finite, set only ``diverged``.

        :param indices: flat indices from :meth:`draw`, ``(B,)``
        :param priorities: ``(B,)``
        :param epsilon: ``epsilon`` of the sampler
        :param alpha: ``alpha`` of the sampler
        """
        values = scaled_priorities(priorities.double(), epsilon, alpha)
        bad = ~values.isfinite().all()
        self.diverged.logical_or_(bad)
        self.max_value.copy_(th.where(bad, self.max_value, th.maximum(self.max_value, values.max())))
        # If a transition occurs twice, its last priority counts; ``indices`` are ascending
        values = values.index_select(0, th.searchsorted(indices, indices, right=True) - 1)
        self.tree.set(indices, th.where(bad, self.tree.values.index_select(0, indices), values))
