"""Conversion of a DQN of SB3 to a ScratchDQN and back changes neither predictions nor training."""

import random

import numpy as np
import pytest
import torch as th
from configurations import CONFIGURATIONS, SMALL, trained
from helpers import (
    DictEnv,
    TimeoutEnv,
    assert_equal,
    assert_same_training,
    ending_last_trajectory,
    normalized,
    random_states,
    replay_contents,
)
from stable_baselines3 import DQN, PPO, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.dqn.policies import DQNPolicy as ReferencePolicy

from sb3_scratch_dqn import ScratchDQN, ScratchReplayBuffer

NAMES = ["small buffer", "n-step", "dict", "hindsight", "observations once", "images", "schedules and optimiser"]


def pickled(model):
    """Return the arguments with which each algorithm loads a replay buffer that SB3 saved."""
    return {"allow_pickle": True} if isinstance(model, ScratchDQN) else {}


def set_random_states(states):
    random.setstate(states["python"])
    np.random.set_state(("MT19937", *states["numpy"]))
    th.set_rng_state(states["torch"])


def go_on(model, make_env, states):
    """Continue training, from given random states, in a new environment."""
    model.set_env(make_env())
    model.set_random_seed(5)
    if isinstance(model.replay_buffer, HerReplayBuffer):
        model.replay_buffer.env = model.env
    set_random_states(states)
    with ending_last_trajectory(model):
        model.learn(100, reset_num_timesteps=False)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_goes_on_after_from_sb3_as_it_would_have(name):
    reference, states = trained(DQN, *CONFIGURATIONS[name])
    converted = ScratchDQN.from_sb3(reference, engine="eager")

    assert_equal(states, random_states())
    assert_equal(reference.get_parameters(), converted.get_parameters())
    assert_equal(replay_contents(reference.replay_buffer), replay_contents(converted.replay_buffer))
    assert converted.env is reference.env
    make_env = CONFIGURATIONS[name][1]
    assert_same_training(go_on(reference, make_env, states), go_on(converted, make_env, states))
    assert converted._n_updates > 30


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_goes_on_after_to_sb3_as_it_would_have(name):
    model, states = trained(ScratchDQN, *CONFIGURATIONS[name])
    converted = model.to_sb3()

    assert type(converted) is DQN
    assert_equal(states, random_states())
    assert_equal(replay_contents(model.replay_buffer), replay_contents(converted.replay_buffer))
    make_env = CONFIGURATIONS[name][1]
    assert_same_training(go_on(model, make_env, states), go_on(converted, make_env, states))


def test_a_saved_model_goes_on_after_from_sb3_as_it_would_have(tmp_path):
    reference, states = trained(DQN, "MlpPolicy", lambda: normalized(TimeoutEnv), 300, SMALL)
    reference.save(tmp_path / "dqn.zip")
    reference.save_replay_buffer(tmp_path / "replay.pkl")

    env = normalized(TimeoutEnv)
    loaded = DQN.load(tmp_path / "dqn.zip", env=env)
    converted = ScratchDQN.from_sb3(tmp_path / "dqn", env=env, engine="eager")
    for model in (loaded, converted):
        model.load_replay_buffer(tmp_path / "replay.pkl", **pickled(model))
    observations = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    assert_equal(loaded.predict(observations, deterministic=True), converted.predict(observations, deterministic=True))

    def make_env():
        return normalized(TimeoutEnv)

    assert_same_training(go_on(loaded, make_env, states), go_on(converted, make_env, states))


def test_a_model_without_environment_is_converted_for_prediction(tmp_path):
    trained(DQN, "MlpPolicy", TimeoutEnv, 200, SMALL)[0].save(tmp_path / "dqn.zip")
    converted = ScratchDQN.from_sb3(tmp_path / "dqn.zip", engine="eager")
    assert converted.env is None
    observation = np.ones(3, dtype=np.float32)
    expected = DQN.load(tmp_path / "dqn.zip").predict(observation, deterministic=True)
    assert_equal(expected, converted.predict(observation, deterministic=True))
    assert_equal(expected, converted.to_sb3().predict(observation, deterministic=True))


def test_the_copies_are_independent():
    reference, _ = trained(DQN, "MlpPolicy", TimeoutEnv, 200, SMALL)
    converted = ScratchDQN.from_sb3(reference, engine="eager")
    before = replay_contents(reference.replay_buffer)
    converted.learn(100, reset_num_timesteps=False)
    assert_equal(before, replay_contents(reference.replay_buffer))
    assert isinstance(converted.replay_buffer, ScratchReplayBuffer)
    assert reference.num_timesteps == 200


def test_settings_can_change_on_the_way():
    reference, _ = trained(DQN, "MlpPolicy", TimeoutEnv, 60, SMALL)
    assert ScratchDQN.from_sb3(reference, loss="mse", gamma=0.5).loss == "mse"


