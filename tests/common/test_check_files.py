"""Invalid model files, replay buffer files and parameters raise an error and change nothing."""

import copy
import io
import pickle
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import TimeoutEnv, assert_equal, replay_contents
from stable_baselines3 import DQN, PPO, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv

from sb3_scratch_dqn import ScratchDQN


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0).learn(150)
    model.save(folder / "good.zip")
    model.save_replay_buffer(folder / "good.pkl")
    DQN("MlpPolicy", TimeoutEnv()).save(folder / "dqn.zip")
    PPO("MlpPolicy", TimeoutEnv(), n_steps=64, device="cpu").save(folder / "ppo.zip")

    whole = (folder / "good.zip").read_bytes()
    (folder / "text.zip").write_text("not a model")
    (folder / "empty.zip").write_bytes(b"")
    (folder / "truncated.zip").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (folder / "flipped.zip").write_bytes(flipped)
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "not a model")
    with zipfile.ZipFile(folder / "garbled.zip", "w") as archive:
        archive.writestr("data", "not JSON")

    whole = (folder / "good.pkl").read_bytes()
    (folder / "truncated.pkl").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pkl").write_text("not a replay buffer")
    (folder / "empty.pkl").write_bytes(b"")
    (folder / "number.pkl").write_bytes(pickle.dumps(42))
    ScratchDQN("MlpPolicy", "CartPole-v1").save_replay_buffer(folder / "cartpole.pkl")
    two = make_vec_env(TimeoutEnv, n_envs=2)
    ScratchDQN("MlpPolicy", two).save_replay_buffer(folder / "two_envs.pkl")
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.zip", "is not a model file, or is truncated"),
        ("empty.zip", "is not a model file, or is truncated"),
        ("truncated.zip", "is not a model file, or is truncated"),
        ("flipped.zip", "is a damaged model file|is not a model file"),
        ("other.zip", "is not a model file, or is truncated"),
        ("garbled.zip", "is not a model file, or is truncated"),
    ],
)
@pytest.mark.parametrize("method", ["load", "set_parameters"])
def test_a_file_that_is_not_a_model_is_refused(files, name, message, method):
    model = ScratchDQN("MlpPolicy", TimeoutEnv())
    before = model.get_parameters()
    with pytest.raises(ValueError, match=message) as error:
        getattr(model, method)(files / name)
    assert name in str(error.value)
    assert_equal(before, model.get_parameters())


@pytest.mark.parametrize(("name", "policy"), [("dqn.zip", "stable_baselines3.dqn"), ("ppo.zip", "policies")])
def test_a_model_of_another_algorithm_is_refused(files, name, policy):
    with pytest.raises(ValueError, match=r"another algorithm saved it .*from_sb3\(\)") as error:
        ScratchDQN.load(files / name)
    assert policy in str(error.value)


def test_a_missing_file_raises_file_not_found(files):
    for method in (ScratchDQN.load, ScratchDQN("MlpPolicy", TimeoutEnv()).load_replay_buffer):
        with pytest.raises(FileNotFoundError):
            method(files / "nowhere")


def test_a_model_is_loaded_from_a_path_with_or_without_suffix_and_from_an_open_file(files):
    expected = ScratchDQN.load(files / "good.zip").get_parameters()
    assert_equal(expected, ScratchDQN.load(str(files / "good")).get_parameters())
    assert_equal(expected, ScratchDQN.load(io.BytesIO((files / "good.zip").read_bytes())).get_parameters())


@pytest.mark.parametrize("data", ["[]", "3", '{"loss": 1}'])
@pytest.mark.parametrize("method", [ScratchDQN.load, ScratchDQN.from_sb3])
def test_a_model_file_with_other_contents_is_refused(tmp_path, data, method):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.writestr("data", data)
    with pytest.raises(ValueError, match=r"odd.zip'\)"):
        method(tmp_path / "odd.zip")


def test_a_model_file_without_its_parameters_is_refused(files, tmp_path):
    with zipfile.ZipFile(files / "good.zip") as old, zipfile.ZipFile(tmp_path / "odd.zip", "w") as new:
        for name in old.namelist():
            if name != "policy.optimizer.pth":
                new.writestr(name, b"garbage" if name == "policy.pth" else old.read(name))
    with pytest.raises(ValueError, match=r"odd.zip'\) is a damaged model file"):
        ScratchDQN.load(tmp_path / "odd.zip")


@pytest.mark.parametrize("path", [None, 5])
def test_an_invalid_path_is_refused(path):
    with pytest.raises(ValueError, match=f"path={path} must be a path or an open binary file"):
        ScratchDQN.load(path)


def test_an_unknown_setting_is_refused_when_loading(files):
    with pytest.raises(ValueError, match="los='mse' is not a setting of ScratchDQN"):
        ScratchDQN.load(files / "good.zip", los="mse")


