"""The plan of a comparison: its runs, their settings and paths, and which command lines are refused."""

from pathlib import Path

import pytest
import torch as th
from bench_commands import GRID, SMALL, refusal

from sb3_scratch_dqn.bench.run import grid
from sb3_scratch_dqn.bench.run.plan import evaluation_steps, folder_name, load_settings, make_plan


@pytest.mark.parametrize("same", ["dqn", "scratch_dqn:double"])
def test_same_settings_apply_to_all_algorithms(tmp_path, same):
    algos = ["dqn", "qrdqn"] if same == "dqn" else ["scratch_dqn"]
    plan = make_plan(algos, ["CartPole-v1"], 1, n_timesteps=400, same_settings=same)
    settings = [load_settings(run, str(tmp_path))[1] for run in plan]
    assert settings[0] == settings[-1]
    assert settings[0]["policy_kwargs"] == "dict(net_arch=[256, 256])"
    assert settings[0].get("double_q", False) == (same != "dqn")


def test_seeds_follow_the_first_one():
    plan = make_plan(["dqn", "scratch_dqn"], ["CartPole-v1"], 2, n_timesteps=400, first_seed=100)
    assert [(run.algo, run.seed) for run in plan] == [
        *(("dqn", 100), ("scratch_dqn", 100), ("dqn", 101), ("scratch_dqn", 101)),
    ]


def test_evaluations_are_evenly_spaced_and_the_last_is_at_the_end():
    assert evaluation_steps(100, 3) == [0, 33, 67, 100]


def test_folders_are_named_after_algorithm_and_settings():
    assert [folder_name(algo) for algo in ("dqn", "scratch_dqn:rainbow", "ppo:some/where.yml")] == [
        "dqn",
        "scratch_dqn-rainbow",
        "ppo-where",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algos", "dqm", "--envs", "CartPole-v1"], "--algos 'dqm' must be one of"),
        (["--algos", "dqm", "--envs", "CartPole-v1"], "did you mean 'dqn'?"),
        (["--algos", "scratch_dqn:nothing", "--envs", "CartPole-v1"], "the settings of scratch_dqn:nothing"),
        (
            ["--algos", "dqn", "--envs", "CartPoll-v1"],
            "--envs 'CartPoll-v1' is not registered; did you mean 'CartPole-v1'",
        ),
        (["--algos", "dqn", "--envs", "Xyzzy"], "--envs 'Xyzzy' is not registered. --gym-packages imports modules"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--seeds", "0"], "--seeds: '0' must be a whole number"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--first-seed", "-1"], "must be a whole number of at least 0"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--seeds", "inf"], "--seeds: 'inf' must be a whole number"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--seeds", "abc"], "--seeds: 'abc' must be a whole number"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "-n", "400.9"], "--n-timesteps: '400.9' must be a whole number"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--device", "cuda"], "--device cuda finds no GPU"),
        (["--algos", "dqn", "dqn", "--envs", "CartPole-v1"], "--algos 'dqn' is given twice"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "CartPole-v1"], "--envs 'CartPole-v1' is given twice"),
        (["--algos", "dqn", "ppo", "--envs", "CartPole-v1"], "50,000 for dqn, 100,000 for ppo"),
        (
            ["--algos", "dqn", "scratch_dqn:rainbow", "--envs", "CartPole-v1", "--same-settings", "dqn"],
            "--algos 'scratch_dqn:rainbow' names its own settings",
        ),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--same-settings", "x"], "--same-settings 'x' must be one of"),
        (["--algos", "ppo", "--envs", "CartPole-v1", "--same-settings", "dqn"], "which ppo does not accept"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "-n", "10"], "--evaluations 20 must be at most the 10 steps"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--gym-packages", "no_such"], "--gym-packages 'no_such'"),
        (["--algos", "dqn", "--envs", "CartPole-v1", "--address", "here:1"], "--address 'here:1' cannot be used"),
    ],
)
def test_invalid_arguments_are_refused_before_any_training(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    assert message in refusal(capsys, "run", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_environments_and_settings_that_would_fail_in_each_run_are_refused(
    bad_environments, bad_settings, tmp_path, capsys
):
    def refused(*envs):
        arguments = ["--algos", f"dqn:{bad_settings}", "--gym-packages", bad_environments, "--out", tmp_path / "out"]
        return refusal(capsys, "run", *arguments, "--envs", *envs, *SMALL)

    assert "--envs 'Some/Where-v0' would share the folder 'Some-Where-v0'" in refused("Some/Where-v0", "Some-Where-v0")
    assert "for Some-Where-v0 have no 'n_timesteps', which the Zoo needs" in refused("Some-Where-v0")
    assert "for Some/Where-v0 have 'device', which the command line sets" in refused("Some/Where-v0")
    Path(tmp_path, "broken_module.py").write_text("1 / 0")
    message = refusal(capsys, "run", *GRID, "--gym-packages", "broken_module", "--out", tmp_path / "out")
    assert "--gym-packages 'broken_module' cannot be imported: division by zero" in message
    assert not (tmp_path / "out").exists()


def test_output_folders_that_are_files_are_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        for command in (["run", *GRID], ["speed", "defaults"]):
            message = refusal(capsys, *command, "--out", out)
            assert f"--out '{out}' must be a folder, but {file} is a file" in message


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_backend_that_is_not_installed_is_named(backend, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "find_spec", lambda name: None)
    message = refusal(capsys, "run", *GRID, "--backend", backend, "--out", tmp_path)
    assert f'--backend {backend} needs {package}: pip install "sb3-scratch-dqn[{backend}]"' in message
