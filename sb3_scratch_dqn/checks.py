"""Refusing what cannot work, before anything is trained or written.

Every error is a :class:`ValueError` of one sentence that names the argument, its value and what would be right.
"""

import io
import json
import math
import pathlib
import pickle
import zipfile
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import TrainFreq

from sb3_scratch_dqn.replay.stores import Space

Path = str | pathlib.Path | io.BufferedIOBase

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


def check_same_spaces(
    what: str,
    observation_space: Space,
    action_space: Space,
    model_observation_space: Space,
    model_action_space: Space,
) -> None:
    """Refuse an environment or a replay buffer that was made for other spaces than the model.

    :param what: what has the first two spaces
    """
    for kind, given, needed in (
        ("observation", observation_space, model_observation_space),
        ("action", action_space, model_action_space),
    ):
        if given != needed:
            raise ValueError(f"{what} has the {kind} space {given}, but the model's is {needed}")


def read_model_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a model file of SB3's format, and refuse a file that is none, or not a whole one.

    :param path: a path, with or without its ``.zip``, or an open file
    :return: the settings as JSON has them: nothing is unpickled
    :raises FileNotFoundError: if there is no such file
    """
    file = open_path(path, "r", suffix="zip")
    damaged = None
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            settings: dict[str, Any] = {} if damaged else json.loads(archive.read("data"))
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
        # A file that was cut may still be a zip file: it holds others, with an end of their own
        raise ValueError(f"path={path!r} is no model file, or was cut short: {error}") from error
    finally:
        _release(file, path)
    if damaged:
        raise ValueError(f"path={path!r} is a damaged model file: the checksum of {damaged!r} is wrong")
    return settings


def check_saved_by(algorithm: str, path: Path, settings: dict[str, Any], own_settings: Iterable[str]) -> None:
    """Refuse a model of another algorithm.

    :param algorithm: the algorithm that is to load it
    :param path: where the model is
    :param settings: as :func:`read_model_settings` read them there
    :param own_settings: what such a model knows of itself, and models of other algorithms do not
    """
    if not set(own_settings) <= set(settings):
        policy = settings.get("policy_class", {}).get("__module__")
        raise ValueError(
            f"path={path!r} must be a model saved by {algorithm}, but another algorithm saved it (its policy is from "
            f"{policy}); ScratchDQN.from_sb3() reads those of SB3's DQN"
        )


def subset_as_json(settings: dict[str, Any], names: Iterable[str]) -> str:
    """Some of what :func:`read_model_settings` read, for SB3's ``json_to_data``."""
    return json.dumps({name: settings[name] for name in names})


def read_replay_buffer(path: Path) -> ReplayBuffer:
    """Read a pickled replay buffer.

    :param path: a path, with or without its ``.pkl``, or an open file
    :raises FileNotFoundError: if there is no such file
    """
    file = open_path(path, "r", suffix="pkl")
    try:
        buffer = pickle.load(file)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"path={path!r} is no replay buffer file, or was cut short: {error}") from error
    finally:
        _release(file, path)
    if not isinstance(buffer, ReplayBuffer):
        raise ValueError(f"path={path!r} must hold a ReplayBuffer, but holds a {type(buffer).__name__}")
    return buffer


def _release(file: Any, path: Path) -> None:
    # A file that the caller opened stays open, and is read again
    if isinstance(path, str | pathlib.Path):
        file.close()
    else:
        file.seek(0)
