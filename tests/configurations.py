"""Configurations in which ScratchDQN must equal SB3's DQN bit for bit, and settings that other tests share."""

import gymnasium as gym
import torch as th
from helpers import (
    DictEnv,
    ImageEnv,
    NormedExtractor,
    TimeoutEnv,
    normalized,
    parity_settings,
    random_states,
)
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

SMALL = {"learning_starts": 40, "batch_size": 16, "target_update_interval": 50, "seed": 7}


def goal_env():
    return gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=4, continuous=False), 8)


# name: (policy, environment, steps, settings)
CONFIGURATIONS = {
    "defaults": ("MlpPolicy", lambda: "CartPole-v1", 1000, {"seed": 1}),
    "lunar lander": (
        "MlpPolicy",
        lambda: "LunarLander-v3",
        600,
        {
            "seed": 2,
            "learning_starts": 0,
            "batch_size": 128,
            "gradient_steps": -1,
            "policy_kwargs": {"net_arch": [256, 256]},
        },
    ),
    "many gradient steps": (
        "MlpPolicy",
        lambda: "CartPole-v1",
        600,
        {**SMALL, "train_freq": 64, "gradient_steps": 32, "target_update_interval": 10},
    ),
    "soft targets": ("MlpPolicy", lambda: "CartPole-v1", 400, {**SMALL, "tau": 0.05, "target_update_interval": 1}),
    "episodes": (
        "MlpPolicy",
        lambda: "CartPole-v1",
        400,
        {**SMALL, "train_freq": (2, "episode"), "gradient_steps": -1},
    ),
    "no gradient steps": ("MlpPolicy", lambda: "CartPole-v1", 100, {**SMALL, "gradient_steps": 0}),
    "small buffer": ("MlpPolicy", TimeoutEnv, 400, {**SMALL, "buffer_size": 70}),
    "n-step": ("MlpPolicy", TimeoutEnv, 400, {**SMALL, "n_steps": 3, "buffer_size": 150, "gamma": 0.9}),
    "normalized": ("MlpPolicy", lambda: normalized(TimeoutEnv), 400, SMALL),
    "normalized n-step": ("MlpPolicy", lambda: normalized(TimeoutEnv), 400, {**SMALL, "n_steps": 4}),
    "normalized dict": ("MultiInputPolicy", lambda: normalized(DictEnv, norm_obs_keys=["vector"]), 100, SMALL),
    "images": ("CnnPolicy", ImageEnv, 120, {**SMALL, "buffer_size": 100}),
    "dict": ("MultiInputPolicy", DictEnv, 150, {**SMALL, "buffer_size": 100}),
    "hindsight": (
        "MultiInputPolicy",
        goal_env,
        160,
        {**SMALL, "replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}},
    ),
    "observations once": (
        "MlpPolicy",
        TimeoutEnv,
        400,
        {
            **SMALL,
            "buffer_size": 150,
            "optimize_memory_usage": True,
            "replay_buffer_kwargs": {"handle_timeout_termination": False},
        },
    ),
    "discrete observations": ("MlpPolicy", lambda: "FrozenLake-v1", 300, SMALL),
    "decay and clipping": (
        "MlpPolicy",
        TimeoutEnv,
        400,
        {
            **SMALL,
            "max_grad_norm": 0.3,  # smaller than the norm of some gradients, larger than that of others
            "policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.01, "amsgrad": True, "eps": 1e-4}},
        },
    ),
    "no clipping": ("MlpPolicy", lambda: "CartPole-v1", 200, {**SMALL, "max_grad_norm": float("inf")}),
    "divergence": ("MlpPolicy", lambda: "CartPole-v1", 200, {**SMALL, "learning_rate": 1e30}),
    "schedules and optimiser": (
        "MlpPolicy",
        lambda: gym.make("CartPole-v1"),
        400,
        {
            **SMALL,
            "learning_rate": LinearSchedule(1e-2, 1e-4, 0.8),
            "exploration_fraction": 0.5,
            "max_grad_norm": 0.1,
            "policy_kwargs": {
                "optimizer_class": th.optim.RMSprop,
                "optimizer_kwargs": {"momentum": 0.5},
                "net_arch": [17, 9, 5],
                "activation_fn": nn.Tanh,
            },
        },
    ),
    "an activation with an argument": (
        "MlpPolicy",
        TimeoutEnv,
        300,
        {**SMALL, "policy_kwargs": {"activation_fn": lambda: nn.LeakyReLU(0.3), "net_arch": [20, 20]}},
    ),
    "batch normalisation and dropout": (
        "MlpPolicy",
        TimeoutEnv,
        300,
        {**SMALL, "tau": 0.3, "policy_kwargs": {"features_extractor_class": NormedExtractor}},
    ),
}


def trained(algorithm, policy, make_env, steps, settings):
    model = algorithm(policy, make_env(), **settings, **parity_settings(algorithm))
    return model.learn(steps), random_states()
