"""Environments that fail."""

import sys
from pathlib import Path

import gymnasium as gym
import pytest
from joblib.externals.loky import get_reusable_executor

MODULE = """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Raises(CartPoleEnv):
    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps > 100:
            raise RuntimeError("out of luck")
        return super().step(action)

class ExitsProcess(Raises):
    def step(self, action):
        import os
        print("the last words", flush=True)
        os._exit(7)

class Infinite(CartPoleEnv):
    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, -float("inf"), terminated, truncated, info

gym.register("Raises-v0", Raises)
gym.register("Infinite-v0", Infinite)
gym.register("Some/Where-v0", CartPoleEnv)
gym.register("Some-Where-v0", CartPoleEnv)
gym.register("ExitsProcess-v0", ExitsProcess)
"""

SETTINGS = """
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


@pytest.fixture
def bad_environments(tmp_path, monkeypatch):
    """The name of a module that registers environments: failing ones, and two that share a folder of results."""
    Path(tmp_path, "bad_environments.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    get_reusable_executor().shutdown()  # its workers keep the environment variables of their start
    registered = set(gym.registry)
    yield "bad_environments"
    sys.modules.pop("bad_environments", None)
    for name in set(gym.registry) - registered:
        del gym.registry[name]


@pytest.fixture
def bad_settings(tmp_path):
    """The path of a settings file: some environments stop early, lack a setting or have one too many."""
    path = tmp_path / "settings.yml"
    path.write_text(SETTINGS)
    return path
