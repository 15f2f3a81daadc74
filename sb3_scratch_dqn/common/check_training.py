"""Checks of the arguments of training: seed, device, schedules, intervals, durations and callbacks.

Each function raises a :class:`ValueError` of one sentence that names the argument, its value and what would be right.
"""

import math
from collections.abc import Callable
from inspect import signature
from numbers import Integral
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import TrainFrequencyUnit

from sb3_scratch_dqn.common.checks import (
    check_choice,
    check_count,
    check_non_negative,
    short_repr,
    to_float,
    unwrap_scalar,
)

FREQUENCY_UNITS = ("step", "episode")

# Values of progress_remaining at which schedules are tried
_TRIED_PROGRESS = (1.0, 0.0, 0.25, 0.5, 0.75)


def check_seed(value: Any) -> None:
    """Raise ValueError unless ``value`` is ``None`` or a seed that NumPy's global generator accepts."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**32:
        raise ValueError(f"seed={short_repr(value)} must be None or a whole number from 0 to {2**32 - 1}")


def check_device(value: Any) -> None:
    """Raise ValueError unless ``value`` is ``"auto"`` or a PyTorch device that works on this machine."""
    if isinstance(value, str) and value == "auto":
        return
    try:
        device = th.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device={short_repr(value)} must be 'auto' or a device of PyTorch, such as 'cpu' or 'cuda:0'"
        ) from None
    # Without a GPU, SB3 uses the CPU for "cuda", and so for "cuda:0"
    n_gpus = max(th.cuda.device_count(), 1)
    if device.type not in ("cpu", "cuda"):
        try:
            th.zeros(1, device=device).cpu()
        except Exception as error:  # a backend can raise anything
            reason = str(error).split("\n")[0]
            raise ValueError(f"device={short_repr(value)} cannot be used on this machine: {reason}") from error
    if device.type == "cuda" and device.index is not None and device.index >= n_gpus:
        raise ValueError(
            f"device={short_repr(value)} must be 'cuda:0' to 'cuda:{n_gpus - 1}', or 'auto', on this machine"
        )


def check_schedule(name: str, schedule: Callable[[float], Any], check: Callable[[str, Any], Any]) -> None:
    """Raise ValueError if a schedule raises an error or returns an invalid value.

    :param name: name of the argument
    :param schedule: a function of the remaining progress, from 1 to 0
    :param check: ``check(name, value)`` raises ValueError for an invalid value
    """
    for progress in _TRIED_PROGRESS:
        try:
            value = unwrap_scalar(schedule(progress))
        except Exception as error:  # a user's function can raise anything
            raise ValueError(
                f"{name}={short_repr(schedule)} must be a function of the remaining progress (1 to 0), "
                f"but {name}({progress}) raises {type(error).__name__}: {error}"
            ) from error
        check(f"{name}({progress})", value)


def check_learning_rate(name: str, value: Any) -> Any:
    """Raise ValueError unless ``value`` is a number of at least 0 or a schedule that returns such numbers.

    :return: the schedule, or the number as a ``float``
    """
    if callable(value):
        check_schedule(name, value, check_non_negative)
        return value
    value = unwrap_scalar(value)
    if not 0 <= to_float(value) < math.inf:
        raise ValueError(
            f"{name}={short_repr(value)} must be a number of at least 0, "
            "or a function of the remaining progress (1 to 0)"
        )
    return float(value)


def check_total_timesteps(value: Any) -> None:
    """Raise ValueError unless ``value`` is a number of environment steps (floats such as 1e5 are accepted)."""
    if not 0 <= to_float(value) < math.inf:
        raise ValueError(f"total_timesteps={short_repr(value)} must be a number of environment steps of at least 0")


def parse_frequency(name: str, value: Any) -> tuple[int, str]:
    """Parse ``4``, ``(4, "step")`` or ``(1, "episode")``; a list is accepted instead of a tuple.

    :param name: name of the argument
    :param value: a number of steps, or a number and its unit
    :return: the number and the unit
    :raises ValueError: for other values
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
            f"{name}={short_repr(value)} must be a whole number of at least 1 (steps), "
            'or such a number and its unit, as in (4, "step") or (1, "episode")'
        ) from None
    return frequency, unit


def check_buffer_holds_batch(buffer_size: int, batch_size: int) -> None:
    """Raise ValueError unless the replay buffer can hold a batch."""
    if buffer_size < batch_size:
        raise ValueError(f"buffer_size={buffer_size} must be at least batch_size={batch_size}")


def check_callback(value: Any) -> None:
    """Raise ValueError unless ``value`` is ``None``, a callback of SB3, a function, or a list of these.

    A function gets the dicts of local and global variables.
    """
    if isinstance(value, list):
        for callback in value:
            if callback is None:
                raise ValueError(f"callback={short_repr(value)} has None among its callbacks: leave it out")
            check_callback(callback)
    elif value is not None and not isinstance(value, BaseCallback) and not _accepts_two_arguments(value):
        raise ValueError(
            f"callback={short_repr(value)} must be None, a BaseCallback, a function of local and global variables, "
            "or a list of these"
        )


def _accepts_two_arguments(function: Any) -> bool:
    if isinstance(function, type) or not callable(function):
        return False
    try:
        signature(function).bind({}, {})
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        pass
    return True
