"""Frames on another device: the counterpart of :class:`~sb3_scratch_dqn.replay.frames.StackedFrames`.

It has the same frames at the same indices, and builds the stacks when they are read.
"""

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_scratch_dqn.replay.device.ring import DeviceRing
from sb3_scratch_dqn.replay.frame_pool import FramePool
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import Array

# Minimum number of slots of a pool, and its ratio to the occupied ones: a pool that outgrows them must be reallocated
_MIN_SLOTS = 1024
_SLOTS_RATIO = 4


class DeviceFrames:
    """A copy of the frames of a store; a :class:`DeviceRing` of the caller has the arrays of :meth:`row_arrays`.

    :param obs_store: the store to copy
    :param device: device of the copy
    """

    def __init__(self, obs_store: StackedFrames, device: th.device) -> None:
        self._obs_store = obs_store
        self._capacity, self._n_envs, self._n_stack = (
            obs_store.capacity,
            obs_store.n_envs,
            obs_store.n_stack,
        )
        self._n_frame_slots = obs_store.capacity + obs_store.n_stack
        self._ring = DeviceRing(self._n_frame_slots, obs_store.n_envs, obs_store.frames, device)
        self._last = _DevicePool(obs_store.last, device)
        # Reading this pool takes as long as reading all frames, and it is usually empty
        self._whole = _DevicePool(obs_store.whole, device) if obs_store.whole.used > 0 else None
        self._newest = th.zeros((), dtype=th.int64, device=device)
        self._offsets = th.arange(1 - self._n_stack, 2, device=device)
        self._steps = 0  # of the store at the last sync

    @staticmethod
    def row_arrays(obs_store: StackedFrames) -> dict[str, Array]:
        """Return the arrays with one entry for each row and environment, by name."""
        return {
            "ages": obs_store.ages,
            "last_slots": obs_store.last.slots,
            "whole_slots": obs_store.whole.slots,
        }

    @staticmethod
    def bytes_of(obs_store: StackedFrames) -> int:
        """Return the bytes that a copy takes, without the arrays of :meth:`row_arrays`."""
        pools = sum(_DevicePool.bytes_of(pool) for pool in (obs_store.last, obs_store.whole))
        return (
            DeviceRing.bytes_of(
                obs_store.capacity + obs_store.n_stack,
                obs_store.n_envs,
                obs_store.frames,
            )
            + pools
        )

    def is_compatible(self) -> bool:
        """Return True if the allocated memory suffices for the store's current pools."""
        obs_store = self._obs_store
        if self._whole is None:
            return self._last.is_compatible(obs_store.last) and obs_store.whole.used == 0
        return self._last.is_compatible(obs_store.last) and self._whole.is_compatible(obs_store.whole)

    def sync(self) -> None:
        """Copy all frames that changed since the last sync."""
        obs_store = self._obs_store
        # One more than the new steps: a new episode overwrites the frame of the last next observation
        n_new = obs_store.steps - self._steps + 1
        if not 0 < n_new < self._n_frame_slots:
            self._ring.copy_rows(0, len(next(iter(obs_store.frames.values()))), obs_store.frames)
            rows = np.arange(len(obs_store.ages))
        else:
            begin = self._steps % self._n_frame_slots
            end = begin + n_new
            self._ring.copy_rows(begin, min(end, self._n_frame_slots), obs_store.frames)
            self._ring.copy_rows(0, max(end - self._n_frame_slots, 0), obs_store.frames)
            first = max(self._steps - 1, obs_store.steps - self._capacity, 0)
            rows = np.arange(first, obs_store.steps) % self._capacity
        self._last.sync(obs_store.last, rows)
        if self._whole is not None:
            self._whole.sync(obs_store.whole, rows)
        self._newest.fill_(obs_store.steps - 1)
        self._steps = obs_store.steps

    def read(self, rows: th.Tensor, envs: th.Tensor, row_ring: DeviceRing, indices: th.Tensor) -> PyTorchObs:
        """Return observations, ``(B, *observation_shape)``.

        :param rows: ``(B,)``
        :param envs: ``(B,)``
        :param row_ring: the copies of :meth:`row_arrays`
        :param indices: flat indices ``row * n_envs + env`` of the same transitions, ``(B,)``
        """
        window = self._window(rows, envs, row_ring.read("ages", indices), self._offsets[:-1])
        if self._whole is not None:
            window = self._whole.overlay(window, row_ring.read("whole_slots", indices))
        return self._join(window)

    def read_next(self, rows: th.Tensor, envs: th.Tensor, row_ring: DeviceRing, indices: th.Tensor) -> PyTorchObs:
        """Return next observations, ``(B, *observation_shape)``; parameters as in :meth:`read`."""
        window = self._window(rows, envs, row_ring.read("ages", indices), self._offsets[1:])
        return self._join(self._last.overlay(window, row_ring.read("last_slots", indices)))

    def _window(self, rows: th.Tensor, envs: th.Tensor, ages: th.Tensor, offsets: th.Tensor) -> dict[str, th.Tensor]:
        steps = self._newest - (self._newest - rows) % self._capacity  # (B,)
        frame_steps = steps.unsqueeze(1) + offsets  # (B, k)
        first = (steps - ages).unsqueeze(1)
        indices = th.maximum(frame_steps, first) % self._n_frame_slots * self._n_envs + envs.unsqueeze(1)
        window = {key: self._ring.read(key, indices) for key in self._ring.columns}
        if self._obs_store.pads_with_zeros:
            padded = frame_steps < first
            window = {key: frames.masked_fill(_append_axes(padded, frames), 0) for key, frames in window.items()}
        return window

    def _join(self, window: dict[str, th.Tensor]) -> PyTorchObs:
        stacks = {key: self._obs_store.layouts[key].stacked_tensors(frames) for key, frames in window.items()}
        return stacks if self._obs_store.is_dict else stacks[""]


