"""Rollouts take SB3's steps, and show callbacks and users what SB3 shows them."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from configurations import SMALL
from helpers import DictEnv, TimeoutEnv, assert_equal, assert_same_training, parity_settings
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_scratch_dqn import DQNPolicy, ScratchDQN
from sb3_scratch_dqn.algorithm.rollout import fast_step


class InfoEnv(TimeoutEnv):
    """Infos with an array that the environment keeps writing to, and a dict."""

    def reset(self, *, seed=None, options=None):
        self.counts = np.zeros(2)
        return super().reset(seed=seed)[0], {"fresh": True}

    def step(self, action):
        self.counts += 1
        return (*super().step(action)[:4], {"counts": self.counts, "nested": {"action": int(action)}})


class Watcher(BaseCallback):
    """Notes each call, and what it could see then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def note(self, name):
        hidden = {"self", "env", "callback", "replay_buffer", "kwargs", "tb_log_name"}
        seen = {
            key: value.copy() if isinstance(value, np.ndarray) else value
            for key, value in self.locals.items()
            if key not in hidden
        }
        self.calls.append((name, self.num_timesteps, self.model.num_timesteps, self.model.exploration_rate, seen))

    def _on_training_start(self):
        self.note("training start")

    def _on_rollout_start(self):
        self.note("rollout start")

    def _on_step(self):
        assert self.locals["self"] is self.model
        assert self.locals["replay_buffer"] is self.model.replay_buffer
        assert self.locals["env"] is self.training_env
        self.note("step")
        return True

    def _on_rollout_end(self):
        self.note("rollout end")

    def _on_training_end(self):
        self.note("training end")


@pytest.mark.parametrize("settings", [{}, {"train_freq": (1, "episode")}])
def test_callbacks_are_called_when_sb3_calls_them_and_see_the_same(settings):
    watchers = []
    for algorithm in (DQN, ScratchDQN):
        watchers.append(Watcher())
        model = algorithm("MlpPolicy", InfoEnv(), **{**SMALL, **settings}, **parity_settings(algorithm))
        model.learn(130, watchers[-1])
    theirs, ours = (watcher.calls for watcher in watchers)
    assert [call[:4] for call in ours] == [call[:4] for call in theirs]
    compared = 0
    for (name, *_, expected), (*_, seen) in zip(theirs, ours, strict=True):
        if name == "step":
            assert seen.keys() == expected.keys()
            for info in (*expected["infos"], *seen["infos"]):
                info.get("episode", {}).pop("t", None)
            assert_equal(expected, seen)
            compared += 1
    assert compared > 100


