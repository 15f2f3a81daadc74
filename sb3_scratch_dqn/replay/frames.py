"""Storage of stacked observations that stores each frame once.

With frame stacking, an observation is the last ``k`` frames, and the next observation shares all but one of them.
:class:`StackedFrames` stores the newest frame of each observation, and builds the stacks when they are read.

Let ``t`` count all steps written; row ``t % capacity`` holds step ``t``. The frames are another ring buffer with
``capacity + k`` slots; slot ``t % (capacity + k)`` holds the newest frame of step ``t``. So the oldest row still has
the ``k - 1`` frames before it, and the newest row has the frame of its next observation. Each row also has

- an *age*: the number of steps, at most ``k - 1``, since the episode began. Older frames are padding, as the wrapper
  makes it;
- a pointer into the pool of *last frames*, if the following row does not continue this one, as after the end of an
  episode: there is the frame of the next observation. SB3 normalises the last observation of an episode and back
  again, which changes its last bits: from the first such observation on, that pool stores whole next observations;
- a pointer into the pool of *whole observations*, if some of the frames were never added, as in data that begins in
  the middle of an episode.

Every observation written is compared bit for bit with what a read would return. So no assumption about wrappers can
corrupt data: :class:`NotStackedError` is raised before anything changes if observations are not stacks.
"""

from collections.abc import Mapping

import numpy as np
from gymnasium import spaces

from sb3_scratch_dqn.replay.frame_layout import FrameLayout, NotStackedError, Stacking, same_bits
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

# Rows converted to full observations in one call
_CHUNK = 256
# Maximum number of whole observations, in addition to an eighth of all observations
_MAX_WHOLE = 64

_Layout = FrameLayout  # the name in older pickles


