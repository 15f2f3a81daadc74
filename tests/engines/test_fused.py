"""The fused engine computes what the eager engine computes, up to rounding, and names what it does not support."""

import pickle
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch as th
from cuda_cases import assert_close, distance
from fused_cases import CASES, SETTINGS, LargerImageEnv, make
from helpers import DictEnv, TimeoutEnv, assert_equal
from switching import learned_by_turns
from torch import nn

from sb3_scratch_dqn import DQNPolicy, ScratchDQN
from sb3_scratch_dqn.engines.fused import products
from sb3_scratch_dqn.engines.fused.flat import _FLUSH_THRESHOLD
from sb3_scratch_dqn.networks.q_network import QNetwork

# The support of C51 is narrow here, so that targets reach its ends
pytestmark = pytest.mark.filterwarnings("ignore:head_kwargs=dict:UserWarning")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gradient_steps", [1, 4])
def test_fifty_updates_match_the_eager_engine(name, gradient_steps):
    def learn(engine):
        model = make(name, engine, gradient_steps=gradient_steps)
        steps = 4 * 52 // gradient_steps  # calls of env.step()
        return model.learn(SETTINGS["learning_starts"] + model.n_envs * steps)

    eager, fused, before = learn("eager"), learn("fused"), make(name, "eager")
    assert fused._engine.name == "fused"
    assert fused._n_updates == eager._n_updates >= 50
    assert distance(before, eager) > 1e-3, "the comparison needs updates that change the parameters"
    assert_close(eager, fused)
    # The same actions were taken, and the same transitions sampled
    assert_equal(eager.replay_buffer.actions, fused.replay_buffer.actions)


@pytest.mark.parametrize("name", ["defaults", "double", "quantile", "prioritized"])
def test_many_gradient_steps_per_call_match_the_eager_engine(name):
    settings = {"gradient_steps": 128, "train_freq": 64, "learning_rate": 1e-3}
    eager, fused = (make(name, engine, **settings).learn(128) for engine in ("eager", "fused"))
    assert fused._n_updates == eager._n_updates == 256
    assert_close(eager, fused, bound=2e-4)


@pytest.mark.parametrize("name", ["defaults", "noisy", "rainbow", "several environments"])
def test_the_same_random_numbers_are_drawn(name):
    states = []
    for engine in ("eager", "fused"):
        make(name, engine, gradient_steps=3).learn(100)
        states.append((np.random.get_state()[1:], th.get_rng_state()))
    assert_equal(*states)


@pytest.mark.parametrize("name", ["defaults", "rainbow"])
def test_engines_can_be_switched_and_models_saved_and_loaded_during_training(name, tmp_path):
    def learn(engines):
        return learned_by_turns(partial(make, name), TimeoutEnv, engines, tmp_path)

    whole = learn(["eager", "eager", "eager"])
    assert_close(whole, learn(["fused", "eager", "fused"]), bound=1e-4)
    assert_close(whole, learn(["eager", "fused", "eager"]), bound=1e-4)


def test_loaded_parameters_are_used_for_acting_and_training():
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


def test_replaced_memory_of_parameters_is_used():
    model = make("defaults", "fused").learn(100)
    with th.no_grad():
        for parameter in model.q_net.parameters():
            parameter.data = th.zeros_like(parameter)
    model.train(1, 32)
    largest = max(parameter.abs().max().item() for parameter in model.q_net.parameters())
    assert 0 < largest < 0.01


def test_weights_written_by_a_callback_are_used():
    model = make("defaults", "fused").learn(100)
    with th.no_grad():
        model.q_net.q_net[4].weight.zero_()
        model.q_net.q_net[4].bias.copy_(th.tensor([0.0, 2.0, 1.0]))
    assert model._engine.act(np.zeros((1, 3), np.float32)) == [1]
    assert model.predict(np.zeros(3, np.float32), deterministic=True)[0] == 1


def test_grad_is_the_gradient_as_after_autograd():
    fused, eager = (make("defaults", engine).learn(44) for engine in ("fused", "eager"))
    for a, b in zip(fused.q_net.parameters(), eager.q_net.parameters(), strict=True):
        th.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_training_continues_with_different_step_counts_per_parameter():
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


def test_averages_too_small_to_matter_become_zero():
    model = make("defaults", "fused").learn(60)
    averages = [state["exp_avg"] for state in model.policy.optimizer.state.values()]
    averages[0][0, 0] = _FLUSH_THRESHOLD / 2
    averages[0][1, 0] = -2 * _FLUSH_THRESHOLD
    model._engine._flat._flush()
    assert averages[0][0, 0] == 0
    assert averages[0][1, 0] == np.float32(-2 * _FLUSH_THRESHOLD)


class OwnNetwork(QNetwork):
    def outputs(self, obs):
        return 2 * super().outputs(obs)


class OwnPolicy(DQNPolicy):
    def make_q_net(self):
        return OwnNetwork(**self._update_features_extractor(self.net_args))