def test_to_sb3_warns_of_what_sb3_cannot_do():
    model = ScratchDQN(
        "MlpPolicy",
        TimeoutEnv(),
        loss="mse",
        exploration_schedule="exponential",
        target_update_interval=(10, "episode"),
    )
    with pytest.warns(UserWarning, match=r"no loss='mse', exploration_schedule='exponential', target_update_interval="):
        converted = model.to_sb3()
    assert converted.target_update_interval == 10_000


def test_what_has_no_counterpart_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a DQN of Stable-Baselines3"):
        ScratchDQN.from_sb3(PPO("MlpPolicy", TimeoutEnv(), n_steps=64, device="cpu"))

    PPO("MlpPolicy", TimeoutEnv(), n_steps=64, device="cpu").save(tmp_path / "ppo.zip")
    with pytest.raises(ValueError, match=r"ppo.zip'\) must be a file saved by DQN of Stable-Baselines3"):
        ScratchDQN.from_sb3(tmp_path / "ppo.zip")

    class MyPolicy(ReferencePolicy):
        pass

    with pytest.raises(ValueError, match="policy=MyPolicy cannot be converted"):
        ScratchDQN.from_sb3(DQN(MyPolicy, TimeoutEnv()))

    class MyBuffer(ScratchReplayBuffer):
        pass

    with pytest.raises(ValueError, match="replay_buffer_class=MyBuffer has no counterpart"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), replay_buffer_class=MyBuffer).to_sb3()
    once = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    with pytest.raises(ValueError, match="optimize_memory_usage=True with Dict observations has no counterpart"):
        ScratchDQN("MultiInputPolicy", DictEnv(), **once).to_sb3()
    with pytest.raises(ValueError, match="n_steps=3 with observations that are stored once has no counterpart"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), n_steps=3, **once).to_sb3()
    with pytest.raises(ValueError, match="n_steps=3 with Dict observations has no counterpart"):
        ScratchDQN("MultiInputPolicy", DictEnv(), n_steps=3).to_sb3()


@pytest.mark.parametrize("other_size", [60, 2000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        {"n_steps": 3},
    ],
)
def test_a_replay_that_was_loaded_is_converted_as_it_is(other_size, settings, tmp_path):
    models = []
    for algorithm in (DQN, ScratchDQN):
        filled, _ = trained(algorithm, "MlpPolicy", TimeoutEnv, 100, {**SMALL, "buffer_size": other_size, **settings})
        filled.save_replay_buffer(tmp_path / "replay.pkl")
        model, states = trained(algorithm, "MlpPolicy", TimeoutEnv, 100, {**SMALL, "buffer_size": 300})
        model.load_replay_buffer(tmp_path / "replay.pkl", **pickled(model))
        converted = ScratchDQN.from_sb3(model, engine="eager") if algorithm is DQN else model.to_sb3()
        assert converted.replay_buffer.buffer_size == other_size
        assert_equal(replay_contents(model.replay_buffer), replay_contents(converted.replay_buffer))
        models.append((model, converted, states))
    reference, converted, states = models[0]
    assert_same_training(go_on(reference, TimeoutEnv, states), go_on(converted, TimeoutEnv, states))


@pytest.mark.parametrize(
    "settings",
    [
        {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 4, "gamma": 0.5}},
        {"replay_buffer_class": NStepReplayBuffer, "gamma": 0.8},
        {"replay_buffer_class": NStepReplayBuffer, "gamma": 0.99},
    ],
)
def test_a_buffer_that_was_chosen_samples_as_it_did(settings):
    reference, states = trained(DQN, "MlpPolicy", TimeoutEnv, 200, {**SMALL, **settings})
    converted = ScratchDQN.from_sb3(reference, engine="eager")
    assert_same_training(go_on(reference, TimeoutEnv, states), go_on(converted, TimeoutEnv, states))


def test_n_steps_that_sb3_ignores_are_ignored():
    settings = {**SMALL, "replay_buffer_class": ReplayBuffer, "n_steps": 3}
    with pytest.warns(UserWarning, match="is ignored"):
        reference, states = trained(DQN, "MlpPolicy", TimeoutEnv, 200, settings)
    converted = ScratchDQN.from_sb3(reference, engine="eager")
    assert_same_training(go_on(reference, TimeoutEnv, states), go_on(converted, TimeoutEnv, states))


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"los": "mse"}, "los='mse'"), ({"buffer_size": 40}, "buffer_size=40"), ({"policy": 1}, "policy=1")],
)
def test_settings_that_cannot_change_on_the_way_are_refused(settings, what):
    with pytest.raises(ValueError, match=f"{what} is not a setting that from_sb3 can change"):
        ScratchDQN.from_sb3(DQN("MlpPolicy", TimeoutEnv()), **settings)


def test_an_optimiser_that_the_policy_was_not_made_with_is_refused():
    reference = DQN("MlpPolicy", TimeoutEnv())
    reference.policy.optimizer = th.optim.SGD(reference.q_net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"policy\.optimizer=SGD cannot be converted"):
        ScratchDQN.from_sb3(reference)
