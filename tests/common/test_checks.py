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
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from torch import nn

from sb3_scratch_dqn import MlpPolicy, ScratchDQN
from sb3_scratch_dqn.common.checks import brief, parse_frequency
from sb3_scratch_dqn.values.heads import CategoricalHead


class WithoutArguments(ReplayBuffer):
    def __init__(self, buffer_size, observation_space, action_space):
        pass


def steep(progress):
    return 7 if 0 < progress < 0.5 else 0.5


def nothing(progress):
    return None


def not_a_number(progress):
    return float("nan")


def a_string(progress):
    return "x"


def no_argument():
    return 0.5


def nothing_made(parameters, lr):
    return None


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
        ("policy", ActorCriticPolicy, "subclass of sb3_scratch_dqn.networks.policies.DQNPolicy"),
        ("replay_buffer_class", RolloutBuffer, "subclass of stable_baselines3.common.buffers.ReplayBuffer"),
        # Taken in silence before
        ("replay_buffer_kwargs", {"handle_timeout_termination": "no"}, "True or False"),
        ("replay_buffer_kwargs", {"prioritized": 1}, "True or False"),
        ("replay_buffer_kwargs", {"alpha": 0.5}, "needs prioritized=True"),
        ("replay_buffer_kwargs", {"prioritized": False, "beta": 0.5}, "needs prioritized=True"),
        ("replay_buffer_kwargs", 0, "must be a dict"),
        ("policy_kwargs", {"normalize_images": "maybe"}, "True or False"),
        ("device", "cuda:99", "on this machine"),
        ("exploration_schedule", steep, "exploration_schedule(0.25)=7 must be a number between 0 and 1"),
        ("exploration_schedule", nothing, "exploration_schedule(1.0)=None must be a number between 0 and 1"),
        # Raw before
        ("policy_kwargs", {"optimizer_class": "Adam"}, "subclass of torch.optim.optimizer.Optimizer"),
        ("policy_kwargs", {"optimizer_class": nn.ReLU}, "subclass of torch.optim.optimizer.Optimizer"),
        ("policy_kwargs", {"optimizer_class": th.optim.LBFGS}, "by a closure"),
        ("policy_kwargs", {"optimizer_class": nothing_made}, "must make a torch.optim.Optimizer, but made None"),
        ("policy_kwargs", {"optimizer_kwargs": 5}, "must be a dict"),
        ("policy_kwargs", {"optimizer_kwargs": {"lr": 1}}, "unknown name 'lr'"),
        (
            "policy_kwargs",
            {"optimizer_kwargs": {"betas": (2, 2)}},
            "cannot be used by optimizer_class=Adam: Inv",
        ),
        ("policy_kwargs", {"features_extractor_class": "Flatten"}, "subclass of torch.nn.modules.module.Module"),
        ("policy_kwargs", {"features_extractor_class": nn.Flatten}, "with features_dim, the number of features"),
        (
            "policy_kwargs",
            {"features_extractor_class": no_argument},
            "cannot be made with features_extractor_kwargs=",
        ),
        ("policy_kwargs", {"features_extractor_kwargs": [1]}, "must be a dict"),
        ("policy_kwargs", {"features_extractor_kwargs": {"x": 1}}, "unknown name 'x'"),
        ("policy", "MultiInputPolicy", "use 'MlpPolicy', or 'CnnPolicy' for images"),
        ("learning_rate", not_a_number, "learning_rate(1.0)=nan must be a number of at least 0"),
        ("learning_rate", a_string, "learning_rate(1.0)='x' must be a number of at least 0"),
        ("learning_rate", no_argument, "raises TypeError"),
        ("exploration_schedule", no_argument, "raises TypeError"),
        ("verbose", None, "at least 0"),
        ("verbose", np.array([1, 2]), "at least 0"),
        ("env", 5, "must be an environment, or the name of one"),
        ("policy", np.array([1, 2]), "subclass of sb3_scratch_dqn.networks.policies.DQNPolicy"),
        ("gamma", 10**400, "between 0 and 1"),
        ("batch_size", 10**400, "whole number"),
        ("tensorboard_log", 5, "None or the path of a folder"),
        ("_init_setup_model", "no", "True or False"),
        ("check_finite", "always", "'auto', True or False"),
        ("train_freq", TrainFreq(0, TrainFrequencyUnit.STEP), "at least 1"),
        ("target_update_interval", TrainFreq(-1, TrainFrequencyUnit.EPISODE), "at least 1"),
        ("device", "meta", "cannot be used on this machine"),
        ("policy_kwargs", {"head_kwargs": {"x": 1}}, "there are none to choose from"),
        ("policy_kwargs", {"net_arch": [2**63]}, "whole numbers of at least 1"),
        ("replay_buffer_kwargs", {"frames": np.array("auto")}, "'auto', True or False"),
        ("replay_buffer_class", WithoutArguments, "cannot be made with replay_buffer_kwargs={}: TypeError"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_would_be_right(name, value, right):
    names = [name, *(value if isinstance(value, dict) else ())]  # in a dict it is the inner one that is wrong
    with pytest.raises(ValueError, match="|".join(names)) as error:
        ScratchDQN(**{"policy": "MlpPolicy", "env": TimeoutEnv(), name: value})
    message = str(error.value)
    inner = next(iter(value.values())) if isinstance(value, dict) and value else value
    if not callable(value) or isinstance(value, type):  # of a function, what it gave is shown
        assert any(brief(one) in message or getattr(one, "__name__", "?") in message for one in (value, inner))
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


# Arguments of methods


def model_and_file(tmp_path):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0).learn(20)
    model.save(tmp_path / "model.zip")
    return model, tmp_path / "model.zip"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback": 5}, "callback=5 must be None, a BaseCallback, a function"),
        ({"callback": [None]}, "has None among its callbacks"),
        ({"callback": no_argument}, "must be None, a BaseCallback, a function of local and global variables"),
        ({"callback": int}, "callback=<class 'int'> must be None, a BaseCallback"),
        ({"callback": ["x"]}, "callback='x' must be None"),
        ({"tb_log_name": 5}, "tb_log_name=5 must be a string"),
        ({"progress_bar": "yes"}, "progress_bar='yes' must be True or False"),
        ({"reset_num_timesteps": None}, "reset_num_timesteps=None must be True or False"),
        ({"total_timesteps": 10**400}, "must be a number of environment steps"),
        ({"log_interval": 0.5}, "log_interval=0.5 must be a whole number of at least 1"),
    ],
)
def test_arguments_of_learn(arguments, message):
    model = ScratchDQN("MlpPolicy", TimeoutEnv())
    with pytest.raises(ValueError, match=message):
        model.learn(**{"total_timesteps": 10, **arguments})


