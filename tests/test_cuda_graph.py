"""The CUDA graph engine computes what the eager one does, up to rounding.

All but the recording itself is the same on every device. So most of this happens on the CPU: recordings are made by a
tape, which notes calls of PyTorch and makes them again on the same memory, without Python, as CUDA graphs do. What a
recording must not contain is looked for there too. Where there is a GPU, all is compared on it.
"""

import gc
import weakref
from copy import deepcopy
from types import SimpleNamespace

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
from helpers import DictEnv, ImageEnv, NormedExtractor, TimeoutEnv, assert_equal, normalized
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_scratch_dqn import ScratchDQN, dqn
from sb3_scratch_dqn.engines import choose, recording
from sb3_scratch_dqn.engines.cuda_graph import CudaGraphEngine, _sizes
from sb3_scratch_dqn.engines.device_steps import DeviceSteps
from sb3_scratch_dqn.engines.feeds import DeviceFeed, HostFeed
from sb3_scratch_dqn.engines.recording import CannotRecordError, Recorder
from sb3_scratch_dqn.replay import ScratchReplayBuffer, batch_source
from sb3_scratch_dqn.replay.device import DeviceReplay
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import DenseObservations

needs_cuda = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")


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
    """Samples the same, in a method of its own."""

    def sample_batch(self, batch_size, env=None, gamma=None, n_batches=1):
        return super().sample_batch(batch_size, env, gamma, n_batches)


C51 = {"head": "c51", "head_kwargs": {"n_atoms": 11, "v_min": -5.0, "v_max": 10.0}}
QUANTILE = {"head": "quantile", "head_kwargs": {"n_quantiles": 7}}
IQN = {"head": "iqn", "head_kwargs": {"n_tau": 4, "n_tau_prime": 5, "n_tau_act": 6, "n_cos": 8}}
HEADS = {"expected": {}, "c51": C51, "quantile": QUANTILE, "iqn": IQN}
PER = {"replay_buffer_kwargs": {"prioritized": True}}
SHARED = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
NORMED = {"features_extractor_class": NormedExtractor}

# Name -> environment, settings, arguments of the policy
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
# How many updates are taken in a row
GRADIENT_STEPS = {name: (1, 4, 21)[number % 3] for number, name in enumerate(CASES)}

# Every head is combined with each of these, and with each kind of replay
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

FROM_THE_HOST = {"normalized", "normalized, prioritized", "her", "buffer of sb3", "own buffer"}

SETTINGS = {
    "learning_rate": 3e-3,
    "learning_starts": 40,
    "buffer_size": 300,
    "batch_size": 16,
    "train_freq": 4,
    "seed": 0,
}


# Why "auto" leaves it alone
BY_ITSELF = CudaGraphEngine.not_by_itself


