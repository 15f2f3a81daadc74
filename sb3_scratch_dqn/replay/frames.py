"""Stacked observations, each frame kept once.

With frame stacking, an observation is the last ``k`` frames, and the next observation shares all but one of them.
:class:`StackedFrames` keeps the newest frame of each observation, and builds the stacks when they are read.

Let ``t`` count the steps that were ever written; row ``t % capacity`` holds step ``t``. The frames are a ring of
``capacity + k`` places, place ``t % (capacity + k)`` for the newest frame of step ``t``, so that the oldest row still
has the ``k - 1`` frames before it and the newest one the frame that came next. For every row is known

- its *age*, how many steps (at most ``k - 1``) before it the episode began: older frames are padding, as the wrapper
  makes it;
- where the frame that came next lies, if the following row does not continue it, as after an episode's end: in a pool
  of *last frames*.

What is written is compared, to the last bit, with what reading it would build. So nothing depends on what wrappers are
believed to do: an observation that is no stack after all raises :class:`NotStackedError` before anything is changed.
"""

from collections.abc import Mapping
from copy import copy
from typing import Literal, NamedTuple

import numpy as np
from gymnasium import spaces

from sb3_scratch_dqn.replay.observations import (
    Array,
    DenseObservations,
    Observation,
    Space,
    gather,
    resized,
    row_bytes,
    take_array,
)

# Stacks are converted in pieces when they turn out not to be ones
_CHUNK = 256


class NotStackedError(ValueError):
    """An observation is no stack of frames that continues the one before."""


class Stacking(NamedTuple):
    """How observations are made of frames.

    :param n_stack: frames in an observation, ``k``
    :param axes: the axis of an observation along which its frames lie, oldest first; for ``Dict`` spaces, of each key
    :param padding: what stands for frames before the first one of an episode: zeros, or that first one again
    """

    n_stack: int
    axes: int | Mapping[str, int]
    padding: Literal["zero", "first"]


class _Layout:
    """One array of an observation as frames, and back.

    :param shape: of the array
    :param axis: along which the frames lie
    :param n_stack: how many there are
    """

    def __init__(self, shape: tuple[int, ...], axis: int, n_stack: int) -> None:
        self.shape = shape
        self.axis = axis % len(shape)
        if shape[self.axis] % n_stack != 0:
            raise NotStackedError(f"{shape[self.axis]} numbers along axis {axis} are no {n_stack} frames")
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        depth = shape[self.axis] // n_stack
        self.split = (*before, n_stack, depth, *after)
        self.frame_shape = (*before, depth, *after)

    def frames(self, stacks: Array) -> Array:
        """``(B, *shape)`` to ``(B, k, *frame_shape)``; a view where that is possible."""
        return np.moveaxis(stacks.reshape(len(stacks), *self.split), self.axis + 1, 1)

    def stacks(self, frames: Array) -> Array:
        """``(B, k, *frame_shape)`` to ``(B, *shape)``; a view where that is possible."""
        return np.moveaxis(frames, 1, self.axis + 1).reshape(len(frames), *self.shape)


def _bits(array: Array) -> Array:
    """The same memory as whole numbers, so that NaN and the sign of zero are compared too."""
    return array.view(f"u{array.dtype.itemsize}")


