"""Refusing what cannot work, before anything is trained or written.

Every error is a :class:`ValueError` of one sentence that names the argument, its value and what would be right.
"""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, Protocol

from gymnasium import spaces
from stable_baselines3.common.type_aliases import TrainFreq

from sb3_scratch_dqn.replay.stores import Space

FREQUENCY_UNITS = ("step", "episode")


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Refuse what is not a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}")


def check_fraction(name: str, value: Any) -> None:
    """Refuse what is not a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name}={value!r} must be a number between 0 and 1")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a number above 0; infinity is one."""
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(f"{name}={value!r} must be a number above 0")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse what is not among ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def check_learning_rate(value: Any) -> None:
    """Refuse what is neither a function nor a number of at least 0."""
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(
            f"learning_rate={value!r} must be a number of at least 0, or a function of the remaining progress (1 to 0)"
        )


def parse_frequency(name: str, value: Any) -> tuple[int, str]:
    """Read ``4``, ``(4, "step")`` or ``(1, "episode")``; a list is as good as a tuple.

    :return: the number and the unit
    """
    if isinstance(value, TrainFreq):
        return value.frequency, value.unit.value
    frequency: Any
    unit: Any
    frequency, unit = value if isinstance(value, list | tuple) and len(value) == 2 else (value, "step")
    try:
        check_count(name, frequency)
        check_choice(name, unit, FREQUENCY_UNITS)
    except ValueError:
        raise ValueError(
            f"{name}={value!r} must be a whole number of at least 1 (steps), "
            'or such a number and its unit, as in (4, "step") or (1, "episode")'
        ) from None
    return int(frequency), unit


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
