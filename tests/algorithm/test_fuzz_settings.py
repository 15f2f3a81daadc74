"""Every value of a setting works, or is refused in one sentence that names the setting."""

import warnings
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch as th
from helpers import TimeoutEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.algorithm.settings import PARSERS

BASE = {"learning_starts": 8, "batch_size": 4, "buffer_size": 64, "seed": 0}

# What users write by mistake, and what they may
VALUES = [
    *(None, True, False, "x", "", "auto", "eager", "linear", "huber", "mse", "exponential", b"x", ..., int, object()),
    *(-1, 0, 1, 2, 5, 64, 65, 300, 2**63, 10**400, -(10**400)),
    *(-1.0, 0.0, 1e-300, 0.3, 1.0, 2.5, 8.0, 1e30, float("nan"), float("inf"), -float("inf"), 1j),
    *([], [4], ["x"], [float("nan")], (), (1,), (1, "episode"), (2.0, "step"), (1, "day"), (None, None), {1, 2}),
    *({}, {"tau": 0.1}, {"tau": "x"}, {"tau": 0}, {"dueling": True}, {"dueling": 3}, {"noisy": True, "net_arch": []}),
    *({"head": "c51"}, {"head": "quantile", "head_kwargs": {"n_quantiles": 3}}, {"head": 5}, {"head_kwargs": {"x": 1}}),
    *({"prioritized": True}, {"prioritized": True, "alpha": 2}, {"alpha": 0.5}, {"frames": True}),
    *({"optimizer_kwargs": 5}, {"optimizer_class": "Adam"}, {"optimizer_class": th.optim.SGD}, {1: 2}),
    *({"optimizer_kwargs": {"lr": 1}}, {"optimizer_kwargs": {"betas": (0.9,)}}, {"normalize_images": "maybe"}),
    *(np.array(4), np.array([1, 2]), np.array("x"), np.int64(4), np.float32(0.5), np.True_, th.tensor(1.0), range(3)),
    *(Fraction(1, 2), Fraction(4), Decimal("0.5")),
    *(lambda: 0.5, lambda p: p, lambda p: float("nan"), lambda p: "x", lambda p: None, lambda p: -1),
    *(lambda p: 7 if 0.2 < p < 0.6 else 0.5, lambda p: 1 / 0, lambda p: th.tensor(0.5)),
]  # fmt: skip

# Names in the dicts among them: what is wrong in one of these is named itself
NESTED = [name for value in VALUES if isinstance(value, dict) for name in value if isinstance(name, str)]

a_setting = st.tuples(st.sampled_from(sorted(PARSERS)), st.sampled_from(range(len(VALUES))))
fuzzed = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@contextmanager
def refused_with_a_sentence(names):
    """Let pass what is refused, if it is refused well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that work, but slowly
        try:
            yield
        except ValueError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 1000
            assert any(name in message for name in (*names, *NESTED)), message


def kwargs_of(chosen):
    return {name: VALUES[index] for name, index in chosen if not writes(name, VALUES[index])}


def writes(name, value):
    """Whether a setting would make folders here."""
    return name == "tensorboard_log" and isinstance(value, str)


@fuzzed
@given(chosen=st.lists(a_setting, min_size=1, max_size=2))
def test_arguments(chosen):
    kwargs = kwargs_of(chosen)
    with refused_with_a_sentence(kwargs):
        ScratchDQN("MlpPolicy", TimeoutEnv(), **{**BASE, **kwargs}).learn(40)


@fuzzed
@given(edits=st.lists(a_setting, min_size=1, max_size=3))
def test_live_edits(edits):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **BASE).learn(20)
    names = []
    for name, value in kwargs_of(edits).items():
        before = getattr(model, name)
        names.append(name)
        with refused_with_a_sentence(names):
            setattr(model, name, value)
            before = None
        assert before is None or getattr(model, name) is before
    with refused_with_a_sentence(names):
        model.learn(20, reset_num_timesteps=False)
        model.train(1, batch_size=model.batch_size)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters()) or "learning_rate" in names


@fuzzed
@given(written=st.lists(a_setting, min_size=1, max_size=2))
def test_settings_that_are_written_past_the_checks_are_found_by_the_set_up(written):
    """As loading a model does, and with it the Zoo."""
    model, kwargs = ScratchDQN("MlpPolicy", TimeoutEnv(), **BASE), kwargs_of(written)
    vars(model).update(kwargs)
    model.replay_buffer = None
    with refused_with_a_sentence(kwargs):
        model._setup_model()
        model.learn(20)


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_each_value_of_each_setting(name):
    for value in VALUES:
        if writes(name, value):
            continue
        with refused_with_a_sentence([name]):
            ScratchDQN("MlpPolicy", TimeoutEnv(), **{**BASE, name: value})
