"""Detection of what an engine would bypass: replaced parts, moved memory, hooks, patches and proxies.

An engine that stores references to parameters, layers or their memory must check that they are still the ones in use.
Values that are written in place need no detection.
"""

from collections.abc import Iterable, Sequence, Sized
from operator import attrgetter, is_
from typing import Any

import torch as th
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.optim import optimizer as torch_optimizers

from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.networks.q_network import QNetwork

# Methods of networks and heads that an engine may bypass, so a monkey-patch of one of them makes it unsupported
_BYPASSED_METHODS = frozenset(
    {
        *("outputs", "target_outputs", "q_values_from", "eval_q_values"),  # of networks
        *("extract_features", "forward", "_predict", "noise"),
        *("q_values", "backup", "losses", "moments"),  # of heads
    }
)


_GLOBAL_MODULE_HOOKS: tuple[Sized, ...] = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)
_GLOBAL_OPTIMIZER_HOOKS: tuple[Sized, ...] = (
    torch_optimizers._global_optimizer_pre_hooks,
    torch_optimizers._global_optimizer_post_hooks,
)

# Called for each parameter before each update
_requires_grad = attrgetter("requires_grad")
_tensor_hooks = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")


def unknown_type_reason(policy: DQNPolicy) -> str | None:
    """Return which part of a policy has an unknown implementation, such as a proxy, or ``None`` if none has."""
    for name, part, known in (
        ("policy", policy, DQNPolicy),
        ("online network", policy.q_net, QNetwork),
        ("target network", policy.q_net_target, QNetwork),
    ):
        if not issubclass(type(part), known):
            return f"the {name} is a {type(part).__name__}, not a {known.__name__}"
    return None


def torch_mode_reason(device_type: str) -> str | None:
    """Return which mode of PyTorch needs autograd or other dtypes, or ``None`` if none is enabled.

    :param device_type: type of the policy's device
    """
    if th.is_anomaly_enabled():
        return "torch.autograd.set_detect_anomaly is enabled"
    if th.is_autocast_enabled(device_type):
        return "torch.autocast is enabled"
    return None


def is_patched(instance: object) -> bool:
    """Return True if a method of this network or head was monkey-patched."""
    return not _BYPASSED_METHODS.isdisjoint(vars(instance))


def _module_hooks(module: nn.Module) -> tuple[Sized, ...]:
    """Return the dicts of a module's hooks; a module keeps the same dicts."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def hooks_reason(network: nn.Module) -> str | None:
    """Return which hooks are called in a network's forward or backward pass, or ``None`` if there are none."""
    if any(_GLOBAL_MODULE_HOOKS):
        return "global module hooks are registered"
    for name, module in network.named_modules():
        if any(_module_hooks(module)):
            return f"the module {name or 'q_net'} has hooks"
    return None


def has_hooks(parameter: th.Tensor) -> bool:
    """Return True if a parameter has hooks for its gradient, which only autograd calls."""
    return any(_tensor_hooks(parameter))


def have_custom_gradients(parameters: Sequence[th.Tensor]) -> bool:
    """Return True if one of these parameters is frozen or has hooks for its gradient."""
    return not all(map(_requires_grad, parameters)) or any(map(any, map(_tensor_hooks, parameters)))


def patched_optimizer_reason(optimizer: th.optim.Optimizer) -> str | None:
    """Return which patch or hook is called in the steps of an optimiser, or ``None`` if there is none."""
    if is_overridden(optimizer, type(optimizer), "zero_grad") or "step" in vars(optimizer):
        return "methods of the optimizer were patched, as schedulers of learning rates do"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks"
    if any(_GLOBAL_OPTIMIZER_HOOKS):
        return "global optimizer hooks are registered"
    return None


class PolicySnapshot:
    """The parts of a policy and their memory at the time of creation.

    :param policy: the policy
    :param more: further dicts whose values must stay the same objects, and whose tensors must keep their memory
    """

    def __init__(self, policy: DQNPolicy, more: Iterable[dict[Any, Any]] = ()) -> None:
        networks = (policy.q_net, policy.q_net_target)
        modules = [*policy.q_net.modules(), *policy.q_net_target.modules()]
        module_dicts = [part for module in modules for part in (module._modules, module._parameters, module._buffers)]
        more = list(more)
        # Dict, key, and the object that must stay there
        entries: list[tuple[dict[Any, Any], Any, Any]] = [
            (vars(policy), "head", policy.head),
            (policy._modules, "q_net", policy.q_net),
            (policy._modules, "q_net_target", policy.q_net_target),
            *((vars(network), "normalize_images", network.normalize_images) for network in networks),
            *((items, key, value) for items in (*module_dicts, *more) for key, value in items.items()),
        ]
        # As columns, for map() instead of a Python loop: is_modified() runs before each update
        self._dicts, self._keys, self._values = map(list, zip(*entries, strict=True))
        self._containers = [module._modules for module in modules if module._modules]
        self._sizes = list(map(len, self._containers))
        # Methods that can be patched on any part, and their current values
        self._patchable_parts = [vars(policy), *map(vars, modules)]
        self._methods = ["noise", *("forward" for _ in modules)]
        self._patches = list(map(dict.get, self._patchable_parts, self._methods))
        self._patchable = (policy.q_net, policy.q_net_target, policy.head)
        # Only autograd calls hooks, no matter when they are registered
        self._hooks = [*_GLOBAL_MODULE_HOOKS, *(hooks for module in modules for hooks in _module_hooks(module))]
        self._tensors: list[th.Tensor] = [
            *(tensor for network in networks for tensor in (*network.parameters(), *network.buffers())),
            *(value for items in more for value in items.values() if isinstance(value, th.Tensor)),
        ]
        self._pointers = list(map(th.Tensor.data_ptr, self._tensors))

    def is_modified(self) -> bool:
        """Return True if a part was replaced, moved, added, hooked or patched since the snapshot."""
        return (
            not all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
            or list(map(len, self._containers)) != self._sizes
            or list(map(dict.get, self._patchable_parts, self._methods)) != self._patches
            or any(map(is_patched, self._patchable))
            or list(map(th.Tensor.data_ptr, self._tensors)) != self._pointers
            or any(self._hooks)
        )

    def restore(self) -> None:
        """Restore every object that was replaced since the snapshot."""
        for items, key, value in zip(self._dicts, self._keys, self._values, strict=True):
            items[key] = value
