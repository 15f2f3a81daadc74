"""The eager engine: autograd and plain PyTorch, with SB3's numbers to the last bit.

It supports every configuration, and the other engines are tested against it. It skips operations that do not change
results, such as multiplying gradients by 1, and uses the fastest of PyTorch's bitwise identical implementations.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import get_parameters_by_name, obs_as_tensor, polyak_update
from torch.nn import functional as F

from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.engines.last_update import LastUpdate
from sb3_scratch_dqn.engines.modifications import hooks_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.replay.observations import map_observation
from sb3_scratch_dqn.values.heads import ExpectedHead, ValueHead
from sb3_scratch_dqn.values.losses import Loss, huber, squared
from sb3_scratch_dqn.values.td import Objective, make_target, predict, td_losses

# Mini-batches sampled in one call, which share its fixed cost. Measured for batches of 64: 155 us per batch for one, 59
# for 16, 53 for 32
_MAX_PREFETCHED_BATCHES = 16
# Bytes of observations and next observations sampled in one call: measured for batches of 1 MiB, 4 in one call take 0.8
# of the time, and more take no less; of images (1.7 MiB), each takes 1.1 to 1.4 of the time as soon as there are 2
_MAX_PREFETCHED_BYTES = 2**22


def prefetch_count(space: spaces.Space[Any], batch_size: int) -> int:
    """Return the number of mini-batches to sample in one call, if the source allows more than one.

    :param space: observation space
    :param batch_size: transitions per mini-batch
    """
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    bytes_each = sum(math.prod(part.shape or ()) * (4 if part.dtype is None else part.dtype.itemsize) for part in parts)
    return max(1, min(_MAX_PREFETCHED_BATCHES, _MAX_PREFETCHED_BYTES // (2 * batch_size * max(bytes_each, 1))))


def clip_gradients(parameters: list[th.nn.Parameter], max_norm: float) -> th.Tensor:
    """Clip gradients as ``clip_grad_norm_`` does, but skip the multiplication by 1 where the norm is on the CPU.

    On other devices, reading the norm would wait for the device.

    :param parameters: parameters whose gradients are scaled
    :param max_norm: maximum norm of all gradients together
    :return: the norm before clipping
    """
    norm = th.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    # False for a NaN or infinite norm
    if norm.device.type != "cpu" or not 1.001 * norm.item() + 1e-5 < max_norm:
        th.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# Packages whose networks draw random numbers from PyTorch only, not from NumPy, whose generator sampling uses
_KNOWN_PACKAGES = frozenset({"torch", "stable_baselines3", "sb3_scratch_dqn"})


def _draws_nothing_from_numpy(policy: DQNPolicy) -> bool:
    """Return True if the networks do not draw from NumPy's generator, as image augmentation might."""
    return not any(
        type(module).__module__.partition(".")[0] not in _KNOWN_PACKAGES or "forward" in vars(module)
        for network in (policy.q_net, policy.q_net_target)
        for module in network.modules()
    ) and not (hooks_reason(policy.q_net) or hooks_reason(policy.q_net_target))


def _has_default_implementation(adam: th.optim.Adam) -> bool:
    """Return True if no setting of Adam selects an implementation; PyTorch then loops over parameters on the CPU."""
    return not any(
        group.get("foreach") is not None
        or group.get("fused") is not None
        or group.get("differentiable")
        or group.get("capturable")
        or isinstance(group["lr"], th.Tensor)
        for group in adam.param_groups
    )


def adam_step(adam: th.optim.Adam, implementation: str) -> None:
    """Take a step of Adam with another implementation than its settings select.

    :param adam: the optimiser, whose settings are the same afterwards
    :param implementation: ``"foreach"``, the same bits in fewer calls, or ``"fused"``, one call, equal up to rounding
    """
    settings = [group.get(implementation) for group in adam.param_groups]
    for group in adam.param_groups:
        group[implementation] = True
    try:
        adam.step()
    finally:
        for group, setting in zip(adam.param_groups, settings, strict=True):
            group[implementation] = setting


# Elementwise error -> its mean in one operation instead of two; the same bits
_MEAN_LOSSES: dict[Loss, Loss] = {huber: F.smooth_l1_loss, squared: F.mse_loss}