class StackedFrames:
    """Keeps stacked observations as single frames, ``1 / 2k`` of the memory of :class:`DenseObservations`.

    :param capacity: the most rows that it will hold
    :param n_envs: number of environments
    :param space: what the environments observe: a ``Box``, or a ``Dict`` of them
    :param stacking: how it is made of frames
    :raises NotStackedError: if the space has no room for such a stack
    """

    rows_ahead = 0

    def __init__(self, capacity: int, n_envs: int, space: Space, stacking: Stacking) -> None:
        self.capacity = capacity
        self.n_envs = n_envs
        self.space = space
        self.n_stack = stacking.n_stack
        self.pads_with_zeros = stacking.padding == "zero"
        self.is_dict = isinstance(space, spaces.Dict)
        parts: Mapping[str, Space] = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self.layouts: dict[str, _Layout] = {}
        for key, part in parts.items():
            if not isinstance(part, spaces.Box) or part.dtype.itemsize not in (1, 2, 4, 8):
                raise NotStackedError(f"{part} is no space of stacked frames")
            axis = stacking.axes if isinstance(stacking.axes, int) else stacking.axes[key]
            self.layouts[key] = _Layout(part.shape, axis, stacking.n_stack)

        self.steps = 0  # ever written
        self.frames = {
            key: np.zeros((self.n_stack, n_envs, *layout.frame_shape), dtype=parts[key].dtype)
            for key, layout in self.layouts.items()
        }
        self.ages = np.zeros((0, n_envs), dtype=np.uint16)
        self.last_frames = {key: array[:0, 0].copy() for key, array in self.frames.items()}  # (slots, ...)
        self.last_slots = np.full((0, n_envs), -1, dtype=np.int32)  # -1: the following row continues this one
        self.free_slots: list[int] = []
        # What came next in the newest row, (n_envs, k, ...), to compare the following observation with
        self._pending: dict[str, Array] | None = None

    # Writing

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Put one step of every environment into ``row``; each observation is ``(n_envs, ...)``.

        :raises NotStackedError: if they are no stacks that continue those before, or begin an episode; then nothing
            was written
        """
        now, following = self._split(observation), self._split(next_observation)
        continued = self._continued(now)
        begun = np.flatnonzero(~continued).tolist()
        for env in begun:
            self._check_start(now, env)
        for key, frames in following.items():
            if not np.array_equal(_bits(frames[:, :-1]), _bits(now[key][:, 1:])):
                raise NotStackedError("what came next is not the observation with one more frame")

        step, places = self.steps, len(next(iter(self.frames.values())))
        assert row == step % self.capacity
        # Before the first step there is none: nothing continues it, and the row is not looked at
        previous_row = (step - 1) % self.capacity if step > 0 else row
        ages = np.where(continued, np.minimum(self.ages[previous_row] + 1, self.n_stack - 1), 0)
        for env in begun:
            if step > 0:
                self._keep_last_frame(previous_row, step % places, env)
            for key, frames in now.items():
                self.frames[key][step % places, env] = frames[env, -1]
        # After the previous row was seen to, which is this one if there is only one
        for env in np.flatnonzero(self.last_slots[row] >= 0):
            self.free_slots.append(int(self.last_slots[row, env]))
        self.last_slots[row] = -1
        self.ages[row] = ages
        for key, frames in following.items():
            self.frames[key][(step + 1) % places] = frames[:, -1]
        self._pending = following
        self.steps += 1

    def _split(self, observation: Observation) -> dict[str, Array]:
        """The frames of an observation, ``(n_envs, k, ...)``, copied."""
        parts = observation if isinstance(observation, dict) else {"": observation}
        return {
            key: np.array(layout.frames(np.asarray(parts[key])), dtype=self.frames[key].dtype, order="C")
            for key, layout in self.layouts.items()
        }

    def _continued(self, now: dict[str, Array]) -> Array:
        """Whether an observation is what came next one step before, ``(n_envs,)``."""
        if self._pending is None:
            return np.zeros(self.n_envs, dtype=bool)
        pending = self._pending
        if all(np.array_equal(_bits(frames), _bits(pending[key])) for key, frames in now.items()):
            return np.ones(self.n_envs, dtype=bool)  # the common case
        return np.array(
            [
                all(np.array_equal(_bits(frames[env]), _bits(pending[key][env])) for key, frames in now.items())
                for env in range(self.n_envs)
            ]
        )

    def _check_start(self, now: dict[str, Array], env: int) -> None:
        for key, frames in now.items():
            padding = np.zeros_like(frames[env, -1]) if self.pads_with_zeros else frames[env, -1]
            if not (_bits(frames[env, :-1]) == _bits(padding)).all():
                kind = "zeros" if self.pads_with_zeros else "the same frame"
                raise NotStackedError(
                    f"an observation {key!r} ".replace(" '' ", " ")
                    + f"neither continues the one before nor begins with {kind}"
                )

    def _keep_last_frame(self, row: int, place: int, env: int) -> None:
        if not self.free_slots:
            slots = len(next(iter(self.last_frames.values())))
            more = max(16, slots // 2)
            self.last_frames = {key: resized(pool, slots + more) for key, pool in self.last_frames.items()}
            self.free_slots = list(range(slots + more - 1, slots - 1, -1))
        slot = self.free_slots.pop()
        for key, pool in self.last_frames.items():
            pool[slot] = self.frames[key][place, env]
        self.last_slots[row, env] = slot

    # Reading

    def read(self, rows: Array, envs: Array) -> Observation:
        """What was observed in these rows and environments, each ``(B,)``; a copy, ``(B, *observation_shape)``."""
        return self._join(self._window(rows, envs, range(1 - self.n_stack, 1)))

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """What was observed one step after these rows, likewise."""
        window = self._window(rows, envs, range(2 - self.n_stack, 2))
        self._put_last_frames(window, rows, envs)
        return self._join(window)

    def read_both(self, rows: Array, last_rows: Array, envs: Array) -> tuple[Observation, Observation]:
        """What was observed in ``rows``, and one step after ``last_rows``; copies, which may share memory."""
        if last_rows is not rows:
            return self.read(rows, envs), self.read_next(last_rows, envs)
        window = self._window(rows, envs, range(1 - self.n_stack, 2))
        self._put_last_frames(window, rows, envs)
        return (
            self._join({key: frames[:, :-1] for key, frames in window.items()}),
            self._join({key: frames[:, 1:] for key, frames in window.items()}),
        )

    def _window(self, rows: Array, envs: Array, offsets: range) -> dict[str, Array]:
        """The frames at these steps after those of the rows, ``(B, len(offsets), ...)``, with padding."""
        newest = self.steps - 1
        steps = newest - (newest - rows) % self.capacity  # (B,)
        wanted = steps[:, None] + np.arange(offsets.start, offsets.stop)  # (B, W)
        first = (steps - gather(self.ages, rows, envs))[:, None]
        padded = wanted < first
        any_padded = bool(padded.any())
        if any_padded:
            wanted = np.maximum(wanted, first)
        places = len(next(iter(self.frames.values())))
        index = (wanted % places) * self.n_envs + envs[:, None]
        window = {}
        for key, frames in self.frames.items():
            flat = frames.reshape(-1, *frames.shape[2:])
            window[key] = flat.take(index, axis=0)
            if any_padded and self.pads_with_zeros:
                window[key][padded] = 0
        return window

    def _put_last_frames(self, window: dict[str, Array], rows: Array, envs: Array) -> None:
        slots = gather(self.last_slots, rows, envs)
        kept = slots >= 0
        if kept.any():
            for key, frames in window.items():
                frames[kept, -1] = self.last_frames[key][slots[kept]]

    def _join(self, window: dict[str, Array]) -> Observation:
        stacks = {key: self.layouts[key].stacks(frames) for key, frames in window.items()}
        return stacks if self.is_dict else stacks[""]

    # All rows

    @property
    def observations(self) -> Observation:
        """What was observed, built for all rows, ``(rows, n_envs, ...)``; rows never written are zero."""
        return self.dense().observations

    @property
    def next_observations(self) -> Observation:
        """What came next, likewise."""
        return self.dense().next_observations

    def replace(self, name: str, value: Observation) -> None:
        """Refuse.

        :raises ValueError: always
        """
        raise ValueError(f"{name} cannot be replaced, because each frame is kept once: use frames=False for that")

    def dense(self) -> DenseObservations:
        """The same observations in full."""
        dense = DenseObservations(self.capacity, self.n_envs, self.space)
        dense.resize(len(self.ages))
        written = min(self.steps, self.capacity)
        for begin in range(0, written, _CHUNK):
            rows = np.arange(begin, min(begin + _CHUNK, written))
            row, env = (grid.reshape(-1) for grid in np.meshgrid(rows, np.arange(self.n_envs), indexing="ij"))
            for kept, read in zip(
                (dense.observations, dense.next_observations), self.read_both(row, row, env), strict=True
            ):
                for key in self.layouts:
                    array = kept[key] if isinstance(kept, dict) else kept
                    values = read[key] if isinstance(read, dict) else read
                    array[rows] = values.reshape(len(rows), self.n_envs, *array.shape[2:])
        return dense

    def resize(self, rows: int) -> None:
        """Hold this many rows from now on."""
        self.frames = {key: resized(array, rows + self.n_stack) for key, array in self.frames.items()}
        self.ages = resized(self.ages, rows)
        self.last_slots = resized(self.last_slots, rows, fill=-1)

    def bytes_of(self, rows: int) -> int:
        """The memory that this many rows take, without the last frames of episodes, whose number nobody knows."""
        of_frames = sum(row_bytes(array) for array in self.frames.values())
        return (rows + self.n_stack) * of_frames + rows * (row_bytes(self.ages) + row_bytes(self.last_slots))

    def arrays(self, rows: int) -> dict[str, Array]:
        """All that these first rows need, by name, for a file; not copied."""
        arrays: dict[str, Array] = {
            "steps": np.array([self.steps], dtype=np.int64),
            "ages": self.ages[:rows],
            "last_slots": self.last_slots[:rows],
        }
        for key, array in self.frames.items():
            arrays[f"frames/{key}".rstrip("/")] = array[: rows + self.n_stack]
        for key, array in self.last_frames.items():
            arrays[f"last_frames/{key}".rstrip("/")] = array
        return arrays

    def restore(self, arrays: dict[str, Array], rows: int, next_row: int) -> None:
        """Take the place of the keeper that gave ``arrays``.

        :param arrays: as :meth:`arrays` gave them
        :param rows: how many rows they have
        :param next_row: the row that would have been written next
        :raises ValueError: naming an array that is missing, does not fit, or points outside another one
        """
        steps = int(take_array(arrays, "steps", np.zeros(1, dtype=np.int64), 1)[0])
        if steps % self.capacity != next_row or min(steps, self.capacity) != rows:
            raise ValueError(f"its array 'steps' counts {steps}, but its {rows} rows end before row {next_row}")
        ages = take_array(arrays, "ages", self.ages, rows)
        if ages.max(initial=0) >= self.n_stack:
            raise ValueError(f"its array 'ages' has others than 0 to {self.n_stack - 1}")
        last_slots = take_array(arrays, "last_slots", self.last_slots, rows)
        frames, last_frames = (
            {key: take_array(arrays, f"{name}/{key}".rstrip("/"), like, length) for key, like in kept.items()}
            for name, kept, length in (
                ("frames", self.frames, rows + self.n_stack),
                ("last_frames", self.last_frames, None),
            )
        )
        n_slots = min(len(array) for array in last_frames.values())
        used = last_slots[last_slots >= 0]
        if len(np.unique(used)) != len(used) or used.max(initial=-1) >= n_slots:
            raise ValueError("its array 'last_slots' points to last frames that there are not")
        self.steps, self.ages, self.last_slots = steps, ages, last_slots
        self.frames, self.last_frames = frames, last_frames
        self.free_slots = sorted(set(range(n_slots)) - set(used.tolist()), reverse=True)
        self._pending = None
        if steps > 0:
            newest = np.full(self.n_envs, (steps - 1) % self.capacity)
            self._pending = self._split(self.read_next(newest, np.arange(self.n_envs)))

    def __copy__(self) -> "StackedFrames":
        """A keeper whose writing does not reach into this one."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.frames, other.last_frames = copy(self.frames), copy(self.last_frames)
        other.free_slots = self.free_slots.copy()
        return other
