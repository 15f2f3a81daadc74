"""The sections of a report on throughput and memory of the runs, and on the results of the speed benchmark."""

import numpy as np

from sb3_scratch_dqn.bench.report import figures, stats
from sb3_scratch_dqn.bench.report.comparison import Comparison, format_estimate
from sb3_scratch_dqn.bench.report.document import Document
from sb3_scratch_dqn.bench.report.figures import Styles
from sb3_scratch_dqn.bench.report.provenance import describe_setup
from sb3_scratch_dqn.bench.report.stats import Estimate
from sb3_scratch_dqn.bench.speed.results import CaseResult

_MIB = 2**20


def write_costs(document: Document, comparison: Comparison, styles: Styles) -> None:
    """Write the section on throughput and memory of the runs.

    :param document: the report
    :param comparison: the results of all runs
    :param styles: algorithm -> its style in figures
    """
    document.heading("Throughput and memory")
    rows = []
    panels: dict[str, tuple[str, dict[str, Estimate]]] = {}
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            runs = comparison.runs(env, algo)
            speed = stats.iqm_interval(np.array([run.steps_per_second for run in runs]))
            memory = stats.iqm_interval(np.array([run.peak_memory / _MIB for run in runs]))
            cpu_share = np.median([run.cpu_seconds[-1] / max(run.seconds[-1], 1e-9) for run in runs])
            panels.setdefault(f"{env}, throughput", ("environment steps per second of training", {}))[1][algo] = speed
            panels.setdefault(f"{env}, memory", ("peak memory of the process (MiB)", {}))[1][algo] = memory
            cells = (format_estimate(estimate, "{:,.0f}".format, len(runs)) for estimate in (speed, memory))
            rows.append([env, f"`{algo}`", *cells, f"{cpu_share:.2f}"])
    document.table(["environment", "algorithm", "steps/s", "peak memory, MiB", "processor time / time"], rows)
    document.paragraph(
        "Interquartile means over runs, with 95% intervals. Runs that share a machine slow each other down; "
        "`python -m sb3_scratch_dqn.bench speed` compares speeds fairly."
    )
    document.picture(
        "costs",
        figures.png(figures.intervals(panels, styles, from_zero=True)),
        "Steps per second of training, and peak memory of the training process.",
    )


def write_speed(document: Document, cases: list[CaseResult]) -> None:
    """Write the section on the results of the speed benchmark.

    :param document: the report
    :param cases: the results
    """
    document.heading("Speed")
    document.paragraph(
        "Contestants are measured in turn, with one thread each, on one processor core. Ratios are medians over "
        "rounds, with the minimum and the maximum; above 1 is faster. Measured with:"
    )
    document.items(sorted({describe_setup(case.provenance) for case in cases}))
    with_reference = [case for case in cases if "sb3" in case.succeeded]
    if with_reference:
        styles = figures.make_styles(list(dict.fromkeys(name for case in with_reference for name in case.succeeded)))
        panels = {
            case.title: (
                "speed of learn() / that of SB3's DQN",
                {name: case.ratios(name, "sb3", "learning") for name in case.succeeded},
            )
            for case in with_reference
        }
        caption = "Speed of `learn()` relative to SB3's DQN: median, minimum and maximum over rounds."
        document.picture("speed", figures.png(figures.intervals(panels, styles, from_zero=True)), caption)
    for case in cases:
        document.paragraph(f"**{case.title}**")
        document.table(*case.cells())
        document.items(case.failures())
