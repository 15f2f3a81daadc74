"""The report of a comparison: what the files of its runs say, in words, numbers and figures.

Nothing in it depends on the clock or on chance: the same files give the same report, to the last byte.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from sb3_scratch_dqn.bench.report import figures, stats
from sb3_scratch_dqn.bench.report.comparison import MEASURES, Comparison, commands, make_comparison, number, verdicts
from sb3_scratch_dqn.bench.report.document import Document
from sb3_scratch_dqn.bench.report.stats import Estimate, Scores
from sb3_scratch_dqn.bench.results import Array, read_results
from sb3_scratch_dqn.bench.speed.results import Measured, read_speed

_MIB = 2**20

# The names of all pictures that a report may have
_PICTURES = re.compile(
    r"(area|final_return|improvement|costs|speed|curves_over_(steps|time)|(aggregate_(area|final_return)|profiles)(_2)?)"
    r"\.png"
)

_MOST_OF_ERROR = 300  # characters; all of it is in the file

# Below so many runs intervals are notably too narrow
_FEW_RUNS = 10

_AGGREGATES: dict[str, Callable[[Scores], Array]] = {
    "interquartile mean": stats.pooled_iqm,
    "median": stats.median_of_means,
    "mean": stats.mean_of_means,
    "optimality gap": stats.optimality_gap,
}


def _with_interval(estimate: Estimate, form: Callable[[Any], str] = number, n_runs: int = 2) -> str:
    if n_runs < 2:  # of which nobody knows how much chance there is in it
        return form(estimate.value)
    return f"{form(estimate.value)} ({form(estimate.low)} to {form(estimate.high)})"


def _of_runs(scores: Array) -> Estimate:
    return stats.interval([scores], lambda drawn: stats.iqm(drawn[0]))


# The document


def make_document(comparison: Comparison, speed: list[Measured]) -> Document:
    """Write the report.

    :param comparison: what is reported
    :param speed: what the benchmark of speed measured
    """
    document = Document("Comparison of " + ", ".join(comparison.algos))
    look = figures.looks(comparison.algos)
    _write_overview(document, comparison)
    _write_verdicts(document, comparison)
    if any(comparison.algos_in(env) for env in comparison.envs):
        _write_curves(document, comparison, look)
        _write_scores(document, comparison, look)
        _write_improvement(document, comparison, look)
        _write_aggregates(document, comparison, look)
        _write_costs(document, comparison, look)
    if speed:
        _write_speed(document, speed)
    _write_origin(document, comparison)
    return document


def _write_overview(document: Document, comparison: Comparison) -> None:
    document.paragraph(
        "Each run has a seed of its own and is evaluated in an environment of its own, before training and then "
        "at fixed steps. Runs in the same environment are compared over the same number of steps and evaluations."
    )
    rows = []
    for env in comparison.envs:
        settings = next(result.settings for result in comparison.results if result.env == env)
        counts = []
        for algo in comparison.algos:
            all_runs = [result for result in comparison.results if (result.env, result.algo) == (env, algo)]
            failures = sum(not result.done for result in all_runs)
            counts.append((f"{len(all_runs)}" if all_runs else "") + (f", {failures} failed" if failures else ""))
        evaluated = f"{settings['n_evaluations'] + 1} x {settings['eval_episodes']} episodes"
        rows.append([env, f"{settings['n_timesteps']:,}", evaluated, *counts])
    document.table(["environment", "steps", "evaluations", *(f"runs of `{algo}`" for algo in comparison.algos)], rows)
    longer = _longer(comparison)
    if longer:
        document.paragraph(
            "**More steps than wanted** were taken by algorithms that only end with a whole rollout or episode:"
        )
        document.items(longer)
    failed = comparison.failed()
    if failed:
        document.paragraph(f"**{len(failed)} of {len(comparison.results)} runs failed**, and are in no figure below:")
        document.items(
            [f"`{result.algo}`, {result.env}, seed {result.seed}: {_in_a_line(result.error)}" for result in failed]
        )


def _longer(comparison: Comparison) -> list[str]:
    """Which algorithms trained for notably more steps than they were to."""
    told = []
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            runs = comparison.runs(env, algo)
            longest, wanted = max(runs, key=lambda run: run.steps_taken), int(runs[0].steps[-1])
            if longest.steps_taken > 1.05 * wanted:
                evaluated = longest.known["curve"].get("steps_taken", [longest.steps_taken])[-1]
                told.append(
                    f"`{algo}`, {env}: {longest.steps_taken:,} instead of {wanted:,}, evaluated for the last time "
                    f"after {evaluated:,}"
                )
    return told


def _in_a_line(text: str) -> str:
    """What a process printed, as part of a sentence."""
    line = " ".join(text.replace("`", "'").split())
    return line if len(line) <= _MOST_OF_ERROR else f"{line[:_MOST_OF_ERROR]} ..."


def _write_verdicts(document: Document, comparison: Comparison) -> None:
    sentences = verdicts(comparison)
    if not sentences:
        return
    document.heading("What is better")
    document.items(sentences)
    document.paragraph(
        "That is what a two-sided permutation test of the probability of improvement, over its standard error, says; "
        "no difference does not mean that there is none. Of equal algorithms, about one comparison in 20 comes out as "
        f"a difference by chance; here are {len(sentences)} comparisons."
    )


def _write_curves(document: Document, comparison: Comparison, look: dict[str, figures.Look]) -> None:
    over_steps: dict[str, dict[str, figures.Line]] = {}
    over_time: dict[str, dict[str, figures.Line]] = {}
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            runs = comparison.runs(env, algo)
            y = stats.curve_interval(np.stack([run.returns for run in runs]))
            seconds = np.median([run.seconds for run in runs], axis=0)
            over_steps.setdefault(env, {})[algo] = figures.Line(runs[0].steps, y)
            over_time.setdefault(env, {})[algo] = figures.Line(seconds, y)
    document.heading("Learning curves")
    document.picture(
        "curves_over_steps",
        figures.png(figures.curves(over_steps, look, "environment steps")),
        "Return over environment steps: interquartile mean of the runs, with its interval at 95%.",
    )
    document.picture(
        "curves_over_time",
        figures.png(figures.curves(over_time, look, "training time (s)")),
        "The same over the median wall time of training, without evaluations. Runs may have shared their machine.",
    )


def _write_scores(document: Document, comparison: Comparison, look: dict[str, figures.Look]) -> None:
    document.heading("Scores")
    rows = []
    panels: dict[str, dict[str, tuple[str, dict[str, Estimate]]]] = {measure: {} for measure in MEASURES}
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            row = [env, f"`{algo}`", str(len(comparison.runs(env, algo)))]
            for measure in MEASURES:
                estimate = _of_runs(comparison.scores(env, algo, measure))
                panels[measure].setdefault(env, (measure, {}))[1][algo] = estimate
                row.append(_with_interval(estimate, n_runs=len(comparison.runs(env, algo))))
            rows.append(row)
    document.table(["environment", "algorithm", "runs", *MEASURES], rows)
    document.paragraph(
        "Interquartile means over runs, with intervals at 95%. The area is that under the learning curve over the "
        "steps of the training, so a mean return; the final return is that of the last evaluation."
    )
    if any(len(comparison.runs(env, algo)) < _FEW_RUNS for env in comparison.envs for algo in comparison.algos_in(env)):
        document.paragraph(
            "Intervals of few runs are narrower than they should be: those of three runs hold what many runs would "
            "give in about 75 of 100 cases, those of five in about 88. The verdicts above do not rest on them."
        )
    for measure in MEASURES:
        name = "final_return" if measure == "final return" else "area"
        caption = f"{measure.capitalize()}: interquartile mean of the runs, with its interval at 95%."
        document.picture(name, figures.png(figures.intervals(panels[measure], look)), caption)


def _write_aggregates(document: Document, comparison: Comparison, look: dict[str, figures.Look]) -> None:
    document.heading("All environments together")
    groups = comparison.groups()
    for number_of_group, group in enumerate(groups):
        _write_aggregate(document, comparison, look, group, f"_{number_of_group + 1}" if number_of_group else "")
    if not groups:
        document.paragraph("That takes two environments in which all algorithms have runs.")


def _write_aggregate(
    document: Document, comparison: Comparison, look: dict[str, figures.Look], present: list[str], suffix: str
) -> None:
    shared = comparison.shared_envs(present)
    envs = [env for env in shared if comparison.bounds(env)]
    names = ", ".join(f"`{algo}`" for algo in present)
    left_out = [env for env in shared if env not in envs]
    if left_out:
        document.paragraph(
            f"Left out, because nobody was clearly better there than untrained agents, so that there is no scale: "
            f"{', '.join(left_out)}."
        )
    if len(envs) < 2:
        document.paragraph(f"For {names} there are not two environments with a scale.")
        return
    bounds = "; ".join(
        f"{env} {number(low)} and {number(high)}"
        for env in envs
        for low, high in [comparison.bounds(env) or (0.0, 1.0)]
    )
    document.paragraph(
        f"**{', '.join(envs)}**, in which {names} have runs; each environment has the same weight. Scores are "
        "normalised: 0 is what untrained agents get, 1 the return at which the environment counts as solved or, where "
        f"nobody says that, the best final return here. These are {bounds}. An optimality gap is what runs lack of 1; "
        "the lower, the better."
    )
    for measure, name in zip(MEASURES, ("area", "final_return"), strict=True):
        scores = {algo: comparison.normalised(envs, algo, measure) for algo in present}
        estimates = {
            title: {algo: stats.interval(scores[algo], statistic) for algo in present}
            for title, statistic in _AGGREGATES.items()
        }
        rows = [
            [
                f"`{algo}`",
                *(
                    _with_interval(of_algo[algo], "{:.2f}".format, max(map(len, scores[algo])))
                    for of_algo in estimates.values()
                ),
            ]
            for algo in present
        ]
        document.table([measure, *estimates], rows)
        panels = {title: (f"normalised {measure}", of_algo) for title, of_algo in estimates.items()}
        caption = f"Normalised {measure} over all runs and environments, with intervals at 95%."
        document.picture(f"aggregate_{name}{suffix}", figures.png(figures.intervals(panels, look)), caption)
    finals = {algo: comparison.normalised(envs, algo, "final return") for algo in present}
    everything = np.concatenate([task for tasks in finals.values() for task in tasks])
    thresholds = np.linspace(min(0.0, everything.min()) - 0.02, max(1.0, everything.max()) + 0.02, 201)
    shares = {
        algo: stats.interval(tasks, lambda drawn: stats.profile(drawn, thresholds), resamples=2_000)
        for algo, tasks in finals.items()
    }
    document.picture(
        f"profiles{suffix}",
        figures.png(figures.profiles(thresholds, shares, look)),
        "Performance profiles: the share of runs with a final return above a normalised score, with intervals at 95%.",
    )


def _write_improvement(document: Document, comparison: Comparison, look: dict[str, figures.Look]) -> None:
    reference, measure = comparison.reference, "area under the learning curve"
    panels: dict[str, dict[str, Estimate]] = {}
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            theirs = comparison.scores(env, reference, measure)
            if algo != reference and len(theirs):
                improvement = stats.improvement([comparison.scores(env, algo, measure)], [theirs])
                panels.setdefault(env, {})[algo] = improvement
    if panels:
        document.heading("Probability of improvement")
        document.picture(
            "improvement",
            figures.png(figures.improvement(panels, look, reference, "larger area")),
            f"Probability that a run's learning curve has a larger area than one of {reference}'s; intervals at 95%.",
        )


def _write_costs(document: Document, comparison: Comparison, look: dict[str, figures.Look]) -> None:
    document.heading("Throughput and memory")
    rows = []
    panels: dict[str, tuple[str, dict[str, Estimate]]] = {}
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            runs = comparison.runs(env, algo)
            speeds = _of_runs(np.array([run.steps_per_second for run in runs]))
            memory = _of_runs(np.array([run.peak_memory / _MIB for run in runs]))
            share = np.median([run.cpu_seconds[-1] / max(run.seconds[-1], 1e-9) for run in runs])
            panels.setdefault(f"{env}, throughput", ("environment steps per second of training", {}))[1][algo] = speeds
            panels.setdefault(f"{env}, memory", ("peak memory of the process (MiB)", {}))[1][algo] = memory
            whole = "{:,.0f}".format
            told = (_with_interval(one, whole, len(runs)) for one in (speeds, memory))
            rows.append([env, f"`{algo}`", *told, f"{share:.2f}"])
    document.table(["environment", "algorithm", "steps/s", "peak memory, MiB", "processor time / time"], rows)
    document.paragraph(
        "Interquartile means over runs, with intervals at 95%. Runs that went on side by side slow each other down; a "
        "fair comparison of speed is that of `python -m sb3_scratch_dqn.bench speed`."
    )
    document.picture(
        "costs",
        figures.png(figures.intervals(panels, look, from_zero=True)),
        "Steps per second of training, and the most memory that the process of a run had.",
    )


def _write_speed(document: Document, speed: list[Measured]) -> None:
    document.heading("Speed")
    document.paragraph(
        "Measured in turn, one thread each, on one processor. Ratios are medians of those within rounds, with their "
        "extremes; above 1 is faster. Made with:"
    )
    document.items(sorted({f"{_versions(one.origin)}; {_machine(one.origin)}" for one in speed}))
    with_reference = [one for one in speed if "sb3" in one.able]
    if with_reference:
        look = figures.looks(list(dict.fromkeys(name for one in with_reference for name in one.able)))
        panels = {
            one.title: (
                "speed of learn() / that of SB3's DQN",
                {name: one.ratios(name, "sb3", "learning") for name in one.able},
            )
            for one in with_reference
        }
        caption = "Speed of `learn()` over that of SB3's DQN: median and extremes over rounds."
        document.picture("speed", figures.png(figures.intervals(panels, look, from_zero=True)), caption)
    for one in speed:
        document.paragraph(f"**{one.title}**")
        document.table(*one.cells())
        document.items(one.failures())


def _write_origin(document: Document, comparison: Comparison) -> None:
    document.heading("How it was made")
    for command in commands(comparison):
        document.code(command)
    document.items(_origins(comparison, lambda known: f"{_versions(known)}; {_machine(known)}"))
    document.items(_origins(comparison, lambda known: f"commit `{known.get('commit')}`"))
    rows = []
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            settings = comparison.runs(env, algo)[0].settings["hyperparameters"]
            told = ", ".join(f"{name}={value}" for name, value in settings.items())
            engines = sorted({str(run.known.get("engine") or "") for run in comparison.runs(env, algo)})
            rows.append([env, f"`{algo}`", ", ".join(engines), told])
    if rows:
        document.table(["environment", "algorithm", "engine", "settings"], rows)


def _origins(comparison: Comparison, of: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """What runs were made with, and which: one line for all that have it in common."""
    runs: dict[str, dict[str, int]] = {}
    for result in comparison.results:
        counts = runs.setdefault(of(result.known), {})
        name = f"`{result.algo}` in {result.env}"
        counts[name] = counts.get(name, 0) + 1
    if len(runs) == 1:
        return list(runs)
    return [
        f"{told}: " + ", ".join(f"{count} of {name}" for name, count in runs[told].items()) for told in sorted(runs)
    ]


def _versions(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in known["versions"].items())


def _machine(known: Mapping[str, Any]) -> str:
    hardware = known["hardware"]
    gpu = f", {hardware['gpu']}" if hardware.get("gpu") else ""
    return f"{hardware['processor']}, {hardware['cores']} processors{gpu}, {hardware['system']}"


def write_report(folder: Path, out: Path | None = None, reference: str | None = None) -> Path:
    """Read the files of runs, and write the report.

    :param folder: of the runs
    :param out: where the report goes; ``None`` for a folder ``report`` in that of the runs
    :param reference: the algorithm to compare with; ``None`` for ``dqn``, or the first one if there is none
    :return: the page
    :raises ValueError: if a file is broken, settings are mixed, or there is nothing to report
    """
    comparison = make_comparison(read_results(folder), reference)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever users have in their settings
        document = make_document(comparison, read_speed(folder))
    out = out or folder / "report"
    document.save(out, _PICTURES)
    return out / "report.html"
