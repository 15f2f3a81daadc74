"""RL Zoo works with scratch_dqn, through its classes and its commands."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import rl_zoo3
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.zoo import registration as zoo
from sb3_scratch_dqn.zoo.registration import find_config, hyperparams_folder

FAST = ["-params", "learning_starts:50", "train_freq:4", "gradient_steps:1", "buffer_size:1000"]


def run(folder, *args):
    """Run one of the Zoo's commands and return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy", "MPLBACKEND": "Agg"}
    result = subprocess.run(
        [sys.executable, "-m", *args],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def train(folder, *args, steps=300):
    return run(
        folder, "rl_zoo3.train", "--algo", "scratch_dqn", "--env", "CartPole-v1", "--seed", "3", "--eval-freq", "-1",
        "-n", str(steps), "--num-threads", "1", *args,
    )  # fmt: skip


def manager(**kwargs):
    """Return an experiment manager before ``setup_experiment``."""
    return ExperimentManager(argparse.Namespace(), kwargs.pop("algo", "scratch_dqn"), "CartPole-v1", "logs", **kwargs)


def test_the_algorithm_is_registered():
    assert rl_zoo3.ALGOS["scratch_dqn"] is ScratchDQN
    assert HYPERPARAMS_SAMPLER["scratch_dqn"] is zoo.sample_params
    assert HYPERPARAMS_CONVERTER["scratch_dqn"] is zoo.convert_params


def test_registering_again_has_no_effect():
    before = ExperimentManager.__init__, dict(rl_zoo3.ALGOS)
    zoo.register()
    assert (ExperimentManager.__init__, dict(rl_zoo3.ALGOS)) == before


def test_an_experiment_reads_our_settings_unless_conf_file_names_others(tmp_path):
    assert manager().config == str(hyperparams_folder() / "scratch_dqn.yml")
    assert manager(config="tutorials").config == str(hyperparams_folder() / "tutorials.yml")
    assert manager(config="other.yml").config == "other.yml"
    assert manager(config="my.module").config == "my.module"
    assert manager(algo="dqn").config.endswith("rl_zoo3/hyperparams/dqn.yml")
    assert manager(algo="dqn", config="tutorials").config == "tutorials"


def test_a_module_of_the_user_takes_precedence_over_a_preset_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "tutorials.py").write_text("hyperparams = {}")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_config("tutorials", "tutorials") == "tutorials"


def test_a_default_file_of_the_zoo_for_our_name_takes_precedence(tmp_path):
    (tmp_path / "scratch_dqn.yml").touch()
    assert find_config(None, str(tmp_path / "scratch_dqn.yml")) == str(tmp_path / "scratch_dqn.yml")


