"""Bad input gets one sentence that names it, and changes nothing."""

import io
import pickle
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import DictEnv, TimeoutEnv, assert_equal, replay_contents
from stable_baselines3 import DQN, PPO, HerReplayBuffer
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.dqn.policies import MlpPolicy as ReferencePolicy

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.checks import parse_frequency


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("engine", "warp", "choose one of 'auto', 'eager'"),
        ("loss", "l1", "choose one of 'huber', 'mse'"),
        ("loss", None, "choose one of"),
        ("exploration_schedule", "cosine", "choose one of 'linear', 'exponential'"),
        ("policy", "LstmPolicy", "choose one of 'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy'"),
        ("buffer_size", 0, "at least 1"),
        ("buffer_size", 1e6, "whole number"),
        ("buffer_size", 16, "must be at least batch_size=32"),
        ("batch_size", -1, "at least 1"),
        ("batch_size", True, "whole number"),
        ("learning_starts", -1, "at least 0"),
        ("train_freq", 0, "at least 1"),
        ("train_freq", 2.5, "whole number"),
        ("train_freq", (4, "day"), '(1, "episode")'),
        ("train_freq", (-1, "episode"), "at least 1"),
        ("gradient_steps", -2, "at least -1"),
        ("n_steps", 0, "at least 1"),
        ("target_update_interval", 0, "at least 1"),
        ("target_update_interval", (10, "minute"), '(1, "episode")'),
        ("target_update_interval", (1, 2, 3), "whole number"),
        ("tau", 1.5, "between 0 and 1"),
        ("gamma", -0.1, "between 0 and 1"),
        ("gamma", float("nan"), "between 0 and 1"),
        ("gamma", "high", "between 0 and 1"),
        ("exploration_fraction", 2, "between 0 and 1"),
        ("exploration_initial_eps", 1.1, "between 0 and 1"),
        ("exploration_final_eps", -0.05, "between 0 and 1"),
        ("exploration_decay", 1.01, "between 0 and 1"),
        ("max_grad_norm", 0, "above 0"),
        ("learning_rate", -1e-3, "at least 0"),
        ("learning_rate", "fast", "at least 0"),
        ("stats_window_size", 0, "at least 1"),
        ("stats_window_size", "all", "whole number"),
        ("policy", ReferencePolicy, "subclass of sb3_scratch_dqn.DQNPolicy"),
        ("replay_buffer_class", RolloutBuffer, "subclass of ReplayBuffer"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_would_be_right(name, value, right):
    with pytest.raises(ValueError, match=name) as error:
        ScratchDQN(**{"policy": "MlpPolicy", "env": TimeoutEnv(), name: value})
    message = str(error.value)
    assert repr(value) in message
    assert right in message
    assert "\n" not in message


def test_a_schedule_that_leaves_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"exploration_schedule\(0.0\)=-1.0 must be a number between 0 and 1"):
        ScratchDQN(
            "MlpPolicy", TimeoutEnv(), exploration_schedule=lambda progress_remaining: 2 * progress_remaining - 1
        )


def test_infinity_leaves_gradients_alone():
    ScratchDQN("MlpPolicy", TimeoutEnv(), max_grad_norm=float("inf"), learning_starts=0).learn(20)


@pytest.mark.parametrize(
    ("space", "error", "right"),
    [
        (gym.spaces.Box(-1, 1, (2,)), AssertionError, "needs a Discrete one"),
        (gym.spaces.MultiDiscrete([2, 2]), AssertionError, "needs a Discrete one"),
        (gym.spaces.Discrete(3, start=1), ValueError, "must begin with 0"),
    ],
)
def test_other_action_spaces_are_refused(space, error, right):
    env = TimeoutEnv()
    env.action_space = space
    with pytest.raises(error, match=right) as caught:
        ScratchDQN("MlpPolicy", env)
    assert str(space) in str(caught.value)


def test_episodes_need_one_environment():
    with pytest.raises(ValueError, match=r"train_freq=\(1, 'episode'\) .* env has 2"):
        ScratchDQN("MlpPolicy", make_vec_env(TimeoutEnv, n_envs=2), train_freq=(1, "episode"))


def test_frequencies_are_read_in_every_form():
    assert parse_frequency("x", 4) == (4, "step")
    assert parse_frequency("x", np.int64(4)) == (4, "step")
    assert parse_frequency("x", (4, "step")) == (4, "step")
    assert parse_frequency("x", [2, "episode"]) == (2, "episode")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0).learn(150)
    model.save(folder / "good.zip")
    model.save_replay_buffer(folder / "good.pkl")
    DQN("MlpPolicy", TimeoutEnv()).save(folder / "dqn.zip")
    PPO("MlpPolicy", TimeoutEnv(), n_steps=64, device="cpu").save(folder / "ppo.zip")

    whole = (folder / "good.zip").read_bytes()
    (folder / "text.zip").write_text("no model")
    (folder / "empty.zip").write_bytes(b"")
    (folder / "cut.zip").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (folder / "flipped.zip").write_bytes(flipped)
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "no model")
    with zipfile.ZipFile(folder / "garbled.zip", "w") as archive:
        archive.writestr("data", "no JSON")

    whole = (folder / "good.pkl").read_bytes()
    (folder / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pkl").write_text("no replay")
    (folder / "empty.pkl").write_bytes(b"")
    (folder / "number.pkl").write_bytes(pickle.dumps(42))
    ScratchDQN("MlpPolicy", "CartPole-v1").save_replay_buffer(folder / "cartpole.pkl")
    two = make_vec_env(TimeoutEnv, n_envs=2)
    ScratchDQN("MlpPolicy", two).save_replay_buffer(folder / "two_envs.pkl")
    return folder


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("text.zip", "is no model file, or was cut short"),
        ("empty.zip", "is no model file, or was cut short"),
        ("cut.zip", "is no model file, or was cut short"),
        ("flipped.zip", "is a damaged model file|is no model file"),
        ("other.zip", "is no model file, or was cut short"),
        ("garbled.zip", "is no model file, or was cut short"),
    ],
)
@pytest.mark.parametrize("method", ["load", "set_parameters"])
def test_a_file_that_is_no_model_is_refused(files, name, what, method):
    model = ScratchDQN("MlpPolicy", TimeoutEnv())
    before = model.get_parameters()
    with pytest.raises(ValueError, match=what) as error:
        getattr(model, method)(files / name)
    assert name in str(error.value)
    assert_equal(before, model.get_parameters())


