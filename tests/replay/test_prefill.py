"""Given transitions are stored unchanged, or none of them is stored."""

import gc
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from helpers import DictEnv, ImageEnv, MaskedEnv, TimeoutEnv, assert_equal, replay_contents
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.prefill import read_transitions


def collected(env, episodes, seed=0):
    """Return the transitions of whole episodes with random actions."""
    data = {name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminations")}
    data["truncations"] = []
    rng = np.random.default_rng(seed)
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        ended = False
        while not ended:
            action = int(rng.integers(env.action_space.n))
            next_obs, reward, terminated, truncated, _ = env.step(action)
            for name, value in zip(data, (obs, action, reward, next_obs, terminated, truncated), strict=True):
                data[name].append(value)
            obs, ended = next_obs, terminated or truncated
    return {
        name: {key: np.array([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], dict)
        else np.array(values)
        for name, values in data.items()
    }


def changed(data, **changes):
    return {name: array for name, array in {**data, **changes}.items() if array is not None}


DATA = collected(TimeoutEnv(), 12)
N = len(DATA["actions"])


def small_model(env=None, **settings):
    return ScratchDQN("MlpPolicy", env or TimeoutEnv(), **{"buffer_size": 1000, "seed": 0, **settings})


def test_arrays_are_stored_unchanged():
    model = small_model()
    assert model.load_transitions(DATA) == N
    buffer = model.replay_buffer
    assert buffer.size() == N
    assert_equal(DATA["observations"], buffer.observations[:N, 0])
    assert_equal(DATA["next_observations"], buffer.next_observations[:N, 0])
    np.testing.assert_array_equal(DATA["actions"], buffer.actions[:N, 0, 0])
    np.testing.assert_array_equal(DATA["rewards"].astype(np.float32), buffer.rewards[:N, 0])
    np.testing.assert_array_equal(DATA["terminations"] | DATA["truncations"], buffer.dones[:N, 0])
    np.testing.assert_array_equal(DATA["truncations"], buffer.timeouts[:N, 0])
    assert not buffer.store.cuts[:N].any(), "all episodes ended"
    assert 0 < DATA["terminations"].sum() < 12


def test_loaded_transitions_equal_those_an_agent_collects():
    model = small_model(learning_starts=10**6, seed=3).learn(200)
    buffer = model.replay_buffer
    rows = slice(0, 200)
    data = {
        "observations": buffer.observations[rows, 0],
        "actions": buffer.actions[rows, 0],
        "rewards": buffer.rewards[rows, 0],
        "next_observations": buffer.next_observations[rows, 0],
        "terminations": buffer.dones[rows, 0] * (1 - buffer.timeouts[rows, 0]),
        "truncations": buffer.timeouts[rows, 0],
    }
    expected = replay_contents(buffer)
    for source in (data, buffer):
        other = small_model()
        assert other.load_transitions(source) == 200
        assert_equal(expected, replay_contents(other.replay_buffer))
        # The last episode has not ended, but no transition continues it
        np.testing.assert_array_equal(np.flatnonzero(other.replay_buffer.store.cuts[:200, 0]), [199])


def test_transitions_that_the_next_does_not_continue_count_as_truncated():
    order = np.random.default_rng(0).permutation(N)
    shuffled = {name: array[order] for name, array in DATA.items()}
    model = small_model(n_steps=3)
    model.load_transitions(shuffled)
    buffer = model.replay_buffer
    follows = (DATA["next_observations"][order][:-1] == DATA["observations"][order][1:]).all(axis=1)
    ended = shuffled["terminations"] | shuffled["truncations"]
    np.testing.assert_array_equal(buffer.dones[:N, 0], ended)
    np.testing.assert_array_equal(buffer.store.cuts[: N - 1, 0], ~ended[:-1] & ~follows)
    np.random.seed(0)
    batch = buffer.sample_batch(200)
    rows = batch.indices[0]
    single = batch.discounts == np.float32(0.99)
    assert single.any()
    np.testing.assert_allclose(batch.returns[single], shuffled["rewards"][rows][single], rtol=1e-6)


def test_each_environment_gets_a_part():
    model = small_model(make_vec_env(TimeoutEnv, n_envs=5), n_steps=2)
    stored = model.load_transitions(DATA)
    assert N % 5 != 0
    assert stored == N - N % 5
    buffer, rows = model.replay_buffer, stored // 5
    assert_equal(DATA["observations"][:stored].reshape(5, rows, 3).swapaxes(0, 1), buffer.observations[:rows])
    ended = (DATA["terminations"] | DATA["truncations"])[:stored].reshape(5, rows)[:, -1]
    np.testing.assert_array_equal(buffer.store.cuts[rows - 1], ~ended)
    assert not ended.all()


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("steps", [60, 300])
@pytest.mark.parametrize("share", [False, True])
def test_a_buffer_of_sb3_is_read_oldest_transition_first(n_envs, steps, share):
    env = make_vec_env(TimeoutEnv, n_envs=n_envs, seed=0)
    settings = {"optimize_memory_usage": share, "replay_buffer_kwargs": {"handle_timeout_termination": not share}}
    reference = DQN("MlpPolicy", env, buffer_size=200, learning_starts=10**6, seed=0, **settings).learn(steps)
    source = reference.replay_buffer
    rows = source.size() - (share and source.full)
    transitions = read_transitions(source, env.observation_space, 3)
    assert len(transitions.actions) == rows * n_envs
    oldest = (source.pos + (share and source.full)) % source.buffer_size if source.full else 0
    for index in (0, 7, rows - 1):
        row = (oldest + index) % source.buffer_size
        for env_index in range(n_envs):
            at = env_index * rows + index
            assert_equal(source.observations[row, env_index], transitions.observations[at])
            following = source.observations[(row + 1) % source.buffer_size, env_index]
            expected = following if share else source.next_observations[row, env_index]
            assert_equal(expected, transitions.next_observations[at])
            assert transitions.actions[at] == source.actions[row, env_index]
            ended = bool(source.dones[row, env_index])
            timeout = bool(source.timeouts[row, env_index])
            assert transitions.terminations[at] == (ended and not timeout)
            assert transitions.truncations[at] == timeout
            assert transitions.gaps[at] == (index == rows - 1 and not ended)


def test_frames_stored_once_are_read_and_stored_once():
    def make_env():
        return VecFrameStack(make_vec_env(TimeoutEnv, n_envs=2, seed=0), 3)

    model = small_model(make_env(), learning_starts=10**6).learn(300)
    other = small_model(make_env())
    other.load_transitions(model.replay_buffer)
    assert isinstance(other.replay_buffer.store.obs_store, StackedFrames)
    assert_equal(
        replay_contents(model.replay_buffer)["observations"], replay_contents(other.replay_buffer)["observations"]
    )
    other.learn(200)  # the environments are reset, so frames stay stacks
    assert isinstance(other.replay_buffer.store.obs_store, StackedFrames)


def test_a_full_buffer_of_frames_is_split_among_more_environments():
    def make_env(n_envs):
        return VecFrameStack(make_vec_env(TimeoutEnv, n_envs=n_envs, seed=0), 3)

    model = small_model(make_env(1), learning_starts=10**6, buffer_size=400).learn(600)
    other = small_model(make_env(2))
    assert other.load_transitions(model.replay_buffer) == 400  # its oldest step, and the 201st, are within episodes
    assert isinstance(other.replay_buffer.store.obs_store, StackedFrames)
    kept = np.asarray(other.replay_buffer.observations)[:200].swapaxes(0, 1).reshape(400, -1)
    assert_equal(np.roll(np.asarray(model.replay_buffer.observations)[:, 0], -model.replay_buffer.pos, axis=0), kept)


def test_masks_are_read():
    model = small_model(MaskedEnv(), learning_starts=10**6).learn(80)
    other = small_model(MaskedEnv())
    other.load_transitions(model.replay_buffer)
    for name in ("action_masks", "next_action_masks"):
        masks = getattr(model.replay_buffer.store, name)[:80]
        assert not masks.all()
        np.testing.assert_array_equal(masks, getattr(other.replay_buffer.store, name)[:80])


@pytest.mark.parametrize("env_class", [DictEnv, ImageEnv])
def test_dicts_and_images_with_channels_last_are_read(env_class):
    data = collected(env_class(), 3)
    policy = "MultiInputPolicy" if env_class is DictEnv else "CnnPolicy"
    model = ScratchDQN(policy, env_class(), buffer_size=500, learning_starts=0, batch_size=8, seed=0)
    n = model.load_transitions(data)
    kept = model.replay_buffer.observations
    if env_class is ImageEnv:
        assert_equal(data["observations"].transpose(0, 3, 1, 2), kept[:n, 0])
    else:
        assert_equal(data["observations"]["image"], kept["image"][:n, 0])
    model.learn(20)


def test_an_agent_learns_from_data_alone():
    model = small_model("CartPole-v1", learning_rate=1e-3, buffer_size=20_000, batch_size=64, gamma=0.9)
    model.load_transitions(collected(gym.make("CartPole-v1"), 300))
    model.set_logger(configure(None, []))
    for _ in range(30):
        model.train(gradient_steps=50, batch_size=64)
        model.policy.q_net_target.load_state_dict(model.policy.q_net.state_dict())
    env, lengths = gym.make("CartPole-v1"), []
    for seed in range(10):
        obs, _ = env.reset(seed=seed)
        steps, ended = 0, False
        while not ended:
            obs, _, terminated, truncated, _ = env.step(int(model.predict(obs, deterministic=True)[0]))
            steps, ended = steps + 1, terminated or truncated
        lengths.append(steps)
    assert np.mean(lengths) > 60, lengths  # random actions give 22; seeds 0 to 4 gave 157 to 217


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (42, "data has type int, but must be a dict of arrays, a replay buffer, or a Minari data set"),
        (changed(DATA, rewards=None), "data has no 'rewards': it must have observations, actions"),
        ({**DATA, "dones": DATA["terminations"]}, "data has the unknown name 'dones'"),
        (changed(DATA, actions=DATA["actions"] + 1), r"data\['actions'\] has 1 to 3, but must have 0 to 2"),
        (changed(DATA, actions=DATA["actions"] * 1.0), r"dtype float64, but must have shape \(N,\)"),
        (changed(DATA, actions=DATA["actions"][:0]), r"N at least 1"),
        (
            changed(DATA, rewards=DATA["rewards"][1:]),
            rf"data\['rewards'\] has shape \({N - 1},\), but must have \({N},\)",
        ),
        (changed(DATA, rewards=DATA["rewards"] * np.nan), "must be finite numbers of dtype float32"),
        (changed(DATA, observations=DATA["observations"][:, :2]), rf"shape \({N}, 2\) .* must have shape \({N}, 3\)"),
        (changed(DATA, observations=DATA["observations"] * np.inf), r"data\['observations'\] must be finite"),
        (changed(DATA, observations=DATA["observations"].astype(complex)), "dtype complex128, but must have"),
        (changed(DATA, next_observations={"a": DATA["observations"]}), r"data\['next_observations'\] has shape \(\)"),
        ({**DATA, "action_masks": np.ones((N, 3))}, "only one of 'action_masks' and 'next_action_masks'"),
        (changed(DATA, rewards=DATA["rewards"] + 1e300), "must be finite numbers of dtype float32"),
        (changed(DATA, rewards=["a"] * N), r"data\['rewards'\] must be an array of numbers, but contains strings"),
        (changed(DATA, observations=[[1, 2, 3], [4]] * N), r"data\['observations'\] must be an array of numbers"),
        (
            changed(DATA, terminations=DATA["terminations"] + 0.5),
            r"data\['terminations'\] must have only True and False",
        ),
        (
            changed(DATA, observations=DATA["observations"] + np.float64(1e300)),
            "must be finite numbers of dtype float32",
        ),
        ({**DATA, "action_masks": np.zeros((N, 3)), "next_action_masks": np.ones((N, 3))}, "must allow an action"),
    ],
)
def test_invalid_data_raises_and_none_of_it_is_stored(data, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        model.load_transitions(data)
    assert model.replay_buffer.size() == 0


@pytest.mark.parametrize(
    ("space", "wrong"),
    [
        (gym.spaces.Box(0, 255, (1,), np.uint8), 300),
        (gym.spaces.Discrete(4), 4),
        (gym.spaces.MultiDiscrete([2]), 2),
        (gym.spaces.MultiBinary(1), 2),
    ],
)
def test_integers_must_be_in_the_space(space, wrong):
    def data(value):
        observations = np.array([[0], [value]], dtype=np.uint16)
        return {
            "observations": observations,
            "actions": np.array([0, 1]),
            "rewards": np.zeros(2),
            "next_observations": observations,
            "terminations": np.zeros(2),
        }

    assert len(read_transitions(data(1), space, 2).actions) == 2
    with pytest.raises(ValueError, match=rf"data\['observations'\] has 0 to {wrong}, but must be of"):
        read_transitions(data(wrong), space, 2)


def test_a_gap_in_any_key_of_an_observation_is_a_gap():
    data = collected(DictEnv(), 1, seed=1)
    assert len(data["actions"]) > 4
    for key in data["observations"]:
        other = {name: array.copy() for name, array in data["next_observations"].items()}
        other[key][2] = (other[key][2] + 1) % 4
        gaps = read_transitions({**data, "next_observations": other}, DictEnv.observation_space, 3).gaps
        np.testing.assert_array_equal(np.flatnonzero(gaps), [2])


def test_earlier_trajectories_are_cut_where_data_begins():
    model = small_model(n_steps=3).learn(8)
    model.replay_buffer.dones[7] = 0
    model.load_transitions(DATA)
    assert model.replay_buffer.store.cuts[7]
    windows = model.replay_buffer._n_step_returns(np.array([6, 7]), np.zeros(2, dtype=int), None, 0.5)
    assert windows.last_rows.max() == 7


def test_gaps_are_stored_without_handle_timeout_termination():
    shuffled = {name: array[::-1] for name, array in DATA.items()}
    model = small_model(replay_buffer_kwargs={"handle_timeout_termination": False})
    model.load_transitions(changed(shuffled, truncations=None))
    np.testing.assert_array_equal(model.replay_buffer.dones[:N, 0], shuffled["terminations"])


def test_optimize_memory_usage_allows_no_gaps_and_takes_another_row():
    settings = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    with pytest.raises(ValueError, match=rf"data has {N} transitions, but must have 1 to {N - 1} with buffer_size={N}"):
        small_model(buffer_size=N, **settings).load_transitions(DATA)
    with pytest.raises(ValueError, match=r"data has \d+ transitions that the next one does not continue"):
        small_model(**settings).load_transitions({name: array[::-1] for name, array in DATA.items()})
    model = small_model(buffer_size=N + 1, **settings)
    assert model.load_transitions(DATA) == N
    np.testing.assert_array_equal(model.replay_buffer.rewards[:N, 0], DATA["rewards"].astype(np.float32))


def test_her_needs_whole_episodes():
    env = gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=4, continuous=False), 8)
    model = ScratchDQN("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=20, seed=0).learn(
        24
    )
    with pytest.raises(ValueError, match="replay_buffer_class=HerReplayBuffer needs whole episodes"):
        model.load_transitions(model.replay_buffer)


