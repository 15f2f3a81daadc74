"""How observations lie in memory.

A transition has two of them: what was observed, and what came next. A keeper holds both for a ring of ``capacity``
rows, one row a call of ``env.step()``, with one column an environment. Its arrays are ``(rows, n_envs, ...)``, for
``Dict`` spaces a dict of such arrays; :func:`map_observation` treats both alike.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape

Array = npt.NDArray[Any]
Observation = Array | dict[str, Array]
Space = spaces.Space[Any]


def map_observation(function: Callable[[Array], Array], observation: Observation) -> Observation:
    """Apply ``function`` to an observation's array, or to each array of a dict of them."""
    if isinstance(observation, dict):
        return {key: function(value) for key, value in observation.items()}
    return function(observation)


def resized(array: Array, rows: int, fill: float = 0) -> Array:
    """A copy with ``rows`` rows, the new ones ``fill``."""
    copy = np.full((rows, *array.shape[1:]), fill, dtype=array.dtype) if fill else np.zeros(
        (rows, *array.shape[1:]), dtype=array.dtype
    )  # fmt: skip
    kept = min(rows, len(array))
    copy[:kept] = array[:kept]
    return copy


def row_bytes(array: Array) -> int:
    """The memory of one row."""
    return array.dtype.itemsize * math.prod(array.shape[1:])


def gather(array: Array, rows: Array, envs: Array) -> Array:
    """``array[rows, envs]``, in a third of the time.

    :param array: ``(R, E, ...)``, contiguous
    :param rows: ``(B,)``
    :param envs: ``(B,)``
    :return: a copy, ``(B, ...)``
    """
    n_envs = array.shape[1]
    gathered: Array
    if n_envs == 1:  # whose number can only be 0
        gathered = array[:, 0].take(rows, axis=0)
    else:
        gathered = array.reshape(-1, *array.shape[2:]).take(rows * n_envs + envs, axis=0)
    return gathered


