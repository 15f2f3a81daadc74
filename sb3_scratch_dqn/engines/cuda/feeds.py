"""Where recorded updates get their batches.

Random numbers are drawn on the host, from the generators and in the order that samplers draw them. What comes after
that happens on the device where it can (:class:`DeviceFeed`); otherwise whole batches come from the host
(:class:`HostFeed`).
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch as th

from sb3_scratch_dqn.engines.cuda.recording import DeviceScalar, Function
from sb3_scratch_dqn.engines.eager import batches_at_once
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import Batch, BatchSource
from sb3_scratch_dqn.replay.device.buffer import DeviceReplay
from sb3_scratch_dqn.replay.device.ring import Outbox
from sb3_scratch_dqn.replay.device.tree import DevicePriorities
from sb3_scratch_dqn.replay.samplers import DIVERGED, PrioritizedSampler

# Updates that random numbers are copied over for at once
UPDATES_AT_ONCE = 256


class Feed(Protocol):
    """Gives batches to recorded updates.

    :param most: updates that may follow one another without the host
    """

    most: int

    def serves(self, source: BatchSource) -> bool:
        """Whether it can be used for a source as it is, and what was recorded with it too."""

    def prepare(self, source: BatchSource) -> None:
        """Bring everything up to date, without drawing anything."""

    def run(self, gradient_steps: int, play: Callable[[int], None]) -> None:
        """Let some updates be taken.

        :param gradient_steps: how many
        :param play: takes some of them, as many as it is told
        """

    def record(self, record: Callable[[Function], Function]) -> None:
        """Have recorded what else it does over and over.

        :param record: gives what does what a function does
        """

    def take(self) -> Batch:
        """The batch of the next update; to be recorded."""

    def give_back(self, priorities: th.Tensor) -> None:
        """Take the priorities of that batch, ``(B,)``; to be recorded."""

    def state(self) -> list[th.Tensor]:
        """All tensors that both change."""

    def diverged(self) -> th.Tensor | None:
        """Whether there were priorities that are no numbers; ``None`` if nobody looks."""


class DeviceFeed:
    """Batches of a replay buffer, a copy of which lies on the device.

    :param source: that is plain
    :param device: where updates are taken
    :param number: of the next update, ``(1,)``, since random numbers were drawn last
    """

    most = UPDATES_AT_ONCE

    def __init__(self, source: BatchSource, device: th.device, number: th.Tensor) -> None:
        assert source.buffer is not None
        buffer = source.buffer
        self._source, self._buffer, self._sampler, self._number = source, buffer, buffer.sampler, number
        self._replay = DeviceReplay(buffer, device)
        shape = (UPDATES_AT_ONCE, source.batch_size)
        self._priorities: DevicePriorities | None = None
        dtype = th.int64
        if isinstance(buffer.sampler, PrioritizedSampler):
            shape_of_rows = buffer.buffer_size, buffer.n_envs
            self._priorities = DevicePriorities(*shape_of_rows, buffer.optimize_memory_usage, device)
            dtype = th.float64
        self._outbox = Outbox(shape, dtype, device)
        self._drawn = th.zeros(shape, dtype=dtype, device=device)
        self._weights = th.ones(source.batch_size, dtype=th.float32, device=device)
        self._epsilon, self._alpha, self._beta = (DeviceScalar(device, th.float64) for _ in range(3))

    def serves(self, source: BatchSource) -> bool:
        """Whether it can be used for a source as it is, and what was recorded with it too."""
        buffer = source.buffer
        return (
            buffer is not None
            and source.batch_size == self._source.batch_size
            and buffer.sampler is self._sampler
            and self._replay.serves(buffer)
        )

    def prepare(self, source: BatchSource) -> None:
        """Bring everything up to date, without drawing anything."""
        self._replay.follow(source.gamma)
        sampler = self._sampler
        if isinstance(sampler, PrioritizedSampler):
            assert self._priorities is not None
            self._priorities.follow(sampler)
            self._priorities.diverged.zero_()
            self._epsilon.set(sampler.epsilon)
            self._alpha.set(sampler.alpha)
            self._beta.set(sampler.beta_now)

    def record(self, record: Callable[[Function], Function]) -> None:
        """Have recorded how new transitions get their priorities."""
        if self._priorities is not None:
            self._priorities.play = record(self._priorities.write)

    def run(self, gradient_steps: int, play: Callable[[int], None]) -> None:
        """Let some updates be taken; parameters as in :class:`Feed`."""
        for begin in range(0, gradient_steps, UPDATES_AT_ONCE):
            n_updates = min(UPDATES_AT_ONCE, gradient_steps - begin)
            self._draw(n_updates)
            play(n_updates)

    def _draw(self, n_updates: int) -> None:
        buffer, size, sampler = self._buffer, self._source.batch_size, self._sampler
        if isinstance(sampler, PrioritizedSampler):
            drawn = sampler.draw_parts(buffer, size, n_updates)
        else:
            rows, envs, _ = sampler.draw(buffer, size, n_updates)
            drawn = rows * buffer.n_envs + envs
        self._outbox.open()[:n_updates] = drawn.reshape(n_updates, size)
        self._outbox.send(self._drawn[:n_updates])

    def take(self) -> Batch:
        """The batch of the next update; to be recorded."""
        drawn = self._drawn.index_select(0, self._number).squeeze(0)
        self._places, weights = drawn, self._weights
        if self._priorities is not None:
            self._places, weights = self._priorities.draw(drawn, self._beta.tensor)
        return self._replay.read(self._places, weights)

    def give_back(self, priorities: th.Tensor) -> None:
        """Take the priorities of that batch, ``(B,)``; to be recorded."""
        if self._priorities is not None:
            self._priorities.update(self._places, priorities, self._epsilon.tensor, self._alpha.tensor)
        del self._places  # a recording's own

    def state(self) -> list[th.Tensor]:
        """All tensors that both change."""
        if self._priorities is None:
            return []
        return [*self._priorities.tree.levels, self._priorities.max_value, self._priorities.diverged]

    def diverged(self) -> th.Tensor | None:
        """Whether there were priorities that are no numbers; ``None`` if nobody looks."""
        return None if self._priorities is None else self._priorities.diverged


class HostFeed:
    """Batches from the host, one at a time.

    :param source: any
    :param policy: that is trained
    :param forget: called when what was recorded with it cannot be used any more
    """

    most = 1

    def __init__(self, source: BatchSource, policy: DQNPolicy, forget: Callable[[], None]) -> None:
        self._source, self._space, self._forget = source, policy.observation_space, forget
        # To see what a batch looks like, one must be drawn, which is to change nothing
        before = np.random.get_state()
        self._adopt(source.sample(1))
        np.random.set_state(before)

    def _adopt(self, batch: Batch) -> None:
        """Have memory for batches that look like this one."""
        self._batch = _cloned(batch)
        self._kinds = _kinds(batch)
        self._priorities = th.zeros_like(batch.weights)

    def serves(self, source: BatchSource) -> bool:
        """Whether it can be used for a source as it is."""
        return source.buffer is self._source.buffer and source.batch_size == self._source.batch_size

    def prepare(self, source: BatchSource) -> None:
        """Know where the next batches come from."""
        self._source = source

    def record(self, record: Callable[[Function], Function]) -> None:
        """There is nothing else."""

    def run(self, gradient_steps: int, play: Callable[[int], None]) -> None:
        """Let some updates be taken; parameters as in :class:`Feed`."""
        source = self._source
        at_once = batches_at_once(self._space, source.batch_size) if source.can_prefetch else 1
        for begin in range(0, gradient_steps, at_once):
            n_batches = min(at_once, gradient_steps - begin)
            for batch in source.sample(n_batches).split(n_batches):
                if _kinds(batch) != self._kinds:  # as with the first masks
                    self._adopt(batch)
                    self._forget()
                for own, drawn in zip(_tensors(self._batch), _tensors(batch), strict=True):
                    own.copy_(drawn, non_blocking=True)
                play(1)
                source.update_priorities(batch, self._priorities)

    def take(self) -> Batch:
        """The batch of the next update; to be recorded. A copy, because networks may write to what they get."""
        return _cloned(self._batch)

    def give_back(self, priorities: th.Tensor) -> None:
        """Take the priorities of that batch, ``(B,)``; to be recorded."""
        self._priorities.copy_(priorities)

    def state(self) -> list[th.Tensor]:
        """All tensors that both change."""
        return [self._priorities]

    def diverged(self) -> None:
        """The source looks itself."""


def _tensors(batch: Batch) -> list[th.Tensor]:
    """All tensors of a batch."""
    found: list[th.Tensor] = []
    for value in batch[:-1]:
        found += value.values() if isinstance(value, dict) else [] if value is None else [value]
    return found


def _cloned(batch: Batch) -> Batch:
    def cloned(value: Any) -> Any:
        if value is None:
            return None
        return {key: one.clone() for key, one in value.items()} if isinstance(value, dict) else value.clone()

    return Batch(*map(cloned, batch[:-1]))


def _kinds(batch: Batch) -> list[Any]:
    """What a batch looks like, but for its numbers."""
    masked = [batch.action_masks is None, batch.next_action_masks is None]
    return [*masked, *((tensor.shape, tensor.dtype) for tensor in _tensors(batch))]


def check_priorities(diverged: bool) -> None:
    """Complain as the sampler would.

    :raises ValueError: if there were priorities that are no numbers
    """
    if diverged:
        raise ValueError(DIVERGED)
