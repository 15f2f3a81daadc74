"""Modes of PyTorch and NumPy apply to every engine: error states, anomaly detection, autocast."""

import warnings

import numpy as np
import pytest
import torch as th
from fused_cases import SETTINGS, make
from helpers import TimeoutEnv, assert_equal
from stable_baselines3 import DQN

from sb3_scratch_dqn import ScratchDQN


def test_diverging_training_is_silent_and_user_code_is_not():
    with np.errstate(all="raise"):
        make("defaults", "fused", learning_rate=1e30).learn(80)
        model = make("defaults", "fused").learn(60)
        model.replay_buffer.sample = lambda *_, **__: np.ones(1) / np.zeros(1)
        with pytest.raises(FloatingPointError):
            model.train(1, 32)


def test_anomaly_detection_works():
    model = make("defaults", "auto").learn(60)
    model.replay_buffer.rewards[:] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that detection is slow, and prints the call that failed
        with th.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="nan"):
            model.train(1, 32)
    model.learn(4, reset_num_timesteps=False)
    assert model._engine.title == "the fused engine"


# Mixed precision


@pytest.mark.parametrize("head", ["expected", "c51", "quantile", "iqn"])
def test_autocast_takes_effect_while_it_is_enabled(head):
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
        # bfloat16 has 8 significant bits, and rounding differs from float32
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


def test_autocast_works_with_an_explicitly_selected_fused_engine():
    model = make("defaults", "fused", verbose=1).learn(60)
    with th.autocast("cpu", dtype=th.bfloat16):
        model.learn(20)
        assert model._engine.title == "the fused engine with autograd"
