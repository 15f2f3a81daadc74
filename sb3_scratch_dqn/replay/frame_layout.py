"""How stacked observations are made of frames, and the conversion between stacks and frames."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th

from sb3_scratch_dqn.replay.observations import Array


class NotStackedError(ValueError):
    """Raised if observations are not stacks of frames in which each stack continues the previous one."""


class Stacking(NamedTuple):
    """How observations are made of frames.

    :param n_stack: number of frames in an observation, ``k``
    :param axes: axis of an observation along which the frames are concatenated, oldest first; for ``Dict`` spaces, a
        mapping with the axis of each key
    :param padding: frames before the first of an episode: ``"zero"`` for zeros, ``"first"`` to repeat the first
    """

    n_stack: int
    axes: int | Mapping[str, int]
    padding: Literal["zero", "first"]


class FrameLayout:
    """Conversion between one array of a stacked observation and its frames.

    :param shape: shape of the observation
    :param dtype: dtype of the observation
    :param axis: axis along which the frames are concatenated
    :param n_stack: number of frames, ``k``
    :raises NotStackedError: if the length of the axis is not a multiple of ``n_stack``
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], axis: int, n_stack: int) -> None:
        self.shape = shape
        self.dtype = dtype
        axis %= len(shape)
        if shape[axis] % n_stack != 0:
            raise NotStackedError(f"axis {axis} has length {shape[axis]}, which is not a multiple of n_stack={n_stack}")
        before, after = shape[:axis], shape[axis + 1 :]
        depth = shape[axis] // n_stack
        self.split = (*before, n_stack, depth, *after)
        self.frame_shape = (*before, depth, *after)
        other_axes = [index for index in range(1, len(self.split) + 1) if index != axis + 1]
        self._to_frames = (0, axis + 1, *other_axes)
        self._to_stacks = tuple(np.argsort(self._to_frames).tolist())
        # Frames are compared as the fewest integers that hold their bits, so that NaN and the sign of zero count too
        bits = math.prod(self.frame_shape) * dtype.itemsize
        self._word = next(np.dtype(f"u{size}") for size in (8, 4, 2, 1) if bits % size == 0)

    def frames(self, stacks: Array) -> Array:
        """Convert ``(B, *shape)`` to contiguous ``(B, k, *frame_shape)``; a view if possible."""
        return np.ascontiguousarray(stacks.reshape(len(stacks), *self.split).transpose(self._to_frames))

    def stacks(self, frames: Array) -> Array:
        """Convert ``(B, k, *frame_shape)`` to ``(B, *shape)``; a view if possible."""
        stacks: Array = frames.transpose(self._to_stacks).reshape(len(frames), *self.shape)
        return stacks

    def stacked_tensors(self, frames: th.Tensor) -> th.Tensor:
        """Convert as :meth:`stacks`, for tensors."""
        return frames.permute(self._to_stacks).reshape(len(frames), *self.shape)

    def words(self, frames: Array) -> Array:
        """Return the bits of contiguous frames as unsigned integers, ``(B, k, W)``."""
        return frames.reshape(*frames.shape[:2], -1).view(self._word)


def same_bits(left: Array, right: Array) -> bool:
    """Return True if two arrays of the same shape and dtype are equal bit for bit."""
    if left.strides == right.strides and left.nbytes % 8 == 0:
        left, right = left.ravel("K"), right.ravel("K")  # views, if there are no gaps in memory
        return bool((left.view(np.uint64) == right.view(np.uint64)).all())
    word = f"u{left.dtype.itemsize}"
    return bool((left.view(word) == right.view(word)).all())