@pytest.fixture(autouse=True)
def _by_itself(monkeypatch):
    """Let "auto" take the engine, so that it is seen what that does."""
    monkeypatch.setattr(CudaGraphEngine, "not_by_itself", None)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the engine serve the CPU, where a recording is the function itself."""
    monkeypatch.setattr(CudaGraphEngine, "device_type", "cpu")


# Calls that wait for the device, or whose results have a shape that depends on values
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2", "bincount"}


class Tape(TorchDispatchMode):
    """A CUDA graph without CUDA: notes calls of PyTorch, and makes them again on the same memory, without Python.

    So a number that Python decided stays as it is, and what Python keeps elsewhere is not seen.

    :param patient: whether calls that wait are let through; observations of numbers make some on the CPU alone
    """

    def __init__(self, patient=True):
        super().__init__()
        self.patient, self.calls = patient, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in WAITING and not self.patient:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        with th.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(kept, th.Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


@pytest.fixture
def taped(on_cpu, monkeypatch):
    """Record on the CPU, by a :class:`Tape`; ``taped.patient = False`` makes it refuse what waits."""
    settings = SimpleNamespace(patient=True, tapes=[])

    def record(self, function, state, warm_up=None):
        self.warm_ups = 2
        with self._without_trace(state):
            if warm_up is not None:
                self._run(warm_up)
            tape = Tape(settings.patient)
            try:
                with tape:
                    function()
            except RuntimeError as error:
                raise CannotRecordError(str(error)) from error
        settings.tapes.append(tape)
        return tape.replay

    monkeypatch.setattr(Recorder, "record", record)
    return settings


def make(name, engine, device="cpu", **more):
    make_env, settings, policy_kwargs = CASES[name]
    # Where a gradient is nearly 0, Adam makes any difference in rounding as large as the learning rate, but for eps
    policy_kwargs = {"net_arch": [16, 12], "optimizer_kwargs": {"eps": 1e-4}, **policy_kwargs}
    env = make_env()
    space = env.observation_space
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy" if len(space.shape) == 3 else None
    if policy == "CnnPolicy":
        policy_kwargs["net_arch"] = []
    settings = {**SETTINGS, **settings, **more}
    return ScratchDQN(policy or "MlpPolicy", env, engine=engine, device=device, policy_kwargs=policy_kwargs, **settings)


def distance(model, other):
    """The largest difference of two parameters or buffers."""
    pairs = zip(model.policy.state_dict().values(), other.policy.state_dict().values(), strict=True)
    return max((one - another).abs().max().item() for one, another in pairs)


def assert_close(model, other, bound=2e-5):
    assert distance(model, other) < bound
    for one, another in zip(model.policy.optimizer.state.values(), other.policy.optimizer.state.values(), strict=True):
        assert one["step"] == another["step"]
        th.testing.assert_close(one["exp_avg"], another["exp_avg"], rtol=1e-2, atol=1e-4)
    sampler, its = (getattr(one.replay_buffer, "sampler", None) for one in (model, other))
    if hasattr(sampler, "tree"):
        n = min(len(sampler.tree.values), len(its.tree.values))
        np.testing.assert_allclose(sampler.tree.values[:n], its.tree.values[:n], atol=1e-3)
        assert sampler.max_value == pytest.approx(its.max_value, rel=1e-3)


def learned(name, engine, gradient_steps, device="cpu", updates=48, **more):
    """A model after some updates, and the random states that it leaves behind."""
    model = make(name, engine, device, gradient_steps=gradient_steps, **more)
    calls = 4 * -(-updates // gradient_steps)
    model.learn(SETTINGS["learning_starts"] + model.n_envs * (calls + 4))
    return model, (np.random.get_state()[1:], th.get_rng_state())


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("name", CASES)
def test_fifty_updates_agree(name, monkeypatch):
    monkeypatch.setattr(dqn, "_UPDATES_BETWEEN_FIGURES", 10**9)  # nobody reads them before
    updates = 12 if "images" in name or "frames" in name else 48
    gradient_steps = GRADIENT_STEPS[name]
    eager, states = learned(name, "eager", gradient_steps, updates=updates)
    model, its_states = learned(name, "cuda_graph", gradient_steps, updates=updates)
    assert model._engine.name == "cuda_graph"
    assert type(model._engine._feed) is (HostFeed if name in FROM_THE_HOST else DeviceFeed)
    assert model._n_updates == eager._n_updates >= updates
    assert distance(make(name, "eager"), eager) > 1e-3, "the comparison needs updates that change something"
    assert_equal(states, its_states)  # so the same transitions were sampled, and the same noise drawn
    assert_equal(np.array(eager.replay_buffer.actions), np.array(model.replay_buffer.actions))
    assert_close(eager, model, bound=1e-4 if updates == 12 else 2e-5)
    for one, another in zip(eager.q_net.parameters(), model.q_net.parameters(), strict=True):
        th.testing.assert_close(one.grad, another.grad, rtol=1e-3, atol=1e-4)
    figures, its_figures = (one._engine.last_update.figures() for one in (eager, model))
    assert figures == pytest.approx(its_figures, rel=1e-3, abs=1e-4)


def trained(combination, engine, device="cpu"):
    """A model after updates between some random steps, and the random states that it leaves behind."""
    head, switch, replay = combination
    (settings, policy_kwargs), (make_env, more) = SWITCHES[switch], REPLAYS[replay]
    policy_kwargs = {"net_arch": [16, 12], "optimizer_kwargs": {"eps": 1e-4}, **HEADS[head], **policy_kwargs}
    policy = "MultiInputPolicy" if replay == "dict" else "MlpPolicy"
    settings = {**SETTINGS, "learning_starts": 10_000, "policy_kwargs": policy_kwargs, **settings, **more}
    model = ScratchDQN(policy, make_env(), engine=engine, device=device, **settings).learn(40 * 4)
    model.learning_starts = 0
    for gradient_steps, steps in ((1, 8), (5, 1), (14, 60), (9, 0)):
        model.train(gradient_steps, 16)
        model._current_engine().move_target(0.5)
        if steps > 0:
            model.learn(steps * model.n_envs, reset_num_timesteps=False)
    return model, (np.random.get_state()[1:], th.get_rng_state())


@pytest.mark.parametrize("combination", COMBINATIONS, ids=", ".join)
def test_every_combination_agrees(combination, taped):
    (eager, states), (model, its_states) = (trained(combination, engine) for engine in ("eager", "cuda_graph"))
    assert type(model._engine._feed) is DeviceFeed
    assert eager.replay_buffer.store.keeper.__class__ is (
        StackedFrames if combination[2] == "frames" else DenseObservations
    )
    assert_equal(states, its_states)
    assert_close(eager, model)
    # Updates of two sizes, the target network and, where masks do not ask for more, actions; new priorities
    prioritized = hasattr(model.replay_buffer.sampler, "tree")
    assert len(taped.tapes) == 3 + (combination[2] != "masks") + prioritized


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["defaults", "prioritized", "rainbow", "normalized"])
def test_many_gradient_steps_in_a_row_agree(name):
    settings = {"gradient_steps": 300, "train_freq": 64, "learning_rate": 1e-3}
    (eager, states), (model, its_states) = (
        learned(name, engine, updates=16, **settings) for engine in ("eager", "cuda_graph")
    )
    assert model._n_updates == eager._n_updates >= 300
    assert_equal(states, its_states)
    assert_close(eager, model, bound=5e-4)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["prioritized", "normed", "rainbow with iqn", "frames, prioritized, n-step"])
def test_warming_up_leaves_no_trace(name, monkeypatch):
    plain, states = learned(name, "cuda_graph", 4, updates=16)
    monkeypatch.setattr(Recorder, "warm_ups", property(lambda _: 3, lambda *_: None), raising=False)
    warmed, its_states = learned(name, "cuda_graph", 4, updates=16)
    assert_equal(states, its_states)
    assert_equal(plain.policy.state_dict(), warmed.policy.state_dict())
    assert_equal(plain.policy.optimizer.state_dict()["state"], warmed.policy.optimizer.state_dict()["state"])
    assert_equal(
        plain.replay_buffer.sampler.__dict__.get("_max_value"), warmed.replay_buffer.sampler.__dict__.get("_max_value")
    )
    if name != "normed":
        assert_equal(plain.replay_buffer.sampler.tree.values, warmed.replay_buffer.sampler.tree.values)


@pytest.mark.parametrize("n_updates", [1, 3, 4, 15, 16, 21, 128, 255])
def test_recordings_make_up_any_number_of_updates(n_updates):
    assert sum(_sizes(n_updates, 256)) == n_updates
    assert _sizes(n_updates, 1) == [1] * n_updates
    assert len(_sizes(n_updates, 256)) <= n_updates // 16 + 6


# What others do meanwhile


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["defaults", "rainbow"])
def test_engines_can_be_switched_and_models_saved_and_loaded_in_the_middle(name, tmp_path):
    def learn(engines):
        model = make(name, engines[0]).learn(100)
        model.engine = engines[1]
        model.learn(60, reset_num_timesteps=False)
        assert model._engine.name == engines[1]
        model.save(tmp_path / "model.zip")
        model.save_replay_buffer(tmp_path / "replay")
        loaded = ScratchDQN.load(tmp_path / "model.zip", env=CASES[name][0](), engine=engines[2])
        assert_equal(model.get_parameters(), loaded.get_parameters())
        loaded.load_replay_buffer(tmp_path / "replay")
        loaded.learn(60, reset_num_timesteps=False)
        assert loaded._engine.name == engines[2]
        return loaded

    whole = learn(["eager", "eager", "eager"])
    assert_close(whole, learn(["cuda_graph", "eager", "cuda_graph"]), bound=1e-4)
    assert_close(whole, learn(["eager", "cuda_graph", "eager"]), bound=1e-4)
    assert_close(whole, learn(["cuda_graph", "cuda_graph", "cuda_graph"]), bound=1e-4)


def prioritize(model):
    sampler = make("prioritized", "eager").replay_buffer.sampler
    model.replay_buffer.use_sampler(sampler)


CHANGES = [
    *(replace_target, replace_layer, replace_memory, write, load_parameters, clear_state, replace_average),
    *(change_betas, replace_optimizer, freeze, patch_loss, patch_outputs, no_gradients, change_settings, change_rate),
    *(edit_replay, other_replay, several_steps, prioritize),
]


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changes_between_updates_is_heeded(change, monkeypatch):
    # As on a GPU, where fused engines do not serve
    monkeypatch.setattr(choose, "_ENGINES", (CudaGraphEngine, choose.EagerEngine))

    def learn(engine):
        model = make("defaults", engine).learn(60)
        th.manual_seed(0)
        change(model)
        np.random.seed(0)
        model.train(5, 16)
        return model

    eager, model = learn("eager"), learn("auto")
    assert distance(eager, make("defaults", "eager").learn(60)) > 1e-4
    assert_close(eager, model)
    kept = ("patch_loss", "patch_outputs")
    assert model._engine.name == ("eager" if change.__name__ in kept else "cuda_graph")
    grads = [parameter.grad is None for parameter in model.q_net.parameters()]
    assert grads == [parameter.grad is None for parameter in eager.q_net.parameters()]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("batch_size", [16, 5])
def test_one_engine_serves_as_long_as_nothing_changes(batch_size):
    model = make("prioritized", "cuda_graph").learn(60)
    engine, feed = model._engine, model._engine._feed
    for _ in range(3):
        model.learn(20, reset_num_timesteps=False)
        model.train(2, 16)
    assert model._engine is engine
    assert engine._feed is feed
    model.train(2, batch_size)
    assert (engine._feed is feed) == (batch_size == 16)


@pytest.mark.usefixtures("on_cpu")
def test_a_model_goes_on_where_masks_begin():
    def learn(engine):
        model = make("defaults", engine).learn(60)
        env = DummyVecEnv([MaskedEnv])
        env.seed(0)
        model.set_env(env)
        return model.learn(60, reset_num_timesteps=False)

    assert_close(learn("eager"), learn("cuda_graph"))

    def learn_normalized(engine):
        model = make("normalized", engine).learn(60)
        env = normalized(MaskedEnv)
        env.seed(0)
        model.set_env(env)
        return model.learn(60, reset_num_timesteps=False)

    assert_close(learn_normalized("eager"), learn_normalized("cuda_graph"))


@pytest.mark.usefixtures("on_cpu")
def test_priorities_come_back_when_somebody_looks():
    def learn(engine):
        looks = []

        def look(variables, _):
            model = variables["self"]
            if model.num_timesteps % 16 == 0:
                looks.append(model.replay_buffer.sampler.tree.values[:32].copy())
            return True

        return make("prioritized", engine).learn(120, callback=look), np.array(looks)

    (eager, looks), (model, its_looks) = learn("eager"), learn("cuda_graph")
    np.testing.assert_allclose(looks, its_looks, atol=1e-4)
    assert not np.array_equal(looks[-1], looks[0])
    assert_close(eager, model)


@pytest.mark.usefixtures("on_cpu")
def test_priorities_that_are_no_numbers_are_refused_as_by_the_sampler():
    model = make("prioritized", "cuda_graph", max_grad_norm=float("inf"), loss="mse").learn(60)
    before = model.replay_buffer.sampler.tree.values.copy()
    model.replay_buffer.rewards[:] = np.inf
    with pytest.raises(ValueError, match="priorities must be finite, but some are not: training diverged"):
        model.train(1, 16)
    assert_equal(before, model.replay_buffer.sampler.tree.values)


@pytest.mark.usefixtures("on_cpu")
def test_models_can_be_copied_after_training_and_go_on_alike():
    model = make("rainbow", "cuda_graph").learn(100)
    again = deepcopy(model)
    assert_equal(model.get_parameters(), again.get_parameters())
    for one in (model, again):
        np.random.seed(0)
        th.manual_seed(0)
        one.train(3, 16)
    assert distance(model, again) == 0
    assert_equal(model.replay_buffer.sampler.tree.values, again.replay_buffer.sampler.tree.values)


@pytest.mark.usefixtures("on_cpu")
def test_greedy_actions_are_those_of_the_network_as_it_is():
    for name in ("defaults", "dict of images", "images", "normed"):
        model = make(name, "cuda_graph", buffer_size=60).learn(50)
        observation = model.env.reset()
        for _ in range(3):
            expected = model.predict(observation, deterministic=True)[0]
            assert_equal(model._engine.act(observation), expected)
            write(model)
            with th.no_grad():
                model.q_net.q_net[-1].bias.copy_(th.randn(3))
        many = {key: np.repeat(part, 7, axis=0) for key, part in observation.items()} if isinstance(
            observation, dict
        ) else np.repeat(observation, 7, axis=0)  # fmt: skip
        assert model._engine.act(many).shape == (7,)


# What cannot be served


def test_only_cuda_is_served():
    with pytest.raises(ValueError, match="the CUDA graph engine cannot serve: device='cpu' is not 'cuda'"):
        make("defaults", "cuda_graph")


def test_nobody_is_told_of_engines_for_other_devices(capsys):
    make("defaults", "auto", verbose=1)
    ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"optimizer_class": th.optim.SGD}, verbose=1)
    said = capsys.readouterr().out
    assert "Using the fused engine, the fastest for these settings" in said
    assert "Using the eager engine, as" in said
    assert "CUDA" not in said


@pytest.mark.usefixtures("on_cpu")
def test_auto_leaves_it_to_the_user(capsys, monkeypatch):
    monkeypatch.setattr(choose, "_ENGINES", (CudaGraphEngine, choose.EagerEngine))
    monkeypatch.setattr(CudaGraphEngine, "not_by_itself", BY_ITSELF)
    assert make("defaults", "auto", verbose=1)._engine.name == "eager"
    told = "Using the eager engine, as the CUDA graph engine must be asked for: engine='cuda_graph'"
    assert told in capsys.readouterr().out
    assert make("defaults", "cuda_graph")._engine.name == "cuda_graph"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("policy_kwargs", "reason"),
    [
        ({"optimizer_class": th.optim.RMSprop}, "optimizer_class=RMSprop is neither Adam nor AdamW"),
        ({"optimizer_kwargs": {"differentiable": True}}, "Adam has differentiable=True"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(policy_kwargs, reason):
    with pytest.raises(
        ValueError, match=r"engine='cuda_graph' cannot be used here: .*; engine='auto' takes"
    ) as refusal:
        ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=policy_kwargs, engine="cuda_graph")
    assert reason in str(refusal.value)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("obstacle", ["module", "target", "parameter", "step", "hook"])
def test_hooks_and_patches_make_it_step_aside(obstacle, monkeypatch):
    monkeypatch.setattr(choose, "_ENGINES", (CudaGraphEngine, choose.EagerEngine))
    model, calls = make("defaults", "auto").learn(60), []
    assert model._engine.name == "cuda_graph"
    optimizer = model.policy.optimizer
    if obstacle == "module":
        model.q_net.q_net[0].register_forward_hook(lambda *_: calls.append(1))
    elif obstacle == "target":
        model.q_net_target.q_net[0].register_forward_hook(lambda *_: calls.append(1))
    elif obstacle == "parameter":
        model.q_net.q_net[0].weight.register_hook(lambda _: calls.append(1))
    elif obstacle == "step":
        step = optimizer.step
        optimizer.step = lambda: calls.append(1) or step()
    else:
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    model.train(4, 16)
    assert len(calls) == 4
    assert model._engine.name == "eager"


class Waiting(BaseFeaturesExtractor):
    """Decides by a value, for which it must wait."""

    def __init__(self, space):
        super().__init__(space, 3)

    def forward(self, observations):
        return observations * (2.0 if observations.sum().item() > 0 else 1.0)


class Averaging(BaseFeaturesExtractor):
    """Keeps an average, in another tensor each time."""

    def __init__(self, space):
        super().__init__(space, 3)
        self.register_buffer("average", th.ones(3))

    def forward(self, observations):
        if self.training:
            self.average = 0.9 * self.average + 0.1 * observations.abs().mean(dim=0)
        return observations / self.average


@pytest.mark.parametrize(
    ("name", "extractor", "reason"),
    [
        ("rainbow", Waiting, "operation not permitted"),
        ("normalized, prioritized", Waiting, "operation not permitted"),
        ("prioritized", Waiting, "operation not permitted"),
        ("prioritized", Averaging, "it puts other tensors in the place of its own"),
    ],
)
def test_a_network_that_cannot_be_recorded_is_trained_eagerly(name, extractor, reason, capsys, taped, monkeypatch):
    monkeypatch.setattr(choose, "_ENGINES", (CudaGraphEngine, choose.EagerEngine))
    monkeypatch.setitem(CASES, name, (*CASES[name][:2], {**CASES[name][2], "features_extractor_class": extractor}))
    taped.patient = False
    eager, states = learned(name, "eager", 2)
    with pytest.warns(UserWarning, match=f"the network cannot be recorded: {reason}"):
        model, its_states = learned(name, "auto", 2, verbose=1)
    assert model._engine.name == "eager"
    assert "Using the eager engine, as the CUDA graph engine cannot serve: the network" in capsys.readouterr().out
    assert_equal(states, its_states)
    assert_close(eager, model, bound=1e-9)


def test_a_network_that_cannot_be_recorded_is_refused_where_recording_was_asked_for(taped, monkeypatch):
    monkeypatch.setitem(CASES, "defaults", (TimeoutEnv, {}, {"features_extractor_class": Waiting}))
    taped.patient = False
    model = make("defaults", "cuda_graph")
    model.learning_starts = 1_000  # so that nothing is recorded yet
    model.learn(40)
    with (
        pytest.warns(UserWarning, match="the CUDA graph engine cannot serve"),
        pytest.raises(ValueError, match=r"engine='cuda_graph' cannot be used here: .*the network cannot be recorded"),
    ):
        model.train(1, 16)


# What recordings are made of


class Calls(TorchDispatchMode):
    """Notes what is called, and on which devices."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, th.Tensor):
                self.devices.add(tensor.device.type)
        return result


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", [name for name in CASES if "dict" not in name])
def test_a_recording_waits_for_nobody(name):
    model, _ = learned(name, "cuda_graph", 1, updates=4)
    engine = model._engine
    engine._number.zero_()
    with Calls() as calls:
        engine._update()
        engine._move_target()
        model.policy.set_training_mode(False)
        for actor in engine._actors.values():
            actor.choose()
    assert not WAITING & set(calls.names), name
    assert len(calls.names) > 30


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["prioritized", "rainbow", "rainbow with iqn", "frames", "normalized", "normed"])
def test_a_recording_always_works_on_the_same_memory(name):
    model, _ = learned(name, "cuda_graph", 1, updates=4)
    engine = model._engine

    def addresses():
        gradients = [parameter.grad for parameter in model.q_net.parameters()]
        kept = [*engine._kept.values(), *gradients, *engine._state()]
        return [tensor.data_ptr() for tensor in kept]

    before = addresses()
    model.learn(40, reset_num_timesteps=False)
    assert model._engine is engine
    assert addresses() == before