def mean_loss(outputs: th.Tensor, target: th.Tensor, head: ValueHead, loss: Loss) -> th.Tensor:
    """Return ``head.losses(outputs, target, loss)[0].mean()``, to the last bit, in as few operations as possible.

    :param outputs: outputs of the online network for the actions taken, ``(B, K)``
    :param target: target for the outputs, as ``head.backup`` returned it
    :param head: interprets the outputs
    :param loss: elementwise error
    """
    mean = _MEAN_LOSSES.get(loss)
    if mean is None or is_overridden(head, ExpectedHead, "losses"):
        return head.losses(outputs, target, loss)[0].mean()
    return mean(outputs.squeeze(1), target)


class EagerEngine:
    """Autograd, gradient clipping and the policy's optimiser.

    :param policy: policy whose online network is trained
    :param objective: what the network learns
    """

    name: ClassVar[str] = "eager"
    title: ClassVar[str] = "the eager engine"
    device_type: ClassVar[str | None] = None
    opt_in_reason: ClassVar[str | None] = None

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        self.policy = policy
        self.objective = objective
        self.last_update: LastUpdate | None = None

    @staticmethod
    def unsupported_reason(policy: DQNPolicy, objective: Objective) -> str | None:
        """Return ``None``: this engine supports every policy."""
        return None

    def attach(self) -> None:
        """Do nothing: parameters stay where they are."""

    def is_stale(self) -> bool:
        """Return False: this engine stores nothing about the policy."""
        return False

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take gradient steps.

        :param source: returns the mini-batch of each step, and gets the priorities of its transitions
        :param gradient_steps: number of gradient steps
        :param max_grad_norm: maximum norm of the gradient of a step
        :return: the mean loss of each step
        """
        policy = self.policy
        policy.set_training_mode(True)
        online = policy.online_network
        target_fn = make_target(self.objective, online, policy.target_network, policy.head)
        parameters = list(policy.q_net.parameters())
        can_prefetch = source.can_prefetch and gradient_steps > 1 and _draws_nothing_from_numpy(policy)
        n_prefetched = prefetch_count(policy.observation_space, source.batch_size) if can_prefetch else 1
        losses = []
        for begin in range(0, gradient_steps, n_prefetched):
            n_batches = min(n_prefetched, gradient_steps - begin)
            for batch in source.sample(n_batches).split(n_batches):
                with policy.noise():
                    if source.weighted:
                        td = td_losses(batch, online.outputs, target_fn, policy.head, self.objective.loss)
                        outputs, target, loss = td.outputs, td.target, (batch.weights * td.losses).mean()
                    else:  # the same in fewer operations
                        outputs, target = predict(batch, online.outputs, target_fn)
                        loss = mean_loss(outputs, target, policy.head, self.objective.loss)
                losses.append(loss.detach())

                policy.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # PyTorch has no types for it
                grad_norm = clip_gradients(parameters, max_grad_norm)
                self._step(parameters[0].is_cpu)
                if source.weighted:
                    source.update_priorities(batch, td.priorities)
                self.last_update = LastUpdate(policy.head, outputs.detach(), target, grad_norm)
        if len(losses) == 1:
            return [losses[0].item()]
        # Synchronise with the device once, not once per update
        return th.stack(losses).tolist() if losses else []

    def _step(self, on_cpu: bool) -> None:
        """Take a step of the optimiser; ``on_cpu`` is True if the parameters are on the CPU."""
        optimizer = self.policy.optimizer
        if type(optimizer) is th.optim.Adam and on_cpu and _has_default_implementation(optimizer):
            adam_step(optimizer, "foreach")
        else:
            optimizer.step()

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Return greedy actions, with noise in noisy layers.

        :param observation: ``(B, ...)``, or a dict of such arrays
        :param envs: indices of the rows to act for, ``(N,)``; ``None`` for all
        :return: ``(N,)``
        """
        policy = self.policy
        if policy.training or any(module.training for module in policy.q_net.modules()):
            policy.set_training_mode(False)
        # A copy, because networks may modify their input
        copy = map_observation(np.array if envs is None else lambda array: array[envs], observation)
        online = policy.online_network
        with th.no_grad(), online.noise():
            actions: np.ndarray = online._predict(obs_as_tensor(copy, policy.device)).cpu().numpy()
        return actions

    def update_target(self, tau: float) -> None:
        """Update the target network.

        :param tau: interpolation factor of the Polyak update; 1 copies the online network
        """
        polyak_update(self.policy.q_net.parameters(), self.policy.q_net_target.parameters(), tau)
        if next(self.policy.q_net.buffers(), None) is not None:
            # Running statistics of batch normalisation are buffers, not parameters
            statistics = get_parameters_by_name(self.policy.q_net, ["running_"])
            polyak_update(statistics, get_parameters_by_name(self.policy.q_net_target, ["running_"]), 1.0)
