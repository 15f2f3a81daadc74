"""Replay buffers are restored from files exactly, and invalid files raise."""

import io
import json
import pickle
import zipfile

import gymnasium as gym
import numpy as np
import pytest
from helpers import DictEnv, MaskedEnv, TimeoutEnv, assert_equal, replay_contents
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_scratch_dqn import ScratchDQN, ScratchReplayBuffer
from sb3_scratch_dqn.replay import archive as replay_files
from sb3_scratch_dqn.replay.archive import describe_space, read_replay_archive, write_replay_buffer
from sb3_scratch_dqn.replay.frames import StackedFrames


def stacked(env_class, n_envs):
    return VecFrameStack(make_vec_env(env_class, n_envs=n_envs, seed=0), 3)


SHARED = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
PRIORITIZED = {"replay_buffer_kwargs": {"prioritized": True, "alpha": 0.7, "beta": 0.3}}

# name: (policy, environment, settings)
KINDS = {
    "dense": ("MlpPolicy", TimeoutEnv, {}),
    "two environments": ("MlpPolicy", lambda: make_vec_env(TimeoutEnv, n_envs=2, seed=0), {}),
    "dict": ("MultiInputPolicy", DictEnv, {}),
    "observations once": ("MlpPolicy", TimeoutEnv, SHARED),
    "frames": ("MlpPolicy", lambda: stacked(TimeoutEnv, 2), {}),
    "frames prioritized": ("MlpPolicy", lambda: stacked(TimeoutEnv, 1), PRIORITIZED),
    "prioritized": ("MlpPolicy", TimeoutEnv, PRIORITIZED),
    "masks": ("MlpPolicy", MaskedEnv, {}),
    "several steps": ("MlpPolicy", TimeoutEnv, {"n_steps": 3}),
}


def make(name, **changed):
    policy, make_env, settings = KINDS[name]
    return ScratchDQN(policy, make_env(), buffer_size=90, learning_starts=30, seed=0, **{**settings, **changed})


def batch_of(buffer, seed=0):
    np.random.seed(seed)
    return buffer.sample_batch(32)._asdict()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [0, 40, 89, 90, 140])
def test_a_loaded_buffer_equals_the_saved_one(name, steps, tmp_path):
    model = make(name)
    if steps:
        model.learn(steps)
    model.save_replay_buffer(tmp_path / "replay")
    assert [file.name for file in tmp_path.iterdir()] == ["replay.npz"]
    loaded = make(name)
    loaded.load_replay_buffer(tmp_path / "replay", truncate_last_traj=False)
    ours, theirs = loaded.replay_buffer, model.replay_buffer
    assert_equal(replay_contents(theirs), replay_contents(ours))
    assert type(ours.store.obs_store) is type(theirs.store.obs_store)
    if steps:
        assert_equal(batch_of(theirs), batch_of(ours))
        # and training continues in the same way
        model.set_env(model.env)
        for one in (model, loaded):
            one.env.seed(1)
            one.action_space.seed(1)
            one.exploration_rate = 1.0
            one.policy.load_state_dict(model.policy.state_dict())
            one.learning_starts = 10**6
            one.learn(50, reset_num_timesteps=False)
        assert_equal(replay_contents(theirs), replay_contents(ours))
        assert_equal(batch_of(theirs), batch_of(ours))


def test_numpy_reads_the_arrays_of_a_file(tmp_path):
    model = make("prioritized").learn(40)
    model.save_replay_buffer(tmp_path / "replay.npz")
    with np.load(tmp_path / "replay.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["rewards"], model.replay_buffer.rewards[:40])
        np.testing.assert_array_equal(arrays["priorities"], model.replay_buffer.sampler.tree.values[:40])
        assert json.loads(arrays["header.json"])["observation_space"] == describe_space(model.observation_space)


def test_the_zoo_s_file_name_and_open_files_are_supported(tmp_path):
    model = make("dense").learn(40)
    model.save_replay_buffer(tmp_path / "new folder" / "replay_buffer.pkl")
    file = io.BytesIO()
    model.save_replay_buffer(file)
    file.seek(0)
    for source in (tmp_path / "new folder" / "replay_buffer.pkl", str(tmp_path / "new folder/replay_buffer"), file):
        loaded = make("dense")
        loaded.load_replay_buffer(source)
        assert_equal(replay_contents(model.replay_buffer), replay_contents(loaded.replay_buffer))


def test_a_crash_while_writing_leaves_the_existing_file_unchanged(tmp_path, monkeypatch):
    model = make("dense").learn(40)
    model.save_replay_buffer(tmp_path / "replay.npz")
    before = (tmp_path / "replay.npz").read_bytes()
    model.learn(40, reset_num_timesteps=False)
    written = []

    def write_some(member, array, **kwargs):
        if len(written) == 3:
            raise OSError("no space left on device")
        written.append(array)
        member.write(array.tobytes())

    monkeypatch.setattr(np.lib.format, "write_array", write_some)
    with pytest.raises(OSError, match="no space left"):
        model.save_replay_buffer(tmp_path / "replay.npz")
    assert len(written) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["replay.npz"]
    assert (tmp_path / "replay.npz").read_bytes() == before


@pytest.mark.parametrize("name", ["dense", "frames prioritized"])
def test_a_truncated_or_damaged_file_raises_and_changes_nothing(name, tmp_path):
    model = make(name).learn(120)
    model.save_replay_buffer(tmp_path / "replay.npz")
    whole = (tmp_path / "replay.npz").read_bytes()
    expected = replay_contents(model.replay_buffer)
    rng = np.random.default_rng(0)
    damaged = [whole[:length] for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 1)]
    for place in rng.integers(0, len(whole), 150):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        (tmp_path / "bad.npz").write_bytes(content)
        try:
            model.load_replay_buffer(tmp_path / "bad.npz", truncate_last_traj=False)
        except ValueError as error:
            refused += "bad.npz" in str(error)
        # damage that does not raise changes nothing, such as the time of an entry of the archive
        assert_equal(expected, replay_contents(model.replay_buffer))
    assert refused > 120


