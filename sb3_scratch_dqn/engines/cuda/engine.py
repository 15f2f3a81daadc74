"""The CUDA graph engine: whole updates as single launches.

On a GPU small networks cost launches, not arithmetic: an update of the eager engine launches hundreds of kernels one by
one, and waits for the host in between. Here an update is recorded once (:mod:`sb3_scratch_dqn.engines.cuda.recording`)
and replayed from then on, several updates in one launch: batch, targets, loss, gradients, clipping, Adam, priorities.
The replay buffer's transitions lie on the device (:mod:`sb3_scratch_dqn.engines.cuda.feeds`). The host draws the random
numbers of sampling beforehand, writes what may change (learning rate, largest norm, ``beta`` ...) into tensors, and
waits once, for the losses. Actions and the target network's updates are recorded likewise.

The mathematics are those of every engine, by the same functions. Python code in networks runs once, when it is
recorded: what it decided then, it decided for good. So an engine must be made anew when somebody replaces what it
knows (:meth:`CudaGraphEngine.is_stale`).
"""

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch as th
from stable_baselines3.common.utils import get_parameters_by_name

from sb3_scratch_dqn.common.overriding import replaced
from sb3_scratch_dqn.engines.cuda.actors import Actor
from sb3_scratch_dqn.engines.cuda.feeds import UPDATES_AT_ONCE, DeviceFeed, Feed, HostFeed, check_priorities
from sb3_scratch_dqn.engines.cuda.recording import CaptureError, DeviceScalar, Function, Recorder
from sb3_scratch_dqn.engines.cuda.steps import DeviceSteps, device_steps_unsupported_reason
from sb3_scratch_dqn.engines.eager import EagerEngine
from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.engines.watch import (
    PolicySnapshot,
    hooks_reason,
    is_patched,
    torch_mode_reason,
    unknown_type_reason,
)
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.networks.q_network import QNetwork
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.replay.device.buffer import DeviceReplay
from sb3_scratch_dqn.values.td import Objective, make_target, td_losses

# Updates in one recording; any number is made up of these
_SIZES = (16, 4, 1)

# Numbers of observations for which greedy actions are recorded
_ACTORS_KEPT = 16

# Networks that turned out not to be recordable, and why
_unrecordable: "WeakKeyDictionary[QNetwork, str]" = WeakKeyDictionary()


def _why_not(policy: DQNPolicy) -> str | None:
    reason = unknown_type_reason(policy) or torch_mode_reason(policy.device.type)
    if reason is not None:
        return reason
    for network in (policy.q_net, policy.q_net_target):
        if is_patched(network):
            return "a method of the network was patched"
        reason = hooks_reason(network)
        if reason is not None:
            return reason
    if is_patched(policy.head) or replaced(policy, DQNPolicy, "noise"):
        return "a method of the head or the policy was replaced"
    return device_steps_unsupported_reason(policy) or _unrecordable.get(policy.q_net)


