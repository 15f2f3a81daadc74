"""Settings are attributes, and count when a model is loaded with new ones, as RL Zoo loads it."""

import inspect

import numpy as np
import pytest
from helpers import TimeoutEnv
from stable_baselines3 import DQN
from stable_baselines3.common.utils import ConstantSchedule

from sb3_scratch_dqn import ScratchDQN


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
