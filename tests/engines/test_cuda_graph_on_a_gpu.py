"""The CUDA graph engine against the eager engine, on a GPU."""

from copy import deepcopy

import numpy as np
import pytest
import torch as th
from cuda_cases import (
    CASES,
    CHANGES,
    COMBINATIONS,
    SETTINGS,
    Synchronizing,
    assert_close,
    learned,
    make,
    trained,
)
from helpers import TimeoutEnv, assert_equal

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.replay import batch_source

pytestmark = [
    # The support of C51 is narrow here, so that targets reach its ends
    pytest.mark.filterwarnings("ignore:head_kwargs=dict:UserWarning"),
    pytest.mark.usefixtures("auto_selects_cuda_graphs"),
    pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=", ".join)
def test_graphs_agree_with_the_eager_engine_in_every_combination(combination):
    (eager, eager_states), (model, model_states) = (
        trained(combination, engine, "cuda") for engine in ("eager", "auto")
    )
    assert model._engine.name == "cuda_graph"
    assert_equal(eager_states, model_states)
    if combination[0] != "iqn" and combination[1] != "noisy":  # CUDA graphs draw other numbers there
        assert_close(eager, model, bound=1e-3)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("gradient_steps", [1, 4, 21])
@pytest.mark.parametrize("name", CASES)
def test_graphs_compute_what_the_eager_engine_does(name, gradient_steps):
    eager, eager_states = learned(name, "eager", gradient_steps, "cuda")
    model, model_states = learned(name, "auto", gradient_steps, "cuda")
    assert model._engine.name == "cuda_graph"
    assert_equal(eager_states, model_states)
    random_on_device = "noisy" in name or "iqn" in name or name in ("rainbow", "normed")
    if not random_on_device:  # CUDA graphs draw other numbers there
        assert_close(eager, model, bound=1e-3)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("change", CHANGES)
def test_modifications_take_effect(change):
    def learn(engine):
        model = make("defaults", engine, "cuda").learn(60)
        th.manual_seed(5)
        change(model)
        np.random.seed(0)
        model.train(5, 16)
        return model

    assert_close(learn("eager"), learn("auto"), bound=1e-3)


@pytest.mark.parametrize("name", ["noisy", "iqn"])
def test_every_replay_has_new_noise(name):
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


def test_a_network_that_synchronizes_is_trained_by_the_eager_engine():
    def learn(engine):
        kwargs = {"features_extractor_class": Synchronizing}
        model = ScratchDQN("MlpPolicy", TimeoutEnv(), engine=engine, device="cuda", policy_kwargs=kwargs, **SETTINGS)
        return model.learn(80)

    with pytest.warns(UserWarning, match="the network cannot be captured"):
        model = learn("auto")
    assert model._engine.name == "eager"
    assert_close(learn("eager"), model)
    with pytest.warns(UserWarning, match="does not support"), pytest.raises(ValueError, match="cannot be captured"):
        learn("cuda_graph")


def test_warm_up_and_capture_preserve_state_on_a_gpu():
    model = make("rainbow with iqn", "cuda_graph", "cuda", learning_starts=1_000).learn(40)
    th.cuda.manual_seed(0)
    before = deepcopy(model.policy.state_dict()), th.cuda.get_rng_state(), np.random.get_state()[1:]
    engine = model._engine
    source = batch_source(model.replay_buffer, 16, None, 0.9)
    engine.attach()
    feed = engine._feed_for(source)
    feed.sync(source)
    feed.capture(lambda function: engine._capture(function, function))
    priorities = feed._priorities.tree.values.clone()
    engine._capture_updates(feed, 5)
    after = model.policy.state_dict(), th.cuda.get_rng_state(), np.random.get_state()[1:]
    assert_equal(before, after)
    assert th.equal(priorities, feed._priorities.tree.values)
    assert all(state["step"] == 0 for state in model.policy.optimizer.state.values())
