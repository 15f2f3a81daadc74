"""A replay buffer's transitions on another device, for updates that read them there.

The buffer stays what counts: whoever writes, saves or looks deals with it. :class:`DeviceReplay` keeps a copy of its
store, brings it up to date with the rows that were written since the last time, and makes of places the batches that
:meth:`~sb3_scratch_dqn.replay.buffer.ScratchReplayBuffer.sample_batch` would make. Frames are kept once here too.

Reading makes calls of PyTorch alone, always the same ones on the same memory, and waits for nobody, so that it can be
recorded. What would need other memory is told by :meth:`DeviceReplay.serves`.
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

# A window of returns reads as many rows as it may have steps; the host looks first how many it has
_LONGEST_WINDOW = 1024


class DeviceReplay:
    """A copy of what a buffer stores.

    :param buffer: one that :class:`~sb3_scratch_dqn.replay.buffer.BatchSource` calls plain
    :param device: where the copy is to lie
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
        self._written = self._edits = -1  # of the store, when this was last brought up to date

    @staticmethod
    def unsupported_reason(buffer: ScratchReplayBuffer, device: th.device) -> str | None:
        """Why a buffer cannot be copied; ``None`` if it can."""
        arrays, obs_store = _row_arrays(buffer), buffer.store.obs_store
        frames = obs_store.frames if isinstance(obs_store, StackedFrames) else {}
        strange = [array.dtype for array in (*arrays.values(), *frames.values()) if array.dtype not in DTYPES]
        if strange:
            return f"observations of dtype {strange[0]} stay in the memory of the host"
        if buffer.n_steps > _LONGEST_WINDOW:
            return f"n_steps={buffer.n_steps} is more than {_LONGEST_WINDOW}"
        if device.type == "cuda":
            needed = DeviceRing.bytes_of(buffer.buffer_size, buffer.n_envs, arrays)
            needed += DeviceFrames.bytes_of(obs_store) if isinstance(obs_store, StackedFrames) else 0
            # What PyTorch keeps for later is free too
            kept = th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
            free = th.cuda.mem_get_info(device)[0] + kept
            if needed > _PART_OF_MEMORY * free:
                return f"the full buffer takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}"
        return None

    def serves(self, buffer: ScratchReplayBuffer) -> bool:
        """Whether this is a copy of a buffer, and its memory will do."""
        store = buffer.store
        return (
            buffer is self._buffer
            and store is self._store
            and store.obs_store is self._obs_store
            and (buffer.buffer_size, buffer.n_envs, buffer.n_steps) == (self.capacity, self.n_envs, self.n_steps)
            and list(_row_arrays(buffer)) == self._names
            and (self._frames is None or self._frames.serves())
        )

    def follow(self, gamma: float) -> None:
        """Bring everything up to date.

        :param gamma: discount of one step, from now on
        """
        store, position = self._store, self._buffer.pos
        arrays = _row_arrays(self._buffer)
        anew = self._written < 0 or store.edits != self._edits
        n_new = store.written - self._written
        if anew or n_new >= self.capacity:
            self._ring.follow(0, min(store.rows, self.capacity), arrays)
        else:
            # The newest row of the last time may have changed, and with shared observations the one to be written next
            begin, end = position - n_new - 1, position + self._obs_store.rows_ahead
            if begin < 0 and self._buffer.full:
                self._ring.follow(begin + self.capacity, self.capacity, arrays)
            self._ring.follow(max(begin, 0), min(end, store.rows), arrays)
        if self._frames is not None:
            self._frames.follow()
        self._newest_row.fill_((position - 1) % self.capacity)
        self._written, self._edits = store.written, store.edits
        if gamma != self._gamma:
            self._gamma = gamma
            powers: Array = gamma ** np.arange(self.n_steps + 1, dtype=np.float32)
            self._powers.copy_(th.from_numpy(powers.astype(np.float32, copy=False)))

    def read(self, places: th.Tensor, weights: th.Tensor) -> Batch:
        """Make a batch.

        :param places: of its transitions, ``row * n_envs + env``, ``(B,)``
        :param weights: importance weights of their losses, ``(B,)``
        """
        ring, n_envs = self._ring, self.n_envs
        rows = places if n_envs == 1 else places // n_envs
        envs = th.zeros_like(places) if n_envs == 1 else places % n_envs
        last_rows, last, returns, steps = self._fold(rows, envs, places)
        ended = ring.read("dones", last) * (1 - ring.read("timeouts", last))
        masked = "action_masks" in ring.columns
        return Batch(
            self._observations(rows, envs, places, "observations"),
            ring.read("actions", places)[:, 0].long(),
            returns,
            (1 - ended) * self._powers.index_select(0, steps),
            self._observations(last_rows, envs, last, "next_observations"),
            weights,
            ring.read("action_masks", places) if masked else None,
            ring.read("next_action_masks", last) if masked else None,
        )

    def _fold(
        self, rows: th.Tensor, envs: th.Tensor, places: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """Windows of steps, as :mod:`sb3_scratch_dqn.replay.nstep` makes them.

        :return: rows and places of the last steps, discounted sums of rewards, and numbers of steps, each ``(B,)``
        """
        ring = self._ring
        if self.n_steps == 1:
            return rows, places, ring.read("rewards", places), th.ones_like(places)
        window = (rows.unsqueeze(1) + self._steps) % self.capacity  # (B, n_steps)
        within = window * self.n_envs + envs.unsqueeze(1)
        ends = (ring.read("dones", within) != 0) | (ring.read("timeouts", within) != 0)
        ends = (ends | ring.read("cuts", within) | (window == self._newest_row)).long()
        inside = ends.cumsum(dim=1) == ends  # none of the steps before is the last one
        steps = inside.sum(dim=1)
        returns = (ring.read("rewards", within) * self._powers[: self.n_steps] * inside).sum(dim=1)
        last_rows = (rows + steps - 1) % self.capacity
        return last_rows, last_rows * self.n_envs + envs, returns, steps

    def _observations(self, rows: th.Tensor, envs: th.Tensor, places: th.Tensor, name: str) -> PyTorchObs:
        follows = name == "next_observations"
        if self._frames is not None:
            read = self._frames.read_next if follows else self._frames.read
            return read(rows, envs, self._ring, places)
        if follows and isinstance(self._obs_store, SharedObservations):
            name, places = "observations", (rows + 1) % self.capacity * self.n_envs + envs
        if self._keys is None:
            return self._ring.read(name, places)
        return {key: self._ring.read(f"{name}/{key}", places) for key in self._keys}


# Of the memory that is free, how much a buffer may take: networks and updates need some too
_PART_OF_MEMORY = 0.6


def _row_arrays(buffer: ScratchReplayBuffer) -> Mapping[str, Array]:
    """All arrays of the store that have a row a step, by name."""
    store, obs_store = buffer.store, buffer.store.obs_store
    names = [*store.OWN_COLUMNS, *(name for name in store.MASKS if getattr(store, name) is not None)]
    columns = {name: getattr(store, name) for name in names}
    if isinstance(obs_store, DenseObservations):
        return {**columns, **obs_store.arrays(store.rows)}
    assert isinstance(obs_store, StackedFrames)
    return {**columns, **DeviceFrames.row_arrays(obs_store)}
