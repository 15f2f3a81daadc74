"""The report of a comparison: the results of its runs in sentences, tables and figures.

It depends on neither the clock nor random numbers: the same files give the same report, byte for byte.
"""

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from sb3_scratch_dqn.bench.report import figures, stats
from sb3_scratch_dqn.bench.report.comparison import (
    MEASURES,
    Comparison,
    format_estimate,
    format_number,
    make_comparison,
    verdicts,
)
from sb3_scratch_dqn.bench.report.costs import write_costs, write_speed
from sb3_scratch_dqn.bench.report.document import Document
from sb3_scratch_dqn.bench.report.figures import Styles
from sb3_scratch_dqn.bench.report.provenance import write_provenance
from sb3_scratch_dqn.bench.report.stats import Estimate, Scores
from sb3_scratch_dqn.bench.results import Array, read_results
from sb3_scratch_dqn.bench.speed.results import CaseResult, read_speed

# The names of all pictures that a report can have
_PICTURES = re.compile(
    r"(area|final_return|improvement|costs|speed|curves_over_(steps|time)|(aggregate_(area|final_return)|profiles)(_2)?)"
    r"\.png"
)

_MAX_ERROR_LENGTH = 300  # characters; the file of the run has the whole error

# With fewer runs, intervals are notably too narrow
_FEW_RUNS = 10

_AGGREGATES: dict[str, Callable[[Scores], Array]] = {
    "interquartile mean": stats.pooled_iqm,
    "median": stats.median_of_means,
    "mean": stats.mean_of_means,
    "optimality gap": stats.optimality_gap,
}


def make_document(comparison: Comparison, speed: list[CaseResult]) -> Document:
    """Write the report into a document.

    :param comparison: the results of all runs
    :param speed: the results of the speed benchmark, possibly none
    """
    document = Document("Comparison of " + ", ".join(comparison.algos))
    styles = figures.make_styles(comparison.algos)
    _write_overview(document, comparison)
    _write_verdicts(document, comparison)
    if any(comparison.algos_in(env) for env in comparison.envs):
        _write_curves(document, comparison, styles)
        _write_scores(document, comparison, styles)
        _write_improvement(document, comparison, styles)
        _write_aggregates(document, comparison, styles)
        write_costs(document, comparison, styles)
    if speed:
        write_speed(document, speed)
    write_provenance(document, comparison)
    return document


def _write_overview(document: Document, comparison: Comparison) -> None:
    document.paragraph(
        "Each run has its own seed and a separate evaluation environment. It is evaluated before training and then at "
        "fixed steps. Runs in the same environment are compared over the same number of steps and evaluations."
    )
    rows = []
    for env in comparison.envs:
        settings = next(result.settings for result in comparison.results if result.env == env)
        counts = []
        for algo in comparison.algos:
            all_runs = comparison.all_runs(env, algo)
            failures = sum(not result.done for result in all_runs)
            counts.append((f"{len(all_runs)}" if all_runs else "") + (f", {failures} failed" if failures else ""))
        evaluations = f"{settings['n_evaluations'] + 1} x {settings['eval_episodes']} episodes"
        rows.append([env, f"{settings['n_timesteps']:,}", evaluations, *counts])
    document.table(["environment", "steps", "evaluations", *(f"runs of `{algo}`" for algo in comparison.algos)], rows)
    longer = _longer_runs(comparison)
    if longer:
        document.paragraph(
            "**More steps than requested** were taken by algorithms that stop only at the end of a rollout or episode:"
        )
        document.items(longer)
    failed = comparison.failed()
    if failed:
        document.paragraph(
            f"**{len(failed)} of {len(comparison.results)} runs failed** and are not in the results below:"
        )
        document.items(
            [f"`{result.algo}`, {result.env}, seed {result.seed}: {_single_line(result.error)}" for result in failed]
        )


