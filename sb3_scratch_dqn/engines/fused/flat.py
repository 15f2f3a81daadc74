"""Parameters, gradients and Adam's state as views of a few flat tensors.

One call then updates all parameters, and one call the target network. Parameters are moved once, when the engine is
attached. They stay the same objects, so ``state_dict``, ``load_state_dict``, saving and callbacks read and write the
flat memory from then on. :meth:`FlatParameters.is_stale` detects when other memory, parameters or layers replace them.
"""

from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_scratch_dqn.engines.fused.products import numpy_tensor
from sb3_scratch_dqn.engines.modifications import PolicySnapshot, have_custom_gradients, patched_optimizer_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy

# Averages of gradients below this are set to 0. With Adam's default decay of 0.9, 128 steps take an average from 1e-31
# to 1e-37, still above the denormal numbers (below 1e-38) with which processors compute slowly
_FLUSH_THRESHOLD = 1e-31
# Steps of Adam between searches for such averages: a search takes 0.3 to 0.4 of the time of a step (measured for 64 x
# 64 and 256 x 256), so every 128 steps 0.3%
_FLUSH_EVERY = 128

# Settings of Adam that must be off
_UNSUPPORTED_SETTINGS = ("amsgrad", "maximize", "differentiable", "capturable", "decoupled_weight_decay")


