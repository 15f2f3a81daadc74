"""Training from data alone: before learn(), without an environment step, with schedules, logs and checkpoints."""

from copy import deepcopy

import numpy as np
import pytest
import torch as th
from helpers import TimeoutEnv, assert_equal
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule

from sb3_scratch_dqn import ScratchDQN

SETTINGS = {"learning_starts": 0, "batch_size": 16, "buffer_size": 500, "seed": 0}


def collected(n=300):
    """Transitions of random actions, as arrays."""
    env = TimeoutEnv()
    observation, _ = env.reset(seed=0)
    rows = []
    for step in range(n):
        following, reward, terminated, truncated, _ = env.step(step % 3)
        rows.append((observation, step % 3, reward, following, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else following
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))


def filled(**settings):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **{**SETTINGS, **settings})
    model.load_transitions(collected())
    return model


class Records(BaseCallback):
    def __init__(self, stops_at=None):
        super().__init__()
        self.steps, self.rates, self.stops_at = [], [], stops_at

    def _on_step(self):
        self.steps.append(self.num_timesteps)
        self.rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
        return len(self.steps) != self.stops_at


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_updates_can_be_made_before_training_began(engine):
    model = filled(engine=engine)
    before = model.q_values(np.ones(3))
    model.train(10)
    assert model._n_updates == 10
    assert not np.array_equal(model.q_values(np.ones(3)), before)
    model.learn(20)


def test_a_buffer_that_was_filled_by_hand_serves():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **SETTINGS)
    observation = np.ones((1, 3), np.float32)
    for _ in range(20):
        model.replay_buffer.add(observation, observation, np.array([0]), np.array([1.0]), np.array([True]), [{}])
    model.train(5, batch_size=4)
    model.learn_offline(200)
    assert (
        model.q_values(observation)[0, 0]
        > ScratchDQN("MlpPolicy", TimeoutEnv(), **SETTINGS).q_values(observation)[0, 0]
    )


def test_it_learns_what_updates_and_target_syncs_by_hand_learn():
    model, naive = (filled(engine="eager", target_update_interval=40) for _ in range(2))
    model.set_random_seed(1)
    model.learn_offline(100)
    naive.set_random_seed(1)
    for update in range(1, 101):
        naive.train(1, batch_size=16)
        if update % 10 == 0:  # 40 environment steps, with an update each 4
            naive.q_net_target.load_state_dict(naive.q_net.state_dict())
    assert_equal(model.policy.state_dict(), naive.policy.state_dict())


def test_no_step_is_taken_in_the_environment():
    class Untouched(TimeoutEnv):
        def step(self, action):
            raise AssertionError("a step was taken")

        reset = step

    model = ScratchDQN("MlpPolicy", Untouched(), **SETTINGS)
    model.load_transitions(collected())
    model.learn_offline(50)
    assert (model.num_timesteps, model._n_updates) == (0, 50)
    model.env = None
    model.learn_offline(50)


def test_schedules_run_over_the_gradient_steps():
    model = filled(learning_rate=LinearSchedule(1e-3, 0.0, 1.0), replay_buffer_kwargs={"prioritized": True})
    records = Records()
    model.learn_offline(10, records)
    np.testing.assert_allclose(records.rates, 1e-3 * (1 - np.arange(10) / 10))
    assert records.steps == list(range(1, 11))
    assert model.replay_buffer.sampler.beta_now == pytest.approx(0.4 + 0.6 * 0.9)
    model.learn_offline(5, records := Records())
    assert records.steps == list(range(11, 16)), "counted on over all calls"


def test_a_callback_sees_each_update_and_changes_none():
    models = [filled(engine="eager") for _ in range(2)]
    for model, callback in zip(models, (None, Records()), strict=True):
        model.set_random_seed(1)
        model.learn_offline(100, callback)
    assert_equal(*(model.policy.state_dict() for model in models))


def test_a_callback_can_stop_it():
    model = filled()
    model.learn_offline(100, Records(stops_at=7))
    assert model._n_updates == 7