def _longer_runs(comparison: Comparison) -> list[str]:
    """Describe the algorithms that trained for notably more steps than requested."""
    descriptions = []
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            runs = comparison.runs(env, algo)
            longest, requested = max(runs, key=lambda run: run.steps_taken), int(runs[0].steps[-1])
            if longest.steps_taken > 1.05 * requested:
                evaluated = longest.content["curve"].get("steps_taken", [longest.steps_taken])[-1]
                descriptions.append(
                    f"`{algo}`, {env}: {longest.steps_taken:,} instead of {requested:,}, with the last evaluation "
                    f"after {evaluated:,}"
                )
    return descriptions


def _single_line(error: str) -> str:
    """Return an error, which may contain the output of a process, as a single line without Markdown."""
    line = " ".join(error.replace("`", "'").split())
    return line if len(line) <= _MAX_ERROR_LENGTH else f"{line[:_MAX_ERROR_LENGTH]} ..."


def _write_verdicts(document: Document, comparison: Comparison) -> None:
    sentences = verdicts(comparison)
    if not sentences:
        return
    document.heading("Verdicts")
    document.items(sentences)
    document.paragraph(
        "The verdicts are those of a two-sided permutation test. Its statistic is the probability of improvement (that "
        "a run scores higher than a run of the reference) over its standard error. No difference does not mean that "
        "the algorithms are equal. If two algorithms have the same distribution of returns, whatever its shape, the "
        "test reports a difference in at most 5% of cases. If they differ only in spread, the rate is only slightly "
        f"higher with five or more runs each. There are {len(sentences)} comparisons here."
    )


def _write_curves(document: Document, comparison: Comparison, styles: Styles) -> None:
    over_steps: dict[str, dict[str, figures.Curve]] = {}
    over_time: dict[str, dict[str, figures.Curve]] = {}
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            runs = comparison.runs(env, algo)
            y = stats.curve_interval(np.stack([run.returns for run in runs]))
            seconds = np.median([run.seconds for run in runs], axis=0)
            over_steps.setdefault(env, {})[algo] = figures.Curve(runs[0].steps, y)
            over_time.setdefault(env, {})[algo] = figures.Curve(seconds, y)
    document.heading("Learning curves")
    document.picture(
        "curves_over_steps",
        figures.png(figures.curves(over_steps, styles, "environment steps")),
        "Return over environment steps: interquartile mean over runs, with 95% intervals.",
    )
    document.picture(
        "curves_over_time",
        figures.png(figures.curves(over_time, styles, "training time (s)")),
        "The same over the median wall time of training, without evaluations. Runs may have shared a machine.",
    )


def _write_scores(document: Document, comparison: Comparison, styles: Styles) -> None:
    document.heading("Scores")
    rows = []
    panels: dict[str, dict[str, tuple[str, dict[str, Estimate]]]] = {measure: {} for measure in MEASURES}
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            row = [env, f"`{algo}`", str(len(comparison.runs(env, algo)))]
            for measure in MEASURES:
                estimate = stats.iqm_interval(comparison.scores(env, algo, measure))
                panels[measure].setdefault(env, (measure, {}))[1][algo] = estimate
                row.append(format_estimate(estimate, n_runs=len(comparison.runs(env, algo))))
            rows.append(row)
    document.table(["environment", "algorithm", "runs", *MEASURES], rows)
    document.paragraph(
        "Interquartile means over runs, with 95% intervals. The area under the learning curve is divided by the number "
        "of training steps, so it is a mean return; the final return is that of the last evaluation."
    )
    if any(len(comparison.runs(env, algo)) < _FEW_RUNS for env in comparison.envs for algo in comparison.algos_in(env)):
        document.paragraph(
            "Intervals of few runs are narrower than they should be: with three runs they contain the value that many "
            "runs would give in about 75 of 100 cases, with five runs in about 88. The verdicts above do not depend on "
            "them."
        )
    for measure in MEASURES:
        name = "final_return" if measure == "final return" else "area"
        caption = f"{measure.capitalize()}: interquartile mean over runs, with 95% intervals."
        document.picture(name, figures.png(figures.intervals(panels[measure], styles)), caption)


def _write_aggregates(document: Document, comparison: Comparison, styles: Styles) -> None:
    document.heading("All environments together")
    groups = comparison.groups()
    for i, group in enumerate(groups):
        _write_aggregate(document, comparison, styles, group, f"_{i + 1}" if i else "")
    if not groups:
        document.paragraph("Aggregates need two environments in which all algorithms have runs.")


