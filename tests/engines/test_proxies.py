"""Proxies of policies, networks, buffers and optimisers are trained by plain PyTorch, with the right results."""

import warnings

import numpy as np
import pytest
import torch as th
from helpers import TimeoutEnv, assert_equal, full_state, random_states
from stable_baselines3 import DQN
from torch import nn

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.common.wrappers import add_wrapper_prefixes, strip_wrapper_prefixes
from sb3_scratch_dqn.networks.policies import DQNPolicy

SETTINGS = {"learning_starts": 20, "batch_size": 8, "buffer_size": 500, "seed": 0}


class Proxy:
    """Forwards attributes that it does not have, as user-defined wrappers do."""

    def __init__(self, inner):
        self.__dict__["inner"] = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name, value):
        setattr(self.inner, name, value)


class ModuleProxy(nn.Module):
    """A proxy that is a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class FakeClass(Proxy):
    """A proxy that reports the class of its inner object, as those of the package wrapt do."""

    @property
    def __class__(self):
        return type(self.__dict__["inner"])


def compiled(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile warns about its own imports
        return th.compile(module, backend="eager")


def compile_policy(model):
    model.policy = compiled(model.policy)


def compile_policy_in_place(model):
    model.policy.compile(backend="eager")


def compile_network(model):
    model.policy.q_net = compiled(model.policy.q_net)


def compile_both_networks(model):
    compile_network(model)
    model.policy.q_net_target = compiled(model.policy.q_net_target)


def compile_network_by_alias(model):
    model.q_net = compiled(model.q_net)


def compile_network_in_place(model):
    model.policy.q_net.compile(backend="eager")


def compile_layers(model):
    model.policy.q_net.q_net = compiled(model.policy.q_net.q_net)


def parallel_network(model):
    model.policy.q_net = nn.DataParallel(model.policy.q_net)


def parallel_both_networks(model):
    parallel_network(model)
    model.policy.q_net_target = nn.DataParallel(model.policy.q_net_target)


def wrapped_policy(model):
    model.policy = Proxy(model.policy)


def faking_policy(model):
    model.policy = FakeClass(model.policy)


def wrapped_network(model):
    model.policy.q_net = ModuleProxy(model.policy.q_net)


def wrapped_optimizer(model):
    model.policy.optimizer = Proxy(model.policy.optimizer)


def wrapped_buffer(model):
    model.replay_buffer = Proxy(model.replay_buffer)


def faking_buffer(model):
    model.replay_buffer = FakeClass(model.replay_buffer)


WITH_OTHER_PARAMETER_NAMES = (wrapped_network,)  # only a model with the same wrapper can load the parameters
WRAPS = [
    compile_policy, compile_policy_in_place, compile_network, compile_both_networks, compile_network_by_alias,
    compile_network_in_place, compile_layers, parallel_network, parallel_both_networks, wrapped_policy,
    faking_policy, wrapped_network, wrapped_optimizer, wrapped_buffer, faking_buffer,
]  # fmt: skip


def unwrapped(state):
    """Remove the prefixes that wrappers add to names."""
    for name in ("_orig_mod.", "module.", "inner."):
        state = {key.replace(name, ""): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_training_with_a_proxy_matches_training_without_it(wrap, engine, tmp_path):
    th._dynamo.reset()
    plain, model = (ScratchDQN("MlpPolicy", TimeoutEnv(), engine=engine, **SETTINGS) for _ in range(2))
    for each in (plain, model):
        each.set_random_seed(1)
        if each is model:
            wrap(each)
        each.learn(100)
        each.random_states = random_states()
    expected, got = full_state(plain), full_state(model)
    expected["parameters"], got["parameters"] = (unwrapped(state["parameters"]) for state in (expected, got))
    if engine == "eager":
        assert_equal(expected, got)
        assert_equal(plain.random_states, model.random_states)
    else:  # the eager engine differs from the fused one by rounding
        for name, value in expected["parameters"].items():
            np.testing.assert_allclose(got["parameters"][name], value, rtol=1e-3, atol=1e-4)

    observation = np.ones(3, dtype=np.float32)
    assert model.predict(observation, deterministic=True)[0] == model.q_values(observation).argmax()
    model.save(tmp_path / "model.zip")
    if wrap in WITH_OTHER_PARAMETER_NAMES:
        return
    loaded = ScratchDQN.load(tmp_path / "model.zip", env=TimeoutEnv())
    assert_equal(loaded.policy.state_dict(), got["parameters"])
    np.testing.assert_allclose(loaded.q_values(observation), model.q_values(observation), rtol=1e-5)
    model.set_parameters(model.get_parameters())
    for each in (loaded, model):
        each.learn(50, reset_num_timesteps=False)
    assert model._n_updates == loaded._n_updates


@pytest.mark.parametrize("wrap", [wrapped_buffer, faking_buffer], ids=lambda wrap: wrap.__name__)
def test_priorities_reach_a_wrapped_buffer(wrap):
    models = [
        ScratchDQN("MlpPolicy", TimeoutEnv(), replay_buffer_kwargs={"prioritized": True}, engine="eager", **SETTINGS)
        for _ in range(2)
    ]
    wrap(models[1])
    for model in models:
        model.set_random_seed(1)
        model.learn(100)
    values = [model.replay_buffer.sampler.tree.values for model in models]
    assert len(set(values[0].tolist())) > 3
    assert_equal(*values)
    assert models[1].replay_buffer.sampler.progress_remaining < 0.1
    assert_equal(*(model.policy.state_dict() for model in models))


def test_a_proxy_that_overrides_sample_is_called():
    class Sampling(Proxy):
        n_calls = 0

        def sample(self, batch_size, env=None):
            type(self).n_calls += 1
            return self.inner.sample(batch_size, env)

    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **SETTINGS)
    model.replay_buffer = Sampling(model.replay_buffer)
    model.learn(100)
    assert Sampling.n_calls == model._n_updates > 0


def test_a_compiled_policy_of_sb3_can_be_converted():
    reference = DQN("MlpPolicy", TimeoutEnv(), **SETTINGS).learn(60)
    observation = np.ones(3, dtype=np.float32)
    expected = ScratchDQN.from_sb3(reference).q_values(observation)
    reference.policy.q_net = compiled(reference.policy.q_net)
    np.testing.assert_array_equal(ScratchDQN.from_sb3(reference).q_values(observation), expected)
    model = ScratchDQN.from_sb3(reference)
    compile_policy(model)
    assert_equal(model.to_sb3().policy.state_dict(), unwrapped(reference.policy.state_dict()))


def test_a_proxy_without_the_outputs_that_its_head_needs_raises_an_error():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"head": "quantile"}, **SETTINGS)
    parallel_network(model)
    with pytest.raises(ValueError, match=r"a DataParallel without a method outputs\(\), which QuantileHead needs"):
        model.learn(50)


def test_a_proxy_of_the_policy_without_its_attributes_raises_an_error():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **SETTINGS)
    model.policy = nn.DataParallel(model.policy)
    with pytest.raises(ValueError, match=r"policy is a DataParallel, which has no 'q_net': wrap policy\.q_net instead"):
        model.learn(50)


@pytest.mark.parametrize("wrap", [compiled, Proxy, FakeClass], ids=lambda wrap: wrap.__name__)
def test_methods_of_a_proxy_count_as_overridden(wrap):
    policy = ScratchDQN("MlpPolicy", TimeoutEnv()).policy
    assert not is_overridden(policy, DQNPolicy, "predict", "noise")
    assert is_overridden(wrap(policy), DQNPolicy, "predict", "noise")


def test_names_of_parameters_have_no_prefixes_of_wrappers():
    def make():
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))

    plain, module = make(), make()
    module[1] = nn.DataParallel(module[1])
    module = compiled(nn.DataParallel(module))
    state = module.state_dict()
    assert "_orig_mod.module.1.module.0.weight" in state
    named = strip_wrapper_prefixes(state, module)
    assert named.keys() == plain.state_dict().keys()
    assert add_wrapper_prefixes(named, module).keys() == state.keys()
