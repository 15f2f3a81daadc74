"""Invalid arguments of methods raise an error that names the argument and change nothing."""

import io

import numpy as np
import pytest
from helpers import DictEnv, TimeoutEnv
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback

from sb3_scratch_dqn import ScratchDQN


def model_and_file(tmp_path):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0).learn(20)
    model.save(tmp_path / "model.zip")
    return model, tmp_path / "model.zip"


def without_parameters():
    return 0.5


@pytest.mark.parametrize("steps", ["many", None, float("nan"), -1])
def test_invalid_durations_of_learn(steps):
    with pytest.raises(ValueError, match=r"total_timesteps=.* must be a number of environment steps"):
        ScratchDQN("MlpPolicy", TimeoutEnv()).learn(steps)
    with pytest.raises(ValueError, match="log_interval=0 must be"):
        ScratchDQN("MlpPolicy", TimeoutEnv()).learn(10, log_interval=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback": 5}, "callback=5 must be None, a BaseCallback, a function"),
        ({"callback": [None]}, "has None among its callbacks"),
        ({"callback": without_parameters}, "must be None, a BaseCallback, a function of local and global variables"),
        ({"callback": int}, "callback=<class 'int'> must be None, a BaseCallback"),
        ({"callback": ["x"]}, "callback='x' must be None"),
        ({"tb_log_name": 5}, "tb_log_name=5 must be a string"),
        ({"progress_bar": "yes"}, "progress_bar='yes' must be True or False"),
        ({"reset_num_timesteps": None}, "reset_num_timesteps=None must be True or False"),
        ({"total_timesteps": 10**400}, "must be a number of environment steps"),
        ({"log_interval": 0.5}, "log_interval=0.5 must be a whole number of at least 1"),
    ],
)
def test_invalid_arguments_of_learn(arguments, message):
    model = ScratchDQN("MlpPolicy", TimeoutEnv())
    with pytest.raises(ValueError, match=message):
        model.learn(**{"total_timesteps": 10, **arguments})


def test_callbacks_of_every_form_are_called():
    seen = []
    ScratchDQN("MlpPolicy", TimeoutEnv()).learn(
        4, lambda local, glob: seen.append(local["num_collected_steps"]) or True
    )
    assert seen == [1, 2, 3, 4]
    ScratchDQN("MlpPolicy", TimeoutEnv()).learn(4, [RecordingCallback(seen)])
    assert len(seen) == 8


class RecordingCallback(BaseCallback):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def _on_step(self):
        self.seen.append(self.num_timesteps)
        return True


def test_a_model_that_is_not_set_up_does_not_train():
    with pytest.raises(ValueError, match=r"_init_setup_model=False left the model without a policy"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), _init_setup_model=False).learn(10)


def test_a_schedule_that_becomes_invalid_during_training_is_named():
    def invalid_epsilon(progress):
        return 2.0 if 0.55 < progress < 0.65 else 0.5

    with pytest.raises(ValueError, match=r"exploration_schedule\(0.6\d*\)=2.0 must be a number between 0 and 1"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), exploration_schedule=invalid_epsilon).learn(40)

    def invalid_learning_rate(progress):
        return float("nan") if 0.55 < progress < 0.65 else 0.5

    with pytest.raises(ValueError, match=r"learning_rate\(0.6\d*\)=nan must be a number of at least 0"):
        ScratchDQN("MlpPolicy", TimeoutEnv(), learning_rate=invalid_learning_rate, learning_starts=0).learn(40)


@pytest.mark.parametrize("name", ["gradient_steps", "batch_size"])
@pytest.mark.parametrize("value", [None, "x", -1, 2.5, float("nan"), [1], np.array([1, 2]), 10**400])
def test_invalid_arguments_of_train(name, value):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), learning_starts=0).learn(20)
    with pytest.raises(ValueError, match=f"{name}=.* must be a whole number"):
        model.train(**{"gradient_steps": 1, name: value})
    model.train(2.0, batch_size=np.int64(8))


OBSERVATIONS = ["abc", np.array(["a", "b", "c"]), np.array([None, 1, 2]), [[1, 2], [3]], np.ones(3) * 1j, object()]


@pytest.mark.parametrize("observation", OBSERVATIONS, ids=str)
def test_observations_must_be_numeric(observation):
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), exploration_initial_eps=1.0)
    for function in (
        model.q_values,
        model.predict,
        lambda one: model.predict(one, deterministic=True),
        model.policy.predict,
    ):
        with pytest.raises(ValueError, match=r"^observation (has shape|must be an array of numbers)"):
            function(observation)


def test_observations_must_have_the_structure_of_the_space():
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


@pytest.mark.parametrize("value", [5, "gamma", [5]])
@pytest.mark.parametrize("name", ["exclude", "include"])
def test_invalid_attribute_names_in_save(name, value, tmp_path):
    model, path = model_and_file(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{name}=.* must be None or a list of names"):
        model.save(path, **{name: value})
    assert path.read_bytes() == before
    model.save(path, exclude=(one for one in ["gamma"]))
    assert ScratchDQN.load(path).gamma == 0.99


def test_invalid_paths_in_save_replay_buffer(tmp_path):
    model, _ = model_and_file(tmp_path)
    with pytest.raises(ValueError, match="path='' must name a file"):
        model.save_replay_buffer("")
    with pytest.raises(ValueError, match="must be a path or an open binary file"):
        model.save_replay_buffer(io.StringIO())


def test_set_env_requires_an_environment(tmp_path):
    model, _ = model_and_file(tmp_path)
    with pytest.raises(ValueError, match="env=5 must be an environment"):
        model.set_env(5)


def test_transitions_with_complex_rewards_are_refused():
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


def test_transitions_with_masked_actions_or_masked_values_are_refused():
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "x"}, "seed='x' must be None or a whole number"),
        ({"verbose": float("nan")}, "verbose=nan must be"),
        ({"device": "gpu9"}, "device='gpu9' must be"),
        ({"gamma": 2}, "gamma=2 must be"),
    ],
)
def test_from_sb3_checks_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ScratchDQN.from_sb3(DQN("MlpPolicy", TimeoutEnv()), **settings)


def test_from_sb3_accepts_a_file_and_the_name_of_an_environment(tmp_path):
    DQN("MlpPolicy", "CartPole-v1").save(tmp_path / "model.zip")
    assert ScratchDQN.from_sb3(tmp_path / "model.zip", env="CartPole-v1").n_envs == 1
    with pytest.raises(ValueError, match="env=5 must be an environment"):
        ScratchDQN.from_sb3(tmp_path / "model.zip", env=5)
