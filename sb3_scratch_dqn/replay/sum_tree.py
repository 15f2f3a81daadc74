"""A tree of sums, to draw an index with a probability in proportion to its value.

Every node has ``WIDTH`` children and holds their sum, so that a million values take four levels, and a batch of indices
is found by one vectorised step a level. A sum is always computed anew from the children, never adjusted, so no error
builds up.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.integer[Any]]

WIDTH = 64


class SumTree:
    """Values that are not negative, and their sums. Room for them is reserved first, and all are 0 to begin with."""

    def __init__(self) -> None:
        # From the values up to the total; each level is (parents, WIDTH)
        self.levels: list[Floats] = [np.zeros((1, WIDTH))]

    @property
    def capacity(self) -> int:
        """The number of values."""
        return self.levels[0].size

    def reserve(self, capacity: int) -> None:
        """Have room for at least ``capacity`` values; it doubles, so that growing costs little in the long run."""
        if capacity <= self.capacity:
            return
        values = np.zeros((-(-max(capacity, 2 * self.capacity) // WIDTH), WIDTH))
        values[: len(self.levels[0])] = self.levels[0]
        self.levels = [values]
        while len(self.levels[-1]) > 1:
            sums = self.levels[-1].sum(axis=1)
            parents = np.zeros((-(-len(sums) // WIDTH), WIDTH))
            parents.reshape(-1)[: len(sums)] = sums
            self.levels.append(parents)

    @property
    def values(self) -> Floats:
        """All values, ``(capacity,)``."""
        values: Floats = self.levels[0].reshape(-1)
        return values

    @property
    def total(self) -> float:
        """The sum of all values."""
        return float(self.levels[-1].sum())

    def set(self, indices: Indices, values: Floats | float) -> None:
        """Set some values; where an index comes twice, the last value counts.

        :param indices: ``(B,)``
        :param values: ``(B,)``, or one for all
        """
        self.levels[0].reshape(-1)[indices] = values
        for children, parents in zip(self.levels, self.levels[1:], strict=False):
            indices = indices // WIDTH
            parents.reshape(-1)[indices] = children[indices].sum(axis=1)

    def find(self, sums: Floats) -> Indices:
        """Find, for each of ``sums``, the index at which the running sum of the values first exceeds it.

        :param sums: ``(B,)``, each at least 0 and below :attr:`total`
        :return: ``(B,)``, never the index of a value of 0
        """
        nodes: Indices = np.zeros(len(sums), dtype=np.int64)
        for level in reversed(self.levels):
            running = level[nodes].cumsum(axis=1)  # (B, WIDTH)
            # By rounding, what is left of a sum may reach a node's total; it belongs to the last child then
            sums = np.minimum(sums, np.nextafter(running[:, -1], 0))
            children = (running <= sums[:, None]).sum(axis=1)
            before = np.where(children > 0, running[np.arange(len(sums)), children - 1], 0.0)
            sums = sums - before
            nodes = nodes * WIDTH + children
        return nodes
