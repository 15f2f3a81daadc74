"""Where transitions lie in memory.

A store is a ring of ``capacity`` rows, one row a call of ``env.step()``, with one column an environment:
every array is ``(rows, n_envs, ...)``. What was observed is left to a keeper
(:mod:`sb3_scratch_dqn.replay.observations`).
"""

import warnings
from copy import copy
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.replay.frames import NotStackedError, StackedFrames
from sb3_scratch_dqn.replay.observations import (
    Array,
    Observation,
    ObservationStore,
    resized,
    row_bytes,
    take_array,
)

# A store begins with about this many rows, so that small buffers never grow
_FIRST_ROWS = 256


class Store:
    """Transitions: what was observed, done and received, and how it ended.

    Memory is asked for as the store fills: the rows double until they reach ``capacity``. Rows that were never
    written are zero.

    :param capacity: the most rows that the store will hold
    :param n_envs: number of environments
    :param observations: keeps what is observed, for a ring of the same capacity
    :param action_dim: numbers in one action
    :param action_dtype: the dtype of these numbers

    ``cuts`` are true where the following row does not go on with the episode although that did not end, as when
    the environment was reset.

    Masks of allowed actions, ``(rows, n_envs, A)``, are kept from the first that is written on; before that they are
    ``None``, and cost nothing.

    For whoever keeps a copy, ``written`` counts the rows that are written, and ``edits`` the occasions on which others
    may have been changed. The newest row may change without either.
    """

    COLUMNS: ClassVar = ("actions", "rewards", "dones", "timeouts")  # those that SB3's buffers have too
    OWN_COLUMNS: ClassVar = (*COLUMNS, "cuts")
    MASKS: ClassVar = ("action_masks", "next_action_masks")

    actions: Array
    rewards: npt.NDArray[np.float32]
    dones: npt.NDArray[np.float32]
    timeouts: npt.NDArray[np.float32]
    cuts: npt.NDArray[np.bool_]
    has_cuts = False  # whether there may be any
    written = 0
    edits = 0
    action_masks: npt.NDArray[np.bool_] | None = None
    next_action_masks: npt.NDArray[np.bool_] | None = None

    def __init__(
        self, capacity: int, n_envs: int, observations: ObservationStore, action_dim: int, action_dtype: npt.DTypeLike
    ) -> None:
        self.capacity = capacity
        self.rows = 0
        self.obs_store = observations
        self.actions = np.zeros((0, n_envs, action_dim), dtype=action_dtype)
        self.rewards = np.zeros((0, n_envs), dtype=np.float32)
        self.dones = np.zeros((0, n_envs), dtype=np.float32)
        self.timeouts = np.zeros((0, n_envs), dtype=np.float32)
        self.cuts = np.zeros((0, n_envs), dtype=bool)

    @property
    def observations(self) -> Observation:
        """What was observed, ``(rows, n_envs, ...)``."""
        return self.obs_store.observations

    @property
    def next_observations(self) -> Observation:
        """What came next, ``(rows, n_envs, ...)``.

        :raises AttributeError: if each observation is kept once
        """
        return self.obs_store.next_observations

    def replace(self, name: str, value: Observation) -> None:
        """Put other arrays in the place of those of this name.

        :raises ValueError: if they are of another kind or shape
        """
        self.edits += 1
        if name not in self.OWN_COLUMNS:
            self.obs_store.replace(name, value)
            return
        current = getattr(self, name)
        if isinstance(value, dict) or value.shape != current.shape:
            raise ValueError(f"{name} must be replaced by what has the same shape, {current.shape}")
        setattr(self, name, np.ascontiguousarray(value, dtype=current.dtype))

    def reserve(self, rows: int) -> None:
        """Have memory for at least ``rows`` rows.

        :param rows: at most ``capacity``
        """
        if rows <= self.rows:
            return
        # The capacity over a power of two, so that the last step copies one half and not nearly all
        size = self.capacity
        while size >= 2 * max(rows, _FIRST_ROWS):
            size = -(-size // 2)
        self._resize(size)

    def trimmed(self, rows: int) -> "Store":
        """A store that holds the first ``rows`` rows, for saving; it grows again when written to."""
        store = copy(self)
        store.obs_store = copy(self.obs_store)
        store._resize(min(rows, self.rows))
        return store

    def _resize(self, rows: int) -> None:
        self.obs_store.resize(rows)
        for name in self.OWN_COLUMNS:
            setattr(self, name, resized(getattr(self, name), rows))
        for name in self.MASKS:
            masks = getattr(self, name)
            if masks is not None:
                setattr(self, name, resized(masks, rows, fill=True))
        self.rows = rows

    def write(
        self,
        row: int,
        observation: Observation,
        next_observation: Observation,
        action: Array,
        reward: Array,
        done: Array,
        timeout: Array | float,
    ) -> None:
        """Put one step of every environment into ``row``; each argument is ``(n_envs, ...)``."""
        needed = row + 1 + self.obs_store.rows_ahead
        if needed > self.rows:
            self.reserve(min(needed, self.capacity))
        try:
            self.obs_store.write(row, observation, next_observation)
        except NotStackedError as reason:
            assert isinstance(self.obs_store, StackedFrames)
            warnings.warn(
                f"replay keeps each observation in full from now on, which takes {2 * self.obs_store.n_stack} times "
                f"the memory: frames cannot be kept once, because {reason}",
                stacklevel=3,
            )
            self.obs_store = self.obs_store.dense()
            self.obs_store.write(row, observation, next_observation)
        self.actions[row] = action.reshape(self.actions.shape[1:])
        self.rewards[row] = reward
        self.dones[row] = done
        self.timeouts[row] = timeout
        if self.has_cuts:
            self.cuts[row] = False
        self.written += 1

    def cut(self, row: int, where: Array) -> None:
        """Let the following row not go on with the episodes of these environments, ``(n_envs,)``."""
        self.cuts[row] = where
        self.has_cuts = True
        if row != (self.written - 1) % self.capacity:
            self.edits += 1

    def write_masks(self, row: int, masks: Array | bool, next_masks: Array | bool) -> None:
        """Put what was allowed before and after one step into a row that was written.

        :param row: the row
        :param masks: ``(n_envs, A)``, or true for everything
        :param next_masks: likewise
        """
        for name, value in zip(self.MASKS, (masks, next_masks), strict=True):
            if getattr(self, name) is None:
                if value is True:
                    continue
                # Whatever came before was not masked
                setattr(self, name, np.ones((self.rows, *np.shape(value)), dtype=bool))
            getattr(self, name)[row] = value

    def read_both(self, rows: Array, last_rows: Array, envs: Array) -> tuple[Observation, Observation]:
        """What was observed in ``rows``, and one step after ``last_rows``; copies, ``(B, *observation_shape)``.

        :param rows: ``(B,)``
        :param last_rows: ``(B,)``
        :param envs: ``(B,)``
        """
        return self.obs_store.read(rows, envs), self.obs_store.read_next(last_rows, envs)

    def bytes_of(self, rows: int) -> int:
        """The memory that this many rows take."""
        columns = [getattr(self, name) for name in self.OWN_COLUMNS]
        columns += [masks for masks in (self.action_masks, self.next_action_masks) if masks is not None]
        return rows * sum(row_bytes(array) for array in columns) + self.obs_store.bytes_of(rows)

    def arrays(self, rows: int) -> dict[str, Array]:
        """All that the first rows need, by name, for a file; not copied."""
        columns = {name: getattr(self, name) for name in (*self.OWN_COLUMNS, *self.MASKS)}
        return {
            **{name: array[:rows] for name, array in columns.items() if array is not None},
            **self.obs_store.arrays(rows),
        }

    def restore(self, arrays: dict[str, Array], rows: int, next_row: int, n_actions: int) -> None:
        """Hold what another store of the same kind held.

        :param arrays: as :meth:`arrays` gave them
        :param rows: how many rows they have
        :param next_row: the row that would have been written next
        :param n_actions: ``A`` of the masks, if there are any
        :raises ValueError: naming an array that is missing, or has another shape or dtype than it must
        """
        columns = self.OWN_COLUMNS
        taken: dict[str, Any] = {name: take_array(arrays, name, getattr(self, name), rows) for name in columns}
        like = np.zeros((0, self.rewards.shape[1], n_actions), dtype=bool)
        taken.update({name: take_array(arrays, name, like, rows) for name in self.MASKS if name in arrays})
        self.obs_store.restore(arrays, rows, next_row)
        self.has_cuts = bool(taken["cuts"].any())
        vars(self).update(taken)
        self.rows = rows
        self.written = next_row
        self.edits += 1
