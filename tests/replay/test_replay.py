"""The replay buffer has the contents of SB3's buffers and gives the batches of a naive list."""

import copy
import pickle
import re
import time

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch as th
from helpers import DictEnv, TimeoutEnv, assert_equal, replay_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from list_replay import ListReplay
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.common import memory
from sb3_scratch_dqn.common.memory import available_memory
from sb3_scratch_dqn.replay import ScratchReplayBuffer, Stacking, batch_source
from sb3_scratch_dqn.replay.observations import DenseObservations
from sb3_scratch_dqn.replay.stores import Store

VECTOR = gym.spaces.Box(-1, 1, (2,), np.float32)
NESTED = gym.spaces.Dict({"a": VECTOR, "b": gym.spaces.Discrete(5)})
ACTIONS = gym.spaces.Discrete(3)


def random_steps(space, n_envs, steps, rng):
    """Yield steps with random observations; a tenth of them terminate the episode, a tenth truncate it."""

    def observe():
        if isinstance(space, gym.spaces.Dict):
            return {
                "a": rng.uniform(-1, 1, (n_envs, 2)).astype(np.float32),
                "b": rng.integers(0, 5, n_envs),
            }
        return rng.uniform(-1, 1, (n_envs, 2)).astype(np.float32)

    for _ in range(steps):
        ends = rng.uniform(size=n_envs)
        yield (
            observe(),
            observe(),
            rng.integers(0, 3, n_envs),
            rng.normal(size=n_envs).astype(np.float32),
            ends < 0.2,
            [{"TimeLimit.truncated": bool(0.1 <= end < 0.2)} for end in ends],
        )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    capacity=st.integers(1, 40),
    steps=st.integers(1, 100),
    n_envs=st.integers(1, 3),
    n_steps=st.integers(1, 5),
    nested=st.booleans(),
    share=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_batches_equal_those_of_a_naive_list(capacity, steps, n_envs, n_steps, nested, share, seed):
    space = NESTED if nested else VECTOR
    if share:
        capacity = max(capacity, 2)  # one row has no transition
    buffer = ScratchReplayBuffer(
        capacity * n_envs,
        space,
        ACTIONS,
        device="cpu",
        n_envs=n_envs,
        n_steps=n_steps,
        optimize_memory_usage=share,
        handle_timeout_termination=not share,
    )
    oracle = ListReplay(capacity)
    for obs, next_obs, action, reward, done, infos in random_steps(space, n_envs, steps, np.random.default_rng(seed)):
        if share:
            infos = [{} for _ in infos]
        buffer.add(obs, next_obs, action, reward, done, infos)
        oracle.add(obs, next_obs, action, reward, done, infos)

    np.random.seed(seed)
    rows, envs, _ = buffer.sampler.draw(buffer, 16)
    np.random.seed(seed)
    batch = buffer.sample_batch(16, gamma=0.9)
    for index, (row, env) in enumerate(zip(rows, envs, strict=True)):
        obs, action, returned, discount, next_obs = oracle.transition(row, env, n_steps, 0.9, share)
        for expected, got in ((obs, batch.observations), (next_obs, batch.next_observations)):
            for key in expected if nested else [None]:
                one = expected[key] if nested else expected
                np.testing.assert_array_equal(one, (got[key] if nested else got)[index].numpy().reshape(one.shape))
        assert batch.actions[index] == action
        assert batch.returns[index].item() == pytest.approx(returned, rel=1e-5, abs=1e-6)
        assert batch.discounts[index].item() == pytest.approx(discount, rel=1e-5)
        assert batch.weights[index] == 1
        assert (batch.indices[0][index], batch.indices[1][index]) == (row, env)


