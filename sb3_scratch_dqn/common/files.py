"""Reading what was saved, refusing what is no such file, and writing files whole or not at all.

Every error of reading but a missing file is a :class:`ValueError` of one sentence that names the path and what is wrong
with it. Every error of writing is an :class:`OSError` that names the path.
"""

import errno
import io
import json
import os
import pathlib
import pickle
import re
import secrets
import stat
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import json_to_data, open_path

from sb3_scratch_dqn.common.checks import Space

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

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


@contextmanager
def atomic_write(path: str | pathlib.Path) -> Iterator[IO[bytes]]:
    """A new file, open for writing, that takes the place of another one when all of it is written.

    It lies beside its place until then, so that a crash leaves the earlier file whole. Files that interrupted processes
    left there are removed first. A symbolic link stays, and its target is replaced. An earlier file hands its
    permissions on. A device or a pipe cannot be replaced, and is written to.

    :param path: where the file is to be; its folder is made if there is none
    :raises OSError: if it cannot be written; the error names the path, and no temporary file stays behind
    """
    try:
        earlier = _status(path)
        if earlier is not None and stat.S_ISDIR(earlier.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if earlier is not None and not stat.S_ISREG(earlier.st_mode):
            with open(path, "wb") as device:
                yield device
            return
        place = pathlib.Path(os.path.realpath(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        mode = None if earlier is None else stat.S_IMODE(earlier.st_mode)
        # A user who may not read the earlier file must not be able to read the new one while it is written
        file, beside = _create_beside(place, 0o666 if mode is None else mode | stat.S_IRUSR | stat.S_IWUSR)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if mode is not None and stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                    os.chmod(beside, mode)
                if fcntl is None:  # Windows cannot move an open file
                    file.close()
                os.replace(beside, place)  # closing the file would unlock it, so it is still open
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        _sync_folder(place.parent)
    except OSError as error:
        raise _about(path, error) from error


def remove_leftover(path: pathlib.Path) -> None:
    """Remove a temporary file, if there is one, unless :func:`atomic_write` is still writing it.

    :param path: the temporary file
    """
    # What cannot be removed must not keep anything from being written
    with suppress(OSError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return
        if fcntl is None:  # Windows cannot remove a file that is in use
            path.unlink()
            return
        handle = os.open(path, os.O_RDWR)  # NFS cannot lock a file that is open for reading only
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(handle)


def _status(path: str | pathlib.Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _remove_leftovers(place: pathlib.Path) -> None:
    # An earlier version made these files with tempfile.mkstemp(), without .tmp
    name = re.compile(re.escape(f".{place.name}.") + r"[a-z0-9_]{8}(\.tmp)?")
    with suppress(OSError):  # a process may be able to write to a folder that it cannot list
        for one in place.parent.iterdir():
            if name.fullmatch(one.name):
                remove_leftover(one)


def _create_beside(place: pathlib.Path, mode: int) -> tuple[IO[bytes], pathlib.Path]:
    while True:
        beside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
        # tempfile.mkstemp() ignores the umask, which a process cannot read without changing it for all threads
        # The caller closes it
        file = open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks; no process removes a file there
                fcntl.flock(file, fcntl.LOCK_EX)
        if beside.exists():
            return file, beside
        file.close()  # another process removed it as left behind before it was locked


def _sync_folder(folder: pathlib.Path) -> None:
    with suppress(OSError):  # Windows cannot open folders, and some file systems cannot sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _about(path: str | pathlib.Path, error: OSError) -> OSError:
    """An error that names a path, and not a temporary file or nothing at all."""
    if error.errno is None:
        return OSError(f"{str(path)!r} could not be written: {error}")
    return OSError(error.errno, error.strerror, str(path))  # of the subclass that goes with the number


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
