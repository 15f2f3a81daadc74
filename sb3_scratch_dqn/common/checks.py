"""Refusing what cannot work, before anything is trained or written.

Every error is a :class:`ValueError` of one sentence that names the argument, its value and what would be right.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from torch import nn

Space = spaces.Space[Any]

FREQUENCY_UNITS = ("step", "episode")


_LONGEST_SHOWN = 200  # characters


def brief(value: Any) -> str:
    """Represent a value in a message: on one line, and not all of it if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _scalar(value: Any) -> Any:
    """The number in an array or tensor without axes; whatever else is given, as it is."""
    return value.item() if isinstance(value, np.ndarray | th.Tensor) and value.ndim == 0 else value


def _as_float(value: Any) -> float:
    """A real number as a ``float``, infinite if that is too small for it; NaN for what is no real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Refuse what is not a whole number of at least ``minimum``; 1e4 is one.

    :return: the number as an ``int``
    """
    value = _scalar(value)
    if not math.isfinite(_as_float(value)) or value != int(value) or value < minimum:
        raise ValueError(f"{name}={brief(value)} must be a whole number of at least {minimum}")
    if value >= 2**63:
        raise ValueError(f"{name}={brief(value)} must be a whole number below 2**63")
    return int(value)


def check_fraction(name: str, value: Any) -> Any:
    """Refuse what is not a number in [0, 1].

    :return: the number, of a type that PyTorch and NumPy take
    """
    value = _scalar(value)
    if not 0 <= _as_float(value) <= 1:
        raise ValueError(f"{name}={brief(value)} must be a number between 0 and 1")
    return value if isinstance(value, int | float | np.number) else float(value)


def check_positive(name: str, value: Any) -> Any:
    """Refuse what is not a number above 0; infinity is one.

    :return: the number, of a type that PyTorch and NumPy take
    """
    value = _scalar(value)
    if not _as_float(value) > 0:
        raise ValueError(f"{name}={brief(value)} must be a number above 0")
    return value if isinstance(value, float | np.number) else _as_float(value)


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a finite number."""
    if not math.isfinite(_as_float(value)):
        raise ValueError(f"{name}={brief(value)} must be a finite number")


def check_not_negative(name: str, value: Any) -> None:
    """Refuse what is not a finite number of at least 0."""
    if not 0 <= _as_float(value) < math.inf:
        raise ValueError(f"{name}={brief(value)} must be a number of at least 0")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse what is not among ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={brief(value)} is unknown: choose one of {', '.join(map(repr, choices))}")


def check_makes_module(name: str, factory: Any) -> None:
    """Refuse what does not make modules.

    :param name: of the argument
    :param factory: must be a subclass of ``nn.Module``, or a function without arguments that returns a module
    """
    if isinstance(factory, type):
        check_subclass(name, factory, nn.Module)
        return
    made: Any = None
    if callable(factory) and not isinstance(factory, nn.Module):
        try:
            with th.random.fork_rng(devices=[]):  # as if it had not been called
                made = factory()
        except TypeError:  # it wants arguments
            made = None
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"{name}={brief(factory)} must be a subclass of torch.nn.Module, "
            "or a function without arguments that makes one"
        )


def check_subclass(name: str, value: Any, base: type) -> None:
    """Refuse what is not a class derived from ``base``."""
    if not isinstance(value, type) or not issubclass(value, base):
        raise ValueError(f"{name}={brief(value)} must be a subclass of {base.__module__}.{base.__name__}")


def check_environment(value: Any) -> None:
    """Refuse what is neither an environment nor a name."""
    if not isinstance(value, str) and not (hasattr(value, "reset") and hasattr(value, "step")):
        raise ValueError(f"env={brief(value)} must be an environment, or the name of one")


def check_callback(value: Any) -> None:
    """Refuse what is neither a callback of SB3, nor a function of local and global variables, nor a list of these."""
    if isinstance(value, list):
        for one in value:
            if one is None:
                raise ValueError(f"callback={brief(value)} has None among its callbacks: leave it out")
            check_callback(one)
    elif value is not None and not isinstance(value, BaseCallback) and not _takes_two(value):
        raise ValueError(
            f"callback={brief(value)} must be None, a BaseCallback, a function of local and global variables, "
            "or a list of these"
        )


def _takes_two(function: Any) -> bool:
    if isinstance(function, type) or not callable(function):
        return False
    try:
        signature(function).bind({}, {})
    except TypeError:
        return False
    except ValueError:  # a function that tells nothing of its arguments
        pass
    return True


def check_folder(name: str, value: Any) -> None:
    """Refuse what is neither ``None`` nor a path."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={brief(value)} must be None or the path of a folder")