def rewritten(path, target, change):
    """Copy an archive with some of its members changed."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        members = {name: source.read(name) for name in source.namelist()}
        change(members)
        for name, content in members.items():
            archive.writestr(name, content)


def array(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def header(**changed):
    def change(members):
        members["header.json"] = json.dumps({**json.loads(members["header.json"]), **changed})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            header(format="else"),
            'is not a replay buffer file: its header must have "format": "sb3-scratch-dqn replay buffer"',
        ),
        (header(version=99), "has version 99 of the format, but this package reads version 1"),
        (header(pos=7), "its array 'steps' counts 120, but its 90 rows end before row 7"),
        (header(pos=700), "pos=700 is outside of its 90 rows"),
        (header(n_envs=3), "has n_envs=3, but must have n_envs=1"),
        (header(buffer_size=50), "is inconsistent"),
        (header(n_steps="x"), "is inconsistent"),
        (header(stacking={"n_stack": 0, "axes": 0, "padding": "zero"}), "n_stack of at least 1"),
        (header(stacking={"n_stack": 3, "axes": 0, "padding": "zer"}), "padding 'zero' or 'first'"),
        (header(stacking={"n_stack": 2, "axes": 0, "padding": "zero"}), "is inconsistent"),
        (lambda m: m.pop("rewards.npy"), "it has no array 'rewards'"),
        (lambda m: m.update({"rewards.npy": array(np.zeros((90, 2), np.float32))}), r"'rewards' has shape \(90, 2\)"),
        (lambda m: m.update({"rewards.npy": array(np.zeros((90, 1)))}), "dtype float64, but must have .* float32"),
        (lambda m: m.update({"dones.npy": array(np.zeros((9, 1), np.float32))}), r"'dones' has shape \(9, 1\)"),
        (lambda m: m.update({"actions.npy": array(np.full((90, 1, 1), 3))}), "'actions' must be in 0 to 2"),
        (lambda m: m.update({"ages.npy": array(np.full((90, 1), 3, np.uint16))}), "'ages' must be in 0 to 2"),
        (lambda m: m.update({"last_slots.npy": array(np.full((90, 1), 5, np.int32))}), "'last_slots' points to"),
        (lambda m: m.update({"priorities.npy": array(np.full(90, np.nan))}), "'priorities' must be finite"),
        (lambda m: m.update({"priorities.npy": array(np.zeros(90))}), "'priorities' must not be all 0"),
        (lambda m: m.update({"rewards.npy": array(np.array([[None]] * 90))}), "is not a replay buffer file, or is"),
    ],
)
def test_an_inconsistent_file_raises_and_changes_nothing(change, message, tmp_path):
    model = make("frames prioritized").learn(120)
    model.save_replay_buffer(tmp_path / "replay.npz")
    before = replay_contents(model.replay_buffer)
    rewritten(tmp_path / "replay.npz", tmp_path / "bad.npz", change)
    with pytest.raises(ValueError, match=message) as error:
        model.load_replay_buffer(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value)
    assert_equal(before, replay_contents(model.replay_buffer))


class RunsCode:
    ran = False

    def __reduce__(self):
        return (exec, ("from test_archive import RunsCode; RunsCode.ran = True",))


def test_a_pickle_is_not_run_unless_allow_pickle_is_set(tmp_path):
    (tmp_path / "replay.pkl").write_bytes(pickle.dumps(RunsCode()))
    model = make("dense")
    with pytest.raises(ValueError, match="is a pickle, which can run any code"):
        model.load_replay_buffer(tmp_path / "replay.pkl")
    assert not RunsCode.ran
    with pytest.raises(ValueError, match="must hold a ReplayBuffer"):
        model.load_replay_buffer(tmp_path / "replay.pkl", allow_pickle=True)
    assert RunsCode.ran


def test_a_pickle_of_sb3_is_loaded_with_allow_pickle(tmp_path):
    reference = DQN("MlpPolicy", TimeoutEnv(), buffer_size=90, seed=0).learn(140)
    reference.save_replay_buffer(tmp_path / "replay")
    model = make("dense")
    model.load_replay_buffer(tmp_path / "replay", allow_pickle=True)
    assert type(model.replay_buffer) is ScratchReplayBuffer
    assert_equal(replay_contents(reference.replay_buffer), replay_contents(model.replay_buffer))


def test_other_buffer_classes_are_loaded_from_pickles_by_default(tmp_path):
    def make_model():
        env = gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=4, continuous=False), 8)
        return ScratchDQN("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=20, seed=0)

    model = make_model().learn(60)
    model.save_replay_buffer(tmp_path / "replay")
    assert (tmp_path / "replay.pkl").exists()
    loaded = make_model()
    loaded.load_replay_buffer(tmp_path / "replay", truncate_last_traj=False)
    assert isinstance(loaded.replay_buffer, HerReplayBuffer)


def test_a_file_of_arrays_is_not_loaded_for_another_buffer_class(tmp_path):
    env = gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=4, continuous=False), 8)
    ScratchDQN("MultiInputPolicy", env).save_replay_buffer(tmp_path / "replay")
    model = ScratchDQN("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=20, seed=0)
    with pytest.raises(ValueError, match="must be a pickle of a HerReplayBuffer"):
        model.load_replay_buffer(tmp_path / "replay")
    model.learn(40).save_replay_buffer(tmp_path / "replay")
    model.load_replay_buffer(tmp_path / "replay", truncate_last_traj=False)  # the .pkl, not the .npz with the same stem
    assert model.replay_buffer.size() == 40


def test_print_options_of_numpy_do_not_matter(tmp_path):
    model = ScratchDQN("MlpPolicy", "CartPole-v1")
    model.save_replay_buffer(tmp_path / "replay")
    with np.printoptions(precision=2):
        ScratchDQN("MlpPolicy", "CartPole-v1").load_replay_buffer(tmp_path / "replay")


def test_the_last_trajectory_is_truncated_on_request(tmp_path):
    model = make("several steps").learn(40)
    model.replay_buffer.dones[39] = 0
    model.save_replay_buffer(tmp_path / "replay")
    for truncate in (True, False):
        loaded = make("several steps")
        loaded.load_replay_buffer(tmp_path / "replay", truncate_last_traj=truncate)
        assert loaded.replay_buffer.store.cuts[39] == truncate


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1, 1, (2,), np.float32),
        gym.spaces.Box(-1, 2, (2,), np.float32),
        gym.spaces.Box(-1, 1, (2, 1), np.float32),
        gym.spaces.Box(-1, 1, (2,), np.float64),
        gym.spaces.Box(0, 255, (100,), np.uint8),
        gym.spaces.Box(0, 254, (100,), np.uint8),
        gym.spaces.Discrete(4),
        gym.spaces.Discrete(5),
        gym.spaces.Dict(a=gym.spaces.Discrete(4)),
        gym.spaces.Dict(b=gym.spaces.Discrete(4)),
        gym.spaces.MultiDiscrete([2, 3]),
        gym.spaces.MultiBinary(3),
    ],
    ids=str,
)
def test_a_buffer_of_other_spaces_raises(space):
    actions = gym.spaces.Discrete(2)
    file = io.BytesIO()
    write_replay_buffer(ScratchReplayBuffer(10, space, actions), file)
    for other in (space, gym.spaces.Box(-1, 3, (2,), np.float32), gym.spaces.Discrete(6)):
        file.seek(0)
        if other is space:
            assert read_replay_archive(file, "it", other, actions, 1, "cpu").size() == 0
            continue
        with pytest.raises(ValueError, match="it has the observation space") as error:
            read_replay_archive(file, "it", other, actions, 1, "cpu")
        assert str(other) in str(error.value)
    file.seek(0)
    with pytest.raises(ValueError, match="it has the action space Discrete"):
        read_replay_archive(file, "it", space, gym.spaces.Discrete(3), 1, "cpu")


def test_arrays_are_not_copied_for_writing(monkeypatch):
    model = make("frames").learn(40)
    written = []
    monkeypatch.setattr(
        replay_files.np.lib.format, "write_array", lambda member, array, **kwargs: written.append(array)
    )
    write_replay_buffer(model.replay_buffer, io.BytesIO())
    obs_store = model.replay_buffer.store.obs_store
    assert isinstance(obs_store, StackedFrames)
    assert any(np.shares_memory(array, obs_store.frames[""]) for array in written)
