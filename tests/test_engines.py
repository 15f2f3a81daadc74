"""The fused engine computes what the eager one does, up to rounding, and notices what it cannot serve."""

import pickle
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from changes import (
    clear_state,
    freeze,
    no_gradients,
    patch_loss,
    patch_outputs,
    replace_average,
    replace_layer,
    replace_target,
)
from gymnasium import spaces
from helpers import DictEnv, ImageEnv, TimeoutEnv, assert_equal, normalized
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_scratch_dqn import DQNPolicy, ScratchDQN
from sb3_scratch_dqn.engines import products
from sb3_scratch_dqn.engines.flat import _NOTHING
from sb3_scratch_dqn.networks import QNetwork


class NumberEnv(TimeoutEnv):
    observation_space = spaces.Discrete(5)

    def _observe(self):
        return int(self.np_random.integers(5))


class WideEnv(TimeoutEnv):
    """Observations of two axes, in float64."""

    observation_space = spaces.Box(-10, 10, (2, 3), np.float64)

    def _observe(self):
        return self.np_random.normal(size=(2, 3))


class VectorsEnv(TimeoutEnv):
    """A Dict of vectors, numbers and several numbers."""

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


def net(*widths, **kwargs):
    return {"net_arch": list(widths), **kwargs}


C51 = {"head": "c51", "head_kwargs": {"n_atoms": 11, "v_min": -5.0, "v_max": 10.0}}
QUANTILE = {"head": "quantile", "head_kwargs": {"n_quantiles": 7}}
PER = {"replay_buffer_kwargs": {"prioritized": True}}

