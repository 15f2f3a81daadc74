"""Frames kept once: the same batches as from observations kept in full, to the last bit."""

import copy
import io
import itertools
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import FrameStackObservation
from helpers import assert_equal, assert_same_training, replay_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from list_replay import ListReplay
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_scratch_dqn import ScratchDQN, ScratchReplayBuffer
from sb3_scratch_dqn.algorithm.stacking import find_stacking
from sb3_scratch_dqn.replay.archive import read_replay_archive, write_replay_buffer
from sb3_scratch_dqn.replay.frames import NotStackedError, StackedFrames, Stacking
from sb3_scratch_dqn.replay.observations import DenseObservations, map_observation

SPACES = {
    "vector": gym.spaces.Box(-1, 1, (2,), np.float32),
    "channels last": gym.spaces.Box(0, 255, (3, 4, 2), np.uint8),
    "channels first": gym.spaces.Box(0, 255, (1, 40, 36), np.uint8),
    "image": gym.spaces.Box(0, 255, (40, 36, 1), np.uint8),
    "flat image": gym.spaces.Box(0, 255, (5, 4), np.uint8),
}
SPACES["dict"] = gym.spaces.Dict({"vector": SPACES["vector"], "image": SPACES["image"]})


class FrameEnv(gym.Env):
    """Frames at random, zeros among them; one step in ten terminates, one truncates."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, name):
        self.observation_space = SPACES[name]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(self.observation_space), {}

    def step(self, action):
        coin = self.np_random.random()
        return (
            self._observe(self.observation_space),
            float(self.np_random.normal() + action),
            coin < 0.1,
            0.1 <= coin < 0.2,
            {},
        )

    def _observe(self, space):
        if isinstance(space, gym.spaces.Dict):
            return {key: self._observe(part) for key, part in space.spaces.items()}
        if self.np_random.random() < 0.2:
            return np.zeros(space.shape, space.dtype) * (-1 if space.dtype == np.float32 else 1)
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 3, space.shape).astype(np.uint8)
        return self.np_random.normal(size=space.shape).astype(np.float32)


def transposed(env):
    return VecTransposeImage(env)


def vec_frame_stack(name, n_envs, k):
    env = VecFrameStack(DummyVecEnv([lambda: FrameEnv(name)] * n_envs), k)
    return transposed(env) if name in ("image", "dict") else env


def gym_frame_stack(name, n_envs, k, padding="reset"):
    return DummyVecEnv([lambda: FrameStackObservation(FrameEnv(name), k, padding_type=padding)] * n_envs)


def zero_padded(name, n_envs, k):
    return gym_frame_stack(name, n_envs, k, "zero")


STACKERS = {"VecFrameStack": vec_frame_stack, "gymnasium": gym_frame_stack, "gymnasium zeros": zero_padded}


def transitions(env, steps, seed=0):
    """What an algorithm adds to its buffer: at the end of an episode, the observation that it ended with."""
    rng = np.random.default_rng(seed)
    env.seed(seed)
    obs = copy.deepcopy(env.reset())
    for _ in range(steps):
        action = rng.integers(0, 3, env.num_envs)
        new_obs, reward, done, infos = env.step(action)
        next_obs = copy.deepcopy(new_obs)
        for index in np.flatnonzero(done):
            last = infos[index]["terminal_observation"]
            for key in last if isinstance(last, dict) else [None]:
                if key is None:
                    next_obs[index] = last
                else:
                    next_obs[key][index] = last[key]
        yield obs, next_obs, action, reward, done, [dict(info) for info in infos]
        obs = copy.deepcopy(new_obs)


def make_buffers(env, capacity, **kwargs):
    """A buffer that keeps frames, and one that keeps observations in full."""
    stacking = find_stacking(env)
    assert stacking is not None
    return [
        ScratchReplayBuffer(
            capacity * env.num_envs,
            env.observation_space,
            env.action_space,
            device="cpu",
            n_envs=env.num_envs,
            stacking=frames,
            **kwargs,
        )
        for frames in (stacking, None)
    ]


def add_all(buffer, steps):
    for step in steps:
        buffer.add(*step)


def same_batches(frames, dense, size=16, seed=0):
    batches = []
    for buffer in (frames, dense):
        np.random.seed(seed)
        batches.append(buffer.sample_batch(size)._asdict())
    assert_equal(*batches)
    return batches[0]


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
            same_batches(frames, dense, seed=count)
    assert isinstance(frames.store.obs_store, StackedFrames)

    # Every row and environment, not only those that a draw happens to choose
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
    batch = same_batches(frames, dense)
    for index, (row, env_index) in enumerate(zip(*batch["places"], strict=True)):
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
def test_images_are_found_and_kept_whichever_axis_has_the_channels(name, n_envs):
    env = vec_frame_stack(name, n_envs, 4)
    assert find_stacking(env) == Stacking(4, 0, "zero")
    frames, dense = make_buffers(env, 40)
    for step in transitions(env, 100):
        frames.add(*copy.deepcopy(step))
        dense.add(*copy.deepcopy(step))
    same_batches(frames, dense)
    assert_equal(replay_contents(dense), replay_contents(frames))
    assert frames.store.bytes_of(40) < dense.store.bytes_of(40) / 5


def test_what_the_wrappers_say():
    assert find_stacking(vec_frame_stack("vector", 2, 3)) == Stacking(3, -1, "zero")
    assert find_stacking(vec_frame_stack("channels last", 2, 3)) == Stacking(3, -1, "zero")
    assert find_stacking(vec_frame_stack("dict", 2, 3)) == Stacking(3, {"vector": -1, "image": 0}, "zero")
    assert find_stacking(VecNormalize(vec_frame_stack("vector", 2, 3))) == Stacking(3, -1, "zero")
    assert find_stacking(gym_frame_stack("dict", 2, 3)) == Stacking(3, {"vector": 0, "image": 0}, "first")
    assert find_stacking(zero_padded("image", 1, 2)) == Stacking(2, 0, "zero")
    custom = np.ones(2, np.float32)
    assert find_stacking(gym_frame_stack("vector", 2, 3, custom)) is None
    assert find_stacking(DummyVecEnv([lambda: FrameEnv("vector")])) is None


def make_stacked_frame_env():
    return FrameStackObservation(FrameEnv("vector"), 3)


def test_wrappers_are_found_in_other_processes():
    env = SubprocVecEnv([make_stacked_frame_env] * 2, start_method="spawn")
    try:
        assert find_stacking(env) == Stacking(3, 0, "first")
    finally:
        env.close()


class Halved(gym.ObservationWrapper):
    """Changes frames after they were stacked, each in another way."""

    def observation(self, observation):
        return (observation * np.arange(1, len(observation) + 1)[:, None]).astype(np.float32)


def test_what_is_no_stack_after_all_is_kept_in_full_and_said_once():
    env = DummyVecEnv([lambda: Halved(FrameStackObservation(FrameEnv("vector"), 3))])
    frames, dense = make_buffers(env, 50)
    steps = list(transitions(env, 70))
    with pytest.warns(
        UserWarning, match=r"in full from now on, .* 6 times the memory: frames cannot be kept once"
    ) as said:
        add_all(frames, steps)
    assert len(said) == 1
    add_all(dense, steps)
    assert type(frames.store.obs_store) is DenseObservations
    same_batches(frames, dense)


@pytest.mark.parametrize("when", [3, 60])
def test_a_stack_that_goes_wrong_is_kept_as_it_is(when):
    env = vec_frame_stack("vector", 2, 3)
    frames, dense = make_buffers(env, 25)
    for count, step in enumerate(transitions(env, 80)):
        if count == when:
            step[1][1] += 1  # of one environment, which the observation after it is no successor of
        for buffer in (frames, dense):
            buffer.add(*copy.deepcopy(step))
        same_batches(frames, dense)
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
def test_pieces_that_begin_in_the_middle_of_an_episode_are_kept_too(
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
            same_batches(frames, dense, seed=count)
    assert isinstance(frames.store.obs_store, StackedFrames)
    assert_equal(replay_contents(dense), replay_contents(frames))
    pool = frames.store.obs_store.whole
    assert pool.used == (pool.slots >= 0).sum() <= len(left_out) * n_envs * max(k - 1, 0)


def test_unordered_observations_are_not_kept_as_frames():
    env = vec_frame_stack("vector", 2, 3)
    frames, dense = make_buffers(env, 1000)
    steps = list(transitions(env, 300))
    order = np.random.default_rng(0).permutation(300)
    with pytest.warns(UserWarning, match="too many observations neither continue the one before nor begin an episode"):
        add_all(frames, [steps[index] for index in order])
    add_all(dense, [steps[index] for index in order])
    assert type(frames.store.obs_store) is DenseObservations
    same_batches(frames, dense)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("prepared", [False, True])
def test_last_observations_that_are_no_stacks_are_kept_whole(n_steps, prepared):
    env = vec_frame_stack("dict", 2, 3)
    frames, dense = make_buffers(env, 25, n_steps=n_steps)
    for count, step in enumerate(transitions(env, 120)):
        if count > 50 or prepared:
            for index in np.flatnonzero(step[4]):
                step[1]["vector"][index] *= 1.0000001  # as normalising and back changes the last bits
        for buffer in (frames, dense):
            buffer.add(*copy.deepcopy(step))
        same_batches(frames, dense, seed=count)
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
        same_batches(restored, dense)


def test_negative_zeros_and_nan_are_kept_to_the_bit():
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


@pytest.mark.parametrize("stacker", [*sorted(STACKERS), "normalized"])
def test_training_leaves_the_bits_of_sb3(stacker):
    def make_env():
        if stacker == "normalized":
            return VecNormalize(vec_frame_stack("vector", 1, 3))
        return STACKERS[stacker]("vector", 1, 3)

    settings = {"learning_starts": 40, "batch_size": 16, "buffer_size": 150, "seed": 7, "n_steps": 2}
    reference = DQN("MlpPolicy", make_env(), **settings).learn(400)
    model = ScratchDQN("MlpPolicy", make_env(), **settings, engine="eager").learn(400)
    assert isinstance(model.replay_buffer.store.obs_store, StackedFrames)
    assert_same_training(reference, model)


@pytest.mark.parametrize("name", ["image", "dict"])
def test_policies_of_images_train_alike_with_and_without(name):
    models = []
    for frames in (True, False):
        model = ScratchDQN(
            "MultiInputPolicy" if name == "dict" else "CnnPolicy",
            VecFrameStack(DummyVecEnv([lambda: FrameEnv(name)] * 2), 4),
            learning_starts=20,
            buffer_size=60,
            batch_size=8,
            seed=3,
            replay_buffer_kwargs={"frames": frames, "prioritized": True},
        )
        models.append(model.learn(120))
        assert isinstance(model.replay_buffer.store.obs_store, StackedFrames) == frames
    assert_same_training(*models)


def test_copies_and_pickles_go_on_by_themselves():
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
        same_batches(other, dense)


def test_a_second_training_begins_with_a_reset_and_goes_on():
    model = ScratchDQN("MlpPolicy", vec_frame_stack("vector", 2, 3), seed=0, buffer_size=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(101)
        model.learn(101)
        model.learn(100, reset_num_timesteps=False)
    assert isinstance(model.replay_buffer.store.obs_store, StackedFrames)


def test_a_buffer_that_was_reset_begins_anew():
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
    same_batches(frames, dense)


def test_what_came_next_and_went_on_though_no_stack_is_seen_after_loading():
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
    with pytest.warns(UserWarning, match="what came next was not the observation with one more frame"):
        restored.add(wrong, following, *last[2:])
    same_batches(restored, dense)


def test_places_of_last_frames_are_used_again():
    env = vec_frame_stack("vector", 2, 3)
    frames, _ = make_buffers(env, 20)
    for step in transitions(env, 600):
        frames.add(*step)
    assert sum(step[4].sum() for step in transitions(env, 600)) > 200
    assert len(frames.store.obs_store.last.frames[""]) <= 24


def test_a_copy_is_a_copy():
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


def test_a_position_that_somebody_moved_is_told():
    frames, _ = make_buffers(vec_frame_stack("vector", 1, 3), 20)
    step = next(transitions(vec_frame_stack("vector", 1, 3), 1))
    frames.add(*step)
    frames.pos = 0
    with pytest.raises(ValueError, match=r"pos=0 must be 1: .* empty the buffer by reset\(\)"):
        frames.add(*step)


def test_an_empty_buffer_of_sb3_becomes_one_of_frames():
    model = ScratchDQN.from_sb3(DQN("MlpPolicy", vec_frame_stack("vector", 2, 3), buffer_size=100, learning_starts=50))
    assert isinstance(model.replay_buffer.store.obs_store, StackedFrames)
    model.learn(20)


def test_sb3_gets_the_observations_in_full():
    model = ScratchDQN("MlpPolicy", vec_frame_stack("vector", 2, 3), buffer_size=100, seed=0).learn(150)
    reference = model.to_sb3()
    assert type(reference.replay_buffer) is ReplayBuffer
    assert_equal(replay_contents(model.replay_buffer), replay_contents(reference.replay_buffer))
    again = ScratchDQN.from_sb3(reference)
    assert_equal(replay_contents(model.replay_buffer), replay_contents(again.replay_buffer))
    again.learn(20, reset_num_timesteps=False)


def test_environments_that_know_no_wrappers_are_taken_as_they_are():
    class NoObjects(DummyVecEnv):
        def env_is_wrapped(self, wrapper_class, indices=None):
            raise NotImplementedError

    env = NoObjects([lambda: FrameEnv("vector")])
    assert find_stacking(env) is None
    ScratchDQN("MlpPolicy", env)


def test_frames_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match=r"frames=True needs an env that stacks its frames"):
        ScratchDQN("MlpPolicy", "CartPole-v1", replay_buffer_kwargs={"frames": True})
    with pytest.raises(ValueError, match=r"frames='yes' must be 'auto', True or False"):
        ScratchDQN("MlpPolicy", "CartPole-v1", replay_buffer_kwargs={"frames": "yes"})
    with pytest.raises(NotStackedError, match="2 numbers along axis 0 are no 3 frames"):
        ScratchReplayBuffer(9, SPACES["vector"], gym.spaces.Discrete(2), stacking=Stacking(3, -1, "zero"))
    with pytest.raises(ValueError, match="cannot be replaced"):
        make_buffers(vec_frame_stack("vector", 1, 3), 9)[0].observations = np.zeros(3)
    kwargs = {"handle_timeout_termination": False, "frames": True}
    with pytest.raises(ValueError, match="optimize_memory_usage=True needs frames=False"):
        ScratchDQN(
            "MlpPolicy", vec_frame_stack("vector", 1, 3), optimize_memory_usage=True, replay_buffer_kwargs=kwargs
        )


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
