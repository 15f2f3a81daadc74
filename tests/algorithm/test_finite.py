"""Rewards and observations that are not finite are refused before they are stored, with their environment and step."""

import numpy as np
import pytest
import torch as th
from helpers import DictEnv, TimeoutEnv, assert_same_training, normalized
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.algorithm.finite import all_finite

SETTINGS = {"learning_starts": 10, "batch_size": 8, "buffer_size": 200, "train_freq": 1, "seed": 0}

NAN, INFINITE = float("nan"), float("inf")


class Broken(TimeoutEnv):
    """Gives one bad number: as a reward, in an observation, in the last or in the first observation of an episode."""

    def __init__(self, where="reward", value=NAN, step=30):
        self.where, self.value, self.bad_step, self.steps = where, value, step, 0

    def step(self, action):
        self.steps += 1
        observation, reward, _, _, info = super().step(action)
        bad = self.steps == self.bad_step
        ended = self.steps % 10 == 0
        if bad and self.where in ("observation", "last observation"):
            observation[1] = self.value
        return observation, self.value if bad and self.where == "reward" else reward, False, ended, info

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        if self.where == "first observation" and self.steps == self.bad_step:
            observation[2] = self.value
        return observation, info


CASES = [
    ("reward", 27),
    ("observation", 27),
    ("last observation", 30),
    ("first observation", 30),
    ("first observation", 0),
]
FAMILY = {
    "plain": {},
    "prioritized": {"replay_buffer_kwargs": {"prioritized": True}},
    "c51": {"policy_kwargs": {"head": "c51", "head_kwargs": {"v_min": -100.0, "v_max": 100.0}}},
    "iqn": {"policy_kwargs": {"head": "iqn"}},
}


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize(("where", "step"), CASES)
@pytest.mark.parametrize("part", FAMILY)
def test_a_bad_number_is_named_with_its_environment_and_step(part, where, step, value):
    model = ScratchDQN("MlpPolicy", Broken(where, value, step), **SETTINGS, **FAMILY[part])
    message = (
        rf"env gave the reward {value}, in" if where == "reward" else "env gave an observation that is not finite, in"
    )
    with pytest.raises(ValueError, match=rf"{message} environment 0 at step {step}: .*check_finite=False"):
        model.learn(100)
    replay = model.replay_buffer
    assert replay.size() == max(step - 1, 0), "what came before is there, the bad step is not"
    assert all(np.isfinite(array).all() for array in (replay.rewards, replay.observations, replay.next_observations))
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_the_environment_is_named():
    envs = DummyVecEnv([TimeoutEnv, TimeoutEnv, lambda: Broken("reward", step=5)])
    with pytest.raises(ValueError, match="the reward nan, in environment 2 at step 15:"):
        ScratchDQN("MlpPolicy", envs, **SETTINGS).learn(100)


def test_the_key_of_a_dict_is_named():
    class BrokenDict(DictEnv):
        def step(self, action):
            observation, *rest = super().step(action)
            observation["vector"][0] = INFINITE
            return observation, *rest

    with pytest.raises(ValueError, match="an observation whose 'vector' is not finite, in environment 0 at step 1:"):
        ScratchDQN("MultiInputPolicy", BrokenDict(), **SETTINGS).learn(100)


@pytest.mark.filterwarnings("ignore:invalid value")  # of SB3's running mean
@pytest.mark.parametrize("where", ["reward", "observation"])
def test_a_normalized_environment_is_looked_at_behind_its_normalization(where):
    model = ScratchDQN("MlpPolicy", normalized(lambda: Broken(where, INFINITE, 27)), **SETTINGS)
    with pytest.raises(ValueError, match="in environment 0 at step 27"):
        model.learn(100)


def test_other_replay_buffers_are_protected_too():
    class Flipping(BitFlippingEnv):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, NAN, *rest

    model = ScratchDQN("MultiInputPolicy", Flipping(), replay_buffer_class=HerReplayBuffer, **SETTINGS)
    with pytest.raises(ValueError, match="the reward nan"):
        model.learn(50)


def test_training_goes_on_after_the_environment_was_mended():
    env = Broken("reward", step=27)
    model = ScratchDQN("MlpPolicy", env, **SETTINGS)
    with pytest.raises(ValueError, match="step 27"):
        model.learn(100)
    model.learn(100, reset_num_timesteps=False)
    assert np.isfinite(model.q_values(np.ones(3))).all()


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_the_reference_goes_on_as_sb3_does(where):
    models = [DQN("MlpPolicy", Broken(where), **SETTINGS)]
    models.append(ScratchDQN("MlpPolicy", Broken(where), engine="eager", **SETTINGS))
    for model in models:
        model.set_random_seed(0)
        model.learn(100)
    assert_same_training(*models)
    assert np.isnan(models[1].q_values(np.ones(3))).all()


@pytest.mark.parametrize(
    ("settings", "checks"),
    [
        ({"engine": "eager"}, False),
        ({"engine": "eager", "check_finite": True}, True),
        ({"engine": "eager", "double_q": True}, True),
        ({"engine": "eager", "policy_kwargs": {"dueling": True}}, True),
        ({"engine": "auto"}, True),
        ({"engine": "auto", "check_finite": False}, False),
    ],
)
def test_the_setting_says_whether_numbers_are_looked_at(settings, checks):
    model = ScratchDQN("MlpPolicy", Broken(), **SETTINGS, **settings)
    if checks:
        with pytest.raises(ValueError, match="env gave the reward nan"):
            model.learn(100)
    else:
        model.learn(100)


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("where", ["reward", "observation"])
@pytest.mark.parametrize("part", ["c51", "prioritized"])
def test_what_is_not_looked_at_shows_in_the_numbers_or_names_the_setting(part, where, engine):
    model = ScratchDQN("MlpPolicy", Broken(where), engine=engine, check_finite=False, **SETTINGS, **FAMILY[part])
    if part == "prioritized":
        with pytest.raises(
            ValueError, match=r"training diverged \(lower learning_rate\), or .*check_finite=True finds"
        ):
            model.learn(100)
    else:
        model.learn(100)
        assert np.isnan(model.q_values(np.ones(3))).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 4, 64, 65, 1000])
def test_every_place_is_looked_at(size, dtype):
    numbers = np.full((2, size), np.finfo(dtype).max, dtype)  # whose sum overflows
    assert all_finite(numbers)
    for index in (0, size // 2, 2 * size - 1):
        for value in (NAN, INFINITE, -INFINITE):
            changed = numbers.copy()
            changed.reshape(-1)[index] = value
            assert not all_finite(changed)
            changed.reshape(-1)[(index + 1) % (2 * size)] = -value
            assert not all_finite(changed)
    assert all_finite(np.zeros(3, np.uint8))


def test_a_diverged_c51_has_targets_that_are_no_numbers():
    head = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs={"head": "c51"}).policy.head
    target = head.backup(th.zeros(2, 51), th.tensor([NAN, 0.0]), th.tensor([0.9, 0.9]))
    assert target[0].isnan().any()
    assert target[1].sum().item() == pytest.approx(1)


def test_several_environments_are_reset_where_one_was_bad():
    envs = make_vec_env(lambda: Broken("reward", step=20), n_envs=2, seed=0)
    model = ScratchDQN("MlpPolicy", envs, **SETTINGS)
    with pytest.raises(ValueError, match="environment 0"):
        model.learn(100)
    rows = model.replay_buffer.size()
    model.learn(20, reset_num_timesteps=False)
    assert model.replay_buffer.store.cuts[rows - 1].all(), "what follows is another episode"