def check_dict(name: str, value: Any) -> dict[Any, Any]:
    """Refuse what is not a dict, or another mapping.

    :return: the dict
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={brief(value)} must be a dict")
    return value if isinstance(value, dict) else dict(value)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={brief(value)} must be True or False")


def check_arguments(
    name: str, value: Any, function: Callable[..., Any], refused: Collection[str] = (), more: Collection[str] = ()
) -> None:
    """Refuse what is not a dict of arguments that a function takes.

    :param name: of the dict
    :param value: the dict
    :param function: the function, or class
    :param refused: arguments that it takes from elsewhere
    :param more: what may be there besides its arguments
    """
    check_dict(name, value)
    parameters = signature(function).parameters
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known: list[str] = [*(parameter for parameter in parameters if parameter not in refused), *more]
    choice = f"choose from {', '.join(known)}" if known else "there are none to choose from"
    for key in value:
        if key not in known:
            raise ValueError(f"{name}={brief(value)} has the unknown name {key!r}: {choice}")


def check_factory(name: str, value: Any, base: type) -> None:
    """Refuse what is neither a class derived from ``base`` nor a function."""
    if isinstance(value, type) or not callable(value):
        check_subclass(name, value, base)


def read_numbers(name: str, value: Any) -> npt.NDArray[Any]:
    """Make an array of numbers, or of truth values.

    :raises ValueError: for strings, objects, complex numbers and lists of different lengths
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array of numbers, but is none: {error}") from error
    if np.ma.is_masked(value):
        raise ValueError(f"{name} has masked values, but must have all of them")
    if array.dtype.kind in "US":
        raise ValueError(f"{name} must be an array of numbers, but is none: it has strings")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}, but must have one of real numbers")
    return array


def check_observation(observation: Any, space: Space) -> None:
    """Refuse what is no observation of a space; its shape is looked at by SB3.

    :param observation: an array, or a dict of arrays, of one observation or several
    :param space: that it should be of
    :raises ValueError: naming what is wrong
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(observation, Mapping) or observation.keys() != space.spaces.keys():
            told = list(observation) if isinstance(observation, Mapping) else f"a {type(observation).__name__}"
            raise ValueError(f"observation is {told}, but must be a dict with the keys {', '.join(space.spaces)}")
        for key, part in observation.items():
            _check_numbers(f"observation[{key!r}]", part)
    elif isinstance(observation, Mapping):
        raise ValueError(f"observation is a dict, but must be an array of {space}")
    else:
        _check_numbers("observation", observation)


def _check_numbers(name: str, value: Any) -> None:
    if not (isinstance(value, np.ndarray) and value.dtype.kind in "biuf"):
        read_numbers(name, value)


def check_net_arch(value: Any) -> None:
    """Refuse what is not a list of the widths of hidden layers."""
    is_list = isinstance(value, list | tuple)
    if not is_list or any(isinstance(w, bool) or not isinstance(w, Integral) or not 1 <= int(w) < 2**63 for w in value):
        raise ValueError(
            f"net_arch={brief(value)} must be a list of whole numbers of at least 1, the widths of hidden layers"
        )


def check_seed(value: Any) -> None:
    """Refuse what NumPy's global generator cannot be seeded with."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**32:
        raise ValueError(f"seed={brief(value)} must be None or a whole number from 0 to {2**32 - 1}")


def check_device(value: Any) -> None:
    """Refuse what names no device of PyTorch."""
    if isinstance(value, str) and value == "auto":
        return
    try:
        device = th.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device={brief(value)} must be 'auto' or a device of PyTorch, such as 'cpu' or 'cuda:0'"
        ) from None
    # Where there is no GPU at all, SB3 takes the CPU for "cuda", and so for the first one
    n_gpus = max(th.cuda.device_count(), 1)
    if device.type not in ("cpu", "cuda"):
        try:
            th.zeros(1, device=device).cpu()
        except Exception as error:  # whatever the code of a device raises
            told = str(error).split("\n")[0]
            raise ValueError(f"device={brief(value)} cannot be used on this machine: {told}") from error
    if device.type == "cuda" and device.index is not None and device.index >= n_gpus:
        raise ValueError(f"device={brief(value)} must be 'cuda:0' to 'cuda:{n_gpus - 1}', or 'auto', on this machine")