# Name -> environment, settings, arguments of the policy
SERVED = {
    "defaults": (TimeoutEnv, {}, {}),
    "double": (TimeoutEnv, {"double_q": True}, {}),
    "mse": (TimeoutEnv, {"loss": "mse"}, {}),
    "dueling": (TimeoutEnv, {}, net(32, 16, dueling=True)),
    "dueling of one layer": (TimeoutEnv, {}, net(32, dueling=True)),
    "dueling of none": (TimeoutEnv, {}, net(dueling=True)),
    "noisy": (TimeoutEnv, {}, net(16, 16, noisy=True)),
    "noisy, few rows": (TimeoutEnv, {"batch_size": 8}, net(16, noisy=True)),
    "n-step": (TimeoutEnv, {"n_steps": 3}, {}),
    "prioritized": (TimeoutEnv, PER, {}),
    "prioritized double mse": (TimeoutEnv, {**PER, "double_q": True, "loss": "mse"}, {}),
    "tanh": (TimeoutEnv, {}, net(20, 30, activation_fn=nn.Tanh)),
    "odd shapes": (TimeoutEnv, {"batch_size": 13}, net(17, 9, 5)),
    "no hidden layer": (TimeoutEnv, {}, net()),
    "large": (TimeoutEnv, {"batch_size": 128, "learning_rate": 1e-3}, net(256, 256)),
    "large tanh double": (TimeoutEnv, {"batch_size": 100, "double_q": True}, net(200, 150, 50, activation_fn=nn.Tanh)),
    "weight decay": (TimeoutEnv, {}, {"optimizer_kwargs": {"weight_decay": 0.1, "eps": 1e-4, "betas": (0.8, 0.99)}}),
    "clipped": (TimeoutEnv, {"max_grad_norm": 0.05}, {}),
    "soft targets": (TimeoutEnv, {"tau": 0.1}, {}),
    "several environments": (lambda: make_vec_env(TimeoutEnv, n_envs=3, seed=0), {}, {}),
    "normalized": (lambda: normalized(TimeoutEnv), {}, {}),
    "numbers": (NumberEnv, {}, {}),
    "images": (ImageEnv, {}, net(16)),
    "two axes": (WideEnv, {}, {}),
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
    make_env, settings, policy_kwargs = SERVED[name]
    # Where a gradient is nearly 0, Adam makes any difference in rounding as large as the learning rate, but for eps
    policy_kwargs = {"optimizer_kwargs": {"eps": 1e-4}, **policy_kwargs}
    settings = {**SETTINGS, **settings, **more}
    policy = "MultiInputPolicy" if make_env is VectorsEnv else "MlpPolicy"
    return ScratchDQN(policy, make_env(), engine=engine, policy_kwargs=policy_kwargs, **settings)


def distance(model, other):
    """The largest difference of two parameters."""
    pairs = zip(model.policy.parameters(), other.policy.parameters(), strict=True)
    return max((one - another).abs().max().item() for one, another in pairs)


def assert_close(model, other, bound=2e-5):
    assert distance(model, other) < bound
    for one, another in zip(model.policy.optimizer.state.values(), other.policy.optimizer.state.values(), strict=True):
        assert one["step"] == another["step"]
        th.testing.assert_close(one["exp_avg"], another["exp_avg"], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("gradient_steps", [1, 4])
def test_fifty_updates_agree(name, gradient_steps):
    def learn(engine):
        model = make(name, engine, gradient_steps=gradient_steps)
        steps = 4 * 52 // gradient_steps  # calls of env.step()
        return model.learn(SETTINGS["learning_starts"] + model.n_envs * steps)

    eager, fused, before = learn("eager"), learn("fused"), make(name, "eager")
    assert fused._engine.name == "fused"
    assert fused._n_updates == eager._n_updates >= 50
    assert distance(before, eager) > 1e-3, "the comparison needs updates that change something"
    assert_close(eager, fused)
    # The same actions were taken, and the same transitions sampled
    assert_equal(eager.replay_buffer.actions, fused.replay_buffer.actions)


@pytest.mark.parametrize("name", ["defaults", "double", "quantile", "prioritized"])
def test_many_gradient_steps_at_once_agree(name):
    settings = {"gradient_steps": 128, "train_freq": 64, "learning_rate": 1e-3}
    eager, fused = (make(name, engine, **settings).learn(128) for engine in ("eager", "fused"))
    assert fused._n_updates == eager._n_updates == 256
    assert_close(eager, fused, bound=2e-4)


@pytest.mark.parametrize("name", ["defaults", "noisy", "rainbow", "several environments"])
def test_both_draw_the_same_random_numbers(name):
    states = []
    for engine in ("eager", "fused"):
        make(name, engine, gradient_steps=3).learn(100)
        states.append((np.random.get_state()[1:], th.get_rng_state()))
    assert_equal(*states)


@pytest.mark.parametrize("name", ["defaults", "rainbow"])
def test_engines_can_be_switched_and_models_saved_and_loaded_in_the_middle(name, tmp_path):
    def learn(engines):
        model = make(name, engines[0]).learn(100)
        model.engine = engines[1]
        model.learn(60, reset_num_timesteps=False)
        assert model._engine.name == engines[1]
        model.save(tmp_path / "model.zip")
        model.save_replay_buffer(tmp_path / "replay")
        loaded = ScratchDQN.load(tmp_path / "model.zip", env=TimeoutEnv(), engine=engines[2])
        assert_equal(model.get_parameters(), loaded.get_parameters())
        loaded.load_replay_buffer(tmp_path / "replay")
        loaded.learn(60, reset_num_timesteps=False)
        assert loaded._engine.name == engines[2]
        return loaded

    whole = learn(["eager", "eager", "eager"])
    assert_close(whole, learn(["fused", "eager", "fused"]), bound=1e-4)
    assert_close(whole, learn(["eager", "fused", "eager"]), bound=1e-4)


def test_a_loaded_model_trains_what_it_acts_by():
    model = make("defaults", "fused").learn(100)
    other = make("defaults", "fused", seed=5).learn(100)
    model.set_parameters(other.get_parameters())
    assert distance(model, other) == 0
    observations = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    assert_equal(model._engine.act(observations), other.predict(observations, deterministic=True)[0])
    np.random.seed(3)
    model.replay_buffer = other.replay_buffer
    model.train(5, 32)
    np.random.seed(3)
    other.train(5, 32)
    assert distance(model, other) == 0
    assert model.policy.optimizer.state_dict()["state"][0]["step"] == other._n_updates


def test_memory_that_somebody_else_puts_in_place_is_used():
    model = make("defaults", "fused").learn(100)
    with th.no_grad():
        for parameter in model.q_net.parameters():
            parameter.data = th.zeros_like(parameter)
    model.train(1, 32)
    largest = max(parameter.abs().max().item() for parameter in model.q_net.parameters())
    assert 0 < largest < 0.01


def test_weights_that_a_callback_writes_are_read():
    model = make("defaults", "fused").learn(100)
    with th.no_grad():
        model.q_net.q_net[4].weight.zero_()
        model.q_net.q_net[4].bias.copy_(th.tensor([0.0, 2.0, 1.0]))
    assert model._engine.act(np.zeros((1, 3), np.float32)) == [1]
    assert model.predict(np.zeros(3, np.float32), deterministic=True)[0] == 1


def test_gradients_are_left_where_autograd_leaves_them():
    fused, eager = (make("defaults", engine).learn(44) for engine in ("fused", "eager"))
    for one, another in zip(fused.q_net.parameters(), eager.q_net.parameters(), strict=True):
        th.testing.assert_close(one.grad, another.grad, rtol=1e-4, atol=1e-6)


def test_a_network_of_which_a_part_was_trained_alone_goes_on():
    models = [make("defaults", engine).learn(60) for engine in ("eager", "fused")]
    for model in models:
        state = model.policy.optimizer.state_dict()
        for key in ("step", "exp_avg", "exp_avg_sq"):
            state["state"][0][key] = state["state"][0][key] * 0 + (10 if key == "step" else 0)
        model.policy.optimizer.load_state_dict(state)
        np.random.seed(1)
        model.train(20, 32)
    assert_close(*models)
    assert models[1].policy.optimizer.state_dict()["state"][0]["step"] == 30


def test_averages_that_are_too_small_to_matter_become_zero():
    model = make("defaults", "fused").learn(60)
    averages = [state["exp_avg"] for state in model.policy.optimizer.state.values()]
    averages[0][0, 0] = _NOTHING / 2
    averages[0][1, 0] = -2 * _NOTHING
    model._engine._flat._flush()
    assert averages[0][0, 0] == 0
    assert averages[0][1, 0] == np.float32(-2 * _NOTHING)


class OwnNetwork(QNetwork):
    def outputs(self, obs):
        return 2 * super().outputs(obs)


class OwnPolicy(DQNPolicy):
    def make_q_net(self):
        return OwnNetwork(**self._update_features_extractor(self.net_args))


class LargerImageEnv(ImageEnv):
    observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)

    def _observe(self):
        return self.np_random.integers(0, 256, (36, 36, 3)).astype(np.uint8)


# Policy, environment, arguments of the policy, and what keeps gradients from being computed by hand
BY_AUTOGRAD = {
    "images": ("CnnPolicy", LargerImageEnv, {}, "features_extractor_class=NatureCNN does more than flatten"),
    "dict": ("MultiInputPolicy", DictEnv, {}, "features_extractor_class=CombinedExtractor does more than flatten"),
    "iqn": ("MlpPolicy", TimeoutEnv, {"head": "iqn"}, "the network is a ImplicitQNetwork, not a plain QNetwork"),
    "activation": ("MlpPolicy", TimeoutEnv, {"activation_fn": nn.ELU}, "activation_fn=ELU is none of ReLU, Tanh"),
    "stream": ("MlpPolicy", TimeoutEnv, {"activation_fn": nn.ELU, "dueling": True}, "activation_fn=ELU"),
    "amsgrad": ("MlpPolicy", TimeoutEnv, {"optimizer_kwargs": {"amsgrad": True, "eps": 1e-4}}, "Adam has amsgrad=True"),
    "own network": (OwnPolicy, TimeoutEnv, {}, "the network is a OwnNetwork, not a plain QNetwork"),
}


@pytest.mark.parametrize("name", BY_AUTOGRAD)
def test_what_is_not_served_by_hand_is_served_by_autograd_and_agrees(name, capsys):
    policy, env, policy_kwargs, reason = BY_AUTOGRAD[name]
    policy_kwargs = {"optimizer_kwargs": {"eps": 1e-4}, **policy_kwargs}
    settings = {**SETTINGS, "buffer_size": 100, "gradient_steps": 2, "policy_kwargs": policy_kwargs, "verbose": 1}
    eager, fused = (ScratchDQN(policy, env(), engine=engine, **settings).learn(140) for engine in ("eager", "auto"))
    assert (
        f"Using the fused engine with autograd, as the fused engine cannot serve: {reason}" in capsys.readouterr().out
    )
    assert fused._n_updates == eager._n_updates == 50
    assert_close(eager, fused, bound=1e-4)
    # Afterwards everything lies where the eager engine expects it
    assert not vars(fused.q_net).keys() & {"image_format"}
    assert not fused.policy.optimizer.param_groups[0]["fused"]
    loaded_state = fused.policy.optimizer.state_dict()
    eager.policy.optimizer.load_state_dict(loaded_state)
    eager.train(1, 16)


@pytest.mark.parametrize(
    ("policy_kwargs", "reason"),
    [
        ({"optimizer_class": th.optim.SGD}, "optimizer_class=SGD is not Adam"),
        ({"optimizer_kwargs": {"differentiable": True}}, "Adam has differentiable=True"),
    ],
)
def test_what_the_fused_engine_cannot_serve_is_refused_with_the_reason(policy_kwargs, reason, capsys):
    with pytest.raises(
        ValueError, match=r"engine='fused' cannot be used here: .*; engine='auto' takes one that can serve"
    ) as refusal:
        ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=policy_kwargs, engine="fused")
    assert reason in str(refusal.value)
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=policy_kwargs, verbose=1)
    assert model._engine.name == "eager"
    said = capsys.readouterr().out
    assert said.count("Using the eager engine, as") == 1
    assert reason in said