@pytest.mark.parametrize(
    ("reference_class", "space", "kwargs"),
    [
        (ReplayBuffer, VECTOR, {}),
        (ReplayBuffer, VECTOR, {"optimize_memory_usage": True, "handle_timeout_termination": False}),
        (DictReplayBuffer, NESTED, {}),
        (NStepReplayBuffer, VECTOR, {"n_steps": 3, "gamma": 0.9}),
    ],
)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_samples_equal_those_of_sb3(reference_class, space, kwargs, n_envs):
    reference = reference_class(60, space, ACTIONS, device="cpu", n_envs=n_envs, **kwargs)
    buffer = ScratchReplayBuffer(60, space, ACTIONS, device="cpu", n_envs=n_envs, **kwargs)
    for count, step in enumerate(random_steps(space, n_envs, 90, np.random.default_rng(0))):
        reference.add(*copy.deepcopy(step))
        buffer.add(*copy.deepcopy(step))
        if count % 7 == 3:
            assert_equal(replay_contents(reference), replay_contents(buffer))
            np.random.seed(count)
            expected = reference.sample(13)
            np.random.seed(count)
            got = buffer.sample(13)
            assert type(got) is type(expected)
            assert_equal(expected._asdict(), got._asdict())
            # and updates get the same batch from both
            batches = []
            for source in (reference, buffer):
                np.random.seed(count)
                batches.append(batch_source(source, 13, None, 0.9).sample(1)._replace(indices=None)._asdict())
            assert_equal(*batches)


def test_memory_is_allocated_as_the_buffer_fills():
    buffer = ScratchReplayBuffer(10**12, VECTOR, ACTIONS, device="cpu")
    assert sum(array.nbytes for array in vars(buffer.store).values() if isinstance(array, np.ndarray)) == 0
    for step in random_steps(VECTOR, 1, 1000, np.random.default_rng(0)):
        buffer.add(*step)
    assert 1000 <= len(buffer.observations) <= 2000
    assert buffer.size() == 1000


def test_the_last_resize_of_a_store_doubles_it_to_its_capacity():
    store = Store(1100, 2, DenseObservations(1100, 2, VECTOR), 1, np.int64)
    sizes = []
    for rows in range(1, 1101):
        store.reserve(rows)
        assert rows <= store.rows <= 1100
        if store.rows not in sizes:
            sizes.append(store.rows)
    # The last resize copies half of the capacity, not nearly all of it
    assert sizes == [275, 550, 1100]
    assert store.observations.shape == (1100, 2, 2)
    assert store.bytes_of(1100) == sum(array.nbytes for array in store.arrays(1100).values())


def test_copies_and_pickles_have_only_filled_rows():
    buffer = ScratchReplayBuffer(10_000, NESTED, ACTIONS, device="cpu", n_steps=2)
    for step in random_steps(NESTED, 1, 300, np.random.default_rng(0)):
        buffer.add(*step)
    for restored in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert len(restored.rewards) == 300
        assert_equal(replay_contents(buffer), replay_contents(restored))
        restored.add(*next(random_steps(NESTED, 1, 1, np.random.default_rng(1))))
        assert restored.size() == 301
    assert len(buffer.rewards) == 313


class CustomBuffer(ScratchReplayBuffer):
    """A subclass, which save_replay_buffer() pickles."""


@pytest.mark.parametrize("share", [False, True])
def test_pickles_with_old_attribute_names_of_the_store_are_read(share, monkeypatch):
    settings = {"optimize_memory_usage": share, "handle_timeout_termination": not share}
    buffer = CustomBuffer(50, VECTOR, ACTIONS, device="cpu", n_steps=2, **settings)
    for step in random_steps(VECTOR, 1, 70, np.random.default_rng(0)):
        buffer.add(*step)
    _ = buffer.rewards  # which counts as an edit
    old_names = {"obs_store": "keeper", "n_writes": "written", "n_edits": "edits"}

    def old_state(store):
        return {old_names.get(name, name): value for name, value in vars(store).items()}

    monkeypatch.setattr(Store, "__getstate__", old_state, raising=False)
    pickled = pickle.dumps(buffer)
    monkeypatch.undo()
    assert b"keeper" in pickled
    restored = pickle.loads(pickled)
    assert vars(restored.store).keys() == vars(buffer.store).keys()
    assert (restored.store.n_writes, restored.store.n_edits) == (buffer.store.n_writes, buffer.store.n_edits)
    assert_equal(replay_contents(buffer), replay_contents(restored))
    for step in random_steps(VECTOR, 1, 10, np.random.default_rng(1)):
        for target in (buffer, restored):
            target.add(*copy.deepcopy(step))
    batches = []
    for source in (buffer, restored):
        np.random.seed(0)
        batches.append(source.sample_batch(32)._asdict())
    assert_equal(*batches)


