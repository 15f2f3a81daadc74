"""Mini-batches, the data of an update.

A :class:`Batch` is all that a loss gets from replay. Its leading axis ``B`` is the batch. ``returns`` and ``discounts``
include the horizon and the termination, so a loss needs neither ``gamma``, nor ``n_steps``, nor ``dones``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th
from jaxtyping import Bool, Float, Int, Int64, Shaped
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from torch import Tensor

from sb3_scratch_dqn.replay.observations import Array

Indices = npt.NDArray[np.integer[Any]]

# Observations, as tensors and as arrays; for Dict spaces, a dict of them
BatchedObs = Shaped[Tensor, "B *observation"] | dict[str, Shaped[Tensor, "B ..."]]
ArrayObs = Shaped[np.ndarray, "B *observation"] | dict[str, Shaped[np.ndarray, "B ..."]]


class Batch(NamedTuple):
    """``B`` transitions of one or more steps each.

    :param observations: observations in which the actions were taken
    :param actions: the actions taken
    :param returns: discounted sums of the rewards of the ``k`` steps that followed
    :param discounts: factors of the values of ``next_observations``: ``gamma**k * (1 - terminated)``
    :param next_observations: observations ``k`` steps later
    :param weights: importance weights of the losses; all 1 for uniform sampling
    :param action_masks: true where an action was allowed in ``observations``; ``None`` if all actions always are
    :param next_action_masks: the same for ``next_observations``
    :param indices: rows and environments in replay, for updates of priorities
    """

    observations: BatchedObs
    actions: Int64[Tensor, "B"]
    returns: Float[Tensor, "B"]
    discounts: Float[Tensor, "B"]
    next_observations: BatchedObs
    weights: Float[Tensor, "B"]
    action_masks: Bool[Tensor, "B A"] | None = None
    next_action_masks: Bool[Tensor, "B A"] | None = None
    indices: tuple[Int[Indices, "B"], Int[Indices, "B"]] | None = None

    def split(self, n_batches: int) -> "list[Batch]":
        """Split concatenated mini-batches.

        :param n_batches: number of mini-batches of the same size
        :return: this batch itself if ``n_batches`` is 1, else copies. They are separate allocations, because on some
            processors the last bits of a matrix product depend on the alignment of its operands
        """
        if n_batches == 1:
            return [self]
        size = len(self.actions) // n_batches

        def parts(value: Any) -> Any:
            if value is None:
                return [None] * n_batches
            if isinstance(value, dict):
                split = {key: parts(tensor) for key, tensor in value.items()}
                return [{key: tensors[i] for key, tensors in split.items()} for i in range(n_batches)]
            if isinstance(value, tuple):
                return list(zip(*(np.split(array, n_batches) for array in value), strict=True))
            return [part.clone() for part in value.split(size)]

        return [Batch(*fields) for fields in zip(*map(parts, self), strict=True)]


class ArrayBatch(NamedTuple):
    """A :class:`Batch` of arrays, field by field."""

    observations: ArrayObs
    actions: Int64[np.ndarray, "B"]
    returns: Float[np.ndarray, "B"]
    discounts: Float[np.ndarray, "B"]
    next_observations: ArrayObs
    weights: Float[np.ndarray, "B"]
    action_masks: Bool[np.ndarray, "B A"] | None = None
    next_action_masks: Bool[np.ndarray, "B A"] | None = None
    indices: tuple[Int[Indices, "B"], Int[Indices, "B"]] | None = None

    def tensors(self, device: th.device) -> Batch:
        """Convert the arrays to tensors; on the CPU these share the arrays' memory."""
        if device.type == "cpu":
            convert: Callable[[Array], Tensor] = th.from_numpy
        else:
            convert = partial(th.as_tensor, device=device)

        def converted(value: Any) -> Any:
            if value is None:
                return None
            return {key: convert(array) for key, array in value.items()} if isinstance(value, dict) else convert(value)

        return Batch(*map(converted, self[:-1]))._replace(indices=self.indices)


def arrays_of(batch: Batch) -> ArrayBatch:
    """Convert a batch on the CPU to arrays that share its memory."""

    def array(value: Any) -> Any:
        if value is None:
            return None
        return {key: tensor.numpy() for key, tensor in value.items()} if isinstance(value, dict) else value.numpy()

    return ArrayBatch(*map(array, batch[:-1]))._replace(indices=batch.indices)


def batch_from_samples(samples: ReplayBufferSamples | DictReplayBufferSamples, gamma: float) -> Batch:
    """Convert a sample of an SB3 replay buffer, such as ``HerReplayBuffer``.

    :param samples: columns of shape ``(B, 1)``
    :param gamma: the discount of one step, used where ``samples`` has no ``discounts``
    """
    discounts = gamma if samples.discounts is None else samples.discounts
    return Batch(
        observations=samples.observations,
        actions=samples.actions.long().squeeze(1),
        returns=samples.rewards.squeeze(1),
        discounts=((1 - samples.dones) * discounts).squeeze(1),
        next_observations=samples.next_observations,
        weights=th.ones_like(samples.rewards).squeeze(1),
    )
