"""Frames stored once give the same batches as observations stored in full, bit for bit."""

import copy
import io
import itertools
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import FrameStackObservation
from helpers import assert_equal, replay_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from list_replay import ListReplay
from stable_baselines3.common.vec_env import DummyVecEnv
from stacked_frames import STACKERS, FrameEnv, add_all, assert_same_batches, make_buffers, transitions, vec_frame_stack

from sb3_scratch_dqn import ScratchReplayBuffer
from sb3_scratch_dqn.algorithm.stacking import find_stacking
from sb3_scratch_dqn.replay import DenseObservations, StackedFrames, Stacking, map_observation
from sb3_scratch_dqn.replay.archive import read_replay_archive, write_replay_buffer


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    stacker=st.sampled_from(sorted(STACKERS)),
    name=st.sampled_from(["vector", "channels last", "flat image", "dict"]),
    capacity=st.one_of(st.integers(1, 30), st.just(100_000)),
    steps=st.integers(1, 80),
    n_envs=st.integers(1, 3),
    k=st.integers(1, 5),
    n_steps=st.integers(1, 5),
    prioritized=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_batches_equal_those_of_full_observations_and_of_a_naive_list(
    stacker, name, capacity, steps, n_envs, k, n_steps, prioritized, seed
):
    env = STACKERS[stacker](name, n_envs, k)
    frames, dense = make_buffers(env, capacity, n_steps=n_steps, gamma=0.9, prioritized=prioritized)
    oracle = ListReplay(capacity)
    for count, step in enumerate(transitions(env, steps, seed)):
        for target in (frames, dense, oracle):
            target.add(*copy.deepcopy(step))
        if count % 20 == 5:
            assert_same_batches(frames, dense, seed=count)
    assert isinstance(frames.store.obs_store, StackedFrames)

    # Every row and environment, not only those sampled
    rows, envs = (grid.reshape(-1) for grid in np.meshgrid(np.arange(frames.size()), np.arange(n_envs)))
    for kind in ("read", "read_next"):
        assert_equal(
            getattr(dense.store.obs_store, kind)(rows, envs),
            copied(getattr(frames.store.obs_store, kind)(rows, envs)),
        )
    for got, expected in zip(
        frames.store.read_both(rows, rows, envs), dense.store.read_both(rows, rows, envs), strict=True
    ):
        assert_equal(expected, copied(got))
    batch = assert_same_batches(frames, dense)
    for index, (row, env_index) in enumerate(zip(*batch["indices"], strict=True)):
        obs, action, returned, discount, next_obs = oracle.transition(row, env_index, n_steps, 0.9)
        for expected, got in ((obs, batch["observations"]), (next_obs, batch["next_observations"])):
            for key in expected if isinstance(expected, dict) else [None]:
                one, other = (expected, got) if key is None else (expected[key], got[key])
                np.testing.assert_array_equal(one, other[index].numpy())
        assert batch["actions"][index] == action
        assert batch["returns"][index].item() == pytest.approx(returned, rel=1e-5, abs=1e-6)
        assert batch["discounts"][index].item() == pytest.approx(discount, rel=1e-5)


def copied(observation):
    return map_observation(np.ascontiguousarray, observation)


@pytest.mark.parametrize("name", ["image", "channels first"])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_images_with_channels_first_or_last_are_detected_and_stored(name, n_envs):
    env = vec_frame_stack(name, n_envs, 4)
    assert find_stacking(env) == Stacking(4, 0, "zero")
    frames, dense = make_buffers(env, 40)
    for step in transitions(env, 100):
        frames.add(*copy.deepcopy(step))
        dense.add(*copy.deepcopy(step))
    assert_same_batches(frames, dense)
    assert_equal(replay_contents(dense), replay_contents(frames))
    assert frames.store.bytes_of(40) < dense.store.bytes_of(40) / 5


class Halved(gym.ObservationWrapper):
    """Scales each frame of a stack differently, so that observations are not stacks."""

    def observation(self, observation):
        return (observation * np.arange(1, len(observation) + 1)[:, None]).astype(np.float32)


def test_observations_that_are_not_stacks_are_stored_in_full_with_one_warning():
    env = DummyVecEnv([lambda: Halved(FrameStackObservation(FrameEnv("vector"), 3))])
    frames, dense = make_buffers(env, 50)
    steps = list(transitions(env, 70))
    with pytest.warns(
        UserWarning, match=r"in full from now on, .* 6 times the memory: frames cannot be stored once"
    ) as said:
        add_all(frames, steps)
    assert len(said) == 1
    add_all(dense, steps)
    assert type(frames.store.obs_store) is DenseObservations
    assert_same_batches(frames, dense)


