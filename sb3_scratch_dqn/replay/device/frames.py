"""Frames on another device: the twin of :class:`~sb3_scratch_dqn.replay.frames.StackedFrames`.

What is kept there is kept here, in the same places, and stacks are built of it when they are read.
"""

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_scratch_dqn.replay.device.ring import DeviceRing
from sb3_scratch_dqn.replay.frame_pool import FramePool
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import Array

# Slots that a pool has at least, and how many times those that it needs: a pool that grows needs other memory
_FEWEST_SLOTS = 1024
_ROOM_TO_GROW = 4


class DeviceFrames:
    """A copy of what a keeper of frames keeps, but for its rows, which lie with those of the store.

    :param keeper: the keeper
    :param device: where the copy is to lie
    """

    def __init__(self, obs_store: StackedFrames, device: th.device) -> None:
        self._obs_store = obs_store
        self._capacity, self._n_envs, self._n_stack = (
            obs_store.capacity,
            obs_store.n_envs,
            obs_store.n_stack,
        )
        self._n_places = obs_store.capacity + obs_store.n_stack
        self._ring = DeviceRing(self._n_places, obs_store.n_envs, obs_store.frames, device)
        self._last = _DevicePool(obs_store.last, device)
        # Reading it costs as much as reading all frames, and mostly nothing is in it
        self._whole = _DevicePool(obs_store.whole, device) if obs_store.whole.used > 0 else None
        self._newest = th.zeros((), dtype=th.int64, device=device)
        self._offsets = th.arange(1 - self._n_stack, 2, device=device)
        self._steps = 0  # of the keeper, when this was last brought up to date

    @staticmethod
    def row_arrays(obs_store: StackedFrames) -> dict[str, Array]:
        """What is known of each row, by name."""
        return {
            "ages": obs_store.ages,
            "last_slots": obs_store.last.slots,
            "whole_slots": obs_store.whole.slots,
        }

    @staticmethod
    def bytes_of(obs_store: StackedFrames) -> int:
        """The memory that the copy takes, but for its rows."""
        pools = sum(_DevicePool.bytes_of(pool) for pool in (obs_store.last, obs_store.whole))
        return (
            DeviceRing.bytes_of(
                obs_store.capacity + obs_store.n_stack,
                obs_store.n_envs,
                obs_store.frames,
            )
            + pools
        )

    def serves(self) -> bool:
        """Whether the memory will do."""
        obs_store = self._obs_store
        if self._whole is None:
            return self._last.serves(obs_store.last) and obs_store.whole.used == 0
        return self._last.serves(obs_store.last) and self._whole.serves(obs_store.whole)

    def follow(self) -> None:
        """Bring everything up to date."""
        obs_store = self._obs_store
        # The frame that came next is overwritten where an episode began instead
        n_new = obs_store.steps - self._steps + 1
        if not 0 < n_new < self._n_places:
            self._ring.follow(0, len(next(iter(obs_store.frames.values()))), obs_store.frames)
            rows = np.arange(len(obs_store.ages))
        else:
            begin = self._steps % self._n_places
            end = begin + n_new
            self._ring.follow(begin, min(end, self._n_places), obs_store.frames)
            self._ring.follow(0, max(end - self._n_places, 0), obs_store.frames)
            first = max(self._steps - 1, obs_store.steps - self._capacity, 0)
            rows = np.arange(first, obs_store.steps) % self._capacity
        self._last.follow(obs_store.last, rows)
        if self._whole is not None:
            self._whole.follow(obs_store.whole, rows)
        self._newest.fill_(obs_store.steps - 1)
        self._steps = obs_store.steps

    def read(self, rows: th.Tensor, envs: th.Tensor, of_rows: DeviceRing, places: th.Tensor) -> PyTorchObs:
        """What was observed, ``(B, *observation_shape)``.

        :param rows: ``(B,)``
        :param envs: ``(B,)``
        :param of_rows: where :meth:`row_arrays` lie
        :param places: of the rows there, ``(B,)``
        """
        window = self._window(rows, envs, of_rows.read("ages", places), self._offsets[:-1])
        if self._whole is not None:
            window = self._whole.put(window, of_rows.read("whole_slots", places))
        return self._join(window)

    def read_next(self, rows: th.Tensor, envs: th.Tensor, of_rows: DeviceRing, places: th.Tensor) -> PyTorchObs:
        """What was observed one step later, likewise."""
        window = self._window(rows, envs, of_rows.read("ages", places), self._offsets[1:])
        return self._join(self._last.put(window, of_rows.read("last_slots", places)))

    def _window(self, rows: th.Tensor, envs: th.Tensor, ages: th.Tensor, offsets: th.Tensor) -> dict[str, th.Tensor]:
        steps = self._newest - (self._newest - rows) % self._capacity  # (B,)
        wanted = steps.unsqueeze(1) + offsets  # (B, k)
        first = (steps - ages).unsqueeze(1)
        places = th.maximum(wanted, first) % self._n_places * self._n_envs + envs.unsqueeze(1)
        window = {key: self._ring.read(key, places) for key in self._ring.columns}
        if self._obs_store.pads_with_zeros:
            padded = wanted < first
            window = {key: frames.masked_fill(_beside(padded, frames), 0) for key, frames in window.items()}
        return window

    def _join(self, window: dict[str, th.Tensor]) -> PyTorchObs:
        stacks = {key: self._obs_store.layouts[key].stacked_tensors(frames) for key, frames in window.items()}
        return stacks if self._obs_store.is_dict else stacks[""]