@pytest.mark.parametrize("stacked", [False, True])
def test_n_step_returns_do_not_cross_a_reset(stacked):
    def make_env():
        env = DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)
        return VecFrameStack(env, 2) if stacked else env

    model = ScratchDQN("MlpPolicy", make_env(), n_steps=3, buffer_size=1000, train_freq=1, seed=0)
    cuts = []
    for steps in (2, 6, 4):
        model.learn(steps)  # resets the environments in the middle of their episodes
        cuts.append(model.replay_buffer.pos - 1)
    buffer = model.replay_buffer
    assert cuts == [0, 3, 5]
    assert not buffer.dones[:6].any()
    np.testing.assert_array_equal(buffer.store.cuts[:6], [[1, 1], [0, 0], [0, 0], [1, 1], [0, 0], [0, 0]])
    assert not buffer.timeouts[:6].any()
    rows, envs = np.arange(6), np.zeros(6, dtype=int)
    windows = buffer._n_step_returns(rows, envs, None, 0.5)
    np.testing.assert_array_equal(windows.last_rows, [0, 3, 3, 3, 5, 5])
    np.testing.assert_array_equal(windows.returns, [1, 1.75, 1.5, 1, 1.5, 1])
    np.testing.assert_array_equal(windows.discounts * (1 - windows.terminated), [0.5, 0.125, 0.25, 0.5, 0.25, 0.5])


def test_end_trajectories_does_not_cut_episodes_that_ended():
    buffer = ScratchReplayBuffer(10, VECTOR, ACTIONS, device="cpu", n_envs=2, n_steps=3)
    for obs, next_obs, action, reward, _, infos in random_steps(VECTOR, 2, 4, np.random.default_rng(0)):
        buffer.add(obs, next_obs, action, reward, np.array([True, False]), [{} for _ in infos])
    buffer.end_trajectories()
    np.testing.assert_array_equal(buffer.store.cuts[:4], [[0, 0], [0, 0], [0, 0], [0, 1]])
    windows = buffer._n_step_returns(np.array([3, 3]), np.array([0, 1]), None, 0.5)
    np.testing.assert_array_equal(windows.terminated, [1, 0])
    buffer.pos, buffer.full = 3, False
    buffer.add(obs, next_obs, action, reward, np.array([True, False]), [{}, {}])
    assert not buffer.store.cuts[3].any(), "a row written over a cut is not cut"


@pytest.mark.parametrize("shared", [False, True])
def test_a_new_environment_does_not_continue_the_old_one(shared):
    settings = {"optimize_memory_usage": shared, "replay_buffer_kwargs": {"handle_timeout_termination": not shared}}
    model = ScratchDQN("MlpPolicy", "CartPole-v1", n_steps=3, learning_starts=1000, seed=0, **settings).learn(8)
    model.set_env(gym.make("CartPole-v1"))
    model.learn(8, reset_num_timesteps=False)
    rows = np.arange(4, 10)
    windows = model.replay_buffer._n_step_returns(rows, np.zeros(6, dtype=int), None, 0.5)
    np.testing.assert_array_equal(windows.last_rows, [6, 7, 7, 7, 10, 11])
    # With optimize_memory_usage the next observation is lost, so it must not be used
    np.testing.assert_array_equal(windows.terminated, np.where(windows.last_rows == 7, shared, 0))