def test_the_engine_is_told_once_and_with_the_reason(capsys):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), verbose=1, learning_starts=10)
    assert capsys.readouterr().out.count("Using the fused engine, the fastest for these settings") == 1
    model.learn(30)
    assert "engine" not in capsys.readouterr().out
    ScratchDQN("MlpPolicy", TimeoutEnv(), verbose=1, engine="eager")
    assert "Using the eager engine, as asked" in capsys.readouterr().out
    ScratchDQN("MlpPolicy", TimeoutEnv())
    assert "engine" not in capsys.readouterr().out


@pytest.mark.parametrize("obstacle", ["module", "parameter", "frozen"])
def test_what_stands_in_the_way_later_makes_it_step_aside(obstacle):
    model = make("defaults", "auto").learn(60)
    assert model._engine.name == "fused"
    layer, seen = model.q_net.q_net[0], []
    if obstacle == "module":
        layer.register_forward_hook(lambda *_: seen.append(1))
    elif obstacle == "parameter":
        layer.weight.register_hook(lambda _: seen.append(1))
    else:
        layer.weight.requires_grad_(False)
    before = layer.weight.clone()
    model.learn(20, reset_num_timesteps=False)
    assert model._engine.title == "the fused engine with autograd"
    assert th.equal(before, layer.weight) == (obstacle == "frozen")
    assert bool(seen) == (obstacle != "frozen")


