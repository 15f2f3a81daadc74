"""Gradient, clipping and Adam without the host, so that they can be recorded.

The policy's own optimiser takes the steps, by PyTorch's fused kernels. For as long as a step lasts its learning rates
are tensors; to everybody else they are the numbers that SB3 writes. Its state stays where everybody looks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

from sb3_scratch_dqn.engines.cuda.recording import DeviceScalar
from sb3_scratch_dqn.engines.watch import has_hooks, patched_optimizer_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy


def device_steps_unsupported_reason(policy: DQNPolicy) -> str | None:
    """Why the optimiser of a policy cannot do without the host; ``None`` if it can."""
    optimizer, parameters = policy.optimizer, dict(policy.q_net.named_parameters())
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return f"optimizer_class={type(optimizer).__name__} is neither Adam nor AdamW"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return f"{type(optimizer).__name__} has differentiable=True"
    trained = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if trained != {id(one) for one in parameters.values()}:
        return "the optimizer trains other parameters than those of the online network"
    for name, parameter in parameters.items():
        if has_hooks(parameter):
            return f"the parameter {name} has hooks"
        if not parameter.is_floating_point():
            return f"the parameter {name} has dtype {parameter.dtype}, which is no floating point number"
    return patched_optimizer_reason(optimizer)


class DeviceSteps:
    """Steps of a policy's optimiser.

    :param policy: one that :func:`device_steps_unsupported_reason` has nothing against
    """

    def __init__(self, policy: DQNPolicy) -> None:
        self._policy, self._device = policy, policy.device
        self._optimizer, self._parameters = policy.optimizer, list(policy.q_net.parameters())
        self._trained: list[th.Tensor] = [one for one in self._parameters if one.requires_grad]
        self._settings = self._settings_now()
        self._states: list[Any] | None = None  # known after the first step
        self._rates = [DeviceScalar(self._device) for _ in self._optimizer.param_groups]
        self._largest_norm = DeviceScalar(self._device)
        self._gradients: list[th.Tensor] | None = None  # of those parameters that the loss depends on
        self._with_gradients: list[th.Tensor] = []

    def _settings_now(self) -> list[Any]:
        """What Adam reads besides the learning rates, and which parameters have gradients."""
        groups = self._optimizer.param_groups
        known = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
        order = [[id(parameter) for parameter in group["params"]] for group in groups]
        return [known, order, [parameter.requires_grad for parameter in self._parameters]]

    def changed(self) -> bool:
        """Whether somebody changed what a recorded step cannot know of."""
        return (
            self._policy.optimizer is not self._optimizer
            or self._settings_now() != self._settings
            or (self._states is not None and not _same(self._states, _parts_of_state(self._optimizer)))
            or patched_optimizer_reason(self._optimizer) is not None
            or any(map(has_hooks, self._parameters))
        )

    def state(self) -> Iterator[th.Tensor]:
        """All tensors that steps change, but for the parameters."""
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, th.Tensor))

    def count_on_the_device(self) -> None:
        """Move the counts of steps to the device; where others train, the host keeps them."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"] = th.as_tensor(state["step"], dtype=th.float32, device=self._device)

    def set(self, max_grad_norm: float) -> None:
        """Heed the learning rates as they are now.

        :param max_grad_norm: gradients are scaled down to this norm
        """
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            rate.set(float(group["lr"]))
        self._largest_norm.set(float(max_grad_norm))

    def take(self, loss: th.Tensor) -> th.Tensor:
        """Take a step; to be recorded.

        :param loss: one number
        :return: the norm of its gradient
        """
        gradients = self._differentiate(loss)
        norm = self._clip(gradients)
        with self._on_the_device():
            self._optimizer.step()
        return norm

    def _differentiate(self, loss: th.Tensor) -> list[th.Tensor]:
        """Write the gradients into memory that stays, where the parameters show them."""
        found = th.autograd.grad(loss, self._trained, allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
        if self._gradients is None:
            self._gradients = [th.zeros_like(gradient) for gradient in gradients]
            pairs = zip(self._trained, found, strict=True)
            self._with_gradients = [parameter for parameter, gradient in pairs if gradient is not None]
        th._foreach_copy_(self._gradients, gradients)
        self.show()
        return self._gradients

    def _clip(self, gradients: list[th.Tensor]) -> th.Tensor:
        """What ``clip_grad_norm_`` does, which takes no tensor for the largest norm."""
        norm = th.nn.utils.get_total_norm(gradients)
        th._foreach_mul_(gradients, (self._largest_norm.tensor / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextmanager
    def _on_the_device(self) -> Iterator[None]:
        groups = self._optimizer.param_groups
        before = [{name: group.get(name) for name in ("lr", "fused", "capturable")} for group in groups]
        capturing = self._device.type == "cuda" and th.cuda.is_current_stream_capturing()
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group.update(lr=rate.tensor, fused=True, capturable=capturing or group["capturable"])
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)

    def show(self) -> None:
        """Let the parameters have the gradients of the last step, as they have them after autograd."""
        assert self._gradients is not None
        brief = dict(zip(map(id, self._with_gradients), self._gradients, strict=True))
        for parameter in self._parameters:
            parameter.grad = brief.get(id(parameter))

    def settle(self) -> None:
        """After the first step the state of the optimiser is all there, and must stay where it is."""
        if self._states is None:
            self._states = _parts_of_state(self._optimizer)


def _parts_of_state(optimizer: th.optim.Optimizer) -> list[Any]:
    """All objects that an optimiser's state is made of."""
    states: dict[Any, Any] = optimizer.state
    return [states, *(part for state in states.values() for part in (state, *state.values()))]


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))
