"""Read saved models and replay buffers, and write files atomically.

Reading raises a :class:`ValueError` of one sentence that names the path and what is wrong with the file, or
:class:`FileNotFoundError`. Writing raises an :class:`OSError` that names the path.
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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import IO, Any

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import json_to_data, open_path

from sb3_scratch_dqn.common.check_spaces import Space
from sb3_scratch_dqn.common.checks import short_repr

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

Path = str | pathlib.Path | io.BufferedIOBase

# Settings without which no model can be loaded
_REQUIRED_SETTINGS = ("policy_class", "observation_space", "action_space")


def read_model_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a model file of SB3's format, and verify the checksums of the whole file.

    :param path: a path, with or without ``.zip``, or an open file
    :return: the settings as JSON stores them: nothing is unpickled
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if the file is not a model file, is truncated or damaged
    """
    file = _open_model_file(path)
    damaged = None
    settings: Any = {}
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            if damaged is None:
                settings = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
        # A truncated file may still be a zip file: its members are zip files, each with an end record
        raise ValueError(f"path={path!r} is not a model file, or is truncated: {error}") from error
    finally:
        _close_or_rewind(file, path)
    if damaged is not None:
        raise ValueError(f"path={path!r} is a damaged model file: the checksum of {damaged!r} is wrong")
    if not isinstance(settings, dict):
        raise ValueError(f"path={path!r} is not a model file: its settings are a {type(settings).__name__}, not a dict")
    return settings


def policy_module(settings: dict[str, Any]) -> str | None:
    """Return the name of the module that defines the policy class of a saved model."""
    policy = settings.get("policy_class")
    module = policy.get("__module__") if isinstance(policy, dict) else None
    return module if isinstance(module, str) else None


def check_saved_by(algorithm: str, path: Path, settings: dict[str, Any], own_settings: Iterable[str]) -> None:
    """Raise ValueError unless an algorithm saved this model.

    :param algorithm: the algorithm that will load it
    :param path: path of the model file
    :param settings: settings from :func:`read_model_settings`
    :param own_settings: settings that only this algorithm saves
    """
    missing = [name for name in _REQUIRED_SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"path={path!r} is not a complete model file: its settings have no {missing[0]!r}")
    # One of them is enough: save(exclude=...) may have left others out
    if not any(name in settings for name in own_settings):
        raise ValueError(
            f"path={path!r} must be a model saved by {algorithm}, but another algorithm saved it (its policy is from "
            f"{policy_module(settings)}); ScratchDQN.from_sb3() reads those of SB3's DQN"
        )


