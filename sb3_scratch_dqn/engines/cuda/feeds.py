"""Mini-batches for captured updates.

Random numbers are drawn on the host, from the same generators and in the same order as samplers draw them. Everything
else happens on the device where possible (:class:`DeviceFeed`); otherwise whole mini-batches are copied from the host
(:class:`HostFeed`).
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch as th

from sb3_scratch_dqn.engines.cuda.capture import DeviceScalar, Function
from sb3_scratch_dqn.engines.eager import prefetch_count
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import Batch, BatchSource
from sb3_scratch_dqn.replay.device.buffer import DeviceReplay
from sb3_scratch_dqn.replay.device.ring import StagingBuffer
from sb3_scratch_dqn.replay.device.tree import DevicePriorities
from sb3_scratch_dqn.replay.samplers import DIVERGED, PrioritizedSampler

# Updates whose random numbers are drawn in one call and copied to the device in one transfer, which both have a fixed
# cost. Measured for the draw of batches of 64: 19 us per update for one, 0.7 for 64, 0.46 for 256, 0.42 for 1,024
UPDATES_PER_TRANSFER = 256


class Feed(Protocol):
    """Returns mini-batches to captured updates.

    :param max_updates: number of updates that may follow one another without the host
    """

    max_updates: int

    def supports(self, source: BatchSource) -> bool:
        """Return True if this feed, and the graphs that were captured with it, can be used for a source."""

    def sync(self, source: BatchSource) -> None:
        """Copy what changed in the source to the device; draw nothing."""

    def run(self, gradient_steps: int, update: Callable[[int], None]) -> None:
        """Run updates.

        :param gradient_steps: number of updates
        :param update: runs the given number of updates
        """

    def capture(self, capture: Callable[[Function], Function]) -> None:
        """Capture further functions that this feed calls repeatedly.

        :param capture: takes a function, and returns its replay
        """

    def next_batch(self) -> Batch:
        """Return the mini-batch of the next update; can be captured."""

    def update_priorities(self, priorities: th.Tensor) -> None:
        """Set the priorities of that mini-batch, ``(B,)``; can be captured."""

    def state(self) -> list[th.Tensor]:
        """Return all tensors that :meth:`next_batch` and :meth:`update_priorities` modify."""

    def diverged(self) -> th.Tensor | None:
        """Return True, on the device, if priorities were not finite; ``None`` if they are not checked there."""


class DeviceFeed:
    """Mini-batches from a copy of the replay buffer on the device.

    :param source: source with an unmodified replay buffer
    :param device: device of the updates
    :param update_index: index of the next update since random numbers were drawn, ``(1,)``
    """

    max_updates = UPDATES_PER_TRANSFER

    def __init__(self, source: BatchSource, device: th.device, update_index: th.Tensor) -> None:
        assert source.buffer is not None
        buffer = source.buffer
        self._source, self._buffer, self._sampler, self._update_index = source, buffer, buffer.sampler, update_index
        self._replay = DeviceReplay(buffer, device)
        shape = (UPDATES_PER_TRANSFER, source.batch_size)
        self._priorities: DevicePriorities | None = None
        dtype = th.int64
        if isinstance(buffer.sampler, PrioritizedSampler):
            replay_shape = buffer.buffer_size, buffer.n_envs
            self._priorities = DevicePriorities(*replay_shape, buffer.optimize_memory_usage, device)
            dtype = th.float64
        self._staging = StagingBuffer(shape, dtype, device)
        self._drawn = th.zeros(shape, dtype=dtype, device=device)
        self._weights = th.ones(source.batch_size, dtype=th.float32, device=device)
        self._epsilon, self._alpha, self._beta = (DeviceScalar(device, th.float64) for _ in range(3))

    def supports(self, source: BatchSource) -> bool:
        """Return True if this feed, and the graphs that were captured with it, can be used for a source."""
        buffer = source.buffer
        return (
            buffer is not None
            and source.batch_size == self._source.batch_size
            and buffer.sampler is self._sampler
            and self._replay.is_compatible(buffer)
        )

    def sync(self, source: BatchSource) -> None:
        """Copy new transitions, priorities and the sampler's settings to the device; draw nothing."""
        self._replay.sync(source.gamma)
        sampler = self._sampler
        if isinstance(sampler, PrioritizedSampler):
            assert self._priorities is not None
            self._priorities.sync(sampler)
            self._priorities.diverged.zero_()
            self._epsilon.set(sampler.epsilon)
            self._alpha.set(sampler.alpha)
            self._beta.set(sampler.beta_now)

    def capture(self, capture: Callable[[Function], Function]) -> None:
        """Capture how new transitions get their priorities."""
        if self._priorities is not None:
            self._priorities.run_write_staged = capture(self._priorities.write_staged)

    def run(self, gradient_steps: int, update: Callable[[int], None]) -> None:
        """Run updates; parameters as in :class:`Feed`."""
        for begin in range(0, gradient_steps, UPDATES_PER_TRANSFER):
            n_updates = min(UPDATES_PER_TRANSFER, gradient_steps - begin)
            self._draw(n_updates)
            update(n_updates)

    def _draw(self, n_updates: int) -> None:
        """Draw the random numbers of some updates, and copy them to the device."""
        buffer, size, sampler = self._buffer, self._source.batch_size, self._sampler
        if isinstance(sampler, PrioritizedSampler):
            drawn = sampler.draw_fractions(buffer, size, n_updates)
        else:
            rows, envs, _ = sampler.draw(buffer, size, n_updates)
            drawn = rows * buffer.n_envs + envs
        self._staging.acquire()[:n_updates] = drawn.reshape(n_updates, size)
        self._staging.copy_to(self._drawn[:n_updates])

    def next_batch(self) -> Batch:
        """Return the mini-batch of the next update; can be captured."""
        drawn = self._drawn.index_select(0, self._update_index).squeeze(0)
        self._indices, weights = drawn, self._weights
        if self._priorities is not None:
            self._indices, weights = self._priorities.draw(drawn, self._beta.tensor)
        return self._replay.read(self._indices, weights)

    def update_priorities(self, priorities: th.Tensor) -> None:
        """Set the priorities of that mini-batch, ``(B,)``; can be captured."""
        if self._priorities is not None:
            self._priorities.update(self._indices, priorities, self._epsilon.tensor, self._alpha.tensor)
        del self._indices  # it is in the graph's private memory

    def state(self) -> list[th.Tensor]:
        """Return all tensors that :meth:`next_batch` and :meth:`update_priorities` modify."""
        if self._priorities is None:
            return []
        return [*self._priorities.tree.levels, self._priorities.max_value, self._priorities.diverged]

    def diverged(self) -> th.Tensor | None:
        """Return True, on the device, if priorities were not finite; ``None`` without priorities."""
        return None if self._priorities is None else self._priorities.diverged


