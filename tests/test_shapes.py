"""The test run checks shapes and dtypes of tensors; users' programs do not."""

import subprocess
import sys

import pytest
import torch as th
from jaxtyping import TypeCheckError

from sb3_scratch_dqn.networks.noisy import NoisyLinear
from sb3_scratch_dqn.replay.batch import Batch
from sb3_scratch_dqn.values.heads import ImplicitQuantiles, make_head
from sb3_scratch_dqn.values.td import at_actions

FIELDS = {
    "observations": th.zeros(4, 3),
    "actions": th.zeros(4, dtype=th.int64),
    "returns": th.zeros(4),
    "discounts": th.zeros(4),
    "next_observations": th.zeros(4, 3),
    "weights": th.zeros(4),
    "action_masks": th.ones(4, 2, dtype=th.bool),
}


@pytest.mark.parametrize(
    "call",
    [
        lambda: make_head("expected").q_values(th.zeros(4, 2, 3)),  # more than one output per action
        lambda: make_head("expected").backup(th.zeros(4, 1), th.zeros(4), th.zeros(1)),  # would be broadcast
        lambda: make_head("quantile").backup(th.zeros(4, 200), th.zeros(4), th.zeros(4, dtype=th.int64)),
        lambda: at_actions(th.zeros(4, 2, 3), th.zeros(3, dtype=th.int64)),  # would ignore a sample
        lambda: NoisyLinear(3, 2)(th.zeros(4, 3, dtype=th.int64)),
        lambda: ImplicitQuantiles(th.zeros(4, 3), th.zeros(4, 2)),
    ],
)
def test_wrong_shapes_and_dtypes_raise(call):
    with pytest.raises(TypeCheckError):
        call()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("observations", th.zeros(3, 3)),
        ("observations", {"left": th.zeros(3, 1)}),
        ("actions", th.zeros(4, 1, dtype=th.int64)),
        ("actions", th.zeros(4)),
        ("discounts", th.zeros(4, 1)),
        ("next_observations", th.zeros(4, 2)),
        ("next_action_masks", th.ones(4, 3, dtype=th.bool)),
    ],
)
def test_wrong_fields_of_a_batch_raise(name, value):
    Batch(**FIELDS)
    Batch(**{key: value[:0] for key, value in FIELDS.items()})
    with pytest.raises(TypeCheckError):
        Batch(**{**FIELDS, name: value})


def test_programs_of_users_check_nothing():
    program = """
import sys
import torch as th
from sb3_scratch_dqn.replay import Batch
from sb3_scratch_dqn.values import make_head

wrong = th.zeros(4, 2, 3)
assert make_head("expected").q_values(wrong).shape == wrong.shape
Batch(*6 * [wrong])
assert not [name for name in sys.modules if name.split(".")[0] == "beartype"]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