def read_spaces(settings: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> tuple[Space, Space]:
    """Unpickle the observation space and the action space in the settings of a model file.

    :param settings: settings from :func:`read_model_settings`
    :param custom_objects: replacements for saved settings
    """
    names = ("observation_space", "action_space")
    spaces = json_to_data(json.dumps({name: settings[name] for name in names}), custom_objects)
    return spaces["observation_space"], spaces["action_space"]


def read_pickled_replay_buffer(file: Any, label: str) -> ReplayBuffer:
    """Read a pickled replay buffer. Unpickling can execute arbitrary code.

    :param file: an open file
    :param label: name of the file in messages
    :raises ValueError: if the file is not a pickle of a replay buffer
    """
    try:
        buffer = pickle.load(file)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{label} is not a replay buffer file, or is truncated: {error}") from error
    if not isinstance(buffer, ReplayBuffer):
        raise ValueError(f"{label} must hold a ReplayBuffer, but holds a {type(buffer).__name__}")
    return buffer


@contextmanager
def open_for_reading(path: Any, *suffixes: str) -> Iterator[Any]:
    """Open a binary file for reading, and close it afterwards; an open file stays open, and its position is restored.

    :param path: a path, or an open file
    :param suffixes: appended to a path that does not exist, in this order, until a file is found
    :raises FileNotFoundError: if there is no such file
    """
    if isinstance(path, str | pathlib.Path):
        candidates = [pathlib.Path(path), *(pathlib.Path(f"{path}{suffix}") for suffix in suffixes)]
        existing = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
        with open(existing, "rb") as file:
            yield file
        return
    if not isinstance(path, io.BufferedIOBase):
        raise ValueError(f"path={path!r} must be a path or an open binary file")
    position = path.tell()
    try:
        yield path
    finally:
        path.seek(position)


@contextmanager
def atomic_write(path: str | pathlib.Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing, and rename it to ``path`` when it is complete.

    The temporary file is in the same folder, so that a crash leaves an existing file intact. Temporary files of
    interrupted processes are removed first. A symbolic link is kept, and its target is replaced. The new file gets the
    permissions of an existing one. A device or a pipe cannot be replaced, and is written to directly.

    :param path: path of the file; its folder is created if necessary
    :raises OSError: if the file cannot be written; the error names ``path``, and the temporary file is removed
    """
    try:
        existing = _stat(path)
        if existing is not None and stat.S_ISDIR(existing.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if existing is not None and not stat.S_ISREG(existing.st_mode):
            with open(path, "wb") as device:
                yield device
            return
        target = pathlib.Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_temporaries(target)
        mode = None if existing is None else stat.S_IMODE(existing.st_mode)
        # A user who may not read the existing file must not be able to read the new one while it is written
        file, temporary = _create_temporary(target, 0o666 if mode is None else mode | stat.S_IRUSR | stat.S_IWUSR)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if mode is not None and stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                    os.chmod(temporary, mode)
                if fcntl is None:  # Windows cannot rename an open file
                    file.close()
                os.replace(temporary, target)  # before the file is closed, because closing releases the lock
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    except OSError as error:
        raise _name_path(path, error) from error


def open_for_writing(path: Path, suffix: str) -> AbstractContextManager[IO[bytes]]:
    """Open a file for writing, by :func:`atomic_write` if it is given by its path.

    :param path: path of the file, or a binary file that is open for writing
    :param suffix: added to a path without a suffix
    :raises ValueError: for anything else
    """
    if isinstance(path, str | pathlib.Path):
        file_path = pathlib.Path(path)
        if not file_path.name:
            raise ValueError(f"path={str(path)!r} must name a file")
        return atomic_write(file_path if file_path.suffix else file_path.with_suffix(suffix))
    if not hasattr(path, "write") or isinstance(path, io.TextIOBase):
        raise ValueError(f"path={short_repr(path)} must be a path or an open binary file")
    return nullcontext(path)  # type: ignore[arg-type]  # an object with write() suffices


def remove_stale_temporary(path: pathlib.Path) -> None:
    """Remove a temporary file if it exists, unless :func:`atomic_write` is still writing it.

    :param path: the temporary file
    """
    # A stale file that cannot be removed must not prevent writing
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


def _stat(path: str | pathlib.Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _remove_stale_temporaries(target: pathlib.Path) -> None:
    # Names without .tmp are from an earlier version, which used tempfile.mkstemp()
    pattern = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}(\.tmp)?")
    with suppress(OSError):  # a process may be able to write to a folder that it cannot list
        for path in target.parent.iterdir():
            if pattern.fullmatch(path.name):
                remove_stale_temporary(path)


def _create_temporary(target: pathlib.Path, mode: int) -> tuple[IO[bytes], pathlib.Path]:
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        # tempfile.mkstemp() ignores the umask, which a process cannot read without changing it for all threads
        # The caller closes it
        file = open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks, where no process removes temporary files
                fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file, path
        file.close()  # another process removed the file as stale before it was locked


def _sync_folder(folder: pathlib.Path) -> None:
    with suppress(OSError):  # Windows cannot open folders, and some file systems cannot sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _name_path(path: str | pathlib.Path, error: OSError) -> OSError:
    """Return an error that names ``path`` instead of the temporary file or nothing."""
    if error.errno is None:
        return OSError(f"{str(path)!r} could not be written: {error}")
    return OSError(error.errno, error.strerror, str(path))  # Python chooses the subclass by the number


def _open_model_file(path: Any) -> Any:
    if not isinstance(path, str | pathlib.Path | io.BufferedIOBase):
        raise ValueError(f"path={path!r} must be a path or an open binary file")
    return open_path(path, "r", suffix="zip")


def _close_or_rewind(file: Any, path: Path) -> None:
    # The caller reads an open file again
    if isinstance(path, str | pathlib.Path):
        file.close()
    else:
        file.seek(0)