class _DevicePool:
    """A copy of a pool of frames, but for its pointers, which lie with the rows.

    :param pool: the pool
    :param device: where the copy is to lie
    """

    def __init__(self, pool: FramePool, device: th.device) -> None:
        self._depth = pool.depth
        self._slots = _slots_for(pool)
        self._ring = DeviceRing(self._slots, 1, _in_one_column(pool), device)

    @staticmethod
    def bytes_of(pool: FramePool) -> int:
        return DeviceRing.bytes_of(_slots_for(pool), 1, _in_one_column(pool))

    def serves(self, pool: FramePool) -> bool:
        return pool.depth == self._depth and len(next(iter(pool.frames.values()))) <= self._slots

    def follow(self, pool: FramePool, rows: Array) -> None:
        """Bring up to date what these rows point to."""
        slots = pool.slots[rows].reshape(-1)
        slots = np.unique(slots[slots >= 0])
        arrays = _in_one_column(pool)
        # Those that lie side by side travel together
        for stretch in np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1):
            if len(stretch) > 0:
                self._ring.follow(int(stretch[0]), int(stretch[-1]) + 1, arrays)

    def put(self, window: dict[str, th.Tensor], slots: th.Tensor) -> dict[str, th.Tensor]:
        """Put what is kept over the newest frames of a window, ``(B, k, ...)``; the slots are ``(B,)``, -1 for none."""
        kept, places = slots >= 0, slots.clamp(min=0).long()
        joined = {}
        for key, frames in window.items():
            older, newest = frames[:, : -self._depth], frames[:, -self._depth :]
            own = self._ring.read(key, places)
            joined[key] = th.cat([older, th.where(_beside(kept, newest), own, newest)], dim=1)
        return joined


def _in_one_column(pool: FramePool) -> dict[str, Array]:
    return {key: frames[:, None] for key, frames in pool.frames.items()}


def _slots_for(pool: FramePool) -> int:
    return max(_FEWEST_SLOTS, _ROOM_TO_GROW * pool.used)


def _beside(flags: th.Tensor, values: th.Tensor) -> th.Tensor:
    """Flags in a shape that goes with that of values, of which they are the first axes."""
    return flags.view(*flags.shape, *(1,) * (values.dim() - flags.dim()))