def test_n_step_returns_do_not_cross_a_reset_of_a_saved_one_step_buffer(tmp_path):
    model = ScratchDQN("MlpPolicy", "CartPole-v1", learning_starts=1000, seed=0).learn(8).learn(8)
    model.save_replay_buffer(tmp_path / "replay")
    other = ScratchDQN("MlpPolicy", "CartPole-v1", n_steps=3, gamma=0.5)
    other.load_replay_buffer(tmp_path / "replay")
    assert other.replay_buffer.gamma == 0.5
    windows = other.replay_buffer._n_step_returns(np.array([6, 7]), np.zeros(2, dtype=int), None, 0.5)
    np.testing.assert_array_equal(windows.last_rows, [7, 7])


def test_set_env_raises_for_an_environment_without_stacks_if_frames_is_true():
    stacked = VecFrameStack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), 2)
    model = ScratchDQN("MlpPolicy", stacked, replay_buffer_kwargs={"frames": True})
    env, buffer = model.env, model.replay_buffer
    wide = gym.wrappers.TransformObservation(
        gym.make("CartPole-v1"), lambda obs: np.concatenate([obs, obs]), stacked.observation_space
    )
    with pytest.raises(ValueError, match="frames=True needs an env that stacks its frames"):
        model.set_env(wide)
    assert model.env is env
    assert model.replay_buffer is buffer


def test_replaced_arrays_keep_their_dtypes():
    buffer = ScratchReplayBuffer(10, NESTED, ACTIONS, device="cpu")
    for step in random_steps(NESTED, 1, 10, np.random.default_rng(0)):
        buffer.add(*step)
    buffer.rewards = buffer.rewards.astype(np.float64) * 2
    buffer.observations = {key: array.astype(np.float64) for key, array in buffer.observations.items()}
    assert buffer.rewards.dtype == np.float32
    assert {key: array.dtype for key, array in buffer.observations.items()} == {"a": np.float32, "b": np.int64}


def test_a_buffer_larger_than_the_available_memory_warns(monkeypatch):
    monkeypatch.setattr("sb3_scratch_dqn.algorithm.replay_setup.available_memory", lambda: 10_000_000)
    settings = {"buffer_size": 1_000_000, "learning_starts": 1000}
    # 2 x 4 numbers of 4 bytes, 8 for the action, 4 each for the reward, its end and its timeout, 1 for cuts
    message = re.escape(
        "a full replay buffer of buffer_size=1,000,000 takes 0.1 GB, but only 0.0 GB of memory are available: "
        "lower buffer_size (188,679 transitions would fit), or store each observation once by "
        "optimize_memory_usage=True and replay_buffer_kwargs=dict(handle_timeout_termination=False)"
    )
    with pytest.warns(UserWarning, match=f"^{message}$"):
        ScratchDQN("MlpPolicy", "CartPole-v1", **settings).learn(10)
    stacked = VecFrameStack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), 4)
    with pytest.warns(UserWarning, match=r"store each frame once by replay_buffer_kwargs=dict\(frames=True\)"):
        ScratchDQN("MlpPolicy", stacked, replay_buffer_kwargs={"frames": False}, **settings).learn(10)
    ScratchDQN("MlpPolicy", "CartPole-v1", buffer_size=100_000, learning_starts=1000).learn(10)  # fits


def test_available_memory_is_plausible():
    assert 10_000_000 < available_memory() <= psutil.virtual_memory().total


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    contents = {"limit": "1000\n", "usage": "700\n", "no limit": "max\n", "details": "active_file 7\nfiles 200\n"}
    limit, usage, no_limit, details = (tmp_path / name for name in contents)
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    rest = (usage, details, "files")
    monkeypatch.setattr(memory, "_CGROUP_FILES", ((no_limit, *rest), (tmp_path / "none", *rest), (limit, *rest)))
    assert available_memory() == 500


