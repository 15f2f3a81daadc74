"""What a model consists of is declared once, and saving, loading and pickling follow the declaration."""

import json
import pickle
import sys
import zipfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from helpers import MaskedEnv, TimeoutEnv, assert_equal, normalized
from stable_baselines3.common.env_util import make_vec_env

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.algorithm import dqn as algorithm_module
from sb3_scratch_dqn.algorithm import state

FILES = Path(__file__).parent / "files"
GROUPS = ("SETTINGS", "PROGRESS", "CONTENT", "RESOURCES", "DERIVED", "TRANSIENT")
SMALL = {"learning_starts": 10, "seed": 0, "policy_kwargs": {"net_arch": [8]}}

MODELS = {
    "default": lambda: ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL),
    "eager, normalized": lambda: ScratchDQN("MlpPolicy", normalized(TimeoutEnv), engine="eager", **SMALL),
    "masks, several environments": lambda: ScratchDQN("MlpPolicy", make_vec_env(MaskedEnv, n_envs=2), **SMALL),
    "C51": lambda: ScratchDQN("MlpPolicy", TimeoutEnv(), **{**SMALL, "policy_kwargs": {"head": "c51"}}),
}


def saved_names(model, path):
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data")).keys()


def test_no_attribute_is_declared_twice():
    names = [name for group in GROUPS for name in getattr(state, group)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", MODELS)
def test_every_attribute_of_a_trained_model_is_declared(name):
    declared = {name for group in GROUPS for name in getattr(state, group)}
    model = MODELS[name]()
    assert vars(model).keys() <= declared
    model.learn(60)
    assert vars(model).keys() <= declared


def test_every_declared_attribute_exists():
    model = MODELS["default"]().learn(60)
    for group in GROUPS:
        for name in getattr(state, group):
            assert hasattr(model, name), f"{name} in {group}"


@pytest.mark.parametrize("name", MODELS)
def test_a_file_holds_settings_and_progress_and_nothing_else(name, tmp_path):
    model = MODELS[name]().learn(60)
    assert saved_names(model, tmp_path / "model.zip") == {*state.SETTINGS, *state.PROGRESS} & vars(model).keys()


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_rebuilds_what_is_derived_and_continues_the_same(name, copy):
    model = MODELS[name]().learn(60)
    copied = copy(model)
    assert {*state.DERIVED} <= vars(copied).keys()
    assert not {*state.TRANSIENT} & vars(copied).keys() - {"_fast_actor"}
    for attribute in (*state.SETTINGS, *state.PROGRESS):
        if attribute not in ("policy_class", "_last_obs", "_last_original_obs", "_last_episode_starts"):
            assert repr(getattr(copied, attribute)) == repr(getattr(model, attribute)), attribute
    if copied.get_vec_normalize_env() is not None:  # its pickle has no environments
        return
    for one in (model, copied):
        one.set_random_seed(3)
        one.learn(60, reset_num_timesteps=False)
    assert_equal(copied.get_parameters(), model.get_parameters())


def test_attributes_of_subclasses_are_saved_and_pickled(tmp_path):
    class WithCounter(ScratchDQN):
        pass

    model = WithCounter("MlpPolicy", TimeoutEnv(), **SMALL)
    model.rounds = 3
    assert "rounds" in saved_names(model, tmp_path / "model.zip")
    assert WithCounter.load(tmp_path / "model.zip").rounds == 3
    assert deepcopy(model).rounds == 3


def test_a_model_saved_when_policies_were_in_another_module_is_loaded():
    model = ScratchDQN.load(FILES / "model_with_module_policies.zip", env="CartPole-v1")
    assert model.policy.dueling
    assert model.policy.noisy
    observation = np.array([[0.1, -0.2, 0.03, 0.4]], dtype=np.float32)
    np.testing.assert_allclose(model.q_values(observation), [[-0.49344733, -0.07346073]], rtol=1e-5)
    model.learn(40, reset_num_timesteps=False)


def test_a_model_saved_in_the_middle_of_a_step_when_that_had_another_name_resets_the_environments(tmp_path):
    model = MODELS["default"]().learn(60)
    vars(model)["_in_step"] = True
    model.save(tmp_path / "model.zip")
    loaded = ScratchDQN.load(tmp_path / "model.zip", env=TimeoutEnv(), force_reset=False)
    assert loaded._mid_step
    assert "_in_step" not in vars(loaded)
    assert loaded._last_obs is not None
    loaded.learn(1, reset_num_timesteps=False)
    assert not loaded._mid_step


def test_a_learning_rate_schedule_that_was_assigned_is_copied():
    model = MODELS["default"]().learn(60)
    model.lr_schedule = lambda _: 5e-3
    for copied in (deepcopy(model), deepcopy(deepcopy(model))):
        copied.learn(60, reset_num_timesteps=False)
        assert copied.policy.optimizer.param_groups[0]["lr"] == 5e-3


def test_the_schedule_is_built_once_and_a_subclass_may_replace_it():
    class WithSchedule(ScratchDQN):
        built = 0

        def _setup_lr_schedule(self):
            super()._setup_lr_schedule()
            self.built += 1

        def _create_aliases(self):
            self.lr_schedule = lambda _: 0.007

    model = WithSchedule("MlpPolicy", TimeoutEnv(), **SMALL).learn(60)
    assert model.built == 1
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.007


def test_modules_by_their_old_names_are_found_in_what_was_pickled_and_custom_objects_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(ScratchDQN, "__module__", "sb3_scratch_dqn.dqn")
    monkeypatch.setitem(sys.modules, "sb3_scratch_dqn.dqn", algorithm_module)
    model = MODELS["default"]()
    model.favourite = ScratchDQN  # pickled by its module and name
    model.save(tmp_path / "model.zip")
    monkeypatch.undo()
    assert ScratchDQN.load(tmp_path / "model.zip").favourite is ScratchDQN
    assert ScratchDQN.load(tmp_path / "model.zip", custom_objects={"favourite": 1}).favourite == 1
