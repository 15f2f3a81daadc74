"""Each preset configures the algorithm of its name, and its models train."""

import gymnasium as gym
import numpy as np
import pytest
import yaml
from helpers import ImageEnv
from zoo_settings import parse_settings

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.networks.noisy import NoisyLinear
from sb3_scratch_dqn.networks.q_network import DuelingStreams
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler, UniformSampler
from sb3_scratch_dqn.values.heads import CategoricalHead, ExpectedHead, ImplicitQuantileHead, QuantileHead
from sb3_scratch_dqn.zoo.registration import hyperparams_folder

PRESETS = ("double", "dueling", "rainbow", "qrdqn", "iqn", "munchausen")
ENVIRONMENTS = ("default", "atari", "CartPole-v1", "MountainCar-v0", "Acrobot-v1", "LunarLander-v3")


def read(name):
    return yaml.safe_load((hyperparams_folder() / f"{name}.yml").read_text())


def parts(model):
    """Return which parts of the DQN family a model uses."""
    modules = list(model.q_net.modules())
    return {
        "double": model.double_q,
        "dueling": any(isinstance(module, DuelingStreams) for module in modules),
        "noisy": any(isinstance(module, NoisyLinear) for module in modules),
        "n_steps": model.n_steps > 1,
        "prioritized": not isinstance(model.replay_buffer.sampler, UniformSampler),
        "munchausen": model.munchausen,
        "head": type(model.policy.head),
    }


DEFAULT = {
    "double": False, "dueling": False, "noisy": False, "n_steps": False, "prioritized": False, "munchausen": False,
    "head": ExpectedHead,
}  # fmt: skip

EXPECTED = {
    "double": {**DEFAULT, "double": True},
    "dueling": {**DEFAULT, "dueling": True},
    "munchausen": {**DEFAULT, "munchausen": True},
    "qrdqn": {**DEFAULT, "head": QuantileHead},
    "iqn": {**DEFAULT, "head": ImplicitQuantileHead},
    "rainbow": {
        **DEFAULT, "double": True, "dueling": True, "noisy": True, "n_steps": True, "prioritized": True,
        "head": CategoricalHead,
    },
}  # fmt: skip


class AtariLikeEnv(ImageEnv):
    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)

    def _observe(self):
        return self.np_random.integers(0, 256, (4, 84, 84)).astype(np.uint8)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_the_algorithm_of_its_name(preset, environment):
    settings = read(preset)[environment]
    for zoo_option in ("env_wrapper", "frame_stack"):
        settings.pop(zoo_option, None)
    settings, _ = parse_settings(settings)
    env = {"default": "CartPole-v1", "atari": AtariLikeEnv()}.get(environment, environment)
    model = ScratchDQN(env=env, seed=0, **{**settings, "learning_starts": 10, "train_freq": 15, "gradient_steps": 1})
    assert parts(model) == EXPECTED[preset]
    model.learn(30)
    assert model._n_updates == 2
    if preset == "rainbow":
        assert model.exploration_rate == 0
        assert isinstance(model.replay_buffer.sampler, PrioritizedSampler)


@pytest.mark.parametrize("preset", ["double", "dueling", "munchausen", "qrdqn"])
def test_these_presets_are_the_default_settings_with_one_switch(preset):
    base, changed = read("scratch_dqn"), read(preset)
    assert base.keys() == changed.keys()
    for environment, settings in base.items():
        (settings, _), (preset_settings, _) = parse_settings(settings), parse_settings(changed[environment])
        for key in ("double_q", "munchausen"):
            preset_settings.pop(key, None)
        kwargs = preset_settings.pop("policy_kwargs", {})
        if (preset, environment) == ("dueling", "atari"):
            assert kwargs.pop("net_arch") == [512], "a hidden layer of the streams"
        assert {key: kwargs[key] for key in kwargs if key == "net_arch"} == settings.pop("policy_kwargs", {})
        assert preset_settings == settings


def test_the_atoms_of_rainbow_cover_the_returns():
    # With a reward of r per step, a return is at most r / (1 - gamma)
    for environment, reward in (("CartPole-v1", 1), ("MountainCar-v0", -1), ("Acrobot-v1", -1)):
        settings, _ = parse_settings(read("rainbow")[environment])
        atoms = settings["policy_kwargs"]["head_kwargs"]
        extreme = reward / (1 - settings["gamma"])
        assert (atoms["v_min"], atoms["v_max"]) == pytest.approx((min(extreme, 0), max(extreme, 0)))
