"""Dueling streams, noisy layers and implicit quantiles: what they compute, and when noise is active."""

import math
from threading import Event, Thread

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import NormedExtractor, TimeoutEnv
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from sb3_scratch_dqn import DQNPolicy, ScratchDQN
from sb3_scratch_dqn.networks.implicit import ImplicitQNetwork
from sb3_scratch_dqn.networks.noisy import NoisyLinear, _sampled, noise
from sb3_scratch_dqn.networks.q_network import DuelingStreams, QNetwork
from sb3_scratch_dqn.values.heads import HEADS


def make_policy(**kwargs):
    th.manual_seed(0)
    return DQNPolicy(spaces.Box(-1, 1, (4,)), spaces.Discrete(3), lambda _: 1e-3, **kwargs)


OBSERVATIONS = th.randn(6, 4, generator=th.Generator().manual_seed(1))


# Dueling


@pytest.mark.parametrize("widths", [[], [8]])
def test_dueling_adds_a_value_to_centred_advantages(widths):
    streams = DuelingStreams(5, widths, 3, 2, nn.Tanh, nn.Linear)
    x = th.randn(7, 5)
    outputs = streams(x).view(7, 3, 2)
    value, advantage = streams.value(x), streams.advantage(x).view(7, 3, 2)
    for i in range(7):
        for k in range(2):
            mean = sum(advantage[i, a, k].item() for a in range(3)) / 3
            for a in range(3):
                expected = value[i, k].item() + advantage[i, a, k].item() - mean
                assert outputs[i, a, k].item() == pytest.approx(expected, abs=1e-6)


def test_each_stream_has_its_own_last_hidden_layer():
    names = dict(make_policy(net_arch=[16, 8], dueling=True).q_net.named_parameters())
    assert names["q_net.0.weight"].shape == (16, 4)
    assert names["q_net.2.value.0.weight"].shape == (8, 16)
    assert names["q_net.2.advantage.0.weight"].shape == (8, 16)
    assert names["q_net.2.value.2.weight"].shape == (1, 8)
    assert names["q_net.2.advantage.2.weight"].shape == (3, 8)


@pytest.mark.parametrize("net_arch", [[], [7], [7, 6], [7, 6, 5]])
@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_every_shape_of_network_values_every_action(head, noisy, dueling, net_arch):
    policy = make_policy(net_arch=net_arch, dueling=dueling, noisy=noisy, head=head)
    assert policy.q_net(OBSERVATIONS).shape == (6, 3)
    outputs = policy.q_net.outputs(OBSERVATIONS)
    assert outputs.shape[:2] == (6, 3)
    outputs.sum().backward()
    # sigma has no effect without noise
    assert all(p.grad is not None for name, p in policy.q_net.named_parameters() if "sigma" not in name)


# Noise


def noise_of(layer):
    """Compute the noise of weights and biases from noisy parameters."""
    weight, bias = layer.sample_parameters()
    return (weight - layer.weight) / layer.weight_sigma, (bias - layer.bias) / layer.bias_sigma


def test_the_noise_is_factorized():
    layer = NoisyLinear(5, 3).double()
    weight_noise, bias_noise = (value.detach() for value in noise_of(layer))
    # Row i is f(eps_i) times the f(eps_j) of the inputs, and f(eps_i) is the noise of the bias
    inputs = weight_noise[0] / bias_noise[0]
    assert len(set(inputs.tolist())) == 5
    np.testing.assert_allclose(weight_noise, bias_noise[:, None] * inputs)


def test_the_noise_is_the_signed_root_of_normal_samples():
    layer = NoisyLinear(1, 100_000).double()
    f = noise_of(layer)[1].detach()
    normal = f.sign() * f**2
    # Within 4 standard errors of mean, variance and fourth moment of a standard normal variable
    n = len(f)
    assert normal.mean().item() == pytest.approx(0, abs=4 / math.sqrt(n))
    assert (normal**2).mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert (normal**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / n))


def test_a_noisy_layer_is_initialised_as_in_the_paper():
    layer = NoisyLinear(16, 400, sigma=0.5)
    assert (layer.weight_sigma == 0.5 / 4).all()
    assert (layer.bias_sigma == 0.5 / 4).all()
    assert layer.weight.abs().max() <= 1 / 4
    assert layer.weight.std().item() == pytest.approx(2 / 4 / math.sqrt(12), rel=0.05)