class HostFeed:
    """Mini-batches from the host, copied one at a time.

    :param source: any source
    :param policy: policy that is trained
    :param discard_graphs: called when graphs that were captured with this feed cannot be used any more
    """

    max_updates = 1

    def __init__(self, source: BatchSource, policy: DQNPolicy, discard_graphs: Callable[[], None]) -> None:
        self._source, self._space, self._discard_graphs = source, policy.observation_space, discard_graphs
        # Sample a mini-batch for its shapes and dtypes; restore the generator, as nothing may change here
        before = np.random.get_state()
        self._allocate_like(source.sample(1))
        np.random.set_state(before)

    def _allocate_like(self, batch: Batch) -> None:
        """Allocate memory for mini-batches of the same shapes and dtypes."""
        self._batch = _clone(batch)
        self._signature = _signature(batch)
        self._priorities = th.zeros_like(batch.weights)

    def supports(self, source: BatchSource) -> bool:
        """Return True if this feed can be used for a source."""
        return source.buffer is self._source.buffer and source.batch_size == self._source.batch_size

    def sync(self, source: BatchSource) -> None:
        """Set the source of the next mini-batches."""
        self._source = source

    def capture(self, capture: Callable[[Function], Function]) -> None:
        """Do nothing: there are no further functions."""

    def run(self, gradient_steps: int, update: Callable[[int], None]) -> None:
        """Run updates; parameters as in :class:`Feed`."""
        source = self._source
        n_prefetched = prefetch_count(self._space, source.batch_size) if source.can_prefetch else 1
        for begin in range(0, gradient_steps, n_prefetched):
            n_batches = min(n_prefetched, gradient_steps - begin)
            for batch in source.sample(n_batches).split(n_batches):
                if _signature(batch) != self._signature:  # for example the first with masks
                    self._allocate_like(batch)
                    self._discard_graphs()
                for tensor, sampled in zip(_tensors(self._batch), _tensors(batch), strict=True):
                    tensor.copy_(sampled, non_blocking=True)
                update(1)
                source.update_priorities(batch, self._priorities)

    def next_batch(self) -> Batch:
        """Return a copy of the mini-batch of the next update, as networks may modify their input; can be captured."""
        return _clone(self._batch)

    def update_priorities(self, priorities: th.Tensor) -> None:
        """Set the priorities of that mini-batch, ``(B,)``; can be captured."""
        self._priorities.copy_(priorities)

    def state(self) -> list[th.Tensor]:
        """Return all tensors that :meth:`next_batch` and :meth:`update_priorities` modify."""
        return [self._priorities]

    def diverged(self) -> None:
        """Return ``None``: the source checks priorities."""


def _tensors(batch: Batch) -> list[th.Tensor]:
    """Return all tensors of a mini-batch."""
    tensors: list[th.Tensor] = []
    for value in batch[:-1]:
        tensors += value.values() if isinstance(value, dict) else [] if value is None else [value]
    return tensors


def _clone(batch: Batch) -> Batch:
    def clone(value: Any) -> Any:
        if value is None:
            return None
        return {key: tensor.clone() for key, tensor in value.items()} if isinstance(value, dict) else value.clone()

    return Batch(*map(clone, batch[:-1]))


def _signature(batch: Batch) -> list[Any]:
    """Return the shapes and dtypes of a mini-batch, and which masks it has."""
    masked = [batch.action_masks is None, batch.next_action_masks is None]
    return [*masked, *((tensor.shape, tensor.dtype) for tensor in _tensors(batch))]


def raise_if_diverged(diverged: bool) -> None:
    """Raise the error that the sampler raises.

    :raises ValueError: if ``diverged``
    """
    if diverged:
        raise ValueError(DIVERGED)