@pytest.mark.parametrize(("name", "policy"), [("dqn.zip", "stable_baselines3.dqn"), ("ppo.zip", "policies")])
def test_a_model_of_another_algorithm_is_refused(files, name, policy):
    with pytest.raises(ValueError, match=r"another algorithm saved it .*from_sb3\(\)") as error:
        ScratchDQN.load(files / name)
    assert policy in str(error.value)


def test_a_missing_file_is_missing(files):
    for method in (ScratchDQN.load, ScratchDQN("MlpPolicy", TimeoutEnv()).load_replay_buffer):
        with pytest.raises(FileNotFoundError):
            method(files / "nowhere")


def test_a_model_is_loaded_from_a_path_with_or_without_its_ending_and_from_an_open_file(files):
    expected = ScratchDQN.load(files / "good.zip").get_parameters()
    assert_equal(expected, ScratchDQN.load(str(files / "good")).get_parameters())
    assert_equal(expected, ScratchDQN.load(io.BytesIO((files / "good.zip").read_bytes())).get_parameters())


def test_parameters_that_do_not_fit_leave_the_model_as_it_was():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0)
    before = model.get_parameters()
    before = {name: {key: th.clone(v) if th.is_tensor(v) else v for key, v in d.items()} for name, d in before.items()}
    wrong = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=1).get_parameters()
    wrong["policy"]["q_net.q_net.2.weight"] = th.zeros(3, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.set_parameters(wrong)
    assert_equal(before, model.get_parameters())
    with pytest.raises(ValueError, match="nonsense"):
        model.set_parameters({**ScratchDQN("MlpPolicy", TimeoutEnv()).get_parameters(), "nonsense": {}})
    assert_equal(before, model.get_parameters())


@pytest.mark.parametrize("make_env", [lambda: gym.make("CartPole-v1"), lambda: gym.make("Acrobot-v1")])
def test_an_environment_of_other_spaces_is_refused(files, make_env):
    with pytest.raises(ValueError, match=r"^env has the observation space Box.*, but the model's is Box"):
        ScratchDQN.load(files / "good.zip", env=make_env())
    model = ScratchDQN.load(files / "good.zip", env=TimeoutEnv())
    env = model.env
    with pytest.raises(ValueError, match=r"^env has the observation space Box.*, but the model's is Box"):
        model.set_env(make_env())
    assert model.env is env


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cut.pkl", "is no replay buffer file, or was cut short"),
        ("text.pkl", "is no replay buffer file, or was cut short"),
        ("empty.pkl", "is no replay buffer file, or was cut short"),
        ("number.pkl", "must hold a ReplayBuffer, but holds a int"),
        ("cartpole.pkl", "has the observation space Box.*, but the model's is Box"),
        ("two_envs.pkl", "has n_envs=2, but must have n_envs=1"),
    ],
)
def test_a_replay_file_that_does_not_fit_is_refused_and_the_replay_stays(files, name, what):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0).learn(120)
    before = replay_contents(model.replay_buffer)
    with pytest.raises(ValueError, match=what) as error:
        model.load_replay_buffer(files / name)
    assert name in str(error.value)
    assert_equal(before, replay_contents(model.replay_buffer))


def test_hindsight_needs_an_environment(tmp_path):
    def env():
        return gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=3, continuous=False), 5)

    model = ScratchDQN("MultiInputPolicy", env(), replay_buffer_class=HerReplayBuffer).learn(50)
    model.save(tmp_path / "her.zip")
    with pytest.raises(ValueError, match="env=None: a HerReplayBuffer needs env"):
        ScratchDQN.load(tmp_path / "her.zip")


def test_folding_steps_needs_a_buffer_that_can():
    from stable_baselines3.common.buffers import ReplayBuffer

    with pytest.warns(UserWarning, match="`n_steps=3` is ignored"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), n_steps=3, replay_buffer_class=ReplayBuffer, buffer_size=100)


def test_settings_of_the_replay_that_contradict_the_model_are_refused():
    with pytest.raises(ValueError, match=r"replay_buffer_kwargs\['n_steps'\]=3 must be given to ScratchDQN itself"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), replay_buffer_kwargs={"n_steps": 3})
    ScratchDQN("MlpPolicy", TimeoutEnv(), n_steps=3, replay_buffer_kwargs={"n_steps": 3, "gamma": 0.99})


def test_a_small_buffer_serves_a_loaded_model_until_it_trains(files):
    model = ScratchDQN.load(files / "good.zip", env=TimeoutEnv(), buffer_size=1)
    model.predict(np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="buffer_size=1 must be at least batch_size=32"):
        model.learn(10)


def test_dict_observations_need_the_policy_for_them():
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        ScratchDQN("MlpPolicy", DictEnv())
