"""Environments with stacked frames, and buffers that store them once or in full."""

import copy

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import FrameStackObservation
from helpers import assert_equal
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

from sb3_scratch_dqn import ScratchReplayBuffer
from sb3_scratch_dqn.algorithm.stacking import find_stacking

SPACES = {
    "vector": gym.spaces.Box(-1, 1, (2,), np.float32),
    "channels last": gym.spaces.Box(0, 255, (3, 4, 2), np.uint8),
    "channels first": gym.spaces.Box(0, 255, (1, 40, 36), np.uint8),
    "image": gym.spaces.Box(0, 255, (40, 36, 1), np.uint8),
    "flat image": gym.spaces.Box(0, 255, (5, 4), np.uint8),
}
SPACES["dict"] = gym.spaces.Dict({"vector": SPACES["vector"], "image": SPACES["image"]})


class FrameEnv(gym.Env):
    """Random frames, some of them zero; a tenth of the steps terminate the episode, a tenth truncate it."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, name):
        self.observation_space = SPACES[name]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(self.observation_space), {}

    def step(self, action):
        coin = self.np_random.random()
        return (
            self._observe(self.observation_space),
            float(self.np_random.normal() + action),
            coin < 0.1,
            0.1 <= coin < 0.2,
            {},
        )

    def _observe(self, space):
        if isinstance(space, gym.spaces.Dict):
            return {key: self._observe(part) for key, part in space.spaces.items()}
        if self.np_random.random() < 0.2:
            return np.zeros(space.shape, space.dtype) * (-1 if space.dtype == np.float32 else 1)
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 3, space.shape).astype(np.uint8)
        return self.np_random.normal(size=space.shape).astype(np.float32)


def transposed(env):
    return VecTransposeImage(env)


def vec_frame_stack(name, n_envs, k):
    env = VecFrameStack(DummyVecEnv([lambda: FrameEnv(name)] * n_envs), k)
    return transposed(env) if name in ("image", "dict") else env


def gym_frame_stack(name, n_envs, k, padding="reset"):
    return DummyVecEnv([lambda: FrameStackObservation(FrameEnv(name), k, padding_type=padding)] * n_envs)


def zero_padded(name, n_envs, k):
    return gym_frame_stack(name, n_envs, k, "zero")


STACKERS = {"VecFrameStack": vec_frame_stack, "gymnasium": gym_frame_stack, "gymnasium zeros": zero_padded}


def transitions(env, steps, seed=0):
    """Yield what an algorithm adds to its buffer: at the end of an episode, next_obs is its last observation."""
    rng = np.random.default_rng(seed)
    env.seed(seed)
    obs = copy.deepcopy(env.reset())
    for _ in range(steps):
        action = rng.integers(0, 3, env.num_envs)
        new_obs, reward, done, infos = env.step(action)
        next_obs = copy.deepcopy(new_obs)
        for index in np.flatnonzero(done):
            last = infos[index]["terminal_observation"]
            for key in last if isinstance(last, dict) else [None]:
                if key is None:
                    next_obs[index] = last
                else:
                    next_obs[key][index] = last[key]
        yield obs, next_obs, action, reward, done, [dict(info) for info in infos]
        obs = copy.deepcopy(new_obs)


def make_buffers(env, capacity, **kwargs):
    """Return a buffer that stores each frame once, and one that stores observations in full."""
    stacking = find_stacking(env)
    assert stacking is not None
    return [
        ScratchReplayBuffer(
            capacity * env.num_envs,
            env.observation_space,
            env.action_space,
            device="cpu",
            n_envs=env.num_envs,
            stacking=frames,
            **kwargs,
        )
        for frames in (stacking, None)
    ]


def add_all(buffer, steps):
    for step in steps:
        buffer.add(*step)


def assert_same_batches(frames, dense, size=16, seed=0):
    batches = []
    for buffer in (frames, dense):
        np.random.seed(seed)
        batches.append(buffer.sample_batch(size)._asdict())
    assert_equal(*batches)
    return batches[0]
