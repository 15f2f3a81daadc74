"""Reading what was saved, and refusing what is no such file.

Every error but a missing file is a :class:`ValueError` of one sentence that names the path and what is wrong with it.
"""

import io
import json
import pathlib
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import json_to_data, open_path

from sb3_scratch_dqn.checks import Space

Path = str | pathlib.Path | io.BufferedIOBase

# Settings without which no model can be loaded
_EVERY_MODEL = ("policy_class", "observation_space", "action_space")


def read_model_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a model file of SB3's format, and refuse a file that is none, or not a whole one.

    :param path: a path, with or without its ``.zip``, or an open file
    :return: the settings as JSON has them: nothing is unpickled
    :raises FileNotFoundError: if there is no such file
    """
    file = _open(path, "zip")
    damaged = None
    settings: Any = {}
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            if damaged is None:
                settings = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
        # A file that was cut may still be a zip file: it holds others, with an end of their own
        raise ValueError(f"path={path!r} is no model file, or was cut short: {error}") from error
    finally:
        _release(file, path)
    if damaged is not None:
        raise ValueError(f"path={path!r} is a damaged model file: the checksum of {damaged!r} is wrong")
    if not isinstance(settings, dict):
        raise ValueError(f"path={path!r} is no model file: its settings are a {type(settings).__name__}, not a dict")
    return settings


def policy_module(settings: dict[str, Any]) -> str | None:
    """The module that a saved model's policy class is from."""
    policy = settings.get("policy_class")
    module = policy.get("__module__") if isinstance(policy, dict) else None
    return module if isinstance(module, str) else None


def check_saved_by(algorithm: str, path: Path, settings: dict[str, Any], own_settings: Iterable[str]) -> None:
    """Refuse a model of another algorithm.

    :param algorithm: the algorithm that is to load it
    :param path: where the model is
    :param settings: as :func:`read_model_settings` read them there
    :param own_settings: what such a model knows of itself, and models of other algorithms do not
    """
    missing = [name for name in _EVERY_MODEL if name not in settings]
    if missing:
        raise ValueError(f"path={path!r} is no whole model file: its settings have no {missing[0]!r}")
    # One of them is enough: save(exclude=...) may have left others out
    if not any(name in settings for name in own_settings):
        raise ValueError(
            f"path={path!r} must be a model saved by {algorithm}, but another algorithm saved it (its policy is from "
            f"{policy_module(settings)}); ScratchDQN.from_sb3() reads those of SB3's DQN"
        )


def read_spaces(settings: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> tuple[Space, Space]:
    """Unpickle the observation space and the action space among the settings of a model file.

    :param settings: as :func:`read_model_settings` read them
    :param custom_objects: replacements for saved settings
    """
    names = ("observation_space", "action_space")
    spaces = json_to_data(json.dumps({name: settings[name] for name in names}), custom_objects)
    return spaces["observation_space"], spaces["action_space"]


def read_pickled_replay_buffer(file: Any, what: str) -> ReplayBuffer:
    """Read a pickled replay buffer, which runs whatever the pickle says.

    :param file: an open file
    :param what: what it is called in messages
    """
    try:
        buffer = pickle.load(file)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{what} is no replay buffer file, or was cut short: {error}") from error
    if not isinstance(buffer, ReplayBuffer):
        raise ValueError(f"{what} must hold a ReplayBuffer, but holds a {type(buffer).__name__}")
    return buffer


@contextmanager
def opened(path: Any, *suffixes: str) -> Iterator[Any]:
    """A file that is open for reading, and closed afterwards if it was not open before.

    :param path: a path, or an open file, which is left where it was
    :param suffixes: to try, in this order, if there is no such file and the path has none
    :raises FileNotFoundError: if there is no such file
    """
    if isinstance(path, str | pathlib.Path):
        places = [pathlib.Path(path), *(pathlib.Path(f"{path}{suffix}") for suffix in suffixes)]
        place = next((place for place in places if place.is_file()), places[0])
        with open(place, "rb") as file:
            yield file
        return
    if not isinstance(path, io.BufferedIOBase):
        raise ValueError(f"path={path!r} must be a path or an open binary file")
    begin = path.tell()
    try:
        yield path
    finally:
        path.seek(begin)


def _open(path: Any, suffix: str) -> Any:
    if not isinstance(path, str | pathlib.Path | io.BufferedIOBase):
        raise ValueError(f"path={path!r} must be a path or an open binary file")
    return open_path(path, "r", suffix=suffix)


def _release(file: Any, path: Path) -> None:
    # A file that the caller opened stays open, and is read again
    if isinstance(path, str | pathlib.Path):
        file.close()
    else:
        file.seek(0)
