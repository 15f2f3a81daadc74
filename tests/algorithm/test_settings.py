"""Settings are attributes, and count when a model is loaded with new ones, as RL Zoo loads it."""

import inspect
from collections import UserDict
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch as th
from helpers import DictEnv, ImageEnv, TimeoutEnv, assert_same_training
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.dqn import policies as theirs

from sb3_scratch_dqn import ScratchDQN, ScratchReplayBuffer


def test_the_arguments_of_sb3_come_first_with_their_names_and_defaults():
    theirs = list(inspect.signature(DQN).parameters.values())
    ours = list(inspect.signature(ScratchDQN).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_every_argument_is_an_attribute_of_its_name():
    model = ScratchDQN("MlpPolicy", TimeoutEnv())
    for name in inspect.signature(ScratchDQN).parameters:
        if name != "_init_setup_model":
            assert hasattr(model, name), name


def test_settings_given_to_load_count(tmp_path):
    ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0).learn(120).save(tmp_path / "model.zip")
    model = ScratchDQN.load(
        tmp_path / "model.zip",
        env=TimeoutEnv(),
        learning_rate=ConstantSchedule(0.5),
        target_update_interval=[7, "episode"],
        exploration_schedule="exponential",
        exploration_initial_eps=0.8,
        exploration_decay=0.5,
        exploration_final_eps=0.3,
        loss="mse",
        n_steps=2,
        gamma=0.5,
        buffer_size=77,
        batch_size=8,
        train_freq=(1, "episode"),
        stats_window_size=3,
    )
    model.learn(200)
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.5
    assert model.target_update_interval == (7, "episode")
    assert model.exploration_rate == 0.3
    assert model.replay_buffer.buffer_size == 77
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (2, 0.5)
    assert model.train_freq.unit.value == "episode"
    assert model.ep_info_buffer.maxlen == 3
    assert model._engine.objective.loss(*2 * [model.q_net.q_net[0].bias]).sum() == 0


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_the_loss_is_the_one_asked_for(loss):
    values = [
        ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0, loss=name, learning_starts=0).learn(50).q_values(np.ones(3))
        for name in ("huber", loss)
    ]
    assert np.array_equal(*values) == (loss == "huber")


def test_a_saved_model_keeps_its_settings(tmp_path):
    model = ScratchDQN(
        "MlpPolicy",
        TimeoutEnv(),
        loss="mse",
        exploration_schedule=lambda progress_remaining: progress_remaining / 2,
        target_update_interval=(3, "episode"),
        engine="eager",
    ).learn(120)
    model.save(tmp_path / "model.zip")
    loaded = ScratchDQN.load(tmp_path / "model.zip")
    assert (loaded.loss, loaded.target_update_interval, loaded.engine) == ("mse", (3, "episode"), "eager")
    assert loaded.exploration_schedule(1.0) == 0.5


def test_settings_left_out_when_saving_have_their_defaults_when_loaded(tmp_path):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), loss="mse", verbose=2, engine="eager")
    model.save(tmp_path / "model.zip", exclude=["loss", "verbose"])
    loaded = ScratchDQN.load(tmp_path / "model.zip")
    assert (loaded.loss, loaded.verbose, loaded.engine) == ("huber", 0, "eager")


def test_loading_allocates_no_replay(tmp_path):
    ScratchDQN("MlpPolicy", TimeoutEnv(), buffer_size=10**12).save(tmp_path / "model.zip")
    assert len(ScratchDQN.load(tmp_path / "model.zip").replay_buffer.observations) == 0


# What SB3 takes


WHOLE = {
    "buffer_size": 500.0,
    "learning_starts": 1e1,
    "batch_size": np.float64(8),
    "train_freq": 4.0,
    "gradient_steps": 1.0,
    "n_steps": 2.0,
    "target_update_interval": 1e2,
    "stats_window_size": 50.0,
    "exploration_steps": 1e3,
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_floats_are_counts(name):
    settings = {"batch_size": 8, "buffer_size": 500, "learning_starts": 10, "seed": 0}
    floats, ints = (
        ScratchDQN("MlpPolicy", TimeoutEnv(), **{**settings, name: value}).learn(60.0, log_interval=2.0)
        for value in (WHOLE[name], int(WHOLE[name]))
    )
    assert getattr(floats, name) == getattr(ints, name)
    assert type(getattr(floats, name)) is type(getattr(ints, name))
    assert_same_training(floats, ints)


def test_whole_floats_in_a_unit_of_episodes():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), train_freq=(1.0, "episode"), target_update_interval=(2.0, "episode"))
    assert model.train_freq == TrainFreq(1, TrainFrequencyUnit.EPISODE)
    assert model.target_update_interval == (2, "episode")


@pytest.mark.parametrize(("verbose", "kept"), [(True, 1), (False, 0), (1.0, 1)])
def test_verbose_may_be_a_truth_value(verbose, kept, capsys):
    assert ScratchDQN("MlpPolicy", TimeoutEnv(), verbose=verbose).verbose == kept
    assert bool(capsys.readouterr().out) == bool(kept)


