"""Files are written completely or not at all, and no temporary file is left behind."""

import errno
import fcntl
import importlib.util
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import pytest
from helpers import TimeoutEnv

from sb3_scratch_dqn import ScratchDQN, ScratchReplayBuffer
from sb3_scratch_dqn.bench.run import grid
from sb3_scratch_dqn.common import files
from sb3_scratch_dqn.replay.archive import write_replay_buffer

BUFFER = ScratchReplayBuffer(10, gym.spaces.Discrete(3), gym.spaces.Discrete(2))


@pytest.fixture(params=["a replay buffer", "a result", "a model"])
def save(request):
    """A function that writes a file of some hundred bytes, or of some thousand for a model, to a path."""
    if request.param == "a model":
        return ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"net_arch": [2]}).save
    if request.param == "a replay buffer":
        return lambda path: write_replay_buffer(BUFFER, path)
    return lambda path: grid.write_result({"curve": [0.5] * 100}, Path(path))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def raises_os_error(path, number):
    """Expect an OSError with this number that names ``path`` and no other file."""
    with pytest.raises(OSError, match=re.escape(f"[Errno {number}] {os.strerror(number)}: {str(path)!r}")) as error:
        yield
    assert type(error.value) is type(OSError(number, ""))
    assert error.value.filename == str(path)
    assert error.value.filename2 is None


def fail(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


# Temporary files of interrupted processes


@pytest.mark.parametrize("name", [".seed_0.json.0a1b2c3d.tmp", ".seed_0.json.x7_a8b9c"])
def test_temporary_files_of_interrupted_processes_are_removed(name, save, tmp_path):
    (tmp_path / name).write_bytes(b"half")
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


def test_temporary_files_of_results_of_an_earlier_version_are_removed(tmp_path):
    (tmp_path / "seed_0.tmp").write_bytes(b"half")
    grid.write_result({}, tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


def test_a_temporary_file_that_another_process_is_writing_is_not_removed(save, tmp_path):
    with open(tmp_path / ".seed_0.json.0a1b2c3d.tmp", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(tmp_path / "seed_0.json")
        assert names(tmp_path) == [".seed_0.json.0a1b2c3d.tmp", "seed_0.json"]
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


def test_files_with_other_names_are_not_removed(save, tmp_path):
    others = [".seed_1.json.0a1b2c3d.tmp", ".seed_0.json.tmp", ".seed_0.json.swp", "seed_0.json.0a1b2c3d.tmp"]
    others += [".seed_0xjson.0a1b2c3d.tmp", ".seed_0.json.0a1b2c3d.tmp.old"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".seed_0.json.0a1b2c3d.tmp").mkdir()
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == sorted([*others, ".seed_0.json.0a1b2c3d.tmp", "seed_0.json"])


WRITER = """
import os, sys, time
from pathlib import Path
from sb3_scratch_dqn.bench.run.grid import write_result

def wait(_):
    print("writing", flush=True)
    time.sleep(600)

os.fsync = wait
write_result({}, Path(sys.argv[1]))
"""


def test_a_temporary_file_is_removed_only_after_its_process_was_killed(tmp_path):
    path = tmp_path / "seed_0.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            grid.write_result({}, path)
            assert len(names(tmp_path)) == 2
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 2
    grid.write_result({}, path)
    assert names(tmp_path) == ["seed_0.json"]


def test_a_temporary_file_that_was_removed_before_it_was_locked_is_created_again(save, tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def remove_before_locking(file, operation):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_before_locking)
    save(tmp_path / "seed_0.json")
    assert len(removed) == 1
    assert names(tmp_path) == ["seed_0.json"]


def test_without_locks_files_are_written_and_no_temporary_file_is_removed(save, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOLCK))
    (tmp_path / ".seed_0.json.0a1b2c3d.tmp").write_bytes(b"")
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == [".seed_0.json.0a1b2c3d.tmp", "seed_0.json"]


def test_files_are_written_on_windows_which_has_no_fcntl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("files_on_windows", files.__file__)
    on_windows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(on_windows)
    move, moved = os.replace, []

    def replace(source, target):
        moved.append(file.closed)
        move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / ".file.0a1b2c3d.tmp").write_bytes(b"")
    with on_windows.atomic_write(tmp_path / "file") as file:
        file.write(b"all")
    assert moved == [True]
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"all"


# Symbolic links and devices


@pytest.mark.parametrize("target_exists", [True, False], ids=["to a file", "to nothing"])
def test_a_symbolic_link_is_kept_and_its_target_is_written(target_exists, save, tmp_path):
    target, link = tmp_path / "disk" / "target.json", tmp_path / "links" / "link.json"
    link.parent.mkdir()
    link.symlink_to("../links/next.json")
    (link.parent / "next.json").symlink_to("../disk/target.json")
    if target_exists:
        target.parent.mkdir()
        target.write_bytes(b"existing")
    save(link)
    assert os.readlink(link) == "../links/next.json"
    assert names(tmp_path / "links") == ["link.json", "next.json"]
    assert names(tmp_path / "disk") == ["target.json"]
    assert not target.is_symlink()
    assert target.stat().st_size > 100


def test_circular_links_are_refused(save, tmp_path):
    (tmp_path / "a.json").symlink_to("b.json")
    (tmp_path / "b.json").symlink_to("a.json")
    for path in (tmp_path / "a.json", tmp_path / "a.json" / "c.json"):
        with raises_os_error(path, errno.ELOOP):
            save(path)
    assert names(tmp_path) == ["a.json", "b.json"]
    assert os.readlink(tmp_path / "a.json") == "b.json"


def test_a_device_is_written_to_directly(save, tmp_path):
    (tmp_path / "nowhere.json").symlink_to("/dev/null")
    save(tmp_path / "nowhere.json")
    assert os.readlink(tmp_path / "nowhere.json") == "/dev/null"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# Permissions


@pytest.fixture
def umask():
    """Set the umask for a test."""
    original = os.umask(0o022)
    yield os.umask
    os.umask(original)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_permissions_of_the_umask(save, umask, tmp_path):
    for mask in (0o027, 0o002):
        umask(mask)
        save(tmp_path / f"{mask}.json")
        assert mode(tmp_path / f"{mask}.json") == 0o666 & ~mask


def test_the_umask_which_all_threads_share_is_not_changed(save, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", None)
    save(tmp_path / "seed_0.json")


@pytest.mark.parametrize("permissions", [0o600, 0o664, 0o444, 0o755])
def test_a_new_file_has_the_permissions_of_the_file_that_it_replaces(permissions, save, umask, tmp_path, monkeypatch):
    path = tmp_path / "seed_0.json"
    path.write_bytes(b"")
    path.chmod(permissions)
    meanwhile = []
    monkeypatch.setattr(os, "fsync", lambda handle: meanwhile.append(stat.S_IMODE(os.fstat(handle).st_mode)))
    save(path)
    assert mode(path) == permissions
    assert meanwhile[0] & 0o077 & ~permissions == 0  # the temporary file is not more accessible than the existing one


# The disk


def test_the_folder_is_synced_after_the_file(save, tmp_path, monkeypatch):
    path, synced = tmp_path / "seed_0.json", []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, path.exists())))
    save(path)
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_a_folder_that_cannot_be_synced_is_ignored(save, tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (fail(errno.EINVAL) if stat.S_ISDIR(os.fstat(handle).st_mode) else fsync)(handle)
    )
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


