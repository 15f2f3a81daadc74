"""Every optimiser trains, can be saved, loaded and converted, and then continues with the same bits."""

import inspect

import numpy as np
import pytest
import torch as th
from helpers import TimeoutEnv, assert_equal
from stable_baselines3 import DQN
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from sb3_scratch_dqn import ScratchDQN

SETTINGS = {"learning_starts": 20, "batch_size": 8, "buffer_size": 500, "seed": 0}


class Lion(th.optim.Optimizer):
    """Lion (https://arxiv.org/abs/2302.06675) as third-party packages implement it, with only its own defaults."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @th.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("exp_avg", th.zeros_like(parameter))
                parameter.add_(average.lerp(parameter.grad, 1 - first).sign(), alpha=-group["lr"])
                average.lerp_(parameter.grad, 1 - second)


# LBFGS needs a closure, SparseAdam sparse gradients, Muon matrices only; SB3's DQN cannot train with them either
UNSUPPORTED = {"LBFGS", "SparseAdam", "Muon", "Optimizer"}
OPTIMIZERS = [
    *(
        value
        for name, value in vars(th.optim).items()
        if inspect.isclass(value) and issubclass(value, th.optim.Optimizer) and name not in UNSUPPORTED
    ),
    RMSpropTFLike,
    Lion,
]


@pytest.fixture(params=OPTIMIZERS, ids=lambda optimizer_class: optimizer_class.__name__)
def optimizer(request):
    return {"optimizer_class": request.param}


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_loaded_model_trains_as_the_saved_one(optimizer, engine, tmp_path):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=optimizer, engine=engine, **SETTINGS).learn(60)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = ScratchDQN.load(tmp_path / "model.zip", env=TimeoutEnv())
    loaded.load_replay_buffer(tmp_path / "replay")
    assert_equal(loaded.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())
    for each in (model, loaded):
        each._current_progress_remaining = 0.5
        np.random.seed(0)
        each.train(5, batch_size=8)
    assert_equal(loaded.policy.state_dict(), model.policy.state_dict())
    assert_equal(loaded.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())


def test_parameters_can_be_read_and_set(optimizer):
    model, other = (ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=optimizer, **SETTINGS) for _ in range(2))
    model.learn(60)
    other.set_parameters(model.get_parameters())
    assert_equal(other.get_parameters(), model.get_parameters())
    model.set_parameters(model.get_parameters())
    model.learn(30, reset_num_timesteps=False)


def test_models_are_converted_from_sb3_and_back(optimizer):
    reference = DQN("MlpPolicy", TimeoutEnv(), policy_kwargs=optimizer, **SETTINGS).learn(60)
    model = ScratchDQN.from_sb3(reference, engine="eager")
    back = model.to_sb3()
    for each in (reference, model, back):
        np.random.seed(0)
        each.train(5, batch_size=8)
    for each in (model, back):
        assert_equal(each.policy.state_dict(), reference.policy.state_dict())
        assert_equal(each.policy.optimizer.state_dict(), reference.policy.optimizer.state_dict())


def test_the_state_of_another_optimizer_raises_an_error_and_changes_nothing(tmp_path):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"optimizer_class": Lion}, **SETTINGS).learn(60)
    before = model.get_parameters()["policy.optimizer"]
    other = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"optimizer_class": th.optim.SGD}, **SETTINGS)
    with pytest.raises(ValueError, match="is a Lion, but its new state has no 'betas'"):
        model.set_parameters(other.learn(60).get_parameters())
    assert_equal(model.get_parameters()["policy.optimizer"], before)
