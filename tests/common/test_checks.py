"""Invalid settings raise an error that names the setting, its value and what would be right."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import DictEnv, TimeoutEnv
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from torch import nn

from sb3_scratch_dqn import MlpPolicy, ScratchDQN
from sb3_scratch_dqn.common.check_training import parse_frequency
from sb3_scratch_dqn.common.checks import short_repr
from sb3_scratch_dqn.values.heads import CategoricalHead


class BufferWithoutDevice(ReplayBuffer):
    def __init__(self, buffer_size, observation_space, action_space):
        pass


def returns_seven(progress):
    return 7 if 0 < progress < 0.5 else 0.5


def returns_none(progress):
    return None


def returns_nan(progress):
    return float("nan")


def returns_string(progress):
    return "x"


def without_parameters():
    return 0.5


def makes_none(parameters, lr):
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
        # Would otherwise be ignored or fail in training
        ("replay_buffer_kwargs", {"handle_timeout_termination": "no"}, "True or False"),
        ("replay_buffer_kwargs", {"prioritized": 1}, "True or False"),
        ("replay_buffer_kwargs", {"alpha": 0.5}, "needs prioritized=True"),
        ("replay_buffer_kwargs", {"prioritized": False, "beta": 0.5}, "needs prioritized=True"),
        ("replay_buffer_kwargs", 0, "must be a dict"),
        ("policy_kwargs", {"normalize_images": "maybe"}, "True or False"),
        ("device", "cuda:99", "on this machine"),
        ("exploration_schedule", returns_seven, "exploration_schedule(0.25)=7 must be a number between 0 and 1"),
        ("exploration_schedule", returns_none, "exploration_schedule(1.0)=None must be a number between 0 and 1"),
        # Would otherwise raise an error of PyTorch, NumPy or SB3
        ("policy_kwargs", {"optimizer_class": "Adam"}, "subclass of torch.optim.optimizer.Optimizer"),
        ("policy_kwargs", {"optimizer_class": nn.ReLU}, "subclass of torch.optim.optimizer.Optimizer"),
        ("policy_kwargs", {"optimizer_class": th.optim.LBFGS}, "needs a closure in step()"),
        ("policy_kwargs", {"optimizer_class": makes_none}, "must make a torch.optim.Optimizer, but made None"),
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
            {"features_extractor_class": without_parameters},
            "cannot be created with features_extractor_kwargs=",
        ),
        ("policy_kwargs", {"features_extractor_kwargs": [1]}, "must be a dict"),
        ("policy_kwargs", {"features_extractor_kwargs": {"x": 1}}, "unknown name 'x'"),
        ("policy", "MultiInputPolicy", "use 'MlpPolicy', or 'CnnPolicy' for images"),
        ("learning_rate", returns_nan, "learning_rate(1.0)=nan must be a number of at least 0"),
        ("learning_rate", returns_string, "learning_rate(1.0)='x' must be a number of at least 0"),
        ("learning_rate", without_parameters, "raises TypeError"),
        ("exploration_schedule", without_parameters, "raises TypeError"),
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
        ("replay_buffer_class", BufferWithoutDevice, "cannot be created with replay_buffer_kwargs={}: TypeError"),
    ],
)
def test_an_invalid_setting_is_named_with_its_value_and_what_would_be_right(name, value, right):
    names = [name, *(value if isinstance(value, dict) else ())]  # in a dict, the message names the invalid key
    with pytest.raises(ValueError, match="|".join(names)) as error:
        ScratchDQN(**{"policy": "MlpPolicy", "env": TimeoutEnv(), name: value})
    message = str(error.value)
    inner = next(iter(value.values())) if isinstance(value, dict) and value else value
    if not callable(value) or isinstance(value, type):  # for a function, the message shows its return value instead
        assert any(short_repr(one) in message or getattr(one, "__name__", "?") in message for one in (value, inner))
    assert right in message
    assert "\n" not in message


def test_a_schedule_that_leaves_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"exploration_schedule\(0.0\)=-1.0 must be a number between 0 and 1"):
        ScratchDQN(
            "MlpPolicy", TimeoutEnv(), exploration_schedule=lambda progress_remaining: 2 * progress_remaining - 1
        )


def test_max_grad_norm_may_be_infinite():
    ScratchDQN("MlpPolicy", TimeoutEnv(), max_grad_norm=float("inf"), learning_starts=0).learn(20)


@pytest.mark.parametrize(
    ("space", "error", "right"),
    [
        (gym.spaces.Box(-1, 1, (2,)), AssertionError, "needs a Discrete one"),
        (gym.spaces.MultiDiscrete([2, 2]), AssertionError, "needs a Discrete one"),
        (gym.spaces.Discrete(3, start=1), ValueError, "must start at 0"),
    ],
)
def test_action_spaces_other_than_discrete_from_zero_are_refused(space, error, right):
    env = TimeoutEnv()
    env.action_space = space
    with pytest.raises(error, match=right) as caught:
        ScratchDQN("MlpPolicy", env)
    assert str(space) in str(caught.value)


def test_train_freq_in_episodes_requires_one_environment():
    with pytest.raises(ValueError, match=r"train_freq=\(1, 'episode'\) .* env has 2"):
        ScratchDQN("MlpPolicy", make_vec_env(TimeoutEnv, n_envs=2), train_freq=(1, "episode"))


def test_parse_frequency_accepts_every_form():
    assert parse_frequency("x", 4) == (4, "step")
    assert parse_frequency("x", np.int64(4)) == (4, "step")
    assert parse_frequency("x", (4, "step")) == (4, "step")
    assert parse_frequency("x", [2, "episode"]) == (2, "episode")


def test_a_buffer_that_does_not_support_n_steps_ignores_it_with_a_warning():
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


def test_optimize_memory_usage_requires_two_rows():
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


def test_numpy_numbers_are_valid_settings():
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


def test_dict_observations_require_multi_input_policy():
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        ScratchDQN("MlpPolicy", DictEnv())


def test_policies_for_other_observations_are_refused():
    with pytest.raises(ValueError, match="need policy='MultiInputPolicy'"):
        ScratchDQN(MlpPolicy, DictEnv())
    with pytest.raises(AssertionError, match="only with images"):
        ScratchDQN("CnnPolicy", TimeoutEnv())


def test_short_repr_is_truncated_to_one_line():
    assert short_repr(np.zeros((30, 30))).endswith("...")
    assert "\n" not in short_repr(np.zeros((30, 30)))
    assert short_repr("a b") == "'a b'"


@pytest.mark.parametrize(("v_min", "v_max"), [(0.0, 1e-300), (1e8, 1e8 + 1)])
def test_atoms_that_coincide_are_refused(v_min, v_max):
    with pytest.raises(ValueError, match="are too close for 51 atoms in float32"):
        CategoricalHead(v_min=v_min, v_max=v_max)
    CategoricalHead(n_atoms=2, v_min=0.0, v_max=1e-3)
