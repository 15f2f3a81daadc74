"""The CUDA graph engine computes what the eager engine computes, up to rounding.

Everything except the capture is the same on every device, so these tests run on the CPU. There a ``FakeGraph`` stores
calls of PyTorch and repeats them on the same memory, without Python, as CUDA graphs do.
"""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch as th
from changes import write
from cuda_cases import (
    CASES,
    CHANGES,
    COMBINATIONS,
    GRADIENT_STEPS,
    OPT_IN_REASON,
    SAMPLED_ON_HOST,
    MaskedEnv,
    Synchronizing,
    assert_close,
    distance,
    learned,
    make,
    trained,
)
from helpers import TimeoutEnv, assert_equal, normalized
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from switching import learned_by_turns

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.engines import choose
from sb3_scratch_dqn.engines.cuda.capture import GraphCapturer
from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine, _graph_sizes
from sb3_scratch_dqn.engines.cuda.feeds import DeviceFeed, HostFeed
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import DenseObservations

pytestmark = [
    pytest.mark.usefixtures("auto_selects_cuda_graphs"),
    # The support of C51 is narrow here, so that targets reach its ends
    pytest.mark.filterwarnings("ignore:head_kwargs=dict:UserWarning"),
]


@pytest.mark.usefixtures("fake_graphs")
@pytest.mark.parametrize("name", CASES)
def test_fifty_updates_match_the_eager_engine(name, monkeypatch):
    # last_update is read below
    monkeypatch.setattr("sb3_scratch_dqn.algorithm.gradient_steps._UPDATES_BETWEEN_METRICS", 10**9)
    updates = 12 if "images" in name or "frames" in name else 48
    gradient_steps = GRADIENT_STEPS[name]
    eager, eager_states = learned(name, "eager", gradient_steps, updates=updates)
    model, model_states = learned(name, "cuda_graph", gradient_steps, updates=updates)
    assert model._engine.name == "cuda_graph"
    assert type(model._engine._feed) is (HostFeed if name in SAMPLED_ON_HOST else DeviceFeed)
    assert model._n_updates == eager._n_updates >= updates
    assert distance(make(name, "eager"), eager) > 1e-3, "the comparison needs updates that change the parameters"
    assert_equal(eager_states, model_states)  # so the same transitions were sampled, and the same noise drawn
    assert_equal(np.array(eager.replay_buffer.actions), np.array(model.replay_buffer.actions))
    assert_close(eager, model, bound=1e-4 if updates == 12 else 2e-5)
    for a, b in zip(eager.q_net.parameters(), model.q_net.parameters(), strict=True):
        th.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    eager_metrics, model_metrics = (each._engine.last_update.metrics() for each in (eager, model))
    assert eager_metrics == pytest.approx(model_metrics, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=", ".join)
def test_every_combination_matches_the_eager_engine(combination, fake_graphs):
    (eager, eager_states), (model, model_states) = (trained(combination, engine) for engine in ("eager", "cuda_graph"))
    assert type(model._engine._feed) is DeviceFeed
    assert eager.replay_buffer.store.obs_store.__class__ is (
        StackedFrames if combination[2] == "frames" else DenseObservations
    )
    assert_equal(eager_states, model_states)
    assert_close(eager, model)
    # Graphs of two sizes, of the target network, of actions unless there are masks, and of new priorities
    prioritized = hasattr(model.replay_buffer.sampler, "tree")
    assert len(fake_graphs.graphs) == 3 + (combination[2] != "masks") + prioritized


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["defaults", "prioritized", "rainbow", "normalized"])
def test_many_consecutive_gradient_steps_match_the_eager_engine(name):
    settings = {"gradient_steps": 300, "train_freq": 64, "learning_rate": 1e-3}
    (eager, eager_states), (model, model_states) = (
        learned(name, engine, updates=16, **settings) for engine in ("eager", "cuda_graph")
    )
    assert model._n_updates == eager._n_updates >= 300
    assert_equal(eager_states, model_states)
    assert_close(eager, model, bound=5e-4)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["prioritized", "normed", "rainbow with iqn", "frames, prioritized, n-step"])
def test_warm_up_preserves_state(name, monkeypatch):
    plain, states = learned(name, "cuda_graph", 4, updates=16)
    monkeypatch.setattr(GraphCapturer, "warm_ups", property(lambda _: 3, lambda *_: None), raising=False)
    warmed, warmed_states = learned(name, "cuda_graph", 4, updates=16)
    assert_equal(states, warmed_states)
    assert_equal(plain.policy.state_dict(), warmed.policy.state_dict())
    assert_equal(plain.policy.optimizer.state_dict()["state"], warmed.policy.optimizer.state_dict()["state"])
    assert_equal(
        plain.replay_buffer.sampler.__dict__.get("_max_value"), warmed.replay_buffer.sampler.__dict__.get("_max_value")
    )
    if name != "normed":
        assert_equal(plain.replay_buffer.sampler.tree.values, warmed.replay_buffer.sampler.tree.values)


