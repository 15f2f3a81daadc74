"""Frames that are kept beside the ring of frames, because no other observation has them or they are not all there."""

import numpy as np

from sb3_scratch_dqn.replay.observations import Array, gather, resized, take_array


def array_name(part: str, key: str) -> str:
    """What an array is called in a file."""
    return f"{part}/{key}" if key else part


class FramePool:
    """Frames of observations that lie nowhere else, each in a slot to which its row and environment point.

    :param n_envs: number of environments
    :param depth: frames kept of an observation, the newest ones
    :param like: arrays of frames, ``(..., n_envs, *frame_shape)``, by key
    """

    def __init__(self, n_envs: int, depth: int, like: dict[str, Array]) -> None:
        self.depth = depth
        self.frames = {key: np.zeros((0, depth, *array.shape[2:]), dtype=array.dtype) for key, array in like.items()}
        self.slots = np.full((0, n_envs), -1, dtype=np.int32)  # -1: none
        self.free: list[int] = []
        self.used = 0  # slots that hold something

    def keep(self, row: int, env: int, frames: dict[str, Array]) -> None:
        """Keep an observation, ``(n_envs, k, ...)``, of this row, if it is not kept yet."""
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

    def forget(self, row: int) -> None:
        """Let go what is kept of a row."""
        if self.used > 0:
            slots = [slot for slot in self.slots[row].tolist() if slot >= 0]
            if slots:
                self.free += slots
                self.used -= len(slots)
                self.slots[row] = -1

    def put(self, window: dict[str, Array], rows: Array, envs: Array) -> None:
        """Put what is kept of these rows over the newest frames of a window, ``(B, W, ...)`` with ``W >= depth``."""
        slots = gather(self.slots, rows, envs)
        kept = slots >= 0
        if kept.any():
            for key, frames in window.items():
                frames[kept, -self.depth :] = self.frames[key][slots[kept]]

    def resize(self, rows: int) -> None:
        """Have room for pointers of this many rows."""
        self.slots = resized(self.slots, rows, fill=-1)

    def arrays(self, name: str, rows: int) -> dict[str, Array]:
        """All that the first rows need, for a file."""
        frames = {array_name(f"{name}_frames", key): array for key, array in self.frames.items()}
        return {f"{name}_slots": self.slots[:rows], **frames}

    def restored(self, name: str, arrays: dict[str, Array], rows: int, depths: tuple[int, ...]) -> "FramePool":
        """The pool that gave ``arrays``.

        :param name: that it gave them by
        :param arrays: the arrays
        :param rows: that it had pointers for
        :param depths: that it may have
        :raises ValueError: naming an array that is missing, does not fit, or points outside another one
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
            raise ValueError(f"its array '{name}_slots' points to frames that there are not")
        pool.free = sorted(set(range(n_slots or 0)) - set(used.tolist()), reverse=True)
        pool.used = len(used)
        return pool

    def copy(self) -> "FramePool":
        """A pool whose changes do not reach into this one."""
        other = FramePool(self.slots.shape[1], self.depth, self.frames)
        other.frames = {key: array.copy() for key, array in self.frames.items()}
        other.slots, other.free, other.used = self.slots.copy(), self.free.copy(), self.used
        return other