def test_callbacks_of_every_form_are_called():
    seen = []
    ScratchDQN("MlpPolicy", TimeoutEnv()).learn(
        4, lambda local, glob: seen.append(local["num_collected_steps"]) or True
    )
    assert seen == [1, 2, 3, 4]
    ScratchDQN("MlpPolicy", TimeoutEnv()).learn(4, [BaseCallbackThatCounts(seen)])
    assert len(seen) == 8


class BaseCallbackThatCounts(BaseCallback):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def _on_step(self):
        self.seen.append(self.num_timesteps)
        return True


@pytest.mark.parametrize("name", ["gradient_steps", "batch_size"])
@pytest.mark.parametrize("value", [None, "x", -1, 2.5, float("nan"), [1], np.array([1, 2]), 10**400])
def test_arguments_of_train(name, value):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0).learn(20)
    with pytest.raises(ValueError, match=f"{name}=.* must be a whole number"):
        model.train(**{"gradient_steps": 1, name: value})
    model.train(2.0, batch_size=np.int64(8))


OBSERVATIONS = ["abc", np.array(["a", "b", "c"]), np.array([None, 1, 2]), [[1, 2], [3]], np.ones(3) * 1j, object()]


@pytest.mark.parametrize("observation", OBSERVATIONS, ids=str)
def test_observations_that_are_no_numbers(observation):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), exploration_initial_eps=1.0)
    for function in (
        model.q_values,
        model.predict,
        lambda one: model.predict(one, deterministic=True),
        model.policy.predict,
    ):
        with pytest.raises(ValueError, match=r"^observation (has shape|must be an array of numbers)"):
            function(observation)


