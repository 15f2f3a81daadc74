"""Execution of runs: the content of their files, interruption and resumption, failures."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from bench_commands import GRID, SMALL, refusal
from joblib import parallel

from sb3_scratch_dqn.bench import machine
from sb3_scratch_dqn.bench.__main__ import main
from sb3_scratch_dqn.bench.results import read_result
from sb3_scratch_dqn.bench.run import grid
from sb3_scratch_dqn.bench.run.grid import Progress
from sb3_scratch_dqn.bench.run.plan import Run

# Entries that depend on time or machine
TIMES = ("started", "commit", "hardware", "training_seconds", "steps_per_second", "peak_memory_bytes", "wall_seconds")


def files(folder):
    """Return the content of the files of runs, without the entries that depend on time or machine."""
    contents = {}
    for path in sorted(folder.glob("*/*/*.json")):
        content = {name: value for name, value in json.loads(path.read_text()).items() if name not in TIMES}
        for name in ("seconds", "cpu_seconds"):
            del content["curve"][name]
        contents[path.relative_to(folder)] = content
    return contents


def exit_code(*arguments):
    """Return the exit code of ``bench run``."""
    with pytest.raises(SystemExit) as exit_info:
        main(["run", *arguments])
    return exit_info.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of four runs that were not interrupted."""
    out = tmp_path_factory.mktemp("finished")
    main(["run", *GRID, "--out", str(out)])
    return out


def test_each_run_writes_a_file_that_describes_it(finished):
    assert len(files(finished)) == 4
    result = read_result(finished / "CartPole-v1" / "scratch_dqn-rainbow" / "seed_1.json")
    content = result.content
    assert (result.algo, result.env, result.seed, result.done) == ("scratch_dqn:rainbow", "CartPole-v1", 1, True)
    assert content["curve"]["steps"] == [0, 200, 400]
    assert [len(returns) for returns in content["curve"]["returns"]] == [2, 2, 2]
    assert content["curve"]["returns"] == content["curve"]["lengths"]  # CartPole gives a reward of 1 a step
    assert content["settings"]["hyperparameters"]["double_q"] is True
    assert content["settings"]["n_timesteps"] == 400
    assert content["engine"] == "the fused engine"
    assert content["versions"]["stable-baselines3"].startswith("2.")
    assert content["hardware"]["cores"] >= 1
    assert content["reward_threshold"] == 475.0
    assert 50 * 2**20 < content["peak_memory_bytes"] < 2**32
    assert content["steps_per_second"] == pytest.approx(512 / content["training_seconds"], rel=0.01)
    assert content["steps_taken"] == 512  # the first multiple of train_freq
    assert result.seconds[0] < 0.5
    assert (result.seconds[1:] > result.seconds[:-1]).all()


