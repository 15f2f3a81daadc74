"""The fused engine for all other networks: gradients by autograd, and everything else faster where possible.

- Adam updates all parameters in one call; its default on the CPU makes about ten calls per parameter.
- Images are in channels-last memory format, which makes the gradients of convolutions faster.

The results differ from those of the eager engine by rounding only.
"""

from typing import ClassVar

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from torch import nn

from sb3_scratch_dqn.engines.eager import EagerEngine, adam_step
from sb3_scratch_dqn.engines.modifications import hooks_reason, unknown_type_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.values.td import Objective


def _accepts_channels_last(extractor: nn.Module) -> bool:
    """Return True if an extractor is known to accept any memory format; one that calls ``view`` on images does not."""
    if hooks_reason(extractor) is not None or any("forward" in vars(module) for module in extractor.modules()):
        return False
    if type(extractor) is CombinedExtractor:
        return all(type(part) in (NatureCNN, nn.Flatten) for part in extractor.extractors.values())
    return type(extractor) is NatureCNN


class FusedAutogradEngine(EagerEngine):
    """Autograd, and Adam in one call; parameters as in :class:`EagerEngine`."""

    name: ClassVar[str] = "fused"
    title: ClassVar[str] = "the fused engine with autograd"
    device_type: ClassVar[str | None] = "cpu"

    @staticmethod
    def unsupported_reason(policy: DQNPolicy, objective: Objective) -> str | None:
        """Return why the engine does not support this policy, or ``None`` if it does."""
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
                return "the optimizer has parameters that are not floating point"
        return None

    def is_stale(self) -> bool:
        """Return True if the policy was modified such that a new engine must be created."""
        return type(self.policy.optimizer) is not th.optim.Adam or unknown_type_reason(self.policy) is not None

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take gradient steps; see :meth:`EagerEngine.train`."""
        network = self.policy.q_net
        if not _accepts_channels_last(network.features_extractor):
            return super().train(source, gradient_steps, max_grad_norm)
        network.image_format = th.channels_last
        try:
            return super().train(source, gradient_steps, max_grad_norm)
        finally:
            del network.image_format  # the eager engine's bits are those of the contiguous format

    def _step(self, on_cpu: bool) -> None:
        adam = self.policy.optimizer
        assert isinstance(adam, th.optim.Adam)
        adam_step(adam, "fused")
