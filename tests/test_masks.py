"""Only allowed actions are taken, chosen and believed in."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import DictEnv, TimeoutEnv
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.masks import MaskInInfo, masks_of_next_states


class RandomMasks:
    """Allows one or two of three actions, at random, and fails if another is taken."""

    def draw_mask(self):
        self.mask = self.np_random.permutation([True, False, bool(self.np_random.integers(2))])
        return self.mask.astype(np.float32)

    def action_masks(self):
        return self.mask

    def step(self, action):
        assert self.mask[action], f"action {action} is not allowed by {self.mask}"
        return super().step(action)


class MaskedEnv(RandomMasks, TimeoutEnv):
    """The observation is the mask."""

    def _observe(self):
        return self.draw_mask()


class MaskedDictEnv(RandomMasks, DictEnv):
    """A part of the observation is the mask."""

    def _observe(self):
        return {**super()._observe(), "vector": self.draw_mask()}


SETTINGS = {"learning_starts": 40, "train_freq": 1, "exploration_final_eps": 0.5, "seed": 0}


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"double_q": True}, {"munchausen": True}, {"n_steps": 3}])
def test_training_takes_only_allowed_actions_and_stores_the_masks(n_envs, settings):
    model = ScratchDQN("MlpPolicy", make_vec_env(MaskedEnv, n_envs=n_envs, seed=0), **SETTINGS, **settings)
    model.learn(150)
    buffer = model.replay_buffer
    rows = buffer.pos
    # The observation is the mask
    np.testing.assert_array_equal(buffer.store.action_masks[:rows], buffer.observations[:rows] == 1)
    going_on = buffer.dones[:rows] == 0
    np.testing.assert_array_equal(
        buffer.store.next_action_masks[:rows][going_on], buffer.next_observations[:rows][going_on] == 1
    )
    # After the last state of an episode nobody knows, so everything is allowed there
    assert buffer.store.next_action_masks[:rows][~going_on].all()
    batch = buffer.sample_batch(64)
    assert (batch.action_masks == (batch.observations == 1)).all()


def test_a_wrapper_tells_the_mask_of_the_last_state():
    model = ScratchDQN("MlpPolicy", make_vec_env(lambda: MaskInInfo(MaskedEnv()), n_envs=2, seed=0), **SETTINGS)
    model.learn(200)
    buffer = model.replay_buffer
    rows = buffer.pos
    assert buffer.dones[:rows].any()
    np.testing.assert_array_equal(buffer.store.next_action_masks[:rows], buffer.next_observations[:rows] == 1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_predictions_keep_to_masks(deterministic):
    model = ScratchDQN("MlpPolicy", MaskedEnv(), seed=0)
    model.exploration_rate = 0.5
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(200, 3)).astype(np.float32)
    masks = rng.uniform(size=(200, 3)) < 0.5
    masks[np.arange(200), rng.integers(0, 3, 200)] = True
    actions, _ = model.predict(observations, deterministic=deterministic, action_masks=masks)
    assert masks[np.arange(200), actions].all()
    if deterministic:
        expected = np.where(masks, model.q_values(observations), -np.inf).argmax(axis=1)
        np.testing.assert_array_equal(actions, expected)
    for observation, mask in zip(observations[:30], masks[:30], strict=True):
        action, _ = model.predict(observation, deterministic=deterministic, action_masks=mask)
        assert action.shape == ()
        assert mask[action]


def test_random_actions_are_all_that_are_allowed():
    model = ScratchDQN("MlpPolicy", MaskedEnv(), seed=0)
    model.exploration_rate = 1.0
    mask = np.array([True, False, True])
    actions = [int(model.predict(np.zeros(3, np.float32), action_masks=mask)[0]) for _ in range(50)]
    assert set(actions) == {0, 2}


def test_forbidden_actions_are_not_bootstrapped_from():
    """Two rooms. In the second, one action is never allowed; the other pays 1 and ends the episode."""

    class Tempting(gym.Env):
        observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.room = 0
            return np.eye(2, dtype=np.float32)[0], {}

        def step(self, action):
            if self.room == 0:
                self.room = 1
                return np.eye(2, dtype=np.float32)[1], 0.0, False, False, {}
            return np.zeros(2, np.float32), 1.0, True, False, {}

        def action_masks(self):
            return np.array([True, self.room == 0])

    def trained(env):
        model = ScratchDQN(
            "MlpPolicy", env, learning_rate=1e-2, gamma=0.5, train_freq=1, target_update_interval=20, seed=0
        )
        with th.no_grad():  # the forbidden action looks good to begin with, and nothing ever says otherwise
            for network in (model.q_net, model.q_net_target):
                network.q_net[4].bias[1] += 100.0
        return model.learn(600).q_values(np.eye(2, dtype=np.float32))

    values = trained(Tempting())
    assert values[1, 0] == pytest.approx(1.0, abs=0.1)
    assert values[0, 0] == pytest.approx(0.5, abs=0.1)


def test_masks_reach_the_environments_of_other_processes_and_wrappers():
    for env in (
        SubprocVecEnv([MaskedEnv, MaskedEnv], start_method="fork"),
        VecNormalize(DummyVecEnv([MaskedEnv])),
        ActionMasker(TimeoutEnv(), lambda env: [True, False, True]),
    ):
        model = ScratchDQN("MlpPolicy", env, **SETTINGS).learn(60)
        assert not model.replay_buffer.store.action_masks.all()
        model.env.close()


def test_masks_go_with_dict_observations_and_observations_kept_once():
    ScratchDQN("MultiInputPolicy", MaskedDictEnv(), **SETTINGS).learn(60)
    ScratchDQN(
        "MlpPolicy",
        MaskedEnv(),
        optimize_memory_usage=True,
        buffer_size=50,
        replay_buffer_kwargs={"handle_timeout_termination": False, "prioritized": True},
        **SETTINGS,
    ).learn(150)


def test_masks_survive_files(tmp_path):
    model = ScratchDQN("MlpPolicy", MaskedEnv(), **SETTINGS).learn(100)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "replay.pkl")
    loaded = ScratchDQN.load(tmp_path / "model.zip", env=MaskedEnv())
    loaded.load_replay_buffer(tmp_path / "replay.pkl")
    assert len(loaded.replay_buffer.store.action_masks) == 100
    np.testing.assert_array_equal(loaded.replay_buffer.store.action_masks, model.replay_buffer.store.action_masks[:100])
    loaded.learn(100, reset_num_timesteps=False)


def test_sb3_contrib_evaluates_with_masks():
    model = ScratchDQN("MlpPolicy", MaskedEnv(), seed=0)
    rewards, lengths = evaluate_policy(model, MaskedEnv(), 3, return_episode_rewards=True, warn=False)
    assert len(rewards) == len(lengths) == 3


def test_the_last_state_is_masked_only_where_an_episode_ended():
    now = np.array([[True, False], [False, True]])
    assert masks_of_next_states(now, np.array([False, False]), [{}, {}]) is now
    masks = masks_of_next_states(now, np.array([True, True]), [{}, {"action_masks": [False, True]}])
    assert masks.tolist() == [[True, True], [False, True]]
    assert now.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([True, False], r"action_masks of shape \(2,\) must have the shape \(1, 3\)"),
        ([[True] * 3] * 2, r"action_masks of shape \(2, 3\) must have the shape \(1, 3\)"),
        ([False] * 3, "must allow at least one action in each observation"),
        ([1.0, 0.5, 0.0], "must be true where an action is allowed and false elsewhere"),
    ],
)
def test_masks_that_cannot_be_are_refused(masks, message):
    model = ScratchDQN("MlpPolicy", MaskedEnv())
    for deterministic in (True, False):
        with pytest.raises(ValueError, match=message):
            model.predict(np.zeros(3, np.float32), deterministic=deterministic, action_masks=masks)


def test_a_buffer_that_keeps_no_masks_is_refused():
    class MaskedGoals(BitFlippingEnv):
        def action_masks(self):
            return np.ones(4, dtype=bool)

    model = ScratchDQN("MultiInputPolicy", MaskedGoals(n_bits=4, continuous=False), replay_buffer_class=HerReplayBuffer)
    with pytest.raises(ValueError, match="replay_buffer_class=HerReplayBuffer keeps no action masks"):
        model.learn(10)
