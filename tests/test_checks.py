"""Bad input gets one sentence that names it, and changes nothing."""

import copy
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
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.checks import parse_frequency


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("engine", "warp", "choose one of 'auto', 'fused', 'cuda_graph', 'eager'"),
        ("loss", "l1", "choose one of 'huber', 'mse'"),
        ("loss", None, "choose one of"),
        ("exploration_schedule", "cosine", "choose one of 'linear', 'exponential'"),
        ("policy", "LstmPolicy", "choose one of 'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy'"),
        ("buffer_size", 0, "at least 1"),
        ("buffer_size", 1e6 + 0.5, "whole number"),
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
        ("policy", None, "subclass of"),
        ("replay_buffer_class", "ReplayBuffer", "subclass of"),
        ("env", None, "the name of one"),
        ("optimize_memory_usage", "no", "True or False"),
        ("seed", -1, "from 0 to 4294967295"),
        ("seed", "x", "None or a whole number"),
        ("device", "gpu9", "'cpu' or 'cuda:0'"),
        ("verbose", -1, "at least 0"),
        ("policy_kwargs", [64], "must be a dict"),
        ("policy_kwargs", {"net_arhc": [64]}, "choose from net_arch"),
        ("policy_kwargs", {"lr_schedule": 1}, "unknown name 'lr_schedule'"),
        ("replay_buffer_kwargs", {"size": 3}, "choose from handle_timeout_termination"),
        ("replay_buffer_kwargs", {"n_steps": 3}, "choose from handle_timeout_termination"),
        ("policy", ActorCriticPolicy, "subclass of sb3_scratch_dqn.policies.DQNPolicy"),
        ("replay_buffer_class", RolloutBuffer, "subclass of stable_baselines3.common.buffers.ReplayBuffer"),
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
    with pytest.raises(ValueError, match="parameters of nonsense were given, but must be of policy"):
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


def test_a_pickle_of_something_else_is_refused(files):
    with pytest.raises(ValueError, match=r"number.pkl.* must hold a ReplayBuffer, but holds a int"):
        ScratchDQN("MlpPolicy", TimeoutEnv()).load_replay_buffer(files / "number.pkl", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cut.pkl", "is no replay buffer file, or was cut short"),
        ("text.pkl", "is no replay buffer file, or was cut short"),
        ("empty.pkl", "is no replay buffer file, or was cut short"),
        ("number.pkl", "is a pickle, which can run any code when it is loaded: .* pass allow_pickle=True"),
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


@pytest.mark.parametrize(
    ("kwargs", "right"),
    [
        ({"net_arch": "abc"}, r"net_arch='abc' must be a list of whole numbers"),
        ({"net_arch": [64, 0]}, r"net_arch=\[64, 0\] must be a list of whole numbers"),
        ({"activation_fn": "relu"}, r"activation_fn='relu' must be a subclass of torch.nn.Module, or a function"),
        ({"activation_fn": th.relu}, r"activation_fn=.*relu.* must be a subclass of torch.nn.Module, or a function"),
        ({"activation_fn": lambda: th.relu}, "must be a subclass of torch.nn.Module, or a function"),
        (
            {"activation_fn": th.nn.ReLU()},
            r"activation_fn=ReLU\(\) must be a subclass of torch.nn.Module, or a function",
        ),
        ({"activation_fn": 3}, "activation_fn=3 must be a subclass of torch.nn.Module, or a function"),
        ({"activation_fn": dict}, "must be a subclass of torch.nn.modules.module.Module"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(kwargs, right):
    with pytest.raises(ValueError, match=right):
        ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=kwargs)


def test_observations_kept_once_need_two_rows():
    kwargs = {"handle_timeout_termination": False}
    with pytest.raises(ValueError, match="buffer_size=1 must be at least 2 with optimize_memory_usage=True"):
        ScratchDQN(
            "MlpPolicy",
            TimeoutEnv(),
            buffer_size=1,
            batch_size=1,
            optimize_memory_usage=True,
            replay_buffer_kwargs=kwargs,
        )


def test_numbers_of_numpy_are_numbers():
    model = ScratchDQN(
        "MlpPolicy",
        TimeoutEnv(),
        learning_rate=np.float32(1e-3),
        batch_size=np.int64(8),
        buffer_size=np.int32(100),
        stats_window_size=np.int64(5),
        target_update_interval=np.int64(10),
        train_freq=np.int64(2),
        gamma=np.float32(0.9),
        seed=np.int64(3),
    ).learn(1.5e2)
    assert model.num_timesteps == 150
    assert model.ep_info_buffer.maxlen == 5


@pytest.mark.parametrize("steps", ["many", None, float("nan"), -1])
def test_a_duration_that_is_none_is_refused(steps):
    with pytest.raises(ValueError, match=r"total_timesteps=.* must be a number of environment steps"):
        ScratchDQN("MlpPolicy", TimeoutEnv()).learn(steps)
    with pytest.raises(ValueError, match="log_interval=0 must be"):
        ScratchDQN("MlpPolicy", TimeoutEnv()).learn(10, log_interval=0)


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
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match=f"path={path} must be a path or an open binary file"):
        ScratchDQN.load(path)


def test_a_setting_that_there_is_not_is_refused_when_loading(files):
    with pytest.raises(ValueError, match="los='mse' is no setting of ScratchDQN"):
        ScratchDQN.load(files / "good.zip", los="mse")


def test_the_state_of_another_optimiser_is_refused():
    def model(**policy_kwargs):
        return ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0, policy_kwargs=policy_kwargs).learn(120)

    ours, small, sgd = model(), model(net_arch=[8, 8]), model(optimizer_class=th.optim.SGD)
    before = copy.deepcopy(ours.get_parameters())
    for other, what in ((small, "has a parameter of shape"), (sgd, "is a Adam, but its new state has no")):
        mixed = {"policy": model().get_parameters()["policy"], "policy.optimizer": other.policy.optimizer.state_dict()}
        with pytest.raises(ValueError, match=what):
            ours.set_parameters(mixed)
        assert_equal(before, ours.get_parameters())
    ours.learn(50)


def test_a_small_buffer_serves_a_loaded_model_until_it_trains(files):
    model = ScratchDQN.load(files / "good.zip", env=TimeoutEnv(), buffer_size=1)
    model.predict(np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="buffer_size=1 must be at least batch_size=32"):
        model.learn(10)


def test_dict_observations_need_the_policy_for_them():
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        ScratchDQN("MlpPolicy", DictEnv())
