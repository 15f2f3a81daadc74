"""The fused engine for networks of any kind: gradients by autograd, and all that can be faster around it.

- Adam updates all parameters in one call, where its default on the CPU makes about ten for each.
- Images lie with their channels last, which makes the gradients of convolutions faster.

What it computes differs from the eager engine by rounding alone.
"""

from typing import ClassVar

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from torch import nn

from sb3_scratch_dqn.engines.eager import EagerEngine, step_by
from sb3_scratch_dqn.engines.watch import hooks_reason, unknown_type_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.values.td import Objective


def _takes_any_format(extractor: nn.Module) -> bool:
    """Whether an extractor is known not to care how images lie in memory, as one that calls ``view`` on them would."""
    if hooks_reason(extractor) is not None or any("forward" in vars(module) for module in extractor.modules()):
        return False
    if type(extractor) is CombinedExtractor:
        return all(type(one) in (NatureCNN, nn.Flatten) for one in extractor.extractors.values())
    return type(extractor) is NatureCNN


class FusedAutogradEngine(EagerEngine):
    """Autograd, and Adam in one call; parameters as in :class:`EagerEngine`."""

    name: ClassVar[str] = "fused"
    title: ClassVar[str] = "the fused engine with autograd"
    device_type: ClassVar[str | None] = "cpu"

    @staticmethod
    def unsupported_reason(policy: DQNPolicy, objective: Objective) -> str | None:
        """Why this engine cannot serve; ``None`` if it can."""
        optimizer = policy.optimizer
        if policy.device.type != "cpu":
            return f"device={policy.device.type!r} is not 'cpu'"
        if type(optimizer) is not th.optim.Adam:
            return f"optimizer_class={type(optimizer).__name__} is not Adam"
        reason = unknown_type_reason(policy)
        if reason is not None:
            return reason
        for group in optimizer.param_groups:
            for name in ("differentiable", "capturable"):
                if group.get(name):
                    return f"Adam has {name}=True"
            if isinstance(group["lr"], th.Tensor):
                return "the learning rate of the optimizer is a tensor"
            if not all(parameter.is_floating_point() for parameter in group["params"]):
                return "the optimizer has parameters that are no floating point numbers"
        return None

    def is_stale(self) -> bool:
        """Whether somebody changed the policy in a way that this engine must be made anew for."""
        return type(self.policy.optimizer) is not th.optim.Adam or unknown_type_reason(self.policy) is not None

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take some gradient steps; see :meth:`EagerEngine.train`."""
        network = self.policy.q_net
        if not _takes_any_format(network.features_extractor):
            return super().train(source, gradient_steps, max_grad_norm)
        network.image_format = th.channels_last
        try:
            return super().train(source, gradient_steps, max_grad_norm)
        finally:
            del network.image_format  # the eager engine's numbers are those of the other way

    def _step(self, on_cpu: bool) -> None:
        adam = self.policy.optimizer
        assert isinstance(adam, th.optim.Adam)
        step_by("fused", adam)
