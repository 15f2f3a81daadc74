"""Gradients, clipping and steps of Adam without the host, so that they can be captured.

The policy's own optimiser takes the steps, by PyTorch's fused kernels. During a step its learning rates are tensors;
otherwise they are the numbers that SB3 writes. Its state stays in ``optimizer.state``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

from sb3_scratch_dqn.engines.cuda.capture import DeviceScalar
from sb3_scratch_dqn.engines.modifications import has_hooks, patched_optimizer_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy


def capturable_unsupported_reason(policy: DQNPolicy) -> str | None:
    """Return why steps of a policy's optimiser cannot be captured, or ``None`` if they can."""
    optimizer, parameters = policy.optimizer, dict(policy.q_net.named_parameters())
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return f"optimizer_class={type(optimizer).__name__} is neither Adam nor AdamW"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return f"{type(optimizer).__name__} has differentiable=True"
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if trained != {id(parameter) for parameter in parameters.values()}:
        return "the optimizer trains other parameters than those of the online network"
    for name, parameter in parameters.items():
        if has_hooks(parameter):
            return f"the parameter {name} has hooks"
        if not parameter.is_floating_point():
            return f"the parameter {name} has dtype {parameter.dtype}, which is not floating point"
    return patched_optimizer_reason(optimizer)


class CapturableOptimizer:
    """Steps of a policy's optimiser without the host.

    :param policy: policy that :func:`capturable_unsupported_reason` returns ``None`` for
    """

    def __init__(self, policy: DQNPolicy) -> None:
        self._policy, self._device = policy, policy.device
        self._optimizer, self._parameters = policy.optimizer, list(policy.q_net.parameters())
        self._trained: list[th.Tensor] = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._settings = self._current_settings()
        self._state_objects: list[Any] | None = None  # known after the first step
        self._learning_rates = [DeviceScalar(self._device) for _ in self._optimizer.param_groups]
        self._max_grad_norm = DeviceScalar(self._device)
        self._gradients: list[th.Tensor] | None = None  # of the parameters that the loss depends on
        self._with_gradients: list[th.Tensor] = []

    def _current_settings(self) -> list[Any]:
        """Return what Adam reads besides the learning rates, and which parameters have gradients."""
        groups = self._optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
        order = [[id(parameter) for parameter in group["params"]] for group in groups]
        return [settings, order, [parameter.requires_grad for parameter in self._parameters]]

    def is_modified(self) -> bool:
        """Return True if something was modified that a captured step does not read."""
        return (
            self._policy.optimizer is not self._optimizer
            or self._current_settings() != self._settings
            or (self._state_objects is not None and not _same(self._state_objects, _state_objects(self._optimizer)))
            or patched_optimizer_reason(self._optimizer) is not None
            or any(map(has_hooks, self._parameters))
        )

    def state(self) -> Iterator[th.Tensor]:
        """Yield all tensors that a step modifies, except the parameters."""
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, th.Tensor))

    def move_step_counts(self) -> None:
        """Move step counts to the device; other engines keep them on the host."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"] = th.as_tensor(state["step"], dtype=th.float32, device=self._device)

    def set_scalars(self, max_grad_norm: float) -> None:
        """Write the current learning rates and the maximum norm to the device.

        :param max_grad_norm: maximum norm of the gradient
        """
        for group, learning_rate in zip(self._optimizer.param_groups, self._learning_rates, strict=True):
            learning_rate.set(float(group["lr"]))
        self._max_grad_norm.set(float(max_grad_norm))

    def step(self, loss: th.Tensor) -> th.Tensor:
        """Take a step; can be captured.

        :param loss: scalar loss
        :return: the norm of its gradient before clipping
        """
        gradients = self._differentiate(loss)
        norm = self._clip(gradients)
        with self._capturable():
            self._optimizer.step()
        return norm

    def _differentiate(self, loss: th.Tensor) -> list[th.Tensor]:
        """Write the gradients to memory that is never reallocated, and assign it to ``grad`` of the parameters."""
        found = th.autograd.grad(loss, self._trained, allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
        if self._gradients is None:
            self._gradients = [th.zeros_like(gradient) for gradient in gradients]
            pairs = zip(self._trained, found, strict=True)
            self._with_gradients = [parameter for parameter, gradient in pairs if gradient is not None]
        th._foreach_copy_(self._gradients, gradients)
        self.assign_gradients()
        return self._gradients

    def _clip(self, gradients: list[th.Tensor]) -> th.Tensor:
        """Clip gradients as ``clip_grad_norm_`` does, which accepts no tensor for the maximum norm."""
        norm = th.nn.utils.get_total_norm(gradients)
        th._foreach_mul_(gradients, (self._max_grad_norm.tensor / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        groups = self._optimizer.param_groups
        before = [{name: group.get(name) for name in ("lr", "fused", "capturable")} for group in groups]
        capturing = self._device.type == "cuda" and th.cuda.is_current_stream_capturing()
        try:
            for group, learning_rate in zip(groups, self._learning_rates, strict=True):
                group.update(lr=learning_rate.tensor, fused=True, capturable=capturing or group["capturable"])
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)

    def assign_gradients(self) -> None:
        """Assign the gradients of the last step to ``grad`` of the parameters, as autograd does."""
        assert self._gradients is not None
        by_id = dict(zip(map(id, self._with_gradients), self._gradients, strict=True))
        for parameter in self._parameters:
            parameter.grad = by_id.get(id(parameter))

    def freeze_state(self) -> None:
        """Store which objects the optimiser's state consists of; it is complete after the first step."""
        if self._state_objects is None:
            self._state_objects = _state_objects(self._optimizer)


def _state_objects(optimizer: th.optim.Optimizer) -> list[Any]:
    """Return all objects that an optimiser's state consists of."""
    states: dict[Any, Any] = optimizer.state
    return [states, *(part for state in states.values() for part in (state, *state.values()))]


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