# Points of the training at which schedules are tried: the remaining progress
_TRIED_PROGRESS = (1.0, 0.0, 0.25, 0.5, 0.75)


def check_schedule(name: str, schedule: Callable[[float], Any], check: Callable[[str, Any], Any]) -> None:
    """Refuse a schedule that gives what cannot be.

    :param name: of the argument
    :param schedule: a function of the remaining progress, from 1 to 0
    :param check: refuses a value, given its name and itself
    """
    for progress in _TRIED_PROGRESS:
        try:
            value = _scalar(schedule(progress))
        except Exception as error:  # whatever a function of users does
            raise ValueError(
                f"{name}={brief(schedule)} must be a function of the remaining progress (1 to 0), "
                f"but {name}({progress}) raises {type(error).__name__}: {error}"
            ) from error
        check(f"{name}({progress})", value)


def check_learning_rate(name: str, value: Any) -> Any:
    """Refuse what is neither a number of at least 0 nor a function that gives such numbers.

    :return: the function, or the number as a ``float``
    """
    if callable(value):
        check_schedule(name, value, check_not_negative)
        return value
    value = _scalar(value)
    if not 0 <= _as_float(value) < math.inf:
        raise ValueError(
            f"{name}={brief(value)} must be a number of at least 0, or a function of the remaining progress (1 to 0)"
        )
    return float(value)


def check_duration(value: Any) -> None:
    """Refuse what is not a number of steps to train for; 1e5 is one."""
    if not 0 <= _as_float(value) < math.inf:
        raise ValueError(f"total_timesteps={brief(value)} must be a number of environment steps of at least 0")


def parse_frequency(name: str, value: Any) -> tuple[int, str]:
    """Read ``4``, ``(4, "step")`` or ``(1, "episode")``; a list is as good as a tuple.

    :return: the number and the unit
    """
    frequency: Any
    unit: Any
    frequency, unit = value if isinstance(value, list | tuple) and len(value) == 2 else (value, "step")
    if isinstance(unit, TrainFrequencyUnit):
        unit = unit.value
    try:
        frequency = check_count(name, frequency)
        check_choice(name, unit, FREQUENCY_UNITS)
    except ValueError:
        raise ValueError(
            f"{name}={brief(value)} must be a whole number of at least 1 (steps), "
            'or such a number and its unit, as in (4, "step") or (1, "episode")'
        ) from None
    return frequency, unit


def check_buffer_holds_batch(buffer_size: int, batch_size: int) -> None:
    """Refuse a replay buffer smaller than what is sampled from it."""
    if buffer_size < batch_size:
        raise ValueError(f"buffer_size={buffer_size} must be at least batch_size={batch_size}")


def check_action_space(action_space: Space) -> None:
    """Refuse environments whose actions are not 0, 1, ..., n - 1.

    :raises AssertionError: for other kinds of spaces, which is what SB3's algorithms raise
    :raises ValueError: for a ``Discrete`` space that does not begin with 0
    """
    if not isinstance(action_space, spaces.Discrete):
        raise AssertionError(
            f"env has the action space {action_space}, but ScratchDQN needs a Discrete one: "
            "it learns one value for each of a finite number of actions"
        )
    if action_space.start != 0:
        raise ValueError(
            f"env has the action space {action_space}, but its actions must begin with 0: "
            "wrap env so that it adds the start itself"
        )


class HasSpaces(Protocol):
    """An environment or a replay buffer."""

    observation_space: Space
    action_space: Space


def check_same_spaces(what: str, given: HasSpaces, observation_space: Space, action_space: Space) -> None:
    """Refuse an environment or a replay buffer that was made for other spaces than a model.

    :param what: what is given, for the message
    :param given: the environment or the replay buffer
    :param observation_space: of the model
    :param action_space: of the model
    """
    for kind, its, needed in (
        ("observation", given.observation_space, observation_space),
        ("action", given.action_space, action_space),
    ):
        if its != needed:
            raise ValueError(f"{what} has the {kind} space {its}, but the model's is {needed}")
