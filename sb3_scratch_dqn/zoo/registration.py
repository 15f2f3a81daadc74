"""Register ``scratch_dqn`` in RL Baselines3 Zoo.

After an ordinary installation this happens automatically when the Zoo is imported. Where the interpreter does not run
the startup files (``pip install --target``, ``PYTHONPATH``, ``python -S``), call :func:`register` before the Zoo's own
functions.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna

from sb3_scratch_dqn.algorithm.dqn import ScratchDQN
from sb3_scratch_dqn.zoo.search_space import check_search_space, convert_params, sample_params

NAME = "scratch_dqn"

# Arguments of ScratchDQN that the experiment manager passes, so that they cannot be searched
_SET_BY_ZOO = {"env", "policy", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model"}


def hyperparams_folder() -> Path:
    """Return the folder of the hyperparameter files: inside an installed package, next to an editable one."""
    package = Path(__file__).parents[1]
    installed = package / "hyperparams"
    return installed if installed.is_dir() else package.parent / "hyperparams"


def register() -> None:
    """Register ``scratch_dqn`` in the Zoo; further calls have no effect."""
    for name in _REGISTRARS:
        register_in(importlib.import_module(name))


def register_in(module: ModuleType) -> None:
    """Register ``scratch_dqn`` in one module of the Zoo.

    :param module: one of those that :func:`register` imports
    """
    _REGISTRARS[module.__name__](module)


def _register_algorithm(utils: ModuleType) -> None:
    utils.ALGOS[NAME] = ScratchDQN


def _register_search_space(hyperparams_opt: ModuleType) -> None:
    hyperparams_opt.HYPERPARAMS_SAMPLER[NAME] = sample_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[NAME] = convert_params


def _patch_experiment_manager(exp_manager: ModuleType) -> None:
    manager = exp_manager.ExperimentManager
    if hasattr(manager, "_patched_for_scratch_dqn"):
        return
    manager._patched_for_scratch_dqn = True
    for name, wrap in _METHOD_WRAPPERS.items():
        original = getattr(manager, name)
        setattr(manager, name, wraps(original)(wrap(original)))


@dataclass(frozen=True)
class StudyTrial:
    """A trial of a study; unlike the trial number 0, it is never falsy.

    :param number: number of the trial; ``None`` for the best one
    """

    number: int | None


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    parameters = signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.algo != NAME:
            return
        self.search_space = None
        self.config = find_config(parameters.bind(self, *args, **kwargs).arguments.get("config"), self.config)
        if self.storage and self.study_name and not self.optimize_hyperparameters and not self.trial_id:
            # The Zoo does not load the study without --trial-id, nor with --trial-id 0
            self.trial_id = StudyTrial(self.trial_id)

    return __init__


def find_config(conf_file: str | None, default: str) -> str:
    """Return the hyperparameter file, or Python module, of an experiment.

    :param conf_file: the value of ``--conf-file``: a file, a module or the name of a preset of this package
    :param default: what the Zoo would load
    """
    if conf_file is None:
        return default if Path(default).is_file() else str(hyperparams_folder() / f"{NAME}.yml")
    preset = hyperparams_folder() / f"{conf_file}.yml"
    if conf_file.isidentifier() and preset.is_file() and importlib.util.find_spec(conf_file) is None:
        return str(preset)
    return default


def _wrap_load_trial(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_trial(self: Any, storage: str, study_name: str, trial_id: Any = None, convert: bool = True) -> Any:
        if isinstance(trial_id, StudyTrial):
            trial_id = trial_id.number
            print(f"Using {'the best trial' if trial_id is None else f'trial {trial_id}'} of study {study_name!r}")
        return original(self, storage, study_name, trial_id, convert)

    return load_trial


def _wrap_preprocess_hyperparams(original: Callable[..., Any]) -> Callable[..., Any]:
    def _preprocess_hyperparams(self: Any, hyperparams: dict[str, Any]) -> Any:
        if self.algo == NAME:
            self.search_space = hyperparams.pop("search_space", None)
            if self.search_space is not None:
                check_search_space(self.search_space, signature(ScratchDQN).parameters.keys() - _SET_BY_ZOO)
        return original(self, hyperparams)

    return _preprocess_hyperparams


def _wrap_objective(original: Callable[..., float]) -> Callable[..., float]:
    def objective(self: Any, trial: optuna.Trial) -> float:
        if self.algo == NAME and self.search_space is not None:
            trial.set_user_attr("search_space", self.search_space)  # for sample_params
        try:
            return original(self, trial)
        except ValueError as error:
            # The Zoo prunes a trial whose settings fail in training, but not one whose settings fail before training
            if self.algo != NAME:
                raise
            print(f"Trial {trial.number} cannot run: {error}")
            raise optuna.TrialPruned from error

    return objective


# Method of rl_zoo3.exp_manager.ExperimentManager -> function that wraps it
_METHOD_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "__init__": _wrap_init,
    "load_trial": _wrap_load_trial,
    "_preprocess_hyperparams": _wrap_preprocess_hyperparams,
    "objective": _wrap_objective,
}

_REGISTRARS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": _register_algorithm,
    "rl_zoo3.hyperparams_opt": _register_search_space,
    "rl_zoo3.exp_manager": _patch_experiment_manager,
}