@pytest.mark.parametrize("shape", [(1, 3, 5), (32, 64, 64), (64, 100, 70), (128, 256, 256)])
@pytest.mark.parametrize("kind", ["numpy", "torch", "onednn", "chosen"])
def test_every_way_to_multiply_gives_the_product(kind, shape):
    rows, n_inputs, n_outputs = shape
    if kind == "onednn" and not products._has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    ways = products.products_for(*shape) if kind == "chosen" else getattr(products, kind.upper())
    th.manual_seed(0)
    x, w, b, g = (
        products.both(th.randn(size))
        for size in ((rows, n_inputs), (n_outputs, n_inputs), (n_outputs,), (rows, n_outputs))
    )
    out, to_w, to_x = (
        products.empty(rows, n_outputs),
        products.empty(n_outputs, n_inputs),
        products.empty(rows, n_inputs),
    )
    products.run([*ways.outputs(x, w, b, out), ways.weight_gradient(g, x, to_w), ways.input_gradient(g, w, to_x)])
    exact = [one.array.astype(np.float64) for one in (x, w, b, g)]
    np.testing.assert_allclose(out.array, exact[0] @ exact[1].T + exact[2], atol=1e-4)
    np.testing.assert_allclose(to_w.array, exact[3].T @ exact[0], atol=1e-4)
    np.testing.assert_allclose(to_x.array, exact[3] @ exact[1], atol=1e-4)


