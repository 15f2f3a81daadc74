"""A sum tree, to sample an index with a probability proportional to its value.

Every node has ``WIDTH`` children and holds their sum. The top level has few sums, whose running sum each search
computes: a million values take two levels and a top of 977 sums. A search takes one vectorised step per level for a
batch of indices. Sums are always recomputed from the children, never adjusted, so rounding errors do not accumulate.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.integer[Any]]

WIDTH = 32
_LARGEST_TOP = 4096


class SumTree:
    """Non-negative values and their sums. Call :meth:`reserve` before :meth:`set`; initially all values are 0."""

    def __init__(self) -> None:
        # From the values to the top; each level except the top is (parents, WIDTH), one row for each sum above it
        self.levels: list[Floats] = [np.zeros((1, WIDTH))]
        self.top: Floats = np.zeros(1)

    @property
    def capacity(self) -> int:
        """The allocated number of values."""
        return self.levels[0].size

    def reserve(self, capacity: int) -> None:
        """Allocate at least ``capacity`` values; the size at least doubles, so the amortised cost is constant."""
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
        """Set values; if an index occurs twice, the last value counts.

        :param indices: ``(B,)``
        :param values: ``(B,)``, or a scalar for all
        """
        self.levels[0].reshape(-1)[indices] = values
        for children, parents in zip(self.levels, (*self.levels[1:], self.top), strict=True):
            indices = indices // WIDTH
            parents.reshape(-1)[indices] = np.add.reduce(children.take(indices, axis=0), axis=1)

    def find(self, fractions: Floats) -> Indices:
        """Return the indices at which the running sum of the values first exceeds fractions of the total.

        :param fractions: ``(B,)``, each from 0 to 1
        :return: ``(B,)``, never the index of a value of 0
        """
        running = _running_sums(self.top)
        sums = fractions * running[-1]
        nodes = _first_above(running, sums)
        sums -= running[nodes]
        for level in reversed(self.levels):
            # One running sum over the concatenated rows of all nodes: each row begins where the previous one ends
            running = _running_sums(level.take(nodes, axis=0).reshape(-1))
            sums += running[:-1:WIDTH]
            # A node's sum and the sum of its row may differ by rounding, so a search may end in a neighbouring row. It
            # always ends at a value that is not 0, because only these increase the running sum
            found = _first_above(running, sums)
            sums -= running[found]
            nodes = nodes[found // WIDTH] * WIDTH + found % WIDTH
        return nodes


def _running_sums(values: Floats) -> Floats:
    """Return the sums of the first 0, 1, 2 ... ``values``."""
    sums = np.empty(len(values) + 1)
    sums[0] = 0.0
    np.add.accumulate(values, out=sums[1:])
    return sums


def _first_above(running: Floats, sums: Floats) -> Indices:
    """Return the index of the value with which a running sum first exceeds each of ``sums``.

    :param running: running sums from :func:`_running_sums`
    :param sums: ``(B,)``; modified in place: sums of at least the total are lowered to just below it
    :return: ``(B,)``
    """
    total = running[-1]
    if sums.max() >= total:
        np.minimum(sums, np.nextafter(total, 0), out=sums)
    return running[1:].searchsorted(sums, side="right")