class ObservationStore(Protocol):
    """Keeps the observations of a ring of transitions."""

    rows_ahead: int
    """Rows beyond the one that is written which writing needs."""

    @property
    def observations(self) -> Observation:
        """What was observed, ``(rows, n_envs, ...)``."""

    @property
    def next_observations(self) -> Observation:
        """What came next, likewise.

        :raises AttributeError: if it lies among ``observations``
        """

    def replace(self, name: str, value: Observation) -> None:
        """Put other arrays in the place of ``observations`` or ``next_observations``.

        :raises ValueError: if they are of another kind or shape, or cannot be replaced
        """

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Put one step of every environment into ``row``; each observation is ``(n_envs, ...)``."""

    def read(self, rows: Array, envs: Array) -> Observation:
        """What was observed in these rows and environments, each ``(B,)``; a copy, ``(B, *observation_shape)``."""

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """What was observed one step after these rows, likewise."""

    def resize(self, rows: int) -> None:
        """Hold this many rows from now on."""

    def arrays(self, rows: int) -> dict[str, Array]:
        """All that these first rows need, by name, for a file; not copied."""

    def restore(self, arrays: dict[str, Array], rows: int, next_row: int) -> None:
        """Take the place of the keeper that gave ``arrays``.

        :param arrays: as :meth:`arrays` gave them
        :param rows: how many rows they have
        :param next_row: the row that would have been written next
        :raises ValueError: naming an array that is missing, or has another shape or dtype than it must
        """

    def bytes_of(self, rows: int) -> int:
        """The memory that this many rows take."""


def take_array(arrays: dict[str, Array], name: str, like: Array, rows: int | None = None) -> Array:
    """Take the array of a file that stands for ``like``.

    :param arrays: by name
    :param name: of the array
    :param like: has the dtype and all of the shape but the number of rows
    :param rows: that number; ``None`` for any
    :raises ValueError: if it is missing, or has another shape or dtype
    """
    if name not in arrays:
        raise ValueError(f"it has no array {name!r}")
    array = arrays[name]
    needed = (len(array) if rows is None and array.ndim > 0 else rows, *like.shape[1:])
    if array.dtype != like.dtype or array.shape != needed:
        raise ValueError(
            f"its array {name!r} has shape {array.shape} and dtype {array.dtype}, "
            f"but must have shape {needed} and dtype {like.dtype}"
        )
    return array


def named_parts(name: str, observation: Observation) -> dict[str, Array]:
    """The arrays of an observation by names of their own: ``name``, or ``name/key`` for each key of a dict."""
    if isinstance(observation, dict):
        return {f"{name}/{key}": array for key, array in observation.items()}
    return {name: observation}


class DenseObservations:
    """Every observation in full, twice: as what was observed and as what came next.

    :param capacity: the most rows that it will hold
    :param n_envs: number of environments
    :param space: what the environments observe; ``Dict`` spaces must not be nested
    """

    names: tuple[str, ...] = ("observations", "next_observations")
    rows_ahead = 0

    observations: Observation
    next_observations: Observation

    def __init__(self, capacity: int, n_envs: int, space: Space) -> None:
        self.capacity = capacity
        # Observations of Discrete spaces come as (n_envs,), and lie as (n_envs, 1)
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self._discrete = {key for key, part in parts.items() if isinstance(part, spaces.Discrete)}

        def empty(space: Space) -> Array:
            return np.zeros((0, n_envs, *get_obs_shape(space)), dtype=space.dtype)

        for name in self.names:
            kept = (
                {key: empty(part) for key, part in space.spaces.items()}
                if isinstance(space, spaces.Dict)
                else empty(space)
            )
            setattr(self, name, kept)

    def replace(self, name: str, value: Observation) -> None:
        """Put other arrays in the place of ``observations`` or ``next_observations``.

        :raises ValueError: if they are of another kind or shape
        """
        current = getattr(self, name)

        def shapes(observation: Observation) -> Any:
            return {k: v.shape for k, v in observation.items()} if isinstance(observation, dict) else observation.shape

        if isinstance(value, dict) != isinstance(current, dict) or shapes(value) != shapes(current):
            raise ValueError(f"{name} must be replaced by what has the same shape, {shapes(current)}")
        if isinstance(current, dict):
            assert isinstance(value, dict)
            cast: Observation = {
                key: np.ascontiguousarray(array, dtype=current[key].dtype) for key, array in value.items()
            }
        else:
            cast = np.ascontiguousarray(value, dtype=current.dtype)
        setattr(self, name, cast)

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Put one step of every environment into ``row``; each observation is ``(n_envs, ...)``."""
        self._put(self.observations, row, observation)
        self._put(self.next_observations, row, next_observation)

    def _put(self, target: Observation, row: int, value: Observation) -> None:
        if isinstance(target, dict):
            assert isinstance(value, dict)
            for key, array in target.items():
                array[row] = np.reshape(value[key], array.shape[1:]) if key in self._discrete else value[key]
        else:
            assert not isinstance(value, dict)
            target[row] = np.reshape(value, target.shape[1:]) if self._discrete else value

    def read(self, rows: Array, envs: Array) -> Observation:
        """What was observed in these rows and environments, each ``(B,)``; a copy, ``(B, *observation_shape)``."""
        return map_observation(lambda array: gather(array, rows, envs), self.observations)

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """What was observed one step after these rows, likewise."""
        return map_observation(lambda array: gather(array, rows, envs), self.next_observations)

    def resize(self, rows: int) -> None:
        """Hold this many rows from now on."""
        for name in self.names:
            setattr(self, name, map_observation(lambda array: resized(array, rows), getattr(self, name)))

    def arrays(self, rows: int) -> dict[str, Array]:
        """All that these first rows need, by name, for a file; not copied."""
        return {
            part: array[:rows] for name in self.names for part, array in named_parts(name, getattr(self, name)).items()
        }

    def restore(self, arrays: dict[str, Array], rows: int, next_row: int) -> None:
        """Take the place of the keeper that gave ``arrays``.

        :param arrays: as :meth:`arrays` gave them
        :param rows: how many rows they have
        :param next_row: the row that would have been written next
        :raises ValueError: naming an array that is missing, or has another shape or dtype than it must
        """
        for name in self.names:
            current = getattr(self, name)
            if isinstance(current, dict):
                value: Observation = {
                    key: take_array(arrays, f"{name}/{key}", like, rows) for key, like in current.items()
                }
            else:
                value = take_array(arrays, name, current, rows)
            setattr(self, name, value)

    def bytes_of(self, rows: int) -> int:
        """The memory that this many rows take."""
        return rows * sum(row_bytes(array) for array in self.arrays(rows).values())


class SharedObservations(DenseObservations):
    """Every observation once: what came next is read from the row that follows.

    That halves the memory, and makes what follows the last step of an episode the first observation of the next one.
    """

    names = ("observations",)
    rows_ahead = 1

    @property
    def next_observations(self) -> Observation:  # type: ignore[override]  # what the other has, this one has not
        """There are none.

        :raises AttributeError: always
        """
        raise AttributeError("with optimize_memory_usage, what came next is the following row of observations")

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Put one step of every environment into ``row`` and the one that follows."""
        self._put(self.observations, row, observation)
        self._put(self.observations, (row + 1) % self.capacity, next_observation)

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """What was observed one step after these rows."""
        return self.read((rows + 1) % self.capacity, envs)