def test_models_of_sb3_with_floats_and_truth_values_are_converted():
    reference = DQN("MlpPolicy", TimeoutEnv(), learning_starts=1e1, target_update_interval=1e2, verbose=True)
    model = ScratchDQN.from_sb3(reference)
    assert (model.learning_starts, model.target_update_interval, model.verbose) == (10, 100, 1)


@pytest.mark.parametrize(
    ("theirs", "env", "name"),
    [
        (theirs.MlpPolicy, TimeoutEnv, "MlpPolicy"),
        (theirs.DQNPolicy, TimeoutEnv, "MlpPolicy"),
        (theirs.CnnPolicy, ImageEnv, "CnnPolicy"),
        (theirs.MultiInputPolicy, DictEnv, "MultiInputPolicy"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_policies_of_sb3_stand_for_their_counterparts(theirs, env, name):
    model = ScratchDQN(theirs, env())
    assert type(model.policy) is ScratchDQN.policy_aliases[name] is model.policy_class


FORMS = {
    "gamma": np.array(0.5),
    "tau": th.tensor(0.5),
    "max_grad_norm": np.float64(3),
    "batch_size": np.array(8),
    "exploration_fraction": Fraction(1, 2),
    "train_freq": (2, TrainFrequencyUnit.EPISODE),
    "policy_kwargs": MappingProxyType({"net_arch": np.array([8, 8])}),
    "replay_buffer_kwargs": UserDict({"prioritized": True}),
    "stats_window_size": None,
    "learning_rate": lambda progress: th.tensor(1e-3),
}


@pytest.mark.parametrize("name", FORMS)
def test_numbers_and_dicts_of_every_form_serve(name):
    settings = {"munchausen": True, "munchausen_kwargs": {"tau": Fraction(1, 10)}, "learning_starts": 8}
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **{**settings, name: FORMS[name]}).learn(60)
    assert model._n_updates > 0


def test_a_replay_buffer_of_the_users_may_know_nothing_of_steps():
    class Plain(ScratchReplayBuffer):
        def __init__(self, buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage):
            super().__init__(buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage)

    class Sampling(ReplayBuffer):
        sampler = "of another kind"

    for buffer_class in (Plain, Sampling):
        model = ScratchDQN("MlpPolicy", TimeoutEnv(), replay_buffer_class=buffer_class, learning_starts=8).learn(20)
        assert type(model.replay_buffer) is buffer_class


# Live edits


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_learning_rate_that_is_assigned_counts(engine):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0, engine=engine).learn(20)
    model.learning_rate = 5e-5
    model.learn(20, reset_num_timesteps=False)
    assert model.policy.optimizer.param_groups[0]["lr"] == 5e-5
    model.learning_rate = lambda progress: 1e-3 + progress
    model.learn(20)
    assert model.policy.optimizer.param_groups[0]["lr"] == 1e-3
    model.lr_schedule = lambda _: 0.25  # as scripts for SB3 do
    model.learn(20)
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.25


def test_settings_of_exploration_that_are_assigned_count():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), exploration_fraction=0.1).learn(60)
    assert model.exploration_rate == 0.05
    model.exploration_final_eps = 0.3
    model.learn(60)
    assert model.exploration_rate == 0.3
    model.exploration_schedule = "exponential"
    with pytest.raises(ValueError, match=r"exploration_steps=100 needs exploration_schedule='linear'"):
        model.exploration_steps = 100
    assert model.exploration_steps is None


EDITS = [
    ("batch_size", 0, "at least 1"),
    ("batch_size", 10**9, "must be at least batch_size=1000000000"),
    ("gamma", float("nan"), "between 0 and 1"),
    ("tau", 2, "between 0 and 1"),
    ("learning_rate", "fast", "at least 0"),
    ("learning_rate", lambda progress: float("nan"), "number of at least 0"),
    ("train_freq", "x", '(1, "episode")'),
    ("train_freq", 0, "at least 1"),
    ("gradient_steps", 0.5, "whole number"),
    ("learning_starts", -1, "at least 0"),
    ("target_update_interval", 0, "at least 1"),
    ("max_grad_norm", -1, "above 0"),
    ("exploration_final_eps", 1.5, "between 0 and 1"),
    ("exploration_schedule", 5, "choose one of"),
    ("loss", "l1", "choose one of"),
    ("engine", "warp", "choose one of"),
    ("double_q", "yes", "True or False"),
    ("munchausen", 1, "True or False"),
    ("munchausen_kwargs", {"tua": 1}, "unknown name 'tua'"),
    ("check_finite", "maybe", "'auto', True or False"),
    ("verbose", None, "at least 0"),
]


