"""The results of the speed benchmark: as tables, as ratios, and as a file in a folder of results."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sb3_scratch_dqn.bench.report.stats import Estimate
from sb3_scratch_dqn.bench.speed.timing import table
from sb3_scratch_dqn.common.files import atomic_write

_FILE_NAME = "speed.json"
_FILE_FORMAT = 1


class Round(NamedTuple):
    """One measurement, in seconds.

    :param learning: seconds of ``learn()`` for the steps of the case
    :param updating: seconds of one update
    """

    learning: float
    updating: float


class Measurements(NamedTuple):
    """The measurements of one contestant.

    :param rounds: the measurements in their order
    :param peak_memory: peak memory of its process, in bytes
    """

    rounds: list[Round]
    peak_memory: int


class CaseResult(NamedTuple):
    """The results of all contestants in one case.

    :param title: the title of the case
    :param steps: environment steps per measurement
    :param contestants: contestant -> its measurements, or the error for which it could not take part
    :param provenance: versions, hardware, commit and time of the measurement, ready for JSON
    """

    title: str
    steps: int
    contestants: Mapping[str, Measurements | str]
    provenance: Mapping[str, Any]

    @property
    def succeeded(self) -> dict[str, Measurements]:
        """The contestants that were measured."""
        return {name: measured for name, measured in self.contestants.items() if isinstance(measured, Measurements)}

    def ratios(self, name: str, reference: str, kind: str) -> Estimate:
        """Return how many times faster a contestant is than a reference: median, minimum and maximum over rounds.

        :param name: the contestant
        :param reference: the contestant to compare it with
        :param kind: a field of :class:`Round`
        """
        ours, theirs = (self.seconds(contestant, kind) for contestant in (name, reference))
        ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
        return Estimate(*map(np.asarray, (statistics.median(ratios), ratios[0], ratios[-1])))

    def seconds(self, name: str, kind: str) -> list[float]:
        """Return the seconds of a contestant, one for each round.

        :param name: the contestant
        :param kind: a field of :class:`Round`
        """
        return [getattr(measured, kind) for measured in self.succeeded[name].rounds]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of a table of the results."""
        references = [name for name in ("sb3", "sbx") if name in self.succeeded]
        header = ["", "steps/s", "updates/s", *(f"x {name}, learn()" for name in references)]
        header += [*(f"x {name}, updates" for name in references), "peak memory"]
        rows = []
        for name, measured in self.succeeded.items():
            learning, updating = (statistics.median(self.seconds(name, kind)) for kind in Round._fields)
            row = [name, f"{self.steps / learning:,.0f}", f"{1 / updating:,.0f}"]
            for kind in Round._fields:
                for reference in references:
                    ratio = self.ratios(name, reference, kind)
                    row.append(f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})")
            rows.append([*row, f"{measured.peak_memory / 2**20:,.0f} MiB"])
        return header, rows

    def failures(self) -> list[str]:
        """Return the contestants that could not take part, with their errors."""
        return [f"{name}: {error}" for name, error in self.contestants.items() if isinstance(error, str)]

    def markdown(self) -> str:
        """Return the results in Markdown."""
        return "\n\n".join([f"### {self.title}", table(*self.cells()), *self.failures()])


def save_speed(results: Sequence[CaseResult], folder: Path) -> Path:
    """Add results to the file in a folder; they replace earlier results of the same cases.

    :param results: the results of some cases
    :param folder: the folder of results
    :return: the path of the file
    :raises ValueError: if the existing file is broken
    """
    merged = {result.title: result for result in [*read_speed(folder), *results]}
    cases = [
        {
            "title": result.title,
            "steps": result.steps,
            "contestants": {name: _to_json(measured) for name, measured in result.contestants.items()},
            "origin": result.provenance,
        }
        for result in merged.values()
    ]
    path = folder / _FILE_NAME
    with atomic_write(path) as file:
        file.write(f"{json.dumps({'format': _FILE_FORMAT, 'cases': cases}, indent=1)}\n".encode())
    return path


def read_speed(folder: Path) -> list[CaseResult]:
    """Read the file of :func:`save_speed`.

    :param folder: the folder of results
    :return: the results; none if there is no file
    :raises ValueError: if the file is broken
    """
    path = folder / _FILE_NAME
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FILE_FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FILE_FORMAT}")
        return [
            CaseResult(
                case["title"],
                case["steps"],
                {name: _from_json(entry) for name, entry in case["contestants"].items()},
                case["origin"],
            )
            for case in content["cases"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken: {error!r}; remove it, and measure again") from error


def _to_json(measured: Measurements | str) -> dict[str, Any]:
    if isinstance(measured, str):
        return {"error": measured}
    return {"rounds": measured.rounds, "peak": measured.peak_memory}


def _from_json(entry: Mapping[str, Any]) -> Measurements | str:
    if "error" in entry:
        return str(entry["error"])
    return Measurements([Round(*seconds) for seconds in entry["rounds"]], entry["peak"])