def test_without_a_callback_nothing_differs():
    watched, alone = (
        ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL).learn(150, callback) for callback in (Watcher(), None)
    )
    assert_equal(watched.get_parameters(), alone.get_parameters())


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("env_class", [TimeoutEnv, InfoEnv])
def test_lean_steps_are_those_of_the_environments(n_envs, env_class):
    envs = [make_vec_env(env_class, n_envs=n_envs, seed=0) for _ in range(2)]
    assert_equal(*(env.reset() for env in envs))
    steps = envs[0].step, fast_step(envs[1])
    assert steps[1] != envs[1].step
    before, ended = [], 0
    for count in range(80):
        actions = np.arange(n_envs) + count
        results = [step(actions % 3) for step in steps]
        for *_, infos in results:
            for info in infos:
                info.get("episode", {}).pop("t", None)
        assert_equal(*results)
        assert_equal(*(env.reset_infos for env in envs))
        assert_equal(*(env.actions for env in envs))
        assert_equal(*((env.buf_obs, env.buf_rews, env.buf_dones) for env in envs))
        ended += results[0][2].sum()
        # Nothing that was given away changes afterwards
        before.append(results)
        assert_equal(*before[count // 2])
    assert ended > 0


def test_other_vectorised_environments_are_stepped_by_their_own_method():
    class Other(DummyVecEnv):
        pass

    other, dicts, patched = Other([TimeoutEnv]), DummyVecEnv([DictEnv]), DummyVecEnv([TimeoutEnv])
    patched.step_wait = lambda: None
    for env in (other, dicts, patched):
        assert fast_step(env) == env.step


def test_a_patched_step_is_called():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL)
    steps, own = [], model.env.step
    model.env.step = lambda actions: steps.append(actions) or own(actions)
    model.learn(60)
    assert len(steps) == 60


def test_an_overridden_way_to_store_is_called():
    class Doubled(ScratchDQN):
        def _store_transition(self, replay_buffer, buffer_action, new_obs, reward, dones, infos):
            super()._store_transition(replay_buffer, buffer_action, new_obs, 2 * reward, dones, infos)

    plain, doubled = (algorithm("MlpPolicy", TimeoutEnv(), **SMALL).learn(20) for algorithm in (ScratchDQN, Doubled))
    assert_equal(2 * plain.replay_buffer.rewards[:20], doubled.replay_buffer.rewards[:20])


def test_observations_in_replay_are_not_those_that_the_environment_goes_on_writing_to():
    class Reusing(gym.Env):
        """Writes every observation into the same array."""

        observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        action_space = gym.spaces.Discrete(2)
        state = np.zeros(1, np.float32)

        def reset(self, *, seed=None, options=None):
            self.state[:] = 0
            return self.state, {}

        def step(self, action):
            self.state += 1
            return self.state, 0.0, self.state[0] == 7, False, {}

    buffer = ScratchDQN("MlpPolicy", Reusing(), learning_starts=100, buffer_size=50).learn(40).replay_buffer
    expected = np.arange(40) % 7
    assert buffer.observations[:40, 0, 0].tolist() == expected.tolist()
    goes_on = expected < 6  # the last observation of an episode is lost in DummyVecEnv already
    assert buffer.next_observations[:40, 0, 0][goes_on].tolist() == (expected + 1)[goes_on].tolist()


def test_sources_of_batches_draw_ahead_what_they_would_draw_one_after_another():
    for n_envs, more in ((1, {}), (3, {}), (1, {"optimize_memory_usage": True}), (1, {"n_steps": 3})):
        if "optimize_memory_usage" in more:
            more["replay_buffer_kwargs"] = {"handle_timeout_termination": False}
        env = make_vec_env(TimeoutEnv, n_envs=n_envs, seed=0)
        buffer = ScratchDQN("MlpPolicy", env, buffer_size=60, batch_size=10, learning_starts=500, **more)
        buffer = buffer.learn(90).replay_buffer
        np.random.seed(0)
        singles = [buffer.sample_batch(10)._asdict() for _ in range(4)]
        state = np.random.get_state()[1:]
        np.random.seed(0)
        parts = [batch._asdict() for batch in buffer.sample_batch(10, n_batches=4).split(4)]
        assert_equal(singles, parts)
        assert_equal(state, np.random.get_state()[1:])


def test_masks_are_cut_apart_with_their_batches():
    env = TimeoutEnv()
    env.action_masks = lambda: np.array([True, False, True])
    buffer = ScratchDQN("MlpPolicy", env, learning_starts=500, buffer_size=100).learn(50).replay_buffer
    first, second = buffer.sample_batch(4, n_batches=2).split(2)
    assert first.action_masks.shape == second.next_action_masks.shape == (4, 3)
    assert SimpleNamespace(**first._asdict()).indices[0].shape == (4,)


def test_a_policy_that_a_callback_puts_in_place_acts_from_the_next_step_on():
    class Always(DQNPolicy):
        def _predict(self, observation, deterministic=True):
            return torch.full((len(observation),), 2)

    class Replace(BaseCallback):
        actions = ()

        def _on_step(self):
            self.actions = (*self.actions, int(self.locals["actions"][0]))
            if self.n_calls == 20:
                model = self.model
                model.policy = Always(model.observation_space, model.action_space, model.lr_schedule)
                model._create_aliases()
            return True

    callback = Replace()
    settings = {**SMALL, "exploration_initial_eps": 0.0, "exploration_final_eps": 0.0, "learning_starts": 0}
    ScratchDQN("MlpPolicy", TimeoutEnv(), **{**settings, "train_freq": 100}).learn(40, callback)
    assert set(callback.actions[20:40]) == {2}
    assert set(callback.actions[:20]) != {2}


def test_settings_that_a_callback_changes_in_place_are_heeded():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL, munchausen=True, munchausen_kwargs={"alpha": 0.5}).learn(60)
    model.munchausen_kwargs["alpha"] = 0.25
    model.train(1, 8)
    assert model._engine.objective.munchausen.alpha == 0.25


def test_eager_gives_networks_a_copy_that_they_may_write_to():
    class InPlace(FlattenExtractor):
        def forward(self, observations):
            return super().forward(observations.sub_(1.0))

    models = [
        algorithm(
            "MlpPolicy",
            TimeoutEnv(),
            **{**SMALL, "policy_kwargs": {"features_extractor_class": InPlace}},
            **parity_settings(algorithm),
        ).learn(120)
        for algorithm in (DQN, ScratchDQN)
    ]
    assert_same_training(*models)


def test_an_environment_that_a_callback_patches_is_stepped_so_from_then_on():
    calls = []

    class Patch(BaseCallback):
        def _on_step(self):
            if self.n_calls == 30:
                env, own = self.training_env, self.training_env.step
                env.step = lambda actions: calls.append(1) or own(actions)
            return True

    ScratchDQN("MlpPolicy", TimeoutEnv(), **{**SMALL, "train_freq": 100}).learn(100, Patch())
    assert len(calls) == 70


def test_a_patched_class_is_called(monkeypatch):
    calls, own = [], DummyVecEnv.step_wait
    monkeypatch.setattr(DummyVecEnv, "step_wait", lambda self: calls.append(1) or own(self))
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL).learn(30)
    assert len(calls) == model.num_timesteps