def fused_adam_unsupported_reason(optimizer: th.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> str | None:
    """Return why one call for all parameters cannot replace this optimiser, or ``None`` if it can.

    :param optimizer: optimiser of a policy
    :param parameters: parameters of the online network, in their order
    """
    if type(optimizer) is not th.optim.Adam:
        return f"optimizer_class={type(optimizer).__name__} is not Adam"
    if not hasattr(th, "_fused_adam_"):
        return "this PyTorch has no fused Adam"
    if len(optimizer.param_groups) != 1:
        return f"the optimizer has {len(optimizer.param_groups)} parameter groups, not one"
    (group,) = optimizer.param_groups
    if list(map(id, group["params"])) != list(map(id, parameters)):
        return "the optimizer trains other parameters than those of the online network"
    if any(map(group.get, _UNSUPPORTED_SETTINGS)):
        name = next(filter(group.get, _UNSUPPORTED_SETTINGS))
        return f"Adam has {name}={group[name]!r}"
    if isinstance(group["lr"], th.Tensor):
        return "the learning rate of the optimizer is a tensor"
    return patched_optimizer_reason(optimizer)


class FlatParameters:
    """The parameters of both networks, the gradients and Adam's state of a policy in flat storage.

    :param policy: policy whose optimiser :func:`fused_adam_unsupported_reason` returns ``None`` for
    """

    def __init__(self, policy: DQNPolicy) -> None:
        self._policy = policy
        self._optimizer = policy.optimizer
        online, target = list(policy.q_net.parameters()), list(policy.q_net_target.parameters())
        self._online = online
        self.parameters, self.target = self._flatten(online), self._flatten(target)
        self.gradient = numpy_tensor(th.zeros_like(self.parameters))
        self._gradients = list(_views(self.gradient.tensor, online))
        self._assign_gradients()
        self._flatten_adam_state(online)
        self._snapshot = PolicySnapshot(policy, self._states)

    def prepare_steps(self) -> None:
        """Assign ``grad`` of the parameters, and check whether all of them have taken the same number of steps."""
        self._assign_gradients()
        # Step counts differ if a part of the network was trained alone, or its averages were reset
        steps = self._steps.array.tolist()  # comparing so few elements takes several times as long in NumPy
        same = steps.count(steps[0]) == len(steps)
        self._adam_arguments = self._flat_adam_arguments if same else self._split_adam_arguments

    def _assign_gradients(self) -> None:
        """Assign views of the flat gradient to ``grad`` of the parameters, where autograd writes it too."""
        for parameter, view in zip(self._online, self._gradients, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    @staticmethod
    def _flatten(parameters: list[nn.Parameter]) -> th.Tensor:
        """Move parameters into a flat tensor, and return it."""
        flat = _existing_flat_tensor(parameters)
        if flat is not None:  # of an earlier engine: callbacks may hold views of it
            return flat
        flat = th.zeros(sum(map(_padded_size, parameters)), dtype=th.float32)
        for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        return flat

    def _flatten_adam_state(self, online: list[nn.Parameter]) -> None:
        """Move Adam's state into flat tensors."""
        optimizer = self._optimizer
        self._state = optimizer.state
        first, second = th.zeros_like(self.parameters), th.zeros_like(self.parameters)
        self._first = first.numpy()
        # A step count per parameter, as Adam itself has, so that it can continue from this state
        self._steps = numpy_tensor(th.zeros(len(online), dtype=th.float32))
        views = zip(online, _views(first, online), _views(second, online), self._steps.tensor, strict=True)
        for parameter, average, square, step in views:
            state = optimizer.state[parameter]
            if state:
                average.copy_(state["exp_avg"])
                square.copy_(state["exp_avg_sq"])
                step.copy_(th.as_tensor(state["step"]))
            state.update(step=step, exp_avg=average, exp_avg_sq=square)
        self._states = list(optimizer.state.values())
        flats = (self.parameters, self.gradient.tensor, first, second)
        self._flat_adam_arguments: tuple[Any, ...] = (*([flat] for flat in flats), [], [self._steps.tensor[0]])
        splits = [list(_views(flat, online)) for flat in flats]
        self._split_adam_arguments: tuple[Any, ...] = (*splits, [], list(self._steps.tensor))
        self._adam_arguments = self._flat_adam_arguments

    def is_stale(self) -> bool:
        """Return True if other memory replaced a flat tensor, or if hooks or settings need another optimiser step."""
        optimizer = self._optimizer
        return (
            self._policy.optimizer is not optimizer
            or optimizer.state is not self._state
            or len(self._state) != len(self._states)
            or not all(map(is_, self._state.values(), self._states))
            or self._snapshot.is_modified()
            or fused_adam_unsupported_reason(optimizer, self._online) is not None
            or have_custom_gradients(self._online)
        )

    def adam_step(self) -> None:
        """Update the parameters from the gradient (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980)."""
        (group,) = self._optimizer.param_groups
        np.add(self._steps.array, 1, out=self._steps.array)
        if self._steps.array[0] % _FLUSH_EVERY == 0:  # the count that is saved, so that a resumed run flushes alike
            self._flush()
        _fused_adam(
            *self._adam_arguments,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _flush(self) -> None:
        """Set averages of gradients that are too small to matter to 0.

        The average of a gradient that has become 0, as for the weights of a unit that is never active any more, decays
        to denormal numbers, with which processors compute slowly, and never rounds to 0. That can double the time of
        a step.
        """
        self._first[np.abs(self._first) < _FLUSH_THRESHOLD] = 0

    def update_target(self, tau: float) -> None:
        """Update the target network.

        :param tau: interpolation factor of the Polyak update; 1 copies the online network
        """
        if tau == 1:
            self.target.copy_(self.parameters)
        else:
            self.target.mul_(1 - tau).add_(self.parameters, alpha=tau)


# Parameters begin at multiples of this many floats: 64 bytes, as PyTorch allocates memory. Otherwise matrix products
# take longer, and on some processors differ in the last bits from those of the same model with its own memory
_ALIGNMENT = 16


def _padded_size(parameter: nn.Parameter) -> int:
    """Return the floats that a parameter takes. Padding is 0, and stays 0 in gradients, averages and updates."""
    return -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT


def _views(flat: th.Tensor, parameters: list[nn.Parameter]) -> Iterator[th.Tensor]:
    """Yield consecutive parts of a flat tensor in the shapes of parameters."""
    begin = 0
    for parameter in parameters:
        yield flat[begin : begin + parameter.numel()].view(parameter.shape)
        begin += _padded_size(parameter)


def _existing_flat_tensor(parameters: list[nn.Parameter]) -> th.Tensor | None:
    """Return the flat tensor that the parameters are :func:`_views` of, or ``None`` if there is none."""
    storage, size = parameters[0].untyped_storage(), sum(map(_padded_size, parameters))
    if storage.nbytes() != 4 * size or storage.data_ptr() % (4 * _ALIGNMENT) != 0:
        return None
    flat = th.empty(0, dtype=th.float32).set_(storage, 0, (size,), (1,))
    for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
        if parameter.data_ptr() != view.data_ptr() or parameter.stride() != view.stride():
            return None
    return flat


# Not documented, but torch.optim's own fused Adam calls it
_fused_adam: Callable[..., None] = getattr(th, "_fused_adam_", lambda *_, **__: None)
