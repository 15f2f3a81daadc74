"""Prioritized replay: the sum tree against running sums, frequencies against their formula."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import DictEnv, TimeoutEnv, assert_equal, replay_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env

from sb3_scratch_dqn import ScratchDQN, ScratchReplayBuffer
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler
from sb3_scratch_dqn.replay.sum_tree import WIDTH, SumTree

VECTOR = gym.spaces.Box(-1, 1, (2,), np.float32)
ACTIONS = gym.spaces.Discrete(3)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    size=st.sampled_from([1, 2, WIDTH - 1, WIDTH, WIDTH + 1, 1000, WIDTH**2, WIDTH**2 + 1, 10_000, 4096 * WIDTH + 1]),
    seed=st.integers(0, 1000),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_the_tree_finds_the_indices_of_running_sums(size, seed, zeros):
    rng = np.random.default_rng(seed)
    # Integers add up without rounding, so both must find the same indices
    values = rng.integers(1, 1000, size) * (rng.uniform(size=size) >= zeros)
    values[rng.integers(size)] += 1
    tree = SumTree()
    for part in np.array_split(rng.permutation(size), 3):
        tree.reserve(int(part.max(initial=0)) + 1)
        tree.set(part, values[part].astype(float))
    assert tree.total == values.sum()
    # Half-integers: rounding of their fractions of the total, an integer, changes them by far less than a half
    sums = rng.integers(0, values.sum(), 200) + 0.5
    found = tree.find(sums / values.sum())
    np.testing.assert_array_equal(found, np.searchsorted(values.cumsum(), sums, side="right"))
    assert (values[found] > 0).all()


def test_the_tree_never_finds_a_value_of_zero_by_rounding():
    tree = SumTree()
    tree.reserve(WIDTH**2)
    rng = np.random.default_rng(0)
    indices = rng.choice(WIDTH**2, 500, replace=False)
    tree.set(indices, rng.uniform(0.1, 1, 500) ** 7)
    found = tree.find(np.array([0.0, np.nextafter(1.0, 0), 1.0]))
    assert set(found) <= set(indices)
    assert found[0] == indices.min()
    assert found[-1] == indices.max()


def test_the_last_value_of_a_repeated_index_counts():
    tree = SumTree()
    tree.set(np.array([3, 3, 5]), np.array([7.0, 2.0, 1.0]))
    assert tree.total == 3.0


def steps(n, n_envs=1, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        obs, next_obs = rng.uniform(-1, 1, (2, n_envs, 2)).astype(np.float32)
        yield obs, next_obs, rng.integers(0, 3, n_envs), rng.normal(size=n_envs), rng.uniform(size=n_envs) < 0.1, [
            {} for _ in range(n_envs)
        ]  # fmt: skip


def filled(n=50, n_envs=1, capacity=50, **kwargs):
    buffer = ScratchReplayBuffer(
        capacity * n_envs, VECTOR, ACTIONS, device="cpu", n_envs=n_envs, prioritized=True, **kwargs
    )
    for step in steps(n, n_envs):
        buffer.add(*step)
    return buffer


def flat_indices(batch, n_envs):
    rows, envs = batch.indices
    return rows * n_envs + envs


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_frequencies_follow_the_priorities(alpha, n_envs):
    buffer = filled(n_envs=n_envs, alpha=alpha)
    priorities = np.random.default_rng(1).uniform(0.01, 3, 50 * n_envs)
    rows, envs = np.divmod(np.arange(50 * n_envs), n_envs)
    buffer.sampler.update(rows, envs, th.tensor(priorities))
    np.random.seed(0)
    counts = np.zeros(50 * n_envs)
    for _ in range(250):
        # Batches of one transition, so that draws are independent; searching the tree directly draws many at once
        counts += np.bincount(buffer.sampler.tree.find(np.random.random_sample(4000)), minlength=len(counts))[
            : len(counts)
        ]
    expected = (priorities + 1e-6) ** alpha
    assert chisquare(counts, 1_000_000 * expected / expected.sum()).pvalue > 1e-3
    # and stratified batches have the same distribution
    counts[:] = 0
    for _ in range(3000):
        counts += np.bincount(flat_indices(buffer.sample_batch(32), n_envs), minlength=len(counts))
    np.testing.assert_allclose(counts / counts.sum(), expected / expected.sum(), rtol=0.25, atol=2e-4)


def test_weights_undo_the_bias():
    buffer = filled(beta=1.0)
    priorities = np.random.default_rng(1).uniform(0.01, 3, 50)
    buffer.sampler.update(np.arange(50), np.zeros(50, dtype=int), th.tensor(priorities))
    rewards = buffer.rewards[:50, 0]
    np.random.seed(0)
    batch = buffer.sample_batch(200_000)
    biased = batch.returns.mean().item()
    unbiased = ((batch.weights * batch.returns).sum() / batch.weights.sum()).item()
    assert abs(biased - rewards.mean()) > 0.02, "there must be a bias to undo"
    assert unbiased == pytest.approx(rewards.mean(), abs=0.005)


def test_weights_are_those_of_the_paper():
    buffer = filled(alpha=0.7, beta=0.5, beta_final=0.9)
    priorities = np.random.default_rng(1).uniform(0.01, 3, 50)
    buffer.sampler.update(np.arange(50), np.zeros(50, dtype=int), th.tensor(priorities))
    probabilities = (priorities + 1e-6) ** 0.7 / ((priorities + 1e-6) ** 0.7).sum()
    for progress_remaining, beta in ((1.0, 0.5), (0.5, 0.7), (0.0, 0.9)):
        buffer.sampler.set_progress(progress_remaining)
        batch = buffer.sample_batch(16)
        weights = (50 * probabilities[batch.indices[0]]) ** -beta
        np.testing.assert_allclose(batch.weights, weights / weights.max(), rtol=1e-5)


def test_new_transitions_have_the_largest_priority_so_far():
    buffer = filled(n=10, capacity=20, alpha=1.0)
    np.testing.assert_allclose(buffer.sampler.tree.values[:10], 1.0)
    buffer.sampler.update(np.array([3]), np.array([0]), th.tensor([5.0]))
    buffer.sampler.update(np.array([3, 4]), np.array([0, 0]), th.tensor([2.0, 0.5]))
    buffer.add(*next(steps(1, seed=1)))
    np.testing.assert_allclose(buffer.sampler.tree.values[[3, 4, 10]], [2.0, 0.5, 5.0], rtol=1e-5)


def test_overwritten_rows_get_the_priority_of_new_ones():
    buffer = filled(n=5, capacity=5)
    buffer.sampler.update(np.arange(5), np.zeros(5, dtype=int), th.full((5,), 1e-3))
    buffer.add(*next(steps(1, seed=1)))
    values = buffer.sampler.tree.values[:5]
    assert values.argmax() == 0
    assert values[0] == 1.0


def test_with_optimize_memory_usage_only_rows_with_a_next_observation_are_sampled():
    buffer = filled(n=27, capacity=10, n_envs=2, optimize_memory_usage=True, handle_timeout_termination=False)
    assert buffer.pos == 7
    rows, _ = buffer.sample_batch(5000).indices
    assert set(rows) == set(range(10)) - {7}


def test_copies_and_pickles_sample_the_same():
    buffer = filled(n=300, capacity=1000)
    buffer.sampler.update(
        np.arange(300), np.zeros(300, dtype=int), th.rand(300, generator=th.Generator().manual_seed(0))
    )
    for restored in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        drawn = []
        for one in (buffer, restored):
            np.random.seed(0)
            drawn.append(one.sample_batch(64).indices[0])
        np.testing.assert_array_equal(*drawn)
        for step in steps(200, seed=2):
            restored.add(*step)
        assert restored.sampler.tree.values[:500].all()


@pytest.mark.parametrize("old_names", [{"_owner": "_borrower"}, {"_tree": "tree", "_max_value": "max_value"}])
def test_pickled_samplers_with_old_attribute_names_are_read(old_names):
    sampler = filled(n=30).sampler
    sampler.update(np.arange(30), np.zeros(30, dtype=int), th.linspace(0, 3, 30))
    state = {old_names.get(name, name): value for name, value in vars(sampler).items()}
    if "tree" in state:
        del state["_owner"]  # newer than these names
    restored = PrioritizedSampler.__new__(PrioritizedSampler)
    restored.__setstate__(state)
    assert vars(restored).keys() == vars(sampler).keys()
    np.testing.assert_array_equal(restored.tree.values, sampler.tree.values)
    assert restored.max_value == sampler.max_value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_priorities_that_are_not_finite_raise(bad):
    buffer = filled()
    before = buffer.sampler.tree.values.copy()
    with pytest.raises(ValueError, match="priorities must be finite"):
        buffer.sampler.update(np.arange(2), np.zeros(2, dtype=int), th.tensor([1.0, bad]))
    np.testing.assert_array_equal(buffer.sampler.tree.values, before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 must be a number between 0 and 1"),
        ({"beta": -0.1}, "beta=-0.1 must be a number between 0 and 1"),
        ({"beta_final": "x"}, "beta_final='x' must be a number between 0 and 1"),
        ({"epsilon": 0}, "epsilon=0 must be a number above 0"),
        ({"epsilon": float("inf")}, "epsilon=inf must be a finite number"),
    ],
)
def test_invalid_settings_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScratchDQN("MlpPolicy", TimeoutEnv(), replay_buffer_kwargs={"prioritized": True, **kwargs})


@pytest.mark.parametrize(("policy", "env"), [("MlpPolicy", TimeoutEnv), ("MultiInputPolicy", DictEnv)])
def test_an_update_sets_the_priorities_of_its_batch(policy, env):
    model = ScratchDQN(
        policy,
        make_vec_env(env, n_envs=2, seed=0),
        replay_buffer_kwargs={"prioritized": True},
        n_steps=3,
        learning_starts=10,
        seed=0,
    ).learn(60)
    sampler = model.replay_buffer.sampler
    assert isinstance(sampler, PrioritizedSampler)
    values = sampler.tree.values[:60]
    assert len(set(values)) > 10
    assert sampler.progress_remaining < 0.2


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("n", [30, 75])
def test_sampling_is_a_setting_of_the_model_and_not_of_a_saved_buffer(tmp_path, n, share):
    def make(prioritized):
        return ScratchDQN(
            "MlpPolicy",
            TimeoutEnv(),
            buffer_size=50,
            optimize_memory_usage=share,
            replay_buffer_kwargs={"prioritized": prioritized, "handle_timeout_termination": not share},
            learning_starts=20,
            seed=0,
        )

    uniform, prioritized = make(False).learn(n), make(True).learn(n)
    expected = prioritized.replay_buffer.sampler.tree.values[:50]
    for model in (uniform, prioritized):
        model.save_replay_buffer(tmp_path / "replay.pkl")
        loaded = make(True)
        loaded.load_replay_buffer(tmp_path / "replay.pkl")
        values = loaded.replay_buffer.sampler.tree.values[:50]
        # From a uniform buffer, all have the priority of new ones, except rows with priority 0 in a prioritized one
        np.testing.assert_array_equal(values, expected if model is prioritized else (expected > 0).astype(float))
        loaded.learn(30, reset_num_timesteps=False)
        loaded = make(False)
        loaded.load_replay_buffer(tmp_path / "replay.pkl")
        assert not hasattr(loaded.replay_buffer.sampler, "tree")


def test_a_new_alpha_applies_to_existing_priorities():
    buffer = filled(alpha=1.0)
    priorities = np.random.default_rng(1).uniform(0.01, 3, 50)
    buffer.sampler.update(np.arange(50), np.zeros(50, dtype=int), th.tensor(priorities))
    buffer.use_sampler(PrioritizedSampler(1, alpha=0.5))
    np.testing.assert_allclose(buffer.sampler.tree.values[:50], (priorities + 1e-6) ** 0.5)
    assert buffer.sampler.max_value == pytest.approx(buffer.sampler.tree.values.max())
    buffer.use_sampler(PrioritizedSampler(1, alpha=0.0))
    np.testing.assert_array_equal(buffer.sampler.tree.values[:50], 1.0)
    buffer.use_sampler(PrioritizedSampler(1, alpha=0.7))
    np.testing.assert_array_equal(buffer.sampler.tree.values[:50], 1.0)
    assert buffer.sampler.tree.total == pytest.approx(50)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_a_buffer_saved_by_sb3_is_sampled_with_the_settings_of_the_model(tmp_path, n_steps):
    reference = DQN("MlpPolicy", TimeoutEnv(), seed=0, buffer_size=500, n_steps=n_steps).learn(200)
    reference.save_replay_buffer(tmp_path / "replay.pkl")
    model = ScratchDQN(
        "MlpPolicy", TimeoutEnv(), n_steps=2, buffer_size=500, replay_buffer_kwargs={"prioritized": True}, seed=0
    )
    model.load_replay_buffer(tmp_path / "replay.pkl", truncate_last_traj=False, allow_pickle=True)
    assert isinstance(model.replay_buffer, ScratchReplayBuffer)
    assert model.replay_buffer.n_steps == 2
    assert_equal(replay_contents(reference.replay_buffer), replay_contents(model.replay_buffer))
    assert model.replay_buffer.sampler.tree.total == 200
    model.learn(150, reset_num_timesteps=False)


def test_transitions_may_have_no_infos():
    buffer = filled(n=0, handle_timeout_termination=False)
    obs, next_obs, action, reward, done, _ = next(steps(1))
    buffer.add(obs, next_obs, action, reward, done, [])
    assert buffer.size() == 1


def test_updates_are_weighted():
    def parameters(beta):
        model = ScratchDQN(
            "MlpPolicy",
            TimeoutEnv(),
            replay_buffer_kwargs={"prioritized": True, "beta": beta, "beta_final": beta},
            learning_starts=10,
            seed=0,
        ).learn(40)
        return model.q_net.q_net[0].weight

    assert not th.equal(parameters(0.0), parameters(1.0))
