"""Runs of a comparison: what is in their files, that they can be stopped and gone on with, and what is refused."""

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

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch as th
from joblib import parallel
from joblib.externals.loky import get_reusable_executor

from sb3_scratch_dqn.bench import machine
from sb3_scratch_dqn.bench.__main__ import main
from sb3_scratch_dqn.bench.results import read_result
from sb3_scratch_dqn.bench.run import grid
from sb3_scratch_dqn.bench.run.grid import Progress
from sb3_scratch_dqn.bench.run.plan import Run, evaluation_steps, experiment, file_name, make_plan

SMALL = ["-n", "400", "--evaluations", "2", "--eval-episodes", "2"]
GRID = ["--algos", "dqn", "scratch_dqn:rainbow", "--envs", "CartPole-v1", "--seeds", "2", *SMALL]

# What depends on the clock, or on where a run takes place
TIMES = ("started", "commit", "hardware", "training_seconds", "steps_per_second", "peak_memory_bytes", "wall_seconds")

ENV = """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Fails(CartPoleEnv):
    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps > 100:
            raise RuntimeError("out of luck")
        return super().step(action)

class Ends(Fails):
    def step(self, action):
        import os
        print("the last words", flush=True)
        os._exit(7)

class Infinite(CartPoleEnv):
    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, -float("inf"), terminated, truncated, info

gym.register("Fails-v0", Fails)
gym.register("Infinite-v0", Infinite)
gym.register("Some/Where-v0", CartPoleEnv)
gym.register("Some-Where-v0", CartPoleEnv)
gym.register("Ends-v0", Ends)
"""


def files(folder):
    """The content of the files of runs, without what depends on the clock."""
    known = {}
    for path in sorted(folder.glob("*/*/*.json")):
        content = {name: value for name, value in json.loads(path.read_text()).items() if name not in TIMES}
        for name in ("seconds", "cpu_seconds"):
            del content["curve"][name]
        known[path.relative_to(folder)] = content
    return known


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of four runs that nothing stopped."""
    out = tmp_path_factory.mktemp("finished")
    main(["run", *GRID, "--out", str(out)])
    return out


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """Makes a module that registers two environments, one that fails and one that ends the process."""
    Path(tmp_path, "bad_environments.py").write_text(ENV)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    get_reusable_executor().shutdown()  # its processes have the environment that they began with
    known = set(gym.registry)
    yield "bad_environments"
    sys.modules.pop("bad_environments", None)
    for name in set(gym.registry) - known:
        del gym.registry[name]


def test_each_run_leaves_a_file_that_describes_it(finished):
    assert len(files(finished)) == 4
    result = read_result(finished / "CartPole-v1" / "scratch_dqn-rainbow" / "seed_1.json")
    known = result.known
    assert (result.algo, result.env, result.seed, result.done) == ("scratch_dqn:rainbow", "CartPole-v1", 1, True)
    assert known["curve"]["steps"] == [0, 200, 400]
    assert [len(returns) for returns in known["curve"]["returns"]] == [2, 2, 2]
    assert known["curve"]["returns"] == known["curve"]["lengths"]  # CartPole gives a reward of 1 a step
    assert known["settings"]["hyperparameters"]["double_q"] is True
    assert known["settings"]["n_timesteps"] == 400
    assert known["engine"] == "the fused engine"
    assert known["versions"]["stable-baselines3"].startswith("2.")
    assert known["hardware"]["cores"] >= 1
    assert known["reward_threshold"] == 475.0
    assert 50 * 2**20 < known["peak_memory_bytes"] < 2**32
    assert known["steps_per_second"] == pytest.approx(512 / known["training_seconds"], rel=0.01)
    assert known["steps_taken"] == 512  # the first multiple of train_freq
    assert result.seconds[0] < 0.5
    assert (result.seconds[1:] > result.seconds[:-1]).all()


def test_a_run_that_was_killed_goes_on_and_leaves_the_same_files(finished, tmp_path, capsys):
    command = [sys.executable, "-m", "sb3_scratch_dqn.bench", "run", *GRID, "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not files(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert psutil.wait_procs(others, timeout=20)[1] == []  # nobody goes on with what nobody wants
    before = files(tmp_path)
    assert len(before) < 4
    kept = {path: (tmp_path / path).stat().st_mtime_ns for path in before}
    main(["run", *GRID, "--out", str(tmp_path)])
    told = capsys.readouterr().err
    assert f"{len(before)} of 4 runs are there already\n{4 - len(before)} to go, " in told
    assert files(tmp_path) == files(finished)
    assert all((tmp_path / path).stat().st_mtime_ns == stamp for path, stamp in kept.items())


KILLED_AT_ONCE = """
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


