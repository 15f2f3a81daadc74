"""The files of finished runs, read and looked at."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.bench.run.plan import FORMAT, evaluation_steps, run_path

# What each entry must be
_NUMBER = int | float
_KINDS = {"algo": str, "env": str, "seed": int, "status": str, "settings": dict, "versions": dict, "hardware": dict}
_KINDS_WHEN_DONE = {
    "curve": dict,
    "training_seconds": _NUMBER,
    "steps_per_second": _NUMBER,
    "peak_memory_bytes": _NUMBER,
}
_KINDS_OF_SETTINGS = {
    "n_timesteps": int,
    "n_evaluations": int,
    "eval_episodes": int,
    "device": str,
    "same_settings": str | None,
    "gym_packages": list,
}
_KINDS_OF_HARDWARE = {"processor": str, "cores": int, "system": str}
_COLUMNS = ("steps", "seconds", "cpu_seconds", "returns", "lengths")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """What came of a run.

    :param algo: as on the command line
    :param env: the name of the environment
    :param seed: of everything random
    :param done: whether it ended well
    :param settings: all that it was made with
    :param steps: after which it was evaluated, ``(T,)``
    :param seconds: of training until then, ``(T,)``
    :param cpu_seconds: that its process computed until then, ``(T,)``
    :param returns: the mean of each evaluation, ``(T,)``
    :param steps_taken: by the end, which may be more than were wanted
    :param steps_per_second: of training
    :param peak_memory: of its process, in bytes
    :param wall_seconds: that all of it took, evaluations included
    :param error: why it failed
    :param known: all that is in the file
    :param path: of the file
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
    known: dict[str, Any]
    path: str

    @property
    def final(self) -> float:
        """The mean return of the last evaluation."""
        return float(self.returns[-1])

    @property
    def area(self) -> float:
        """The area under the learning curve over that of a return of 1: a mean over the steps of training."""
        return float(np.trapezoid(self.returns, self.steps) / (self.steps[-1] - self.steps[0]))


def result_of(known: Any, path: str) -> Result:
    """Look at what a file holds.

    :param known: the file's content
    :param path: of the file
    :raises ValueError: if it is not the file of a run, naming the file
    """
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        raise ValueError(f'{path} is no result of this benchmark: it must have "format": {FORMAT}')
    try:
        return _read(known, path)
    except _BrokenError as error:
        raise ValueError(f"{path} is broken: {error}; remove it, and run again") from error


class _BrokenError(Exception):
    """What is wrong with a file."""


def _check_kinds(known: dict[str, Any], kinds: dict[str, Any], where: str) -> None:
    for name, kind in kinds.items():
        if name not in known:
            raise _BrokenError(f"{where} has no {name!r}")
        if not isinstance(known[name], kind) or isinstance(known[name], bool) != (kind is bool):
            raise _BrokenError(f"{name!r} in {where} is {known[name]!r}")


def _read(known: dict[str, Any], path: str) -> Result:
    _check_kinds(known, _KINDS, "it")
    if known["status"] not in ("done", "failed"):
        raise _BrokenError(f"its status is {known['status']!r}, neither 'done' nor 'failed'")
    done = known["status"] == "done"
    _check_kinds(known["settings"], _KINDS_OF_SETTINGS, "'settings'")
    _check_kinds(known["hardware"], _KINDS_OF_HARDWARE, "'hardware'")
    failure = known.get("error") or {}
    if not isinstance(failure, dict):
        raise _BrokenError(f"its error is {failure!r}")
    columns = {name: np.zeros(0) for name in ("steps", "seconds", "cpu_seconds", "returns")}
    if done:
        _check_kinds(known, _KINDS_WHEN_DONE, "it")
        _check_kinds(known["settings"], {"hyperparameters": dict}, "'settings'")
        if not isinstance(known.get("reward_threshold"), float | int | None):
            raise _BrokenError(f"its reward_threshold is {known['reward_threshold']!r}")
        columns = _columns(known["curve"], known["settings"])
    return Result(
        algo=known["algo"],
        env=known["env"],
        seed=known["seed"],
        done=done,
        settings=known["settings"],
        steps=columns["steps"],
        seconds=columns["seconds"],
        cpu_seconds=columns["cpu_seconds"],
        returns=columns["returns"],
        steps_taken=int(known.get("steps_taken", known["settings"]["n_timesteps"])),
        steps_per_second=float(known.get("steps_per_second", 0)),
        peak_memory=int(known.get("peak_memory_bytes", 0)),
        wall_seconds=float(known.get("wall_seconds", 0)),
        error=f"{failure.get('type')}: {failure.get('message')}" if failure else "",
        known=known,
        path=path,
    )


