"""What becomes of a policy behind an engine's back: replaced parts, other memory, hooks and patches.

An engine that knows where things lie must look whether they still lie there. What is written into the same memory need
not be noticed.
"""

from collections.abc import Iterable
from typing import Any

import torch as th
from torch import nn

from sb3_scratch_dqn.overriding import replaced
from sb3_scratch_dqn.policies import DQNPolicy

# Methods that somebody may patch, and then wants to see called
_PATCHED = frozenset(
    {
        *("outputs", "forward", "evaluate", "target_outputs", "values_given", "extract_features", "_predict", "noise"),
        *("q_values", "backup", "losses", "moments"),  # of heads
    }
)


def is_patched(instance: object) -> bool:
    """Whether somebody patched a method of this network or head."""
    return not _PATCHED.isdisjoint(vars(instance))


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """What hangs on a module to see, or change, what goes through it; each stays the same object."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def has_hooks(parameter: th.Tensor) -> bool:
    """Whether somebody hung up hooks for the gradient of a parameter, which only autograd heeds."""
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def has_own_way(parameter: th.Tensor) -> bool:
    """Whether somebody froze a parameter, or hung up hooks for its gradient."""
    return not parameter.requires_grad or has_hooks(parameter)


def why_no_plain_steps(optimizer: th.optim.Optimizer) -> str | None:
    """What others wait for in the steps of an optimiser; ``None`` if nobody does."""
    if replaced(optimizer, type(optimizer), "zero_grad") or "step" in vars(optimizer):
        return "methods of the optimizer were patched, as schedulers of learning rates do"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks"
    return None


class Watch:
    """The parts of a policy, as they are now.

    :param policy: the policy
    :param more: other dicts whose values must stay the same objects
    """

    def __init__(self, policy: DQNPolicy, more: Iterable[dict[Any, Any]] = ()) -> None:
        self._modules = [*policy.q_net.modules(), *policy.q_net_target.modules()]
        held = [one for part in self._modules for one in (part._modules, part._parameters, part._buffers)]
        # What must stay where it is: a dict, a name in it, and the object of that name
        self._places: list[tuple[dict[Any, Any], Any, Any]] = [
            (vars(policy), "head", policy.head),
            (policy._modules, "q_net", policy.q_net),
            (policy._modules, "q_net_target", policy.q_net_target),
            *((one, name, value) for one in (*held, *more) for name, value in one.items()),
        ]
        self._patchable = (policy.q_net, policy.q_net_target, policy.head)
        # Whatever hooks hang on, now or later, sees every step only in autograd's way
        self._hooks: list[Any] = [hooks for module in self._modules for hooks in hooks_of(module)]
        networks = (policy.q_net, policy.q_net_target)
        self._tensors = [one for network in networks for one in (*network.parameters(), *network.buffers())]
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]

    def changed(self) -> bool:
        """Whether somebody replaced, moved, hooked or patched something."""
        return (
            not all(held.get(name) is value for held, name, value in self._places)
            or any(map(is_patched, self._patchable))
            or [tensor.data_ptr() for tensor in self._tensors] != self._pointers
            or any(self._hooks)
        )

    def restore(self) -> None:
        """Put everything that was replaced back in its place."""
        for held, name, value in self._places:
            held[name] = value
