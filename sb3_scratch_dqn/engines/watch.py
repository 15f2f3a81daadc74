"""What becomes of a policy behind an engine's back: replaced parts, other memory, hooks and patches.

An engine that knows where things lie must look whether they still lie there. What is written into the same memory need
not be noticed.
"""

from collections.abc import Iterable, Sequence, Sized
from operator import attrgetter, is_
from typing import Any

import torch as th
from torch import nn
from torch.nn.modules import module as all_modules
from torch.optim import optimizer as all_optimizers

from sb3_scratch_dqn.common.overriding import replaced
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.networks.q_network import QNetwork

# Methods that somebody may patch, and then wants to see called
_PATCHED = frozenset(
    {
        *("outputs", "forward", "evaluate", "target_outputs", "q_values_from", "extract_features", "_predict", "noise"),
        *("q_values", "backup", "losses", "moments"),  # of heads
    }
)


# Hooks that hang on whatever modules there are, and on whatever optimisers
_HOOKS_OF_ALL_MODULES: tuple[Sized, ...] = (
    all_modules._global_forward_hooks,
    all_modules._global_forward_pre_hooks,
    all_modules._global_backward_hooks,
    all_modules._global_backward_pre_hooks,
)
_HOOKS_OF_ALL_OPTIMIZERS: tuple[Sized, ...] = (
    all_optimizers._global_optimizer_pre_hooks,
    all_optimizers._global_optimizer_post_hooks,
)

# Called for each parameter before each update
_requires_grad = attrgetter("requires_grad")
_hooks_of_tensor = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")


def unknown_type_reason(policy: DQNPolicy) -> str | None:
    """Return why nothing is known of how a policy computes, such as one behind a proxy; ``None`` if that is known."""
    for name, part, known in (
        ("policy", policy, DQNPolicy),
        ("online network", policy.q_net, QNetwork),
        ("target network", policy.q_net_target, QNetwork),
    ):
        if not issubclass(type(part), known):
            return f"the {name} is a {type(part).__name__}, not a {known.__name__}"
    return None


def torch_mode_reason(device_type: str) -> str | None:
    """Return which mode of PyTorch asks for other computations than an engine's own; ``None`` if there is none.

    :param device_type: of the policy's device
    """
    if th.is_anomaly_enabled():
        return "torch.autograd.set_detect_anomaly looks for anomalies"
    if th.is_autocast_enabled(device_type):
        return "torch.autocast is enabled"
    return None


def is_patched(instance: object) -> bool:
    """Whether somebody patched a method of this network or head."""
    return not _PATCHED.isdisjoint(vars(instance))


def _hooks_of(module: nn.Module) -> tuple[Sized, ...]:
    """What hangs on a module to see, or change, what goes through it; each stays the same object."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def hooks_reason(network: nn.Module) -> str | None:
    """What wants to see all that goes through a network; ``None`` if nothing does."""
    if any(_HOOKS_OF_ALL_MODULES):
        return "there are hooks for all modules"
    for name, module in network.named_modules():
        if any(_hooks_of(module)):
            return f"the module {name or 'q_net'} has hooks"
    return None


def has_hooks(parameter: th.Tensor) -> bool:
    """Whether somebody hung up hooks for the gradient of a parameter, which only autograd heeds."""
    return any(_hooks_of_tensor(parameter))


def have_custom_gradients(parameters: Sequence[th.Tensor]) -> bool:
    """Whether somebody froze one of these parameters, or hung up hooks for its gradient."""
    return not all(map(_requires_grad, parameters)) or any(map(any, map(_hooks_of_tensor, parameters)))


def patched_optimizer_reason(optimizer: th.optim.Optimizer) -> str | None:
    """What others wait for in the steps of an optimiser; ``None`` if nobody does."""
    if replaced(optimizer, type(optimizer), "zero_grad") or "step" in vars(optimizer):
        return "methods of the optimizer were patched, as schedulers of learning rates do"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks"
    if any(_HOOKS_OF_ALL_OPTIMIZERS):
        return "there are hooks for all optimizers"
    return None


class PolicySnapshot:
    """The parts of a policy, as they are now.

    :param policy: the policy
    :param more: other dicts whose values must stay the same objects, and tensors among them where they are
    """

    def __init__(self, policy: DQNPolicy, more: Iterable[dict[Any, Any]] = ()) -> None:
        modules = [*policy.q_net.modules(), *policy.q_net_target.modules()]
        held = [one for part in modules for one in (part._modules, part._parameters, part._buffers)]
        more = list(more)
        # What must stay where it is: a dict, a name in it, and the object of that name
        places: list[tuple[dict[Any, Any], Any, Any]] = [
            (vars(policy), "head", policy.head),
            (policy._modules, "q_net", policy.q_net),
            (policy._modules, "q_net_target", policy.q_net_target),
            *((vars(one), "normalize_images", one.normalize_images) for one in (policy.q_net, policy.q_net_target)),
            *((one, name, value) for one in (*held, *more) for name, value in one.items()),
        ]
        # Columns, for loops that are not Python's: this is asked before each update
        self._holding, self._names, self._values = map(list, zip(*places, strict=True))
        self._containers = [part._modules for part in modules if part._modules]
        self._sizes = list(map(len, self._containers))
        # Methods that may be patched, on whatever part, and what they are now
        self._patchable_parts = [vars(policy), *map(vars, modules)]
        self._methods = ["noise", *("forward" for _ in modules)]
        self._patches = list(map(dict.get, self._patchable_parts, self._methods))
        self._patchable = (policy.q_net, policy.q_net_target, policy.head)
        # Whatever hooks hang on, now or later, sees every step only in autograd's way
        self._hooks = [*_HOOKS_OF_ALL_MODULES, *(hooks for module in modules for hooks in _hooks_of(module))]
        networks = (policy.q_net, policy.q_net_target)
        self._tensors: list[th.Tensor] = [
            *(one for network in networks for one in (*network.parameters(), *network.buffers())),
            *(value for one in more for value in one.values() if isinstance(value, th.Tensor)),
        ]
        self._pointers = list(map(th.Tensor.data_ptr, self._tensors))

    def changed(self) -> bool:
        """Whether somebody replaced, moved, added, hooked or patched something."""
        return (
            not all(map(is_, map(dict.get, self._holding, self._names), self._values))
            or list(map(len, self._containers)) != self._sizes
            or list(map(dict.get, self._patchable_parts, self._methods)) != self._patches
            or any(map(is_patched, self._patchable))
            or list(map(th.Tensor.data_ptr, self._tensors)) != self._pointers
            or any(self._hooks)
        )

    def restore(self) -> None:
        """Put everything that was replaced back in its place."""
        for held, name, value in zip(self._holding, self._names, self._values, strict=True):
            held[name] = value
