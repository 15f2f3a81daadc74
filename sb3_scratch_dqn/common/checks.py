"""Checks of single arguments: numbers, names, dicts, classes.

Each function raises a :class:`ValueError` unless its argument is valid. The message is one sentence that names the
argument, its value and what would be right. Spaces and environments are checked in
:mod:`sb3_scratch_dqn.common.check_spaces`, arguments of training in :mod:`sb3_scratch_dqn.common.check_training`.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn

_MAX_REPR_LENGTH = 200  # characters


def short_repr(value: Any) -> str:
    """Return ``repr(value)`` for a message: on one line, and truncated if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _MAX_REPR_LENGTH else f"{text[:_MAX_REPR_LENGTH]}..."


def unwrap_scalar(value: Any) -> Any:
    """Return the number in a 0-dimensional array or tensor, and every other value unchanged."""
    return value.item() if isinstance(value, np.ndarray | th.Tensor) and value.ndim == 0 else value


def to_float(value: Any) -> float:
    """Convert a real number to a ``float``: infinite if it overflows, NaN if ``value`` is not a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Raise ValueError unless ``value`` is a whole number of at least ``minimum`` (floats such as 1e4 are accepted).

    :return: the number as an ``int``
    """
    value = unwrap_scalar(value)
    if not math.isfinite(to_float(value)) or value != int(value) or value < minimum:
        raise ValueError(f"{name}={short_repr(value)} must be a whole number of at least {minimum}")
    if value >= 2**63:
        raise ValueError(f"{name}={short_repr(value)} must be a whole number below 2**63")
    return int(value)


def check_fraction(name: str, value: Any) -> Any:
    """Raise ValueError unless ``value`` is a number in [0, 1].

    :return: the number, of a type that PyTorch and NumPy accept
    """
    value = unwrap_scalar(value)
    if not 0 <= to_float(value) <= 1:
        raise ValueError(f"{name}={short_repr(value)} must be a number between 0 and 1")
    return value if isinstance(value, int | float | np.number) else float(value)


def check_positive(name: str, value: Any) -> Any:
    """Raise ValueError unless ``value`` is a number above 0 (may be infinite).

    :return: the number, of a type that PyTorch and NumPy accept
    """
    value = unwrap_scalar(value)
    if not to_float(value) > 0:
        raise ValueError(f"{name}={short_repr(value)} must be a number above 0")
    return value if isinstance(value, float | np.number) else to_float(value)


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number."""
    if not math.isfinite(to_float(value)):
        raise ValueError(f"{name}={short_repr(value)} must be a finite number")


def check_non_negative(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least 0."""
    if not 0 <= to_float(value) < math.inf:
        raise ValueError(f"{name}={short_repr(value)} must be a number of at least 0")


def check_bool(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={short_repr(value)} must be True or False")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={short_repr(value)} is unknown: choose one of {', '.join(map(repr, choices))}")


def check_folder(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is ``None`` or a path; the folder need not exist."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={short_repr(value)} must be None or the path of a folder")


def check_dict(name: str, value: Any) -> dict[Any, Any]:
    """Raise ValueError unless ``value`` is a dict or another mapping.

    :return: the dict
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={short_repr(value)} must be a dict")
    return value if isinstance(value, dict) else dict(value)


def check_kwargs(
    name: str, value: Any, function: Callable[..., Any], excluded: Collection[str] = (), extra: Collection[str] = ()
) -> None:
    """Raise ValueError unless ``value`` is a dict of keyword arguments that a function accepts.

    :param name: name of the argument
    :param value: the dict
    :param function: the function or class
    :param excluded: parameters of the function that must not be in the dict, because they are passed separately
    :param extra: further keys that may be in the dict
    """
    check_dict(name, value)
    parameters = signature(function).parameters
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known: list[str] = [*(parameter for parameter in parameters if parameter not in excluded), *extra]
    choice = f"choose from {', '.join(known)}" if known else "there are none to choose from"
    for key in value:
        if key not in known:
            raise ValueError(f"{name}={short_repr(value)} has the unknown name {key!r}: {choice}")


def check_subclass(name: str, value: Any, base: type) -> None:
    """Raise ValueError unless ``value`` is a subclass of ``base``."""
    if not isinstance(value, type) or not issubclass(value, base):
        raise ValueError(f"{name}={short_repr(value)} must be a subclass of {base.__module__}.{base.__name__}")


def check_subclass_or_function(name: str, value: Any, base: type) -> None:
    """Raise ValueError unless ``value`` is a subclass of ``base`` or a function."""
    if isinstance(value, type) or not callable(value):
        check_subclass(name, value, base)


def check_module_factory(name: str, factory: Any) -> None:
    """Raise ValueError unless ``factory`` makes modules.

    :param name: name of the argument
    :param factory: a subclass of ``nn.Module``, or a function without arguments that returns a module
    """
    if isinstance(factory, type):
        check_subclass(name, factory, nn.Module)
        return
    module: Any = None
    if callable(factory) and not isinstance(factory, nn.Module):
        try:
            with th.random.fork_rng(devices=[]):  # the check must not change the random state
                module = factory()
        except TypeError:  # it requires arguments
            module = None
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{name}={short_repr(factory)} must be a subclass of torch.nn.Module, "
            "or a function without arguments that makes one"
        )


def check_net_arch(value: Any) -> None:
    """Raise ValueError unless ``value`` is a list of hidden layer widths."""
    is_list = isinstance(value, list | tuple)
    if not is_list or any(isinstance(w, bool) or not isinstance(w, Integral) or not 1 <= int(w) < 2**63 for w in value):
        raise ValueError(
            f"net_arch={short_repr(value)} must be a list of whole numbers of at least 1, the widths of hidden layers"
        )


def as_numeric_array(name: str, value: Any) -> npt.NDArray[Any]:
    """Convert ``value`` to an array of real numbers or booleans.

    :raises ValueError: for strings, objects, complex numbers, masked values and lists of different lengths
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array of numbers, but cannot be converted to one: {error}") from error
    if np.ma.is_masked(value):
        raise ValueError(f"{name} has masked values, but must have none")
    if array.dtype.kind in "US":
        raise ValueError(f"{name} must be an array of numbers, but contains strings")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}, but must have a real dtype")
    return array
