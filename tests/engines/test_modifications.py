"""Modifications take effect in every engine: parts, hooks, patches, settings, optimisers."""

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
from cuda_cases import assert_close
from fused_cases import SETTINGS, LargerImageEnv, make, net
from gymnasium import spaces
from helpers import TimeoutEnv, assert_equal
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_scratch_dqn import DQNPolicy, ScratchDQN


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


def same_network(model):
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


def disable_normalize_images(model):
    for network in (model.q_net, model.q_net_target):
        network.normalize_images = False


def weight_difference(model, other):
    """Return the largest difference between weights of the first layers."""
    return (model.q_net.q_net[0].weight - other.q_net.q_net[0].weight).abs().max().item()


def train_last_layer(model):
    model.policy.optimizer.zero_grad()
    model.q_net.q_net[4](th.ones(1, 64)).sum().backward()
    model.policy.optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        replace_target, replace_layer, clear_state, replace_average, maximize, patch_loss, patch_outputs, no_gradients,
        patch_layer, patch_layers, patch_extractor, append_layer, share_with_target, same_network, other_average,
        reset_last_layer, train_last_layer, elu,
    ],
)  # fmt: skip
def test_modifications_between_updates_take_effect(change):
    def learn(engine, change):
        model = make("defaults", engine).learn(60)
        th.manual_seed(5)
        change(model)
        np.random.seed(0)
        model.train(5, 32)
        return model

    eager, fused, unchanged = learn("eager", change), learn("auto", change), learn("eager", lambda _: None)
    if change is not no_gradients:  # which changes no weight
        assert weight_difference(eager, unchanged) > 1e-4
    assert_close(eager, fused)
    assert all(parameter.grad is not None for parameter in fused.q_net.parameters())