# Policy, environment, policy_kwargs, and why hand-derived gradients do not support it
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
def test_other_networks_are_trained_by_autograd_and_match_the_eager_engine(name, capsys):
    policy, env, policy_kwargs, reason = BY_AUTOGRAD[name]
    policy_kwargs = {"optimizer_kwargs": {"eps": 1e-4}, **policy_kwargs}
    settings = {**SETTINGS, "buffer_size": 100, "gradient_steps": 2, "policy_kwargs": policy_kwargs, "verbose": 1}
    # Random actions, so that both sample the same batches: on some processors rounding may change a greedy action
    settings["exploration_final_eps"] = 1.0
    eager, fused = (ScratchDQN(policy, env(), engine=engine, **settings).learn(140) for engine in ("eager", "auto"))
    because = f"because the fused engine does not support this configuration: {reason}"
    assert f"Using the fused engine with autograd, {because}" in capsys.readouterr().out
    assert fused._n_updates == eager._n_updates == 50
    assert_close(eager, fused, bound=1e-4)
    # Training leaves no setting behind that the eager engine does not expect
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
def test_an_unsupported_configuration_raises_an_error_with_the_reason(policy_kwargs, reason, capsys):
    with pytest.raises(
        ValueError, match=r"engine='fused' cannot be used here: .*; engine='auto' selects one that does"
    ) as error:
        ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=policy_kwargs, engine="fused")
    assert reason in str(error.value)
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=policy_kwargs, verbose=1)
    assert model._engine.name == "eager"
    output = capsys.readouterr().out
    assert output.count("Using the eager engine, because") == 1
    assert reason in output


def test_the_engine_is_printed_once_with_the_reason(capsys):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), verbose=1, learning_starts=10)
    assert capsys.readouterr().out.count("Using the fused engine, the fastest for these settings") == 1
    model.learn(30)
    assert "engine" not in capsys.readouterr().out
    ScratchDQN("MlpPolicy", TimeoutEnv())
    assert "engine" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "env", "engine", "message"),
    [
        ("MlpPolicy", TimeoutEnv, "eager", "Using the eager engine, as selected"),
        ("MlpPolicy", TimeoutEnv, "fused", "Using the fused engine, as selected"),
        (
            "CnnPolicy",
            LargerImageEnv,
            "fused",
            "Using the fused engine with autograd, because the fused engine does not support this configuration",
        ),
    ],
)
def test_a_selected_engine_is_printed_as_selected_unless_another_of_its_name_was_skipped(
    policy, env, engine, message, capsys
):
    ScratchDQN(policy, env(), verbose=1, engine=engine, buffer_size=100)
    assert capsys.readouterr().out.count(message) == 1


@pytest.mark.parametrize("obstacle", ["module", "parameter", "frozen"])
def test_a_later_obstacle_makes_auto_select_autograd(obstacle):
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
def test_every_library_computes_the_product(kind, shape):
    rows, n_inputs, n_outputs = shape
    if kind == "onednn" and not products._has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    library = products.products_for(*shape) if kind == "chosen" else getattr(products, kind.upper())
    th.manual_seed(0)
    x, w, b, g = (
        products.numpy_tensor(th.randn(size))
        for size in ((rows, n_inputs), (n_outputs, n_inputs), (n_outputs,), (rows, n_outputs))
    )
    out, w_gradient, x_gradient = (
        products.empty(rows, n_outputs),
        products.empty(n_outputs, n_inputs),
        products.empty(rows, n_inputs),
    )
    gradients = [library.weight_gradient(g, x, w_gradient), library.input_gradient(g, w, x_gradient)]
    products.run([*library.outputs(x, w, b, out), *gradients])
    exact = [each.array.astype(np.float64) for each in (x, w, b, g)]
    np.testing.assert_allclose(out.array, exact[0] @ exact[1].T + exact[2], atol=1e-4)
    np.testing.assert_allclose(w_gradient.array, exact[3].T @ exact[0], atol=1e-4)
    np.testing.assert_allclose(x_gradient.array, exact[3] @ exact[1], atol=1e-4)


def test_deterministic_algorithms_are_not_chosen_by_timing():
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
def test_modified_networks_are_trained_by_autograd(change):
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


def test_small_averages_are_flushed_during_training():
    model = make("defaults", "fused").learn(60)
    average = model.policy.optimizer.state[model.q_net.q_net[0].weight]["exp_avg"]
    dead = 7
    with th.no_grad():  # the gradient of a unit that is never active is 0
        model.q_net.q_net[0].weight[dead] = 0
        model.q_net.q_net[0].bias[dead] = -1
    average[dead] = _FLUSH_THRESHOLD
    model.train(200, 32)
    assert not average[dead].any()


def test_models_can_be_pickled_and_copied_after_training():
    model = make("rainbow", "fused").learn(60)
    for copy in (pickle.loads(pickle.dumps(model)), deepcopy(model)):
        assert_equal(model.get_parameters(), copy.get_parameters())
        before = [parameter.clone() for parameter in model.policy.parameters()]
        copy.train(3, 32)
        assert_equal(before, list(model.policy.parameters()))
        assert distance(model, copy) > 0


def test_infinite_losses_give_nan_parameters_in_every_engine():
    for engine in ("eager", "fused"):
        model = make("mse", engine, max_grad_norm=float("inf")).learn(50)
        model.replay_buffer.rewards[:] = 1e19
        model.train(2, 32)
        assert model.q_net.q_net[4].bias.isnan().any(), engine
