"""The figures of a report.

Each algorithm has the same colour, line and marker in all figures: the palette of Okabe and Ito, which people who see
fewer colours can tell apart, as they can the lines and markers without any colour.
"""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sb3_scratch_dqn.bench.report.stats import Estimate

Array = npt.NDArray[np.float64]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GRID = {"color": "0.9", "linewidth": 0.8}
_COLUMNS = 2  # of panels beside each other
_PANEL = (4.6, 3.1)  # inches
_DPI = 120


class Look(NamedTuple):
    """How an algorithm is drawn."""

    color: str
    linestyle: str
    marker: str


def looks(algos: Sequence[str]) -> dict[str, Look]:
    """Give each algorithm a look of its own.

    :param algos: in an order that does not change
    """
    return {
        algo: Look(_COLOURS[i % len(_COLOURS)], _LINES[i % len(_LINES)], _MARKERS[i % len(_MARKERS)])
        for i, algo in enumerate(algos)
    }


class Line(NamedTuple):
    """A curve with a band around it.

    :param x: ``(T,)``
    :param y: each ``(T,)``
    """

    x: Array
    y: Estimate


def _panels(count: int, panel: tuple[float, float] = _PANEL) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows + 0.4), layout="constrained")
    axes = list(np.ravel(np.asarray(figure.subplots(rows, columns))))
    for unused in axes[count:]:
        unused.set_axis_off()
    for one in axes[:count]:
        one.grid(**_GRID)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _short(value: float, _: object = None) -> str:
    """10,000 as 10k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def curves(lines: Mapping[str, Mapping[str, Line]], look: Mapping[str, Look], x_label: str) -> Figure:
    """Learning curves, a panel for each environment.

    :param lines: environment -> algorithm -> its curve
    :param look: of the algorithms
    :param x_label: with the unit
    """
    figure, axes = _panels(len(lines))
    shown: dict[str, Any] = {}
    for one, (env, of_algo) in zip(axes, lines.items(), strict=True):
        for algo, (x, y) in of_algo.items():
            (shown[algo],) = one.plot(x, y.value, label=algo, color=look[algo].color, linestyle=look[algo].linestyle)
            one.fill_between(x, y.low, y.high, color=look[algo].color, alpha=0.18, linewidth=0)
        one.set_title(env, fontsize=10)
        one.set_xlabel(x_label)
        one.set_ylabel("return")
        one.xaxis.set_major_formatter(FuncFormatter(_short))
        one.xaxis.set_major_locator(MaxNLocator(6))
        one.margins(x=0.01)
    _legend(figure, shown)
    return figure


def _legend(figure: Figure, shown: Mapping[str, Any]) -> None:
    # About so many letters fit beside each other, each name with its line before it
    fit = int(13 * figure.get_figwidth() / (8 + max(map(len, shown))))
    columns = max(1, min(len(shown), fit))
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=columns, frameon=False)


def intervals(
    panels: Mapping[str, tuple[str, Mapping[str, Estimate]]], look: Mapping[str, Look], from_zero: bool = False
) -> Figure:
    """Numbers with their intervals, a panel for each kind, a row for each algorithm.

    :param panels: title -> label of the axis, and algorithm -> number
    :param look: of the algorithms
    :param from_zero: whether the axes begin there
    """
    rows = max(len(of_algo) for _, of_algo in panels.values())
    figure, axes = _panels(len(panels), (_PANEL[0], 0.75 + 0.3 * rows))
    for one, (title, (label, of_algo)) in zip(axes, panels.items(), strict=True):
        _rows(one, of_algo, look)
        one.set_title("\n".join(textwrap.wrap(title.replace("`", ""), 46)), fontsize=10)
        one.set_xlabel(label)
        if from_zero:
            one.set_xlim(0, 1.05 * max(float(estimate.high) for estimate in of_algo.values()))
    return figure


def _rows(axes: Axes, of_row: Mapping[str, Estimate], look: Mapping[str, Look]) -> None:
    for place, (name, (value, low, high)) in enumerate(of_row.items()):
        colour, _, marker = look[name]
        axes.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot([value], [place], color=colour, marker=marker, linestyle="", markersize=6)
    axes.set_yticks(range(len(of_row)), list(of_row))
    axes.set_ylim(len(of_row) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.08)


def improvement(
    panels: Mapping[str, Mapping[str, Estimate]], look: Mapping[str, Look], reference: str, label: str
) -> Figure:
    """The probability of improvement over a reference, a panel for each group of environments.

    :param panels: title -> algorithm -> probability
    :param look: of the algorithms
    :param reference: the algorithm that the others are compared with
    :param label: what is compared
    """
    rows = max(map(len, panels.values()))
    figure, axes = _panels(len(panels), (_PANEL[0], 0.75 + 0.3 * rows))
    for one, (title, of_algo) in zip(axes, panels.items(), strict=True):
        _rows(one, of_algo, look)
        one.axvline(0.5, color="0.4", linewidth=1, linestyle=(0, (2, 2)))
        one.set_xlim(-0.03, 1.03)
        one.set_title(title, fontsize=10)
        one.set_xlabel(f"probability of a {label} than {reference}'s")
    return figure


def profiles(thresholds: Array, shares: Mapping[str, Estimate], look: Mapping[str, Look]) -> Figure:
    """Performance profiles: the share of runs above each score.

    :param thresholds: normalised scores, ``(K,)``
    :param shares: algorithm -> share of its runs, each ``(K,)``
    :param look: of the algorithms
    """
    figure, (axes,) = _panels(1, (6.4, 3.6))
    shown: dict[str, Any] = {}
    for algo, (value, low, high) in shares.items():
        colour, line, _ = look[algo]
        (shown[algo],) = axes.plot(thresholds, value, color=colour, linestyle=line, drawstyle="steps-post")
        axes.fill_between(thresholds, low, high, color=colour, alpha=0.18, linewidth=0, step="post")
    axes.set_xlabel("normalised final return")
    axes.set_ylabel("share of runs with a higher one")
    axes.set_ylim(-0.02, 1.02)
    axes.margins(x=0.01)
    _legend(figure, shown)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a picture, the same each time.

    :param figure: the figure
    """
    written = BytesIO()
    figure.savefig(written, format="png", dpi=_DPI, metadata={"Software": None})
    return written.getvalue()
