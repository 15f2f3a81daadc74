"""Configurations and modifications for tests of the CUDA graph engine, and a graph that needs no GPU."""

import numpy as np
import pytest
import torch as th
from changes import (
    change_betas,
    change_rate,
    change_settings,
    clear_state,
    edit_replay,
    freeze,
    load_parameters,
    no_gradients,
    other_replay,
    patch_loss,
    patch_outputs,
    replace_average,
    replace_layer,
    replace_memory,
    replace_optimizer,
    replace_target,
    several_steps,
    write,
)
from gymnasium import spaces
from helpers import DictEnv, ImageEnv, NormedExtractor, TimeoutEnv, normalized
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine
from sb3_scratch_dqn.replay import ScratchReplayBuffer


class MaskedEnv(TimeoutEnv):
    def action_masks(self):
        return np.array([True, False, True])


class VectorsEnv(TimeoutEnv):
    observation_space = spaces.Dict({"a": spaces.Box(-10, 10, (2,), np.float32), "b": spaces.Discrete(4)})

    def _observe(self):
        return {"a": self.np_random.normal(size=2).astype(np.float32), "b": int(self.np_random.integers(4))}


class FrameEnv(ImageEnv):
    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)


def stacked():
    return VecFrameStack(DummyVecEnv([FrameEnv, FrameEnv]), 4)


def stacked_vectors():
    return VecFrameStack(make_vec_env(TimeoutEnv, n_envs=2, seed=0), 3)


def several():
    return make_vec_env(TimeoutEnv, n_envs=3, seed=0)


class OwnBuffer(ScratchReplayBuffer):
    """Samples the same transitions, by an overridden method."""

    def sample_batch(self, batch_size, env=None, gamma=None, n_batches=1):
        return super().sample_batch(batch_size, env, gamma, n_batches)


C51 = {"head": "c51", "head_kwargs": {"n_atoms": 11, "v_min": -5.0, "v_max": 10.0}}
QUANTILE = {"head": "quantile", "head_kwargs": {"n_quantiles": 7}}
IQN = {"head": "iqn", "head_kwargs": {"n_tau": 4, "n_tau_prime": 5, "n_tau_act": 6, "n_cos": 8}}
HEADS = {"expected": {}, "c51": C51, "quantile": QUANTILE, "iqn": IQN}
PER = {"replay_buffer_kwargs": {"prioritized": True}}
SHARED = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
NORMED = {"features_extractor_class": NormedExtractor}