def test_deterministic_algorithms_are_not_chosen_by_the_clock():
    th.use_deterministic_algorithms(True)
    try:
        assert products.products_for(128, 512, 512) is products.TORCH
    finally:
        th.use_deterministic_algorithms(False)


class Tripled(nn.Sequential):
    def forward(self, x):
        return 3 * super().forward(x)


def unused_parameter(network):
    network.unused = nn.Parameter(th.ones(2))


def no_bias(network):
    network.q_net[0] = nn.Linear(3, 64, bias=False)


def own_layers(network):
    network.q_net = Tripled(*network.q_net)


def tied(network):
    network.q_net[2].weight = nn.Parameter(th.eye(64))
    network.q_net[4] = nn.Linear(64, 3)
    network.q_net[0] = nn.Linear(3, 64)
    network.q_net.insert(3, network.q_net[2])


@pytest.mark.parametrize("change", [unused_parameter, no_bias, own_layers, tied])
def test_networks_that_only_look_plain_are_left_to_autograd(change):
    class Policy(DQNPolicy):
        def make_q_net(self):
            network = super().make_q_net()
            change(network)
            return network

    settings = {**SETTINGS, "policy_kwargs": {"optimizer_kwargs": {"eps": 1e-4, "weight_decay": 0.1}}}
    eager, auto = (
        ScratchDQN(Policy, TimeoutEnv(), engine=engine, **settings).learn(80) for engine in ("eager", "auto")
    )
    assert auto._engine.title == "the fused engine with autograd"
    assert_close(eager, auto)


def maximize(model):
    model.policy.optimizer.param_groups[0]["maximize"] = True


def other_optimizer(kind, **settings):
    def change(model):
        model.policy.optimizer = kind(model.q_net.parameters(), lr=1e-3, **settings)

    return change


def elu(model):
    for network in (model.q_net, model.q_net_target):
        network.q_net[1] = nn.ELU()


def nested_layers(model):
    for network in (model.q_net, model.q_net_target):
        network.q_net[4] = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters(), lr=1e-3, eps=1e-4)
    model.q_net_target.load_state_dict(model.q_net.state_dict())


def without_bias(model):
    for network in (model.q_net, model.q_net_target):
        network.q_net[4].register_parameter("bias", None)
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters(), lr=1e-3, eps=1e-4)


def pruned(model):
    prune.l1_unstructured(model.q_net.q_net[2], "weight", amount=0.5)
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters(), lr=1e-3, eps=1e-4)


def doubled(_, __, output):
    return 2 * output


def hooked(model):
    model.q_net.q_net[0].register_forward_hook(doubled)


def patch_layer(model):
    own = model.q_net.q_net[0].forward
    model.q_net.q_net[0].forward = lambda x: 2 * own(x)


def patch_layers(model):
    own = model.q_net.q_net.forward
    model.q_net.q_net.forward = lambda x: 2 * own(x)


def patch_extractor(model):
    own = model.q_net.features_extractor.forward
    model.q_net.features_extractor.forward = lambda x: 2 * own(x)


def append_layer(model):
    model.q_net.q_net.append(nn.Tanh())


def share_with_target(model):
    model.q_net_target.q_net[0] = model.q_net.q_net[0]


def one_network(model):
    model.q_net_target = model.q_net


def other_average(model):
    for state in model.policy.optimizer.state.values():
        state["exp_avg"].data = 3 * state["exp_avg"]


def reset_last_layer(model):
    layer = model.q_net.q_net[4]
    layer.reset_parameters()
    for parameter in layer.parameters():
        for value in model.policy.optimizer.state[parameter].values():
            value.zero_()


def see_pixels_as_they_are(model):
    for network in (model.q_net, model.q_net_target):
        network.normalize_images = False


def weights_apart(model, other):
    """The largest difference of two weights of the first layer."""
    return (model.q_net.q_net[0].weight - other.q_net.q_net[0].weight).abs().max().item()


