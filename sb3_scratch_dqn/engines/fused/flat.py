"""Parameters, gradients and the state of Adam as views of a few flat tensors.

So one call updates them all, and so does one for the target network. They move there once, when training begins. The
parameters stay the same objects, and ``state_dict``, ``load_state_dict``, saving and callbacks read
and write the same memory from then on. What puts other memory, parameters or layers in their place is noticed
(:meth:`FlatParameters.is_stale`).
"""

from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_scratch_dqn.engines.fused.products import both
from sb3_scratch_dqn.engines.watch import PolicySnapshot, have_custom_gradients, patched_optimizer_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy

# Steps between looks for averages that are too small to matter, and how small that is: in so many steps, at Adam's
# usual decay of 0.9, they do not get from there to where processors become slow, at 1e-38
_FLUSH_EVERY = 128
_NOTHING = 1e-31

# What must be off in an optimiser's settings
_UNKNOWN_SETTINGS = ("amsgrad", "maximize", "differentiable", "capturable", "decoupled_weight_decay")


def fused_adam_unsupported_reason(optimizer: th.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> str | None:
    """Why this optimiser cannot be replaced by one call for all parameters; ``None`` if it can.

    :param optimizer: of a policy
    :param parameters: that are to be trained, in their order
    """
    if type(optimizer) is not th.optim.Adam:
        return f"optimizer_class={type(optimizer).__name__} is not Adam"
    if not hasattr(th, "_fused_adam_"):
        return "this PyTorch has no fused Adam"
    if len(optimizer.param_groups) != 1:
        return f"the optimizer has {len(optimizer.param_groups)} groups of parameters instead of one"
    (group,) = optimizer.param_groups
    if list(map(id, group["params"])) != list(map(id, parameters)):
        return "the optimizer trains other parameters than those of the online network"
    if any(map(group.get, _UNKNOWN_SETTINGS)):
        name = next(filter(group.get, _UNKNOWN_SETTINGS))
        return f"Adam has {name}={group[name]!r}"
    if isinstance(group["lr"], th.Tensor):
        return "the learning rate of the optimizer is a tensor"
    return patched_optimizer_reason(optimizer)


class FlatParameters:
    """The networks and the optimiser of a policy, rearranged.

    :param policy: whose optimiser is Adam, as :func:`fused_adam_unsupported_reason` wants it
    """

    def __init__(self, policy: DQNPolicy) -> None:
        self._policy = policy
        self._optimizer = policy.optimizer
        online, target = list(policy.q_net.parameters()), list(policy.q_net_target.parameters())
        self._online = online
        self.parameters, self.target = self._flatten(online), self._flatten(target)
        self.gradient = both(th.zeros_like(self.parameters))
        self._gradients = list(_views(self.gradient.tensor, online))
        self._show_gradients()
        self._arrange_state(online)
        self._watch = PolicySnapshot(policy, self._states)

    def begin_steps(self) -> None:
        """See what others may have written since the last steps, and where they want to see gradients."""
        self._show_gradients()
        # All counts differ from the first where somebody trained a part of the network alone, or reset its averages
        steps = self._steps.array.tolist()  # of so few numbers NumPy would take several times as long to tell
        self._adam_arguments = self._in_one_piece if steps.count(steps[0]) == len(steps) else self._in_parts

    def _show_gradients(self) -> None:
        """Let the parameters have these gradients, as they have them after autograd."""
        for parameter, view in zip(self._online, self._gradients, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    @staticmethod
    def _flatten(parameters: list[nn.Parameter]) -> th.Tensor:
        flat = _piece(parameters)
        if flat is not None:  # an engine was here before, and others may have views of this
            return flat
        flat = th.zeros(sum(map(_room, parameters)), dtype=th.float32)
        for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        return flat

    def _arrange_state(self, online: list[nn.Parameter]) -> None:
        optimizer = self._optimizer
        self._state = optimizer.state
        first, second = th.zeros_like(self.parameters), th.zeros_like(self.parameters)
        self._first = first.numpy()
        # Each parameter has a count of its own, so that Adam itself could go on from here
        self._steps = both(th.zeros(len(online), dtype=th.float32))
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
        self._in_one_piece: tuple[Any, ...] = (*([flat] for flat in flats), [], [self._steps.tensor[0]])
        parts = [list(_views(flat, online)) for flat in flats]
        self._in_parts: tuple[Any, ...] = (*parts, [], list(self._steps.tensor))
        self._adam_arguments = self._in_one_piece

    def is_stale(self) -> bool:
        """Whether somebody put other memory in the place of this, or hung up hooks that want to see it."""
        optimizer = self._optimizer
        return (
            self._policy.optimizer is not optimizer
            or optimizer.state is not self._state
            or len(self._state) != len(self._states)
            or not all(map(is_, self._state.values(), self._states))
            or self._watch.changed()
            or fused_adam_unsupported_reason(optimizer, self._online) is not None
            or have_custom_gradients(self._online)
        )

    def adam_step(self) -> None:
        """Update the parameters from the gradient (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980)."""
        (group,) = self._optimizer.param_groups
        np.add(self._steps.array, 1, out=self._steps.array)
        if self._steps.array[0] % _FLUSH_EVERY == 0:  # by the count that is saved, so that going on is the same
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
        """Set averages to 0 that are too small to matter.

        The average of a gradient that has become 0, as behind a unit that is never active any more, gets smaller and
        smaller, down to numbers with which processors compute slowly; they do not round to 0. That can double the time
        of a step.
        """
        self._first[np.abs(self._first) < _NOTHING] = 0

    def update_target(self, tau: float) -> None:
        """Let the target network follow.

        :param tau: how far; 1 copies the online network
        """
        if tau == 1:
            self.target.copy_(self.parameters)
        else:
            self.target.mul_(1 - tau).add_(self.parameters, alpha=tau)


# Floats between the beginnings of parameters are a multiple of this: 64 bytes, as PyTorch allocates memory. Otherwise
# matrix products take longer, and on some processors differ in the last bits from those of the same model elsewhere
_ALIGNMENT = 16


def _room(parameter: nn.Parameter) -> int:
    """Floats that a parameter takes. Those that it has no use for are 0, and all that follows from them stays 0."""
    return -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT


def _views(flat: th.Tensor, like: list[nn.Parameter]) -> Iterator[th.Tensor]:
    """Parts of a flat tensor, one behind the other, shaped as parameters."""
    begin = 0
    for parameter in like:
        yield flat[begin : begin + parameter.numel()].view(parameter.shape)
        begin += _room(parameter)


def _piece(parameters: list[nn.Parameter]) -> th.Tensor | None:
    """The flat tensor that the parameters are views of, as :func:`_views` makes them; ``None`` if there is none."""
    storage, size = parameters[0].untyped_storage(), sum(map(_room, parameters))
    if storage.nbytes() != 4 * size or storage.data_ptr() % (4 * _ALIGNMENT) != 0:
        return None
    flat = th.empty(0, dtype=th.float32).set_(storage, 0, (size,), (1,))
    for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
        if parameter.data_ptr() != view.data_ptr() or parameter.stride() != view.stride():
            return None
    return flat


# PyTorch does not document it, but its own fused Adam is made of it
_fused_adam: Callable[..., None] = getattr(th, "_fused_adam_", lambda *_, **__: None)