# Name -> environment, settings, policy_kwargs
CASES = {
    "defaults": (TimeoutEnv, {}, {}),
    "noisy": (TimeoutEnv, {}, {"noisy": True}),
    "iqn": (TimeoutEnv, {}, IQN),
    "mse": (TimeoutEnv, {"loss": "mse"}, {}),
    "clipped": (TimeoutEnv, {"max_grad_norm": 0.05}, {}),
    "not clipped": (TimeoutEnv, {"max_grad_norm": float("inf")}, {}),
    "soft targets": (TimeoutEnv, {"tau": 0.1, "target_update_interval": 3}, {}),
    "hard targets": (TimeoutEnv, {"target_update_interval": 20}, {}),
    "schedule": (TimeoutEnv, {"learning_rate": lambda progress: 5e-3 * progress}, {}),
    "weight decay": (TimeoutEnv, {}, {"optimizer_kwargs": {"weight_decay": 0.1, "eps": 1e-4, "betas": (0.8, 0.99)}}),
    "amsgrad": (TimeoutEnv, {}, {"optimizer_kwargs": {"amsgrad": True, "eps": 1e-4}}),
    "adamw": (TimeoutEnv, {}, {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"eps": 1e-4}}),
    "activation": (TimeoutEnv, {}, {"activation_fn": nn.ELU}),
    "normed": (TimeoutEnv, {"target_update_interval": 8}, NORMED),
    "n-step": (TimeoutEnv, {"n_steps": 3}, {}),
    "prioritized": (TimeoutEnv, PER, {}),
    "prioritized uniformly": (TimeoutEnv, {"replay_buffer_kwargs": {"prioritized": True, "alpha": 0.0}}, {}),
    "several environments": (several, {}, {}),
    "several prioritized, n-step": (several, {**PER, "n_steps": 3}, {}),
    "shared": (TimeoutEnv, SHARED, {}),
    "shared, n-step": (TimeoutEnv, {**SHARED, "n_steps": 3}, {}),
    "dict": (VectorsEnv, {"n_steps": 2}, {}),
    "dict of images": (DictEnv, {"buffer_size": 100}, {}),
    "images": (ImageEnv, {"buffer_size": 100}, {}),
    "frames": (stacked, {"buffer_size": 100}, {}),
    "frames, prioritized, n-step": (stacked, {**PER, "buffer_size": 100, "n_steps": 3}, {}),
    "masks": (MaskedEnv, {"double_q": True}, {}),
    "masked munchausen": (MaskedEnv, {"munchausen": True, **PER}, QUANTILE),
    "normalized": (lambda: normalized(TimeoutEnv), {}, {}),
    "normalized, prioritized": (lambda: normalized(TimeoutEnv), PER, {}),
    "her": (lambda: BitFlippingEnv(n_bits=4, max_steps=6), {"replay_buffer_class": HerReplayBuffer}, {}),
    "buffer of sb3": (TimeoutEnv, {"replay_buffer_class": ReplayBuffer}, {}),
    "own buffer": (TimeoutEnv, {"replay_buffer_class": OwnBuffer, **PER}, {}),
    "rainbow": (several, {**PER, "double_q": True, "n_steps": 3}, {"dueling": True, "noisy": True, **C51}),
    "rainbow with iqn": (several, {**PER, "double_q": True, "n_steps": 3}, {"dueling": True, "noisy": True, **IQN}),
}
# Consecutive updates
GRADIENT_STEPS = {name: (1, 4, 21)[number % 3] for number, name in enumerate(CASES)}

# Every head is combined with each of these, and with each configuration of the replay buffer
SWITCHES = {
    "plain": ({}, {}),
    "double, dueling": ({"double_q": True}, {"dueling": True}),
    "noisy": ({"double_q": True}, {"noisy": True}),
    "munchausen": ({"munchausen": True, "double_q": True}, {}),
}
REPLAYS = {
    "uniform": (several, {}),
    "prioritized": (several, PER),
    "n-step": (TimeoutEnv, {**PER, "n_steps": 3}),
    "frames": (stacked_vectors, PER),
    "dict": (VectorsEnv, {"n_steps": 2}),
    "masks": (MaskedEnv, PER),
}
COMBINATIONS = [
    (head, switch, replay)
    for head in HEADS
    for switch in SWITCHES
    for replay in REPLAYS
    if switch != "munchausen" or (head != "c51" and replay not in ("n-step", "dict"))
]

SAMPLED_ON_HOST = {"normalized", "normalized, prioritized", "her", "buffer of sb3", "own buffer"}

SETTINGS = {
    "learning_rate": 3e-3,
    "learning_starts": 40,
    "buffer_size": 300,
    "batch_size": 16,
    "train_freq": 4,
    "seed": 0,
}


# Why "auto" does not select it
OPT_IN_REASON = CudaGraphEngine.opt_in_reason


# Calls that synchronise with the device, among them those whose result has a shape that depends on values
SYNCHRONIZING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "bincount",
}


class FakeGraph(TorchDispatchMode):
    """A CUDA graph without CUDA: stores calls of PyTorch, and repeats them on the same memory, without Python.

    So a number that Python computed is constant, and Python's side effects are not repeated.

    :param allow_synchronization: allow calls that synchronise; Discrete observations make some, but only on the CPU
    """

    def __init__(self, allow_synchronization=True):
        super().__init__()
        self.allow_synchronization, self.calls = allow_synchronization, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in SYNCHRONIZING and not self.allow_synchronization:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        with th.no_grad():
            for function, args, kwargs, result in self.calls:
                new_result = function(*args, **kwargs)
                for tensor, new in zip(tree_leaves(result), tree_leaves(new_result), strict=True):
                    if isinstance(tensor, th.Tensor) and tensor.data_ptr() != new.data_ptr():
                        tensor.copy_(new)


