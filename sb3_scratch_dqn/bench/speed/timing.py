"""Measuring two pieces of code against each other, on a machine that has other things to do as well."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

# A measurement takes about so long, in seconds
_SECONDS = 0.1


class Comparison(NamedTuple):
    """Times of several contestants, measured in turn.

    :param times: seconds a call, one for each round, of each contestant
    """

    times: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Seconds a call."""
        return statistics.median(self.times[name])

    def ratios(self, name: str, reference: str) -> list[float]:
        """The time of one over that of another, round by round, from the least to the largest."""
        return sorted(a / b for a, b in zip(self.times[name], self.times[reference], strict=True))


def compare(contestants: Mapping[str, Callable[[], object]], rounds: int) -> Comparison:
    """Time some functions in turn, round after round, so that what disturbs one disturbs all.

    :param contestants: functions without arguments
    :param rounds: how often each is measured
    """
    calls = {name: _calls(function) for name, function in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in contestants.items():
                times[name].append(_time(function, calls[name]))
    finally:
        if collects:
            gc.enable()
    return Comparison(times)


def _time(function: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def _calls(function: Callable[[], object]) -> int:
    """How many calls take long enough to be measured."""
    calls = 1
    while (seconds := _time(function, calls) * calls) < _SECONDS / 4:
        calls *= 2
    return max(1, round(calls * _SECONDS / seconds))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
