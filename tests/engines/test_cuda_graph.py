"""The CUDA graph engine computes what the eager one does, up to rounding.

All but the recording itself is the same on every device. So this happens on the CPU: recordings are made by a tape,
which notes calls of PyTorch and makes them again on the same memory, without Python, as CUDA graphs do.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch as th
from changes import write
from helpers import TimeoutEnv, assert_equal, normalized
from recorded import (
    BY_ITSELF,
    CASES,
    CHANGES,
    COMBINATIONS,
    FROM_THE_HOST,
    GRADIENT_STEPS,
    MaskedEnv,
    Waiting,
    assert_close,
    distance,
    learned,
    make,
    trained,
)
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.algorithm import dqn
from sb3_scratch_dqn.engines import choose
from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine, _sizes
from sb3_scratch_dqn.engines.cuda.feeds import DeviceFeed, HostFeed
from sb3_scratch_dqn.engines.cuda.recording import Recorder
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import DenseObservations

pytestmark = [
    pytest.mark.usefixtures("auto_takes_cuda_graphs"),
    # The support of C51 is narrow here, so that its ends are met
    pytest.mark.filterwarnings("ignore:head_kwargs=dict:UserWarning"),
]


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("name", CASES)
def test_fifty_updates_agree(name, monkeypatch):
    monkeypatch.setattr(dqn, "_UPDATES_BETWEEN_METRICS", 10**9)  # nobody reads them before
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
    metrics, its_figures = (one._engine.last_update.metrics() for one in (eager, model))
    assert metrics == pytest.approx(its_figures, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=", ".join)
def test_every_combination_agrees(combination, taped):
    (eager, states), (model, its_states) = (trained(combination, engine) for engine in ("eager", "cuda_graph"))
    assert type(model._engine._feed) is DeviceFeed
    assert eager.replay_buffer.store.obs_store.__class__ is (
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


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changes_between_updates_is_heeded(change, monkeypatch):
    # As on a GPU, where fused engines do not serve
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
        th.manual_seed(5)
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
    monkeypatch.setattr(CudaGraphEngine, "opt_in_reason", BY_ITSELF)
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
