"""Time functions in turn, on a machine that also runs other programs."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

# The approximate duration of a measurement, in seconds
_SECONDS = 0.1


class Timings(NamedTuple):
    """Times of several contestants, measured in turn.

    :param times: contestant -> seconds per call, one for each round
    """

    times: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds per call of a contestant."""
        return statistics.median(self.times[name])

    def ratios(self, name: str, reference: str) -> list[float]:
        """Return the times of a contestant divided by those of a reference, one per round, sorted."""
        return sorted(a / b for a, b in zip(self.times[name], self.times[reference], strict=True))


def time_in_turn(contestants: Mapping[str, Callable[[], object]], rounds: int) -> Timings:
    """Time functions in turn, round after round, so that a disturbance affects all of them.

    :param contestants: name -> function without arguments
    :param rounds: number of measurements of each function
    """
    calls = {name: _calibrate(function) for name, function in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in contestants.items():
                times[name].append(_seconds_per_call(function, calls[name]))
    finally:
        if gc_enabled:
            gc.enable()
    return Timings(times)


def _seconds_per_call(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _calibrate(function: Callable[[], object]) -> int:
    """Return the number of calls that take long enough to be measured."""
    calls = 1
    while (seconds := _seconds_per_call(function, calls) * calls) < _SECONDS / 4:
        calls *= 2
    return max(1, round(calls * _SECONDS / seconds))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
