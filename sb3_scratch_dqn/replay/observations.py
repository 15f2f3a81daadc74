"""Storage of observations.

A transition has two of them: the observation and the next observation. An :class:`ObservationStore` holds both for a
ring buffer of ``capacity`` rows. Each call of ``env.step()`` writes one row, with one column for each environment. The
arrays are ``(rows, n_envs, ...)``; for ``Dict`` spaces they are a dict of such arrays. :func:`map_observation` handles
both forms.
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
    """Apply ``function`` to the array of an observation, or to each array of a dict."""
    if isinstance(observation, dict):
        return {key: function(value) for key, value in observation.items()}
    return function(observation)


def resized(array: Array, rows: int, fill: float = 0) -> Array:
    """Return a copy with ``rows`` rows; new rows are filled with ``fill``."""
    copy = np.full((rows, *array.shape[1:]), fill, dtype=array.dtype) if fill else np.zeros(
        (rows, *array.shape[1:]), dtype=array.dtype
    )  # fmt: skip
    n_copied = min(rows, len(array))
    copy[:n_copied] = array[:n_copied]
    return copy


def row_bytes(array: Array) -> int:
    """Return the bytes of one row."""
    return array.dtype.itemsize * math.prod(array.shape[1:])


def gather(array: Array, rows: Array, envs: Array) -> Array:
    """Return ``array[rows, envs]``, in a third of the time that NumPy's indexing takes.

    :param array: ``(R, E, ...)``, contiguous
    :param rows: ``(B,)``
    :param envs: ``(B,)``
    :return: a copy, ``(B, ...)``
    """
    n_envs = array.shape[1]
    gathered: Array
    if n_envs == 1:  # all of ``envs`` is 0
        gathered = array[:, 0].take(rows, axis=0)
    else:
        gathered = array.reshape(-1, *array.shape[2:]).take(rows * n_envs + envs, axis=0)
    return gathered


class ObservationStore(Protocol):
    """The observations of a ring buffer of transitions.

    :param rows_ahead: number of rows after the written row that :meth:`write` also needs
    """

    rows_ahead: int

    @property
    def observations(self) -> Observation:
        """The observations, ``(rows, n_envs, ...)``."""

    @property
    def next_observations(self) -> Observation:
        """The next observations, ``(rows, n_envs, ...)``.

        :raises AttributeError: if they are stored among ``observations``
        """

    def replace(self, name: str, value: Observation) -> None:
        """Replace the arrays of ``observations`` or ``next_observations``.

        :param name: one of these two names
        :param value: the new arrays
        :raises ValueError: if their structure or shape differs, or if they cannot be replaced
        """

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Write one step of every environment.

        :param row: row to write
        :param observation: ``(n_envs, ...)``
        :param next_observation: ``(n_envs, ...)``
        """

    def read(self, rows: Array, envs: Array) -> Observation:
        """Return a copy of observations.

        :param rows: ``(B,)``
        :param envs: ``(B,)``
        :return: ``(B, *observation_shape)``
        """

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """Return a copy of next observations.

        :param rows: ``(B,)``
        :param envs: ``(B,)``
        :return: ``(B, *observation_shape)``
        """

    def resize(self, rows: int) -> None:
        """Change the number of allocated rows."""

    def arrays(self, rows: int) -> dict[str, Array]:
        """Return views of all arrays that a file of the first ``rows`` rows needs, by name."""

    def restore(self, arrays: dict[str, Array], rows: int, next_row: int) -> None:
        """Load the contents of another store of the same class.

        :param arrays: the arrays that its :meth:`arrays` returned
        :param rows: their number of rows
        :param next_row: the row that it would have written next
        :raises ValueError: if an array is missing, or has the wrong shape or dtype
        """

    def bytes_of(self, rows: int) -> int:
        """Return the bytes that ``rows`` rows take."""


def take_array(arrays: dict[str, Array], name: str, like: Array, rows: int | None = None) -> Array:
    """Return an array of a file after checking its shape and dtype.

    :param arrays: the arrays by name
    :param name: name of the array
    :param like: an array of the required dtype, and of the required shape except for the number of rows
    :param rows: the required number of rows; ``None`` for any
    :raises ValueError: if the array is missing, or has another shape or dtype
    """
    if name not in arrays:
        raise ValueError(f"it has no array {name!r}")
    array = arrays[name]
    required = (len(array) if rows is None and array.ndim > 0 else rows, *like.shape[1:])
    if array.dtype != like.dtype or array.shape != required:
        raise ValueError(
            f"its array {name!r} has shape {array.shape} and dtype {array.dtype}, "
            f"but must have shape {required} and dtype {like.dtype}"
        )
    return array


def named_parts(name: str, observation: Observation) -> dict[str, Array]:
    """Return the arrays of an observation by name: ``name``, or ``name/key`` for each key of a dict."""
    if isinstance(observation, dict):
        return {f"{name}/{key}": array for key, array in observation.items()}
    return {name: observation}