def test_killed_and_started_again_the_command_gives_the_same_files(finished, tmp_path, capsys):
    command = [sys.executable, "-m", "sb3_scratch_dqn.bench", "run", *GRID, "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not files(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=20)[1] == []  # no process survives its parent
    before = files(tmp_path)
    assert len(before) < 4
    mtimes = {path: (tmp_path / path).stat().st_mtime_ns for path in before}
    main(["run", *GRID, "--out", str(tmp_path)])
    log = capsys.readouterr().err
    assert f"{len(before)} of 4 runs exist already\n{4 - len(before)} runs to execute, " in log
    assert files(tmp_path) == files(finished)
    assert all((tmp_path / path).stat().st_mtime_ns == mtime for path, mtime in mtimes.items())


KILLED_PARENT = """
import os, signal, subprocess, sys

with open(sys.argv[2], "w") as output:
    process = subprocess.Popen(
        [sys.executable, "-m", "sb3_scratch_dqn.bench.run.experiment", str(os.getpid()), "1"],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
process.stdin.write(sys.argv[1].encode())
process.stdin.close()
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_exits_when_its_parent_was_killed_during_its_imports(tmp_path):
    run = json.dumps(asdict(Run("dqn", "CartPole-v1", 0, 10**8, 1, 1)))
    command = [sys.executable, "-c", KILLED_PARENT, run, str(tmp_path / "output.txt")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    process = psutil.Process(int(killed.stdout))
    assert process.is_running()
    alive = psutil.wait_procs([process], timeout=30)[1]
    for survivor in alive:
        survivor.kill()
    assert alive == []
    assert (tmp_path / "output.txt").read_text() == ""  # it exited without an error


def test_a_process_whose_parent_has_exited_exits_immediately(monkeypatch):
    class ExitedError(Exception):
        pass

    def exit_(code):
        raise ExitedError(code)

    monkeypatch.setattr(os, "_exit", exit_)
    machine.exit_with_parent.cache_clear()
    with pytest.raises(ExitedError, match="1"):
        machine.exit_with_parent(os.getpid())  # a process is not its own parent


def test_workers_of_loky_exit_with_this_process_from_their_start(monkeypatch):
    class Loky:
        def configure(self, n_jobs, **settings):
            return settings

    monkeypatch.setitem(parallel.BACKENDS, "loky", Loky)
    with grid._loky(None, 2) as n_jobs:
        settings = parallel.BACKENDS["loky"]().configure(n_jobs=n_jobs)
    assert settings == {"initializer": machine.exit_with_parent, "initargs": (os.getpid(),)}
    assert parallel.BACKENDS["loky"] is Loky


def test_existing_runs_are_not_executed_again(finished, capsys, monkeypatch):
    monkeypatch.setattr(grid, "execute", None)
    main(["run", *GRID, "--out", str(finished)])
    assert "4 of 4 runs are done" in capsys.readouterr().out


def test_a_failed_run_is_recorded_and_reported(bad_environments, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results"
    arguments = ["--algos", "scratch_dqn", "--envs", "Raises-v0", "ExitsProcess-v0", "--seeds", "1", *SMALL]
    arguments += ["--gym-packages", bad_environments, "--out", str(out)]
    assert exit_code(*arguments) == 1
    printed = capsys.readouterr()
    assert "0 of 2 runs are done" in printed.out
    assert "[2/2]" in printed.err
    failed = json.loads((out / "Raises-v0" / "scratch_dqn" / "seed_0.json").read_text())
    assert failed["status"] == "failed"
    assert (failed["error"]["type"], failed["error"]["message"]) == ("RuntimeError", "out of luck")
    assert "bad_environments.py" in failed["error"]["traceback"]
    crashed = json.loads((out / "ExitsProcess-v0" / "scratch_dqn" / "seed_0.json").read_text())
    assert "its process ended with code 7; it printed: the last words" in crashed["error"]["message"]

    executed = []
    monkeypatch.setattr(grid, "execute", lambda run: executed.append(run) or {**failed, "env": run.env})
    assert exit_code(*arguments) == 1
    assert not executed
    assert exit_code(*arguments, "--jobs", "1", "--retry-failed") == 1
    assert len(executed) == 2


@pytest.fixture
def copied_runs(finished, monkeypatch):
    """Make execution return the content of finished runs; the list of paths of the executed runs."""
    executed = []

    def execute(run):
        executed.append(str(run.path))
        return json.loads((finished / run.path).read_text())

    monkeypatch.setattr(grid, "execute", execute)
    return executed


def test_a_run_that_cannot_be_written_is_reported_and_repeated(finished, copied_runs, tmp_path, capsys, monkeypatch):
    arguments = [*GRID, "--jobs", "1", "--out", str(tmp_path)]
    path = tmp_path / "CartPole-v1" / "dqn" / "seed_0.json"
    original = os.replace

    def replace(source, target):
        if target == path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "replace", replace)
        assert exit_code(*arguments) == 1
    printed = capsys.readouterr()
    assert f"\n{path} could not be written: No space left on device\n" in printed.err
    assert "\n1 of 4 runs could not be written; the same command repeats them\n" in printed.err
    assert "3 of 4 runs are done" in printed.out
    assert "Traceback" not in printed.err
    assert len(copied_runs) == 4
    assert len(list(tmp_path.rglob("seed_*"))) == len(files(tmp_path)) == 3
    assert list(path.parent.iterdir()) == [path.with_name("seed_1.json")]
    copied_runs.clear()
    main(["run", *arguments])
    assert copied_runs == [str(path.relative_to(tmp_path))]
    assert files(tmp_path) == files(finished)


def test_a_working_folder_that_is_removed_meanwhile_stops_no_other_run(copied_runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    execute = grid.execute

    def remove_and_execute(run):
        with suppress(FileNotFoundError):
            (tmp_path / "here").rmdir()
        return execute(run)

    monkeypatch.setattr(grid, "execute", remove_and_execute)
    assert exit_code(*GRID, "--jobs", "1", "--out", "results") == 1
    log = capsys.readouterr().err
    for path in copied_runs:
        assert f"\n{Path('results', path)} could not be written: No such file or directory\n" in log
    assert "\n4 of 4 runs could not be written" in log


def test_a_full_disk_under_stderr_stops_no_run(finished, copied_runs, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    main(["run", *GRID, "--jobs", "1", "--out", str(tmp_path)])
    assert files(tmp_path) == files(finished)


PROCESS = """#!{python} -S
import json, os, subprocess, sys, time

run, (parent, answer) = json.loads(sys.stdin.read()), map(int, sys.argv[3:])
assert parent == os.getppid()
os.set_inheritable(answer, True)
"""


@pytest.fixture
def replace_process(tmp_path, monkeypatch):
    """A function that replaces the process of a run by a script."""

    def replace(script):
        path = tmp_path / "process"
        path.write_text(PROCESS.format(python=sys.executable) + script)
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace


A_RUN = Run("dqn", "CartPole-v1", 3, 400, 2, 2)


def test_a_run_needs_no_temporary_files(replace_process, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("mkdtemp", "mkstemp", "gettempdir", "_get_default_tempdir"):
        monkeypatch.setattr(tempfile, name, full)
    replace_process("print('x' * 10**6); os.write(answer, json.dumps({**run, 'long': 'y' * 10**6}).encode())")
    content = grid.execute(A_RUN)
    assert content.pop("long") == "y" * 10**6
    assert content == {**asdict(A_RUN), "gym_packages": []}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('a' + 'b' * 3000 + 'c' * 3999); sys.exit(3)", f"code 3; it printed: {'c' * 3999}\n"),
        ("os.write(answer, b'{\"half\": '); os.kill(os.getpid(), 9)", "code -9; it printed: "),
        ("os.write(1, b'\\xff'); sys.exit(1)", "code 1; it printed: \ufffd"),
        ("subprocess.Popen(['sleep', '20'], close_fds=False); print('end')", "code 0; it printed: end\n"),
        ("subprocess.Popen(['yes']); sys.exit(2)", "code 2; it printed: "),
    ],
    ids=["exit status", "half an answer", "invalid UTF-8", "a child stays alive", "a child keeps printing"],
)
def test_a_process_that_gives_no_answer_has_failed(script, message, replace_process):
    replace_process(script)
    start = time.perf_counter()
    content = grid.execute(A_RUN)
    assert time.perf_counter() - start < 10
    assert (content["status"], content["seed"], content["error"]["type"]) == ("failed", 3, "ProcessEnded")
    assert f"its process ended with {message}" in content["error"]["message"]


def test_a_process_that_cannot_be_started_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    content = grid.execute(A_RUN)
    assert content["status"] == "failed"
    assert content["error"]["type"] == "FileNotFoundError"
    assert content["error"]["message"].startswith("its process could not be run: [Errno 2] No such file")


def test_runs_with_infinite_returns_or_an_early_end_have_failed(bad_environments, bad_settings, tmp_path, capsys):
    out = tmp_path / "results"
    arguments = ["--algos", f"dqn:{bad_settings}", "--envs", "Infinite-v0", "CartPole-v1", "--seeds", "1", *SMALL]
    assert exit_code(*arguments, "--gym-packages", bad_environments, "--jobs", "1", "--out", str(out)) == 1
    log = capsys.readouterr().err
    assert "ValueError: returns must be finite, but an evaluation after 0 steps gave [-inf, -inf]" in log
    assert re.search(r"RuntimeError: training ended after \d\d of 400 steps", log)
    assert "[2/2]" in log
    contents = [json.loads(path.read_text()) for path in out.rglob("*.json")]
    assert [content["status"] for content in contents] == ["failed", "failed"]


def test_a_copy_of_a_file_is_not_another_run(finished, tmp_path, capsys):
    folder = tmp_path / "CartPole-v1" / "dqn"
    folder.mkdir(parents=True)
    copy = folder / "seed_1.json"
    copy.write_bytes((finished / "CartPole-v1" / "dqn" / "seed_0.json").read_bytes())
    assert f"{copy} holds seed 0 of dqn" in refusal(capsys, "run", *GRID, "--out", tmp_path)


def test_peak_memory_excludes_the_memory_of_the_parent_process():
    held = np.ones(2**27)  # a gigabyte
    code = "from sb3_scratch_dqn.bench.machine import peak_memory; print(peak_memory())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 2**26 < int(printed) < held.nbytes


def test_the_remaining_time_is_estimated_from_finished_runs():
    plan = [Run("dqn", "A", seed, 100, 2, 1) for seed in range(10)]
    done, failed = Mock(done=True, wall_seconds=600), Mock(done=False, wall_seconds=2)
    progress = Progress(plan, {plan[0]: done, **dict.fromkeys(plan[1:6], failed)}, 1)
    assert progress._remaining_time() == "about 40 min left"


def test_on_policy_algorithms_can_be_compared(tmp_path):
    arguments = ["--algos", "ppo", "--envs", "CartPole-v1", "--seeds", "1", *SMALL, "--out", str(tmp_path)]
    main(["run", *arguments])
    result = read_result(tmp_path / "CartPole-v1" / "ppo" / "seed_0.json")
    assert result.done
    assert list(result.steps) == [0, 200, 400]
    # It is evaluated at the same steps as other algorithms, although it trains to the end of a rollout
    assert result.content["curve"]["steps_taken"] == [0, 200, 400]
    assert result.steps_taken == 512
    assert result.content["steps_per_second"] == pytest.approx(512 / result.content["training_seconds"], rel=0.01)


def test_runs_with_other_settings_in_the_same_folder_are_refused(finished, capsys):
    arguments = ["--algos", "dqn", "--envs", "CartPole-v1", "--seeds", "1", *SMALL, "-n", "500"]
    message = refusal(capsys, "run", *arguments, "--out", str(finished))
    path = finished / "CartPole-v1" / "dqn" / "seed_0.json"
    assert f"{path} was made with n_timesteps=400, but now n_timesteps is 500" in message


def test_runs_with_a_modified_settings_file_are_refused(finished, capsys, monkeypatch):
    monkeypatch.setattr(grid, "json_hyperparameters", lambda settings: {**settings, "gamma": 0.5})
    grid._current_hyperparameters.cache_clear()
    message = refusal(capsys, "run", *GRID, "--out", str(finished))
    grid._current_hyperparameters.cache_clear()
    assert "was made with gamma=0.99, but now gamma is 0.5" in message


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_gives_the_same_files(backend, finished, tmp_path):
    pytest.importorskip({"ray": "ray", "dask": "distributed"}[backend])
    arguments = [*GRID, "--seeds", "1", "--backend", backend, "--jobs", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "sb3_scratch_dqn.bench", "run", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    contents = files(tmp_path)
    assert len(contents) == 2
    assert contents == {path: content for path, content in files(finished).items() if path in contents}
