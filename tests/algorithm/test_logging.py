"""What is logged: the names that people look for, and the right numbers under them."""

import numpy as np
import pytest
import torch as th
from helpers import TimeoutEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.engines.last_update import LastUpdate
from sb3_scratch_dqn.values.heads import HEADS, make_head

NAMES = {"train/loss", "train/q_mean", "train/target_mean", "train/td_error", "train/grad_norm"}


class Memory(KVWriter):
    def __init__(self):
        self.written = []

    def write(self, key_values, key_excluded, step=0):
        self.written.append(dict(key_values))

    def close(self):
        pass


@pytest.mark.parametrize("head", HEADS)
def test_training_logs_how_the_last_update_looked(head):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"head": head}, learning_starts=20, seed=0)
    memory = Memory()
    model.set_logger(Logger(None, [memory]))
    model.learn(120, log_interval=1)
    last = memory.written[-1]
    expected = NAMES if head == "expected" else NAMES | {"train/q_std"}
    assert {name for name in last if name.startswith("train/")} - {"train/n_updates", "train/learning_rate"} == expected
    assert all(np.isfinite(last[name]) for name in expected)
    assert not NAMES & {name for name in memory.written[0] if name != "train/loss"}, "before the first update"


def test_figures_lie_ready_for_callbacks_that_write_the_log():
    class Dump(BaseCallback):
        def _on_step(self):
            if self.n_calls == 130:
                self.logger.dump(self.n_calls)
            return True

    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=20, train_freq=1, seed=0)
    memory = Memory()
    model.set_logger(Logger(None, [memory]))
    model.learn(135, Dump(), log_interval=None)
    assert memory.written[-1].keys() >= NAMES


def test_figures_of_an_update_are_logged_once():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=20, seed=0)
    memory = Memory()
    model.set_logger(Logger(None, [memory]))
    model.learn(40, log_interval=None)
    model.dump_logs()
    model.dump_logs()
    assert memory.written[0].keys() >= NAMES
    assert not NAMES & memory.written[1].keys()


def test_the_numbers_are_means_over_the_batch():
    outputs, target = th.tensor([[1.0, 3.0], [5.0, 5.0]]), th.tensor([[2.0, 4.0], [0.0, 2.0]])
    update = LastUpdate(make_head("quantile", {"n_quantiles": 2}), outputs, target, th.tensor(7.0))
    # Means 2 and 5, of the target 3 and 1; standard deviations 1 and 0
    assert update.metrics() == {
        "train/q_mean": 3.5,
        "train/target_mean": 2.0,
        "train/td_error": 2.5,
        "train/grad_norm": 7.0,
        "train/q_std": 0.5,
    }
    update = LastUpdate(make_head("expected"), outputs[:, :1], target[:, 0], th.tensor(7.0))
    assert update.metrics() == {
        "train/q_mean": 3.0,
        "train/target_mean": 1.0,
        "train/td_error": 3.0,
        "train/grad_norm": 7.0,
    }
    c51 = make_head("c51", {"n_atoms": 3, "v_min": 0, "v_max": 2})
    logits = th.log(th.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]))
    metrics = LastUpdate(c51, logits, th.tensor([[1.0, 0, 0], [0, 0, 1.0]]), th.tensor(0.0)).metrics()
    assert metrics["train/q_mean"] == 1.0
    assert metrics["train/q_std"] == 0.5
    assert metrics["train/target_mean"] == 1.0
    assert metrics["train/td_error"] == 1.0


def test_the_gradient_norm_is_that_before_clipping():
    settings = {"policy": "MlpPolicy", "env": TimeoutEnv(), "seed": 0, "learning_starts": 20}
    norms = []
    for max_grad_norm in (1e-3, np.inf):
        model = ScratchDQN(**settings, max_grad_norm=max_grad_norm).learn(24)
        assert model._n_updates == 1
        norms.append(model._engine.last_update.metrics()["train/grad_norm"])
    assert norms[0] == norms[1] > 1e-3