class MetaSteps(DeviceSteps):
    """Steps on a device that has no Adam."""

    def take(self, loss):
        return self._clip(self._differentiate(loss))


@pytest.mark.parametrize("name", CASES)
def test_a_recording_has_nothing_from_the_host_in_it(name, monkeypatch):
    if name in FROM_THE_HOST:
        pytest.skip("batches come from the host")
    # A device without memory, which refuses to tell a value, and to work with tensors that lie elsewhere
    meta = th.device("meta")
    monkeypatch.setattr(CudaGraphEngine, "device_type", "meta")
    monkeypatch.setattr("sb3_scratch_dqn.engines.cuda_graph.DeviceSteps", MetaSteps)
    model = make(name, "eager", learning_starts=1_000).learn(40)
    model.policy.to(meta)
    model.policy.optimizer = type(model.policy.optimizer)(model.q_net.parameters())
    engine = CudaGraphEngine(model.policy, model._objective())
    source = batch_source(model.replay_buffer, 16, None, 0.9)
    with pytest.raises((NotImplementedError, RuntimeError)):  # up to the losses, which meta tensors do not have
        engine.train(source, 2, 10.0)
    assert len(engine._kept) == 3, "an update was taken"
    with Calls() as calls:
        engine._update()
        engine._move_target()
    assert calls.devices == {"meta"}