class StackedFrames:
    """Stacked observations as single frames, in ``1 / 2k`` of the memory of :class:`DenseObservations`.

    :param capacity: maximum number of rows
    :param n_envs: number of environments
    :param space: observation space: a ``Box``, or a ``Dict`` of ``Box`` spaces
    :param stacking: how observations are made of frames
    :raises ValueError: if ``stacking`` is invalid
    :raises NotStackedError: if observations of ``space`` cannot be such stacks
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
        self.layouts: dict[str, FrameLayout] = {}
        for key, part in parts.items():
            if not isinstance(part, spaces.Box) or part.dtype.itemsize not in (1, 2, 4, 8):
                raise NotStackedError(f"{part} is not a space of stacked frames")
            axis = stacking.axes if isinstance(stacking.axes, int) else stacking.axes[key]
            self.layouts[key] = FrameLayout(part.shape, part.dtype, axis, stacking.n_stack)

        self.steps = 0  # number of steps written
        self.frames = {
            key: np.zeros((self.n_stack, n_envs, *layout.frame_shape), dtype=parts[key].dtype)
            for key, layout in self.layouts.items()
        }
        self.ages = np.zeros((0, n_envs), dtype=np.uint16)
        self.last = FramePool(n_envs, 1, self.frames)  # depth grows to n_stack with the first changed next observation
        self.whole = FramePool(n_envs, self.n_stack, self.frames)
        # Next observation of the newest row, to compare with the following observation: as it was given, and as frames
        self._pending: dict[str, Array] | None = None
        self._pending_frames: dict[str, Array] = {}
        self._pending_changed: set[int] = set()  # environments in which it does not continue the stack

    # Writing

    def write(self, row: int, observation: Observation, next_observation: Observation) -> None:
        """Write one step of every environment into ``row``; each observation is ``(n_envs, ...)``.

        :raises NotStackedError: if they are not stacks, or if too few of them continue the previous ones; then nothing
            was written
        :raises ValueError: if ``row`` is not the row after the last one written
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
            raise NotStackedError("a next observation in the middle of an episode does not continue the stack")
        if self.whole.used > _MAX_WHOLE + min(self.steps, self.capacity) * self.n_envs // 8:
            raise NotStackedError("too many observations neither continue the previous one nor begin an episode")

        step, n_slots = self.steps, len(next(iter(self.frames.values())))
        if row != step % self.capacity:
            raise ValueError(
                f"pos={row} must be {step % self.capacity}, because frames are stored in the order of the steps: "
                "call reset() to empty the buffer"
            )
        # The first step has no previous row: it continues nothing, so the value read here is not used
        previous_row = (step - 1) % self.capacity if step > 0 else row
        ages = np.minimum(self.ages[previous_row] + 1, self.n_stack - 1)
        # Environments with frames that were never added
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
                self.last.add(previous_row, env, self._pending_frames)
            for key, frames in now_frames.items():
                self.frames[key][step % n_slots, env] = frames[env, -1]
        # Only after the previous row was processed, which is this row if the capacity is one
        self.last.remove(row)
        self.whole.remove(row)
        self.ages[row] = ages
        for key, frames in following_frames.items():
            self.frames[key][(step + 1) % n_slots] = frames[:, -1]
        self._pending, self._pending_frames, self._pending_changed = following, following_frames, changed
        self.steps += 1
        if changed or incomplete:
            self._store_whole_next()
            for env in (*changed, *incomplete):
                self.last.add(row, env, following_frames)
            for env in incomplete:
                self.whole.add(row, env, now_frames)

    def _parts(self, observation: Observation) -> dict[str, Array]:
        """Return the arrays of an observation, ``(n_envs, *shape)``, by key."""
        parts = observation if isinstance(observation, dict) else {"": observation}
        return {
            key: np.asarray(parts[key], dtype=layout.dtype).reshape(self.n_envs, *layout.shape)
            for key, layout in self.layouts.items()
        }

    def _begun(self, now: dict[str, Array]) -> list[int]:
        """Return the environments whose observation differs from the previous next observation."""
        pending = self._pending
        if pending is None:
            return list(range(self.n_envs))
        if all(same_bits(array, pending[key]) for key, array in now.items()):
            return []  # the common case, on a fast path
        return [
            env
            for env in range(self.n_envs)
            if not all(same_bits(array[env], pending[key][env]) for key, array in now.items())
        ]

    def _is_padded(self, now_frames: dict[str, Array], env: int) -> bool:
        """Return True if an observation begins an episode: all of its frames except the newest are padding."""
        words = (layout.words(now_frames[key])[env] for key, layout in self.layouts.items())
        return all(bool((frames[:-1] == (0 if self.pads_with_zeros else frames[-1])).all()) for frames in words)

    def _changed(self, now_frames: dict[str, Array], following_frames: dict[str, Array]) -> set[int]:
        """Return the environments whose next observation is not the observation with one more frame."""
        changed: set[int] = set()
        for key, layout in self.layouts.items():
            equal = layout.words(following_frames[key])[:, :-1] == layout.words(now_frames[key])[:, 1:]
            if not equal.all():
                changed |= set(np.flatnonzero(~equal.all(axis=(1, 2))).tolist())
        return changed

    def _store_whole_next(self) -> None:
        """Extend the pool of last frames to hold all frames of next observations."""
        if self.last.depth == self.n_stack:
            return
        rows, envs = np.nonzero(self.last.slots >= 0)
        window = self._window(rows, envs, range(2 - self.n_stack, 2))
        self.last.overlay(window, rows, envs)
        pool = self.last.copy()
        pool.depth = self.n_stack
        for key, frames in pool.frames.items():
            pool.frames[key] = np.zeros((len(frames), self.n_stack, *frames.shape[2:]), dtype=frames.dtype)
            pool.frames[key][self.last.slots[rows, envs]] = window[key]
        self.last = pool

    # Reading

    def read(self, rows: Array, envs: Array) -> Observation:
        """Return a copy of observations, ``(B, *observation_shape)``; ``rows`` and ``envs`` are ``(B,)``."""
        window = self._window(rows, envs, range(1 - self.n_stack, 1))
        self.whole.overlay(window, rows, envs)
        return self._join(window)

    def read_next(self, rows: Array, envs: Array) -> Observation:
        """Return a copy of next observations, ``(B, *observation_shape)``; ``rows`` and ``envs`` are ``(B,)``."""
        window = self._window(rows, envs, range(2 - self.n_stack, 2))
        self.last.overlay(window, rows, envs)
        return self._join(window)

    def _window(self, rows: Array, envs: Array, offsets: range) -> dict[str, Array]:
        """Return frames, with padding.

        :param rows: ``(B,)``
        :param envs: ``(B,)``
        :param offsets: steps of the frames, relative to the steps of the rows
        :return: ``(B, len(offsets), ...)``, by key
        """
        newest = self.steps - 1
        steps = newest - (newest - rows) % self.capacity  # (B,)
        frame_steps = steps[:, None] + np.arange(offsets.start, offsets.stop)  # (B, W)
        first = (steps - gather(self.ages, rows, envs))[:, None]
        padded = frame_steps < first
        any_padded = bool(padded.any())
        if any_padded:
            frame_steps = np.maximum(frame_steps, first)
        n_slots = len(next(iter(self.frames.values())))
        index = (frame_steps % n_slots) * self.n_envs + envs[:, None]
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
        """All observations, built on each access, ``(rows, n_envs, ...)``; rows never written are zero."""
        return self.dense().observations

    @property
    def next_observations(self) -> Observation:
        """All next observations, built on each access, ``(rows, n_envs, ...)``; rows never written are zero."""
        return self.dense().next_observations

    def replace(self, name: str, value: Observation) -> None:
        """Raise ValueError, because single frames cannot replace arbitrary observations.

        :raises ValueError: always
        """
        raise ValueError(f"{name} cannot be replaced where each frame is stored once: use frames=False")

    def dense(self) -> DenseObservations:
        """Return the same observations in full."""
        dense = DenseObservations(self.capacity, self.n_envs, self.space)
        dense.resize(len(self.ages))
        written = min(self.steps, self.capacity)
        for begin in range(0, written, _CHUNK):
            rows = np.arange(begin, min(begin + _CHUNK, written))
            row, env = (grid.reshape(-1) for grid in np.meshgrid(rows, np.arange(self.n_envs), indexing="ij"))
            for target, values in (
                (dense.observations, self.read(row, env)),
                (dense.next_observations, self.read_next(row, env)),
            ):
                for key in self.layouts:
                    array = target[key] if isinstance(target, dict) else target
                    part = values[key] if isinstance(values, dict) else values
                    array[rows] = part.reshape(len(rows), self.n_envs, *array.shape[2:])
        return dense

    def resize(self, rows: int) -> None:
        """Change the number of allocated rows."""
        self.frames = {key: resized(array, rows + self.n_stack) for key, array in self.frames.items()}
        self.ages = resized(self.ages, rows)
        self.last.resize(rows)
        self.whole.resize(rows)

    def bytes_of(self, rows: int) -> int:
        """Return the bytes that ``rows`` rows take, if episodes stay as long as they are."""
        frame_bytes = sum(row_bytes(array) for array in self.frames.values())
        pools = [self.last, self.whole]
        pool_bytes = sum(array.nbytes for pool in pools for array in pool.frames.values()) / max(len(self.ages), 1)
        other_bytes = row_bytes(self.ages) + sum(row_bytes(pool.slots) for pool in pools) + pool_bytes
        return (rows + self.n_stack) * frame_bytes + int(rows * other_bytes)

    def arrays(self, rows: int) -> dict[str, Array]:
        """Return views of all arrays that a file of the first ``rows`` rows needs, by name."""
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
        """Load the contents of another store with the same settings.

        :param arrays: the arrays that its :meth:`arrays` returned
        :param rows: their number of rows
        :param next_row: the row that it would have written next
        :raises ValueError: if an array is missing, has a wrong shape, dtype or value, or points outside another array
        """
        steps = int(take_array(arrays, "steps", np.zeros(1, dtype=np.int64), 1)[0])
        if steps % self.capacity != next_row or min(steps, self.capacity) != rows:
            raise ValueError(f"its array 'steps' counts {steps}, but its {rows} rows end before row {next_row}")
        ages = take_array(arrays, "ages", self.ages, rows)
        if ages.max(initial=0) >= self.n_stack:
            raise ValueError(f"its array 'ages' must be in 0 to {self.n_stack - 1}")
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
        """Return a copy that shares no memory that :meth:`write` changes in place."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.frames = {key: array.copy() for key, array in self.frames.items()}
        other.ages, other.last, other.whole = self.ages.copy(), self.last.copy(), self.whole.copy()
        return other
