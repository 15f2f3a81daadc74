"""A copy of a replay buffer on another device, for updates that read it there.

Transitions are always written to the buffer and saved from it. :class:`DeviceReplay` holds a copy of its store, copies
the rows written since the last sync, and builds from flat indices the batches that
:meth:`~sb3_scratch_dqn.replay.buffer.ScratchReplayBuffer.sample_batch` would build. Frames are stored once here, too.

A read consists of PyTorch calls only, always the same ones on the same memory, and does not wait for the device, so
that a CUDA graph can capture it. :meth:`DeviceReplay.is_compatible` is false if other memory is needed.
"""

from collections.abc import Mapping

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_scratch_dqn.replay.batch import Batch
from sb3_scratch_dqn.replay.buffer import ScratchReplayBuffer
from sb3_scratch_dqn.replay.device.frames import DeviceFrames
from sb3_scratch_dqn.replay.device.ring import DTYPES, DeviceRing
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import Array, DenseObservations, SharedObservations

# Longest window: a read on the device always reads n_steps rows, whereas the host first finds how many it needs
_MAX_N_STEPS = 1024
# Of the free memory, how much a buffer may take: networks and updates need some, too
_MAX_FRACTION_OF_FREE = 0.6


class DeviceReplay:
    """A copy of the transitions of a buffer.

    :param buffer: the ``buffer`` of a :class:`~sb3_scratch_dqn.replay.source.BatchSource`
    :param device: device of the copy
    """

    def __init__(self, buffer: ScratchReplayBuffer, device: th.device) -> None:
        self._buffer, self._store, self._obs_store = buffer, buffer.store, buffer.store.obs_store
        self.capacity, self.n_envs, self.n_steps = buffer.buffer_size, buffer.n_envs, buffer.n_steps
        arrays = _row_arrays(buffer)
        self._names = list(arrays)
        self._ring = DeviceRing(self.capacity, self.n_envs, arrays, device)
        self._frames = DeviceFrames(self._obs_store, device) if isinstance(self._obs_store, StackedFrames) else None
        space = buffer.observation_space
        self._keys = list(space.spaces) if isinstance(space, spaces.Dict) else None
        self._newest_row = th.zeros((), dtype=th.int64, device=device)
        self._steps = th.arange(self.n_steps, device=device)
        self._gamma: float | None = None
        self._powers = th.zeros(self.n_steps + 1, dtype=th.float32, device=device)
        self._n_writes = self._n_edits = -1  # of the store at the last sync

    @staticmethod
    def unsupported_reason(buffer: ScratchReplayBuffer, device: th.device) -> str | None:
        """Return why a buffer cannot be copied to ``device``, or ``None`` if it can."""
        arrays, obs_store = _row_arrays(buffer), buffer.store.obs_store
        frames = obs_store.frames if isinstance(obs_store, StackedFrames) else {}
        unsupported = [array.dtype for array in (*arrays.values(), *frames.values()) if array.dtype not in DTYPES]
        if unsupported:
            return f"observations of dtype {unsupported[0]} are not supported on other devices"
        if buffer.n_steps > _MAX_N_STEPS:
            return f"n_steps={buffer.n_steps} is more than {_MAX_N_STEPS}"
        if device.type == "cuda":
            needed = DeviceRing.bytes_of(buffer.buffer_size, buffer.n_envs, arrays)
            needed += DeviceFrames.bytes_of(obs_store) if isinstance(obs_store, StackedFrames) else 0
            # Memory that PyTorch's allocator caches is free, too
            cached = th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
            free = th.cuda.mem_get_info(device)[0] + cached
            if needed > _MAX_FRACTION_OF_FREE * free:
                return f"the full buffer takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}"
        return None

    def is_compatible(self, buffer: ScratchReplayBuffer) -> bool:
        """Return True if this is a copy of ``buffer`` and the allocated memory suffices for it."""
        store = buffer.store
        return (
            buffer is self._buffer
            and store is self._store
            and store.obs_store is self._obs_store
            and (buffer.buffer_size, buffer.n_envs, buffer.n_steps) == (self.capacity, self.n_envs, self.n_steps)
            and list(_row_arrays(buffer)) == self._names
            and (self._frames is None or self._frames.is_compatible())
        )

    def sync(self, gamma: float) -> None:
        """Copy all rows that changed since the last sync.

        :param gamma: discount of one step of the following reads
        """
        store, position = self._store, self._buffer.pos
        arrays = _row_arrays(self._buffer)
        copy_all = self._n_writes < 0 or store.n_edits != self._n_edits
        n_new = store.n_writes - self._n_writes
        if copy_all or n_new >= self.capacity:
            self._ring.copy_rows(0, min(store.rows, self.capacity), arrays)
        else:
            # The newest row of the last sync may have changed; with optimize_memory_usage, also the next row to write
            begin, end = position - n_new - 1, position + self._obs_store.rows_ahead
            if begin < 0 and self._buffer.full:
                self._ring.copy_rows(begin + self.capacity, self.capacity, arrays)
            self._ring.copy_rows(max(begin, 0), min(end, store.rows), arrays)
        if self._frames is not None:
            self._frames.sync()
        self._newest_row.fill_((position - 1) % self.capacity)
        self._n_writes, self._n_edits = store.n_writes, store.n_edits
        if gamma != self._gamma:
            self._gamma = gamma
            powers: Array = gamma ** np.arange(self.n_steps + 1, dtype=np.float32)
            self._powers.copy_(th.from_numpy(powers.astype(np.float32, copy=False)))

    def read(self, indices: th.Tensor, weights: th.Tensor) -> Batch:
        """Return a batch.

        :param indices: flat indices ``row * n_envs + env`` of the transitions, ``(B,)``
        :param weights: importance weights, ``(B,)``
        """
        ring, n_envs = self._ring, self.n_envs
        rows = indices if n_envs == 1 else indices // n_envs
        envs = th.zeros_like(indices) if n_envs == 1 else indices % n_envs
        last_rows, last, returns, steps = self._n_step_returns(rows, envs, indices)
        terminated = ring.read("dones", last) * (1 - ring.read("timeouts", last))
        masked = "action_masks" in ring.columns
        return Batch(
            self._observations(rows, envs, indices, "observations"),
            ring.read("actions", indices)[:, 0].long(),
            returns,
            (1 - terminated) * self._powers.index_select(0, steps),
            self._observations(last_rows, envs, last, "next_observations"),
            weights,
            ring.read("action_masks", indices) if masked else None,
            ring.read("next_action_masks", last) if masked else None,
        )

    def _n_step_returns(
        self, rows: th.Tensor, envs: th.Tensor, indices: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Compute n-step returns as :mod:`sb3_scratch_dqn.replay.nstep` does.

        :return: rows and flat indices of the last steps, discounted sums of rewards, and window lengths, each ``(B,)``
        """
        ring = self._ring
        if self.n_steps == 1:
            return rows, indices, ring.read("rewards", indices), th.ones_like(indices)
        window = (rows.unsqueeze(1) + self._steps) % self.capacity  # (B, n_steps)
        window_indices = window * self.n_envs + envs.unsqueeze(1)
        ends = (ring.read("dones", window_indices) != 0) | (ring.read("timeouts", window_indices) != 0)
        ends = (ends | ring.read("cuts", window_indices) | (window == self._newest_row)).long()
        inside = ends.cumsum(dim=1) == ends  # no earlier step ends the window
        steps = inside.sum(dim=1)
        returns = (ring.read("rewards", window_indices) * self._powers[: self.n_steps] * inside).sum(dim=1)
        last_rows = (rows + steps - 1) % self.capacity
        return last_rows, last_rows * self.n_envs + envs, returns, steps

    def _observations(self, rows: th.Tensor, envs: th.Tensor, indices: th.Tensor, name: str) -> PyTorchObs:
        is_next = name == "next_observations"
        if self._frames is not None:
            read = self._frames.read_next if is_next else self._frames.read
            return read(rows, envs, self._ring, indices)
        if is_next and isinstance(self._obs_store, SharedObservations):
            name, indices = "observations", (rows + 1) % self.capacity * self.n_envs + envs
        if self._keys is None:
            return self._ring.read(name, indices)
        return {key: self._ring.read(f"{name}/{key}", indices) for key in self._keys}


def _row_arrays(buffer: ScratchReplayBuffer) -> Mapping[str, Array]:
    """Return all arrays of the store with one entry for each row and environment, by name."""
    store, obs_store = buffer.store, buffer.store.obs_store
    names = [*store.OWN_COLUMNS, *(name for name in store.MASKS if getattr(store, name) is not None)]
    columns = {name: getattr(store, name) for name in names}
    if isinstance(obs_store, DenseObservations):
        return {**columns, **obs_store.arrays(store.rows)}
    assert isinstance(obs_store, StackedFrames)
    return {**columns, **DeviceFrames.row_arrays(obs_store)}