def make(name, engine, device="cpu", **more):
    make_env, settings, policy_kwargs = CASES[name]
    # Where a gradient is nearly 0, Adam scales rounding errors up to the learning rate, unless eps is larger
    policy_kwargs = {"net_arch": [16, 12], "optimizer_kwargs": {"eps": 1e-4}, **policy_kwargs}
    env = make_env()
    space = env.observation_space
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy" if len(space.shape) == 3 else None
    if policy == "CnnPolicy":
        policy_kwargs["net_arch"] = []
    settings = {**SETTINGS, **settings, **more}
    return ScratchDQN(policy or "MlpPolicy", env, engine=engine, device=device, policy_kwargs=policy_kwargs, **settings)


def distance(model, other):
    """Return the largest difference between parameters or buffers of two models."""
    pairs = zip(model.policy.state_dict().values(), other.policy.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def assert_close(model, other, bound=2e-5):
    assert distance(model, other) < bound
    for a, b in zip(model.policy.optimizer.state.values(), other.policy.optimizer.state.values(), strict=True):
        assert a["step"] == b["step"]
        th.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-2, atol=1e-4)
    a, b = (getattr(each.replay_buffer, "sampler", None) for each in (model, other))
    if hasattr(a, "tree"):
        n = min(len(a.tree.values), len(b.tree.values))
        np.testing.assert_allclose(a.tree.values[:n], b.tree.values[:n], atol=1e-3)
        assert a.max_value == pytest.approx(b.max_value, rel=1e-3)


def learned(name, engine, gradient_steps, device="cpu", updates=48, **more):
    """Return a model after some updates, and the random states after training."""
    model = make(name, engine, device, gradient_steps=gradient_steps, **more)
    calls = 4 * -(-updates // gradient_steps)
    model.learn(SETTINGS["learning_starts"] + model.n_envs * (calls + 4))
    return model, (np.random.get_state()[1:], th.get_rng_state())


def trained(combination, engine, device="cpu"):
    """Return a model after updates between random steps, and the random states after training."""
    head, switch, replay = combination
    (settings, policy_kwargs), (make_env, more) = SWITCHES[switch], REPLAYS[replay]
    policy_kwargs = {"net_arch": [16, 12], "optimizer_kwargs": {"eps": 1e-4}, **HEADS[head], **policy_kwargs}
    policy = "MultiInputPolicy" if replay == "dict" else "MlpPolicy"
    settings = {**SETTINGS, "learning_starts": 10_000, "policy_kwargs": policy_kwargs, **settings, **more}
    model = ScratchDQN(policy, make_env(), engine=engine, device=device, **settings).learn(40 * 4)
    model.learning_starts = 0
    for gradient_steps, steps in ((1, 8), (5, 1), (14, 60), (9, 0)):
        model.train(gradient_steps, 16)
        model._current_engine().update_target(0.5)
        if steps > 0:
            model.learn(steps * model.n_envs, reset_num_timesteps=False)
    return model, (np.random.get_state()[1:], th.get_rng_state())


class Synchronizing(BaseFeaturesExtractor):
    """Decides by a value, for which the host waits for the device."""

    def __init__(self, space):
        super().__init__(space, 3)

    def forward(self, observations):
        return observations * (2.0 if observations.sum().item() > 0 else 1.0)


def prioritize(model):
    sampler = make("prioritized", "eager").replay_buffer.sampler
    model.replay_buffer.use_sampler(sampler)


CHANGES = [
    *(replace_target, replace_layer, replace_memory, write, load_parameters, clear_state, replace_average),
    *(change_betas, replace_optimizer, freeze, patch_loss, patch_outputs, no_gradients, change_settings, change_rate),
    *(edit_replay, other_replay, several_steps, prioritize),
]