def test_a_noisy_layer_computes_the_formula_of_the_paper():
    layer = NoisyLinear(4, 3)
    x = th.randn(5, 4)
    np.testing.assert_array_equal(layer(x).detach(), nn.functional.linear(x, layer.weight, layer.bias).detach())
    th.manual_seed(0)
    with noise([layer]):
        actual = layer(x)
        assert th.equal(actual, layer(x)), "the same noise until it is sampled again"
    th.manual_seed(0)
    normal = th.randn(3 + 4)
    f = normal.sign() * normal.abs().sqrt()
    expected = [
        [
            sum((layer.weight[i, j] + layer.weight_sigma[i, j] * f[i] * f[3 + j]) * x[b, j] for j in range(4)).item()
            + (layer.bias[i] + layer.bias_sigma[i] * f[i]).item()
            for i in range(3)
        ]
        for b in range(5)
    ]
    np.testing.assert_allclose(actual.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_noise_belongs_to_one_thread(engine):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"noisy": True, "noisy_sigma": 3.0}, engine=engine)
    observation = np.ones(3, np.float32)
    expected, seen = model.q_values(observation), []

    def predict():
        seen.append(model.q_values(observation))
        seen.append(model.predict(observation, deterministic=True)[0])

    with model.policy.noise():
        thread = Thread(target=predict)
        thread.start()
        thread.join()
        assert not np.array_equal(model.policy.q_values(observation), expected), "this thread has noise"
    np.testing.assert_array_equal(seen[0], expected)
    assert seen[1] == expected.argmax()


def test_training_does_not_change_predictions_in_another_thread():
    settings = {"policy_kwargs": {"noisy": True, "noisy_sigma": 3.0}, "learning_rate": 0.0, "engine": "eager"}
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0, train_freq=1, **settings)
    observation, wrong, calls, stop = np.ones(3, np.float32), [], [], Event()
    expected = model.q_values(observation)

    def predict():
        while not stop.is_set():
            calls.append(None)
            if not np.array_equal(model.q_values(observation), expected):
                wrong.append(None)

    thread = Thread(target=predict)
    thread.start()
    try:
        model.learn(300)
    finally:
        stop.set()
        thread.join()
    assert len(calls) > 20
    assert not wrong


def test_contexts_of_noise_can_be_nested():
    outer, inner = NoisyLinear(2, 2), NoisyLinear(2, 2)
    x = th.ones(1, 2)
    with noise([outer]):
        first = outer(x)
        with noise([inner]):
            assert th.equal(outer(x), first)
            assert not th.equal(inner(x), nn.functional.linear(x, inner.weight, inner.bias))
        assert th.equal(inner(x), nn.functional.linear(x, inner.weight, inner.bias))
        assert th.equal(outer(x), first)


def test_noise_ends_with_its_context_even_on_an_exception():
    layer = NoisyLinear(4, 3)
    with pytest.raises(ZeroDivisionError), noise([layer]):
        _ = 1 / 0
    assert not _sampled.get()


@pytest.mark.parametrize("head", HEADS)
def test_only_exploration_has_noise(head):
    model = ScratchDQN(
        "MlpPolicy",
        TimeoutEnv(),
        policy_kwargs={"noisy": True, "noisy_sigma": 3.0, "head": head},
        exploration_initial_eps=0.0,
        exploration_final_eps=0.0,
        seed=0,
    ).learn(110)
    model.policy.set_training_mode(False)  # as SB3 does before it collects steps
    observation = np.full(3, 0.3, dtype=np.float32)
    deterministic = [int(model.predict(observation, deterministic=True)[0]) for _ in range(60)]
    exploring = [int(model.predict(observation)[0]) for _ in range(60)]
    assert len(set(deterministic)) == 1
    assert deterministic[0] == model.q_values(observation).argmax()
    assert len(set(exploring)) > 1
    assert np.array_equal(model.q_values(observation), model.q_values(observation))


def test_noise_is_fresh_in_every_update_and_environment_step_and_differs_in_the_target_network(monkeypatch):
    seen = []
    sample = NoisyLinear.sample_parameters

    def record(layer):
        sampled = sample(layer)
        seen.append(((sampled[1] - layer.bias) / layer.bias_sigma).tolist())
        return sampled

    model = ScratchDQN(
        "MlpPolicy",
        TimeoutEnv(),
        policy_kwargs={"noisy": True},
        learning_starts=10,
        train_freq=5,
        gradient_steps=2,
        engine="eager",
    )
    layers = sum(isinstance(module, NoisyLinear) for module in model.q_net.modules())
    assert layers == 3
    monkeypatch.setattr(NoisyLinear, "sample_parameters", record)
    model.exploration_initial_eps = model.exploration_final_eps = 0.0
    model._make_epsilon_schedule()
    model.learn(25)
    acting, updating = (25 - 10) * layers, 2 * layers * model._n_updates
    assert model._n_updates == 6
    assert len(seen) == acting + updating
    assert len({tuple(values) for values in seen}) == len(seen)