def _write_aggregate(document: Document, comparison: Comparison, styles: Styles, algos: list[str], suffix: str) -> None:
    shared_envs = comparison.shared_envs(algos)
    bounds = {env: bounds for env in shared_envs if (bounds := comparison.bounds(env))}
    envs = list(bounds)
    names = ", ".join(f"`{algo}`" for algo in algos)
    left_out = [env for env in shared_envs if env not in bounds]
    if left_out:
        document.paragraph(
            "Left out, because no algorithm was clearly better than untrained agents and scores cannot be normalised: "
            f"{', '.join(left_out)}."
        )
    if len(envs) < 2:
        document.paragraph(f"For {names} there are fewer than two environments in which scores can be normalised.")
        return
    bounds_text = "; ".join(
        f"{env} {format_number(low)} and {format_number(high)}" for env, (low, high) in bounds.items()
    )
    document.paragraph(
        f"**{', '.join(envs)}**, in which {names} have runs; each environment has the same weight. Scores are "
        "normalised: 0 is the mean return of untrained agents, 1 the return at which the environment counts as solved "
        f"or, if it has no such threshold, the best final return here. These returns are {bounds_text}. The optimality "
        "gap is the mean shortfall from 1; lower is better."
    )
    for measure, name in zip(MEASURES, ("area", "final_return"), strict=True):
        scores = {algo: comparison.normalised_scores(envs, algo, measure) for algo in algos}
        estimates = {
            title: {algo: stats.interval(scores[algo], statistic) for algo in algos}
            for title, statistic in _AGGREGATES.items()
        }
        n_runs = {algo: max(map(len, scores[algo])) for algo in algos}
        rows = [
            [
                f"`{algo}`",
                *(format_estimate(column[algo], "{:.2f}".format, n_runs[algo]) for column in estimates.values()),
            ]
            for algo in algos
        ]
        document.table([measure, *estimates], rows)
        panels = {title: (f"normalised {measure}", column) for title, column in estimates.items()}
        caption = f"Normalised {measure} over all runs and environments, with 95% intervals."
        document.picture(f"aggregate_{name}{suffix}", figures.png(figures.intervals(panels, styles)), caption)
    final_returns = {algo: comparison.normalised_scores(envs, algo, "final return") for algo in algos}
    _write_profiles(document, final_returns, styles, suffix)


def _write_profiles(document: Document, final_returns: dict[str, list[Array]], styles: Styles, suffix: str) -> None:
    pooled = np.concatenate([task for tasks in final_returns.values() for task in tasks])
    thresholds = np.linspace(min(0.0, pooled.min()) - 0.02, max(1.0, pooled.max()) + 0.02, 201)
    shares = {
        algo: stats.interval(tasks, lambda resampled: stats.profile(resampled, thresholds), resamples=2_000)
        for algo, tasks in final_returns.items()
    }
    document.picture(
        f"profiles{suffix}",
        figures.png(figures.profiles(thresholds, shares, styles)),
        "Performance profiles: the share of runs with a final return above a normalised score, with 95% intervals.",
    )


def _write_improvement(document: Document, comparison: Comparison, styles: Styles) -> None:
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
            figures.png(figures.improvement(panels, styles, reference, "larger area")),
            "Probability that a run has a larger area under the learning curve than a run of "
            f"{reference}, with 95% intervals.",
        )


def write_report(folder: Path, out: Path | None = None, reference: str | None = None) -> Path:
    """Read the files of runs, and write the report.

    :param folder: the folder of results
    :param out: the output folder; ``None`` for the folder ``report`` in ``folder``
    :param reference: the algorithm to compare with; ``None`` for ``dqn``, or the first one if there is no ``dqn``
    :return: the path of the HTML page
    :raises ValueError: if a file is broken, settings differ, or there are no results
    """
    comparison = make_comparison(read_results(folder), reference)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        document = make_document(comparison, read_speed(folder))
    out = out or folder / "report"
    document.save(out, _PICTURES)
    return out / "report.html"
