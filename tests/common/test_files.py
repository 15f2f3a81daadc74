"""Files are written whole or not at all, whatever lies at their place, and nothing stays beside them."""

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

from sb3_scratch_dqn import ScratchReplayBuffer
from sb3_scratch_dqn.bench.run import grid
from sb3_scratch_dqn.common import files
from sb3_scratch_dqn.replay.archive import write_replay_buffer

BUFFER = ScratchReplayBuffer(10, gym.spaces.Discrete(3), gym.spaces.Discrete(2))


@pytest.fixture(params=["a replay buffer", "a result"])
def save(request):
    """Writes a file of some hundred bytes."""
    if request.param == "a replay buffer":
        return lambda path: write_replay_buffer(BUFFER, path)
    return lambda path: grid.write({"curve": [0.5] * 100}, Path(path))


def names(folder):
    return sorted(one.name for one in folder.iterdir())


@contextmanager
def refused(path, number):
    """Expects an error of the operating system that names a path, and nothing else."""
    with pytest.raises(OSError, match=re.escape(f"[Errno {number}] {os.strerror(number)}: {str(path)!r}")) as told:
        yield
    assert type(told.value) is type(OSError(number, ""))
    assert told.value.filename == str(path)
    assert told.value.filename2 is None


def fail(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


# What interrupted processes left behind


@pytest.mark.parametrize("name", [".seed_0.json.0a1b2c3d.tmp", ".seed_0.json.x7_a8b9c"])
def test_what_an_interrupted_process_left_behind_is_removed(name, save, tmp_path):
    (tmp_path / name).write_bytes(b"half")
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


def test_what_an_earlier_version_left_of_a_result_is_removed(tmp_path):
    (tmp_path / "seed_0.tmp").write_bytes(b"half")
    grid.write({}, tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


def test_what_another_process_is_writing_is_not_removed(save, tmp_path):
    with open(tmp_path / ".seed_0.json.0a1b2c3d.tmp", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(tmp_path / "seed_0.json")
        assert names(tmp_path) == [".seed_0.json.0a1b2c3d.tmp", "seed_0.json"]
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


def test_files_of_other_names_are_not_removed(save, tmp_path):
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
from sb3_scratch_dqn.bench.run.grid import write

def wait(_):
    print("writing", flush=True)
    time.sleep(600)

os.fsync = wait
write({}, Path(sys.argv[1]))
"""


def test_a_process_keeps_the_file_that_it_is_writing_until_it_is_killed(tmp_path):
    place = tmp_path / "seed_0.json"
    command = [sys.executable, "-c", WRITER, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            grid.write({}, place)
            assert len(names(tmp_path)) == 2
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 2
    grid.write({}, place)
    assert names(tmp_path) == ["seed_0.json"]


def test_a_file_that_was_removed_before_it_was_locked_is_made_again(save, tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def too_late(file, operation):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    save(tmp_path / "seed_0.json")
    assert len(removed) == 1
    assert names(tmp_path) == ["seed_0.json"]


def test_where_there_are_no_locks_files_are_written_and_none_is_removed(save, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOLCK))
    (tmp_path / ".seed_0.json.0a1b2c3d.tmp").write_bytes(b"")
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == [".seed_0.json.0a1b2c3d.tmp", "seed_0.json"]


def test_windows_which_has_no_fcntl_can_do_it_too(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_stays_and_its_target_is_written(there, save, tmp_path):
    target, link = tmp_path / "disk" / "target.json", tmp_path / "links" / "link.json"
    link.parent.mkdir()
    link.symlink_to("../links/next.json")
    (link.parent / "next.json").symlink_to("../disk/target.json")
    if there:
        target.parent.mkdir()
        target.write_bytes(b"earlier")
    save(link)
    assert os.readlink(link) == "../links/next.json"
    assert names(tmp_path / "links") == ["link.json", "next.json"]
    assert names(tmp_path / "disk") == ["target.json"]
    assert not target.is_symlink()
    assert target.stat().st_size > 100


def test_links_in_a_circle_are_told(save, tmp_path):
    (tmp_path / "a.json").symlink_to("b.json")
    (tmp_path / "b.json").symlink_to("a.json")
    for path in (tmp_path / "a.json", tmp_path / "a.json" / "c.json"):
        with refused(path, errno.ELOOP):
            save(path)
    assert names(tmp_path) == ["a.json", "b.json"]
    assert os.readlink(tmp_path / "a.json") == "b.json"


def test_a_device_is_written_to_and_stays(save, tmp_path):
    (tmp_path / "nowhere.json").symlink_to("/dev/null")
    save(tmp_path / "nowhere.json")
    assert os.readlink(tmp_path / "nowhere.json") == "/dev/null"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# Permissions


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_permissions_that_the_umask_leaves(save, umask, tmp_path):
    for mask in (0o027, 0o002):
        umask(mask)
        save(tmp_path / f"{mask}.json")
        assert mode(tmp_path / f"{mask}.json") == 0o666 & ~mask


def test_the_umask_which_all_threads_share_is_left_alone(save, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", None)
    save(tmp_path / "seed_0.json")


@pytest.mark.parametrize("permissions", [0o600, 0o664, 0o444, 0o755])
def test_an_earlier_file_hands_its_permissions_on(permissions, save, umask, tmp_path, monkeypatch):
    place = tmp_path / "seed_0.json"
    place.write_bytes(b"")
    place.chmod(permissions)
    meanwhile = []
    monkeypatch.setattr(os, "fsync", lambda handle: meanwhile.append(stat.S_IMODE(os.fstat(handle).st_mode)))
    save(place)
    assert mode(place) == permissions
    assert meanwhile[0] & 0o077 & ~permissions == 0  # no one else reads or writes what is being written


# The disk


def test_the_folder_is_written_to_the_disk_after_the_file(save, tmp_path, monkeypatch):
    place, synced = tmp_path / "seed_0.json", []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, place.exists())))
    save(place)
    assert synced == [(place.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_a_folder_that_cannot_be_written_to_the_disk_makes_no_difference(save, tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (fail(errno.EINVAL) if stat.S_ISDIR(os.fstat(handle).st_mode) else fsync)(handle)
    )
    save(tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


@contextmanager
def full_disk(monkeypatch):
    """Lets no file grow beyond 64 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def disk_that_is_full_in_the_end(monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    yield errno.ENOSPC


@contextmanager
def folder_that_is_read_only(monkeypatch):
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
    "trouble", [full_disk, disk_that_is_full_in_the_end, folder_that_is_read_only, folder_that_becomes_read_only]
)
@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier file", "as a new file"])
def test_a_file_that_cannot_be_written_is_named_and_changes_nothing(trouble, earlier, save, tmp_path, monkeypatch):
    place = tmp_path / "seed_0.json"
    if earlier:
        place.write_bytes(b"earlier")
    with trouble(monkeypatch) as number, refused(place, number):
        save(place)
    assert names(tmp_path) == ["seed_0.json"] * earlier
    assert not earlier or place.read_bytes() == b"earlier"


def test_an_error_without_a_number_is_told_with_the_path(save, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("out of luck")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path / 'seed_0.json'}' could not be written: out of luck")):
        save(tmp_path / "seed_0.json")
    assert names(tmp_path) == []


def test_an_interruption_leaves_nothing(save, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "seed_0.json")
    assert names(tmp_path) == []


def test_a_folder_in_its_place_is_refused(save, tmp_path):
    (tmp_path / "seed_0.json").mkdir()
    with refused(tmp_path / "seed_0.json", errno.EISDIR):
        save(tmp_path / "seed_0.json")
    assert names(tmp_path) == ["seed_0.json"]


def test_a_file_as_its_folder_is_refused(save, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "seed_0.json", tmp_path / "file" / "folder" / "seed_0.json"):
        with refused(path, errno.ENOTDIR):
            save(path)


def test_a_folder_that_was_removed_is_told(save, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    with refused("seed_0.json", errno.ENOENT):
        save("seed_0.json")
