"""Which runs a comparison is made of: names, settings, and where each run's file lies.

A run trains one algorithm with one seed in one environment. An algorithm is named as the Zoo names it, with the
settings file that it reads behind a colon where that is not the Zoo's own: ``dqn``, ``scratch_dqn:rainbow``,
``ppo:my_settings.yml``.
"""

import difflib
import importlib
import inspect
import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
from huggingface_sb3 import EnvironmentName

# Of the files of runs
FORMAT = 1

# What the Zoo itself makes of settings, beside those that the algorithm gets
_FOR_THE_ZOO = {
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "noise_std",
    "noise_type",
    "normalize",
    "search_space",
    "vec_env_wrapper",
}


# What a run gives each algorithm itself
_FROM_THE_COMMAND_LINE = {"device", "env", "seed", "verbose"}


@dataclass(frozen=True)
class Run:
    """One training, as settings.

    :param algo: as on the command line, such as ``"scratch_dqn:rainbow"``
    :param env: the name of the environment
    :param seed: of everything random
    :param n_timesteps: environment steps to train for
    :param n_evaluations: evaluations, evenly spaced, the last at the end; there is one before training too
    :param eval_episodes: episodes of each
    :param device: where to train
    :param same_settings: the algorithm whose settings are read; ``None`` for its own
    :param gym_packages: modules that register environments
    """

    algo: str
    env: str
    seed: int
    n_timesteps: int
    n_evaluations: int
    eval_episodes: int
    device: str = "cpu"
    same_settings: str | None = None
    gym_packages: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Of its file, in the folder of results."""
        return run_path(self.algo, self.env, self.seed)

    def conditions(self) -> dict[str, Any]:
        """What runs that are compared must have in common."""
        return {name: value for name, value in asdict(self).items() if name not in ("algo", "env", "seed")}

    def __str__(self) -> str:
        return f"{self.algo}, {self.env}, seed {self.seed}"


def run_path(algo: str, env: str, seed: int) -> Path:
    """Of the file of a run, in the folder of results.

    :param algo: as on the command line
    :param env: the name of the environment
    :param seed: of the run
    """
    return Path(EnvironmentName(env), file_name(algo), f"seed_{seed}.json")


def file_name(algo: str) -> str:
    """The name of an algorithm as that of a folder.

    :param algo: as on the command line
    """
    name, settings = split(algo)
    return f"{name}-{Path(settings).stem}" if settings else name


def split(algo: str) -> tuple[str, str | None]:
    """The Zoo's name of an algorithm, and the settings file that it is to read, if it is not the Zoo's.

    :param algo: as on the command line
    """
    name, _, settings = algo.partition(":")
    return name, settings or None


def evaluation_steps(n_timesteps: int, n_evaluations: int) -> list[int]:
    """After how many steps a run is evaluated.

    :param n_timesteps: of the run
    :param n_evaluations: after the first one, which is made before training
    """
    return [round(n_timesteps * count / n_evaluations) for count in range(n_evaluations + 1)]


def zoo() -> Any:
    """The Zoo's part that reads settings and makes environments, knowing ``scratch_dqn``."""
    from sb3_scratch_dqn.zoo.registration import register

    register()  # also where the interpreter did not see to it
    return importlib.import_module("rl_zoo3.exp_manager")


