"""The plain engine: one call of PyTorch after another, exactly SB3's numbers.

It serves every configuration and is the yardstick of every other engine. It leaves out what changes no bit, such as
multiplying gradients by 1, and takes among PyTorch's ways to the same bits the fastest.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import get_parameters_by_name, obs_as_tensor, polyak_update

from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.engines.watch import hooks_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.replay.observations import map_observation
from sb3_scratch_dqn.values.td import Objective, make_target, mean_loss, predict

# Batches that are drawn in one go, and bytes of observations that they may have; more would save no more time
_BATCHES_AT_ONCE = 16
_BYTES_AT_ONCE = 2**22


def batches_at_once(space: spaces.Space[Any], batch_size: int) -> int:
    """How many batches are best drawn in one go, if they may be.

    :param space: of the observations
    :param batch_size: transitions in each
    """
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    one = sum(math.prod(part.shape or ()) * (4 if part.dtype is None else part.dtype.itemsize) for part in parts)
    return max(1, min(_BATCHES_AT_ONCE, _BYTES_AT_ONCE // (2 * batch_size * max(one, 1))))


def clip_gradients(parameters: list[th.nn.Parameter], max_norm: float) -> th.Tensor:
    """What ``clip_grad_norm_`` does, but for multiplying by 1, where that is known without waiting for a device.

    :param parameters: whose gradients are scaled down
    :param max_norm: the largest norm that they may have together
    :return: the norm that they had
    """
    norm = th.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    # A norm that is no number, or infinite, is never smaller
    if norm.device.type != "cpu" or not 1.001 * norm.item() + 1e-5 < max_norm:
        th.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# Packages whose networks draw from PyTorch's random numbers alone, not from NumPy's, which say what is sampled
_KNOWN_PACKAGES = frozenset({"torch", "stable_baselines3", "sb3_scratch_dqn"})


def _draws_nothing(policy: DQNPolicy) -> bool:
    """Whether networks are known to leave NumPy's random numbers to sampling, as augmentation of images may not."""
    return not any(
        type(module).__module__.partition(".")[0] not in _KNOWN_PACKAGES or "forward" in vars(module)
        for network in (policy.q_net, policy.q_net_target)
        for module in network.modules()
    ) and not (hooks_reason(policy.q_net) or hooks_reason(policy.q_net_target))


def _has_no_way_of_its_own(adam: th.optim.Adam) -> bool:
    """Whether how Adam goes through the parameters is left to PyTorch, which goes one by one on the CPU."""
    return not any(
        group.get("foreach") is not None
        or group.get("fused") is not None
        or group.get("differentiable")
        or group.get("capturable")
        or isinstance(group["lr"], th.Tensor)
        for group in adam.param_groups
    )


def step_by(way: str, adam: th.optim.Adam) -> None:
    """Take a step of Adam in another way than its own.

    :param way: ``"foreach"``, the same bits in fewer calls, or ``"fused"``, the same up to rounding in one
    :param adam: the optimiser, whose settings stay as they are
    """
    before = [group.get(way) for group in adam.param_groups]
    for group in adam.param_groups:
        group[way] = True
    try:
        adam.step()
    finally:
        for group, setting in zip(adam.param_groups, before, strict=True):
            group[way] = setting


class EagerEngine:
    """Autograd, gradient clipping and the policy's optimiser.

    :param policy: whose online network is trained
    :param objective: what it is to learn
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
        """Why this engine cannot serve: it always can."""
        return None

    def attach(self) -> None:
        """Rearrange what lies elsewhere: nothing."""

    def is_stale(self) -> bool:
        """Whether somebody changed the policy in a way that this engine must be made anew for: it looks each time."""
        return False

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take some gradient steps.

        :param source: gives the batch of each step, and takes the priorities of its transitions
        :param gradient_steps: how many
        :param max_grad_norm: the gradient of a step is scaled down to this norm
        :return: the mean loss of each step
        """
        policy = self.policy
        policy.set_training_mode(True)
        online = policy.online_network
        target_fn = make_target(self.objective, online, policy.target_network, policy.head)
        parameters = list(policy.q_net.parameters())
        can_prefetch = source.can_prefetch and gradient_steps > 1 and _draws_nothing(policy)
        at_once = batches_at_once(policy.observation_space, source.batch_size) if can_prefetch else 1
        losses = []
        for begin in range(0, gradient_steps, at_once):
            n_batches = min(at_once, gradient_steps - begin)
            for batch in source.sample(n_batches).split(n_batches):
                with policy.noise():
                    outputs, target = predict(batch, online.outputs, target_fn)
                if source.weighted:
                    each, priorities = policy.head.losses(outputs, target, self.objective.loss)
                    loss = (batch.weights * each).mean()
                else:
                    loss = mean_loss(outputs, target, policy.head, self.objective.loss)
                losses.append(loss.detach())

                policy.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # PyTorch has no types for it
                grad_norm = clip_gradients(parameters, max_grad_norm)
                self._step(parameters[0].is_cpu)
                if source.weighted:
                    source.update_priorities(batch, priorities)
                self.last_update = LastUpdate(policy.head, outputs.detach(), target, grad_norm)
        if len(losses) == 1:
            return [losses[0].item()]
        # One wait for the device, not one an update
        return th.stack(losses).tolist() if losses else []

    def _step(self, on_cpu: bool) -> None:
        """Update the parameters; ``on_cpu`` says whether they lie there."""
        optimizer = self.policy.optimizer
        if type(optimizer) is th.optim.Adam and on_cpu and _has_no_way_of_its_own(optimizer):
            step_by("foreach", optimizer)
        else:
            optimizer.step()

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Greedy actions, with noise in noisy layers.

        :param observation: ``(B, ...)``, or a dict of such arrays
        :param envs: the rows that are wanted, ``(N,)``; ``None`` for all
        :return: ``(N,)``
        """
        policy = self.policy
        if policy.training or any(module.training for module in policy.q_net.modules()):
            policy.set_training_mode(False)
        # A copy, because networks may write to what they get
        copy = map_observation(np.array if envs is None else lambda array: array[envs], observation)
        online = policy.online_network
        with th.no_grad(), online.noise():
            actions: np.ndarray = online._predict(obs_as_tensor(copy, policy.device)).cpu().numpy()
        return actions

    def update_target(self, tau: float) -> None:
        """Let the target network follow.

        :param tau: how far; 1 copies the online network
        """
        polyak_update(self.policy.q_net.parameters(), self.policy.q_net_target.parameters(), tau)
        if next(self.policy.q_net.buffers(), None) is not None:
            # Batch normalisation keeps running statistics, which averaging of parameters does not reach
            ours = get_parameters_by_name(self.policy.q_net, ["running_"])
            polyak_update(ours, get_parameters_by_name(self.policy.q_net_target, ["running_"]), 1.0)
