"""The CUDA graph engine: whole updates as single launches.

With small networks, a GPU spends most of an update launching kernels: an update of the eager engine launches hundreds
of kernels and waits for the device in between. Here an update is captured once
(:mod:`sb3_scratch_dqn.engines.cuda.capture`) and replayed from then on, several updates in one launch: batch, targets,
loss, gradients, clipping, Adam, priorities. A copy of the replay buffer is on the device
(:mod:`sb3_scratch_dqn.engines.cuda.feeds`). The host draws the random numbers of sampling beforehand, writes numbers
that may change (learning rate, maximum norm, ``beta`` ...) to tensors, and waits once, for the losses. Actions and
updates of the target network are captured likewise.

Targets and losses are computed by :func:`sb3_scratch_dqn.values.td.td_losses`. Python code in networks runs once,
during capture, and its decisions are permanent. So a new engine must be created when something is modified that a graph
does not read (:meth:`CudaGraphEngine.is_stale`).
"""

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch as th
from stable_baselines3.common.utils import get_parameters_by_name

from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.engines.cuda.actors import Actor
from sb3_scratch_dqn.engines.cuda.capture import CaptureError, DeviceScalar, Function, GraphCapturer
from sb3_scratch_dqn.engines.cuda.feeds import UPDATES_PER_TRANSFER, DeviceFeed, Feed, HostFeed, raise_if_diverged
from sb3_scratch_dqn.engines.cuda.optimizer import CapturableOptimizer, capturable_unsupported_reason
from sb3_scratch_dqn.engines.eager import EagerEngine
from sb3_scratch_dqn.engines.last_update import LastUpdate
from sb3_scratch_dqn.engines.modifications import (
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

# Updates per graph; any number of updates is a sum of these. A larger graph saves launches, but takes longer to capture
# and more memory; with a factor of 4 between sizes, at most 3 + 3 launches follow those of the largest
_GRAPH_SIZES = (16, 4, 1)

# Shapes of observations for which greedy actions are captured; each graph keeps memory on the device
_MAX_ACTORS = 16

# Networks that cannot be captured, and why
_uncapturable: "WeakKeyDictionary[QNetwork, str]" = WeakKeyDictionary()


def _unsupported_reason(policy: DQNPolicy) -> str | None:
    reason = unknown_type_reason(policy) or torch_mode_reason(policy.device.type)
    if reason is not None:
        return reason
    for network in (policy.q_net, policy.q_net_target):
        if is_patched(network):
            return "a method of the network was patched"
        reason = hooks_reason(network)
        if reason is not None:
            return reason
    if is_patched(policy.head) or is_overridden(policy, DQNPolicy, "noise"):
        return "a method of the head or the policy was overridden or patched"
    return capturable_unsupported_reason(policy) or _uncapturable.get(policy.q_net)


class CudaGraphEngine:
    """Captured updates.

    :param policy: policy whose online network is trained
    :param objective: what the network learns
    """

    name: ClassVar[str] = "cuda_graph"
    title: ClassVar[str] = "the CUDA graph engine"
    device_type: ClassVar[str | None] = "cuda"
    # The tests compare it with the eager engine on the CPU only, so it is not a default
    opt_in_reason: ClassVar[str | None] = "must be selected explicitly by engine='cuda_graph'"

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        self.policy = policy
        self.objective = objective
        self.last_update: LastUpdate | None = None
        self._device = policy.device
        self._eager = EagerEngine(policy, objective)
        self._snapshot: PolicySnapshot | None = None

    @classmethod
    def unsupported_reason(cls, policy: DQNPolicy, objective: Objective) -> str | None:
        """Return why the engine does not support this policy, or ``None`` if it does."""
        if policy.device.type != cls.device_type:
            return f"device={policy.device.type!r} is not {cls.device_type!r}"
        return _unsupported_reason(policy)

    def attach(self) -> None:
        """Allocate memory and take a snapshot of the policy, once; parameters stay where they are."""
        if self._snapshot is not None:
            return
        policy, device = self.policy, self._device
        self._snapshot = PolicySnapshot(policy)
        self._optimizer = CapturableOptimizer(policy)
        self._capturer = GraphCapturer(device)
        self._target_fn = make_target(self.objective, policy.q_net, policy.q_net_target, policy.head)
        # Running statistics of batch normalisation are buffers, not parameters
        self._statistics = get_parameters_by_name(policy.q_net, ["running_"])
        self._target_statistics = get_parameters_by_name(policy.q_net_target, ["running_"])
        self._tau, self._one_minus_tau = DeviceScalar(device), DeviceScalar(device)
        self._update_index = th.zeros(1, dtype=th.int64, device=device)  # of the next update, and of its loss
        self._losses = th.zeros(UPDATES_PER_TRANSFER, dtype=th.float32, device=device)
        self._last_tensors: dict[str, th.Tensor] = {}  # of the last update
        self._feed: Feed | None = None
        self._update_graphs: dict[int, Function] = {}  # by number of updates
        self._actors: dict[Any, Actor] = {}
        self._target_graph: Function | None = None

    def _state(self) -> Iterator[th.Tensor]:
        """Yield all tensors that captured functions modify."""
        for network in (self.policy.q_net, self.policy.q_net_target):
            yield from network.parameters()
            yield from network.buffers()
        yield from self._optimizer.state()
        yield from (self._update_index, self._losses)
        if self._feed is not None:
            yield from self._feed.state()

    def is_stale(self) -> bool:
        """Return True if the policy was modified such that a new engine must be created."""
        if self._snapshot is None:
            return _unsupported_reason(self.policy) is not None
        return (
            torch_mode_reason(self._device.type) is not None
            or self.policy.q_net in _uncapturable
            or self._snapshot.is_modified()
            or self._optimizer.is_modified()
        )

    # Updates

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take gradient steps.

        :param source: returns the mini-batch of each step, and gets the priorities of its transitions
        :param gradient_steps: number of gradient steps
        :param max_grad_norm: maximum norm of the gradient of a step
        :return: the mean loss of each step
        :raises CaptureError: if the network cannot be captured; then nothing was modified or drawn
        :raises ValueError: if priorities are not finite
        """
        self.attach()
        self.policy.set_training_mode(True)
        if gradient_steps < 1:
            return []
        feed = self._feed_for(source)
        feed.sync(source)
        self._optimizer.set_scalars(max_grad_norm)
        self._capture_updates(feed, gradient_steps)

        losses: list[th.Tensor] = []

        def update(n_updates: int) -> None:
            self._capture_updates(feed, n_updates)
            self._update_index.zero_()
            for size in _graph_sizes(n_updates, feed.max_updates):
                self._update_graphs[size]()
            losses.append(self._losses[:n_updates].clone())

        feed.run(gradient_steps, update)
        self._optimizer.assign_gradients()
        self._optimizer.freeze_state()
        last = self._last_tensors
        self.last_update = LastUpdate(self.policy.head, last["outputs"], last["target"], last["norm"])
        diverged = feed.diverged()
        flags = [] if diverged is None else [diverged.view(1).float()]
        values: list[float] = th.cat([*losses, *flags]).tolist()  # the only synchronisation with the device
        if flags:
            raise_if_diverged(bool(values.pop()))
        return values

    def _feed_for(self, source: BatchSource) -> Feed:
        if self._feed is None or not self._feed.supports(source):
            self._update_graphs.clear()
            self._feed = None  # first, to free its memory for the next one
            reason = None if source.buffer is None else DeviceReplay.unsupported_reason(source.buffer, self._device)
            if reason is not None:
                warnings.warn(f"{self.title} samples on the host, which is slower: {reason}", stacklevel=4)
            if source.buffer is None or reason is not None:
                self._feed = HostFeed(source, self.policy, self._update_graphs.clear)
            else:
                self._feed = DeviceFeed(source, self._device, self._update_index)
            self._feed.capture(lambda function: self._capture(function, function))
        return self._feed

    def _capture_updates(self, feed: Feed, gradient_steps: int) -> None:
        """Capture the graphs that are missing for a number of gradient steps."""
        transfers = {min(gradient_steps, UPDATES_PER_TRANSFER), gradient_steps % UPDATES_PER_TRANSFER}
        needed = {size for n_updates in transfers for size in _graph_sizes(n_updates, feed.max_updates)}
        for size in needed - self._update_graphs.keys():
            self._optimizer.move_step_counts()
            self._update_index.zero_()
            warm_up = None if self._update_graphs else self._update
            self._update_graphs[size] = self._capture(_repeated(self._update, size), warm_up)

    def _capture(self, function: Function, warm_up: Function | None) -> Function:
        assert self._snapshot is not None
        try:
            replay = self._capturer.capture(function, self._state, warm_up)
            if self._snapshot.is_modified():
                raise CaptureError("it replaces its own tensors")
            return replay
        except CaptureError as error:
            self._snapshot.restore()
            reason = f"the network cannot be captured: {error}"
            _uncapturable[self.policy.q_net] = reason
            warnings.warn(f"{self.title} does not support this configuration: {reason}", stacklevel=5)
            raise

    def _update(self) -> None:
        """Run one update, without decisions by the host."""
        policy, feed = self.policy, self._feed
        assert feed is not None
        batch = feed.next_batch()
        with policy.noise():
            td = td_losses(batch, policy.q_net.outputs, self._target_fn, policy.head, self.objective.loss)
        loss = (batch.weights * td.losses).mean()
        norm = self._optimizer.step(loss)
        feed.update_priorities(td.priorities)
        self._losses.index_copy_(0, self._update_index, loss.detach().view(1).float())
        self._update_index.add_(1)
        for name, value in (("outputs", td.outputs), ("target", td.target), ("norm", norm)):
            self._keep(name, value.detach())

    def _keep(self, name: str, value: th.Tensor) -> None:
        """Copy a tensor of the last update out of the graph's private memory."""
        kept = self._last_tensors.get(name)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = self._last_tensors[name] = th.empty_like(value)
        kept.copy_(value)

    # Actions and the target network

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Return greedy actions, with noise in noisy layers.

        :param observation: ``(B, ...)``, or a dict of such arrays
        :param envs: indices of the rows to act for, ``(N,)``; ``None`` for all
        :return: ``(N,)``
        """
        self.attach()
        parts = observation if isinstance(observation, dict) else {"": observation}
        parts = {key: np.asarray(part) for key, part in parts.items()}
        signature = tuple((key, part.shape, part.dtype) for key, part in parts.items())
        if signature not in self._actors:
            if len(self._actors) == _MAX_ACTORS or self.policy.q_net in _uncapturable:
                return self._eager.act(observation, envs)
            self.policy.set_training_mode(False)
            actor = Actor(self.policy, parts, self._device)
            try:
                actor.replay = self._capture(actor.choose, actor.choose)
            except CaptureError:
                return self._eager.act(observation, envs)
            self._actors[signature] = actor
        if self.policy.training or self.policy.q_net.training:
            self.policy.set_training_mode(False)
        actions = self._actors[signature](parts)  # for all rows, because a graph has fixed shapes
        return actions if envs is None else actions[envs]

    def update_target(self, tau: float) -> None:
        """Update the target network.

        :param tau: interpolation factor of the Polyak update; 1 copies the online network
        """
        self.attach()
        self._tau.set(tau)
        self._one_minus_tau.set(1 - tau)
        if self._target_graph is None:
            try:
                self._target_graph = self._capture(self._polyak_update, self._polyak_update)
            except CaptureError:
                self._eager.update_target(tau)
                return
        self._target_graph()

    def _polyak_update(self) -> None:
        online: list[th.Tensor] = [*self.policy.q_net.parameters()]
        target: list[th.Tensor] = [*self.policy.q_net_target.parameters()]
        with th.no_grad():
            th._foreach_mul_(target, self._one_minus_tau.tensor)
            th._foreach_add_(target, list(th._foreach_mul(online, self._tau.tensor)))
            if self._statistics:
                th._foreach_copy_(self._target_statistics, self._statistics)


def _graph_sizes(n_updates: int, max_size: int) -> list[int]:
    """Return sizes of graphs that add up to ``n_updates``, none above ``max_size``."""
    sizes = []
    for size in _GRAPH_SIZES:
        if size <= max_size:
            sizes += [size] * (n_updates // size)
            n_updates %= size
    return sizes


def _repeated(function: Function, times: int) -> Function:
    def repeated() -> None:
        for _ in range(times):
            function()

    return repeated