@pytest.mark.usefixtures("on_cpu")
def test_an_engine_that_is_not_needed_any_more_lets_its_memory_go():
    model = make("prioritized", "cuda_graph").learn(60)
    engine = model._engine
    # Graphs do not hold the engine; functions do
    engine._updates.clear()
    engine._actors.clear()
    engine._follow = None
    alive = weakref.ref(engine)
    gc.disable()
    try:
        model.engine = "eager"
        model.train(1, 16)
        del engine
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("taped")
def test_a_buffer_that_does_not_fit_on_the_device_is_sampled_on_the_host(monkeypatch):
    eager, states = learned("rainbow", "eager", 4)
    monkeypatch.setattr(DeviceReplay, "why_not", staticmethod(lambda *_: "there is no room"))
    with pytest.warns(UserWarning, match="gets batches from the host, which takes longer: there is no room"):
        model, its_states = learned("rainbow", "cuda_graph", 4)
    assert type(model._engine._feed) is HostFeed
    assert_equal(states, its_states)
    assert_close(eager, model)


def test_a_device_that_waits_is_told_by_its_first_line():
    assert recording._first_line(RuntimeError("one\ntwo")) == "one"
    assert recording._first_line(RuntimeError()) == "RuntimeError"


# On a GPU


@needs_cuda
@pytest.mark.parametrize("combination", COMBINATIONS, ids=", ".join)
def test_graphs_agree_with_the_eager_engine_in_every_combination(combination):
    (eager, states), (model, its_states) = (trained(combination, engine, "cuda") for engine in ("eager", "auto"))
    assert model._engine.name == "cuda_graph"
    assert_equal(states, its_states)
    if combination[0] != "iqn" and combination[1] != "noisy":  # eager and recorded calls draw other numbers there
        assert_close(eager, model, bound=1e-3)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