@pytest.mark.parametrize("when", [3, 60])
def test_a_changed_next_observation_is_stored_unchanged(when):
    env = vec_frame_stack("vector", 2, 3)
    frames, dense = make_buffers(env, 25)
    for count, step in enumerate(transitions(env, 80)):
        if count == when:
            step[1][1] += 1  # of one environment; the following observation does not continue it
        for buffer in (frames, dense):
            buffer.add(*copy.deepcopy(step))
        assert_same_batches(frames, dense)
        assert_equal(replay_contents(dense), replay_contents(frames))
    assert isinstance(frames.store.obs_store, StackedFrames)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    name=st.sampled_from(["vector", "channels last", "dict"]),
    capacity=st.one_of(st.integers(1, 30), st.just(1000)),
    n_envs=st.integers(1, 3),
    k=st.integers(1, 5),
    n_steps=st.integers(1, 4),
    left_out=st.lists(st.integers(1, 150), max_size=5),
    saved_at=st.integers(0, 120),
    seed=st.integers(0, 1000),
)
def test_data_that_begins_in_the_middle_of_an_episode_is_stored(
    name, capacity, n_envs, k, n_steps, left_out, saved_at, seed
):
    env = vec_frame_stack(name, n_envs, k)
    frames, dense = make_buffers(env, capacity, n_steps=n_steps)
    for count, step in enumerate(transitions(env, 120, seed)):
        if any(begin <= count < begin + 3 for begin in left_out):
            continue
        for buffer in (frames, dense):
            buffer.add(*copy.deepcopy(step))
        if count == saved_at:
            file = io.BytesIO()
            write_replay_buffer(frames, file)
            file.seek(0)
            frames = read_replay_archive(file, "it", env.observation_space, env.action_space, n_envs, "cpu")
        if count % 10 == 0:
            assert_same_batches(frames, dense, seed=count)
    assert isinstance(frames.store.obs_store, StackedFrames)
    assert_equal(replay_contents(dense), replay_contents(frames))
    pool = frames.store.obs_store.whole
    assert pool.used == (pool.slots >= 0).sum() <= len(left_out) * n_envs * max(k - 1, 0)


def test_shuffled_observations_are_stored_in_full():
    env = vec_frame_stack("vector", 2, 3)
    frames, dense = make_buffers(env, 1000)
    steps = list(transitions(env, 300))
    order = np.random.default_rng(0).permutation(300)
    with pytest.warns(
        UserWarning, match="too many observations neither continue the previous one nor begin an episode"
    ):
        add_all(frames, [steps[index] for index in order])
    add_all(dense, [steps[index] for index in order])
    assert type(frames.store.obs_store) is DenseObservations
    assert_same_batches(frames, dense)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("prepared", [False, True])
def test_last_observations_that_are_not_stacks_are_stored_whole(n_steps, prepared):
    env = vec_frame_stack("dict", 2, 3)
    frames, dense = make_buffers(env, 25, n_steps=n_steps)
    for count, step in enumerate(transitions(env, 120)):
        if count > 50 or prepared:
            for index in np.flatnonzero(step[4]):
                step[1]["vector"][index] *= 1.0000001  # as normalisation and its inverse change the last bits
        for buffer in (frames, dense):
            buffer.add(*copy.deepcopy(step))
        assert_same_batches(frames, dense, seed=count)
        assert_equal(replay_contents(dense), replay_contents(frames))
    assert isinstance(frames.store.obs_store, StackedFrames)
    file = io.BytesIO()
    write_replay_buffer(frames, file)
    file.seek(0)
    restored = read_replay_archive(file, "it", env.observation_space, env.action_space, 2, "cpu")
    assert_equal(replay_contents(dense), replay_contents(restored))
    for step in transitions(env, 50, seed=1):
        for buffer in (restored, dense):
            buffer.add(*copy.deepcopy(step))
        assert_same_batches(restored, dense)


def test_negative_zeros_and_nan_are_stored_bit_for_bit():
    space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    buffers = [
        ScratchReplayBuffer(10, space, gym.spaces.Discrete(2), "cpu", stacking=frames)
        for frames in (Stacking(2, 0, "zero"), None)
    ]
    numbers = np.array([1.0, -0.0, np.nan, 0.0, 2.0, np.nan, -0.0, -0.0], dtype=np.float32).reshape(4, 2)
    stacks = [np.concatenate([before, now])[None] for before, now in itertools.pairwise(numbers)]
    stacks.insert(0, np.concatenate([np.zeros(2, np.float32), numbers[0]])[None])
    for obs, next_obs in itertools.pairwise(stacks):
        for buffer in buffers:
            buffer.add(obs, next_obs, np.array([0]), np.array([0.0]), np.array([False]), [{}])
    assert isinstance(buffers[0].store.obs_store, StackedFrames)
    assert_equal(replay_contents(buffers[1]), replay_contents(buffers[0]))


