"""Invalid files and arguments of the report are refused, and named."""

import re

import numpy as np
import pytest
from bench_commands import refusal
from known_scores import make_run, write_run, write_runs

from sb3_scratch_dqn.bench.report import stats
from sb3_scratch_dqn.bench.run.plan import evaluation_steps


@pytest.fixture(autouse=True)
def _few_shuffles(monkeypatch):
    """Verdicts near the level need more shuffles, but none is tested here."""
    monkeypatch.setattr(stats, "_SHUFFLES", 2_000)


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert f"{tmp_path} has no results" in refusal(capsys, "report", tmp_path)
    assert "must be a folder of results" in refusal(capsys, "report", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("modify", "message"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[:100], "it is not JSON"),
        (lambda text: "[]", "is not a result of this benchmark"),
        (lambda text: text.replace('"format": 1', '"format": 7'), "is not a result of this benchmark"),
        (lambda text: text.replace('"curve"', '"kurve"'), "it has no 'curve'"),
        (lambda text: text.replace('"seed": 0', '"seed": "0"'), "'seed' in it is '0'"),
        (lambda text: text.replace('"algo": "dqn"', '"algo": null'), "'algo' in it is None"),
        (lambda text: text.replace('"versions"', '"versions": null, "was"'), "'versions' in it is None"),
        (lambda text: text.replace('"cores": 2', '"cores": "2"'), "'cores' in 'hardware' is '2'"),
        (lambda text: text.replace('"n_timesteps": 200', '"n_timesteps": null'), "'n_timesteps' in 'settings' is None"),
        (lambda text: text.replace('"steps_per_second": 100.0', '"steps_per_second": "x"'), "'steps_per_second' in it"),
        (lambda text: text.replace('"peak_memory_bytes": 3', '"peak_memory_bytes": null, "was": 3'), "is None"),
        (lambda text: text.replace('"reward_threshold": 100.0', '"reward_threshold": "x"'), "reward_threshold is 'x'"),
        (lambda text: text.replace('"status": "done"', '"status": "running"'), "its status is 'running'"),
        (lambda text: text.replace('"status": "done"', '"error": "boom", "status": "done"'), "its error is 'boom'"),
        (lambda text: text.replace('"steps": [0, 50', '"steps": [0, 60'), "its evaluations are not those of"),
        (lambda text: text.replace('"steps": [0, 50', '"steps": [null, 50'), "its evaluations are not those of"),
        (lambda text: text.replace('"eval_episodes": 2', '"eval_episodes": 3'), "it does not have 3 episodes"),
        (lambda text: text.replace('"cpu_seconds": [0.0', '"cpu_seconds": [null'), "cpu_seconds of its curve are not"),
        (lambda text: text.replace('"steps": [0, ', '"steps": ['), "differ in length"),
        (lambda text: re.sub(r'"returns": \[\[[^,]*', '"returns": [[NaN', text), "are not finite"),
        (lambda text: re.sub(r'"returns": \[\[[^,]*', '"returns": [["x"', text), "its curve has an invalid value"),
    ],
)
def test_a_broken_file_is_named(tmp_path, capsys, modify, message):
    path = write_run(tmp_path, make_run("dqn", "One-v0", 0, 100, np.random.default_rng(0)))
    path.write_text(modify(path.read_text()))
    error = refusal(capsys, "report", tmp_path)
    assert str(path) in error
    assert message in error
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("algo", "changes", "message"),
    [
        ("qrdqn", {"n_timesteps": 300}, "n_timesteps is 200"),
        ("qrdqn", {"same_settings": "dqn"}, "same_settings is None"),
        ("qrdqn", {"device": "cuda"}, "device is 'cpu'"),
        ("dqn", {"deterministic_evaluation": False}, "deterministic_evaluation is None"),
        ("dqn", {"hyperparameters": {"gamma": 0.9}}, "hyperparameters['gamma'] is 0.99"),
    ],
)
def test_different_settings_are_refused_and_both_files_named(tmp_path, capsys, algo, changes, message):
    rng = np.random.default_rng(0)
    first = write_run(tmp_path, make_run("dqn", "One-v0", 0, 100, rng))
    content = make_run(algo, "One-v0", 1, 100, rng)
    if "n_timesteps" in changes:
        content["curve"]["steps"] = evaluation_steps(changes["n_timesteps"], 4)
    second = write_run(tmp_path, {**content, "settings": {**content["settings"], **changes}})
    error = refusal(capsys, "report", tmp_path)
    assert "runs with different settings cannot be compared" in error
    assert message in error
    assert str(first) in error
    assert str(second) in error


def test_same_settings_must_be_equal_in_all_environments(tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_run(tmp_path, make_run("dqn", "One-v0", 0, 100, rng))
    content = make_run("dqn", "Two-v0", 0, 100, rng)
    write_run(tmp_path, {**content, "settings": {**content["settings"], "same_settings": "dqn"}})
    assert "same_settings is None in" in refusal(capsys, "report", tmp_path)


@pytest.mark.parametrize("name", ["One-v0/dqn/seed_0_a.json", "One-v0/dqn/seed_1.json", "One-v0/dqn.bak/seed_0.json"])
def test_no_run_is_counted_twice(tmp_path, capsys, name):
    path = write_run(tmp_path, make_run("dqn", "One-v0", 0, 100, np.random.default_rng(0)))
    copy = tmp_path / name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(path.read_bytes())
    assert f"{copy} holds seed 0 of dqn in One-v0, which belongs in {path}" in refusal(capsys, "report", tmp_path)


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    path = write_run(tmp_path, make_run("dqn", "One-v0", 0, 100, np.random.default_rng(0)))
    assert f"--out '{path}' must be a folder, but {path} is a file" in refusal(
        capsys, "report", tmp_path, "--out", path
    )


def test_an_unknown_reference_is_refused(tmp_path, capsys):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=1)
    assert "--reference 'ppo' must be one of dqn" in refusal(capsys, "report", tmp_path, "--reference", "ppo")


def test_a_broken_speed_file_is_named(tmp_path, capsys):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=1)
    (tmp_path / "speed.json").write_text('{"format": 1}')
    assert f"{tmp_path / 'speed.json'} is broken: KeyError('cases')" in refusal(capsys, "report", tmp_path)