@needs_cuda
@pytest.mark.parametrize("gradient_steps", [1, 4, 21])
@pytest.mark.parametrize("name", CASES)
def test_graphs_compute_what_the_eager_engine_does(name, gradient_steps):
    eager, states = learned(name, "eager", gradient_steps, "cuda")
    model, its_states = learned(name, "auto", gradient_steps, "cuda")
    assert model._engine.name == "cuda_graph"
    assert_equal(states, its_states)
    random_on_device = "noisy" in name or "iqn" in name or name in ("rainbow", "normed")
    if not random_on_device:  # there eager and recorded calls draw other numbers
        assert_close(eager, model, bound=1e-3)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


@needs_cuda
@pytest.mark.parametrize("change", CHANGES)
def test_graphs_heed_what_somebody_changes(change):
    def learn(engine):
        model = make("defaults", engine, "cuda").learn(60)
        th.manual_seed(0)
        change(model)
        np.random.seed(0)
        model.train(5, 16)
        return model

    assert_close(learn("eager"), learn("auto"), bound=1e-3)


@needs_cuda
@pytest.mark.parametrize("name", ["noisy", "iqn"])
def test_every_replay_has_other_noise(name):
    model = make(name, "cuda_graph", "cuda", learning_rate=0.0).learn(60)
    np.random.seed(0)
    model.train(1, 16)
    first = model._engine.last_update.outputs.clone()
    np.random.seed(0)
    model.train(1, 16)
    assert not th.equal(first, model._engine.last_update.outputs)
    th.cuda.manual_seed(0)
    np.random.seed(0)
    model.train(1, 16)
    first = model._engine.last_update.outputs.clone()
    th.cuda.manual_seed(0)
    np.random.seed(0)
    model.train(1, 16)
    assert th.equal(first, model._engine.last_update.outputs)


