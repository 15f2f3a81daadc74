"""What an update learns from.

A :class:`Batch` is the only thing the loss sees of the replay. Its leading axis ``B`` is the batch;
``returns`` and ``discounts`` already carry the horizon and the ending, so a loss needs neither
``gamma``, nor ``n_steps``, nor ``dones``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, ReplayBufferSamples

from sb3_scratch_dqn.replay.observations import Array, Observation

Indices = npt.NDArray[np.integer[Any]]


class Batch(NamedTuple):
    """``B`` transitions, folded over one or more steps.

    :param observations: what was observed, ``(B, *observation_shape)``, or a dict of such tensors
    :param actions: what was done, ``(B,)``, int64
    :param returns: the discounted sum of the rewards of the ``k`` steps that followed, ``(B,)``
    :param discounts: what the value of ``next_observations`` counts: ``gamma**k * (1 - terminated)``, ``(B,)``
    :param next_observations: what was observed ``k`` steps later, shaped as ``observations``
    :param weights: importance weights of the losses, ``(B,)``; all 1 for uniform sampling
    :param action_masks: true where an action was allowed in ``observations``, ``(B, A)``; ``None`` if all always are
    :param next_action_masks: the same for ``next_observations``
    :param places: rows and environments in replay, each ``(B,)``, for giving priorities back
    """

    observations: PyTorchObs
    actions: th.Tensor
    returns: th.Tensor
    discounts: th.Tensor
    next_observations: PyTorchObs
    weights: th.Tensor
    action_masks: th.Tensor | None = None
    next_action_masks: th.Tensor | None = None
    places: tuple[Indices, Indices] | None = None

    def split(self, n_batches: int) -> "list[Batch]":
        """Cut ``n_batches`` batches of the same size apart, which lie one behind the other.

        Each gets memory of its own: on some processors the last bits of a matrix product depend on where it begins.
        """
        if n_batches == 1:
            return [self]
        size = len(self.actions) // n_batches

        def parts(value: Any) -> Any:
            if value is None:
                return [None] * n_batches
            if isinstance(value, dict):
                split = {key: parts(array) for key, array in value.items()}
                return [{key: arrays[i] for key, arrays in split.items()} for i in range(n_batches)]
            if isinstance(value, tuple):
                return list(zip(*(np.split(array, n_batches) for array in value), strict=True))
            return [part.clone() for part in value.split(size)]

        return [Batch(*fields) for fields in zip(*map(parts, self), strict=True)]


class ArrayBatch(NamedTuple):
    """A :class:`Batch` that still lies in arrays, field by field."""

    observations: Observation
    actions: Array
    returns: Array
    discounts: Array
    next_observations: Observation
    weights: Array
    action_masks: Array | None = None
    next_action_masks: Array | None = None
    places: tuple[Indices, Indices] | None = None

    def tensors(self, device: th.device) -> Batch:
        """The same as tensors, on the CPU in the same memory."""
        if device.type == "cpu":
            move: Callable[[Array], th.Tensor] = th.from_numpy
        else:
            move = partial(th.as_tensor, device=device)

        def moved(value: Any) -> Any:
            if value is None:
                return None
            return {key: move(array) for key, array in value.items()} if isinstance(value, dict) else move(value)

        return Batch(*map(moved, self[:-1]))._replace(places=self.places)


def arrays_of(batch: Batch) -> ArrayBatch:
    """A batch that lies on the CPU as arrays, in the same memory."""

    def array(value: Any) -> Any:
        if value is None:
            return None
        return {key: one.numpy() for key, one in value.items()} if isinstance(value, dict) else value.numpy()

    return ArrayBatch(*map(array, batch[:-1]))._replace(places=batch.places)


def batch_from_samples(samples: ReplayBufferSamples | DictReplayBufferSamples, gamma: float) -> Batch:
    """Read what a replay buffer of SB3 (``HerReplayBuffer``, for instance) sampled.

    :param samples: the columns of SB3, each ``(B, 1)``
    :param gamma: the discount of one step, used where ``samples`` has no ``discounts`` of its own
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