def test_copies_and_pickles_are_independent():
    env = vec_frame_stack("vector", 2, 3)
    frames, dense = make_buffers(env, 30)
    steps = list(transitions(env, 120))
    for step in steps[:50]:
        frames.add(*step)
        dense.add(*step)
    others = [copy.deepcopy(frames), pickle.loads(pickle.dumps(frames))]
    before = replay_contents(others[0])
    for step in steps[50:]:
        frames.add(*step)
        dense.add(*step)
    for other in others:
        assert_equal(before, replay_contents(other))
        for step in steps[50:]:
            other.add(*step)
        assert_same_batches(other, dense)


def test_a_buffer_is_empty_after_reset():
    env = vec_frame_stack("vector", 1, 3)
    frames, dense = make_buffers(env, 30, prioritized=True)
    for step in transitions(env, 40):
        frames.add(*step)
        dense.add(*step)
    for buffer in (frames, dense):
        buffer.reset()
        assert buffer.size() == 0
        assert buffer.sampler.tree.total == 0
    for step in transitions(env, 10, seed=1):
        frames.add(*step)
        dense.add(*step)
    assert_same_batches(frames, dense)


def test_a_next_observation_that_is_not_a_stack_is_detected_after_loading():
    env = vec_frame_stack("vector", 1, 3)
    frames, dense = make_buffers(env, 25)
    *steps, last = itertools.takewhile(lambda step: not step[4].any(), transitions(env, 200, seed=3))
    for step in steps:
        frames.add(*copy.deepcopy(step))
        dense.add(*copy.deepcopy(step))
    wrong = last[1] + 1
    file = io.BytesIO()
    for buffer in (frames, dense):
        buffer.add(last[0], wrong, *last[2:])
    write_replay_buffer(frames, file)
    file.seek(0)
    restored = read_replay_archive(file, "it", env.observation_space, env.action_space, 1, "cpu")
    following = np.concatenate([wrong[:, 2:], wrong[:, :2]], axis=1)
    dense.add(wrong, following, *last[2:])
    with pytest.warns(UserWarning, match="a next observation in the middle of an episode does not continue the stack"):
        restored.add(wrong, following, *last[2:])
    assert_same_batches(restored, dense)


def test_slots_of_last_frames_are_reused():
    env = vec_frame_stack("vector", 2, 3)
    frames, _ = make_buffers(env, 20)
    for step in transitions(env, 600):
        frames.add(*step)
    assert sum(step[4].sum() for step in transitions(env, 600)) > 200
    assert len(frames.store.obs_store.last.frames[""]) <= 24


def test_a_shallow_copy_shares_no_memory_that_writes_change():
    env = vec_frame_stack("vector", 2, 3)
    frames, _ = make_buffers(env, 20)
    steps = list(transitions(env, 100))
    for step in steps[:40]:
        frames.add(*step)
    before, other = copy.deepcopy(frames.store.obs_store), copy.copy(frames.store.obs_store)
    for row, step in enumerate(steps[40:]):
        other.write((40 + row) % 20, step[0], step[1])
    assert_equal(before.arrays(20), frames.store.obs_store.arrays(20))
    assert before.last.free == frames.store.obs_store.last.free


def test_a_changed_position_raises():
    frames, _ = make_buffers(vec_frame_stack("vector", 1, 3), 20)
    step = next(transitions(vec_frame_stack("vector", 1, 3), 1))
    frames.add(*step)
    frames.pos = 0
    with pytest.raises(ValueError, match=r"pos=0 must be 1, because .* call reset\(\) to empty the buffer"):
        frames.add(*step)


def test_sampled_tensors_do_not_share_memory_with_the_frames():
    env = vec_frame_stack("image", 1, 4)
    frames, _ = make_buffers(env, 30)
    for step in transitions(env, 40):
        frames.add(*step)
    before = replay_contents(frames)
    batch = frames.sample_batch(16)
    following = batch.next_observations.clone()
    batch.observations.zero_()
    assert th.equal(batch.next_observations, following)
    for field in batch:
        if isinstance(field, th.Tensor):
            field.zero_()
    assert_equal(before, replay_contents(frames))


def test_pickles_with_the_old_name_of_the_layout_class_are_read():
    env = vec_frame_stack("vector", 2, 3)
    frames, _ = make_buffers(env, 20)
    add_all(frames, transitions(env, 30))
    # Protocol 2 has names as text
    pickled = pickle.dumps(frames, protocol=2)
    old = pickled.replace(b"replay.frame_layout\nFrameLayout\n", b"replay.frames\n_Layout\n")
    assert old != pickled
    assert_equal(replay_contents(frames), replay_contents(pickle.loads(old)))