def test_observations_of_another_kind_of_space():
    with pytest.raises(ValueError, match="observation is a dict, but must be an array of Box"):
        ScratchDQN("MlpPolicy", TimeoutEnv()).predict({"vector": np.ones(3)})
    model = ScratchDQN("MultiInputPolicy", DictEnv())
    with pytest.raises(ValueError, match="observation is a ndarray, but must be a dict with"):
        model.predict(np.ones(3))
    with pytest.raises(ValueError, match=r"observation is \['vector'\], but must be a dict with the keys"):
        model.q_values({"vector": np.ones(3)})
    sample = model.observation_space.sample()
    with pytest.raises(ValueError, match=r"observation\['vector'\] must be an array of numbers"):
        model.q_values({**sample, "vector": np.array(["a", "b", "c"])})


def test_policies_for_other_observations():
    with pytest.raises(ValueError, match="need policy='MultiInputPolicy'"):
        ScratchDQN(MlpPolicy, DictEnv())
    with pytest.raises(AssertionError, match="only with images"):
        ScratchDQN("CnnPolicy", TimeoutEnv())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device='gpu' must be 'auto' or a device of PyTorch"),
        ({"device": "cuda:99"}, "device='cuda:99' must be 'cuda:0' to"),
        ({"env": 5}, "env=5 must be an environment, or the name of one"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
    ],
)
def test_arguments_of_load(arguments, message, tmp_path):
    _, path = model_and_file(tmp_path)
    with pytest.raises(ValueError, match=message):
        ScratchDQN.load(path, **arguments)


@pytest.mark.parametrize("value", [5, "gamma", [5]])
@pytest.mark.parametrize("name", ["exclude", "include"])
def test_names_of_attributes_to_save(name, value, tmp_path):
    model, path = model_and_file(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{name}=.* must be None or a list of names"):
        model.save(path, **{name: value})
    assert path.read_bytes() == before
    model.save(path, exclude=(one for one in ["gamma"]))
    assert ScratchDQN.load(path).gamma == 0.99


def test_places_for_replay(tmp_path):
    model, _ = model_and_file(tmp_path)
    with pytest.raises(ValueError, match="path='' must name a file"):
        model.save_replay_buffer("")
    with pytest.raises(ValueError, match="must be a path or an open binary file"):
        model.save_replay_buffer(io.StringIO())


def test_environments_to_go_on_in(tmp_path):
    model, _ = model_and_file(tmp_path)
    with pytest.raises(ValueError, match="env=5 must be an environment"):
        model.set_env(5)


def test_complex_rewards_are_refused():
    n = 4
    data = {
        "observations": np.zeros((n, 3), np.float32),
        "actions": np.zeros(n, int),
        "rewards": np.ones(n) * 1j,
        "next_observations": np.zeros((n, 3), np.float32),
        "terminations": np.zeros(n, bool),
    }
    with pytest.raises(ValueError, match=r"data\['rewards'\] has shape \(4,\) and dtype complex128, but must"):
        ScratchDQN("MlpPolicy", TimeoutEnv()).load_transitions(data)


def test_a_model_that_was_not_set_up_says_so():
    with pytest.raises(ValueError, match=r"_init_setup_model=False left the model without a policy"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), _init_setup_model=False).learn(10)


