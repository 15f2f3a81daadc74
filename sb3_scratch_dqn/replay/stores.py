"""Where transitions lie in memory.

A store is a ring of ``capacity`` rows, one row a call of ``env.step()``, with one column an environment:
every array is ``(rows, n_envs, ...)``. Observations are an array, or a dict of arrays for ``Dict`` spaces;
:func:`map_observation` treats both alike.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape

Array = npt.NDArray[Any]
Observation = Array | dict[str, Array]
Space = spaces.Space[Any]

# A store begins with this many rows, so that small buffers never grow.
_FIRST_ROWS = 256


def map_observation(function: Callable[[Array], Array], observation: Observation) -> Observation:
    """Apply ``function`` to an observation's array, or to each array of a dict of them."""
    if isinstance(observation, dict):
        return {key: function(value) for key, value in observation.items()}
    return function(observation)


def _resized(array: Array, rows: int) -> Array:
    resized = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    kept = min(rows, len(array))
    resized[:kept] = array[:kept]
    return resized


class DenseStore:
    """Every observation in full, twice: as what was observed and as what came next.

    Memory is asked for as the store fills: the rows double until they reach ``capacity``. Rows that were never
    written are zero.

    :param capacity: the most rows that the store will hold
    :param n_envs: number of environments
    :param observation_space: what the environments observe; ``Dict`` spaces must not be nested
    :param action_dim: numbers in one action
    :param action_dtype: the dtype of these numbers
    :param share_next: keep each observation once: what came next is then read from the row that follows,
        which halves the memory and makes what follows the last step of an episode the first observation
        of the next one

    Masks of allowed actions, ``(rows, n_envs, A)``, are kept from the first that is written on; before that they are
    ``None``, and cost nothing.
    """

    ARRAYS: ClassVar = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    MASKS: ClassVar = ("action_masks", "next_action_masks")

    observations: Observation
    next_observations: Observation
    actions: Array
    rewards: npt.NDArray[np.float32]
    dones: npt.NDArray[np.float32]
    timeouts: npt.NDArray[np.float32]
    action_masks: npt.NDArray[np.bool_] | None = None
    next_action_masks: npt.NDArray[np.bool_] | None = None

    def __init__(
        self,
        capacity: int,
        n_envs: int,
        observation_space: Space,
        action_dim: int,
        action_dtype: npt.DTypeLike,
        share_next: bool = False,
    ) -> None:
        self.capacity = capacity
        self.share_next = share_next
        self.rows = 0

        def empty(space: Space) -> Array:
            return np.zeros((0, n_envs, *get_obs_shape(space)), dtype=space.dtype)

        if isinstance(observation_space, spaces.Dict):
            self.observations = {key: empty(space) for key, space in observation_space.spaces.items()}
        else:
            self.observations = empty(observation_space)
        self.next_observations = {} if share_next else map_observation(np.copy, self.observations)
        self.actions = np.zeros((0, n_envs, action_dim), dtype=action_dtype)
        self.rewards = np.zeros((0, n_envs), dtype=np.float32)
        self.dones = np.zeros((0, n_envs), dtype=np.float32)
        self.timeouts = np.zeros((0, n_envs), dtype=np.float32)

    def reserve(self, rows: int) -> None:
        """Have memory for at least ``rows`` rows.

        :param rows: at most ``capacity``
        """
        if rows > self.rows:
            self._resize(min(max(rows, 2 * self.rows, _FIRST_ROWS), self.capacity))

    def replace(self, name: str, value: Observation) -> None:
        """Put other arrays in the place of one of ``ARRAYS``.

        :raises ValueError: if they are of another kind or shape
        """
        current = getattr(self, name)

        def shapes(observation: Observation) -> Any:
            return {k: v.shape for k, v in observation.items()} if isinstance(observation, dict) else observation.shape

        if isinstance(value, dict) != isinstance(current, dict) or shapes(value) != shapes(current):
            raise ValueError(f"{name} must be replaced by what has the same shape, {shapes(current)}")
        setattr(self, name, value)

    def trimmed(self, rows: int) -> "DenseStore":
        """A store that holds the first ``rows`` rows, for saving; it grows again when written to."""
        store = copy(self)
        store._resize(min(rows, self.rows))
        return store

    def _resize(self, rows: int) -> None:
        for name in self.ARRAYS:
            setattr(self, name, map_observation(lambda array: _resized(array, rows), getattr(self, name)))
        for name in self.MASKS:
            masks = getattr(self, name)
            if masks is not None:
                resized = np.ones((rows, *masks.shape[1:]), dtype=bool)
                resized[: len(masks)] = masks[:rows]
                setattr(self, name, resized)
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
        following = (row + 1) % self.capacity
        self.reserve(max(row, following if self.share_next else row) + 1)
        self._put(self.observations, row, observation)
        if self.share_next:
            self._put(self.observations, following, next_observation)
        else:
            self._put(self.next_observations, row, next_observation)
        self.actions[row] = action.reshape(self.actions.shape[1:])
        self.rewards[row] = reward
        self.dones[row] = done
        self.timeouts[row] = timeout

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

    @staticmethod
    def _put(target: Observation, row: int, value: Observation) -> None:
        if isinstance(target, dict):
            assert isinstance(value, dict)
            for key, array in target.items():
                array[row] = np.asarray(value[key]).reshape(array.shape[1:])
        else:
            # Observations of Discrete spaces come as (n_envs,)
            target[row] = np.asarray(value).reshape(target.shape[1:])

    def read_observations(self, rows: Array, envs: Array) -> Observation:
        """What was observed in these rows and environments, each ``(B,)``; a copy, ``(B, *observation_shape)``."""
        return map_observation(lambda array: array[rows, envs], self.observations)

    def read_next_observations(self, rows: Array, envs: Array) -> Observation:
        """What was observed one step after these rows, each ``(B,)``; a copy, ``(B, *observation_shape)``."""
        if self.share_next:
            return self.read_observations((rows + 1) % self.capacity, envs)
        return map_observation(lambda array: array[rows, envs], self.next_observations)
