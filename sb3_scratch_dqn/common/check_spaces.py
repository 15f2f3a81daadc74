"""Checks of environments, observation spaces, action spaces and observations.

Each function raises a :class:`ValueError` of one sentence, unless its docstring names another error.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces

from sb3_scratch_dqn.common.checks import as_numeric_array, short_repr

Space = spaces.Space[Any]


class HasSpaces(Protocol):
    """An environment or a replay buffer."""

    observation_space: Space
    action_space: Space


def check_environment(value: Any) -> None:
    """Raise ValueError unless ``value`` is an environment or the name of one."""
    if not isinstance(value, str) and not (hasattr(value, "reset") and hasattr(value, "step")):
        raise ValueError(f"env={short_repr(value)} must be an environment, or the name of one")


def check_action_space(action_space: Space) -> None:
    """Raise an error unless the actions are 0, 1, ..., n - 1.

    :raises AssertionError: for spaces other than ``Discrete``, as SB3's algorithms do
    :raises ValueError: for a ``Discrete`` space that does not start at 0
    """
    if not isinstance(action_space, spaces.Discrete):
        raise AssertionError(
            f"env has the action space {action_space}, but ScratchDQN needs a Discrete one: "
            "it learns one value for each of a finite number of actions"
        )
    if action_space.start != 0:
        raise ValueError(
            f"env has the action space {action_space}, but its actions must start at 0: "
            "wrap env so that it adds the start itself"
        )


def check_same_spaces(label: str, given: HasSpaces, observation_space: Space, action_space: Space) -> None:
    """Raise ValueError unless an environment or a replay buffer has the spaces of the model.

    :param label: name of the environment or the replay buffer in the message
    :param given: the environment or the replay buffer
    :param observation_space: observation space of the model
    :param action_space: action space of the model
    """
    for kind, space, expected in (
        ("observation", given.observation_space, observation_space),
        ("action", given.action_space, action_space),
    ):
        if space != expected:
            raise ValueError(f"{label} has the {kind} space {space}, but the model's is {expected}")


def check_observation(observation: Any, space: Space) -> None:
    """Raise ValueError unless ``observation`` has the structure and dtype kind of ``space``; SB3 checks the shape.

    :param observation: one observation or a batch of them: an array, or a dict of arrays
    :param space: the observation space
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(observation, Mapping) or observation.keys() != space.spaces.keys():
            given = list(observation) if isinstance(observation, Mapping) else f"a {type(observation).__name__}"
            raise ValueError(f"observation is {given}, but must be a dict with the keys {', '.join(space.spaces)}")
        for key, part in observation.items():
            _check_numeric(f"observation[{key!r}]", part)
    elif isinstance(observation, Mapping):
        raise ValueError(f"observation is a dict, but must be an array of {space}")
    else:
        _check_numeric("observation", observation)


def _check_numeric(name: str, value: Any) -> None:
    if not (isinstance(value, np.ndarray) and value.dtype.kind in "biuf"):
        as_numeric_array(name, value)
