"""What this package adds to RL Baselines3 Zoo.

After an ordinary installation nothing of this need be called: it happens when the Zoo is imported. Where the
interpreter does not run the files that see to it (``pip install --target``, ``PYTHONPATH``, ``python -S``), call
:func:`register` before the Zoo's own functions.
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
from sb3_scratch_dqn.zoo.search_space import check_space, convert_params, sample_params

NAME = "scratch_dqn"

# Arguments of ScratchDQN that an experiment gives itself
_GIVEN_BY_THE_ZOO = {"env", "policy", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model"}


def hyperparams_folder() -> Path:
    """Where the settings files lie: inside an installed package, beside an editable one."""
    package = Path(__file__).parents[1]
    inside = package / "hyperparams"
    return inside if inside.is_dir() else package.parent / "hyperparams"


def register() -> None:
    """Make the Zoo know ``scratch_dqn``; calling it again changes nothing."""
    for name in _REGISTRARS:
        register_in(importlib.import_module(name))


def register_in(module: ModuleType) -> None:
    """Add what belongs into one module of the Zoo.

    :param module: one of those that :func:`register` imports
    """
    _REGISTRARS[module.__name__](module)


def _register_algorithm(utils: ModuleType) -> None:
    utils.ALGOS[NAME] = ScratchDQN


def _register_search(hyperparams_opt: ModuleType) -> None:
    hyperparams_opt.HYPERPARAMS_SAMPLER[NAME] = sample_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[NAME] = convert_params


def _register_experiments(exp_manager: ModuleType) -> None:
    manager = exp_manager.ExperimentManager
    if hasattr(manager, "_extended_for_scratch_dqn"):
        return
    manager._extended_for_scratch_dqn = True
    for name, extend in _EXTENSIONS.items():
        original = getattr(manager, name)
        setattr(manager, name, wraps(original)(extend(original)))


@dataclass(frozen=True)
class StudyTrial:
    """A trial of a study, in a form that is never false, unlike trial 0.

    :param number: of the trial; ``None`` for the best one
    """

    number: int | None


def _extend_init(original: Callable[..., None]) -> Callable[..., None]:
    parameters = signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.algo != NAME:
            return
        self.search_space = None
        self.config = find_settings(parameters.bind(self, *args, **kwargs).arguments.get("config"), self.config)
        if self.storage and self.study_name and not self.optimize_hyperparameters and not self.trial_id:
            # The Zoo takes no --trial-id and --trial-id 0 for "do not look into the study"
            self.trial_id = StudyTrial(self.trial_id)

    return __init__


def find_settings(wanted: str | None, default: str) -> str:
    """Say which settings file an experiment reads.

    :param wanted: what ``--conf-file`` said; a file or module of the user's, or the name of one of our presets
    :param default: what the Zoo would read
    """
    if wanted is None:
        return default if Path(default).is_file() else str(hyperparams_folder() / f"{NAME}.yml")
    preset = hyperparams_folder() / f"{wanted}.yml"
    if wanted.isidentifier() and preset.is_file() and importlib.util.find_spec(wanted) is None:
        return str(preset)
    return default


def _extend_load_trial(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_trial(self: Any, storage: str, study_name: str, trial_id: Any = None, convert: bool = True) -> Any:
        if isinstance(trial_id, StudyTrial):
            trial_id = trial_id.number
            print(f"Using {'the best trial' if trial_id is None else f'trial {trial_id}'} of study {study_name!r}")
        return original(self, storage, study_name, trial_id, convert)

    return load_trial


def _extend_preprocess_hyperparams(original: Callable[..., Any]) -> Callable[..., Any]:
    def _preprocess_hyperparams(self: Any, hyperparams: dict[str, Any]) -> Any:
        if self.algo == NAME:
            self.search_space = hyperparams.pop("search_space", None)
            if self.search_space is not None:
                check_space(self.search_space, signature(ScratchDQN).parameters.keys() - _GIVEN_BY_THE_ZOO)
        return original(self, hyperparams)

    return _preprocess_hyperparams


def _extend_objective(original: Callable[..., float]) -> Callable[..., float]:
    def objective(self: Any, trial: optuna.Trial) -> float:
        if self.algo == NAME and self.search_space is not None:
            trial.set_user_attr("search_space", self.search_space)  # for sample_params
        try:
            return original(self, trial)
        except ValueError as error:
            # The Zoo prunes a trial whose settings fail in training, but not one whose settings fail before
            if self.algo != NAME:
                raise
            print(f"Trial {trial.number} cannot run: {error}")
            raise optuna.TrialPruned from error

    return objective


# Method of rl_zoo3.exp_manager.ExperimentManager -> what makes a new method of it
_EXTENSIONS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "__init__": _extend_init,
    "load_trial": _extend_load_trial,
    "_preprocess_hyperparams": _extend_preprocess_hyperparams,
    "objective": _extend_objective,
}

_REGISTRARS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": _register_algorithm,
    "rl_zoo3.hyperparams_opt": _register_search,
    "rl_zoo3.exp_manager": _register_experiments,
}
