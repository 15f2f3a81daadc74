"""The target network is updated when it should be, and at no other time."""

import pytest
import torch as th
from helpers import TimeoutEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.algorithm.target_sync import sync_is_due


def test_steps_are_counted_over_all_environments():
    assert [calls for calls in range(1, 21) if sync_is_due(10, 1, calls, 0, 0)] == [10, 20]
    assert [calls for calls in range(1, 13) if sync_is_due(10, 3, calls, 0, 0)] == [3, 6, 9, 12]
    assert all(sync_is_due(2, 8, calls, 0, 0) for calls in range(1, 5))


def test_episodes_are_counted_even_if_several_end_at_once():
    ended = [0, 4, 4, 0, 1, 1, 0, 12, 0]
    total, due = 0, []
    for step, count in enumerate(ended):
        total += count
        if sync_is_due((10, "episode"), 4, step + 1, total, count):
            due.append((step, total))
    assert due == [(5, 10), (7, 22)]


class WatchTarget(BaseCallback):
    """Notes the episodes finished at each step at which the target network had changed."""

    def _on_training_start(self):
        self.episodes, self.changes, self.last = 0, [], self.parameters()

    def parameters(self):
        return th.cat([p.flatten() for p in self.model.q_net_target.parameters()]).clone()

    def _on_step(self):
        now = self.parameters()
        if not th.equal(now, self.last):
            self.changes.append(self.episodes)
            self.last = now
        self.episodes += int(self.locals["dones"].sum())
        return True


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("interval", [(3, "episode"), [3, "episode"]])
def test_training_updates_the_target_after_episodes(n_envs, interval):
    watch = WatchTarget()
    ScratchDQN(
        "MlpPolicy",
        make_vec_env(TimeoutEnv, n_envs=n_envs, seed=0),
        target_update_interval=interval,
        learning_starts=0,
        train_freq=1,
        seed=0,
    ).learn(400, watch)
    assert len(watch.changes) > 8
    multiples = [episodes // 3 for episodes in watch.changes]
    assert multiples == list(range(1, len(multiples) + 1))


def test_a_callback_may_change_the_interval():
    class Shorten(WatchTarget):
        def _on_step(self):
            if self.n_calls == 100:
                self.model.target_update_interval = 10
            return super()._on_step()

    watch = Shorten()
    ScratchDQN("MlpPolicy", TimeoutEnv(), target_update_interval=10_000, learning_starts=0, train_freq=1, seed=0).learn(
        200, watch
    )
    assert len(watch.changes) == 10


def test_more_environments_than_the_interval_has_steps_is_worth_a_warning():
    with pytest.warns(UserWarning, match=r"target network will be updated after each call"):
        ScratchDQN("MlpPolicy", make_vec_env(TimeoutEnv, n_envs=3), target_update_interval=2)
