"""C51 warns once if its support does not contain the returns, and suggests one that does."""

import warnings

import numpy as np
import pytest
from helpers import TimeoutEnv
from stable_baselines3.common.env_util import make_vec_env

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.values.heads import CategoricalHead
from sb3_scratch_dqn.values.support_monitor import SupportMonitor, _round_down

SETTINGS = {"learning_starts": 10, "batch_size": 8, "buffer_size": 500, "seed": 0}


class ConstantReward(TimeoutEnv):
    """The same reward at every step, for twenty steps."""

    def __init__(self, reward):
        self.reward, self.steps = reward, 0

    def step(self, action):
        observation, *_ = super().step(action)
        self.steps += 1
        return observation, self.reward, False, self.steps % 20 == 0, {}


def c51(v_min, v_max, reward, n_envs=1, **settings):
    return ScratchDQN(
        "MlpPolicy",
        make_vec_env(lambda: ConstantReward(reward), n_envs=n_envs, seed=0),
        policy_kwargs={"head": "c51", "head_kwargs": {"v_min": v_min, "v_max": v_max}},
        **{**SETTINGS, **settings},
    )


def run_episodes(monitor, rewards, n_episodes):
    for _ in range(n_episodes):
        for step, reward in enumerate(rewards, 1):
            monitor.step(np.array([reward]), np.array([step == len(rewards)]), gamma=1.0)


@pytest.mark.parametrize(("n_envs", "engine"), [(1, "auto"), (1, "eager"), (3, "auto")])
@pytest.mark.parametrize(
    ("v_min", "v_max", "reward", "message"),
    [
        # The sum of 0.9**t over 20 steps is 8.784
        (-10, 5, 1.0, r"were 1 to 8.784 .*dict\(v_min=-10, v_max=8.8\) would contain .* between v_min=0 and v_max=10$"),
        (
            -5,
            10,
            -2.0,
            r"were -17.57 to -2 .*dict\(v_min=-18, v_max=10\) would contain .* between v_min=-20 and v_max=0$",
        ),
    ],
)
def test_the_warning_appears_once(v_min, v_max, reward, message, n_envs, engine):
    model = c51(v_min, v_max, reward, n_envs, gamma=0.9, engine=engine)
    expected = rf"head_kwargs=dict\(v_min={v_min}, v_max={v_max}\) does not contain the returns, which {message}"
    with pytest.warns(UserWarning, match=expected) as caught:
        model.learn(1200)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(300, reset_num_timesteps=False)


@pytest.mark.parametrize(("v_min", "v_max", "reward"), [(0, 8.8, 1.0), (0, 100, 1.0), (-18, 0, -2.0), (-1, 0.05, 0.0)])
def test_a_support_that_contains_the_returns_causes_no_warning(v_min, v_max, reward):
    c51(v_min, v_max, reward, gamma=0.9).learn(600)


@pytest.mark.parametrize(
    ("v_min", "v_max", "rewards", "message"),
    [
        (-10, 10, [50, 50], r"were 50 to 100 .*dict\(v_min=-10, v_max=100\) would contain them$"),
        (-10, 10, [-50, -50], r"were -100 to -50 .*dict\(v_min=-100, v_max=10\) would contain them$"),
        (60, 70, [50, 50], r"were 50 to 100 .*dict\(v_min=50, v_max=100\) would contain them$"),
    ],
)
def test_the_warning_reports_the_range_of_the_returns(v_min, v_max, rewards, message):
    monitor = SupportMonitor(CategoricalHead(v_min=v_min, v_max=v_max), 1)
    with pytest.warns(UserWarning, match=message):
        run_episodes(monitor, rewards, n_episodes=10)


def test_a_support_without_zero_may_contain_the_returns():
    monitor = SupportMonitor(CategoricalHead(v_min=50, v_max=100), 1)
    run_episodes(monitor, [50, 50], n_episodes=20)
    assert monitor._episodes_outside == 0


def test_without_discount_returns_have_no_bounds():
    with pytest.warns(UserWarning, match=r"v_max=20\) would contain them$"):
        c51(-10, 10, 1.0, gamma=1.0).learn(400)


def test_other_heads_have_no_support():
    model = ScratchDQN("MlpPolicy", ConstantReward(1e6), policy_kwargs={"head": "quantile"}, **SETTINGS).learn(300)
    assert model._support_monitor is None


def test_the_returns_of_all_steps_are_computed():
    monitor, rewards, gamma = SupportMonitor(CategoricalHead(v_min=-1, v_max=1), 1), [0.5, -3.0, 2.0, 0.25], 0.9
    returns = [sum(gamma**k * reward for k, reward in enumerate(rewards[t:])) for t in range(4)]
    for step, reward in enumerate(rewards):
        monitor.step(np.array([reward]), np.array([step == 3]), gamma)
    assert monitor._lowest == pytest.approx(min(returns))
    assert monitor._highest == pytest.approx(max(returns))
    assert monitor._episodes_outside == 1


def test_the_monitor_is_not_saved_with_a_model(tmp_path):
    model = c51(0, 100, 1.0).learn(50)
    model.save(tmp_path / "model.zip")
    assert "_support_monitor" not in vars(ScratchDQN.load(tmp_path / "model.zip"))


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.0, 0.0), (8.784, 8.7), (-8.784, -8.8), (-18, -18), (123, 120), (-0.0123, -0.013)]
)
def test_numbers_are_rounded_down_to_two_digits(value, rounded):
    assert _round_down(value) == pytest.approx(rounded)


@pytest.mark.parametrize("reward", [np.inf, -np.inf, np.nan])
def test_episodes_with_returns_that_are_not_finite_are_ignored(reward):
    monitor = SupportMonitor(CategoricalHead(v_min=0.0, v_max=1.0), n_envs=1)
    for _ in range(20):  # warnings are errors
        monitor.step(np.array([reward]), np.array([True]), 0.9)