def test_data_must_fit_into_the_buffer():
    model = small_model(buffer_size=N - 1)
    with pytest.raises(ValueError, match=rf"data has {N} transitions, but must have 1 to {N - 1} with buffer_size="):
        model.load_transitions(DATA)
    two = small_model(make_vec_env(TimeoutEnv, n_envs=2))
    with pytest.raises(ValueError, match="data has 1 transitions, but must have 2 to 1000"):
        two.load_transitions({name: array[:1] for name, array in DATA.items()})
    assert model.replay_buffer.size() == two.replay_buffer.size() == 0


def test_the_error_for_missing_minari_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"data='a/b-v0' names a Minari .* pip install 'sb3-scratch-dqn\[minari\]'"):
        small_model().load_transitions("a/b-v0")


class Episode:
    """An episode in Minari's form: one more observation than actions."""

    def __init__(self, rng, length, terminated):
        self.observations = rng.normal(size=(length + 1, 3)).astype(np.float32)
        self.actions = rng.integers(0, 3, length)
        self.rewards = rng.normal(size=length)
        self.terminations, self.truncations = np.zeros(length, bool), np.zeros(length, bool)
        if length:
            self.terminations[-1], self.truncations[-1] = terminated, not terminated


def test_episodes_in_minari_s_form_are_read():
    class Dataset:
        episodes = [
            Episode(np.random.default_rng(seed), length, seed % 2 == 0) for seed, length in enumerate((5, 0, 1))
        ]

        def iterate_episodes(self):
            return iter(self.episodes)

    transitions = read_transitions(Dataset(), TimeoutEnv.observation_space, 3)
    first, _, last = Dataset.episodes
    assert_equal(np.concatenate([first.observations[:-1], last.observations[:-1]]), transitions.observations)
    assert_equal(np.concatenate([first.observations[1:], last.observations[1:]]), transitions.next_observations)
    np.testing.assert_array_equal(transitions.terminations, [0, 0, 0, 0, 1, 1])
    assert not transitions.truncations.any()


def test_a_minari_data_set_is_read(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    pytest.importorskip("jax", reason="Minari needs it to make data sets, though not to read them")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(gym.make("CartPole-v1"))
    for seed in range(3):
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, _ = env.step(seed % 2)
            ended = terminated or truncated
    with warnings.catch_warnings():
        # About missing metadata of data sets, and about a temporary folder that Minari does not remove
        warnings.simplefilter("ignore")
        dataset = env.create_dataset("test/cartpole-v0")
        del env
        gc.collect()
    for source in (dataset, "test/cartpole-v0"):
        model = small_model("CartPole-v1")
        n = model.load_transitions(source)
        assert n == dataset.total_steps > 20
        assert model.replay_buffer.dones[:n].sum() == 3
        assert not model.replay_buffer.timeouts[:n].any()
