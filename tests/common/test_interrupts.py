"""Training continues after an interrupt, and no row of the replay buffer continues a row that it did not follow."""

import os
import signal
import threading
from contextlib import suppress

import gymnasium as gym
import numpy as np
import pytest
from helpers import TimeoutEnv, assert_equal, replay_contents
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.common.interrupts import Interrupts
from sb3_scratch_dqn.replay.stores import Store

SETTINGS = {"learning_starts": 10, "batch_size": 8, "buffer_size": 200, "n_steps": 3, "seed": 0}


class CountingEnv(TimeoutEnv):
    """Observes the number of steps and resets so far, so that the order of rows can be verified."""

    observation_space = gym.spaces.Box(0, 1e6, (1,), np.float32)
    count = 0
    interrupted_at = None
    ctrl_c_after = None  # seconds from the next step on

    def step(self, action):
        CountingEnv.count += 1
        if self.interrupted_at is not None and CountingEnv.count >= self.interrupted_at:
            raise KeyboardInterrupt
        if self.ctrl_c_after is not None:
            threading.Timer(self.ctrl_c_after, os.kill, (os.getpid(), signal.SIGINT)).start()
            CountingEnv.ctrl_c_after = None
        return super().step(action)

    def reset(self, **kwargs):
        CountingEnv.count += 1
        return super().reset(**kwargs)

    def _observe(self):
        return np.array([CountingEnv.count], np.float32)


@pytest.fixture(autouse=True)
def _from_zero():
    CountingEnv.count, CountingEnv.interrupted_at = 0, None


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Handle SIGINT as in a terminal; a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_rows_continue(buffer):
    """Assert that each row starts where the previous one ended, unless that one ended its episode or was cut."""
    rows = buffer.size()
    now, following = np.asarray(buffer.observations)[:rows], np.asarray(buffer.next_observations)[:rows]
    ended = buffer.dones[:rows].astype(bool) | buffer.store.cuts[:rows]
    continues = (following[:-1] == now[1:]).reshape(rows - 1, buffer.n_envs, -1).all(axis=2)
    assert (continues | ended[:-1]).all()
    assert (following.reshape(rows, -1)[:, -1] == now.reshape(rows, -1)[:, -1] + 1).all(), "one step in between"


class StopAt(BaseCallback):
    """Stops training, or raises an error, at these steps."""

    def __init__(self, *steps, error=None):
        super().__init__()
        self.steps, self.error = steps, error

    def _on_step(self):
        if self.num_timesteps not in self.steps:
            return True
        if self.error is not None:
            raise self.error
        return False


def interrupt_in_env(model, at):
    CountingEnv.interrupted_at = at


def interrupt_in_callback(model, at):
    return StopAt(at, error=KeyboardInterrupt())


def error_in_callback(model, at):
    return StopAt(at, error=RuntimeError("error in a callback"))


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("interrupt", [interrupt_in_env, interrupt_in_callback, error_in_callback])
def test_no_row_continues_a_row_that_it_did_not_follow(interrupt, engine):
    model = ScratchDQN("MlpPolicy", CountingEnv(), engine=engine, **SETTINGS)
    for at in (20, 51, 82, 113):
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            model.learn(1000, interrupt(model, at), reset_num_timesteps=False)
        rows = model.replay_buffer.size()
        CountingEnv.interrupted_at = None
        model.learn(8, reset_num_timesteps=False)
        assert model.replay_buffer.dones[rows - 1] or model.replay_buffer.store.cuts[rows - 1]
    assert_rows_continue(model.replay_buffer)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_callback_that_stops_training_loses_no_step(engine):
    # double_q, because without an extra (n_steps is none) the eager engine loses the step, as SB3 does
    model = ScratchDQN("MlpPolicy", CountingEnv(), engine=engine, double_q=True, **SETTINGS)
    model.learn(100, StopAt(31))
    assert model.replay_buffer.size() == 31
    model.learn(30, StopAt(45), reset_num_timesteps=False)
    model.learn(30, reset_num_timesteps=False)
    assert not model.replay_buffer.store.cuts.any(), "the episodes continued"
    assert_rows_continue(model.replay_buffer)