class DenseObservations:
    """Observations and next observations in full, in separate arrays.

    :param capacity: maximum number of rows
    :param n_envs: number of environments
    :param space: observation space; ``Dict`` spaces must not be nested
    """

    names: tuple[str, ...] = ("observations", "next_observations")
    rows_ahead = 0

    observations: Observation
    next_observations: Observation

    def __init__(self, capacity: int, n_envs: int, space: Space) -> None:
        self.capacity = capacity
        # Observations of Discrete spaces arrive as (n_envs,) and are stored as (n_envs, 1)
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self._discrete = {key for key, part in parts.items() if isinstance(part, spaces.Discrete)}

        def empty(space: Space) -> Array:
            return np.zeros((0, n_envs, *get_obs_shape(space)), dtype=space.dtype)

        for name in self.names:
            arrays = (
                {key: empty(part) for key, part in space.spaces.items()}
                if isinstance(space, spaces.Dict)
                else empty(space)
            )
            setattr(self, name, arrays)

    def replace(self, name: str, value: Observation) -> None:
        """Replace the arrays of ``observations`` or ``next_observations``.

        :param name: one of these two names
        :param value: the new arrays
        :raises ValueError: if their structure or shape differs
        """
        current = getattr(self, name)

        def shapes(observation: Observation) -> Any:
            return {k: v.shape for k, v in observation.items()} if isinstance(observation, dict) else observation.shape

        if isinstance(value, dict) != isinstance(current, dict) or shapes(value) != shapes(current):
            raise ValueError(f"{name} must be replaced by arrays of the same shape, {shapes(current)}")
        if isinstance(current, dict):
            assert isinstance(value, dict)
            cast: Observation = {
                key: np.ascontiguousarray(array, dtype=current[key].dtype) for key, array in value.items()
            }
        else:
            cast = np.ascontiguousarray(value, dtype=current.dtype)
        setattr(self, name, cast)

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Write one step of every environment into ``row``; each observation is ``(n_envs, ...)``."""
        self._write_row(self.observations, row, observation)
        self._write_row(self.next_observations, row, next_observation)

    def _write_row(self, target: Observation, row: int, value: Observation) -> None:
        if isinstance(target, dict):
            assert isinstance(value, dict)
            for key, array in target.items():
                array[row] = np.reshape(value[key], array.shape[1:]) if key in self._discrete else value[key]
        else:
            assert not isinstance(value, dict)
            target[row] = np.reshape(value, target.shape[1:]) if self._discrete else value

    def read(self, rows: Array, envs: Array) -> Observation:
        """Return a copy of observations, ``(B, *observation_shape)``; ``rows`` and ``envs`` are ``(B,)``."""
        return map_observation(lambda array: gather(array, rows, envs), self.observations)

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """Return a copy of next observations, ``(B, *observation_shape)``; ``rows`` and ``envs`` are ``(B,)``."""
        return map_observation(lambda array: gather(array, rows, envs), self.next_observations)

    def resize(self, rows: int) -> None:
        """Change the number of allocated rows."""
        for name in self.names:
            setattr(self, name, map_observation(lambda array: resized(array, rows), getattr(self, name)))

    def arrays(self, rows: int) -> dict[str, Array]:
        """Return views of all arrays that a file of the first ``rows`` rows needs, by name."""
        return {
            part: array[:rows] for name in self.names for part, array in named_parts(name, getattr(self, name)).items()
        }

    def restore(self, arrays: dict[str, Array], rows: int, next_row: int) -> None:
        """Load the contents of another store of the same class.

        :param arrays: the arrays that its :meth:`arrays` returned
        :param rows: their number of rows
        :param next_row: the row that it would have written next
        :raises ValueError: if an array is missing, or has the wrong shape or dtype
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
        """Return the bytes that ``rows`` rows take."""
        return rows * sum(row_bytes(array) for array in self.arrays(rows).values())


class SharedObservations(DenseObservations):
    """Each observation once: the next observation is read from the following row.

    This halves the memory. After the last step of an episode, the next observation is the first of the next episode.
    """

    names = ("observations",)
    rows_ahead = 1

    @property
    def next_observations(self) -> Observation:  # type: ignore[override]  # the base class has an attribute
        """Not available.

        :raises AttributeError: always
        """
        raise AttributeError(
            "next_observations are not stored with optimize_memory_usage=True: "
            "the next observation is the following row of observations"
        )

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Write one step of every environment into ``row`` and the following row."""
        self._write_row(self.observations, row, observation)
        self._write_row(self.observations, (row + 1) % self.capacity, next_observation)

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """Return a copy of the observations in the following rows."""
        return self.read((rows + 1) % self.capacity, envs)