def test_a_run_ends_when_what_started_it_was_killed_while_it_was_importing(tmp_path):
    run = json.dumps(asdict(Run("dqn", "CartPole-v1", 0, 10**8, 1, 1)))
    command = [sys.executable, "-c", KILLED_AT_ONCE, run, str(tmp_path / "output.txt")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    process = psutil.Process(int(killed.stdout))
    assert process.is_running()
    left = psutil.wait_procs([process], timeout=30)[1]
    for one in left:
        one.kill()
    assert left == []
    assert (tmp_path / "output.txt").read_text() == ""  # nothing went wrong: it ended by itself


def test_a_process_whose_parent_has_ended_already_ends_before_it_does_anything(monkeypatch):
    class EndedError(Exception):
        pass

    def end(code):
        raise EndedError(code)

    monkeypatch.setattr(os, "_exit", end)
    machine.end_with.cache_clear()
    with pytest.raises(EndedError, match="1"):
        machine.end_with(os.getpid())  # which is not its own parent


def test_processes_of_loky_end_with_this_one_from_their_beginning_on(monkeypatch):
    class Loky:
        def configure(self, n_jobs, **settings):
            return settings

    monkeypatch.setitem(parallel.BACKENDS, "loky", Loky)
    with grid._loky(None, 2) as at_a_time:
        settings = parallel.BACKENDS["loky"]().configure(n_jobs=at_a_time)
    assert settings == {"initializer": machine.end_with, "initargs": (os.getpid(),)}
    assert parallel.BACKENDS["loky"] is Loky


def test_what_is_there_is_not_made_again(finished, capsys, monkeypatch):
    monkeypatch.setattr(grid, "execute", None)
    main(["run", *GRID, "--out", str(finished)])
    assert "4 of 4 runs are done" in capsys.readouterr().out


def test_a_run_that_fails_is_recorded_and_told(environments, tmp_path, capsys):
    out = tmp_path / "results"
    arguments = ["run", "--algos", "scratch_dqn", "--envs", "Fails-v0", "Ends-v0", "--seeds", "1", *SMALL]
    arguments += ["--gym-packages", environments, "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "0 of 2 runs are done" in told.out
    assert "[2/2]" in told.err
    failed = json.loads((out / "Fails-v0" / "scratch_dqn" / "seed_0.json").read_text())
    assert failed["status"] == "failed"
    assert (failed["error"]["type"], failed["error"]["message"]) == ("RuntimeError", "out of luck")
    assert "bad_environments.py" in failed["error"]["traceback"]
    ended = json.loads((out / "Ends-v0" / "scratch_dqn" / "seed_0.json").read_text())
    assert "its process ended with code 7; it printed: the last words" in ended["error"]["message"]

    tried = []
    monkeypatched = pytest.MonkeyPatch()
    with monkeypatched.context() as patch:
        patch.setattr(grid, "execute", lambda run: tried.append(run) or {**failed, "env": run.env})
        for more in ([], ["--jobs", "1", "--retry-failed"]):
            with pytest.raises(SystemExit):
                main([*arguments, *more])
            assert bool(tried) == bool(more)


@pytest.fixture
def known_runs(finished, monkeypatch):
    """Lets runs be executed in no time, with the results of others; the list of those that were."""
    executed = []

    def execute(run):
        executed.append(str(run.path))
        return json.loads((finished / run.path).read_text())

    monkeypatch.setattr(grid, "execute", execute)
    return executed


def ends(*arguments):
    """The status that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    return ended.value.code


def test_a_run_whose_file_cannot_be_written_is_told_and_made_again(finished, known_runs, tmp_path, capsys, monkeypatch):
    arguments = [*GRID, "--jobs", "1", "--out", str(tmp_path)]
    path = tmp_path / "CartPole-v1" / "dqn" / "seed_0.json"
    move = os.replace

    def replace(source, target):
        if target == path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        move(source, target)

    with monkeypatch.context() as full:
        full.setattr(os, "replace", replace)
        assert ends(*arguments) == 1
    told = capsys.readouterr()
    assert f"\n{path} could not be written: No space left on device\n" in told.err
    assert "\n1 of 4 runs could not be written; the same command makes them again\n" in told.err
    assert "3 of 4 runs are done" in told.out
    assert "Traceback" not in told.err
    assert len(known_runs) == 4
    assert len(list(tmp_path.rglob("seed_*"))) == len(files(tmp_path)) == 3
    assert list(path.parent.iterdir()) == [path.with_name("seed_1.json")]
    known_runs.clear()
    main(["run", *arguments])
    assert known_runs == [str(path.relative_to(tmp_path))]
    assert files(tmp_path) == files(finished)


def test_a_folder_that_is_removed_in_the_middle_ends_no_other_run(known_runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    execute = grid.execute

    def remove_and_execute(run):
        with suppress(FileNotFoundError):
            (tmp_path / "here").rmdir()
        return execute(run)

    monkeypatch.setattr(grid, "execute", remove_and_execute)
    assert ends(*GRID, "--jobs", "1", "--out", "results") == 1
    told = capsys.readouterr().err
    for path in known_runs:
        assert f"\n{Path('results', path)} could not be written: No such file or directory\n" in told
    assert "\n4 of 4 runs could not be written" in told


def test_nowhere_to_tell_how_far_it_is_ends_no_run(finished, known_runs, tmp_path, monkeypatch):
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
def process_of_runs(tmp_path, monkeypatch):
    """Lets a script take the place of the processes of runs."""

    def replace(script):
        place = tmp_path / "process"
        place.write_text(PROCESS.format(python=sys.executable) + script)
        place.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(place))

    return replace


A_RUN = Run("dqn", "CartPole-v1", 3, 400, 2, 2)


def test_a_run_needs_no_room_for_temporary_files(process_of_runs, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("mkdtemp", "mkstemp", "gettempdir", "_get_default_tempdir"):
        monkeypatch.setattr(tempfile, name, full)
    process_of_runs("print('x' * 10**6); os.write(answer, json.dumps({**run, 'long': 'y' * 10**6}).encode())")
    known = grid.execute(A_RUN)
    assert known.pop("long") == "y" * 10**6
    assert known == {**asdict(A_RUN), "gym_packages": []}


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("print('a' + 'b' * 3000 + 'c' * 3999); sys.exit(3)", f"code 3; it printed: {'c' * 3999}\n"),
        ("os.write(answer, b'{\"half\": '); os.kill(os.getpid(), 9)", "code -9; it printed: "),
        ("os.write(1, b'\\xff'); sys.exit(1)", "code 1; it printed: \ufffd"),
        ("subprocess.Popen(['sleep', '20'], close_fds=False); print('end')", "code 0; it printed: end\n"),
        ("subprocess.Popen(['yes']); sys.exit(2)", "code 2; it printed: "),
    ],
    ids=["status", "half an answer", "no text", "a process that stays", "a process that goes on printing"],
)
def test_a_process_that_gives_no_answer_has_failed(script, told, process_of_runs):
    process_of_runs(script)
    before = time.perf_counter()
    known = grid.execute(A_RUN)
    assert time.perf_counter() - before < 10
    assert (known["status"], known["seed"], known["error"]["type"]) == ("failed", 3, "ProcessEnded")
    assert f"its process ended with {told}" in known["error"]["message"]


def test_a_process_that_cannot_be_started_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    known = grid.execute(A_RUN)
    assert known["status"] == "failed"
    assert known["error"]["type"] == "FileNotFoundError"
    assert known["error"]["message"].startswith("its process could not be run: [Errno 2] No such file")


SETTINGS_FILE = """
default: &default
  policy: MlpPolicy
  n_timesteps: 400
Infinite-v0: *default
CartPole-v1:
  <<: *default
  callback: [{stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes: {max_episodes: 3}}]
Some-Where-v0:
  policy: MlpPolicy
Some/Where-v0:
  <<: *default
  device: cpu
"""


def test_runs_that_give_no_numbers_or_end_early_have_failed_and_the_others_go_on(environments, tmp_path, capsys):
    settings, out = tmp_path / "settings.yml", tmp_path / "results"
    settings.write_text(SETTINGS_FILE)
    arguments = ["run", "--algos", f"dqn:{settings}", "--envs", "Infinite-v0", "CartPole-v1", "--seeds", "1", *SMALL]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--gym-packages", environments, "--jobs", "1", "--out", str(out)])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "ValueError: an evaluation after 0 steps gave the returns [-inf, -inf]" in told
    assert re.search(r"RuntimeError: training ended after \d\d of 400 steps", told)
    assert "[2/2]" in told
    assert all(known["status"] == "failed" for known in map(json.loads, map(Path.read_text, out.rglob("*.json"))))


def test_environments_and_settings_that_would_fail_in_each_run_are_refused(environments, tmp_path, capsys):
    settings = tmp_path / "settings.yml"
    settings.write_text(SETTINGS_FILE)

    def refused(*envs):
        arguments = ["--algos", f"dqn:{settings}", "--gym-packages", environments, "--out", str(tmp_path / "out")]
        return refusal(capsys, *arguments, "--envs", *envs, *SMALL)

    assert "--envs 'Some/Where-v0' would share the folder 'Some-Where-v0'" in refused("Some/Where-v0", "Some-Where-v0")
    assert "for Some-Where-v0 have no 'n_timesteps', which the Zoo needs" in refused("Some-Where-v0")
    assert "for Some/Where-v0 have 'device', which this command line decides" in refused("Some/Where-v0")
    Path(tmp_path, "broken_module.py").write_text("1 / 0")
    message = refusal(capsys, *GRID, "--gym-packages", "broken_module", "--out", str(tmp_path / "out"))
    assert "--gym-packages 'broken_module' cannot be imported: division by zero" in message
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_to_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        assert f"--out '{out}' must be a folder, but {file} is a file" in refusal(capsys, *GRID, "--out", str(out))
        with pytest.raises(SystemExit):
            main(["speed", "defaults", "--out", str(out)])
        assert f"but {file} is a file" in " ".join(capsys.readouterr().err.split())


def test_a_copy_is_no_run(finished, tmp_path, capsys):
    place = tmp_path / "CartPole-v1" / "dqn"
    place.mkdir(parents=True)
    copy = place / "seed_1.json"
    copy.write_bytes((finished / "CartPole-v1" / "dqn" / "seed_0.json").read_bytes())
    assert f"{copy} holds seed 0 of dqn" in refusal(capsys, *GRID, "--out", str(tmp_path))


def test_the_peak_of_memory_is_that_of_the_process_alone():
    held = np.ones(2**27)  # a gigabyte, that a process must not be told to have
    code = "from sb3_scratch_dqn.bench.machine import peak_memory; print(peak_memory())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 2**26 < int(told) < held.nbytes


def test_how_long_it_takes_is_told_by_the_runs_that_ended_well():
    plan = [Run("dqn", "A", seed, 100, 2, 1) for seed in range(10)]
    done, failed = Mock(done=True, wall_seconds=600), Mock(done=False, wall_seconds=2)
    progress = Progress(plan, {plan[0]: done, **dict.fromkeys(plan[1:6], failed)}, 1)
    assert progress._left() == "about 40 min left"


@pytest.mark.parametrize("same", ["dqn", "scratch_dqn:double"])
def test_the_same_settings_for_all(tmp_path, same):
    algos = ["dqn", "qrdqn"] if same == "dqn" else ["scratch_dqn"]
    plan = make_plan(algos, ["CartPole-v1"], 1, n_timesteps=400, same_settings=same)
    settings = [experiment(run, str(tmp_path))[1] for run in plan]
    assert settings[0] == settings[-1]
    assert settings[0]["policy_kwargs"] == "dict(net_arch=[256, 256])"
    assert settings[0].get("double_q", False) == (same != "dqn")


def test_seeds_follow_the_first_one():
    plan = make_plan(["dqn", "scratch_dqn"], ["CartPole-v1"], 2, n_timesteps=400, first_seed=100)
    assert [(run.algo, run.seed) for run in plan] == [
        *(("dqn", 100), ("scratch_dqn", 100), ("dqn", 101), ("scratch_dqn", 101)),
    ]


def test_an_algorithm_of_another_kind_takes_part(tmp_path):
    arguments = ["--algos", "ppo", "--envs", "CartPole-v1", "--seeds", "1", *SMALL, "--out", str(tmp_path)]
    main(["run", *arguments])
    result = read_result(tmp_path / "CartPole-v1" / "ppo" / "seed_0.json")
    assert result.done
    assert list(result.steps) == [0, 200, 400]
    # Whatever it did until its rollouts were whole, it was evaluated where the others are
    assert result.known["curve"]["steps_taken"] == [0, 200, 400]
    assert result.steps_taken == 512
    assert result.known["steps_per_second"] == pytest.approx(512 / result.known["training_seconds"], rel=0.01)


def test_evaluations_are_evenly_spaced_and_the_last_is_at_the_end():
    assert evaluation_steps(100, 3) == [0, 33, 67, 100]


def test_folders_are_named_after_algorithm_and_settings():
    assert [file_name(algo) for algo in ("dqn", "scratch_dqn:rainbow", "ppo:some/where.yml")] == [
        "dqn",
        "scratch_dqn-rainbow",
        "ppo-where",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--algos", "dqm", "--envs", "CartPole-v1"], "--algos 'dqm' must be one of"),
        (["--algos", "dqm", "--envs", "CartPole-v1"], "did you mean 'dqn'?"),
        (["--algos", "scratch_dqn:nothing", "--envs", "CartPole-v1"], "the settings of scratch_dqn:nothing"),
        (
            ["--algos", "dqn", "--envs", "CartPoll-v1"],
            "--envs 'CartPoll-v1' is not registered; did you mean 'CartPole-v1'",
        ),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--seeds", "0"], "--seeds: '0' must be a whole number"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--first-seed", "-1"], "must be a whole number of at least 0"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--seeds", "inf"], "--seeds: 'inf' must be a whole number"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--seeds", "abc"], "--seeds: 'abc' must be a whole number"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "-n", "400.9"], "--n-timesteps: '400.9' must be a whole number"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--device", "cuda"], "--device cuda finds no GPU"),
        (["--algos", "dqn", "dqn", "--envs", "CartPole-v1"], "--algos 'dqn' is named twice"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "CartPole-v1"], "--envs 'CartPole-v1' is named twice"),
        (["--algos", "dqn", "ppo", "--envs", "CartPole-v1"], "50,000 for dqn, 100,000 for ppo"),
        (
            ["--algos", "dqn", "scratch_dqn:rainbow", "--envs", "CartPole-v1", "--same-settings", "dqn"],
            "--algos 'scratch_dqn:rainbow' has settings of its own",
        ),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--same-settings", "x"], "--same-settings 'x' must be one of"),
        (["--algos", "ppo", "--envs", "CartPole-v1", "--same-settings", "dqn"], "which ppo does not take"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "-n", "10"], "--evaluations 20 must be at most the 10 steps"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--gym-packages", "no_such"], "--gym-packages 'no_such'"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--address", "here:1"], "--address 'here:1' is of no use"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch, arguments, told):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    assert told in refusal(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_runs_with_other_settings_in_the_same_folder_are_refused(finished, capsys):
    arguments = ["--algos", "dqn", "--envs", "CartPole-v1", "--seeds", "1", *SMALL, "-n", "500"]
    message = refusal(capsys, *arguments, "--out", str(finished))
    path = finished / "CartPole-v1" / "dqn" / "seed_0.json"
    assert f"{path} was made with n_timesteps=400, and now it is to be 500" in message


def test_runs_with_a_settings_file_that_changed_are_refused(finished, capsys, monkeypatch):
    monkeypatch.setattr(grid, "hyperparameters", lambda settings: {**settings, "gamma": 0.5})
    grid._current_hyperparameters.cache_clear()
    message = refusal(capsys, *GRID, "--out", str(finished))
    grid._current_hyperparameters.cache_clear()
    assert "was made with gamma=0.99, and now it is to be 0.5" in message


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_backend_that_is_not_installed_is_named(backend, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "find_spec", lambda name: None)
    message = refusal(capsys, *GRID, "--backend", backend, "--out", str(tmp_path))
    assert f'--backend {backend} needs {package}: pip install "sb3-scratch-dqn[{backend}]"' in message


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_gives_the_same_files(backend, finished, tmp_path):
    pytest.importorskip({"ray": "ray", "dask": "distributed"}[backend])
    arguments = [*GRID, "--seeds", "1", "--backend", backend, "--jobs", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "sb3_scratch_dqn.bench", "run", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    made = files(tmp_path)
    assert len(made) == 2
    assert made == {path: known for path, known in files(finished).items() if path in made}
