"""Storage of transitions.

A store is a ring buffer of ``capacity`` rows. Each call of ``env.step()`` writes one row, with one column for each
environment: every array is ``(rows, n_envs, ...)``. Observations are held by an
:class:`~sb3_scratch_dqn.replay.observations.ObservationStore`.
"""

import warnings
from copy import copy
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.replay.frame_layout import NotStackedError
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import (
    Array,
    Observation,
    ObservationStore,
    resized,
    row_bytes,
    take_array,
)

# Rows of the first allocation, approximately: small buffers never grow
_FIRST_ROWS = 256


# Attributes that had other names in older pickles
_OLD_NAMES = {"keeper": "obs_store", "written": "n_writes", "edits": "n_edits"}


class Store:
    """Observations, actions, rewards and episode ends of transitions.

    Memory is allocated as the store fills: the rows double until they reach ``capacity``. Rows never written are zero.

    :param capacity: maximum number of rows
    :param n_envs: number of environments
    :param observations: store of the observations, of the same capacity
    :param action_dim: number of elements of an action
    :param action_dtype: dtype of the actions

    ``cuts`` are true where the following row does not continue an episode that did not end, for example after a reset
    of the environment.

    Action masks, ``(rows, n_envs, A)``, are allocated with the first that is written; until then they are ``None``.

    For copies (for example on a GPU), ``n_writes`` counts the rows written, and ``n_edits`` possible modifications of
    other rows. The newest row may change without either.
    """

    COLUMNS: ClassVar = ("actions", "rewards", "dones", "timeouts")  # as in SB3's buffers
    OWN_COLUMNS: ClassVar = (*COLUMNS, "cuts")
    MASKS: ClassVar = ("action_masks", "next_action_masks")

    actions: Array
    rewards: npt.NDArray[np.float32]
    dones: npt.NDArray[np.float32]
    timeouts: npt.NDArray[np.float32]
    cuts: npt.NDArray[np.bool_]
    has_cuts = False  # True if any of ``cuts`` may be true
    n_writes = 0
    n_edits = 0
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied store; older pickles have other attribute names."""
        vars(self).update({_OLD_NAMES.get(name, name): value for name, value in state.items()})

    @property
    def observations(self) -> Observation:
        """The observations, ``(rows, n_envs, ...)``."""
        return self.obs_store.observations

    @property
    def next_observations(self) -> Observation:
        """The next observations, ``(rows, n_envs, ...)``.

        :raises AttributeError: if each observation is stored once
        """
        return self.obs_store.next_observations

    def replace(self, name: str, value: Observation) -> None:
        """Replace the arrays of one attribute.

        :param name: ``"observations"``, ``"next_observations"`` or one of ``OWN_COLUMNS``
        :param value: the new arrays
        :raises ValueError: if their structure or shape differs, or if they cannot be replaced
        """
        self.n_edits += 1
        if name not in self.OWN_COLUMNS:
            self.obs_store.replace(name, value)
            return
        current = getattr(self, name)
        if isinstance(value, dict) or value.shape != current.shape:
            raise ValueError(f"{name} must be replaced by an array of the same shape, {current.shape}")
        setattr(self, name, np.ascontiguousarray(value, dtype=current.dtype))

    def reserve(self, rows: int) -> None:
        """Allocate memory for at least ``rows`` rows, at most ``capacity``."""
        if rows <= self.rows:
            return
        # Sizes are the capacity over a power of two, so that the last resize copies half of it, not nearly all of it
        size = self.capacity
        while size >= 2 * max(rows, _FIRST_ROWS):
            size = -(-size // 2)
        self._resize(size)

    def trimmed(self, rows: int) -> "Store":
        """Return a copy of the first ``rows`` rows, for saving; it grows again when written to."""
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
        """Write one step of every environment into ``row``; each argument is ``(n_envs, ...)``."""
        needed = row + 1 + self.obs_store.rows_ahead
        if needed > self.rows:
            self.reserve(min(needed, self.capacity))
        try:
            self.obs_store.write(row, observation, next_observation)
        except NotStackedError as reason:
            assert isinstance(self.obs_store, StackedFrames)
            warnings.warn(
                f"the replay buffer stores each observation in full from now on, which takes "
                f"{2 * self.obs_store.n_stack} times the memory: frames cannot be stored once, because {reason}",
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
        self.n_writes += 1

    def cut(self, row: int, where: Array) -> None:
        """Mark where the following row does not continue the episode.

        :param row: the row before the cut
        :param where: true for the environments whose episode is cut, ``(n_envs,)``
        """
        self.cuts[row] = where
        self.has_cuts = True
        if row != (self.n_writes - 1) % self.capacity:
            self.n_edits += 1

    def write_masks(self, row: int, masks: Array | bool, next_masks: Array | bool) -> None:
        """Write the action masks of one step.

        :param row: the row, whose step :meth:`write` wrote
        :param masks: true where an action was allowed before the step, ``(n_envs, A)``; ``True`` for all actions
        :param next_masks: the same after the step
        """
        for name, value in zip(self.MASKS, (masks, next_masks), strict=True):
            if getattr(self, name) is None:
                if value is True:
                    continue
                # Earlier transitions had no masks
                setattr(self, name, np.ones((self.rows, *np.shape(value)), dtype=bool))
            getattr(self, name)[row] = value

    def read_both(self, rows: Array, last_rows: Array, envs: Array) -> tuple[Observation, Observation]:
        """Return copies of the observations of ``rows`` and of the next observations of ``last_rows``.

        :param rows: ``(B,)``
        :param last_rows: ``(B,)``
        :param envs: ``(B,)``
        :return: two times ``(B, *observation_shape)``
        """
        return self.obs_store.read(rows, envs), self.obs_store.read_next(last_rows, envs)

    def bytes_of(self, rows: int) -> int:
        """Return the bytes that ``rows`` rows take."""
        columns = [getattr(self, name) for name in self.OWN_COLUMNS]
        columns += [masks for masks in (self.action_masks, self.next_action_masks) if masks is not None]
        return rows * sum(row_bytes(array) for array in columns) + self.obs_store.bytes_of(rows)

    def arrays(self, rows: int) -> dict[str, Array]:
        """Return views of all arrays that a file of the first ``rows`` rows needs, by name."""
        columns = {name: getattr(self, name) for name in (*self.OWN_COLUMNS, *self.MASKS)}
        return {
            **{name: array[:rows] for name, array in columns.items() if array is not None},
            **self.obs_store.arrays(rows),
        }

    def restore(self, arrays: dict[str, Array], rows: int, next_row: int, n_actions: int) -> None:
        """Load the contents of another store with the same settings.

        :param arrays: the arrays that its :meth:`arrays` returned
        :param rows: their number of rows
        :param next_row: the row that it would have written next
        :param n_actions: number of actions, ``A``, of the masks
        :raises ValueError: if an array is missing, or has the wrong shape or dtype
        """
        columns = self.OWN_COLUMNS
        loaded: dict[str, Any] = {name: take_array(arrays, name, getattr(self, name), rows) for name in columns}
        like = np.zeros((0, self.rewards.shape[1], n_actions), dtype=bool)
        loaded.update({name: take_array(arrays, name, like, rows) for name in self.MASKS if name in arrays})
        self.obs_store.restore(arrays, rows, next_row)
        self.has_cuts = bool(loaded["cuts"].any())
        vars(self).update(loaded)
        self.rows = rows
        self.n_writes = next_row
        self.n_edits += 1
