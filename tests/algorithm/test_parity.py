"""With every extra off, ScratchDQN is SB3's DQN to the last bit."""

import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from configurations import CONFIGURATIONS, SMALL, trained
from helpers import (
    CoinPerEnvDQN,
    TimeoutEnv,
    assert_equal,
    assert_same_training,
    ending_last_trajectory,
    full_state,
    parity_settings,
)
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor

from sb3_scratch_dqn import ScratchDQN


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_leaves_the_same_bits(name):
    reference, reference_random = trained(DQN, *CONFIGURATIONS[name])
    model, model_random = trained(ScratchDQN, *CONFIGURATIONS[name])

    if CONFIGURATIONS[name][3].get("gradient_steps") != 0:
        assert model._n_updates > 10, "the comparison needs updates"
    assert_same_training(reference, model)
    assert_equal(reference_random, model_random)


def test_training_in_several_environments_differs_by_the_coins_alone():
    settings = {**SMALL, "exploration_fraction": 0.9, "n_steps": 2}

    def make_env():
        return make_vec_env(TimeoutEnv, n_envs=3, seed=0)

    reference, reference_random = trained(CoinPerEnvDQN, "MlpPolicy", make_env, 600, settings)
    model, model_random = trained(ScratchDQN, "MlpPolicy", make_env, 600, settings)

    assert_same_training(reference, model)
    assert_equal(reference_random, model_random)


def test_the_comparison_sees_a_single_wrong_number():
    reference, _ = trained(DQN, *CONFIGURATIONS["small buffer"])
    model, _ = trained(ScratchDQN, *CONFIGURATIONS["small buffer"])
    expected = full_state(reference)

    def nudge(array):
        np.asarray(array).reshape(-1).view(np.uint32)[0] ^= 1  # the last bit of one number

    for change in (
        lambda state: nudge(state["parameters"]["q_net.q_net.0.weight"]),
        lambda state: nudge(state["parameters"]["q_net_target.q_net.4.bias"]),
        lambda state: nudge(state["optimizer"]["state"][0]["exp_avg"]),
        lambda state: nudge(state["replay"]["rewards"]),
        lambda state: state.update(exploration_rate=state["exploration_rate"] + 1e-9),
        lambda state: state.update(n_updates=state["n_updates"] + 1),
    ):
        state = deepcopy(full_state(model))
        assert_equal(expected, state)
        change(state)
        with pytest.raises(AssertionError):
            assert_equal(expected, state)


@pytest.mark.parametrize("name", ["small buffer", "n-step", "dict", "hindsight", "observations once"])
def test_saving_and_loading_in_the_middle_leaves_the_same_bits(name, tmp_path):
    policy, make_env, steps, settings = CONFIGURATIONS[name]
    models = []
    for algorithm in (DQN, ScratchDQN):
        model, _ = trained(algorithm, policy, make_env, steps, settings)
        model.save(tmp_path / "model.zip")
        model.save_replay_buffer(tmp_path / "replay.pkl")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SB3 takes its own n-step buffer for one of the user's after loading
            loaded = algorithm.load(tmp_path / "model.zip", env=make_env())
        loaded.load_replay_buffer(tmp_path / "replay.pkl", truncate_last_traj=False)
        assert_equal(model.get_parameters(), loaded.get_parameters())
        with ending_last_trajectory(loaded):
            loaded.learn(100, reset_num_timesteps=False)
        models.append(loaded)
    assert_same_training(*models)


def test_learning_again_in_another_environment_leaves_the_same_bits():
    models = []
    for algorithm in (DQN, ScratchDQN):
        model, _ = trained(algorithm, *CONFIGURATIONS["small buffer"])
        model.set_env(Monitor(TimeoutEnv()))
        model.env.seed(3)
        model.learn(120)
        model.learn(90, reset_num_timesteps=False)
        models.append(model)
    assert_same_training(*models)


def test_a_callback_that_stops_training_stops_it_at_the_same_bits():
    class StopAt(BaseCallback):
        seen: list

        def _on_training_start(self):
            self.seen = []

        def _on_step(self):
            self.seen.append({key: np.array(self.locals[key]) for key in ("actions", "rewards", "dones")})
            return self.n_calls < 133

    models, callbacks = [], []
    for algorithm in (DQN, ScratchDQN):
        callbacks.append(StopAt())
        model = algorithm("MlpPolicy", TimeoutEnv(), **SMALL, **parity_settings(algorithm))
        models.append(model.learn(1000, callbacks[-1]))
    assert models[0].num_timesteps == 133
    assert_same_training(*models)
    assert_equal(callbacks[0].seen, callbacks[1].seen)


def test_parameters_go_from_one_to_the_other():
    reference, _ = trained(DQN, *CONFIGURATIONS["dict"])
    policy, make_env, _, settings = CONFIGURATIONS["dict"]
    model = ScratchDQN(policy, make_env(), **{**settings, "seed": 99})
    model.set_parameters(reference.get_parameters())
    assert_equal(reference.get_parameters(), model.get_parameters())


@pytest.mark.parametrize("deterministic", [True, False])
def test_predict_gives_the_same_actions(deterministic):
    reference, _ = trained(DQN, *CONFIGURATIONS["small buffer"])
    model, _ = trained(ScratchDQN, *CONFIGURATIONS["small buffer"])
    observations = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    actions = []
    for algorithm in (reference, model):
        algorithm.exploration_rate = 0.5
        algorithm.action_space.seed(0)
        np.random.seed(0)
        actions.append([algorithm.predict(one, deterministic=deterministic)[0] for one in observations])
        actions[-1].append(algorithm.predict(observations[:1], deterministic=deterministic)[0])
    assert_equal(*actions)
    assert len({action.item() for action in actions[0]}) > 1, "the comparison needs several actions"


def test_q_values_are_those_of_the_reference_network():
    reference, _ = trained(DQN, *CONFIGURATIONS["small buffer"])
    model, _ = trained(ScratchDQN, *CONFIGURATIONS["small buffer"])
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with th.no_grad():
        expected = reference.q_net(th.as_tensor(observations)).numpy()
    assert_equal(expected, model.q_values(observations))
    assert model.q_values(observations[0]).shape == (1, 3)
    np.testing.assert_allclose(model.q_values(observations[0]), expected[:1], rtol=1e-5)
