"""The runs of a comparison: their algorithms, environments, seeds and settings, and the path of each run's file.

A run trains one algorithm in one environment with one seed. Algorithms are named as in the Zoo; a colon separates the
name from a settings file or preset that replaces the Zoo's own settings: ``dqn``, ``scratch_dqn:rainbow``,
``ppo:my_settings.yml``.
"""

import difflib
import importlib
import inspect
import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
from huggingface_sb3 import EnvironmentName

# The format of the files of runs
FILE_FORMAT = 1

# Settings that the Zoo uses itself and does not pass to the algorithm
_ZOO_SETTINGS = {
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

# Arguments of the algorithm that the command line sets
_COMMAND_LINE_SETTINGS = {"device", "env", "seed", "verbose"}


@dataclass(frozen=True)
class Run:
    """One training.

    :param algo: the algorithm as on the command line, such as ``"scratch_dqn:rainbow"``
    :param env: the id of the environment
    :param seed: the seed of all random generators
    :param n_timesteps: environment steps of the training
    :param n_evaluations: number of evaluations during training, evenly spaced, the last at the end; there is one more
        before training
    :param eval_episodes: episodes per evaluation
    :param device: the training device
    :param same_settings: the algorithm whose settings are used; ``None`` for those of ``algo``
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
        """The path of its file, relative to the folder of results."""
        return run_path(self.algo, self.env, self.seed)

    def common_settings(self) -> dict[str, Any]:
        """Return the settings that runs must have in common to be compared."""
        return {name: value for name, value in asdict(self).items() if name not in ("algo", "env", "seed")}

    def __str__(self) -> str:
        return f"{self.algo}, {self.env}, seed {self.seed}"


def run_path(algo: str, env: str, seed: int) -> Path:
    """Return the path of the file of a run, relative to the folder of results.

    :param algo: the algorithm as on the command line
    :param env: the id of the environment
    :param seed: the seed of the run
    """
    return Path(EnvironmentName(env), folder_name(algo), f"seed_{seed}.json")


def folder_name(algo: str) -> str:
    """Return the name of the folder for the runs of an algorithm.

    :param algo: the algorithm as on the command line
    """
    name, settings = split_algo(algo)
    return f"{name}-{Path(settings).stem}" if settings else name


def split_algo(algo: str) -> tuple[str, str | None]:
    """Split an algorithm into its name in the Zoo and its settings file, or ``None`` for the Zoo's own settings.

    :param algo: the algorithm as on the command line
    """
    name, _, settings = algo.partition(":")
    return name, settings or None


def evaluation_steps(n_timesteps: int, n_evaluations: int) -> list[int]:
    """Return the environment steps after which a run is evaluated; the first is 0.

    :param n_timesteps: environment steps of the training
    :param n_evaluations: number of evaluations, not counting the one before training
    """
    return [round(n_timesteps * count / n_evaluations) for count in range(n_evaluations + 1)]


def import_zoo() -> Any:
    """Register ``scratch_dqn`` in the Zoo, and return the Zoo's module that reads settings and creates environments."""
    from sb3_scratch_dqn.zoo.registration import register

    register()  # in case the .pth file was not run at interpreter start
    return importlib.import_module("rl_zoo3.exp_manager")


def load_settings(run: Run, folder: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Let the Zoo read the settings of a run.

    :param run: the run
    :param folder: the folder for the Zoo's own output
    :return: the Zoo's experiment manager, the settings as in the file, and the keyword arguments of the algorithm
    """
    exp_manager = import_zoo()
    name, config = split_algo(run.algo)
    manager = _experiment_manager(exp_manager, name, run, folder, config)
    if run.same_settings:
        same_name, same_config = split_algo(run.same_settings)
        manager.config = _experiment_manager(exp_manager, same_name, run, folder, same_config).config
    with redirect_stdout(StringIO()):  # the Zoo prints the settings
        settings, file_settings = manager.read_hyperparameters()
        file_settings = dict(file_settings)
        processed = manager._preprocess_hyperparams(settings)
    settings, manager.env_wrapper, manager.callbacks, manager.vec_env_wrapper = processed
    # By default environments get a render mode, which makes LunarLander slower than the training; nothing is rendered
    manager.env_kwargs = {"render_mode": None, **manager.env_kwargs}
    manager.eval_env_kwargs = manager.env_kwargs
    return manager, file_settings, settings


def json_hyperparameters(file_settings: dict[str, Any]) -> dict[str, Any]:
    """Convert the settings of a file to JSON types, without the number of steps, which is recorded separately.

    :param file_settings: the settings as in the file, from :func:`load_settings`
    """
    kept = {name: value for name, value in file_settings.items() if name != "n_timesteps"}
    # A settings file in Python may hold values without a JSON form
    hyperparameters: dict[str, Any] = json.loads(json.dumps(kept, default=repr))
    return hyperparameters


def _experiment_manager(exp_manager: Any, name: str, run: Run, folder: str, config: str | None) -> Any:
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
    """List the runs of every algorithm in every environment with every seed, and check them before any training.

    :param algos: the algorithms as on the command line
    :param envs: the ids of the environments
    :param seeds: the number of seeds
    :param n_timesteps: environment steps of every run; ``None`` for those of the settings
    :param n_evaluations: number of evaluations of every run, not counting the one before training
    :param eval_episodes: episodes per evaluation
    :param device: the training device
    :param same_settings: the algorithm whose settings all algorithms use; ``None`` for their own
    :param gym_packages: modules that register environments
    :param first_seed: the lowest seed; the others follow it
    :return: the runs; those with the same environment and seed are adjacent
    :raises ValueError: if a name is unknown, or the runs cannot be compared
    """
    _import_packages(gym_packages)
    known_algos = import_zoo().ALGOS
    _check_algos(algos, same_settings, known_algos)
    _check_envs(envs)
    plan = []
    for env in envs:
        _check_registered(env)
        runs = [
            Run(
                algo, env, 0, n_timesteps or 0, n_evaluations, eval_episodes, device, same_settings, tuple(gym_packages)
            )
            for algo in algos
        ]
        n_steps = _check_lengths(
            {run.algo: _check_settings(run, known_algos[split_algo(run.algo)[0]]) for run in runs}, env
        )
        if n_steps < n_evaluations:
            raise ValueError(f"--evaluations {n_evaluations} must be at most the {n_steps} steps of a run")
        plan += [
            replace(run, seed=seed, n_timesteps=n_steps)
            for seed in range(first_seed, first_seed + seeds)
            for run in runs
        ]
    return plan


def _import_packages(packages: Iterable[str]) -> None:
    package = ""
    try:
        for package in packages:
            importlib.import_module(package)
    except Exception as error:  # a module may raise any exception
        raise ValueError(f"--gym-packages {package!r} cannot be imported: {error}") from error


def _check_algos(algos: Sequence[str], same_settings: str | None, known: dict[str, Any]) -> None:
    _check_unique("--algos", algos)
    folders = [folder_name(algo) for algo in algos]
    for algo, folder in zip(algos, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(
                f"--algos {algo!r} would share the folder {folder!r} with another algorithm; rename its settings file"
            )
    for algo in algos:
        _check_algo("--algos", algo, known)
        if same_settings and ":" in algo:
            raise ValueError(
                f"--algos {algo!r} names its own settings, but --same-settings {same_settings!r} applies to all; "
                "remove one of them"
            )
    if same_settings is not None:
        _check_algo("--same-settings", same_settings, known)


def _check_algo(argument: str, algo: str, known: dict[str, Any]) -> None:
    name, _ = split_algo(algo)
    if name not in known:
        raise ValueError(f"{argument} {algo!r} must be one of {', '.join(known)}{_suggestion(name, known)}")


def _check_envs(envs: Sequence[str]) -> None:
    _check_unique("--envs", envs)
    folders = [str(EnvironmentName(env)) for env in envs]
    for env, folder in zip(envs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(
                f"--envs {env!r} would share the folder {folder!r} with another environment; compare them separately"
            )


def _check_unique(argument: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{argument} {name!r} is given twice; give each name once")


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_registered(env: str) -> None:
    try:
        gym.spec(env)
    except gym.error.Error as error:
        raise ValueError(
            f"--envs {env!r} is not registered{_suggestion(env, gym.registry) or '.'} --gym-packages imports modules "
            f"that register environments ({error})"
        ) from error


def _check_settings(run: Run, algorithm: type) -> int:
    """Check the settings of a run and return its number of environment steps."""
    try:
        manager, file_settings, _ = load_settings(run, "")
    except KeyError as error:
        raise ValueError(f"the settings of {run.algo} for {run.env} have no {error}, which the Zoo needs") from error
    except Exception as error:
        raise ValueError(f"the settings of {run.algo} for {run.env} cannot be read: {error}") from error
    known = inspect.signature(algorithm).parameters
    for name in file_settings:
        if name not in known and name not in _ZOO_SETTINGS:
            source = run.same_settings or run.algo
            raise ValueError(f"the settings of {source} for {run.env} have {name!r}, which {run.algo} does not accept")
        if name in _COMMAND_LINE_SETTINGS:
            raise ValueError(f"the settings of {run.algo} for {run.env} have {name!r}, which the command line sets")
    return int(manager.n_timesteps)


def _check_lengths(lengths: dict[str, int], env: str) -> int:
    """Return the number of steps that all algorithms train for."""
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{length:,} for {algo}" for algo, length in lengths.items())
        raise ValueError(f"the runs in {env} must have the same number of steps, but have {text}; set it with -n")
    return next(iter(lengths.values()))
