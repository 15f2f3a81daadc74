"""A tree of sums, to draw an index with a probability in proportion to its value.

Every node has ``WIDTH`` children and holds their sum, up to a top of so few sums that their running sum is computed at
each search: a million values take two levels and a top of 977 sums. A batch of indices is found by one vectorised step
a level. A sum is always computed anew from the children, never adjusted, so no error builds up.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.integer[Any]]

WIDTH = 32
_LARGEST_TOP = 4096


class SumTree:
    """Values that are not negative, and their sums. Room for them is reserved first, and all are 0 to begin with."""

    def __init__(self) -> None:
        # From the values up to the top; each level but the top is (parents, WIDTH), one row for each sum above it
        self.levels: list[Floats] = [np.zeros((1, WIDTH))]
        self.top: Floats = np.zeros(1)

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
        while len(self.levels[-1]) > _LARGEST_TOP:
            sums = self.levels[-1].sum(axis=1)
            parents = np.zeros((-(-len(sums) // WIDTH), WIDTH))
            parents.reshape(-1)[: len(sums)] = sums
            self.levels.append(parents)
        self.top = self.levels[-1].sum(axis=1)

    @property
    def values(self) -> Floats:
        """All values, ``(capacity,)``."""
        values: Floats = self.levels[0].reshape(-1)
        return values

    @property
    def total(self) -> float:
        """The sum of all values."""
        return float(_running_sums(self.top)[-1])

    def set(self, indices: Indices, values: Floats | float) -> None:
        """Set some values; where an index comes twice, the last value counts.

        :param indices: ``(B,)``
        :param values: ``(B,)``, or one for all
        """
        self.levels[0].reshape(-1)[indices] = values
        for children, parents in zip(self.levels, (*self.levels[1:], self.top), strict=True):
            indices = indices // WIDTH
            parents.reshape(-1)[indices] = np.add.reduce(children.take(indices, axis=0), axis=1)

    def find(self, parts: Floats) -> Indices:
        """Find the index at which the running sum of the values first exceeds a part of the total.

        :param parts: ``(B,)``, each from 0 to 1
        :return: ``(B,)``, never the index of a value of 0
        """
        running = _running_sums(self.top)
        sums = parts * running[-1]
        nodes = _first_above(running, sums)
        sums -= running[nodes]
        for level in reversed(self.levels):
            # The rows of all nodes in one line, and one running sum over it: each row begins where the one before ends
            running = _running_sums(level.take(nodes, axis=0).reshape(-1))
            sums += running[:-1:WIDTH]
            # A node's sum and the sum of its row may differ by rounding, so that a sum may fall into a neighbour's row.
            # Wherever it falls there is a value that is not 0, because only these lift the running sum
            found = _first_above(running, sums)
            sums -= running[found]
            nodes = nodes[found // WIDTH] * WIDTH + found % WIDTH
        return nodes


def _running_sums(values: Floats) -> Floats:
    """The sums of the first 0, 1, 2 ... of ``values``."""
    sums = np.empty(len(values) + 1)
    sums[0] = 0.0
    np.add.accumulate(values, out=sums[1:])
    return sums


def _first_above(running: Floats, sums: Floats) -> Indices:
    """The index of the value with which a running sum first exceeds each of ``sums``, or else of the last to lift it.

    :param running: as :func:`_running_sums` gives it
    :param sums: ``(B,)``; those of the last case are lowered to what is below the total
    """
    total = running[-1]
    if sums.max() >= total:
        np.minimum(sums, np.nextafter(total, 0), out=sums)
    return running[1:].searchsorted(sums, side="right")
