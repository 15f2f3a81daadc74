"""Group the results of many runs by environment and algorithm, and describe each comparison in a sentence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sb3_scratch_dqn.bench.report import stats
from sb3_scratch_dqn.bench.report.stats import Estimate, Verdict
from sb3_scratch_dqn.bench.results import Array, Result, check_comparable

# The measures that runs are compared by
MEASURES: dict[str, Callable[[Result], float]] = {
    "area under the learning curve": lambda result: result.area,
    "final return": lambda result: result.final,
}


@dataclass(frozen=True)
class Comparison:
    """The results of all runs, and access to them by environment and algorithm.

    :param results: the results of all runs
    :param reference: the algorithm that the others are compared with
    """

    results: Sequence[Result]
    reference: str

    @cached_property
    def envs(self) -> list[str]:
        """The environments, sorted."""
        return sorted({result.env for result in self.results})

    @cached_property
    def algos(self) -> list[str]:
        """The algorithms: the reference, then the others sorted."""
        names = {result.algo for result in self.results}
        return [self.reference, *sorted(names - {self.reference})]

    def all_runs(self, env: str, algo: str) -> list[Result]:
        """Return the runs of an algorithm in an environment, failed ones included, in the order of their seeds."""
        return [result for result in self.results if (result.env, result.algo) == (env, algo)]

    def runs(self, env: str, algo: str) -> list[Result]:
        """Return the finished runs of an algorithm in an environment, in the order of their seeds."""
        return [result for result in self.all_runs(env, algo) if result.done]

    def failed(self) -> list[Result]:
        """Return the failed runs."""
        return [result for result in self.results if not result.done]

    def algos_in(self, env: str) -> list[str]:
        """Return the algorithms with finished runs in an environment."""
        return [algo for algo in self.algos if self.runs(env, algo)]

    def shared_envs(self, algos: Sequence[str]) -> list[str]:
        """Return the environments in which each of some algorithms has finished runs."""
        return [env for env in self.envs if all(self.runs(env, algo) for algo in algos)]

    def groups(self) -> list[list[str]]:
        """Return groups of algorithms that share several environments, the group with the most environments first.

        The candidates are the algorithms with runs in all environments of the reference, and all with any runs.
        """
        present = [algo for algo in self.algos if self.shared_envs([algo])]
        reference_envs = set(self.shared_envs([self.reference]))
        complete = [algo for algo in present if reference_envs <= set(self.shared_envs([algo]))]
        groups = [present] if present == complete else [complete, present] if len(complete) > 1 else [present]
        return [group for group in groups if len(self.shared_envs(group)) > 1]

    def scores(self, env: str, algo: str, measure: str) -> Array:
        """Return one score per run.

        :param env: the environment
        :param algo: the algorithm
        :param measure: a key of ``MEASURES``
        """
        return np.array([MEASURES[measure](run) for run in self.runs(env, algo)])

    def bounds(self, env: str) -> tuple[float, float] | None:
        """Return the returns that normalised scores of 0 and 1 stand for, or ``None`` if there is no meaningful scale.

        0 is the mean return of untrained agents. 1 is the reward threshold of the environment or, if it has none, the
        best final return of an algorithm. Without a threshold there is no scale if no algorithm learned anything,
        because differences would be noise: if the best final return is less than two standard deviations above the
        mean of untrained agents.
        """
        runs = [run for run in self.results if run.env == env and run.done]
        if not runs:
            return None
        untrained = [run.returns[0] for run in runs]
        best = runs[0].content.get("reward_threshold")
        if best is None:
            best = max(float(stats.iqm(self.scores(env, algo, "final return"))) for algo in self.algos_in(env))
            if best <= np.mean(untrained) + 2 * np.std(untrained):
                return None
        return (float(np.mean(untrained)), float(best)) if best > np.mean(untrained) else None

    def normalised_scores(self, envs: Sequence[str], algo: str, measure: str) -> list[Array]:
        """Return scores normalised by :meth:`bounds`, one array per environment."""
        scores = []
        for env in envs:
            bounds = self.bounds(env)
            assert bounds is not None
            scores.append((self.scores(env, algo, measure) - bounds[0]) / (bounds[1] - bounds[0]))
        return scores


def make_comparison(results: Sequence[Result], reference: str | None = None) -> Comparison:
    """Check that results can be compared, and group them.

    :param results: the results of all runs
    :param reference: the algorithm to compare with; ``None`` for ``dqn``, or the first one if there is no ``dqn``
    :raises ValueError: if settings differ, or the reference has no results
    """
    check_comparable(results)
    names = sorted({result.algo for result in results})
    if reference is None:
        reference = "dqn" if "dqn" in names else names[0]
    if reference not in names:
        raise ValueError(f"--reference {reference!r} must be one of {', '.join(names)}, which have results")
    return Comparison(results, reference)


def verdict_sentence(ours: str, theirs: str, measure: str, where: str, verdict: Verdict, details: str) -> str:
    """Describe the result of a comparison in a sentence.

    :param ours: an algorithm
    :param theirs: the algorithm that it is compared with
    :param measure: the measure that is compared
    :param where: the environment or environments
    :param verdict: the result of the comparison
    :param details: the numbers that were compared, or an empty string
    """
    prefix = f"{where}, {measure}: `{ours}` "
    if not verdict.enough_runs:
        return (
            f"{prefix}and `{theirs}` have **too few runs** for a verdict: p is at least {verdict.min_p:.2f} for any "
            "results" + (f" ({details})" if details else "")
        )
    relation = {
        "better": "is **better** than",
        "worse": "is **worse** than",
        "no difference": "shows **no difference** to",
    }[verdict.word]
    value, low, high = (float(number) for number in verdict.improvement)
    digits = 4 if abs(verdict.p - 0.05) < 0.001 else 3  # enough to show on which side of the level p is
    p = f"p = {verdict.p:.{digits}f}" if verdict.p >= 0.001 else "p < 0.001"
    details = f"{details}; " if details else ""
    return (
        f"{prefix}{relation} `{theirs}` at the 95% level ({details}probability of improvement {value:.2f}, interval "
        f"{low:.2f} to {high:.2f}; {p})"
    )


def verdicts(comparison: Comparison) -> list[str]:
    """Return a sentence for each comparison with the reference.

    First in each environment, then over all environments that an algorithm shares with the reference.
    """
    others = comparison.algos[1:]
    return [
        *(sentence for env in comparison.envs for algo in others for sentence in _env_verdicts(comparison, env, algo)),
        *(sentence for algo in others for sentence in _overall_verdicts(comparison, algo)),
    ]


def _env_verdicts(comparison: Comparison, env: str, algo: str) -> list[str]:
    reference = comparison.reference
    if not comparison.all_runs(env, algo):
        return []
    sentences = []
    for measure in MEASURES:
        ours, theirs = (comparison.scores(env, name, measure) for name in (algo, reference))
        if len(ours) and len(theirs):
            details = (
                f"interquartile means {format_number(stats.iqm(ours))} and {format_number(stats.iqm(theirs))} of "
                f"{len(ours)} and {len(theirs)} runs"
            )
            verdict = stats.compare([ours], [theirs])
            sentences.append(verdict_sentence(algo, reference, measure, f"**{env}**", verdict, details))
        else:
            sentences.append(
                f"**{env}**, {measure}: `{algo}` **cannot be compared** with `{reference}`: "
                f"{_count_finished(comparison, env, algo)}, {_count_finished(comparison, env, reference)}"
            )
    return sentences


def _overall_verdicts(comparison: Comparison, algo: str) -> list[str]:
    reference = comparison.reference
    envs = comparison.shared_envs([algo, reference])
    if len(envs) < 2:
        return []
    sentences = []
    scaled_envs = [env for env in envs if comparison.bounds(env)]
    for measure in MEASURES:
        # The test itself needs no common scale of the environments, only the means do
        ours, theirs = ([comparison.scores(env, name, measure) for env in envs] for name in (algo, reference))
        details = ""
        if scaled_envs:
            means = (
                stats.pooled_iqm(comparison.normalised_scores(scaled_envs, name, measure)) for name in (algo, reference)
            )
            details = "normalised interquartile means {:.2f} and {:.2f}".format(*map(float, means))
            details += "" if scaled_envs == envs else f" in {', '.join(scaled_envs)}"
        where = f"**{', '.join(envs)} together**"
        sentences.append(verdict_sentence(algo, reference, measure, where, stats.compare(ours, theirs), details))
    return sentences


def _count_finished(comparison: Comparison, env: str, algo: str) -> str:
    all_runs = comparison.all_runs(env, algo)
    if not all_runs:
        return f"`{algo}` has no runs"
    return f"{len(comparison.runs(env, algo))} of {len(all_runs)} runs of `{algo}` finished"


def format_number(value: Any) -> str:
    """Format a return with one decimal."""
    return f"{float(value):,.1f}"


def format_estimate(estimate: Estimate, form: Callable[[Any], str] = format_number, n_runs: int = 2) -> str:
    """Format a number with its interval, which is left out if there is only one run.

    :param estimate: the number
    :param form: formats a single number
    :param n_runs: the number of runs
    """
    if n_runs < 2:  # the spread of one run is unknown
        return form(estimate.value)
    return f"{form(estimate.value)} ({form(estimate.low)} to {form(estimate.high)})"
