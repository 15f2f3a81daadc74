"""Configurations that the fused engine supports without autograd, and models for its tests."""

import numpy as np
from gymnasium import spaces
from helpers import ImageEnv, TimeoutEnv, normalized
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_scratch_dqn import ScratchDQN


class DiscreteEnv(TimeoutEnv):
    observation_space = spaces.Discrete(5)

    def _observe(self):
        return int(self.np_random.integers(5))


class MatrixEnv(TimeoutEnv):
    """Observations with two axes, in float64."""

    observation_space = spaces.Box(-10, 10, (2, 3), np.float64)

    def _observe(self):
        return self.np_random.normal(size=(2, 3))


class VectorsEnv(TimeoutEnv):
    """A Dict of Box, Discrete, MultiDiscrete and MultiBinary."""

    observation_space = spaces.Dict(
        {
            "vector": spaces.Box(-10, 10, (2,), np.float32),
            "number": spaces.Discrete(4),
            "numbers": spaces.MultiDiscrete([2, 3]),
            "bits": spaces.MultiBinary(2),
        }
    )

    def _observe(self):
        self.observation_space.seed(int(self.np_random.integers(1000)))
        return self.observation_space.sample()


class MaskedEnv(TimeoutEnv):
    def action_masks(self):
        return np.array([True, False, True])


class LargerImageEnv(ImageEnv):
    observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)

    def _observe(self):
        return self.np_random.integers(0, 256, (36, 36, 3)).astype(np.uint8)


def net(*widths, **kwargs):
    return {"net_arch": list(widths), **kwargs}


C51 = {"head": "c51", "head_kwargs": {"n_atoms": 11, "v_min": -5.0, "v_max": 10.0}}
QUANTILE = {"head": "quantile", "head_kwargs": {"n_quantiles": 7}}
PER = {"replay_buffer_kwargs": {"prioritized": True}}

# Name -> environment, settings, policy_kwargs
CASES = {
    "defaults": (TimeoutEnv, {}, {}),
    "double": (TimeoutEnv, {"double_q": True}, {}),
    "mse": (TimeoutEnv, {"loss": "mse"}, {}),
    "dueling": (TimeoutEnv, {}, net(32, 16, dueling=True)),
    "dueling with one layer": (TimeoutEnv, {}, net(32, dueling=True)),
    "dueling without hidden layers": (TimeoutEnv, {}, net(dueling=True)),
    "noisy": (TimeoutEnv, {}, net(16, 16, noisy=True)),
    "noisy, few rows": (TimeoutEnv, {"batch_size": 8}, net(16, noisy=True)),
    "n-step": (TimeoutEnv, {"n_steps": 3}, {}),
    "prioritized": (TimeoutEnv, PER, {}),
    "prioritized double mse": (TimeoutEnv, {**PER, "double_q": True, "loss": "mse"}, {}),
    "tanh": (TimeoutEnv, {}, net(20, 30, activation_fn=nn.Tanh)),
    "odd shapes": (TimeoutEnv, {"batch_size": 13}, net(17, 9, 5)),
    "no hidden layers": (TimeoutEnv, {}, net()),
    "large": (TimeoutEnv, {"batch_size": 128, "learning_rate": 1e-3}, net(256, 256)),
    "large tanh double": (TimeoutEnv, {"batch_size": 100, "double_q": True}, net(200, 150, 50, activation_fn=nn.Tanh)),
    "weight decay": (TimeoutEnv, {}, {"optimizer_kwargs": {"weight_decay": 0.1, "eps": 1e-4, "betas": (0.8, 0.99)}}),
    "clipped": (TimeoutEnv, {"max_grad_norm": 0.05}, {}),
    "soft targets": (TimeoutEnv, {"tau": 0.1}, {}),
    "several environments": (lambda: make_vec_env(TimeoutEnv, n_envs=3, seed=0), {}, {}),
    "normalized": (lambda: normalized(TimeoutEnv), {}, {}),
    "discrete": (DiscreteEnv, {}, {}),
    "images": (ImageEnv, {}, net(16)),
    "matrix": (MatrixEnv, {}, {}),
    "dict": (VectorsEnv, {}, {}),
    "dict quantiles": (VectorsEnv, {"double_q": True}, QUANTILE),
    "masks": (MaskedEnv, {"double_q": True}, {}),
    "masked quantiles": (MaskedEnv, {}, QUANTILE),
    "c51": (TimeoutEnv, {}, C51),
    "quantile": (TimeoutEnv, {"double_q": True}, QUANTILE),
    "quantile mse": (TimeoutEnv, {"loss": "mse"}, QUANTILE),
    "munchausen": (TimeoutEnv, {"munchausen": True}, {}),
    "munchausen double": (TimeoutEnv, {"munchausen": True, "double_q": True}, {}),
    "rainbow": (TimeoutEnv, {**PER, "double_q": True, "n_steps": 3}, net(24, 24, dueling=True, noisy=True, **C51)),
}

SETTINGS = {
    "learning_rate": 3e-3,
    "learning_starts": 40,
    "buffer_size": 500,
    "batch_size": 32,
    "train_freq": 4,
    "seed": 0,
}


def make(name, engine, **more):
    make_env, settings, policy_kwargs = CASES[name]
    # Where a gradient is nearly 0, Adam scales rounding errors up to the learning rate, unless eps is larger
    policy_kwargs = {"optimizer_kwargs": {"eps": 1e-4}, **policy_kwargs}
    settings = {**SETTINGS, **settings, **more}
    policy = "MultiInputPolicy" if make_env is VectorsEnv else "MlpPolicy"
    return ScratchDQN(policy, make_env(), engine=engine, policy_kwargs=policy_kwargs, **settings)