class _DevicePool:
    """A copy of the frames of a pool, without its pointers.

    :param pool: the pool to copy
    :param device: device of the copy
    """

    def __init__(self, pool: FramePool, device: th.device) -> None:
        self._depth = pool.depth
        self._slots = _n_slots(pool)
        self._ring = DeviceRing(self._slots, 1, _as_one_env(pool), device)

    @staticmethod
    def bytes_of(pool: FramePool) -> int:
        return DeviceRing.bytes_of(_n_slots(pool), 1, _as_one_env(pool))

    def is_compatible(self, pool: FramePool) -> bool:
        return pool.depth == self._depth and len(next(iter(pool.frames.values()))) <= self._slots

    def sync(self, pool: FramePool, rows: Array) -> None:
        """Copy the slots to which ``rows`` point."""
        slots = pool.slots[rows].reshape(-1)
        slots = np.unique(slots[slots >= 0])
        arrays = _as_one_env(pool)
        # One copy for each range of consecutive slots
        for consecutive in np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1):
            if len(consecutive) > 0:
                self._ring.copy_rows(int(consecutive[0]), int(consecutive[-1]) + 1, arrays)

    def overlay(self, window: dict[str, th.Tensor], slots: th.Tensor) -> dict[str, th.Tensor]:
        """Return a window with its newest frames replaced where this pool stores them.

        :param window: frames, ``(B, k, ...)``, by key
        :param slots: slots of this pool, -1 for none, ``(B,)``
        """
        stored, indices = slots >= 0, slots.clamp(min=0).long()
        replaced = {}
        for key, frames in window.items():
            older, newest = frames[:, : -self._depth], frames[:, -self._depth :]
            pooled = self._ring.read(key, indices)
            replaced[key] = th.cat([older, th.where(_append_axes(stored, newest), pooled, newest)], dim=1)
        return replaced


def _as_one_env(pool: FramePool) -> dict[str, Array]:
    """Return the frames of a pool as :class:`DeviceRing` takes them, ``(slots, 1, depth, ...)``, by key."""
    return {key: frames[:, None] for key, frames in pool.frames.items()}


def _n_slots(pool: FramePool) -> int:
    return max(_MIN_SLOTS, _SLOTS_RATIO * pool.used)


def _append_axes(flags: th.Tensor, values: th.Tensor) -> th.Tensor:
    """Append axes of length 1 to ``flags``, so that it broadcasts with ``values`` along their common first axes."""
    return flags.view(*flags.shape, *(1,) * (values.dim() - flags.dim()))
