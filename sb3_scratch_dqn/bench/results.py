"""Read the files of finished runs and check them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.bench.run.plan import FILE_FORMAT, evaluation_steps, run_path

# The required entries of a file and their types
_NUMBER = int | float
_TYPES = {"algo": str, "env": str, "seed": int, "status": str, "settings": dict, "versions": dict, "hardware": dict}
_TYPES_WHEN_DONE = {
    "curve": dict,
    "training_seconds": _NUMBER,
    "steps_per_second": _NUMBER,
    "peak_memory_bytes": _NUMBER,
}
_SETTINGS_TYPES = {
    "n_timesteps": int,
    "n_evaluations": int,
    "eval_episodes": int,
    "device": str,
    "same_settings": str | None,
    "gym_packages": list,
}
_HARDWARE_TYPES = {"processor": str, "cores": int, "system": str}
_CURVE_COLUMNS = ("steps", "seconds", "cpu_seconds", "returns", "lengths")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """The result of a run with ``T`` evaluations.

    :param algo: the algorithm as on the command line, such as ``"scratch_dqn:rainbow"``
    :param env: the id of the environment
    :param seed: the seed of all random generators
    :param done: True if the run finished, False if it failed
    :param settings: all settings of the run
    :param steps: environment steps before each evaluation, ``(T,)``
    :param seconds: training time before each evaluation, in seconds, ``(T,)``
    :param cpu_seconds: processor time of the training process before each evaluation, in seconds, ``(T,)``
    :param returns: mean return of each evaluation, ``(T,)``
    :param steps_taken: environment steps of the whole training, which may exceed the requested number
    :param steps_per_second: environment steps per second of training
    :param peak_memory: peak memory of the training process, in bytes
    :param wall_seconds: duration of the run including evaluations, in seconds
    :param error: why the run failed; empty if it did not
    :param content: the whole content of the file
    :param path: the path of the file
    """

    algo: str
    env: str
    seed: int
    done: bool
    settings: dict[str, Any]
    steps: Array
    seconds: Array
    cpu_seconds: Array
    returns: Array
    steps_taken: int
    steps_per_second: float
    peak_memory: int
    wall_seconds: float
    error: str
    content: dict[str, Any]
    path: str

    @property
    def final(self) -> float:
        """The mean return of the last evaluation."""
        return float(self.returns[-1])

    @property
    def area(self) -> float:
        """The area under the learning curve divided by the number of steps, which is a mean return."""
        return float(np.trapezoid(self.returns, self.steps) / (self.steps[-1] - self.steps[0]))


def parse_result(content: Any, path: str) -> Result:
    """Check the content of a file and return it as a result.

    :param content: the JSON content of the file
    :param path: the path of the file
    :raises ValueError: if it is not the file of a run; the message names the file
    """
    if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
        raise ValueError(f'{path} is not a result of this benchmark: it must have "format": {FILE_FORMAT}')
    try:
        return _parse(content, path)
    except _BrokenError as error:
        raise ValueError(f"{path} is broken: {error}; remove it, and run again") from error


class _BrokenError(Exception):
    """An invalid entry of a file."""


def _check_types(entries: dict[str, Any], types: dict[str, Any], where: str) -> None:
    for name, kind in types.items():
        if name not in entries:
            raise _BrokenError(f"{where} has no {name!r}")
        if not isinstance(entries[name], kind) or isinstance(entries[name], bool) != (kind is bool):
            raise _BrokenError(f"{name!r} in {where} is {entries[name]!r}")


def _parse(content: dict[str, Any], path: str) -> Result:
    _check_types(content, _TYPES, "it")
    if content["status"] not in ("done", "failed"):
        raise _BrokenError(f"its status is {content['status']!r}, neither 'done' nor 'failed'")
    done = content["status"] == "done"
    _check_types(content["settings"], _SETTINGS_TYPES, "'settings'")
    _check_types(content["hardware"], _HARDWARE_TYPES, "'hardware'")
    error = content.get("error") or {}
    if not isinstance(error, dict):
        raise _BrokenError(f"its error is {error!r}")
    columns = {name: np.zeros(0) for name in ("steps", "seconds", "cpu_seconds", "returns")}
    if done:
        _check_types(content, _TYPES_WHEN_DONE, "it")
        _check_types(content["settings"], {"hyperparameters": dict}, "'settings'")
        if not isinstance(content.get("reward_threshold"), float | int | None):
            raise _BrokenError(f"its reward_threshold is {content['reward_threshold']!r}")
        columns = _parse_curve(content["curve"], content["settings"])
    return Result(
        algo=content["algo"],
        env=content["env"],
        seed=content["seed"],
        done=done,
        settings=content["settings"],
        steps=columns["steps"],
        seconds=columns["seconds"],
        cpu_seconds=columns["cpu_seconds"],
        returns=columns["returns"],
        steps_taken=int(content.get("steps_taken", content["settings"]["n_timesteps"])),
        steps_per_second=float(content.get("steps_per_second", 0)),
        peak_memory=int(content.get("peak_memory_bytes", 0)),
        wall_seconds=float(content.get("wall_seconds", 0)),
        error=f"{error.get('type')}: {error.get('message')}" if error else "",
        content=content,
        path=path,
    )


def _parse_curve(curve: dict[str, Any], settings: dict[str, Any]) -> dict[str, Array]:
    """Return the columns of a learning curve, each ``(T,)``; the returns are averaged over the episodes."""
    lists = {name: curve.get(name) for name in _CURVE_COLUMNS}
    lengths = {len(column) if isinstance(column, list) else 0 for column in lists.values()}
    if len(lengths - {0}) != 1 or not all(lists.values()):
        raise _BrokenError("the columns of its curve differ in length")
    if lists["steps"] != evaluation_steps(settings["n_timesteps"], settings["n_evaluations"]):
        raise _BrokenError(
            f"its evaluations are not those of n_timesteps={settings['n_timesteps']}, "
            f"n_evaluations={settings['n_evaluations']}"
        )
    try:
        columns = {name: np.array(lists[name], float) for name in ("steps", "seconds", "cpu_seconds")}
        episode_returns = np.array(lists["returns"], float)
    except (TypeError, ValueError) as error:
        raise _BrokenError(f"its curve has an invalid value: {error}") from error
    if episode_returns.shape != (len(columns["steps"]), settings["eval_episodes"]):
        raise _BrokenError(f"it does not have {settings['eval_episodes']} episodes in each evaluation")
    columns["returns"] = episode_returns.mean(axis=1)
    for name, column in columns.items():
        if column.ndim != 1 or not np.isfinite(column).all():
            raise _BrokenError(f"the {name} of its curve are not finite numbers")
    return columns


def read_result(path: Path) -> Result:
    """Read the file of a run.

    :param path: the path of the file
    :raises ValueError: if it cannot be read, or is not the file of a run; the message names the file
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; remove it, and run again")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken: it is not JSON ({error}); remove it, and run again") from error
    return parse_result(content, str(path))


