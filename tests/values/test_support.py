"""C51 whose support does not hold the returns says so once, with the support that would."""

import warnings

import numpy as np
import pytest
from helpers import TimeoutEnv
from stable_baselines3.common.env_util import make_vec_env

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.values.heads import CategoricalHead
from sb3_scratch_dqn.values.support import SupportMonitor, _below

SETTINGS = {"learning_starts": 10, "batch_size": 8, "buffer_size": 500, "seed": 0}


class Paying(TimeoutEnv):
    """Pays the same at every step, for twenty steps."""

    def __init__(self, reward):
        self.paid, self.steps = reward, 0

    def step(self, action):
        observation, *_ = super().step(action)
        self.steps += 1
        return observation, self.paid, False, self.steps % 20 == 0, {}


def c51(v_min, v_max, reward, n_envs=1, **settings):
    return ScratchDQN(
        "MlpPolicy",
        make_vec_env(lambda: Paying(reward), n_envs=n_envs, seed=0),
        policy_kwargs={"head": "c51", "head_kwargs": {"v_min": v_min, "v_max": v_max}},
        **{**SETTINGS, **settings},
    )


@pytest.mark.parametrize(("n_envs", "engine"), [(1, "auto"), (1, "eager"), (3, "auto")])
@pytest.mark.parametrize(
    ("v_min", "v_max", "reward", "told"),
    [
        # The sum of 0.9**t over 20 steps is 8.784
        (-10, 5, 1.0, r"were 0 to 8.784 .*dict\(v_min=-10, v_max=8.8\) would hold .* can leave v_min=0, v_max=10$"),
        (-5, 10, -2.0, r"were -17.57 to 0 .*dict\(v_min=-18, v_max=10\) would hold .* leave v_min=-20, v_max=0$"),
    ],
)
def test_it_is_said_once(v_min, v_max, reward, told, n_envs, engine):
    model = c51(v_min, v_max, reward, n_envs, gamma=0.9, engine=engine)
    said = rf"head_kwargs=dict\(v_min={v_min}, v_max={v_max}\) does not hold the returns, which {told}"
    with pytest.warns(UserWarning, match=said) as caught:
        model.learn(1200)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(300, reset_num_timesteps=False)


@pytest.mark.parametrize(("v_min", "v_max", "reward"), [(0, 8.8, 1.0), (0, 100, 1.0), (-18, 0, -2.0), (-1, 0.05, 0.0)])
def test_nothing_is_said_where_the_support_holds_them(v_min, v_max, reward):
    c51(v_min, v_max, reward, gamma=0.9).learn(600)


def test_without_discount_there_are_no_bounds():
    with pytest.warns(UserWarning, match=r"v_max=20\) would hold these$"):
        c51(-10, 10, 1.0, gamma=1.0).learn(400)


def test_other_heads_have_no_support():
    model = ScratchDQN("MlpPolicy", Paying(1e6), policy_kwargs={"head": "quantile"}, **SETTINGS).learn(300)
    assert model._support_monitor is None


def test_returns_of_all_steps_count():
    watch, rewards, gamma = SupportMonitor(CategoricalHead(v_min=-1, v_max=1), 1), [0.5, -3.0, 2.0, 0.25], 0.9
    returns = [sum(gamma**k * reward for k, reward in enumerate(rewards[t:])) for t in range(4)]
    for step, reward in enumerate(rewards):
        watch.step(np.array([reward]), np.array([step == 3]), gamma)
    assert watch._lowest == pytest.approx(min(returns))
    assert watch._highest == pytest.approx(max(returns))
    assert watch._episodes_outside == 1


def test_the_watch_is_no_part_of_a_saved_model(tmp_path):
    model = c51(0, 100, 1.0).learn(50)
    model.save(tmp_path / "model.zip")
    assert "_support_monitor" not in vars(ScratchDQN.load(tmp_path / "model.zip"))


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.0, 0.0), (8.784, 8.7), (-8.784, -8.8), (-18, -18), (123, 120), (-0.0123, -0.013)]
)
def test_numbers_are_rounded_down_to_two_digits(value, rounded):
    assert _below(value) == pytest.approx(rounded)