@contextmanager
def full_disk(monkeypatch):
    """Limit the size of files to 64 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def disk_that_is_full_on_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    yield errno.ENOSPC


@contextmanager
def read_only_folder(monkeypatch):
    open_ = os.open

    def open_to_read(path, flags, *more, **settings):
        return (fail(errno.EROFS) if flags & os.O_CREAT else open_)(path, flags, *more, **settings)

    monkeypatch.setattr(os, "open", open_to_read)
    yield errno.EROFS


@contextmanager
def folder_that_becomes_read_only(monkeypatch):
    monkeypatch.setattr(os, "replace", fail(errno.EROFS))
    yield errno.EROFS


@pytest.mark.parametrize(
    "failure", [full_disk, disk_that_is_full_on_fsync, read_only_folder, folder_that_becomes_read_only]
)
@pytest.mark.parametrize("existing", [True, False], ids=["over an existing file", "as a new file"])
def test_an_error_names_the_file_and_changes_nothing(failure, existing, save, tmp_path, monkeypatch):
    path = tmp_path / "seed_0.json"
    if existing:
        path.write_bytes(b"existing")
    with failure(monkeypatch) as number, raises_os_error(path, number):
        save(path)
    assert names(tmp_path) == ["seed_0.json"] * existing
    assert not existing or path.read_bytes() == b"existing"


def test_an_error_without_a_number_names_the_path(save, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("out of luck")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path / 'seed_0.json'}' could not be written: out of luck")):
        save(tmp_path / "seed_0.json")
    assert names(tmp_path) == []


def test_an_interrupt_removes_the_temporary_file(save, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "seed_0.json")
    assert names(tmp_path) == []


def test_a_path_of_a_folder_is_refused(save, tmp_path):
    (tmp_path / "seed_0.json").mkdir()
    with raises_os_error(tmp_path / "seed_0.json", errno.EISDIR):
        save(tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


def test_a_path_inside_a_file_is_refused(save, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "seed_0.json", tmp_path / "file" / "folder" / "seed_0.json"):
        with raises_os_error(path, errno.ENOTDIR):
            save(path)


def test_a_folder_that_was_removed_is_reported(save, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    with raises_os_error("seed_0.json", errno.ENOENT):
        save("seed_0.json")