@pytest.mark.parametrize(
    "change",
    [
        freeze, maximize, hooked, patch_outputs, patch_layer, elu, nested_layers, without_bias, pruned,
        other_optimizer(th.optim.SGD), other_optimizer(th.optim.AdamW, eps=1e-4, weight_decay=0.1),
        other_optimizer(th.optim.Adam, eps=1e-4, betas=(0.9, 0.5), amsgrad=True),
        share_with_target, same_network, append_layer,
    ],
)  # fmt: skip
def test_modifications_before_the_first_update_take_effect(change):
    def learn(engine, change):
        model = make("defaults", engine)
        th.manual_seed(5)
        change(model)
        return model.learn(60).learn(20, reset_num_timesteps=False)

    eager, auto, unchanged = learn("eager", change), learn("auto", change), learn("eager", lambda _: None)
    assert weight_difference(eager, unchanged) > 1e-3
    pairs = zip(eager.q_net.parameters(), auto.q_net.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-4


def test_disabling_normalize_images_takes_effect():
    def learn(engine, change):
        model = make("images", engine).learn(60)
        change(model)
        np.random.seed(0)
        model.train(3, 16)
        return model

    eager, fused = (learn(engine, disable_normalize_images) for engine in ("eager", "auto"))
    assert weight_difference(eager, learn("eager", lambda _: None)) > 1e-3
    assert_close(eager, fused, bound=1e-4)


def test_global_module_and_optimizer_hooks_are_called():
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
def test_modifications_without_a_check_before_take_effect(change, engine, case):
    """Without a greedy action before, or between the last action and the update."""
    settings = {"target_update_interval": 10_000, "learning_starts": 100 if case == "filled" else 40}

    def learn(choose_again):
        def changed():
            change(model)
            if choose_again:
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
def test_modifications_during_a_rollout_take_effect_in_the_next_update(engine, where):
    def learn(choose_again):
        models = []

        def change(place):
            if place != where or not models or models[0].num_timesteps < 80:
                return
            if type(models[0].policy.optimizer) is not th.optim.SGD:
                other_optimizer(th.optim.SGD)(models[0])
                if choose_again:
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
                rollout = own(*args, **kwargs)
                change("collect")
                return rollout

            model.collect_rollouts = collect
        return model.learn(84)

    model, expected = learn(False), learn(True)
    assert type(model.policy.optimizer) is th.optim.SGD
    assert_equal(list(expected.q_net.parameters()), list(model.q_net.parameters()))


def test_shared_memory_stays_shared():
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
    """Stores a view of a weight, and writes to it."""

    def _on_training_start(self):
        self.seen = self.model.q_net.q_net[0].weight.detach().numpy()

    def _on_step(self):
        assert np.array_equal(self.seen, self.model.q_net.q_net[0].weight.detach().numpy())
        if self.n_calls == 70:  # which creates a new engine
            self.model.set_parameters(self.model.get_parameters())
        if self.n_calls == 80:
            self.seen *= 0.5
        return True


def test_views_of_weights_stored_by_callbacks_stay_views():
    models = [make("defaults", engine).learn(120, Views()) for engine in ("eager", "fused")]
    assert_close(*models)


def test_batches_of_large_observations_are_not_prefetched():
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


def test_invalid_settings_raise_errors_during_training_too_and_each_time():
    model = make("defaults", "auto").learn(60)
    cases = [
        ("engine", "gpu", "engine='gpu' is unknown"),
        ("loss", "l1", "loss='l1' is unknown"),
        ("munchausen_kwargs", {"temp": 1.0}, "munchausen_kwargs"),
        ("munchausen_kwargs", {"tau": 0.0}, "munchausen_kwargs: tau=0.0"),
    ]
    for name, value, message in cases:
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                setattr(model, name, value)
        # Without checks, as loading a model sets them
        before = vars(model)[name]
        vars(model).update({name: value, "munchausen": name == "munchausen_kwargs"})
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                model.learn(20, reset_num_timesteps=False)
        vars(model).update({name: before, "munchausen": False})
    model.engine = "cuda_graph"  # which exists, but does not support the CPU
    for _ in range(2):
        with pytest.raises(ValueError, match="engine='cuda_graph' cannot be used here"):
            model.learn(20, reset_num_timesteps=False)
    model.engine = "auto"
    updates = model._n_updates
    model.learn(20, reset_num_timesteps=False)
    assert model._n_updates > updates


def test_the_fastest_engine_is_selected_again_without_the_hook():
    model = make("defaults", "auto").learn(60)
    hook = model.q_net.q_net[0].register_forward_hook(lambda *_: None)
    model.learn(20, reset_num_timesteps=False)
    assert model._engine.title == "the fused engine with autograd"
    hook.remove()
    model.learn(20, reset_num_timesteps=False)
    assert model._engine.title == "the fused engine"


def test_a_frozen_target_network_is_supported_by_the_fused_engine():
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


def test_hooks_get_images_in_contiguous_format():
    settings = {**SETTINGS, "buffer_size": 100}
    model = ScratchDQN("CnnPolicy", LargerImageEnv(), **settings)
    seen = []
    model.q_net.features_extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0].view(-1)))
    model.learn(60)
    assert seen
    assert model._n_updates == 5


@pytest.mark.parametrize("kind", ["hook", "patch", "target"])
def test_hooks_and_patches_of_the_optimizer_and_the_target_are_called(kind):
    calls = []
    model = make("defaults", "auto").learn(60)
    optimizer = model.policy.optimizer
    if kind == "hook":
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    elif kind == "patch":
        step = optimizer.step
        optimizer.step = lambda: calls.append(1) or step()
    else:
        model.q_net_target.q_net[0].register_forward_hook(lambda *_: calls.append(1))
    model.train(4, 32)
    assert len(calls) == 4
    engine = model._engine
    model.train(1, 32)
    assert model._engine is engine, "the engine is reused"


def test_extractors_that_call_view_on_images_are_supported():
    class Viewing(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 5)
            self.conv, self.linear = nn.Conv2d(3, 2, 8, 4), nn.Linear(128, 5)

        def forward(self, observations):
            return self.linear(self.conv(observations).view(len(observations), -1))

    kwargs = {"features_extractor_class": Viewing}
    model = ScratchDQN("CnnPolicy", LargerImageEnv(), policy_kwargs=kwargs, **{**SETTINGS, "buffer_size": 100})
    assert model.learn(60)._n_updates == 5
