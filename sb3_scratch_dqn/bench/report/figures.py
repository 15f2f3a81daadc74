"""The figures of a report.

Each algorithm has the same colour, line style and marker in all figures. The colours are the palette of Okabe and Ito,
which is safe for colour-blind readers; line styles and markers differ without colour, too.
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
_LINE_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GRID = {"color": "0.9", "linewidth": 0.8}
_COLUMNS = 2  # panels per row
_PANEL = (4.6, 3.1)  # inches
_DPI = 120


class Style(NamedTuple):
    """The matplotlib style of an algorithm."""

    color: str
    linestyle: str
    marker: str


# Algorithm -> its style
Styles = Mapping[str, Style]


def make_styles(algos: Sequence[str]) -> Styles:
    """Return a distinct style for each algorithm.

    :param algos: the algorithms; their order determines the styles
    """
    return {
        algo: Style(_COLOURS[i % len(_COLOURS)], _LINE_STYLES[i % len(_LINE_STYLES)], _MARKERS[i % len(_MARKERS)])
        for i, algo in enumerate(algos)
    }


class Curve(NamedTuple):
    """A curve with its interval.

    :param x: ``(T,)``
    :param y: each ``(T,)``
    """

    x: Array
    y: Estimate


def _make_panels(count: int, size: tuple[float, float] = _PANEL) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.4), layout="constrained")
    axes = list(np.ravel(np.asarray(figure.subplots(rows, columns))))
    for unused in axes[count:]:
        unused.set_axis_off()
    for panel in axes[:count]:
        panel.grid(**_GRID)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _format_tick(value: float, _: object = None) -> str:
    """Format 10,000 as 10k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def curves(env_curves: Mapping[str, Mapping[str, Curve]], styles: Styles, x_label: str) -> Figure:
    """Draw learning curves, one panel per environment.

    :param env_curves: environment -> algorithm -> its curve
    :param styles: algorithm -> its style
    :param x_label: the label of the x-axis, with its unit
    """
    figure, panels = _make_panels(len(env_curves))
    handles: dict[str, Any] = {}
    for panel, (env, algo_curves) in zip(panels, env_curves.items(), strict=True):
        for algo, (x, y) in algo_curves.items():
            color, linestyle, _ = styles[algo]
            (handles[algo],) = panel.plot(x, y.value, label=algo, color=color, linestyle=linestyle)
            panel.fill_between(x, y.low, y.high, color=color, alpha=0.18, linewidth=0)
        panel.set_title(env, fontsize=10)
        panel.set_xlabel(x_label)
        panel.set_ylabel("return")
        panel.xaxis.set_major_formatter(FuncFormatter(_format_tick))
        panel.xaxis.set_major_locator(MaxNLocator(6))
        panel.margins(x=0.01)
    _add_legend(figure, handles)
    return figure


def _add_legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    # About 13 characters fit into an inch; a name's line sample is about as wide as 8 characters
    fit = int(13 * figure.get_figwidth() / (8 + max(map(len, handles))))
    columns = max(1, min(len(handles), fit))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False)


def intervals(
    panel_estimates: Mapping[str, tuple[str, Mapping[str, Estimate]]],
    styles: Styles,
    from_zero: bool = False,
) -> Figure:
    """Draw numbers with their intervals, one panel per quantity, one row per algorithm.

    :param panel_estimates: title of the panel -> label of the x-axis, and algorithm -> number
    :param styles: algorithm -> its style
    :param from_zero: whether the x-axes start at zero
    """
    rows = max(len(estimates) for _, estimates in panel_estimates.values())
    figure, panels = _make_panels(len(panel_estimates), (_PANEL[0], 0.75 + 0.3 * rows))
    for panel, (title, (label, estimates)) in zip(panels, panel_estimates.items(), strict=True):
        _draw_rows(panel, estimates, styles)
        panel.set_title("\n".join(textwrap.wrap(title.replace("`", ""), 46)), fontsize=10)
        panel.set_xlabel(label)
        if from_zero:
            panel.set_xlim(0, 1.05 * max(float(estimate.high) for estimate in estimates.values()))
    return figure


def _draw_rows(panel: Axes, estimates: Mapping[str, Estimate], styles: Styles) -> None:
    for row, (algo, (value, low, high)) in enumerate(estimates.items()):
        color, _, marker = styles[algo]
        panel.plot([low, high], [row, row], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        panel.plot([value], [row], color=color, marker=marker, linestyle="", markersize=6)
    panel.set_yticks(range(len(estimates)), list(estimates))
    panel.set_ylim(len(estimates) - 0.5, -0.5)
    panel.grid(visible=False, axis="y")
    panel.xaxis.set_major_formatter(FuncFormatter(_format_tick))
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.margins(x=0.08)


def improvement(
    panel_estimates: Mapping[str, Mapping[str, Estimate]], styles: Styles, reference: str, label: str
) -> Figure:
    """Draw probabilities of improvement over a reference, one panel per environment.

    :param panel_estimates: title of the panel -> algorithm -> probability
    :param styles: algorithm -> its style
    :param reference: the algorithm that the others are compared with
    :param label: the measure that is compared
    """
    rows = max(map(len, panel_estimates.values()))
    figure, panels = _make_panels(len(panel_estimates), (_PANEL[0], 0.75 + 0.3 * rows))
    for panel, (title, estimates) in zip(panels, panel_estimates.items(), strict=True):
        _draw_rows(panel, estimates, styles)
        panel.axvline(0.5, color="0.4", linewidth=1, linestyle=(0, (2, 2)))
        panel.set_xlim(-0.03, 1.03)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(f"probability of a {label} than {reference}'s")
    return figure


def profiles(thresholds: Array, shares: Mapping[str, Estimate], styles: Styles) -> Figure:
    """Draw performance profiles: the share of runs above each score.

    :param thresholds: normalised scores, ``(K,)``
    :param shares: algorithm -> share of its runs, each ``(K,)``
    :param styles: algorithm -> its style
    """
    figure, (panel,) = _make_panels(1, (6.4, 3.6))
    handles: dict[str, Any] = {}
    for algo, (value, low, high) in shares.items():
        color, linestyle, _ = styles[algo]
        (handles[algo],) = panel.plot(thresholds, value, color=color, linestyle=linestyle, drawstyle="steps-post")
        panel.fill_between(thresholds, low, high, color=color, alpha=0.18, linewidth=0, step="post")
    panel.set_xlabel("normalised final return")
    panel.set_ylabel("share of runs with a higher one")
    panel.set_ylim(-0.02, 1.02)
    panel.margins(x=0.01)
    _add_legend(figure, handles)
    return figure


def png(figure: Figure) -> bytes:
    """Render a figure as PNG; the same figure gives the same bytes.

    :param figure: the figure
    """
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
