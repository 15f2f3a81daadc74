"""Engines heed what somebody changes behind their backs: parts, hooks, patches, settings, optimisers."""

import warnings

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
from helpers import TimeoutEnv, assert_equal
from recorded import assert_close
from served import SETTINGS, LargerImageEnv, make, net
from stable_baselines3 import DQN
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
        ("engine", "gpu", "engine='gpu' is unknown"),
        ("loss", "l1", "loss='l1' is unknown"),
        ("munchausen_kwargs", {"temp": 1.0}, "munchausen_kwargs"),
        ("munchausen_kwargs", {"tau": 0.0}, "munchausen_kwargs: tau=0.0"),
    ]
    for name, value, message in cases:
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                setattr(model, name, value)
        # Past the checks, as loading a model writes them
        before = vars(model)[name]
        vars(model).update({name: value, "munchausen": name == "munchausen_kwargs"})
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                model.learn(20, reset_num_timesteps=False)
        vars(model).update({name: before, "munchausen": False})
    model.engine = "cuda_graph"  # which there is, but which cannot serve here
    for _ in range(2):
        with pytest.raises(ValueError, match="engine='cuda_graph' cannot be used here"):
            model.learn(20, reset_num_timesteps=False)
    model.engine = "auto"
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


# Mixed precision


@pytest.mark.parametrize("head", ["expected", "c51", "quantile", "iqn"])
def test_autocast_is_heeded_for_as_long_as_it_lasts(head):
    settings = {**SETTINGS, "policy_kwargs": {"head": head, "dueling": True, "noisy": True}, "double_q": True}
    auto, eager = (ScratchDQN("MlpPolicy", TimeoutEnv(), engine=engine, **settings) for engine in ("auto", "eager"))
    fastest = auto._engine.title
    for model in (auto, eager):
        model.policy.load_state_dict(eager.policy.state_dict())
        with th.autocast("cpu", dtype=th.bfloat16):
            model.set_random_seed(0)
            model.learn(60)
    assert auto._engine.title == "the fused engine with autograd"
    for name, value in eager.policy.state_dict().items():
        assert value.dtype == th.float32
        # Of 16 bits, in which a rounding error is another one than in 32, there are 8 digits
        np.testing.assert_allclose(auto.policy.state_dict()[name], value, rtol=0.05, atol=0.02)
    auto.learn(20)
    assert auto._engine.title == fastest


def test_autocast_computes_what_sb3_computes():
    models = []
    for make_model, more in ((DQN, {}), (ScratchDQN, {"engine": "eager"})):
        model = make_model("MlpPolicy", TimeoutEnv(), **{**SETTINGS, **more})
        with th.autocast("cpu", dtype=th.bfloat16):
            model.set_random_seed(0)
            models.append(model.learn(100))
    assert_equal(*(model.policy.state_dict() for model in models))


def test_autocast_is_named_where_the_fused_engine_is_asked_for():
    model = make("defaults", "fused", verbose=1).learn(60)
    with th.autocast("cpu", dtype=th.bfloat16):
        model.learn(20)
        assert model._engine.title == "the fused engine with autograd"