def own_step(model):
    """Of a part of the network."""
    model.policy.optimizer.zero_grad()
    model.q_net.q_net[4](th.ones(1, 64)).sum().backward()
    model.policy.optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        replace_target, replace_layer, clear_state, replace_average, maximize, patch_loss, patch_outputs, no_gradients,
        patch_layer, patch_layers, patch_extractor, append_layer, share_with_target, one_network, other_average,
        reset_last_layer, own_step, elu,
    ],
)  # fmt: skip
def test_what_somebody_changes_between_updates_is_heeded(change):
    def learn(engine, change):
        model = make("defaults", engine).learn(60)
        th.manual_seed(5)
        change(model)
        np.random.seed(0)
        model.train(5, 32)
        return model

    eager, fused, unchanged = learn("eager", change), learn("auto", change), learn("eager", lambda _: None)
    if change is not no_gradients:  # which is to change nothing
        assert weights_apart(eager, unchanged) > 1e-4
    assert_close(eager, fused)
    assert all(parameter.grad is not None for parameter in fused.q_net.parameters())


@pytest.mark.parametrize(
    "change",
    [
        freeze, maximize, hooked, patch_outputs, patch_layer, elu, nested_layers, without_bias, pruned,
        other_optimizer(th.optim.SGD), other_optimizer(th.optim.AdamW, eps=1e-4, weight_decay=0.1),
        other_optimizer(th.optim.Adam, eps=1e-4, betas=(0.9, 0.5), amsgrad=True),
        share_with_target, one_network, append_layer,
    ],
)  # fmt: skip
def test_what_somebody_changes_before_the_first_update_is_heeded(change):
    def learn(engine, change):
        model = make("defaults", engine)
        th.manual_seed(5)
        change(model)
        return model.learn(60).learn(20, reset_num_timesteps=False)

    eager, auto, unchanged = learn("eager", change), learn("auto", change), learn("eager", lambda _: None)
    assert weights_apart(eager, unchanged) > 1e-3
    pairs = zip(eager.q_net.parameters(), auto.q_net.parameters(), strict=True)
    assert max((one - another).abs().max().item() for one, another in pairs) < 1e-4


def test_images_that_are_to_be_seen_as_they_are_from_now_on_are():
    def learn(engine, change):
        model = make("images", engine).learn(60)
        change(model)
        np.random.seed(0)
        model.train(3, 16)
        return model

    eager, fused = (learn(engine, see_pixels_as_they_are) for engine in ("eager", "auto"))
    assert weights_apart(eager, learn("eager", lambda _: None)) > 1e-3
    assert_close(eager, fused, bound=1e-4)


def test_hooks_of_all_modules_and_of_all_optimizers_are_called():
    model, calls = make("defaults", "auto").learn(60), []
    hook = register_module_forward_hook(lambda *_: calls.append("module"))
    try:
        model.train(2, 32)
    finally:
        hook.remove()
    assert "module" in calls
    model = make("defaults", "auto").learn(60)
    hook = register_optimizer_step_post_hook(lambda *_: calls.append("optimizer"))
    try:
        model.train(2, 32)
    finally:
        hook.remove()
    assert calls.count("optimizer") == 2


def change_objective(model):
    model.loss, model.double_q = "mse", True


def change_policy(model):
    model.policy = DQNPolicy(model.observation_space, model.action_space, model.lr_schedule)


@pytest.mark.parametrize("change", [change_objective, change_policy, other_optimizer(th.optim.SGD), freeze])
@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("case", ["masks", "filled", "patched"])
def test_what_somebody_changes_where_nobody_looked_is_heeded(change, engine, case):
    """Where nothing greedy was done before, or somebody comes between the last action and the update."""
    settings = {"target_update_interval": 10_000, "learning_starts": 100 if case == "filled" else 40}

    def learn(told):
        def changed():
            change(model)
            if told:
                model._choose_engine()

        model = make("masks" if case == "masks" else "defaults", engine, **settings).learn(100)
        th.manual_seed(0)
        if case == "patched":
            own = model.train

            def train(gradient_steps, batch_size):
                if model.num_timesteps == 104:
                    changed()
                own(gradient_steps, batch_size)

            model.train = train
        else:
            changed()
        np.random.seed(0)
        if case == "filled":
            model.train(8, 32)
        else:
            model.learn(20, reset_num_timesteps=False)
        return model

    model, expected = learn(False), learn(True)
    assert_equal(list(expected.q_net.parameters()), list(model.q_net.parameters()))
    assert not th.equal(model.q_net.q_net[2].weight, make("defaults", engine).q_net.q_net[2].weight)


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("where", ["step", "schedule", "collect"])
def test_what_happens_in_the_middle_of_a_rollout_is_heeded_by_the_next_update(engine, where):
    def learn(told):
        models = []

        def change(place):
            if place != where or not models or models[0].num_timesteps < 80:
                return
            if type(models[0].policy.optimizer) is not th.optim.SGD:
                other_optimizer(th.optim.SGD)(models[0])
                if told:
                    models[0]._choose_engine()

        class Env(TimeoutEnv):
            def step(self, action):
                change("step")
                return super().step(action)

        def schedule(_):
            change("schedule")
            return 0.1

        model = ScratchDQN("MlpPolicy", Env(), engine=engine, exploration_schedule=schedule, **SETTINGS)
        models.append(model)
        if where == "collect":
            own = model.collect_rollouts

            def collect(*args, **kwargs):
                found = own(*args, **kwargs)
                change("collect")
                return found

            model.collect_rollouts = collect
        return model.learn(84)

    model, expected = learn(False), learn(True)
    assert type(model.policy.optimizer) is th.optim.SGD
    assert_equal(list(expected.q_net.parameters()), list(model.q_net.parameters()))


