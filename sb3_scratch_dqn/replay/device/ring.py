"""Rows of several arrays on another device, which follow those on this one.

All that a row holds of one environment lies side by side, so that it travels in one copy, whatever it is made of. A row
is a stretch of bytes; what is in it is read through views of the same memory, which stay where they are.
"""

from collections.abc import Mapping

import numpy as np
import torch as th

from sb3_scratch_dqn.replay.observations import Array

# What a row may be made of, and as what it lies there: dtypes that both libraries have, and that all devices can gather
DTYPES = {
    np.dtype(name): name
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
}
DTYPES[np.dtype("uint16")] = "int32"

# Where a value may begin, for whatever its dtype is
_ALIGNMENT = 8

# Bytes that travel at once
_BYTES_AT_ONCE = 2**22


class Outbox:
    """Memory of this machine that copies to a device begin from.

    For CUDA it is pinned, so that a copy need not be waited for; only before the next one is written.

    :param shape: of the memory
    :param dtype: likewise
    :param device: where the copies go
    """

    def __init__(self, shape: tuple[int, ...], dtype: th.dtype, device: th.device) -> None:
        self._tensor = th.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self._array: Array = self._tensor.numpy()
        self._copied = th.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def open(self) -> Array:
        """The memory as an array, when it may be written to."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._array

    def send(self, target: th.Tensor) -> None:
        """Copy the first part of the memory to a tensor; its number of rows says how much."""
        target.copy_(self._tensor[: len(target)], non_blocking=True)
        if self._copied is not None:
            self._copied.record(th.cuda.current_stream(target.device))


class DeviceRing:
    """Arrays of ``(rows, n_envs, ...)``.

    :param rows: how many there is room for
    :param n_envs: number of environments
    :param like: arrays of the dtypes and the shapes, but for the number of rows, by name
    :param device: where they are to lie
    """

    def __init__(self, rows: int, n_envs: int, like: Mapping[str, Array], device: th.device) -> None:
        self.rows, self.n_envs = rows, n_envs
        self._dtype = _row_dtype(like)
        row_bytes = n_envs * self._dtype.itemsize
        self._at_once = max(1, min(rows, _BYTES_AT_ONCE // row_bytes))
        self._outbox = Outbox((self._at_once * n_envs, self._dtype.itemsize), th.uint8, device)
        self._memory = th.zeros((rows * n_envs, self._dtype.itemsize), dtype=th.uint8, device=device)
        self.columns = {name: self._column(name, array) for name, array in like.items()}

    def _column(self, name: str, like: Array) -> th.Tensor:
        assert self._dtype.fields is not None
        dtype, begin = self._dtype.fields[name][:2]
        flat = self._memory[:, begin : begin + dtype.itemsize].view(getattr(th, DTYPES[like.dtype]))
        shape = like.shape[2:]
        return flat.view(len(flat), *shape)

    @staticmethod
    def bytes_of(rows: int, n_envs: int, like: Mapping[str, Array]) -> int:
        """The memory that it takes; parameters as those of the class."""
        return rows * n_envs * _row_dtype(like).itemsize

    def follow(self, begin: int, end: int, arrays: Mapping[str, Array]) -> None:
        """Bring some rows up to date.

        :param begin: the first of them
        :param end: the one behind the last
        :param arrays: ``(rows or less, n_envs, ...)``, by name
        """
        for first in range(begin, end, self._at_once):
            behind = min(first + self._at_once, end)
            written = self._outbox.open().view(self._dtype).reshape(self._at_once, self.n_envs)
            for name, array in arrays.items():
                written[name][: behind - first] = array[first:behind]
            self._outbox.send(self._memory[first * self.n_envs : behind * self.n_envs])

    def read(self, name: str, places: th.Tensor) -> th.Tensor:
        """Values of one array.

        :param name: of the array
        :param places: ``row * n_envs + env`` of each, of any shape
        :return: a copy, ``(*places.shape, ...)``
        """
        column = self.columns[name]
        return column.index_select(0, places.reshape(-1)).view(*places.shape, *column.shape[1:])


def _row_dtype(like: Mapping[str, Array]) -> np.dtype[np.void]:
    """What a row holds of one environment."""
    formats = [np.dtype((DTYPES[array.dtype], array.shape[2:])) for array in like.values()]
    offsets, end = [], 0
    for one in formats:
        offsets.append(end)
        end += -(-one.itemsize // _ALIGNMENT) * _ALIGNMENT
    return np.dtype({"names": list(like), "formats": formats, "offsets": offsets, "itemsize": end})