def test_our_default_settings_equal_those_of_dqn():
    reference = yaml.safe_load(Path(rl_zoo3.__path__[0], "hyperparams", "dqn.yml").read_text())
    ours = yaml.safe_load((hyperparams_folder() / "scratch_dqn.yml").read_text())
    assert {"default", "atari"} <= ours.keys()
    for env, settings in reference.items():
        assert ours[env] == settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the Zoo trained for 300 steps and saved every kind of file."""
    folder = tmp_path_factory.mktemp("zoo")
    train(
        folder, "--save-replay-buffer", "--eval-freq", "150", "--eval-episodes", "2", "--save-freq", "150",
        "-tb", "tensorboard", "-P", *FAST,
    )  # fmt: skip
    return folder


def test_training_saves_all_files_of_the_zoo(trained):
    run_folder = trained / "logs" / "scratch_dqn" / "CartPole-v1_1"
    names = {path.name for path in run_folder.iterdir()}
    assert {"CartPole-v1.zip", "best_model.zip", "evaluations.npz", "replay_buffer.pkl", "0.monitor.csv"} <= names
    assert {"rl_model_150_steps.zip", "rl_model_300_steps.zip"} <= names
    assert list((trained / "tensorboard" / "CartPole-v1" / "ScratchDQN_1").glob("events*"))
    config = yaml.unsafe_load((run_folder / "CartPole-v1" / "config.yml").read_text())
    assert config["buffer_size"] == 1000


def test_the_same_seed_trains_the_same_agent(trained, tmp_path):
    train(tmp_path, *FAST)
    path = "logs/scratch_dqn/CartPole-v1_1/CartPole-v1.zip"
    first, second = (ScratchDQN.load(folder / path).get_parameters()["policy"] for folder in (trained, tmp_path))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_enjoy_evaluates_the_agent(trained):
    out = run(
        trained, "rl_zoo3.enjoy", "--algo", "scratch_dqn", "--env", "CartPole-v1", "-f", "logs", "--no-render",
        "-n", "500", "--load-best",
    )  # fmt: skip
    assert "Mean reward:" in out


def test_training_continues_from_a_saved_agent_and_its_replay_buffer(trained):
    out = train(trained, "-i", "logs/scratch_dqn/CartPole-v1_1/CartPole-v1.zip", *FAST, "batch_size:16")
    assert "Loading replay buffer" in out
    model = ScratchDQN.load(trained / "logs/scratch_dqn/CartPole-v1_2/CartPole-v1.zip")
    assert model.batch_size == 16
    assert model._n_updates > 75


def test_environments_run_in_subprocesses(tmp_path):
    train(tmp_path, "--vec-env", "subproc", *FAST, "n_envs:2")


def test_a_search_creates_a_study_from_which_a_trial_or_the_best_one_is_trained(tmp_path):
    common = ["--storage", "logs/study.log", "--study-name", "s", *FAST]
    train(
        tmp_path, "-optimize", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots",
        *common, steps=60,
    )  # fmt: skip
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "logs/study.log"))
    )
    study = optuna.load_study(study_name="s", storage=storage)
    assert len(study.trials) == 2

    for trial, description in (([], "the best trial"), (["--trial-id", "0"], "trial 0"), (["--trial-id", "1"], None)):
        out = train(tmp_path, *trial, *common, steps=60)
        assert "Loading from Optuna study" in out
        assert description is None or f"Using {description} of study 's'" in out
    for number, expected in ((2, study.best_trial), (3, study.trials[0]), (4, study.trials[1])):
        config = yaml.unsafe_load(
            (tmp_path / f"logs/scratch_dqn/CartPole-v1_{number}/CartPole-v1/config.yml").read_text()
        )
        for name, value in zoo.convert_params(expected.params).items():
            if name not in ("learning_starts", "train_freq", "gradient_steps", "buffer_size"):  # given by -params
                assert config[name] == value


def test_a_hyperparameter_file_may_declare_a_search_space(tmp_path):
    (tmp_path / "mine.yml").write_text(
        "CartPole-v1: {policy: MlpPolicy, n_timesteps: 60, buffer_size: 100,\n"
        "  search_space: {learning_rate: {low: 1.0e-4, high: 1.0e-3, log: true}, batch_size: [8, 16]}}"
    )
    out = train(
        tmp_path, "--conf-file", "mine.yml", "-optimize", "--n-trials", "1", "--n-evaluations", "1",
        "--eval-episodes", "1", "--no-optim-plots", steps=60,
    )  # fmt: skip
    assert "batch_size: 8" in out or "batch_size: 16" in out
    assert "one_minus_gamma" not in out.split("Params:")[1]


def test_a_trial_with_invalid_settings_is_pruned_and_the_search_continues():
    class Manager:
        algo, search_space = "scratch_dqn", {"buffer_size": [8]}

    def fail(self, trial):
        return ScratchDQN("MlpPolicy", "CartPole-v1", buffer_size=trial.suggest_int("buffer_size", 8, 8))

    study = optuna.create_study()
    study.optimize(lambda trial: zoo._wrap_objective(fail)(Manager(), trial), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "PRUNED"]
    assert study.trials[0].user_attrs["search_space"] == {"buffer_size": [8]}


NAN_ENV = """
from pathlib import Path
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class NanOnce(CartPoleEnv):
    steps = 0

    def step(self, action):
        observation, reward, *rest = super().step(action)
        NanOnce.steps += 1
        if NanOnce.steps > 40 and not Path("nan_was_returned").exists():
            Path("nan_was_returned").touch()
            reward = float("nan")
        return observation, reward, *rest

gym.register("NanOnce-v0", NanOnce, max_episode_steps=20)
"""


def test_a_nan_reward_prunes_its_trial_and_the_search_continues(tmp_path):
    (tmp_path / "nan_env.py").write_text(NAN_ENV)
    (tmp_path / "mine.yml").write_text(
        "NanOnce-v0: {policy: MlpPolicy, n_timesteps: 100, buffer_size: 100, learning_starts: 10,\n"
        "  policy_kwargs: 'dict(head=\"c51\", head_kwargs=dict(v_min=0, v_max=100))', search_space: {batch_size: [8]}}"
    )
    run(
        tmp_path, "rl_zoo3.train", "--algo", "scratch_dqn", "--env", "NanOnce-v0", "--gym-packages", "nan_env",
        "--conf-file", "mine.yml", "-optimize", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1",
        "--no-optim-plots", "--num-threads", "1", "--storage", "logs/study.log", "--study-name", "s",
    )  # fmt: skip
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "logs/study.log"))
    )
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["PRUNED", "COMPLETE"]


def test_an_invalid_search_space_raises_an_error_before_the_experiment_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yml").write_text(
        "CartPole-v1: {policy: MlpPolicy, n_timesteps: 60, search_space: {seed: [1, 2]}}"
    )
    with pytest.raises(ValueError, match="'seed' cannot be searched"):
        manager(config="mine.yml", optimize_hyperparameters=True).setup_experiment()
    assert not (tmp_path / "logs").exists()