def test_memory_that_processes_share_stays_shared():
    for learned in (0, 60):
        model = make("defaults", "auto")
        if learned:
            model.learn(learned)
        model.policy.share_memory()
        seen = model.q_net.q_net[0].weight.detach()
        model.learn(60)
        assert seen.is_shared()
        assert th.equal(seen, model.q_net.q_net[0].weight)


class Views(BaseCallback):
    """Holds the memory of a weight, and writes to it."""

    def _on_training_start(self):
        self.seen = self.model.q_net.q_net[0].weight.detach().numpy()

    def _on_step(self):
        assert np.array_equal(self.seen, self.model.q_net.q_net[0].weight.detach().numpy())
        if self.n_calls == 70:  # which has the engine made anew
            self.model.set_parameters(self.model.get_parameters())
        if self.n_calls == 80:
            self.seen *= 0.5
        return True


def test_views_of_weights_that_callbacks_take_stay_views():
    models = [make("defaults", engine).learn(120, Views()) for engine in ("eager", "fused")]
    assert_close(*models)


def test_a_batch_of_large_observations_is_not_drawn_many_times_at_once():
    class Large(TimeoutEnv):
        observation_space = spaces.Box(-1, 1, (40_000,), np.float32)

        def _observe(self):
            return np.zeros(40_000, np.float32)

    settings = {**SETTINGS, "buffer_size": 50, "policy_kwargs": net(4)}
    model = ScratchDQN("MlpPolicy", Large(), engine="fused", **settings).learn(50)
    model.train(3, 32)
    model.train(1, 64)
    networks = model._engine._online, model._engine._target
    assert {rows for network in networks for rows, _ in network._passes} == {1, 32, 64}


def test_settings_that_cannot_work_are_refused_in_the_middle_too_and_each_time():
    model = make("defaults", "auto").learn(60)
    cases = [
        ({"engine": "gpu"}, "engine='gpu' is unknown"),
        ({"engine": "cuda_graph"}, "engine='cuda_graph' cannot be used here"),
        ({"loss": "l1"}, "loss='l1' is unknown"),
        ({"munchausen": True, "munchausen_kwargs": {"temp": 1.0}}, "munchausen_kwargs"),
        ({"munchausen": True, "munchausen_kwargs": {"tau": 0.0}}, "munchausen_kwargs: tau=0.0"),
    ]
    for settings, message in cases:
        before = {name: getattr(model, name) for name in settings}
        for name, value in settings.items():
            setattr(model, name, value)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                model.learn(20, reset_num_timesteps=False)
        for name, value in before.items():
            setattr(model, name, value)
    updates = model._n_updates
    model.learn(20, reset_num_timesteps=False)
    assert model._n_updates > updates


def test_training_that_diverges_is_silent_and_users_code_is_not():
    with np.errstate(all="raise"):
        make("defaults", "fused", learning_rate=1e30).learn(80)
        model = make("defaults", "fused").learn(60)
        model.replay_buffer.sample = lambda *_, **__: np.ones(1) / np.zeros(1)
        with pytest.raises(FloatingPointError):
            model.train(1, 32)