@pytest.mark.parametrize("make_env", [lambda: gym.make("CartPole-v1"), lambda: gym.make("Acrobot-v1")])
def test_an_environment_with_other_spaces_is_refused(files, make_env):
    with pytest.raises(ValueError, match=r"^env has the observation space Box.*, but the model's is Box"):
        ScratchDQN.load(files / "good.zip", env=make_env())
    model = ScratchDQN.load(files / "good.zip", env=TimeoutEnv())
    env = model.env
    with pytest.raises(ValueError, match=r"^env has the observation space Box.*, but the model's is Box"):
        model.set_env(make_env())
    assert model.env is env


def test_loading_a_model_with_a_her_buffer_requires_an_environment(tmp_path):
    def env():
        return gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=3, continuous=False), 5)

    model = ScratchDQN("MultiInputPolicy", env(), replay_buffer_class=HerReplayBuffer).learn(50)
    model.save(tmp_path / "her.zip")
    with pytest.raises(ValueError, match="env=None: a HerReplayBuffer needs env"):
        ScratchDQN.load(tmp_path / "her.zip")


def test_a_loaded_model_with_too_small_a_buffer_predicts_but_does_not_train(files):
    model = ScratchDQN.load(files / "good.zip", env=TimeoutEnv(), buffer_size=1)
    model.predict(np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="buffer_size=1 must be at least batch_size=32"):
        model.learn(10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device='gpu' must be 'auto' or a device of PyTorch"),
        ({"device": "cuda:99"}, "device='cuda:99' must be 'cuda:0' to"),
        ({"env": 5}, "env=5 must be an environment, or the name of one"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
    ],
)
def test_invalid_arguments_of_load(files, arguments, message):
    with pytest.raises(ValueError, match=message):
        ScratchDQN.load(files / "good.zip", **arguments)


def test_incompatible_parameters_leave_the_model_unchanged():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0)
    before = model.get_parameters()
    before = {name: {key: th.clone(v) if th.is_tensor(v) else v for key, v in d.items()} for name, d in before.items()}
    wrong = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=1).get_parameters()
    wrong["policy"]["q_net.q_net.2.weight"] = th.zeros(3, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.set_parameters(wrong)
    assert_equal(before, model.get_parameters())
    with pytest.raises(ValueError, match="parameters of nonsense were given, but the model has only policy"):
        model.set_parameters({**ScratchDQN("MlpPolicy", TimeoutEnv()).get_parameters(), "nonsense": {}})
    assert_equal(before, model.get_parameters())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"policy": None, "policy.optimizer": {}}, "parameters of policy must be a state_dict, but are None"),
        ({"policy": {}, "policy.optimizer": {}}, "parameters of policy.optimizer must be a state_dict, but are {}"),
        ({1: 2}, "parameters of 1 were given"),
        ({}, "parameters of policy, policy.optimizer are missing"),
    ],
)
def test_parameters_that_are_not_state_dicts_are_refused(parameters, message):
    model = ScratchDQN("MlpPolicy", TimeoutEnv())
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(ValueError, match=message):
        model.set_parameters(parameters)
    assert_equal(model.policy.state_dict(), before)


def test_the_state_of_another_optimiser_is_refused():
    def trained(**policy_kwargs):
        return ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0, policy_kwargs=policy_kwargs).learn(120)

    model, small, sgd = trained(), trained(net_arch=[8, 8]), trained(optimizer_class=th.optim.SGD)
    before = copy.deepcopy(model.get_parameters())
    for other, message in ((small, "has a parameter of shape"), (sgd, "is a Adam, but its new state has no")):
        mixed = {
            "policy": trained().get_parameters()["policy"],
            "policy.optimizer": other.policy.optimizer.state_dict(),
        }
        with pytest.raises(ValueError, match=message):
            model.set_parameters(mixed)
        assert_equal(before, model.get_parameters())
    model.learn(50)


def test_a_pickle_of_another_object_is_refused(files):
    with pytest.raises(ValueError, match=r"number.pkl.* must hold a ReplayBuffer, but holds a int"):
        ScratchDQN("MlpPolicy", TimeoutEnv()).load_replay_buffer(files / "number.pkl", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated.pkl", "is not a replay buffer file, or is truncated"),
        ("text.pkl", "is not a replay buffer file, or is truncated"),
        ("empty.pkl", "is not a replay buffer file, or is truncated"),
        ("number.pkl", "is a pickle, which can run any code when it is loaded: .* pass allow_pickle=True"),
        ("cartpole.pkl", "has the observation space Box.*, but the model's is Box"),
        ("two_envs.pkl", "has n_envs=2, but must have n_envs=1"),
    ],
)
def test_an_incompatible_replay_file_is_refused_and_leaves_the_buffer_unchanged(files, name, message):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0).learn(120)
    before = replay_contents(model.replay_buffer)
    with pytest.raises(ValueError, match=message) as error:
        model.load_replay_buffer(files / name)
    assert name in str(error.value)
    assert_equal(before, replay_contents(model.replay_buffer))


@pytest.mark.parametrize("name", ["allow_pickle", "truncate_last_traj"])
def test_flags_of_load_replay_buffer_must_be_booleans(name, tmp_path):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0).learn(20)
    model.save_replay_buffer(tmp_path / "replay.npz")
    with pytest.raises(ValueError, match=f"{name}='no' must be True or False"):
        model.load_replay_buffer(tmp_path / "replay.npz", **{name: "no"})
