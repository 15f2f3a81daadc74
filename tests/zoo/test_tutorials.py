"""The presets of the two tutorials have the tutorials' settings."""

import math

import pytest
import yaml
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
from zoo_settings import parse_settings

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.zoo.registration import hyperparams_folder

STOP = "stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes"


@pytest.fixture
def presets():
    return yaml.safe_load((hyperparams_folder() / "tutorials.yml").read_text())


def test_cartpole(presets):
    settings, rest = parse_settings(presets["CartPole-v1"])
    model = ScratchDQN(env="CartPole-v1", **settings)
    assert [layer.out_features for layer in model.q_net.q_net if hasattr(layer, "out_features")] == [24, 24, 2]
    assert model.buffer_size == 50_000
    assert model.batch_size == 64
    assert type(model.policy.optimizer).__name__ == "Adam"
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.001
    assert model.gamma == 0.99
    assert model.loss == "mse"
    assert model.max_grad_norm == math.inf
    assert model.exploration_schedule == "exponential"
    assert (model.exploration_initial_eps, model.exploration_decay, model.exploration_final_eps) == (1.0, 0.995, 0.01)
    assert model.target_update_interval == (10, "episode")
    assert (model.train_freq.frequency, model.train_freq.unit.value, model.gradient_steps) == (1, "step", 1)
    assert model.tau == 1
    assert model.n_steps == 1
    # The first update is made when the replay buffer holds a batch
    assert model.learning_starts + 1 == model.batch_size
    assert model.replay_buffer.handle_timeout_termination is False
    assert rest == {"n_timesteps": 500 * 500, "callback": [{STOP: {"max_episodes": 500}}]}


def test_lunar_lander(presets):
    settings, rest = parse_settings(presets["LunarLander-v3"])
    model = ScratchDQN(env="LunarLander-v3", **settings)
    assert [layer.out_features for layer in model.q_net.q_net if hasattr(layer, "out_features")] == [128, 128, 4]
    assert model.buffer_size == 10_000
    assert model.batch_size == 64
    assert type(model.policy.optimizer).__name__ == "Adam"
    assert model.policy.optimizer.param_groups[0]["lr"] == 1e-3
    assert model.gamma == 0.99
    assert model.loss == "mse"
    assert model.max_grad_norm == math.inf
    assert (model.exploration_initial_eps, model.exploration_final_eps) == (0, 0)
    assert model.target_update_interval == 1000
    assert (model.train_freq.frequency, model.train_freq.unit.value, model.gradient_steps) == (1, "step", 1)
    assert model.learning_starts + 1 == model.batch_size
    assert model.replay_buffer.handle_timeout_termination is True
    assert rest == {
        "n_timesteps": 1000 * 1000,
        "callback": [{STOP: {"max_episodes": 1000}}],
        "search_space": {
            "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
            "gamma": {"low": 0.9, "high": 0.999},
            "batch_size": [32, 64, 128],
            "target_update_interval": [500, 1000, 2000],
        },
    }


def test_the_first_update_uses_the_first_full_batch_and_training_stops_after_the_episodes(presets):
    settings, _ = parse_settings(presets["CartPole-v1"])
    model = ScratchDQN(env="CartPole-v1", seed=0, **settings)
    assert model.learn(63)._n_updates == 0
    assert model.learn(64)._n_updates == 1
    model.learn(10_000, StopTrainingOnMaxEpisodes(5))
    assert model._episode_num == 4  # the callback stops training before the last episode is counted
    assert model.exploration_rate == 0.995**4