def test_the_reference_continues_after_a_callback_as_sb3_does():
    models = []
    for make, more in ((DQN, {}), (ScratchDQN, {"engine": "eager"})):
        CountingEnv.count = 0
        model = make("MlpPolicy", CountingEnv(), **{**SETTINGS, "n_steps": 1}, **more)
        model.set_random_seed(1)
        model.learn(100, StopAt(31))
        models.append(model.learn(40, reset_num_timesteps=False))
    assert_equal(*(replay_contents(model.replay_buffer) for model in models))


# While a transition is written


def stacked():
    return VecFrameStack(make_vec_env(CountingEnv, n_envs=1, seed=0), 3)


@pytest.mark.parametrize("make_env", [lambda: DummyVecEnv([CountingEnv]), stacked], ids=["dense", "frames"])
@pytest.mark.parametrize("method", ["write", "_resize"])
def test_ctrl_c_while_a_transition_is_written_is_handled_afterwards(make_env, method, monkeypatch):
    model = ScratchDQN("MlpPolicy", make_env(), **SETTINGS)
    original, calls = getattr(Store, method), []

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        calls.append(self.n_writes)
        return original(self, *args)

    monkeypatch.setattr(Store, method, interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model.learn(20, reset_num_timesteps=False)
        if method == "_resize":
            break
    assert model.replay_buffer.size() == len(calls)
    monkeypatch.undo()
    model.learn(100, reset_num_timesteps=False)
    assert not model.replay_buffer.store.cuts.any(), "nothing had to be cut"
    assert_rows_continue(model.replay_buffer)


def test_ctrl_c_at_any_time_leaves_rows_that_continue():
    model = ScratchDQN("MlpPolicy", CountingEnv(), **SETTINGS)
    random = np.random.default_rng(0)
    for _ in range(25):
        CountingEnv.ctrl_c_after = random.uniform(0.001, 0.02)
        with pytest.raises(KeyboardInterrupt):
            model.learn(10**6, reset_num_timesteps=False)
        # The steps at the end must not overwrite the first rows
        if model.replay_buffer.full or model.replay_buffer.pos > 180:
            model.replay_buffer.reset()
    model.learn(10, reset_num_timesteps=False)
    assert not model.replay_buffer.full
    assert_rows_continue(model.replay_buffer)


# The signal handler


def test_the_original_handler_is_called_and_restored():
    handled, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
    try:
        own_handler = signal.getsignal(signal.SIGINT)
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert handled == [signal.SIGINT]
            interrupts.blocked = True
            signal.raise_signal(signal.SIGINT)
            assert len(handled) == 1
            interrupts.unblock()
            assert len(handled) == 2
            interrupts.unblock()
            assert len(handled) == 2
        assert signal.getsignal(signal.SIGINT) is own_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_handled_if_writing_a_transition_fails():
    handled, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
    try:
        with suppress(ZeroDivisionError), Interrupts() as interrupts:
            interrupts.blocked = True
            signal.raise_signal(signal.SIGINT)
            assert not handled
            _ = 1 / 0
        assert handled == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_was_installed_meanwhile_is_kept():
    before = signal.getsignal(signal.SIGINT)
    try:
        with Interrupts():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread_does_not_change_the_handler():
    before, errors = signal.getsignal(signal.SIGINT), []

    def train():
        try:
            ScratchDQN("MlpPolicy", CountingEnv(), **SETTINGS).learn(50)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors
    assert signal.getsignal(signal.SIGINT) is before


def test_training_restores_the_handler():
    before = signal.getsignal(signal.SIGINT)
    model = ScratchDQN("MlpPolicy", CountingEnv(), **SETTINGS).learn(20)
    assert signal.getsignal(signal.SIGINT) is before
    assert "_interrupts" not in vars(model)