def test_anomalies_are_looked_for_where_autograd_is_to():
    model = make("defaults", "auto").learn(60)
    model.replay_buffer.rewards[:] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow, and where it was
        with th.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="nan"):
            model.train(1, 32)
    model.learn(4, reset_num_timesteps=False)
    assert model._engine.title == "the fused engine"


def test_the_fastest_engine_comes_back():
    model = make("defaults", "auto").learn(60)
    hook = model.q_net.q_net[0].register_forward_hook(lambda *_: None)
    model.learn(20, reset_num_timesteps=False)
    assert model._engine.title == "the fused engine with autograd"
    hook.remove()
    model.learn(20, reset_num_timesteps=False)
    assert model._engine.title == "the fused engine"


def test_a_target_network_without_gradients_is_served_by_hand():
    class Policy(DQNPolicy):
        def _build(self, lr_schedule):
            super()._build(lr_schedule)
            self.q_net_target.requires_grad_(False)

    settings = {**SETTINGS, "policy_kwargs": {"optimizer_kwargs": {"eps": 1e-4}}}
    eager, fused = (
        ScratchDQN(Policy, TimeoutEnv(), engine=engine, **settings).learn(80) for engine in ("eager", "auto")
    )
    assert fused._engine.title == "the fused engine"
    assert_close(eager, fused)


def test_hooks_see_images_in_the_order_that_pytorch_has_them_in():
    settings = {**SETTINGS, "buffer_size": 100}
    model = ScratchDQN("CnnPolicy", LargerImageEnv(), **settings)
    seen = []
    model.q_net.features_extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0].view(-1)))
    model.learn(60)
    assert seen
    assert model._n_updates == 5


@pytest.mark.parametrize("what", ["hook", "patch", "target"])
def test_hooks_and_patches_of_the_optimizer_and_the_target_are_called(what):
    calls = []
    model = make("defaults", "auto").learn(60)
    optimizer = model.policy.optimizer
    if what == "hook":
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    elif what == "patch":
        step = optimizer.step
        optimizer.step = lambda: calls.append(1) or step()
    else:
        model.q_net_target.q_net[0].register_forward_hook(lambda *_: calls.append(1))
    model.train(4, 32)
    assert len(calls) == 4
    engine = model._engine
    model.train(1, 32)
    assert model._engine is engine, "one engine is enough"


def test_extractors_that_view_their_images_are_served():
    class Viewing(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 5)
            self.conv, self.linear = nn.Conv2d(3, 2, 8, 4), nn.Linear(128, 5)

        def forward(self, observations):
            return self.linear(self.conv(observations).view(len(observations), -1))

    kwargs = {"features_extractor_class": Viewing}
    model = ScratchDQN("CnnPolicy", LargerImageEnv(), policy_kwargs=kwargs, **{**SETTINGS, "buffer_size": 100})
    assert model.learn(60)._n_updates == 5


def test_small_averages_are_looked_for_while_training():
    model = make("defaults", "fused").learn(60)
    average = model.policy.optimizer.state[model.q_net.q_net[0].weight]["exp_avg"]
    dead = 7
    with th.no_grad():  # a unit that is never active has no gradient
        model.q_net.q_net[0].weight[dead] = 0
        model.q_net.q_net[0].bias[dead] = -1
    average[dead] = _NOTHING
    model.train(200, 32)
    assert not average[dead].any()


def test_models_can_be_pickled_and_copied_after_training():
    model = make("rainbow", "fused").learn(60)
    for again in (pickle.loads(pickle.dumps(model)), deepcopy(model)):
        assert_equal(model.get_parameters(), again.get_parameters())
        before = [parameter.clone() for parameter in model.policy.parameters()]
        again.train(3, 32)
        assert_equal(before, list(model.policy.parameters()))
        assert distance(model, again) > 0


def test_losses_that_are_no_numbers_are_no_numbers_in_every_engine():
    for engine in ("eager", "fused"):
        model = make("mse", engine, max_grad_norm=float("inf")).learn(50)
        model.replay_buffer.rewards[:] = 1e19
        model.train(2, 32)
        assert model.q_net.q_net[4].bias.isnan().any(), engine