@pytest.mark.parametrize(("name", "value", "right"), EDITS)
def test_a_wrong_value_is_refused_when_it_is_assigned_and_the_old_one_stays(name, value, right):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0).learn(20)
    before = getattr(model, name)
    with pytest.raises(ValueError, match=name) as error:
        setattr(model, name, value)
    assert right in str(error.value)
    assert getattr(model, name) is before
    model.learn(20, reset_num_timesteps=False)


def test_an_assigned_train_freq_is_heeded():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0).learn(40)
    before = model._n_updates
    model.train_freq = 10
    model.learn(40, reset_num_timesteps=False)
    assert model._n_updates == before + 4


def test_the_check_of_numbers_can_be_switched_in_the_middle():
    class Edits(BaseCallback):
        def _on_step(self):
            if self.n_calls == 10:
                self.model.check_finite = False
            return True

    class Bad(TimeoutEnv):
        steps = 0

        def step(self, action):
            observation, reward, *rest = super().step(action)
            self.steps += 1
            return observation, float("nan") if self.steps == 15 else reward, *rest

    ScratchDQN("MlpPolicy", Bad(), learning_starts=0).learn(40, Edits())
    model = ScratchDQN("MlpPolicy", Bad(), learning_starts=0)
    with pytest.raises(ValueError, match="step 15"):
        model.learn(40)


def test_combinations_are_refused_when_they_are_assigned():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"head": "c51"}, n_steps=3)
    with pytest.raises(ValueError, match="loss='mse' cannot be combined with head='c51'"):
        model.loss = "mse"
    with pytest.raises(ValueError, match="munchausen=True cannot be combined with n_steps=3"):
        model.munchausen = True
    assert (model.loss, model.munchausen) == ("huber", False)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_empty_batch_is_refused_by_train(batch_size):
    model = ScratchDQN("MlpPolicy", TimeoutEnv()).learn(20)
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be a whole number of at least 1"):
        model.train(1, batch_size=batch_size)


# Progress


PAST_THE_END = {"learning_starts": 0, "train_freq": 256, "gradient_steps": 2, "buffer_size": 5000, "seed": 0}


@pytest.mark.parametrize("settings", [{}, {"engine": "eager", "double_q": True}])
def test_nothing_runs_past_the_end_of_its_schedule(settings):
    settings = {"learning_rate": lambda progress: 2.3e-3 * progress, **PAST_THE_END, **settings}
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), replay_buffer_kwargs={"prioritized": True}, **settings)
    model.learn(3000)
    assert model.num_timesteps > 3000
    assert model.policy.optimizer.param_groups[0]["lr"] == 0
    assert model.replay_buffer.sampler.beta_now == 1


def test_the_reference_keeps_the_schedule_of_sb3():
    settings = {"learning_rate": lambda progress: 2.3e-3 * progress, **PAST_THE_END}
    reference = DQN("MlpPolicy", TimeoutEnv(), **settings).learn(3000)
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), engine="eager", **settings).learn(3000)
    assert model.policy.optimizer.param_groups[0]["lr"] < 0
    assert_same_training(reference, model)


# Files


SETTINGS_OF_ALL = [name for name in inspect.signature(ScratchDQN).parameters if name not in ("policy", "env", "device")]


@pytest.mark.parametrize("with_env", [True, False])
@pytest.mark.parametrize("name", [name for name in SETTINGS_OF_ALL if name != "_init_setup_model"])
def test_a_setting_that_was_left_out_has_its_default(name, with_env, tmp_path):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), gamma=0.5).learn(20)
    model.save(tmp_path / "model.zip", exclude=[name])
    loaded = ScratchDQN.load(tmp_path / "model.zip", env=TimeoutEnv() if with_env else None)
    if name == "gamma":
        assert loaded.gamma == 0.99
    default = ScratchDQN("MlpPolicy", TimeoutEnv())
    if name not in ("train_freq", "learning_rate"):
        assert getattr(loaded, name) == getattr(default, name)
    if with_env:
        loaded.learn(20)


# Folders


@pytest.mark.parametrize("verbose", [0, 1])
def test_training_leaves_no_folder_behind(verbose, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("SB3_LOGDIR", raising=False)
    ScratchDQN("MlpPolicy", TimeoutEnv(), verbose=verbose).learn(20).learn(20, reset_num_timesteps=False)
    assert not list(tmp_path.iterdir())
    DQN("MlpPolicy", TimeoutEnv()).learn(20)
    assert list(tmp_path.iterdir()), "as SB3 does"


def test_folders_that_were_asked_for_are_made(tmp_path, monkeypatch):
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "logs"))
    ScratchDQN("MlpPolicy", TimeoutEnv()).learn(20)
    assert (tmp_path / "logs").is_dir()
    monkeypatch.delenv("SB3_LOGDIR")
    ScratchDQN("MlpPolicy", TimeoutEnv(), tensorboard_log=tmp_path / "board").learn(20, tb_log_name="run")
    assert (tmp_path / "board" / "run_1").is_dir()
