"""Stacked observations, each frame kept once.

With frame stacking, an observation is the last ``k`` frames, and the next observation shares all but one of them.
:class:`StackedFrames` keeps the newest frame of each observation, and builds the stacks when they are read.

Let ``t`` count the steps that were ever written; row ``t % capacity`` holds step ``t``. The frames are a ring of
``capacity + k`` places, place ``t % (capacity + k)`` for the newest frame of step ``t``, so that the oldest row still
has the ``k - 1`` frames before it and the newest one the frame that came next. For every row is known

- its *age*, how many steps (at most ``k - 1``) before it the episode began: older frames are padding, as the wrapper
  makes it;
- where the frame that came next lies, if the following row does not continue it, as after an episode's end: in a pool
  of *last frames*. SB3 normalises the last observation of an episode and back again, which changes its last bits: that
  pool keeps what came next whole from the first such observation on;
- where the whole observation lies, if some of its frames were never added, as in data that begins in the middle of an
  episode: in a pool of *whole observations*.

What is written is compared, to the last bit, with what reading it would build. So nothing depends on what wrappers are
believed to do: where observations are no stacks after all, :class:`NotStackedError` is raised before anything is
changed.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_scratch_dqn.replay.frame_pool import FramePool, array_name
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
# So many observations, and an eighth of all, may be kept whole
_FEW = 64


class NotStackedError(ValueError):
    """Observations are no stacks of frames of which each continues the one before."""


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
    :param dtype: of the array
    :param axis: along which the frames lie
    :param n_stack: how many there are
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], axis: int, n_stack: int) -> None:
        self.shape = shape
        self.dtype = dtype
        axis %= len(shape)
        if shape[axis] % n_stack != 0:
            raise NotStackedError(f"{shape[axis]} numbers along axis {axis} are no {n_stack} frames")
        before, after = shape[:axis], shape[axis + 1 :]
        depth = shape[axis] // n_stack
        self.split = (*before, n_stack, depth, *after)
        self.frame_shape = (*before, depth, *after)
        rest = [place for place in range(1, len(self.split) + 1) if place != axis + 1]
        self._to_frames = (0, axis + 1, *rest)
        self._to_stacks = tuple(np.argsort(self._to_frames).tolist())
        # Frames are compared as the fewest whole numbers that hold their bits: NaN and the sign of zero count too
        bits = math.prod(self.frame_shape) * dtype.itemsize
        self._word = next(np.dtype(f"u{size}") for size in (8, 4, 2, 1) if bits % size == 0)

    def frames(self, stacks: Array) -> Array:
        """``(B, *shape)`` to ``(B, k, *frame_shape)``, contiguous; a view where that is possible."""
        return np.ascontiguousarray(stacks.reshape(len(stacks), *self.split).transpose(self._to_frames))

    def stacks(self, frames: Array) -> Array:
        """``(B, k, *frame_shape)`` to ``(B, *shape)``; a view where that is possible."""
        stacks: Array = frames.transpose(self._to_stacks).reshape(len(frames), *self.shape)
        return stacks

    def stacked_tensors(self, frames: th.Tensor) -> th.Tensor:
        """The same for tensors."""
        return frames.permute(self._to_stacks).reshape(len(frames), *self.shape)

    def words(self, frames: Array) -> Array:
        """The bits of contiguous frames, ``(B, k, W)``."""
        return frames.reshape(*frames.shape[:2], -1).view(self._word)


def _same_bits(left: Array, right: Array) -> bool:
    """Whether two arrays of one shape and dtype hold the same, to the bit."""
    if left.strides == right.strides and left.nbytes % 8 == 0:
        left, right = left.ravel("K"), right.ravel("K")  # views, if there are no gaps in memory
        return bool((left.view(np.uint64) == right.view(np.uint64)).all())
    whole = f"u{left.dtype.itemsize}"
    return bool((left.view(whole) == right.view(whole)).all())


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
        if stacking.n_stack < 1 or stacking.padding not in ("zero", "first"):
            raise ValueError(f"stacking={stacking} must have n_stack of at least 1 and padding 'zero' or 'first'")
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
            self.layouts[key] = _Layout(part.shape, part.dtype, axis, stacking.n_stack)

        self.steps = 0  # ever written
        self.frames = {
            key: np.zeros((self.n_stack, n_envs, *layout.frame_shape), dtype=parts[key].dtype)
            for key, layout in self.layouts.items()
        }
        self.ages = np.zeros((0, n_envs), dtype=np.uint16)
        self.last = FramePool(n_envs, 1, self.frames)  # what came next; deeper from the first that is no stack on
        self.whole = FramePool(n_envs, self.n_stack, self.frames)
        # What came next in the newest row, to compare the following observation with: as it was given, and as frames
        self._pending: dict[str, Array] | None = None
        self._pending_frames: dict[str, Array] = {}
        self._pending_changed: set[int] = set()  # environments in which that is no stack

    # Writing

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Put one step of every environment into ``row``; each observation is ``(n_envs, ...)``.

        :raises NotStackedError: if they are no stacks, or too few of them continue those before; then nothing was
            written
        """
        now = self._parts(observation)
        following = {key: array.copy(order="K") for key, array in self._parts(next_observation).items()}
        following_frames = {key: layout.frames(following[key]) for key, layout in self.layouts.items()}
        begun = self._begun(now)
        now_frames = self._pending_frames
        if begun:
            now_frames = {key: layout.frames(now[key]) for key, layout in self.layouts.items()}
        changed = self._changed(now_frames, following_frames)
        if self._pending_changed and not self._pending_changed <= set(begun):
            raise NotStackedError("what came next was not the observation with one more frame, but was gone on with")
        if self.whole.used > _FEW + min(self.steps, self.capacity) * self.n_envs // 8:
            raise NotStackedError("too many observations neither continue the one before nor begin an episode")

        step, places = self.steps, len(next(iter(self.frames.values())))
        if row != step % self.capacity:
            raise ValueError(
                f"pos={row} must be {step % self.capacity}: frames lie in the order in which they came, "
                "so empty the buffer by reset()"
            )
        # Before the first step there is none: nothing continues it, and the row is not looked at
        previous_row = (step - 1) % self.capacity if step > 0 else row
        ages = np.minimum(self.ages[previous_row] + 1, self.n_stack - 1)
        # Some of the frames of these were never added
        incomplete = [] if self.whole.used == 0 else np.flatnonzero(
            (self.whole.slots[previous_row] >= 0) & (ages < self.n_stack - 1)
        ).tolist()  # fmt: skip
        for env in begun:
            ages[env] = 0
            if env in incomplete:
                incomplete.remove(env)
            if not self._is_padded(now_frames, env):
                incomplete.append(env)
            if step > 0:
                self.last.keep(previous_row, env, self._pending_frames)
            for key, frames in now_frames.items():
                self.frames[key][step % places, env] = frames[env, -1]
        # After the previous row was seen to, which is this one if there is only one
        self.last.forget(row)
        self.whole.forget(row)
        self.ages[row] = ages
        for key, frames in following_frames.items():
            self.frames[key][(step + 1) % places] = frames[:, -1]
        self._pending, self._pending_frames, self._pending_changed = following, following_frames, changed
        self.steps += 1
        if changed or incomplete:
            self._keep_all_of_last()
            for env in (*changed, *incomplete):
                self.last.keep(row, env, following_frames)
            for env in incomplete:
                self.whole.keep(row, env, now_frames)

    def _parts(self, observation: Observation) -> dict[str, Array]:
        """The arrays of an observation, ``(n_envs, *shape)``, by key."""
        parts = observation if isinstance(observation, dict) else {"": observation}
        return {
            key: np.asarray(parts[key], dtype=layout.dtype).reshape(self.n_envs, *layout.shape)
            for key, layout in self.layouts.items()
        }

    def _begun(self, now: dict[str, Array]) -> list[int]:
        """The environments whose observation is not what came next one step before."""
        pending = self._pending
        if pending is None:
            return list(range(self.n_envs))
        if all(_same_bits(array, pending[key]) for key, array in now.items()):
            return []  # the common case
        return [
            env
            for env in range(self.n_envs)
            if not all(_same_bits(array[env], pending[key][env]) for key, array in now.items())
        ]

    def _is_padded(self, now_frames: dict[str, Array], env: int) -> bool:
        """Whether an observation begins an episode: all of its frames but the newest are padding."""
        words = (layout.words(now_frames[key])[env] for key, layout in self.layouts.items())
        return all(bool((frames[:-1] == (0 if self.pads_with_zeros else frames[-1])).all()) for frames in words)

    def _changed(self, now_frames: dict[str, Array], following_frames: dict[str, Array]) -> set[int]:
        """The environments where what came next is not the observation with one more frame."""
        changed: set[int] = set()
        for key, layout in self.layouts.items():
            equal = layout.words(following_frames[key])[:, :-1] == layout.words(now_frames[key])[:, 1:]
            if not equal.all():
                changed |= set(np.flatnonzero(~equal.all(axis=(1, 2))).tolist())
        return changed

    def _keep_all_of_last(self) -> None:
        """Let the pool of what came next hold all of its frames from now on."""
        if self.last.depth == self.n_stack:
            return
        rows, envs = np.nonzero(self.last.slots >= 0)
        window = self._window(rows, envs, range(2 - self.n_stack, 2))
        self.last.put(window, rows, envs)
        pool = self.last.copy()
        pool.depth = self.n_stack
        for key, frames in pool.frames.items():
            pool.frames[key] = np.zeros((len(frames), self.n_stack, *frames.shape[2:]), dtype=frames.dtype)
            pool.frames[key][self.last.slots[rows, envs]] = window[key]
        self.last = pool

    # Reading

    def read(self, rows: Array, envs: Array) -> Observation:
        """What was observed in these rows and environments, each ``(B,)``; a copy, ``(B, *observation_shape)``."""
        window = self._window(rows, envs, range(1 - self.n_stack, 1))
        self.whole.put(window, rows, envs)
        return self._join(window)

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """What was observed one step after these rows, likewise."""
        window = self._window(rows, envs, range(2 - self.n_stack, 2))
        self.last.put(window, rows, envs)
        return self._join(window)

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
            for kept, read in (
                (dense.observations, self.read(row, env)),
                (dense.next_observations, self.read_next(row, env)),
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
        self.last.resize(rows)
        self.whole.resize(rows)

    def bytes_of(self, rows: int) -> int:
        """The memory that this many rows take, if episodes go on to be as long as they were."""
        of_frames = sum(row_bytes(array) for array in self.frames.values())
        pools = [self.last, self.whole]
        of_pools = sum(array.nbytes for pool in pools for array in pool.frames.values()) / max(len(self.ages), 1)
        of_rows = row_bytes(self.ages) + sum(row_bytes(pool.slots) for pool in pools) + of_pools
        return (rows + self.n_stack) * of_frames + int(rows * of_rows)

    def arrays(self, rows: int) -> dict[str, Array]:
        """All that these first rows need, by name, for a file; not copied."""
        arrays: dict[str, Array] = {
            "steps": np.array([self.steps], dtype=np.int64),
            "ages": self.ages[:rows],
            **self.last.arrays("last", rows),
            **self.whole.arrays("whole", rows),
        }
        for key, array in self.frames.items():
            arrays[array_name("frames", key)] = array[: rows + self.n_stack]
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
        frames = {
            key: take_array(arrays, array_name("frames", key), like, rows + self.n_stack)
            for key, like in self.frames.items()
        }
        last = self.last.restored("last", arrays, rows, (1, self.n_stack))
        whole = self.whole.restored("whole", arrays, rows, (self.n_stack,))
        self.steps, self.ages, self.frames, self.last, self.whole = steps, ages, frames, last, whole
        self._pending = None
        if steps > 0:
            newest = np.full(self.n_envs, (steps - 1) % self.capacity)
            self._pending = self._parts(self.read_next(newest, np.arange(self.n_envs)))
            self._pending_frames = {key: layout.frames(self._pending[key]) for key, layout in self.layouts.items()}
            observed = self._parts(self.read(newest, np.arange(self.n_envs)))
            now_frames = {key: layout.frames(observed[key]) for key, layout in self.layouts.items()}
            self._pending_changed = self._changed(now_frames, self._pending_frames)

    def __copy__(self) -> "StackedFrames":
        """A keeper whose writing does not reach into this one."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.frames = {key: array.copy() for key, array in self.frames.items()}
        other.ages, other.last, other.whole = self.ages.copy(), self.last.copy(), self.whole.copy()
        return other