def test_an_environment_with_stacked_frames_that_is_set_later_is_detected():
    def make_env():
        return VecFrameStack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), 2)

    model = ScratchDQN("MlpPolicy", make_env(), replay_buffer_kwargs={"frames": False})
    model.replay_buffer_kwargs = {}
    model.set_env(make_env())
    assert model.replay_buffer.stacking == Stacking(2, -1, "zero")
    model.learn(10)
    buffer = model.replay_buffer
    model.set_env(make_env())
    assert model.replay_buffer is buffer, "what was collected stays"


def test_sampling_from_an_empty_buffer_raises():
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        ScratchReplayBuffer(10, VECTOR, ACTIONS).sample(1)


def test_optimize_memory_usage_with_timeouts_raises():
    with pytest.raises(ValueError, match=r"optimize_memory_usage=True needs .*handle_timeout_termination=False"):
        ScratchReplayBuffer(10, VECTOR, ACTIONS, optimize_memory_usage=True)


def test_next_observations_raise_with_optimize_memory_usage():
    buffer = ScratchReplayBuffer(10, VECTOR, ACTIONS, optimize_memory_usage=True, handle_timeout_termination=False)
    with pytest.raises(AttributeError, match="the following row"):
        _ = buffer.next_observations


@pytest.mark.parametrize("env", [TimeoutEnv(), DictEnv()])
def test_sampled_tensors_do_not_share_memory_with_the_buffer(env):
    buffer = ScratchReplayBuffer(10, env.observation_space, env.action_space, device="cpu")
    obs, _ = env.reset(seed=0)
    obs = {key: np.asarray(value)[None] for key, value in obs.items()} if isinstance(obs, dict) else obs[None]
    buffer.add(obs, obs, np.array([1]), np.array([2.0]), np.array([False]), [{}])
    before = replay_contents(buffer)
    batch = buffer.sample_batch(4)
    for field in batch:
        for tensor in field.values() if isinstance(field, dict) else [field]:
            if isinstance(tensor, th.Tensor):
                tensor.zero_()
    assert_equal(before, replay_contents(buffer))


# Windows longer than episodes and the buffer


@pytest.mark.parametrize("n_steps", [400, 10**9])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_long_windows_end_with_their_episode(n_steps, n_envs):
    rng = np.random.default_rng(0)
    long, longest = (
        ScratchReplayBuffer(700 * n_envs, VECTOR, ACTIONS, device="cpu", n_envs=n_envs, n_steps=n, gamma=0.99)
        for n in (n_steps, 700)
    )
    for step in range(1000):  # wraps around; episodes have up to 300 steps
        row = rng.normal(size=(2, n_envs, *VECTOR.shape)).astype(np.float32)
        done = np.full(n_envs, step % 300 == 299)
        reward = rng.normal(size=n_envs)
        for buffer in (long, longest):
            buffer.add(row[0], row[1], np.zeros(n_envs, int), reward, done, [{}] * n_envs)
    for _ in range(3):
        state = np.random.get_state()
        batch = long.sample_batch(256)
        np.random.set_state(state)
        oracle = longest.sample_batch(256)
        for name in ("returns", "discounts"):
            np.testing.assert_allclose(getattr(batch, name), getattr(oracle, name), rtol=1e-4, atol=1e-5)
        assert th.equal(batch.next_observations, oracle.next_observations)


def test_a_window_is_never_longer_than_the_buffer():
    model = ScratchDQN("MlpPolicy", "CartPole-v1", n_steps=10**9, buffer_size=1000, learning_starts=0, seed=0)
    begin = time.perf_counter()
    model.learn(200)
    assert time.perf_counter() - begin < 10, "windows of n_steps would take 238 GiB; 100,000 steps take 5 s"
    returns = model.replay_buffer.sample_batch(32).returns
    assert returns.max() > 5