class CudaGraphEngine:
    """Recorded updates.

    :param policy: whose online network is trained
    :param objective: what it is to learn
    """

    name: ClassVar[str] = "cuda_graph"
    title: ClassVar[str] = "the CUDA graph engine"
    device_type: ClassVar[str | None] = "cuda"
    # What is compared with the eager engine on the CPU alone is nobody's default
    opt_in_reason: ClassVar[str | None] = "must be asked for: engine='cuda_graph'"

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        self.policy = policy
        self.objective = objective
        self.last_update: LastUpdate | None = None
        self._device = policy.device
        self._eager = EagerEngine(policy, objective)
        self._watch: PolicySnapshot | None = None

    @classmethod
    def unsupported_reason(cls, policy: DQNPolicy, objective: Objective) -> str | None:
        """Why this engine cannot serve; ``None`` if it can."""
        if policy.device.type != cls.device_type:
            return f"device={policy.device.type!r} is not {cls.device_type!r}"
        return _why_not(policy)

    def _attach(self) -> None:
        """Take hold of everything, once somebody trains or acts."""
        policy, device = self.policy, self._device
        self._watch = PolicySnapshot(policy)
        self._steps = DeviceSteps(policy)
        self._recorder = Recorder(device)
        self._target_fn = make_target(self.objective, policy.q_net, policy.q_net_target, policy.head)
        # Of batch normalisation, which averaging of parameters does not reach
        self._statistics = get_parameters_by_name(policy.q_net, ["running_"])
        self._target_statistics = get_parameters_by_name(policy.q_net_target, ["running_"])
        self._tau, self._rest = DeviceScalar(device), DeviceScalar(device)  # and 1 - tau
        self._number = th.zeros(1, dtype=th.int64, device=device)  # of the next update, and of its loss
        self._losses = th.zeros(UPDATES_AT_ONCE, dtype=th.float32, device=device)
        self._kept: dict[str, th.Tensor] = {}  # of the last update
        self._feed: Feed | None = None
        self._updates: dict[int, Function] = {}  # by how many there are in one recording
        self._actors: dict[Any, Actor] = {}
        self._follow: Function | None = None

    def _state(self) -> Iterator[th.Tensor]:
        """All tensors that recorded functions change."""
        for network in (self.policy.q_net, self.policy.q_net_target):
            yield from network.parameters()
            yield from network.buffers()
        yield from self._steps.state()
        yield from (self._number, self._losses)
        if self._feed is not None:
            yield from self._feed.state()

    def attach(self) -> None:
        """Rearrange what lies elsewhere: nothing, as parameters stay where they are."""

    def is_stale(self) -> bool:
        """Whether somebody changed the policy in a way that this engine must be made anew for."""
        if self._watch is None:
            return _why_not(self.policy) is not None
        return (
            torch_mode_reason(self._device.type) is not None
            or self.policy.q_net in _unrecordable
            or self._watch.changed()
            or self._steps.changed()
        )

    # Updates

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take some gradient steps.

        :param source: gives the batch of each step, and takes the priorities of its transitions
        :param gradient_steps: how many
        :param max_grad_norm: the gradient of a step is scaled down to this norm
        :return: the mean loss of each step
        :raises CannotRecordError: if the network does what cannot be recorded; then nothing was changed or drawn
        :raises ValueError: if priorities are no numbers
        """
        if self._watch is None:
            self._attach()
        self.policy.set_training_mode(True)
        if gradient_steps < 1:
            return []
        feed = self._feed_for(source)
        feed.prepare(source)
        self._steps.set(max_grad_norm)
        self._record_updates(feed, gradient_steps)

        losses: list[th.Tensor] = []

        def play(n_updates: int) -> None:
            self._record_updates(feed, n_updates)
            self._number.zero_()
            for size in _sizes(n_updates, feed.most):
                self._updates[size]()
            losses.append(self._losses[:n_updates].clone())

        feed.run(gradient_steps, play)
        self._steps.show()
        self._steps.settle()
        kept = self._kept
        self.last_update = LastUpdate(self.policy.head, kept["outputs"], kept["target"], kept["norm"])
        diverged = feed.diverged()
        flags = [] if diverged is None else [diverged.view(1).float()]
        numbers: list[float] = th.cat([*losses, *flags]).tolist()  # the one wait for the device
        if flags:
            check_priorities(bool(numbers.pop()))
        return numbers

    def _feed_for(self, source: BatchSource) -> Feed:
        if self._feed is None or not self._feed.serves(source):
            self._updates.clear()
            self._feed = None  # first, for the memory that another one needs
            reason = None if source.buffer is None else DeviceReplay.unsupported_reason(source.buffer, self._device)
            if reason is not None:
                warnings.warn(f"{self.title} gets batches from the host, which takes longer: {reason}", stacklevel=4)
            if source.buffer is None or reason is not None:
                self._feed = HostFeed(source, self.policy, self._updates.clear)
            else:
                self._feed = DeviceFeed(source, self._device, self._number)
            self._feed.record(lambda function: self._record(function, function))
        return self._feed

    def _record_updates(self, feed: Feed, gradient_steps: int) -> None:
        parts = {min(gradient_steps, UPDATES_AT_ONCE), gradient_steps % UPDATES_AT_ONCE}
        for size in {size for part in parts for size in _sizes(part, feed.most)} - self._updates.keys():
            self._steps.count_on_the_device()
            self._number.zero_()
            warm_up = None if self._updates else self._update
            self._updates[size] = self._record(_repeated(self._update, size), warm_up)

    def _record(self, function: Function, warm_up: Function | None) -> Function:
        assert self._watch is not None
        try:
            recorded = self._recorder.record(function, self._state, warm_up)
            if self._watch.changed():
                raise CaptureError("it puts other tensors in the place of its own")
            return recorded
        except CaptureError as error:
            self._watch.restore()
            reason = f"the network cannot be recorded: {error}"
            _unrecordable[self.policy.q_net] = reason
            warnings.warn(f"{self.title} cannot serve: {reason}", stacklevel=5)
            raise

    def _update(self) -> None:
        """One update, of which nothing is decided by the host."""
        policy, feed = self.policy, self._feed
        assert feed is not None
        batch = feed.take()
        with policy.noise():
            td = td_losses(batch, policy.q_net.outputs, self._target_fn, policy.head, self.objective.loss)
        loss = (batch.weights * td.losses).mean()
        norm = self._steps.take(loss)
        feed.give_back(td.priorities)
        self._losses.index_copy_(0, self._number, loss.detach().view(1).float())
        self._number.add_(1)
        for name, value in (("outputs", td.outputs), ("target", td.target), ("norm", norm)):
            self._keep(name, value.detach())

    def _keep(self, name: str, value: th.Tensor) -> None:
        kept = self._kept.get(name)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = self._kept[name] = th.empty_like(value)
        kept.copy_(value)

    # Actions and the target network

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Greedy actions, with noise in noisy layers.

        :param observation: ``(B, ...)``, or a dict of such arrays
        :param envs: the rows that are wanted, ``(N,)``; ``None`` for all
        :return: ``(N,)``
        """
        if self._watch is None:
            self._attach()
        parts = observation if isinstance(observation, dict) else {"": observation}
        parts = {key: np.asarray(part) for key, part in parts.items()}
        kind = tuple((key, part.shape, part.dtype) for key, part in parts.items())
        if kind not in self._actors:
            if len(self._actors) == _ACTORS_KEPT or self.policy.q_net in _unrecordable:
                return self._eager.act(observation, envs)
            self.policy.set_training_mode(False)
            actor = Actor(self.policy, parts, self._device)
            try:
                actor.play = self._record(actor.choose, actor.choose)
            except CaptureError:
                return self._eager.act(observation, envs)
            self._actors[kind] = actor
        if self.policy.training or self.policy.q_net.training:
            self.policy.set_training_mode(False)
        actions = self._actors[kind](parts)  # of all rows, because what is recorded has one shape
        return actions if envs is None else actions[envs]

    def update_target(self, tau: float) -> None:
        """Let the target network follow.

        :param tau: how far; 1 copies the online network
        """
        if self._watch is None:
            self._attach()
        self._tau.set(tau)
        self._rest.set(1 - tau)
        if self._follow is None:
            try:
                self._follow = self._record(self._move_target, self._move_target)
            except CaptureError:
                self._eager.update_target(tau)
                return
        self._follow()

    def _move_target(self) -> None:
        online: list[th.Tensor] = [*self.policy.q_net.parameters()]
        target: list[th.Tensor] = [*self.policy.q_net_target.parameters()]
        with th.no_grad():
            th._foreach_mul_(target, self._rest.tensor)
            th._foreach_add_(target, list(th._foreach_mul(online, self._tau.tensor)))
            if self._statistics:
                th._foreach_copy_(self._target_statistics, self._statistics)


def _sizes(n_updates: int, most: int) -> list[int]:
    """Numbers of updates in recordings that make up ``n_updates``, none above ``most``."""
    sizes = []
    for size in _SIZES:
        if size <= most:
            sizes += [size] * (n_updates // size)
            n_updates %= size
    return sizes


def _repeated(function: Function, times: int) -> Function:
    def repeated() -> None:
        for _ in range(times):
            function()

    return repeated
