"""What the benchmark of speed measured: as tables, as ratios, and as a file among the results of a comparison."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sb3_scratch_dqn.bench.report.stats import Estimate
from sb3_scratch_dqn.bench.speed.timing import table
from sb3_scratch_dqn.common.files import atomic_write

_FILE = "speed.json"
_FORMAT = 1


class Round(NamedTuple):
    """One measurement, in seconds.

    :param learning: of ``learn()``, for the steps of the case
    :param updating: of one update
    """

    learning: float
    updating: float


class Figures(NamedTuple):
    """What was measured of one contestant.

    :param rounds: in their order
    :param peak: the most memory that its process had, in bytes
    """

    rounds: list[Round]
    peak: int


class Measured(NamedTuple):
    """What was measured in one case.

    :param title: of the case
    :param steps: environment steps of a measurement
    :param contestants: what was measured of each, or why it could not take part
    :param origin: versions, hardware, commit and the like, ready for JSON
    """

    title: str
    steps: int
    contestants: Mapping[str, Figures | str]
    origin: Mapping[str, Any]

    @property
    def able(self) -> dict[str, Figures]:
        """The contestants that took part."""
        return {name: figures for name, figures in self.contestants.items() if isinstance(figures, Figures)}

    def ratios(self, name: str, reference: str, kind: str) -> Estimate:
        """How much faster one is than another: the median over rounds, and the extremes.

        :param name: of a contestant
        :param reference: of another
        :param kind: a field of :class:`Round`
        """
        ours, theirs = (self.seconds(contestant, kind) for contestant in (name, reference))
        ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
        return Estimate(*map(np.asarray, (statistics.median(ratios), ratios[0], ratios[-1])))

    def seconds(self, name: str, kind: str) -> list[float]:
        """Round by round.

        :param name: of a contestant
        :param kind: a field of :class:`Round`
        """
        return [getattr(one, kind) for one in self.able[name].rounds]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of a table."""
        references = [name for name in ("sb3", "sbx") if name in self.able]
        header = ["", "steps/s", "updates/s", *(f"x {name}, learn()" for name in references)]
        header += [*(f"x {name}, updates" for name in references), "peak memory"]
        rows = []
        for name, figures in self.able.items():
            learning, updating = (statistics.median(self.seconds(name, kind)) for kind in Round._fields)
            row = [name, f"{self.steps / learning:,.0f}", f"{1 / updating:,.0f}"]
            for kind in Round._fields:
                for reference in references:
                    ratio = self.ratios(name, reference, kind)
                    row.append(f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})")
            rows.append([*row, f"{figures.peak / 2**20:,.0f} MiB"])
        return header, rows

    def failures(self) -> list[str]:
        """Who could not take part, and why."""
        return [f"{name}: {reason}" for name, reason in self.contestants.items() if isinstance(reason, str)]

    def markdown(self) -> str:
        """All of it in Markdown."""
        return "\n\n".join([f"### {self.title}", table(*self.cells()), *self.failures()])


def save_speed(measured: Sequence[Measured], folder: Path) -> Path:
    """Keep what was measured, beside what was measured before of other cases.

    :param measured: of some cases
    :param folder: of results
    :return: the file
    :raises ValueError: if there is a file that is broken
    """
    kept = {one.title: one for one in [*read_speed(folder), *measured]}
    cases = [one._asdict() for one in kept.values()]
    for case in cases:
        case["contestants"] = {
            name: {"error": one} if isinstance(one, str) else one._asdict() for name, one in case["contestants"].items()
        }
    path = folder / _FILE
    with atomic_write(path) as file:
        file.write(f"{json.dumps({'format': _FORMAT, 'cases': cases}, indent=1)}\n".encode())
    return path


def read_speed(folder: Path) -> list[Measured]:
    """What :func:`save_speed` kept; nothing if there is no file.

    :param folder: of results
    :raises ValueError: if the file is broken
    """
    path = folder / _FILE
    if not path.exists():
        return []
    try:
        known = json.loads(path.read_text())
        if known["format"] != _FORMAT:
            raise ValueError(f"its format is {known['format']!r}, not {_FORMAT}")
        return [Measured(**{**case, "contestants": _contestants(case)}) for case in known["cases"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken: {error!r}; remove it, and measure again") from error


def _contestants(case: Mapping[str, Any]) -> dict[str, Figures | str]:
    return {
        name: one["error"] if "error" in one else Figures([Round(*pair) for pair in one["rounds"]], one["peak"])
        for name, one in case["contestants"].items()
    }