@needs_cuda
def test_a_network_that_waits_for_the_device_is_trained_eagerly():
    def learn(engine):
        kwargs = {"features_extractor_class": Waiting}
        model = ScratchDQN("MlpPolicy", TimeoutEnv(), engine=engine, device="cuda", policy_kwargs=kwargs, **SETTINGS)
        return model.learn(80)

    with pytest.warns(UserWarning, match="the network cannot be recorded"):
        model = learn("auto")
    assert model._engine.name == "eager"
    assert_close(learn("eager"), model)
    with pytest.warns(UserWarning, match="cannot serve"), pytest.raises(ValueError, match="cannot be recorded"):
        learn("cuda_graph")


@needs_cuda
def test_warming_up_and_recording_leave_no_trace_on_a_gpu():
    model = make("rainbow with iqn", "cuda_graph", "cuda", learning_starts=1_000).learn(40)
    th.cuda.manual_seed(0)
    before = deepcopy(model.policy.state_dict()), th.cuda.get_rng_state(), np.random.get_state()[1:]
    engine = model._engine
    source = batch_source(model.replay_buffer, 16, None, 0.9)
    engine._attach()
    feed = engine._feed_for(source)
    feed.prepare(source)
    feed.record(lambda function: engine._record(function, function))
    priorities = feed._priorities.tree.values.clone()
    engine._record_updates(feed, 5)
    after = model.policy.state_dict(), th.cuda.get_rng_state(), np.random.get_state()[1:]
    assert_equal(before, after)
    assert th.equal(priorities, feed._priorities.tree.values)
    assert all(state["step"] == 0 for state in model.policy.optimizer.state.values())