def test_a_schedule_that_leaves_its_range_in_training_is_named():
    def between(progress):
        return 2.0 if 0.55 < progress < 0.65 else 0.5

    with pytest.raises(ValueError, match=r"exploration_schedule\(0.6\d*\)=2.0 must be a number between 0 and 1"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), exploration_schedule=between).learn(40)

    def rate(progress):
        return float("nan") if 0.55 < progress < 0.65 else 0.5

    with pytest.raises(ValueError, match=r"learning_rate\(0.6\d*\)=nan must be a number of at least 0"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), learning_rate=rate, learning_starts=0).learn(40)


def test_long_values_are_shown_on_one_line():
    assert brief(np.zeros((30, 30))).endswith("...")
    assert "\n" not in brief(np.zeros((30, 30)))
    assert brief("a b") == "'a b'"


@pytest.mark.parametrize(("v_min", "v_max"), [(0.0, 1e-300), (1e8, 1e8 + 1)])
def test_atoms_that_coincide_are_refused(v_min, v_max):
    with pytest.raises(ValueError, match="are too close for 51 atoms in 32 bits"):
        CategoricalHead(v_min=v_min, v_max=v_max)
    CategoricalHead(n_atoms=2, v_min=0.0, v_max=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "x"}, "seed='x' must be None or a whole number"),
        ({"verbose": float("nan")}, "verbose=nan must be"),
        ({"device": "gpu9"}, "device='gpu9' must be"),
        ({"gamma": 2}, "gamma=2 must be"),
    ],
)
def test_settings_of_a_conversion_are_looked_at(settings, message):
    with pytest.raises(ValueError, match=message):
        ScratchDQN.from_sb3(DQN("MlpPolicy", TimeoutEnv()), **settings)


def test_a_conversion_of_a_file_takes_the_name_of_an_environment(tmp_path):
    DQN("MlpPolicy", "CartPole-v1").save(tmp_path / "model.zip")
    assert ScratchDQN.from_sb3(tmp_path / "model.zip", env="CartPole-v1").n_envs == 1
    with pytest.raises(ValueError, match="env=5 must be an environment"):
        ScratchDQN.from_sb3(tmp_path / "model.zip", env=5)


@pytest.mark.parametrize("name", ["allow_pickle", "truncate_last_traj"])
def test_flags_of_loading_replay_are_truth_values(name, tmp_path):
    model, _ = model_and_file(tmp_path)
    model.save_replay_buffer(tmp_path / "replay.npz")
    with pytest.raises(ValueError, match=f"{name}='no' must be True or False"):
        model.load_replay_buffer(tmp_path / "replay.npz", **{name: "no"})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"policy": None, "policy.optimizer": {}}, "parameters of policy must be a state_dict, but are None"),
        ({"policy": {}, "policy.optimizer": {}}, "parameters of policy.optimizer must be a state_dict, but are {}"),
        ({1: 2}, "parameters of 1 were given"),
        ({}, "parameters of policy, policy.optimizer are missing"),
    ],
)
def test_parameters_of_the_wrong_kind(parameters, message):
    model = ScratchDQN("MlpPolicy", TimeoutEnv())
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(ValueError, match=message):
        model.set_parameters(parameters)
    assert_equal(model.policy.state_dict(), before)


def test_actions_that_their_masks_forbid_are_refused():
    n = 4
    data = {
        "observations": np.zeros((n, 3), np.float32),
        "actions": np.array([0, 1, 2, 0]),
        "rewards": np.ones(n),
        "next_observations": np.zeros((n, 3), np.float32),
        "terminations": np.zeros(n, bool),
        "action_masks": np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]], bool),
        "next_action_masks": np.ones((n, 3), bool),
    }
    model = ScratchDQN("MlpPolicy", TimeoutEnv())
    with pytest.raises(ValueError, match=r"data\['actions'\] has 1 in row 1, which"):
        model.load_transitions(data)
    data["rewards"] = np.ma.masked_array(np.ones(n), mask=[1, 0, 0, 0])
    data["actions"][1] = 0
    with pytest.raises(ValueError, match=r"data\['rewards'\] has masked values"):
        model.load_transitions(data)
