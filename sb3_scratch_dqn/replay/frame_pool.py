"""Storage of frames that the ring buffer of frames does not hold."""

import numpy as np

from sb3_scratch_dqn.replay.observations import Array, gather, resized, take_array


def array_name(part: str, key: str) -> str:
    """Return the name of an array in a file."""
    return f"{part}/{key}" if key else part


class FramePool:
    """Frames of single observations in slots, to which row and environment point.

    :param n_envs: number of environments
    :param depth: number of frames stored of an observation: its newest ones
    :param like: arrays of frames, ``(rows, n_envs, *frame_shape)``, by key; gives the frame shapes and dtypes
    """

    def __init__(self, n_envs: int, depth: int, like: dict[str, Array]) -> None:
        self.depth = depth
        self.frames = {key: np.zeros((0, depth, *array.shape[2:]), dtype=array.dtype) for key, array in like.items()}
        self.slots = np.full((0, n_envs), -1, dtype=np.int32)  # -1: no slot
        self.free: list[int] = []
        self.used = 0  # occupied slots

    def add(self, row: int, env: int, frames: dict[str, Array]) -> None:
        """Store an observation, unless this row and environment already have one.

        :param row: row of the observation
        :param env: environment of the observation
        :param frames: observations of all environments, ``(n_envs, k, ...)``, by key
        """
        if self.slots[row, env] >= 0:
            return
        if not self.free:
            slots = len(next(iter(self.frames.values())))
            more = max(16, slots // 2)
            self.frames = {key: resized(array, slots + more) for key, array in self.frames.items()}
            self.free = list(range(slots + more - 1, slots - 1, -1))
        slot = self.free.pop()
        self.used += 1
        for key, array in self.frames.items():
            array[slot] = frames[key][env, -self.depth :]
        self.slots[row, env] = slot

    def remove(self, row: int) -> None:
        """Free the slots of a row."""
        if self.used > 0:
            slots = [slot for slot in self.slots[row].tolist() if slot >= 0]
            if slots:
                self.free += slots
                self.used -= len(slots)
                self.slots[row] = -1

    def overlay(self, window: dict[str, Array], rows: Array, envs: Array) -> None:
        """Overwrite the newest frames of a window in place where this pool stores them.

        :param window: frames, ``(B, W, ...)`` with ``W >= depth``, by key
        :param rows: ``(B,)``
        :param envs: ``(B,)``
        """
        slots = gather(self.slots, rows, envs)
        stored = slots >= 0
        if stored.any():
            for key, frames in window.items():
                frames[stored, -self.depth :] = self.frames[key][slots[stored]]

    def resize(self, rows: int) -> None:
        """Change the number of rows that can point to slots."""
        self.slots = resized(self.slots, rows, fill=-1)

    def arrays(self, name: str, rows: int) -> dict[str, Array]:
        """Return views of all arrays that a file of the first ``rows`` rows needs, by name, prefixed by ``name``."""
        frames = {array_name(f"{name}_frames", key): array for key, array in self.frames.items()}
        return {f"{name}_slots": self.slots[:rows], **frames}

    def restored(self, name: str, arrays: dict[str, Array], rows: int, depths: tuple[int, ...]) -> "FramePool":
        """Return a pool with the contents of the pool that was saved.

        :param name: the prefix given to its :meth:`arrays`
        :param arrays: the arrays of the file
        :param rows: its number of rows
        :param depths: allowed depths
        :raises ValueError: if an array is missing, has the wrong shape or dtype, or points outside another array
        """
        pool = FramePool(self.slots.shape[1], self.depth, self.frames)
        pool.slots = take_array(arrays, f"{name}_slots", self.slots, rows)
        first = arrays.get(array_name(f"{name}_frames", next(iter(self.frames))))
        pool.depth = next((depth for depth in depths if first is not None and first.shape[1:2] == (depth,)), depths[0])
        n_slots = None if first is None else len(first)
        for key, like in self.frames.items():
            like = np.zeros((0, pool.depth, *like.shape[2:]), dtype=like.dtype)
            pool.frames[key] = take_array(arrays, array_name(f"{name}_frames", key), like, n_slots)
        used = pool.slots[pool.slots >= 0]
        if len(np.unique(used)) != len(used) or used.max(initial=-1) >= (n_slots or 0):
            raise ValueError(f"its array '{name}_slots' points to missing frames")
        pool.free = sorted(set(range(n_slots or 0)) - set(used.tolist()), reverse=True)
        pool.used = len(used)
        return pool

    def copy(self) -> "FramePool":
        """Return a copy that shares no memory with this pool."""
        other = FramePool(self.slots.shape[1], self.depth, self.frames)
        other.frames = {key: array.copy() for key, array in self.frames.items()}
        other.slots, other.free, other.used = self.slots.copy(), self.free.copy(), self.used
        return other
