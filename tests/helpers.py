"""Small environments and bitwise comparisons of algorithms, for several tests."""

import random
from contextlib import contextmanager

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn


class TimeoutEnv(gym.Env):
    """Ends by termination or truncation, each at random; observations are random as well."""

    observation_space = gym.spaces.Box(-10, 10, (3,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action):
        coin = self.np_random.random()
        return self._observe(), float(self.np_random.normal() + action), coin < 0.05, 0.05 <= coin < 0.15, {}

    def _observe(self):
        return self.np_random.normal(size=3).astype(np.float32)


class DictEnv(TimeoutEnv):
    """TimeoutEnv with Dict observations: a vector, an image and a Discrete part."""

    observation_space = gym.spaces.Dict(
        {
            "vector": gym.spaces.Box(-10, 10, (3,), np.float32),
            "image": gym.spaces.Box(0, 255, (1, 36, 36), np.uint8),
            "number": gym.spaces.Discrete(4),
        }
    )

    def _observe(self):
        return {
            "vector": super()._observe(),
            "image": self.np_random.integers(0, 256, (1, 36, 36)).astype(np.uint8),
            "number": int(self.np_random.integers(4)),
        }


class RandomMasks:
    """Allows one or two of three actions, at random, and fails if another one is taken."""

    def draw_mask(self):
        self.mask = self.np_random.permutation([True, False, bool(self.np_random.integers(2))])
        return self.mask.astype(np.float32)

    def action_masks(self):
        return self.mask

    def step(self, action):
        assert self.mask[action], f"action {action} is not allowed by {self.mask}"
        return super().step(action)


class MaskedEnv(RandomMasks, TimeoutEnv):
    """TimeoutEnv whose observation is the mask."""

    def _observe(self):
        return self.draw_mask()


class MaskedDictEnv(RandomMasks, DictEnv):
    """DictEnv whose vector is the mask."""

    def _observe(self):
        return {**super()._observe(), "vector": self.draw_mask()}


class ImageEnv(TimeoutEnv):
    """TimeoutEnv with image observations, channels last."""

    observation_space = gym.spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def _observe(self):
        return self.np_random.integers(0, 256, (36, 36, 1)).astype(np.uint8)


class NormedExtractor(BaseFeaturesExtractor):
    """A features extractor with batch normalisation and dropout, which depend on the training mode."""

    def __init__(self, observation_space, features_dim=16):
        super().__init__(observation_space, features_dim)
        self.net = nn.Sequential(
            nn.Linear(observation_space.shape[0], features_dim), nn.BatchNorm1d(features_dim), nn.Dropout(0.2)
        )

    def forward(self, observations):
        return self.net(observations)


def normalized(make_env, **kwargs):
    """Return an environment with VecNormalize, by default of observations and rewards."""
    return VecNormalize(DummyVecEnv([make_env]), **kwargs)


class CoinPerEnvDQN(DQN):
    """SB3's DQN with a documented departure: exploration is decided for each environment separately."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        greedy, state = self.policy.predict(observation, state, episode_start, deterministic)
        if deterministic:
            return greedy, state
        coins = [np.random.rand() for _ in greedy]
        return np.array(
            [
                self.action_space.sample() if coin < self.exploration_rate else a
                for coin, a in zip(coins, greedy, strict=True)
            ]
        ), state


@contextmanager
def ending_last_trajectory(model):
    """Mark the last transition as the end of its trajectory while SB3 trains, because its environment will be reset.

    A documented departure: in SB3, n-step returns continue in the next episode, and with ``optimize_memory_usage``, the
    next observation is the first one of the next episode.
    """
    buffer, newest = model.replay_buffer, model.replay_buffer.pos - 1
    several_steps = isinstance(buffer, NStepReplayBuffer)
    if several_steps:
        timeouts = buffer.timeouts[newest].copy()
        buffer.timeouts[newest] = 1 - buffer.dones[newest]
    elif type(buffer) is ReplayBuffer and buffer.optimize_memory_usage:
        buffer.dones[newest] = 1
    yield
    if several_steps:
        buffer.timeouts[newest] = timeouts


def parity_settings(algorithm):
    """Return the settings with which an algorithm equals SB3's DQN bit for bit."""
    return {} if issubclass(algorithm, DQN) else {"engine": "eager"}


def random_states():
    """Return every global random state that training uses."""
    return {"python": random.getstate(), "numpy": np.random.get_state()[1:], "torch": th.get_rng_state()}


def assert_equal(left, right, where="value"):
    """Compare nested containers of arrays, tensors and numbers bit for bit."""
    if isinstance(left, th.Tensor):
        left, right = left.detach().cpu().numpy(), right.detach().cpu().numpy()
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype, where
        assert left.shape == right.shape, where
        assert left.tobytes() == right.tobytes(), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key, value in left.items():
            assert_equal(value, right[key], f"{where}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, value in enumerate(left):
            assert_equal(value, right[index], f"{where}[{index}]")
    else:
        both_are_nan = left != left and right != right
        assert left == right or both_are_nan, where


def replay_contents(buffer):
    """Return the filled part of a replay buffer, SB3's or ours."""
    rows = buffer.buffer_size if buffer.full else min(buffer.pos + buffer.optimize_memory_usage, buffer.buffer_size)
    names = ["observations", "actions", "rewards", "dones", "timeouts"]
    if not buffer.optimize_memory_usage:
        names.append("next_observations")
    contents = {"pos": buffer.pos, "full": buffer.full}
    for name in names:
        array = getattr(buffer, name)
        contents[name] = (
            {key: np.array(value[:rows]) for key, value in array.items()}
            if isinstance(array, dict)
            else np.array(array[:rows])
        )
    return contents


# Logged values that SB3's DQN does not have
OWN_LOG_KEYS = {"train/q_mean", "train/target_mean", "train/td_error", "train/grad_norm"}


def full_state(model):
    """Return all state of an algorithm that training changes."""
    return {
        "parameters": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "replay": replay_contents(model.replay_buffer),
        "exploration_rate": model.exploration_rate,
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "n_calls": model._n_calls,
        "episodes": model._episode_num,
        "last_obs": model._last_obs,
        "action_space": model.action_space.np_random.bit_generator.state,
        "logged": {
            name: value
            for name, value in model.logger.name_to_value.items()
            if not name.startswith("time/") and name not in OWN_LOG_KEYS
        },
    }


def assert_same_training(reference, model):
    """Compare the state of two algorithms bit for bit."""
    assert_equal(full_state(reference), full_state(model))