@pytest.mark.parametrize("n_updates", [1, 3, 4, 15, 16, 21, 128, 255])
def test_graph_sizes_add_up_to_any_number_of_updates(n_updates):
    assert sum(_graph_sizes(n_updates, 256)) == n_updates
    assert _graph_sizes(n_updates, 1) == [1] * n_updates
    assert len(_graph_sizes(n_updates, 256)) <= n_updates // 16 + 6


# Modifications and files


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["defaults", "rainbow"])
def test_engines_can_be_switched_and_models_saved_and_loaded_during_training(name, tmp_path):
    def learn(engines):
        return learned_by_turns(partial(make, name), CASES[name][0], engines, tmp_path)

    whole = learn(["eager", "eager", "eager"])
    assert_close(whole, learn(["cuda_graph", "eager", "cuda_graph"]), bound=1e-4)
    assert_close(whole, learn(["eager", "cuda_graph", "eager"]), bound=1e-4)
    assert_close(whole, learn(["cuda_graph", "cuda_graph", "cuda_graph"]), bound=1e-4)


@pytest.mark.usefixtures("fake_graphs")
@pytest.mark.parametrize("change", CHANGES)
def test_modifications_between_updates_take_effect(change, monkeypatch):
    # As on a GPU, which the fused engines do not support
    monkeypatch.setattr(choose, "_ENGINES", (CudaGraphEngine, choose.EagerEngine))

    def learn(engine):
        model = make("defaults", engine).learn(60)
        th.manual_seed(5)
        change(model)
        np.random.seed(0)
        model.train(5, 16)
        return model

    eager, model = learn("eager"), learn("auto")
    assert distance(eager, make("defaults", "eager").learn(60)) > 1e-4
    assert_close(eager, model)
    unsupported = ("patch_loss", "patch_outputs")
    assert model._engine.name == ("eager" if change.__name__ in unsupported else "cuda_graph")
    grads = [parameter.grad is None for parameter in model.q_net.parameters()]
    assert grads == [parameter.grad is None for parameter in eager.q_net.parameters()]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("batch_size", [16, 5])
def test_the_engine_is_reused_without_modifications(batch_size):
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
def test_training_continues_when_an_environment_gets_masks():
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
def test_priorities_are_copied_back_when_they_are_read():
    def learn(engine):
        seen = []

        def read(variables, _):
            model = variables["self"]
            if model.num_timesteps % 16 == 0:
                seen.append(model.replay_buffer.sampler.tree.values[:32].copy())
            return True

        return make("prioritized", engine).learn(120, callback=read), np.array(seen)

    (eager, eager_seen), (model, model_seen) = learn("eager"), learn("cuda_graph")
    np.testing.assert_allclose(eager_seen, model_seen, atol=1e-4)
    assert not np.array_equal(eager_seen[-1], eager_seen[0])
    assert_close(eager, model)


@pytest.mark.usefixtures("on_cpu")
def test_priorities_that_are_not_finite_raise_the_error_of_the_sampler():
    model = make("prioritized", "cuda_graph", max_grad_norm=float("inf"), loss="mse").learn(60)
    before = model.replay_buffer.sampler.tree.values.copy()
    model.replay_buffer.rewards[:] = np.inf
    with pytest.raises(ValueError, match="priorities must be finite, but some are not: training diverged"):
        model.train(1, 16)
    assert_equal(before, model.replay_buffer.sampler.tree.values)


@pytest.mark.usefixtures("on_cpu")
def test_copied_models_train_alike():
    model = make("rainbow", "cuda_graph").learn(100)
    copy = deepcopy(model)
    assert_equal(model.get_parameters(), copy.get_parameters())
    for each in (model, copy):
        np.random.seed(0)
        th.manual_seed(5)
        each.train(3, 16)
    assert distance(model, copy) == 0
    assert_equal(model.replay_buffer.sampler.tree.values, copy.replay_buffer.sampler.tree.values)


