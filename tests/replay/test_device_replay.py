"""The copy on a device gives the batches and priorities of the buffer, for every store."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import assert_equal

from sb3_scratch_dqn.replay import ScratchReplayBuffer, Stacking
from sb3_scratch_dqn.replay.device import buffer as device_module
from sb3_scratch_dqn.replay.device.buffer import DeviceReplay
from sb3_scratch_dqn.replay.device.tree import WIDTH, DevicePriorities, DeviceSumTree
from sb3_scratch_dqn.replay.sum_tree import SumTree

CPU = th.device("cpu")
BOX = spaces.Box(-10, 10, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (2, 3, 4), np.uint8)
DICT = spaces.Dict({"vector": spaces.Box(-1, 1, (2, 3), np.float64), "number": spaces.Discrete(5)})
WORDS = spaces.Box(0, 60_000, (2,), np.uint16)
STACKED_DICT = spaces.Dict({"a": spaces.Box(0, 255, (4, 5), np.uint8), "b": spaces.Box(-1, 1, (3, 2), np.float32)})
SHARED = {"optimize_memory_usage": True, "handle_timeout_termination": False}


class Stream:
    """Steps of several environments, with ends of episodes and, for stacks, consecutive frames."""

    def __init__(self, space, n_envs, stacking=None, masks=False, odd=0.0):
        self.rng = np.random.default_rng(3)
        self.space, self.n_envs, self.stacking, self.masks, self.odd = space, n_envs, stacking, masks, odd
        self.space.seed(0)
        self.now = self.batched([self.first() for _ in range(n_envs)])

    def batched(self, observations):
        if isinstance(self.space, spaces.Dict):
            return {key: np.stack([one[key] for one in observations]) for key in self.space.spaces}
        return np.stack(observations)

    def first(self):
        drawn = self.space.sample()
        if self.stacking is None or self.rng.random() < self.odd:
            return drawn  # in the middle of an episode
        return self.stacked(drawn, self.stacking.padding == "first")

    def each(self, function, *observations):
        """Apply a function to the axis of the frames and the arrays of observations."""
        if isinstance(self.space, spaces.Dict):
            axes = self.stacking.axes
            return {key: function(axes[key], *(one[key] for one in observations)) for key in self.space.spaces}
        return function(self.stacking.axes, *observations)

    def stacked(self, drawn, repeats):
        def pad(axis, array):
            frames = np.split(array, self.stacking.n_stack, axis=axis)
            older = frames[-1] if repeats else np.zeros_like(frames[-1])
            return np.concatenate([older] * (len(frames) - 1) + [frames[-1]], axis=axis)

        return self.each(pad, drawn)

    def follow(self, observation, odd=False):
        drawn = self.space.sample()
        if self.stacking is None or odd:
            return drawn

        def push(axis, old, new):
            depth = old.shape[axis] // self.stacking.n_stack
            kept = np.take(old, range(depth, old.shape[axis]), axis=axis)
            return np.concatenate([kept, np.take(new, range(depth), axis=axis)], axis=axis)

        return self.each(push, observation, drawn)

    def one(self, observations, env):
        if isinstance(observations, dict):
            return {key: array[env] for key, array in observations.items()}
        return observations[env]

    def add_to(self, buffer, steps):
        for _ in range(steps):
            odd = self.rng.random(self.n_envs) < self.odd  # the last observation of an episode is not a stack
            following = [self.follow(self.one(self.now, env), odd[env]) for env in range(self.n_envs)]
            dones = odd | (self.rng.random(self.n_envs) < 0.2)
            infos = [{"TimeLimit.truncated": bool(self.rng.random() < 0.5 and done)} for done in dones]
            if self.masks:
                for info in infos:
                    info["action_masks"], info["next_action_masks"] = self.rng.random((2, 4)) < 0.7
            actions, rewards = self.rng.integers(0, 4, (self.n_envs, 1)), self.rng.normal(size=self.n_envs)
            buffer.add(self.now, self.batched(following), actions, rewards, dones, infos)
            begun = [self.first() if done else one for done, one in zip(dones, following, strict=True)]
            self.now = self.batched(begun)


# name: (space, arguments of the buffer, arguments of the stream)
KINDS = {
    "vectors": (BOX, {}, {}),
    "images": (IMAGE, {}, {}),
    "dict": (DICT, {}, {}),
    "words": (WORDS, {}, {}),
    "masks": (BOX, {}, {"masks": True}),
    "shared": (BOX, SHARED, {}),
    "shared dict": (DICT, SHARED, {}),
    "frames": (spaces.Box(0, 255, (8, 5), np.uint8), {"stacking": Stacking(4, 0, "zero")}, {}),
    "frames last": (spaces.Box(0, 255, (5, 6), np.uint8), {"stacking": Stacking(3, 1, "first")}, {}),
    "frames dict": (STACKED_DICT, {"stacking": Stacking(2, {"a": 0, "b": -1}, "zero")}, {}),
    "frames, odd": (spaces.Box(0, 255, (4, 5), np.uint8), {"stacking": Stacking(4, 0, "zero")}, {"odd": 0.05}),
}


def make(kind, n_envs, n_steps, capacity=40):
    space, kwargs, of_stream = KINDS[kind]
    buffer = ScratchReplayBuffer(
        capacity * n_envs, space, spaces.Discrete(4), device="cpu", n_envs=n_envs, n_steps=n_steps, **kwargs
    )
    return buffer, Stream(space, n_envs, kwargs.get("stacking"), **of_stream)


def assert_same_batches(buffer, replay, gamma=0.9):
    size = 200
    np.random.seed(1)
    own = buffer.sample_batch(size, gamma=gamma)
    rows, envs = own.indices
    read = replay.read(th.from_numpy(rows * buffer.n_envs + envs), th.ones(size))
    for name in ("observations", "actions", "next_observations", "weights", "action_masks", "next_action_masks"):
        one, other = getattr(own, name), getattr(read, name)
        if one is not None and not isinstance(one, dict) and one.dtype == th.uint16:
            one = one.to(th.int32)
        assert_equal(one, other, name)
    th.testing.assert_close(own.returns, read.returns)
    th.testing.assert_close(own.discounts, read.discounts)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_gives_the_batches_of_the_buffer(kind, n_envs, n_steps):
    buffer, stream = make(kind, n_envs, n_steps)
    replay, n_copies = None, 0
    for steps in (1, 5, 0, 3, 30, 1, 7, 39, 40, 95, 2):
        stream.add_to(buffer, steps)
        if replay is None or not replay.is_compatible(buffer):
            replay, n_copies = DeviceReplay(buffer, CPU), n_copies + 1
        replay.sync(0.9)
        assert_same_batches(buffer, replay)
    assert n_copies <= (3 if kind == "frames, odd" else 1)
    if kind == "frames, odd":
        assert buffer.store.obs_store.last.depth == 4
        assert replay._frames._whole is not None


def test_a_change_to_full_observations_needs_another_copy():
    buffer, stream = make("frames", 1, 1)
    stream.add_to(buffer, 20)
    replay = DeviceReplay(buffer, CPU)
    replay.sync(0.9)
    one, another, third = (stream.space.sample()[None] for _ in range(3))
    nothing = np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}]
    buffer.add(one, another, *nothing)
    with pytest.warns(UserWarning, match="stores each observation in full"):
        buffer.add(another, third, *nothing)
    assert not replay.is_compatible(buffer)
    replay = DeviceReplay(buffer, CPU)
    replay.sync(0.9)
    assert_same_batches(buffer, replay)


@pytest.mark.parametrize("kind", ["vectors", "shared", "frames"])
def test_cuts_of_trajectories_are_copied(kind):
    buffer, stream = make(kind, 2, 3)
    stream.add_to(buffer, 9)
    replay = DeviceReplay(buffer, CPU)
    for steps in (4, 50, 0, 1):
        replay.sync(0.9)
        buffer.end_trajectories()
        stream.add_to(buffer, steps)
        replay.sync(0.9)
        assert_same_batches(buffer, replay)


def test_modified_arrays_of_the_buffer_are_copied():
    buffer, stream = make("vectors", 1, 1)
    stream.add_to(buffer, 20)
    replay = DeviceReplay(buffer, CPU)
    replay.sync(0.9)
    buffer.rewards[:] = 5
    buffer.observations = buffer.observations + 1
    replay.sync(0.5)
    assert_same_batches(buffer, replay, gamma=0.5)
    assert (replay.read(th.arange(10), th.ones(10)).returns == 5).all()


def test_only_written_rows_are_copied():
    buffer, stream = make("frames", 1, 1)
    stream.add_to(buffer, 60)
    replay = DeviceReplay(buffer, CPU)
    replay.sync(0.9)
    copied_rows = []

    def watched(own):
        return lambda begin, end, arrays: copied_rows.append(end - begin) or own(begin, end, arrays)

    for ring in (replay._ring, replay._frames._ring):
        ring.copy_rows = watched(ring.copy_rows)
    stream.add_to(buffer, 4)
    replay.sync(0.9)
    assert sum(copied_rows) == 5 + 5  # and the newest row and frame of the last sync
    assert_same_batches(buffer, replay)


def test_another_buffer_other_n_steps_and_the_first_masks_need_another_copy():
    buffer, stream = make("vectors", 1, 1)
    stream.add_to(buffer, 5)
    replay = DeviceReplay(buffer, CPU)
    assert replay.is_compatible(buffer)
    assert not replay.is_compatible(deepcopy(buffer))
    buffer.n_steps = 2
    assert not replay.is_compatible(buffer)
    buffer.n_steps = 1
    stream.masks = True
    stream.add_to(buffer, 1)
    assert not replay.is_compatible(buffer)
    buffer.reset()
    assert not DeviceReplay(buffer, CPU).is_compatible(make("vectors", 1, 1)[0])


def test_unsupported_dtypes_have_a_reason():
    space = spaces.Box(0, 5, (2,), np.uint64)
    buffer = ScratchReplayBuffer(10, space, spaces.Discrete(2), device="cpu")
    assert (
        DeviceReplay.unsupported_reason(buffer, CPU)
        == "observations of dtype uint64 are not supported on other devices"
    )
    assert DeviceReplay.unsupported_reason(make("dict", 1, 1)[0], CPU) is None


def test_a_buffer_that_does_not_fit_into_memory_has_a_reason(monkeypatch):
    buffer, _ = make("frames", 1, 1)
    monkeypatch.setattr(device_module.th.cuda, "mem_get_info", lambda _: (10_000, 20_000))
    reason = DeviceReplay.unsupported_reason(buffer, th.device("cuda"))
    assert reason is not None
    assert "are free on cuda" in reason


# Priorities


@pytest.mark.parametrize("size", [1, 5, WIDTH, WIDTH + 1, 3000, 40_000])
def test_both_trees_find_the_same_indices(size):
    rng = np.random.default_rng(size)
    values = rng.random(size) * (rng.random(size) < 0.7)
    values[rng.integers(size)] = 1.0
    tree, on_device = SumTree(), DeviceSumTree(size, CPU)
    tree.reserve(size)
    tree.set(np.arange(size), values)
    on_device.fill(values)
    for _ in range(5):
        fractions = (np.arange(300) + rng.random(300)) / 300
        fractions[0], fractions[-1] = 0.0, 1.0
        found = on_device.find(th.from_numpy(fractions)).numpy()
        np.testing.assert_array_equal(found, tree.find(fractions))
        assert (values[found] > 0).all()
        assert (np.diff(found) >= 0).all()
        changed = rng.permutation(size)[: rng.integers(1, size + 1)]
        values[changed] = rng.random(len(changed)) + 0.1
        tree.set(changed, values[changed])
        on_device.set(th.from_numpy(changed), th.from_numpy(values[changed]))
        np.testing.assert_array_equal(on_device.values.numpy(), values)


def test_the_tree_finds_values_of_very_different_magnitude():
    values = np.array([0, 1e-300, 0, 1e300, 0, 1.0, 0] * 30)
    tree = DeviceSumTree(len(values), CPU)
    tree.fill(values)
    found = tree.find(th.linspace(0, 1, 999, dtype=th.float64)).numpy()
    assert (values[found] > 0).all()
    assert set(found) >= set(np.flatnonzero(values == 1e300))


def prioritized(n_envs=2, capacity=30, **kwargs):
    buffer = ScratchReplayBuffer(
        capacity * n_envs, BOX, spaces.Discrete(4), device="cpu", n_envs=n_envs, prioritized=True, **kwargs
    )
    return buffer, Stream(BOX, n_envs)


def owned(buffer):
    priorities = DevicePriorities(buffer.buffer_size, buffer.n_envs, buffer.optimize_memory_usage, CPU)
    priorities.sync(buffer.sampler)
    return priorities


def settings_of(sampler):
    return [th.tensor(value, dtype=th.float64) for value in (sampler.epsilon, sampler.alpha)]


@pytest.mark.parametrize("kwargs", [{}, SHARED])
def test_priorities_on_the_device_equal_those_of_the_sampler(kwargs):
    (buffer, stream), (twin, twin_stream) = prioritized(**kwargs), prioritized(**kwargs)
    for one, its_stream in ((buffer, stream), (twin, twin_stream)):
        its_stream.add_to(one, 10)
    priorities, rng = owned(buffer), np.random.default_rng(0)
    for steps in (0, 3, 1, 40, 65, 2):
        for one, its_stream in ((buffer, stream), (twin, twin_stream)):
            its_stream.add_to(one, steps)
        priorities.sync(buffer.sampler)
        assert buffer.sampler.is_owned_by(priorities)
        np.random.seed(steps)
        draw = twin.sampler.draw(twin, 16)
        np.random.seed(steps)
        fractions = th.from_numpy(buffer.sampler.draw_fractions(buffer, 16))
        indices, weights = priorities.draw(fractions, th.tensor(buffer.sampler.beta_now, dtype=th.float64))
        np.testing.assert_array_equal(indices.numpy(), draw.rows * 2 + draw.envs)
        np.testing.assert_allclose(weights.numpy(), draw.weights, rtol=1e-6)
        new = th.from_numpy(rng.random(16).astype(np.float32))
        twin.sampler.update(draw.rows, draw.envs, new)
        priorities.update(indices, new, *settings_of(buffer.sampler))
        if steps == 1:  # the sampler uses its priorities
            np.testing.assert_allclose(buffer.sampler.tree.values, twin.sampler.tree.values, rtol=1e-12)
            assert not buffer.sampler.is_owned_by(priorities)
    for one, its_stream in ((buffer, stream), (twin, twin_stream)):
        its_stream.add_to(one, 2)
    assert buffer.sampler.max_value == pytest.approx(twin.sampler.max_value)
    n = buffer.used_rows * 2
    np.testing.assert_allclose(buffer.sampler.tree.values[:n], twin.sampler.tree.values[:n], rtol=1e-12)


@pytest.mark.parametrize("again", [deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_sampler_is_copied_with_priorities_that_another_object_owns(again):
    buffer, stream = prioritized()
    stream.add_to(buffer, 10)
    priorities = owned(buffer)
    priorities.update(th.tensor([1, 1, 4]), th.tensor([9.0, 7.0, 0.5]), *settings_of(buffer.sampler))
    copy = again(buffer.sampler)
    expected = (np.array([7.0, 0.5]) + buffer.sampler.epsilon) ** buffer.sampler.alpha  # of index 1, the last counts
    np.testing.assert_allclose(copy.tree.values[[1, 4]], expected)
    assert copy.tree.values[0] == 1
    assert not copy.is_owned_by(priorities)


def test_a_priority_that_is_not_finite_changes_no_priority():
    buffer, stream = prioritized()
    stream.add_to(buffer, 10)
    priorities = owned(buffer)
    priorities.update(th.tensor([1, 4]), th.tensor([9.0, float("nan")]), *settings_of(buffer.sampler))
    assert priorities.diverged
    assert buffer.sampler.tree.values[1] == buffer.sampler.max_value == 1