def _columns(curve: dict[str, Any], settings: dict[str, Any]) -> dict[str, Array]:
    """The columns of a curve, ``(T,)`` each."""
    lists = {name: curve.get(name) for name in _COLUMNS}
    if len({len(one) if isinstance(one, list) else 0 for one in lists.values()} - {0}) != 1 or not all(lists.values()):
        raise _BrokenError("the columns of its curve differ in length")
    if lists["steps"] != evaluation_steps(settings["n_timesteps"], settings["n_evaluations"]):
        raise _BrokenError(
            f"its evaluations are not those of n_timesteps={settings['n_timesteps']}, "
            f"n_evaluations={settings['n_evaluations']}"
        )
    try:
        columns = {name: np.array(lists[name], float) for name in ("steps", "seconds", "cpu_seconds")}
        episodes = np.array(lists["returns"], float)
    except (TypeError, ValueError) as error:
        raise _BrokenError(f"its curve holds {error}") from error
    if episodes.shape != (len(columns["steps"]), settings["eval_episodes"]):
        raise _BrokenError(f"it has not {settings['eval_episodes']} episodes in each evaluation")
    columns["returns"] = episodes.mean(axis=1)
    for name, column in columns.items():
        if column.ndim != 1 or not np.isfinite(column).all():
            raise _BrokenError(f"the {name} of its curve are not finite numbers")
    return columns


def read_result(path: Path) -> Result:
    """Read the file of a run.

    :param path: of the file
    :raises ValueError: if it cannot be read, or is not the file of a run, naming the file
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; remove it, and run again")
    try:
        known = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken: it is no JSON ({error}); remove it, and run again") from error
    return result_of(known, str(path))


def read_results(folder: Path) -> list[Result]:
    """Read all results in a folder.

    :param folder: that ``run`` wrote to
    :return: in the order of their environments, algorithms and seeds
    :raises ValueError: if there are none, or one is broken
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder of results, as run --out makes one")
    results = []
    for path in sorted(folder.glob("*/*/seed_*.json")):
        result = read_result(path)
        check_place(result, folder)
        results.append(result)
    if not results:
        raise ValueError(f"{folder} has no results: there must be files such as CartPole-v1/dqn/seed_0.json")
    return sorted(results, key=lambda result: (result.env, result.algo, result.seed))


def check_place(result: Result, folder: Path) -> None:
    """See whether a result is where its run would have put it, so that none is counted twice.

    :param result: that was read
    :param folder: of results
    :raises ValueError: if it is not, naming the file
    """
    place = folder / run_path(result.algo, result.env, result.seed)
    if Path(result.path) != place:
        raise ValueError(
            f"{result.path} holds seed {result.seed} of {result.algo} in {result.env}, which belongs into {place}; "
            "move it there, or away"
        )


def check_comparable(results: Iterable[Result]) -> None:
    """See whether results may be compared.

    :param results: of all algorithms and environments
    :raises ValueError: if settings are mixed, naming two files
    """
    any_one: Result | None = None
    of_env: dict[str, Result] = {}
    of_algo: dict[tuple[str, str], Result] = {}
    for result in results:
        first = of_env.setdefault(result.env, result)
        own = of_algo.setdefault((result.env, result.algo), result)
        any_one = any_one or result
        _check_alike("same_settings", any_one, result)
        for name in ("n_timesteps", "n_evaluations", "eval_episodes", "device"):
            _check_alike(name, first, result)
        if own.done and result.done:
            _check_alike("hyperparameters", own, result)
            _check_alike("deterministic_evaluation", own, result)


def _check_alike(name: str, first: Result, second: Result) -> None:
    one, other = first.settings.get(name), second.settings.get(name)
    if one != other:
        if isinstance(one, dict) and isinstance(other, dict):
            key = next(key for key in sorted({*one, *other}) if one.get(key) != other.get(key))
            name, one, other = f"{name}[{key!r}]", one.get(key), other.get(key)
        raise ValueError(
            f"settings are mixed, so nothing can be compared: {name} is {one!r} in {first.path}, and {other!r} in "
            f"{second.path}; keep them in folders of their own"
        )