def read_results(folder: Path) -> list[Result]:
    """Read all results in a folder.

    :param folder: the output folder of ``run``
    :return: sorted by environment, algorithm and seed
    :raises ValueError: if there are none, or one is broken
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder of results, as written by run --out")
    results = []
    for path in sorted(folder.glob("*/*/seed_*.json")):
        result = read_result(path)
        check_location(result, folder)
        results.append(result)
    if not results:
        raise ValueError(f"{folder} has no results: there must be files such as CartPole-v1/dqn/seed_0.json")
    return sorted(results, key=lambda result: (result.env, result.algo, result.seed))


def check_location(result: Result, folder: Path) -> None:
    """Raise ValueError unless a result is at the path of its run, so that no run is counted twice.

    :param result: the result
    :param folder: the folder of results
    :raises ValueError: if it is elsewhere; the message names the file
    """
    expected = folder / run_path(result.algo, result.env, result.seed)
    if Path(result.path) != expected:
        raise ValueError(
            f"{result.path} holds seed {result.seed} of {result.algo} in {result.env}, which belongs in {expected}; "
            "move it there, or remove it"
        )


def check_comparable(results: Iterable[Result]) -> None:
    """Raise ValueError unless results have the settings that a comparison requires to be equal.

    :param results: the results of all algorithms and environments
    :raises ValueError: if settings differ; the message names two files
    """
    first: Result | None = None
    first_of_env: dict[str, Result] = {}
    first_of_algo: dict[tuple[str, str], Result] = {}
    for result in results:
        first = first or result
        same_env = first_of_env.setdefault(result.env, result)
        same_algo = first_of_algo.setdefault((result.env, result.algo), result)
        _check_equal("same_settings", first, result)
        for name in ("n_timesteps", "n_evaluations", "eval_episodes", "device"):
            _check_equal(name, same_env, result)
        if same_algo.done and result.done:
            _check_equal("hyperparameters", same_algo, result)
            _check_equal("deterministic_evaluation", same_algo, result)


def _check_equal(name: str, first: Result, second: Result) -> None:
    a, b = first.settings.get(name), second.settings.get(name)
    if a != b:
        if isinstance(a, dict) and isinstance(b, dict):
            key = next(key for key in sorted({*a, *b}) if a.get(key) != b.get(key))
            name, a, b = f"{name}[{key!r}]", a.get(key), b.get(key)
        raise ValueError(
            f"runs with different settings cannot be compared: {name} is {a!r} in {first.path}, and {b!r} in "
            f"{second.path}; keep them in separate folders"
        )
