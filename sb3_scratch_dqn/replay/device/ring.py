"""Copies of rows of several arrays on another device.

The values of all arrays in one row and environment are contiguous bytes, so one copy transfers them, whatever their
dtypes. They are read through views of the same memory, whose address never changes.
"""

from collections.abc import Mapping

import numpy as np
import torch as th

from sb3_scratch_dqn.replay.observations import Array

# Supported dtypes, and the dtypes of their copies: NumPy and PyTorch have both, and all devices can gather the latter
DTYPES = {
    np.dtype(name): name
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
}
DTYPES[np.dtype("uint16")] = "int32"

# Alignment of values in a row, in bytes, enough for all dtypes
_ALIGNMENT = 8

# Bytes of one copy to the device
_COPY_BYTES = 2**22


class StagingBuffer:
    """Host memory from which values are copied to a device.

    For CUDA it is pinned, so copies are asynchronous; only the next :meth:`acquire` waits for them.

    :param shape: shape of the memory
    :param dtype: dtype of the memory
    :param device: target device
    """

    def __init__(self, shape: tuple[int, ...], dtype: th.dtype, device: th.device) -> None:
        self._tensor = th.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self._array: Array = self._tensor.numpy()
        self._copied = th.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def acquire(self) -> Array:
        """Return the memory as an array for writing, after the last copy has finished."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._array

    def copy_to(self, target: th.Tensor) -> None:
        """Copy the first ``len(target)`` rows of the memory to a tensor on the device."""
        target.copy_(self._tensor[: len(target)], non_blocking=True)
        if self._copied is not None:
            self._copied.record(th.cuda.current_stream(target.device))


class DeviceRing:
    """Copies of arrays of ``(rows, n_envs, ...)`` on a device.

    :param rows: number of allocated rows
    :param n_envs: number of environments
    :param like: arrays with the dtypes and shapes, except for the number of rows, by name
    :param device: device of the copies
    """

    def __init__(self, rows: int, n_envs: int, like: Mapping[str, Array], device: th.device) -> None:
        self.rows, self.n_envs = rows, n_envs
        self._dtype = _row_dtype(like)
        row_bytes = n_envs * self._dtype.itemsize
        self._rows_per_copy = max(1, min(rows, _COPY_BYTES // row_bytes))
        self._staging = StagingBuffer((self._rows_per_copy * n_envs, self._dtype.itemsize), th.uint8, device)
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
        """Return the bytes that a ring takes; parameters as those of the class."""
        return rows * n_envs * _row_dtype(like).itemsize

    def copy_rows(self, begin: int, end: int, arrays: Mapping[str, Array]) -> None:
        """Copy rows ``begin`` to ``end - 1`` to the device.

        :param begin: the first row
        :param end: the row after the last
        :param arrays: arrays on the host, ``(R, n_envs, ...)`` with ``end <= R <= rows``, by name
        """
        for first in range(begin, end, self._rows_per_copy):
            stop = min(first + self._rows_per_copy, end)
            staged = self._staging.acquire().view(self._dtype).reshape(self._rows_per_copy, self.n_envs)
            for name, array in arrays.items():
                staged[name][: stop - first] = array[first:stop]
            self._staging.copy_to(self._memory[first * self.n_envs : stop * self.n_envs])

    def read(self, name: str, indices: th.Tensor) -> th.Tensor:
        """Return values of one array.

        :param name: name of the array
        :param indices: flat indices ``row * n_envs + env``, of any shape
        :return: a copy, ``(*indices.shape, ...)``
        """
        column = self.columns[name]
        return column.index_select(0, indices.reshape(-1)).view(*indices.shape, *column.shape[1:])


def _row_dtype(like: Mapping[str, Array]) -> np.dtype[np.void]:
    """Return the structured dtype of one row and environment."""
    formats = [np.dtype((DTYPES[array.dtype], array.shape[2:])) for array in like.values()]
    offsets, end = [], 0
    for field in formats:
        offsets.append(end)
        end += -(-field.itemsize // _ALIGNMENT) * _ALIGNMENT
    return np.dtype({"names": list(like), "formats": formats, "offsets": offsets, "itemsize": end})