def test_checkpoints_are_named_by_updates_and_evaluations_run(tmp_path):
    model = filled()
    model.learn_offline(
        40,
        [
            CheckpointCallback(20, str(tmp_path)),
            EvalCallback(Monitor(TimeoutEnv()), eval_freq=40, n_eval_episodes=2, log_path=str(tmp_path), verbose=0),
        ],
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "rl_model_20_steps.zip", "rl_model_40_steps.zip", "evaluations.npz",
    }  # fmt: skip
    loaded = ScratchDQN.load(tmp_path / "rl_model_20_steps.zip", env=TimeoutEnv())
    assert loaded._n_updates == 20
    loaded.learn(20)


def test_it_is_logged_by_updates(tmp_path):
    model = filled(learning_rate=1e-3)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn_offline(50, log_interval=20)
    model.logger.close()
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    logged = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["train/n_updates"] for row in logged] == ["20", "40"]
    assert all(float(row["train/loss"]) > 0 and float(row["time/updates_per_second"]) > 0 for row in logged)
    assert {"train/q_mean", "train/learning_rate"} <= logged[0].keys()


def test_tensorboard_has_it(tmp_path):
    model = filled(tensorboard_log=str(tmp_path))
    model.learn_offline(20, log_interval=10, tb_log_name="offline")
    assert list(tmp_path.glob("offline_1/events*"))


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
def test_a_progress_bar_counts_updates(monkeypatch):
    brief = []
    tqdm = pytest.importorskip("stable_baselines3.common.callbacks").tqdm
    monkeypatch.setattr(tqdm, "update", lambda self, n=1: brief.append(n))
    filled().learn_offline(100, progress_bar=True)
    assert sum(brief) == 100


def test_other_settings_of_the_target_network():
    assert_interval = lambda expected, interval=None, **settings: _assert_interval(expected, interval, settings)  # noqa: E731
    assert_interval(25, target_update_interval=100)
    assert_interval(50, target_update_interval=100, gradient_steps=2)
    assert_interval(100, target_update_interval=100, gradient_steps=-1)
    assert_interval(1, target_update_interval=1)
    assert_interval(7, 7.0, target_update_interval=100)
    with pytest.raises(ValueError, match=r"target_update_interval=\(3, 'episode'\) counts episodes"):
        filled(target_update_interval=(3, "episode")).learn_offline(10)
    filled(target_update_interval=(3, "episode")).learn_offline(10, target_update_interval=5)


def _assert_interval(expected, interval, settings):
    model = filled(engine="eager", **settings)
    moves = []
    model._engine.update_target = lambda tau: moves.append(model._n_updates)
    model.learn_offline(3 * expected, target_update_interval=interval)
    assert moves == [expected, 2 * expected, 3 * expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_steps": -1}, "gradient_steps=-1 must be a whole number of at least 0"),
        ({"gradient_steps": 2.5}, "gradient_steps=2.5 must be a whole number"),
        ({"gradient_steps": "x"}, "gradient_steps='x' must be a whole number"),
        ({"callback": 5}, "callback=5 must be"),
        ({"log_interval": 0}, "log_interval=0 must be"),
        ({"tb_log_name": 3}, "tb_log_name=3 must be"),
        ({"target_update_interval": 0}, "target_update_interval=0 must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        filled().learn_offline(**{"gradient_steps": 10, **arguments})


def test_an_empty_buffer_is_refused():
    with pytest.raises(ValueError, match="the replay buffer is empty: call load_transitions"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), **SETTINGS).learn_offline(10)


def test_nothing_is_learned_in_no_steps():
    model = filled()
    before = deepcopy(model.policy.state_dict())
    model.learn_offline(0)
    assert_equal(model.policy.state_dict(), before)


def test_a_reference_without_environment_steps_is_sb3s():
    models = [filled(engine="eager"), DQN("MlpPolicy", TimeoutEnv(), **SETTINGS)]
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        getattr(models[1].replay_buffer, name)[:300] = getattr(models[0].replay_buffer, name)[:300]
    models[1].replay_buffer.pos = 300
    models[1].set_logger(configure(None, []))
    for model in models:
        model.set_random_seed(1)
        model.train(20, batch_size=16)
    assert_equal(*(model.policy.state_dict() for model in models))
    assert th.equal(models[0].q_net.q_net[0].weight, models[1].q_net.q_net[0].weight)
