"""The search space and the conversion of sampled values to settings."""

from inspect import signature

import optuna
import pytest
from helpers import TimeoutEnv

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.zoo.search_space import DEFAULT_SPACE, check_search_space, convert_params, sample_params

NO_HER = {"using_her_replay_buffer": False, "her_kwargs": {}}


def trials(n, space=None, additional_args=NO_HER):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(n):
        trial = study.ask()
        if space is not None:
            trial.set_user_attr("search_space", space)
        yield trial, sample_params(trial, 2, 1, additional_args)


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_a_search_samples_the_important_settings_and_all_samples_are_valid():
    needed = {
        "learning_rate", "gamma", "batch_size", "buffer_size", "train_freq", "gradient_steps", "target_update_interval",
        "exploration_fraction", "exploration_final_eps", "policy_kwargs",
    }  # fmt: skip
    for _, settings in trials(30):
        assert needed <= settings.keys()
        assert 1 <= settings["gradient_steps"] <= settings["train_freq"]
        ScratchDQN("MlpPolicy", TimeoutEnv(), **settings)


def test_a_trial_is_converted_to_the_settings_that_it_ran_with():
    for trial, settings in trials(20):
        assert convert_params(trial.params) == settings


def test_derived_settings_by_hand():
    settings = convert_params(
        {
            "one_minus_gamma": 0.25,
            "batch_size_pow": 5,
            "net_arch": "medium",
            "train_freq": 8,
            "subsample_steps": 4,
            "tau": 1,
        }
    )
    assert settings == {
        "gamma": 0.75,
        "batch_size": 32,
        "policy_kwargs": {"net_arch": [256, 256]},
        "train_freq": 8,
        "gradient_steps": 2,
        "tau": 1,
    }
    assert convert_params({"train_freq": 2, "subsample_steps": 8})["gradient_steps"] == 1


def test_switches_are_searched_and_invalid_combinations_switched_off():
    settings = convert_params(
        {"head": "c51", "value_range": 100.0, "dueling": True, "noisy": False, "munchausen": True, "prioritized": True}
    )
    assert settings == {
        "policy_kwargs": {
            "head": "c51",
            "head_kwargs": {"v_min": -100.0, "v_max": 100.0},
            "dueling": True,
            "noisy": False,
        },
        "munchausen": False,
        "replay_buffer_kwargs": {"prioritized": True},
    }
    assert convert_params({"munchausen": True, "n_steps": 3}) == {"munchausen": False, "n_steps": 3}
    assert convert_params({"munchausen": True, "n_steps": 1}) == {"munchausen": True, "n_steps": 1}
    seen = [settings for _, settings in trials(60)]
    assert {settings["policy_kwargs"]["head"] for settings in seen} == {"expected", "c51", "quantile", "iqn"}
    for switch in ("double_q", "munchausen"):
        assert {settings[switch] for settings in seen} == {False, True}


def test_a_declared_space_replaces_the_default_one():
    space = {"gamma": {"low": 0.9, "high": 0.999}, "batch_size": [32, 64], "n_steps": {"low": 1, "high": 3}}
    seen = [settings for _, settings in trials(40, space)]
    assert all(settings.keys() == space.keys() for settings in seen)
    assert {settings["batch_size"] for settings in seen} == {32, 64}
    assert {settings["n_steps"] for settings in seen} == {1, 2, 3}
    assert all(0.9 <= settings["gamma"] <= 0.999 for settings in seen)


def test_settings_of_the_her_buffer_are_searched():
    additional_args = {"using_her_replay_buffer": True, "her_kwargs": {"copy_info_dict": True}}
    for trial, settings in trials(5, additional_args=additional_args):
        kwargs = settings["replay_buffer_kwargs"]
        assert kwargs.keys() == {"copy_info_dict", "n_sampled_goal", "goal_selection_strategy"}
        assert "n_steps" not in settings
        assert convert_params(trial.params)["replay_buffer_kwargs"].keys() == {
            "n_sampled_goal",
            "goal_selection_strategy",
        }


SETTINGS = ["gamma", "batch_size", "train_freq"]


@pytest.mark.parametrize(
    "choices",
    [
        0.5,
        [],
        {"low": 1},
        {"low": 0, "high": 1, "big": True},
        {"low": "1e-5", "high": 0.1},
        {"low": 2, "high": 1},
        {"low": 0.0, "high": 1.0, "log": True},
        {"low": 0.1, "high": 1.0, "log": True, "step": 0.1},
        {"low": 0.1, "high": 1.0, "log": "maybe"},
        {"low": 0.1, "high": 1.0, "step": -1},
        {"low": float("nan"), "high": 1.0},
    ],
)
def test_invalid_choices_are_refused(choices):
    with pytest.raises(ValueError, match=r"search_space: gamma=.* must be a list of choices, or a range"):
        check_search_space({"batch_size": [1, 2], "gamma": choices}, SETTINGS)


def test_invalid_search_spaces_are_refused():
    with pytest.raises(ValueError, match=r"'speed' cannot be searched: it is not a setting"):
        check_search_space({"speed": [1, 2]}, SETTINGS)
    with pytest.raises(ValueError, match="net_arch='tiny' is unknown: choose from small"):
        check_search_space({"net_arch": ["small", "tiny"]}, SETTINGS)
    with pytest.raises(ValueError, match="search_space=3 must map names"):
        check_search_space(3, SETTINGS)
    with pytest.raises(ValueError, match="subsample_steps requires train_freq, so search that too"):
        check_search_space({"subsample_steps": [1, 2]}, SETTINGS)


def test_valid_search_spaces_are_accepted():
    check_search_space(DEFAULT_SPACE, signature(ScratchDQN).parameters)
    check_search_space({"gamma": {"low": 0.9, "high": 0.999, "step": 0.001}, "batch_size": [32]}, SETTINGS)


def test_the_default_space_covers_the_tuned_settings():
    for train_freq, subsample in ((256, 2), (16, 2), (4, 1)):
        assert train_freq in DEFAULT_SPACE["train_freq"]
        assert subsample in DEFAULT_SPACE["subsample_steps"]
    for rate in (2.3e-3, 4e-3, 6.3e-4):
        assert DEFAULT_SPACE["learning_rate"]["low"] < rate < DEFAULT_SPACE["learning_rate"]["high"]