def experiment(run: Run, folder: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Let the Zoo read the settings of a run.

    :param run: the run
    :param folder: for what the Zoo writes
    :return: its experiment, the settings as they lie in the file, and those that the algorithm gets
    """
    exp_manager = zoo()
    name, config = split(run.algo)
    manager = _manager(exp_manager, name, run, folder, config)
    if run.same_settings:
        same, same_config = split(run.same_settings)
        manager.config = _manager(exp_manager, same, run, folder, same_config).config
    with redirect_stdout(StringIO()):  # it prints them
        settings, as_in_file = manager.read_hyperparameters()
        as_in_file = dict(as_in_file)
        processed = manager._preprocess_hyperparams(settings)
    settings, manager.env_wrapper, manager.callbacks, manager.vec_env_wrapper = processed
    # By default LunarLander is rendered, for nobody, which takes longer than the training
    manager.env_kwargs = {"render_mode": None, **manager.env_kwargs}
    manager.eval_env_kwargs = manager.env_kwargs
    return manager, as_in_file, settings


def hyperparameters(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they lie in a file, as JSON has them, without the number of steps, which a run has for itself.

    :param settings: of :func:`experiment`
    """
    kept = {name: value for name, value in settings.items() if name != "n_timesteps"}
    # A settings file in Python may hold what JSON has no form for
    as_json: dict[str, Any] = json.loads(json.dumps(kept, default=repr))
    return as_json


def _manager(exp_manager: Any, name: str, run: Run, folder: str, config: str | None) -> Any:
    return exp_manager.ExperimentManager(
        Namespace(),
        name,
        run.env,
        folder,
        n_timesteps=run.n_timesteps,
        eval_freq=-1,
        seed=run.seed,
        verbose=0,
        device=run.device,
        config=config,
    )


def make_plan(
    algos: Sequence[str],
    envs: Sequence[str],
    seeds: int,
    n_timesteps: int | None = None,
    n_evaluations: int = 20,
    eval_episodes: int = 10,
    device: str = "cpu",
    same_settings: str | None = None,
    gym_packages: Iterable[str] = (),
    first_seed: int = 0,
) -> list[Run]:
    """Every algorithm in every environment with every seed, looked at before anything is trained.

    :param algos: as on the command line
    :param envs: names of environments
    :param seeds: how many
    :param n_timesteps: of every run; ``None`` for what the settings say
    :param n_evaluations: evaluations of every run, after the one before training
    :param eval_episodes: episodes of each
    :param device: where to train
    :param same_settings: the algorithm whose settings all have; ``None`` for their own
    :param gym_packages: modules that register environments
    :param first_seed: the lowest seed; the others follow it
    :return: the runs, those with the same seed beside each other
    :raises ValueError: if something is unknown, or cannot be compared
    """
    _import(gym_packages)
    exp_manager = zoo()
    _check_unique("--algos", algos)
    _check_unique("--envs", envs)
    folders = [file_name(algo) for algo in algos]
    for algo, folder in zip(algos, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"--algos {algo!r} would share the folder {folder!r} with another; rename a settings file")
    for algo in algos:
        _check_algorithm("--algos", algo, exp_manager.ALGOS)
        if same_settings and ":" in algo:
            raise ValueError(
                f"--algos {algo!r} has settings of its own, but --same-settings {same_settings!r} is for all; "
                "drop one of them"
            )
    if same_settings is not None:
        _check_algorithm("--same-settings", same_settings, exp_manager.ALGOS)
    folders = [str(EnvironmentName(env)) for env in envs]
    for env, folder in zip(envs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"--envs {env!r} would share the folder {folder!r} with another; compare them apart")
    plan = []
    for env in envs:
        _check_environment(env)
        lengths = {}
        for algo in algos:
            run = Run(
                algo, env, 0, n_timesteps or 0, n_evaluations, eval_episodes, device, same_settings, tuple(gym_packages)
            )
            lengths[algo] = _check_settings(run, exp_manager.ALGOS[split(algo)[0]])
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{length:,} for {algo}" for algo, length in lengths.items())
            raise ValueError(f"{env} is trained for {told} steps; they must be the same; -n gives a number")
        n_steps = lengths[algos[0]]
        if n_steps < n_evaluations:
            raise ValueError(f"--evaluations {n_evaluations} must be at most the {n_steps} steps of a run")
        plan += [
            Run(algo, env, seed, n_steps, n_evaluations, eval_episodes, device, same_settings, tuple(gym_packages))
            for seed in range(first_seed, first_seed + seeds)
            for algo in algos
        ]
    return plan


def _import(packages: Iterable[str]) -> None:
    package = ""
    try:
        for package in packages:
            importlib.import_module(package)
    except Exception as error:  # whatever a module of users does
        raise ValueError(f"--gym-packages {package!r} cannot be imported: {error}") from error


def _check_unique(argument: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{argument} {name!r} is named twice; each may be named once")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_algorithm(argument: str, algo: str, known: dict[str, Any]) -> None:
    name, _ = split(algo)
    if name not in known:
        raise ValueError(f"{argument} {algo!r} must be one of {', '.join(known)}{_nearest(name, known)}")


def _check_environment(env: str) -> None:
    try:
        gym.spec(env)
    except gym.error.Error as error:
        raise ValueError(
            f"--envs {env!r} is not registered{_nearest(env, gym.registry)} --gym-packages names modules that "
            f"register environments ({error})"
        ) from error


def _check_settings(run: Run, algorithm: type) -> int:
    try:
        manager, as_in_file, _ = experiment(run, "")
    except KeyError as error:
        raise ValueError(f"the settings of {run.algo} for {run.env} have no {error}, which the Zoo needs") from error
    except Exception as error:
        raise ValueError(f"the settings of {run.algo} for {run.env} cannot be read: {error}") from error
    known = inspect.signature(algorithm).parameters
    for name in as_in_file:
        if name not in known and name not in _FOR_THE_ZOO:
            whose = run.same_settings or run.algo
            raise ValueError(f"the settings of {whose} for {run.env} have {name!r}, which {run.algo} does not take")
        if name in _FROM_THE_COMMAND_LINE:
            raise ValueError(f"the settings of {run.algo} for {run.env} have {name!r}, which this command line decides")
    return int(manager.n_timesteps)
