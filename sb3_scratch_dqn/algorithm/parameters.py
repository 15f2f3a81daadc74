"""Checks of parameters that are to be loaded: PyTorch's ``load_state_dict()`` accepts some that later fail."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch as th

from sb3_scratch_dqn.common.checks import short_repr

# State of PyTorch's optimisers that has the shape of its parameter, by name
_SHAPED_AS_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum")


def check_parameters(given: Mapping[str, Any], known: Iterable[str], exact_match: bool) -> None:
    """Check the names of the objects whose parameters are given, and that each value is a state_dict.

    :param given: state_dicts by the name of the object
    :param known: the names of the objects that the model has
    :param exact_match: require parameters of all of them
    :raises ValueError: if an object is unknown or missing, or a value is not a state_dict
    """
    known = list(known)
    unknown = sorted(map(str, given.keys() - set(known)))
    if unknown:
        raise ValueError(f"parameters of {', '.join(unknown)} were given, but the model has only {', '.join(known)}")
    for name, state in given.items():
        required = {"state", "param_groups"} if name.endswith("optimizer") else set()
        if not isinstance(state, Mapping) or not required <= state.keys():
            raise ValueError(f"parameters of {name} must be a state_dict, but are {short_repr(state)}")
    missing = sorted(set(known) - given.keys())
    if missing and exact_match:
        raise ValueError(
            f"parameters of {', '.join(missing)} are missing: pass exact_match=False to keep the current ones"
        )


def check_optimizer_state(optimizer: th.optim.Optimizer, required: list[set[str]]) -> None:
    """Check the state that an optimiser loaded, which may be of another class of optimiser.

    :param optimizer: the optimiser with its new state
    :param required: names that each of its parameter groups had before
    :raises ValueError: if its next step would fail
    """
    for group, names in zip(optimizer.param_groups, required, strict=True):
        missing = sorted(names - group.keys())
        if missing:
            raise ValueError(
                f"policy.optimizer is a {type(optimizer).__name__}, but its new state has no {missing[0]!r}"
            )
    for parameter, state in optimizer.state.items():
        for name in _SHAPED_AS_PARAMETERS:
            if isinstance(state.get(name), th.Tensor) and state[name].shape != parameter.shape:
                raise ValueError(
                    f"policy.optimizer has a parameter of shape {tuple(parameter.shape)}, "
                    f"but {name!r} in its new state has {tuple(state[name].shape)}"
                )
