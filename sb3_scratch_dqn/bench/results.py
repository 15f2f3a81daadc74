"""The files of finished runs, read and looked at."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.bench.plan import FORMAT

_FIELDS = ("algo", "env", "seed", "status", "settings", "versions", "hardware")
_FIELDS_WHEN_DONE = ("curve", "training_seconds", "steps_per_second", "peak_memory_bytes")
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
    :param returns: the mean of each evaluation, ``(T,)``
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
    returns: Array
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


def result_of(known: dict[str, Any], path: str) -> Result:
    """Look at what a file holds.

    :param known: the file's content
    :param path: of the file
    :raises ValueError: if it is not the file of a run, naming the file
    """
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        raise ValueError(f'{path} is no result of this benchmark: it must have "format": {FORMAT}')
    done = known.get("status") == "done"
    for name in (*_FIELDS, *(_FIELDS_WHEN_DONE if done else ())):
        if name not in known:
            raise ValueError(f"{path} is broken: it has no {name!r}; remove it, and run again")
    nothing = np.zeros(0)
    steps = seconds = returns = nothing
    if done:
        curve = known["curve"]
        lengths = {len(curve.get(name, ())) for name in _COLUMNS}
        if len(lengths) > 1 or lengths == {0} or not all(curve["returns"]):
            raise ValueError(f"{path} is broken: the columns of its curve differ in length; remove it, and run again")
        try:
            steps, seconds = np.array(curve["steps"], float), np.array(curve["seconds"], float)
            returns = np.array([np.mean(one) for one in curve["returns"]], float)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is broken: its curve holds {error}; remove it, and run again") from error
        if not np.isfinite(returns).all():
            raise ValueError(f"{path} is broken: its returns are not finite; remove it, and run again")
    failure = known.get("error") or {}
    return Result(
        algo=known["algo"],
        env=known["env"],
        seed=known["seed"],
        done=done,
        settings=known["settings"],
        steps=steps,
        seconds=seconds,
        returns=returns,
        steps_per_second=float(known.get("steps_per_second", 0)),
        peak_memory=int(known.get("peak_memory_bytes", 0)),
        wall_seconds=float(known.get("wall_seconds", 0)),
        error=f"{failure.get('type')}: {failure.get('message')}" if failure else "",
        known=known,
        path=path,
    )


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
    results = [read_result(path) for path in sorted(folder.glob("*/*/seed_*.json"))]
    if not results:
        raise ValueError(f"{folder} has no results: there must be files such as CartPole-v1/dqn/seed_0.json")
    return sorted(results, key=lambda result: (result.env, result.algo, result.seed))


def check_comparable(results: Iterable[Result]) -> None:
    """See whether results may be compared.

    :param results: of all algorithms and environments
    :raises ValueError: if settings are mixed, naming two files
    """
    of_env: dict[str, Result] = {}
    of_algo: dict[tuple[str, str], Result] = {}
    for result in results:
        first = of_env.setdefault(result.env, result)
        own = of_algo.setdefault((result.env, result.algo), result)
        for name in ("n_timesteps", "n_evaluations", "eval_episodes", "device", "same_settings"):
            _check_alike(name, first, result)
        if own.done and result.done:
            _check_alike("hyperparameters", own, result)


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