@pytest.mark.usefixtures("on_cpu")
def test_greedy_actions_use_the_current_parameters():
    for name in ("defaults", "dict of images", "images", "normed"):
        model = make(name, "cuda_graph", buffer_size=60).learn(50)
        observation = model.env.reset()
        for _ in range(3):
            expected = model.predict(observation, deterministic=True)[0]
            assert_equal(model._engine.act(observation), expected)
            write(model)
            with th.no_grad():
                model.q_net.q_net[-1].bias.copy_(th.randn(3))
        repeated = {key: np.repeat(part, 7, axis=0) for key, part in observation.items()} if isinstance(
            observation, dict
        ) else np.repeat(observation, 7, axis=0)  # fmt: skip
        assert model._engine.act(repeated).shape == (7,)


# Unsupported configurations


def test_other_devices_are_unsupported():
    with pytest.raises(
        ValueError, match="the CUDA graph engine does not support this configuration: device='cpu' is not 'cuda'"
    ):
        make("defaults", "cuda_graph")


def test_messages_leave_out_engines_for_other_devices(capsys):
    make("defaults", "auto", verbose=1)
    ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"optimizer_class": th.optim.SGD}, verbose=1)
    output = capsys.readouterr().out
    assert "Using the fused engine, the fastest for these settings" in output
    assert "Using the eager engine, because" in output
    assert "CUDA" not in output


@pytest.mark.usefixtures("on_cpu")
def test_auto_does_not_select_it(capsys, monkeypatch):
    monkeypatch.setattr(choose, "_ENGINES", (CudaGraphEngine, choose.EagerEngine))
    monkeypatch.setattr(CudaGraphEngine, "opt_in_reason", OPT_IN_REASON)
    assert make("defaults", "auto", verbose=1)._engine.name == "eager"
    message = "Using the eager engine, because the CUDA graph engine must be selected explicitly by engine='cuda_graph'"
    assert message in capsys.readouterr().out
    assert make("defaults", "cuda_graph", verbose=1)._engine.name == "cuda_graph"
    assert "Using the CUDA graph engine, as selected" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("policy_kwargs", "reason"),
    [
        ({"optimizer_class": th.optim.RMSprop}, "optimizer_class=RMSprop is neither Adam nor AdamW"),
        ({"optimizer_kwargs": {"differentiable": True}}, "Adam has differentiable=True"),
    ],
)
def test_an_unsupported_configuration_raises_an_error_with_the_reason(policy_kwargs, reason):
    with pytest.raises(
        ValueError, match=r"engine='cuda_graph' cannot be used here: .*; engine='auto' selects"
    ) as error:
        ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=policy_kwargs, engine="cuda_graph")
    assert reason in str(error.value)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("obstacle", ["module", "target", "parameter", "step", "hook"])
def test_hooks_and_patches_make_auto_select_the_eager_engine(obstacle, monkeypatch):
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


class Averaging(BaseFeaturesExtractor):
    """Keeps an average, in a new tensor each time."""

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
        ("rainbow", Synchronizing, "operation not permitted"),
        ("normalized, prioritized", Synchronizing, "operation not permitted"),
        ("prioritized", Synchronizing, "operation not permitted"),
        ("prioritized", Averaging, "it replaces its own tensors"),
    ],
)
def test_a_network_that_cannot_be_captured_is_trained_by_the_eager_engine(
    name, extractor, reason, capsys, fake_graphs, monkeypatch
):
    monkeypatch.setattr(choose, "_ENGINES", (CudaGraphEngine, choose.EagerEngine))
    monkeypatch.setitem(CASES, name, (*CASES[name][:2], {**CASES[name][2], "features_extractor_class": extractor}))
    fake_graphs.allow_synchronization = False
    eager, eager_states = learned(name, "eager", 2)
    with pytest.warns(UserWarning, match=f"the network cannot be captured: {reason}"):
        model, model_states = learned(name, "auto", 2, verbose=1)
    assert model._engine.name == "eager"
    message = "Using the eager engine, because the CUDA graph engine does not support this configuration: the network"
    assert message in capsys.readouterr().out
    assert_equal(eager_states, model_states)
    assert_close(eager, model, bound=1e-9)


def test_a_network_that_cannot_be_captured_raises_an_error_if_the_engine_was_selected_explicitly(
    fake_graphs, monkeypatch
):
    monkeypatch.setitem(CASES, "defaults", (TimeoutEnv, {}, {"features_extractor_class": Synchronizing}))
    fake_graphs.allow_synchronization = False
    model = make("defaults", "cuda_graph")
    model.learning_starts = 1_000  # so that nothing is captured yet
    model.learn(40)
    with (
        pytest.warns(UserWarning, match="the CUDA graph engine does not support this configuration"),
        pytest.raises(ValueError, match=r"engine='cuda_graph' cannot be used here: .*the network cannot be captured"),
    ):
        model.train(1, 16)