def test_noise_is_learned():
    class NoNoise(BaseCallback):
        def _on_step(self):
            return not _sampled.get()

    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"noisy": True}, train_freq=1, seed=0)
    before = {name: p.clone() for name, p in model.q_net.named_parameters() if "sigma" in name}
    model.learn(150, NoNoise())
    assert model.num_timesteps == 150, "callbacks run without noise"
    changed = [not th.equal(before[name], p) for name, p in model.q_net.named_parameters() if "sigma" in name]
    assert changed
    assert all(changed)


def test_layers_that_a_subclass_adds_have_noise():
    class Net(QNetwork):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = self.linear(3, 3)

        def outputs(self, obs):
            return self.extra(super().outputs(obs).squeeze(2)).unsqueeze(2)

    class Policy(DQNPolicy):
        def make_q_net(self):
            return Net(**self._update_features_extractor(self.net_args))

    policy = Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(3), lambda _: 1e-3, noisy=True)
    with policy.q_net.noise():
        noisy = policy.q_net.extra(th.ones(3))
    assert not th.equal(noisy, policy.q_net.extra(th.ones(3)))


def test_double_q_learning_chooses_in_evaluation_mode():
    counts = []
    for double_q in (False, True):
        model = ScratchDQN(
            "MlpPolicy",
            TimeoutEnv(),
            double_q=double_q,
            policy_kwargs={"features_extractor_class": NormedExtractor},
            learning_starts=20,
            train_freq=1,
            seed=0,
        ).learn(50)
        assert model.q_net.training
        counts.append(model.q_net.features_extractor.net[1].num_batches_tracked.item())
    assert counts == [30, 30]


# Implicit quantiles


def test_iqn_needs_an_implicit_network():
    class Net(QNetwork):
        pass

    class Policy(DQNPolicy):
        def make_q_net(self):
            return Net(**self._update_features_extractor(self.net_args))

    with pytest.raises(ValueError, match="head='iqn' needs the class ImplicitQNetwork, not Net"):
        Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(3), lambda _: 1e-3, head="iqn")


@pytest.mark.parametrize("method", ["outputs", "forward"])
def test_an_implicit_network_must_override_outputs_at(method):
    with pytest.raises(TypeError, match=r"Net must override outputs_at\(\), which acting and training both call"):
        type("Net", (ImplicitQNetwork,), {method: lambda self, obs: None})


def test_the_target_of_iqn_chooses_actions_by_evenly_spaced_fractions():
    net = make_policy(head="iqn", head_kwargs={"n_tau_prime": 2}).q_net_target
    np.testing.assert_array_equal(
        net.q_values_from(OBSERVATIONS, net.target_outputs(OBSERVATIONS)).detach(), net(OBSERVATIONS).detach()
    )


def test_implicit_quantiles_equal_the_formula_of_the_paper():
    policy = make_policy(net_arch=[8, 6], head="iqn", head_kwargs={"n_cos": 5})
    net = policy.q_net
    fractions = th.rand(6, 3)
    outputs = net.outputs_at(OBSERVATIONS, fractions)
    assert outputs.shape == (6, 3, 6)
    for i in range(6):
        for j in range(3):
            tau = fractions[i, j].item()
            cosines = th.tensor([math.cos(math.pi * n * tau) for n in range(5)])
            phi = th.relu(net.embedding(cosines))
            psi = net.q_net[1](net.q_net[0](OBSERVATIONS[i]))
            expected = net.q_net[4](net.q_net[3](net.q_net[2](psi * phi)))
            np.testing.assert_allclose(outputs[i, :, j].detach(), expected.detach(), rtol=1e-4, atol=1e-6)
            assert (outputs[i, :, 3 + j] == fractions[i, j]).all()


def test_the_numbers_of_fractions_are_configurable():
    policy = make_policy(head="iqn", head_kwargs={"n_tau": 3, "n_tau_prime": 5, "n_tau_act": 7})
    first, second = (policy.q_net.outputs(OBSERVATIONS) for _ in range(2))
    assert first.shape == (6, 3, 6)
    assert not th.equal(first[..., 3:], second[..., 3:]), "fractions are sampled in each call"
    fractions = first[:, 0, 3:].flatten()
    assert len(set(fractions.tolist())) == 18, "and for each observation"
    assert policy.q_net_target.target_outputs(OBSERVATIONS).shape == (6, 3, 10)
    expected = policy.q_net.outputs_at(OBSERVATIONS, (th.arange(7).expand(6, 7) + 0.5) / 7)[..., :7].mean(dim=2)
    np.testing.assert_allclose(policy.q_net(OBSERVATIONS).detach(), expected.detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dueling": 1}, "dueling=1 must be True or False"),
        ({"noisy": "yes"}, "noisy='yes' must be True or False"),
        ({"noisy": True, "noisy_sigma": -1}, "noisy_sigma=-1 must be a number of at least 0"),
    ],
)
def test_wrong_network_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScratchDQN("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs)
