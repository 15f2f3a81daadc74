"""Epsilon schedules and epsilon-greedy actions."""

import numpy as np
import pytest
from helpers import TimeoutEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.algorithm.exploration import epsilon_greedy, make_epsilon_schedule


def test_a_linear_schedule_falls_over_its_fraction():
    schedule = make_epsilon_schedule("linear", 1.0, 0.1, 0.5, 0.9)
    assert [schedule(progress, 0, 0) for progress in (1.0, 0.75, 0.25, 0.0)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_an_exponential_schedule_falls_with_each_episode_and_stops_at_the_final_value():
    schedule = make_epsilon_schedule("exponential", 1.0, 0.01, 0.5, 0.995)
    assert schedule(1.0, 0, 0) == 1.0
    assert schedule(0.5, 1, 0) == 0.995
    assert schedule(0.0, 500, 0) == pytest.approx(0.0816, abs=1e-4)
    assert schedule(0.0, 918, 0) > 0.01
    assert schedule(0.0, 919, 0) == 0.01


def test_a_function_of_progress_is_a_schedule():
    schedule = make_epsilon_schedule(lambda progress_remaining: progress_remaining**2, 1.0, 0.1, 0.5, 0.9)
    assert schedule(0.5, 3, 0) == 0.25


def test_a_linear_schedule_in_steps_knows_nothing_of_the_training():
    schedule = make_epsilon_schedule("linear", 1.0, 0.1, 0.5, 0.9, steps=100)
    for progress in (1.0, 0.3):
        assert [schedule(progress, 0, steps) for steps in (0, 50, 100, 1000)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_epsilon_in_steps_survives_a_second_training_and_a_file(tmp_path):
    settings = {"train_freq": 1, "exploration_steps": 200, "exploration_final_eps": 0.2, "seed": 0}
    model = ScratchDQN("MlpPolicy", make_vec_env(TimeoutEnv, n_envs=2), **settings).learn(100)
    assert model.exploration_rate == pytest.approx(0.6)
    model.learn(50)
    assert model.exploration_rate == pytest.approx(0.4)
    model.save(tmp_path / "model.zip")
    model = ScratchDQN.load(tmp_path / "model.zip", env=TimeoutEnv())
    assert model.learn(25).exploration_rate == pytest.approx(0.3)
    assert model.learn(1000).exploration_rate == pytest.approx(0.2)


def test_a_model_that_did_not_count_its_steps_goes_on_where_it_was(tmp_path):
    ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0).learn(200).save(tmp_path / "old.zip", exclude=["_env_steps"])
    model = ScratchDQN.load(tmp_path / "old.zip", env=TimeoutEnv(), exploration_steps=100, exploration_final_eps=0.1)
    assert model.learn(4).exploration_rate == pytest.approx(0.1)


def test_the_length_in_steps_belongs_to_the_linear_schedule():
    with pytest.raises(ValueError, match="exploration_steps=10 needs exploration_schedule='linear', but"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), exploration_steps=10, exploration_schedule="exponential")
    with pytest.raises(ValueError, match="exploration_steps=0 must be a whole number of at least 1"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), exploration_steps=0)


def test_each_environment_has_a_coin_of_its_own():
    np.random.seed(0)
    epsilon, n_envs, rounds = 0.3, 4, 5000
    zeros = np.zeros(n_envs, dtype=np.int64)
    actions = np.array(
        [
            epsilon_greedy(
                epsilon, n_envs, lambda env: np.int64(1), lambda envs: zeros if envs is None else zeros[envs]
            )
            for _ in range(rounds)
        ]
    )
    # Of n coins with probability p the mean is within 4 sqrt(p (1 - p) / n) of p in all but 1 of 16,000 cases
    np.testing.assert_allclose(actions.mean(axis=0), epsilon, atol=4 * np.sqrt(0.21 / rounds))
    # One coin for all would make this 0.3, independent coins make it 0.09
    both = (actions[:, 0] * actions[:, 1]).mean()
    assert both == pytest.approx(epsilon**2, abs=4 * np.sqrt(0.09 * 0.91 / rounds))


def test_greedy_actions_are_not_computed_if_all_actions_are_random():
    def fail(envs):
        raise AssertionError("asked for greedy actions")

    assert epsilon_greedy(1.0, 3, lambda env: np.int64(2), fail).tolist() == [2, 2, 2]


def test_greedy_actions_are_asked_for_where_the_coin_wants_them():
    asked = []

    def greedy_actions(envs):
        asked.append(envs)
        return 10 + (np.arange(4) if envs is None else envs)

    np.random.seed(0)
    coins = np.random.RandomState(0).rand(50, 4) < 0.5
    for explores in coins:
        actions = epsilon_greedy(0.5, 4, lambda env: np.int64(env), greedy_actions)
        assert actions.tolist() == [env + 10 * (not random) for env, random in enumerate(explores)]
    wanted = [np.flatnonzero(~explores).tolist() for explores in coins if not explores.all()]
    assert [list(range(4)) if envs is None else envs.tolist() for envs in asked] == wanted


class Record(BaseCallback):
    def _on_training_start(self):
        self.epsilons, self.dones = [], []

    def _on_step(self):
        self.epsilons.append(self.model.exploration_rate)
        self.dones.append(self.locals["dones"].sum())
        return True


@pytest.mark.parametrize("n_envs", [1, 3])
def test_training_decays_epsilon_after_each_episode_of_any_environment(n_envs):
    record = Record()
    model = ScratchDQN(
        "MlpPolicy",
        make_vec_env(TimeoutEnv, n_envs=n_envs, seed=0),
        exploration_schedule="exponential",
        exploration_decay=0.9,
        exploration_final_eps=0.2,
        seed=0,
    ).learn(300, record)
    # on_step comes before the update of epsilon, so each step sees the episodes that ended before it
    finished = np.concatenate([[0], np.cumsum(record.dones)])[:-1]
    expected = np.maximum(0.2, 0.9**finished)
    np.testing.assert_allclose(record.epsilons[1:], expected[1:])
    assert model.exploration_rate == pytest.approx(0.2)


def test_a_new_training_begins_the_decay_anew_unless_told_otherwise():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), exploration_schedule="exponential", exploration_decay=0.9, seed=0)
    model.learn(200)
    low = model.exploration_rate
    assert model.learn(1, reset_num_timesteps=False).exploration_rate <= low
    assert model.learn(1).exploration_rate >= 0.9


def test_predict_explores_for_each_of_several_observations():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0)
    model.exploration_rate = 1.0
    actions, _ = model.predict(np.zeros((300, 3), dtype=np.float32))
    assert set(actions) == {0, 1, 2}
    model.exploration_rate = 0.0
    actions, _ = model.predict(np.zeros((300, 3), dtype=np.float32))
    assert len(set(actions)) == 1
