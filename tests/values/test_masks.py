"""Only allowed actions are taken, chosen and bootstrapped from."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import MaskedDictEnv, MaskedEnv, TimeoutEnv
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecNormalize

from sb3_scratch_dqn import DQNPolicy, ScratchDQN, ScratchReplayBuffer
from sb3_scratch_dqn.values.masks import MaskInInfo, masks_of_next_states

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
    not_done = buffer.dones[:rows] == 0
    np.testing.assert_array_equal(
        buffer.store.next_action_masks[:rows][not_done], buffer.next_observations[:rows][not_done] == 1
    )
    # The mask of an episode's last state is unknown, so all actions are allowed there
    assert buffer.store.next_action_masks[:rows][~not_done].all()
    batch = buffer.sample_batch(64)
    assert (batch.action_masks == (batch.observations == 1)).all()
    not_done = batch.discounts > 0
    masked = ~batch.next_action_masks.all(dim=1) & not_done
    assert masked.sum() > 20
    assert (batch.next_action_masks[masked] == (batch.next_observations[masked] == 1)).all()


def test_a_wrapper_provides_the_mask_of_the_last_state():
    model = ScratchDQN("MlpPolicy", make_vec_env(lambda: MaskInInfo(MaskedEnv()), n_envs=2, seed=0), **SETTINGS)
    model.learn(200)
    buffer = model.replay_buffer
    rows = buffer.pos
    assert buffer.dones[:rows].any()
    np.testing.assert_array_equal(buffer.store.next_action_masks[:rows], buffer.next_observations[:rows] == 1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_predictions_respect_masks(deterministic):
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


def test_random_actions_are_all_allowed_actions():
    model = ScratchDQN("MlpPolicy", MaskedEnv(), seed=0)
    model.exploration_rate = 1.0
    mask = np.array([True, False, True])
    actions = [int(model.predict(np.zeros(3, np.float32), action_masks=mask)[0]) for _ in range(50)]
    assert set(actions) == {0, 2}


def test_forbidden_actions_are_not_bootstrapped_from():
    """Two rooms. In the second, one action is never allowed; the other ends the episode with a reward of 1."""

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
            "MlpPolicy", env, learning_rate=3e-3, gamma=0.5, train_freq=1, target_update_interval=20, seed=0
        )
        with th.no_grad():  # the initial value of the forbidden action is high, and no transition corrects it
            for network in (model.q_net, model.q_net_target):
                network.q_net[4].bias[1] += 100.0
        return model.learn(1000).q_values(np.eye(2, dtype=np.float32))

    values = trained(Tempting())
    assert values[1, 0] == pytest.approx(1.0, abs=0.1)
    assert values[0, 0] == pytest.approx(0.5, abs=0.1)


def test_masks_are_read_from_other_processes_and_through_wrappers():
    for env in (
        SubprocVecEnv([MaskedEnv, MaskedEnv], start_method="fork"),
        VecNormalize(DummyVecEnv([MaskedEnv])),
        ActionMasker(TimeoutEnv(), lambda env: [True, False, True]),
    ):
        model = ScratchDQN("MlpPolicy", env, **SETTINGS).learn(60)
        assert not model.replay_buffer.store.action_masks.all()
        model.env.close()


def test_masks_work_with_dict_observations_and_optimize_memory_usage():
    ScratchDQN("MultiInputPolicy", MaskedDictEnv(), **SETTINGS).learn(60)
    ScratchDQN(
        "MlpPolicy",
        MaskedEnv(),
        optimize_memory_usage=True,
        buffer_size=50,
        replay_buffer_kwargs={"handle_timeout_termination": False, "prioritized": True},
        **SETTINGS,
    ).learn(150)


def test_masks_are_saved_and_loaded(tmp_path):
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


def test_only_ended_episodes_use_the_mask_of_their_last_state():
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
def test_wrong_masks_raise(masks, message):
    model = ScratchDQN("MlpPolicy", MaskedEnv())
    for deterministic in (True, False):
        with pytest.raises(ValueError, match=message):
            model.predict(np.zeros(3, np.float32), deterministic=deterministic, action_masks=masks)


def test_a_buffer_without_masks_raises():
    class MaskedGoals(BitFlippingEnv):
        def action_masks(self):
            return np.ones(4, dtype=bool)

    settings = {"policy": "MultiInputPolicy", "replay_buffer_class": HerReplayBuffer}
    with pytest.raises(ValueError, match="replay_buffer_class=HerReplayBuffer does not support action masks"):
        ScratchDQN(env=MaskedGoals(n_bits=4, continuous=False), **settings)
    model = ScratchDQN(env=BitFlippingEnv(n_bits=4, continuous=False), **settings)
    model.set_env(MaskedGoals(n_bits=4, continuous=False))
    with pytest.raises(ValueError, match="replay_buffer_class=HerReplayBuffer does not support action masks"):
        model.learn(10)


def test_a_buffer_that_overrides_sample_raises():
    class CustomSample(ScratchReplayBuffer):
        def sample(self, batch_size, env=None):
            return super().sample(batch_size, env)

    with pytest.raises(ValueError, match="replay_buffer_class=CustomSample does not support action masks, but env has"):
        ScratchDQN("MlpPolicy", MaskedEnv(), replay_buffer_class=CustomSample).learn(10)
    model = ScratchDQN(
        "MlpPolicy", TimeoutEnv(), replay_buffer_class=CustomSample, replay_buffer_kwargs={"prioritized": True}
    )
    with pytest.raises(
        ValueError, match=r"replay_buffer_class=CustomSample overrides .* so prioritized=True would have no effect"
    ):
        model.learn(10)


@pytest.mark.parametrize("buffer_size", [50, 2000])
def test_transitions_of_an_environment_without_masks_are_not_masked(buffer_size):
    model = ScratchDQN("MlpPolicy", MaskedEnv(), buffer_size=buffer_size, **SETTINGS).learn(100)
    masks = model.replay_buffer.store.action_masks
    assert not masks.all()
    model.set_env(TimeoutEnv())
    model.learn(400, reset_num_timesteps=False)
    newest = (model.replay_buffer.pos - 1 - np.arange(40)) % buffer_size
    for name in ("action_masks", "next_action_masks"):
        assert getattr(model.replay_buffer.store, name)[newest].all()


def test_transitions_stored_before_masks_are_not_masked():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **SETTINGS).learn(60)
    model.set_env(MaskedEnv())
    model.learn(60, reset_num_timesteps=False)
    assert model.replay_buffer.store.next_action_masks[:60].all()
    assert not model.replay_buffer.store.next_action_masks[60:120].all()


@pytest.mark.parametrize("wrapper", [lambda env: env, MaskInInfo])
def test_a_game_may_end_without_a_legal_move(wrapper):
    class Board(gym.Env):
        observation_space = gym.spaces.Box(0, 1, (3,), np.float32)
        action_space = gym.spaces.Discrete(3)

        def reset(self, *, seed=None, options=None):
            self.fields = np.zeros(3, np.float32)
            return self.fields.copy(), {}

        def step(self, action):
            assert self.fields[action] == 0
            self.fields[action] = 1
            return self.fields.copy(), 1.0, bool(self.fields.all()), False, {}

        def action_masks(self):
            return self.fields == 0

    model = ScratchDQN("MlpPolicy", wrapper(Board()), **SETTINGS).learn(80)
    assert all(parameter.isfinite().all() for parameter in model.q_net.parameters())


def test_policies_without_a_masks_argument_still_act():
    class WithoutMasks(DQNPolicy):
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return super().predict(observation, state, episode_start, deterministic)

    ScratchDQN(WithoutMasks, TimeoutEnv(), **SETTINGS).learn(60)


def test_vectorized_environments_that_cannot_report_attributes_have_no_masks():
    class Silent(VecEnvWrapper):
        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            return self.venv.step_wait()

        def has_attr(self, attr_name):
            raise NotImplementedError

    model = ScratchDQN("MlpPolicy", Silent(DummyVecEnv([TimeoutEnv])), **SETTINGS).learn(60)
    assert model._masks is None


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, bool, float])
def test_policies_take_masks_of_zeros_and_ones(dtype):
    model = ScratchDQN("MlpPolicy", MaskedEnv(), seed=0)
    values = model.q_values(np.zeros(3, np.float32))[0]
    mask = np.ones(3, dtype=dtype)
    mask[values.argmax()] = 0
    action, _ = model.policy.predict(np.zeros(3, np.float32), action_masks=mask)
    assert action == np.where(mask, values, -np.inf).argmax()
    with pytest.raises(ValueError, match="must allow at least one action"):
        model.policy.predict(np.zeros(3, np.float32), action_masks=np.zeros(3, dtype=dtype))


# Masks that are not methods


class PropertyEnv(MaskedEnv):
    """Its masks are a property that changes with each step."""

    mask = np.ones(3, bool)
    action_masks = property(lambda self: self.mask)


class ArrayEnv(TimeoutEnv):
    """Its mask is an array that never changes."""

    action_masks = np.array([True, False, True])

    def step(self, action):
        assert action != 1
        return super().step(action)


class NoneEnv(TimeoutEnv):
    action_masks = None


class ReturnsNoneEnv(TimeoutEnv):
    def action_masks(self):
        return None


class ListEnv(ArrayEnv):
    action_masks = (1, 0, 1)


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("env", [PropertyEnv, ArrayEnv, ListEnv, lambda: MaskInInfo(ArrayEnv())])
def test_masks_may_be_properties_and_arrays(env, n_envs, engine):
    model = ScratchDQN("MlpPolicy", make_vec_env(env, n_envs=n_envs, seed=0), engine=engine, **SETTINGS).learn(120)
    masks = model.replay_buffer.store.action_masks[: model.replay_buffer.pos]
    assert not masks.all()
    if env is PropertyEnv:
        np.testing.assert_array_equal(masks, model.replay_buffer.observations[: len(masks)] == 1)
        with pytest.raises(AssertionError, match="action 1 is not allowed"):
            PropertyEnv.step(type("Env", (PropertyEnv,), {"mask": np.array([1, 0, 1])})(), 1)


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        *((env, {"engine": engine}) for env in (NoneEnv, ReturnsNoneEnv) for engine in ("auto", "eager")),
        (NoneEnv, {"replay_buffer_class": ReplayBuffer}),
    ],
)
def test_none_means_no_masks(env, settings):
    model = ScratchDQN("MlpPolicy", env(), **SETTINGS, **settings).learn(60)
    assert model._masks is None
    reference = ScratchDQN("MlpPolicy", TimeoutEnv(), **SETTINGS, **settings).learn(60)
    np.testing.assert_array_equal(model.replay_buffer.observations[:60], reference.replay_buffer.observations[:60])


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_none_means_no_masks_in_other_processes():
    envs = SubprocVecEnv([ReturnsNoneEnv, ReturnsNoneEnv], start_method="fork")
    model = ScratchDQN("MlpPolicy", envs, **SETTINGS).learn(20)
    assert model._masks is None
    model.env.close()


@pytest.mark.parametrize("value", [np.ones(2, bool), np.ones((3, 3), bool), True, {"left": True}])
def test_attributes_of_a_wrong_shape_raise(value):
    class WrongShape(TimeoutEnv):
        action_masks = value

    shape = str(np.shape(value)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"action_masks of environment 0 are of shape {shape}, but must have"):
        ScratchDQN("MlpPolicy", WrongShape(), **SETTINGS).learn(20)


def test_masks_that_become_none_raise():
    class BecomesNone(TimeoutEnv):
        calls = 0

        def action_masks(self):
            self.calls += 1
            return None if self.calls > 5 else np.ones(3, bool)

    with pytest.raises(ValueError, match="action_masks of environment 0 are None, but must have the shape"):
        ScratchDQN("MlpPolicy", BecomesNone(), **SETTINGS).learn(20)
