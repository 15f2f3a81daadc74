"""Training with stacked frames: which wrappers are detected, and that storing frames once changes no result."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import FrameStackObservation
from helpers import assert_equal, assert_same_training, replay_contents
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from stacked_frames import SPACES, STACKERS, FrameEnv, gym_frame_stack, make_buffers, vec_frame_stack, zero_padded

from sb3_scratch_dqn import ScratchDQN, ScratchReplayBuffer
from sb3_scratch_dqn.algorithm.stacking import find_stacking
from sb3_scratch_dqn.replay import NotStackedError, StackedFrames, Stacking


def test_stacking_of_wrappers_is_detected():
    assert find_stacking(vec_frame_stack("vector", 2, 3)) == Stacking(3, -1, "zero")
    assert find_stacking(vec_frame_stack("channels last", 2, 3)) == Stacking(3, -1, "zero")
    assert find_stacking(vec_frame_stack("dict", 2, 3)) == Stacking(3, {"vector": -1, "image": 0}, "zero")
    assert find_stacking(VecNormalize(vec_frame_stack("vector", 2, 3))) == Stacking(3, -1, "zero")
    assert find_stacking(gym_frame_stack("dict", 2, 3)) == Stacking(3, {"vector": 0, "image": 0}, "first")
    assert find_stacking(zero_padded("image", 1, 2)) == Stacking(2, 0, "zero")
    custom = np.ones(2, np.float32)
    assert find_stacking(gym_frame_stack("vector", 2, 3, custom)) is None
    assert find_stacking(DummyVecEnv([lambda: FrameEnv("vector")])) is None


def make_stacked_frame_env():
    return FrameStackObservation(FrameEnv("vector"), 3)


def test_wrappers_are_detected_in_other_processes():
    env = SubprocVecEnv([make_stacked_frame_env] * 2, start_method="spawn")
    try:
        assert find_stacking(env) == Stacking(3, 0, "first")
    finally:
        env.close()


@pytest.mark.parametrize("stacker", [*sorted(STACKERS), "normalized"])
def test_training_equals_sb3_bit_for_bit(stacker):
    def make_env():
        if stacker == "normalized":
            return VecNormalize(vec_frame_stack("vector", 1, 3))
        return STACKERS[stacker]("vector", 1, 3)

    settings = {"learning_starts": 40, "batch_size": 16, "buffer_size": 150, "seed": 7, "n_steps": 2}
    reference = DQN("MlpPolicy", make_env(), **settings).learn(400)
    model = ScratchDQN("MlpPolicy", make_env(), **settings, engine="eager").learn(400)
    assert isinstance(model.replay_buffer.store.obs_store, StackedFrames)
    assert_same_training(reference, model)


@pytest.mark.parametrize("name", ["image", "dict"])
def test_image_policies_train_alike_with_frames_stored_once_or_in_full(name):
    models = []
    for frames in (True, False):
        model = ScratchDQN(
            "MultiInputPolicy" if name == "dict" else "CnnPolicy",
            VecFrameStack(DummyVecEnv([lambda: FrameEnv(name)] * 2), 4),
            learning_starts=20,
            buffer_size=60,
            batch_size=8,
            seed=3,
            replay_buffer_kwargs={"frames": frames, "prioritized": True},
        )
        models.append(model.learn(120))
        assert isinstance(model.replay_buffer.store.obs_store, StackedFrames) == frames
    assert_same_training(*models)


def test_frames_stay_stacks_over_several_trainings():
    model = ScratchDQN("MlpPolicy", vec_frame_stack("vector", 2, 3), seed=0, buffer_size=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(101)
        model.learn(101)
        model.learn(100, reset_num_timesteps=False)
    assert isinstance(model.replay_buffer.store.obs_store, StackedFrames)


def test_an_empty_buffer_of_sb3_becomes_one_that_stores_frames_once():
    model = ScratchDQN.from_sb3(DQN("MlpPolicy", vec_frame_stack("vector", 2, 3), buffer_size=100, learning_starts=50))
    assert isinstance(model.replay_buffer.store.obs_store, StackedFrames)
    model.learn(20)


def test_conversion_to_sb3_stores_observations_in_full():
    model = ScratchDQN("MlpPolicy", vec_frame_stack("vector", 2, 3), buffer_size=100, seed=0).learn(150)
    reference = model.to_sb3()
    assert type(reference.replay_buffer) is ReplayBuffer
    assert_equal(replay_contents(model.replay_buffer), replay_contents(reference.replay_buffer))
    again = ScratchDQN.from_sb3(reference)
    assert_equal(replay_contents(model.replay_buffer), replay_contents(again.replay_buffer))
    again.learn(20, reset_num_timesteps=False)


def test_environments_without_env_is_wrapped_are_supported():
    class NoObjects(DummyVecEnv):
        def env_is_wrapped(self, wrapper_class, indices=None):
            raise NotImplementedError

    env = NoObjects([lambda: FrameEnv("vector")])
    assert find_stacking(env) is None
    ScratchDQN("MlpPolicy", env)


def test_invalid_frame_settings_raise():
    with pytest.raises(ValueError, match=r"frames=True needs an env that stacks its frames"):
        ScratchDQN("MlpPolicy", "CartPole-v1", replay_buffer_kwargs={"frames": True})
    with pytest.raises(ValueError, match=r"frames='yes' must be 'auto', True or False"):
        ScratchDQN("MlpPolicy", "CartPole-v1", replay_buffer_kwargs={"frames": "yes"})
    with pytest.raises(NotStackedError, match="axis 0 has length 2, which is not a multiple of n_stack=3"):
        ScratchReplayBuffer(9, SPACES["vector"], gym.spaces.Discrete(2), stacking=Stacking(3, -1, "zero"))
    with pytest.raises(ValueError, match="cannot be replaced"):
        make_buffers(vec_frame_stack("vector", 1, 3), 9)[0].observations = np.zeros(3)
    kwargs = {"handle_timeout_termination": False, "frames": True}
    with pytest.raises(ValueError, match="optimize_memory_usage=True needs frames=False"):
        ScratchDQN(
            "MlpPolicy", vec_frame_stack("vector", 1, 3), optimize_memory_usage=True, replay_buffer_kwargs=kwargs
        )
