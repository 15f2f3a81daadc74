"""The mini-batches of an engine, from any class of replay buffer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.replay.batch import ArrayBatch, Batch, arrays_of, batch_from_samples
from sb3_scratch_dqn.replay.buffer import ScratchReplayBuffer
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import DenseObservations, SharedObservations
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler, UniformSampler
from sb3_scratch_dqn.replay.stores import Store


@dataclass(frozen=True)
class BatchSource:
    """How an engine samples mini-batches and returns their priorities.

    :param sample: takes a number of batches and returns that many, concatenated in one :class:`Batch`
    :param sample_arrays: the same as an :class:`ArrayBatch`; on the CPU only
    :param update_priorities: takes one batch and the priorities of its transitions, ``(B,)``
    :param can_prefetch: True if ``sample`` can return several batches before the priorities of the first are known
    :param batch_size: transitions in one batch
    :param weighted: True if importance weights may differ from 1 and priorities are used
    :param buffer: the buffer, if ``sample`` is nothing but the unmodified ``sample_batch()`` of this buffer with the
        discount ``gamma``, so that an engine may read it in another way (for example on a GPU); else ``None``
    :param gamma: discount of one step
    """

    sample: Callable[[int], Batch]
    sample_arrays: Callable[[int], ArrayBatch]
    update_priorities: Callable[[Batch | ArrayBatch, th.Tensor], None]
    can_prefetch: bool
    batch_size: int
    weighted: bool = True
    buffer: ScratchReplayBuffer | None = None
    gamma: float = 0.0


def batch_source(buffer: Any, batch_size: int, env: VecNormalize | None, gamma: float) -> BatchSource:
    """Return the source of batches of a replay buffer.

    :param buffer: a :class:`ScratchReplayBuffer`, a proxy of one, or any replay buffer with SB3's interface
    :param batch_size: transitions in a batch
    :param env: normalises observations and rewards
    :param gamma: discount of one step
    """
    if not _has_sample_batch(buffer):
        sample_sb3 = partial(buffer.sample, batch_size, env=env)

        def sample(_: int) -> Batch:
            return batch_from_samples(sample_sb3(), gamma)

        return BatchSource(sample, lambda _: arrays_of(sample(1)), _ignore, False, batch_size, weighted=False)
    update_priorities = _ignore if isinstance(buffer.sampler, UniformSampler) else buffer.update_priorities
    if is_overridden(buffer, ScratchReplayBuffer, "sample_batch"):
        sample_one = partial(buffer.sample_batch, batch_size, env, gamma)
        return BatchSource(
            lambda _: sample_one(), lambda _: arrays_of(sample_one()), update_priorities, False, batch_size
        )
    return BatchSource(
        partial(buffer.sample_batch, batch_size, env, gamma),
        partial(buffer.sample_arrays, batch_size, env, gamma),
        update_priorities,
        not buffer.sampler.uses_priorities,
        batch_size,
        not isinstance(buffer.sampler, UniformSampler),
        buffer if env is None and _is_unmodified(buffer) else None,
        gamma,
    )


def _ignore(batch: Batch | ArrayBatch, priorities: th.Tensor) -> None:
    """Do nothing: uniform sampling uses no priorities."""


# Classes whose behaviour an engine may reproduce in another way
_KNOWN_SAMPLERS = (UniformSampler, PrioritizedSampler)
_KNOWN_OBS_STORES = (DenseObservations, SharedObservations, StackedFrames)


def _is_unmodified(buffer: ScratchReplayBuffer) -> bool:
    """Return True if storage, sampling and n-step returns of a buffer are this package's own."""
    sampler, store = buffer.sampler, buffer.store
    return (
        type(buffer) is ScratchReplayBuffer
        and type(sampler) in _KNOWN_SAMPLERS
        and type(store) is Store
        and type(store.obs_store) in _KNOWN_OBS_STORES
        # A monkey-patched method
        and not any(map(callable, chain(*(vars(part).values() for part in (buffer, sampler, store, store.obs_store)))))
    )


def check_sampling(buffer: ReplayBuffer, masked: bool) -> None:
    """Raise ValueError if a buffer would lose action masks or priorities when it samples.

    :param buffer: any replay buffer
    :param masked: whether the environments have action masks
    :raises ValueError: if ``masked`` is true but samples of the buffer have no action masks, or if it is a prioritized
        buffer whose ``sample()`` is overridden
    """
    name = type(buffer).__name__
    has_sample_batch = _has_sample_batch(buffer)
    if masked and not has_sample_batch:
        raise ValueError(
            f"replay_buffer_class={name} does not support action masks, but env has them: "
            "leave replay_buffer_class out, or hide action_masks() of env"
        )
    prioritized = isinstance(buffer, ScratchReplayBuffer) and not isinstance(buffer.sampler, UniformSampler)
    if prioritized and not has_sample_batch:
        raise ValueError(
            f"replay_buffer_class={name} overrides sample() or _get_samples(), so prioritized=True would have no "
            "effect: override sample_batch() instead"
        )


def _has_sample_batch(buffer: Any) -> bool:
    """Return True if ``sample_batch()`` exists and no override of ``sample()`` or ``_get_samples()`` would be bypassed.

    For a proxy of a :class:`ScratchReplayBuffer`, only the proxy's own attributes count as overrides.
    """
    if isinstance(buffer, ScratchReplayBuffer) and issubclass(type(buffer), ScratchReplayBuffer):
        return not is_overridden(buffer, ScratchReplayBuffer, "sample", "_get_samples")
    own_names = {name for cls in type(buffer).__mro__ for name in vars(cls)} | vars(buffer).keys()
    return own_names.isdisjoint({"sample", "_get_samples"}) and hasattr(buffer, "sample_batch")
