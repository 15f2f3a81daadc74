"""The results of many runs, sorted out: what is compared with what, and what comes of it, in sentences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sb3_scratch_dqn.bench.report import stats
from sb3_scratch_dqn.bench.report.stats import Verdict
from sb3_scratch_dqn.bench.results import Array, Result, check_comparable

# What runs are compared by, and what it is called
MEASURES: dict[str, Callable[[Result], float]] = {
    "area under the learning curve": lambda result: result.area,
    "final return": lambda result: result.final,
}


@dataclass(frozen=True)
class Comparison:
    """All results, sorted out.

    :param results: of all runs
    :param reference: the algorithm that the others are compared with
    """

    results: Sequence[Result]
    reference: str

    @cached_property
    def envs(self) -> list[str]:
        """Their names, sorted."""
        return sorted({result.env for result in self.results})

    @cached_property
    def algos(self) -> list[str]:
        """Their names, sorted, but the reference first."""
        names = {result.algo for result in self.results}
        return [self.reference, *sorted(names - {self.reference})]

    def runs(self, env: str, algo: str) -> list[Result]:
        """Those that ended well, in the order of their seeds."""
        return [one for one in self.results if (one.env, one.algo) == (env, algo) and one.done]

    def failed(self) -> list[Result]:
        """The runs that did not end well."""
        return [result for result in self.results if not result.done]

    def algos_in(self, env: str) -> list[str]:
        """The algorithms that have runs in an environment."""
        return [algo for algo in self.algos if self.runs(env, algo)]

    def shared_envs(self, algos: Sequence[str]) -> list[str]:
        """The environments in which all of some algorithms have runs."""
        return [env for env in self.envs if all(self.runs(env, algo) for algo in algos)]

    def groups(self) -> list[list[str]]:
        """Algorithms that can be looked at over several environments together, the most environments first.

        Those that have runs wherever the reference has, and all that have any.
        """
        present = [algo for algo in self.algos if self.shared_envs([algo])]
        wanted = set(self.shared_envs([self.reference]))
        everywhere = [algo for algo in present if wanted <= set(self.shared_envs([algo]))]
        groups = [present] if present == everywhere else [everywhere, present] if len(everywhere) > 1 else [present]
        return [group for group in groups if len(self.shared_envs(group)) > 1]

    def scores(self, env: str, algo: str, measure: str) -> Array:
        """One number a run.

        :param env: the environment
        :param algo: the algorithm
        :param measure: one of ``MEASURES``
        """
        return np.array([MEASURES[measure](run) for run in self.runs(env, algo)])

    def bounds(self, env: str) -> tuple[float, float] | None:
        """The returns that count as 0 and 1 in an environment.

        That is, what untrained agents get, and what the environment is solved at, or, where nobody says that, the best
        that an algorithm got. ``None`` if nobody has learned anything, where that would be a scale of chance: the best
        is not two standard deviations of untrained agents above their mean.
        """
        runs = [run for run in self.results if run.env == env and run.done]
        if not runs:
            return None
        untrained = [run.returns[0] for run in runs]
        best = runs[0].known.get("reward_threshold")
        if best is None:
            best = max(float(stats.iqm(self.scores(env, algo, "final return"))) for algo in self.algos_in(env))
            if best <= np.mean(untrained) + 2 * np.std(untrained):
                return None
        return (float(np.mean(untrained)), float(best)) if best > np.mean(untrained) else None

    def normalised(self, envs: Sequence[str], algo: str, measure: str) -> list[Array]:
        """Scores between that of untrained agents, 0, and that of a solved environment, 1; one array an environment."""
        scores = []
        for env in envs:
            bounds = self.bounds(env)
            assert bounds is not None
            scores.append((self.scores(env, algo, measure) - bounds[0]) / (bounds[1] - bounds[0]))
        return scores


def make_comparison(results: Sequence[Result], reference: str | None = None) -> Comparison:
    """Sort results out.

    :param results: of all runs
    :param reference: the algorithm to compare with; ``None`` for ``dqn``, or the first one if there is none
    :raises ValueError: if they cannot be compared, or there is no such algorithm
    """
    check_comparable(results)
    names = sorted({result.algo for result in results})
    if reference is None:
        reference = "dqn" if "dqn" in names else names[0]
    if reference not in names:
        raise ValueError(f"--reference {reference!r} must be one of {', '.join(names)}, which have results")
    return Comparison(results, reference)


def verdict_sentence(ours: str, theirs: str, measure: str, where: str, verdict: Verdict, told: str) -> str:
    """Say what a comparison says.

    :param ours: the name of an algorithm
    :param theirs: of the one that it is compared with
    :param measure: what is compared
    :param where: the environment, or several
    :param verdict: of the comparison
    :param told: the numbers that were compared
    """
    begin = f"{where}, {measure}: `{ours}` "
    if not verdict.possible:
        return (
            f"{begin}against `{theirs}` **cannot be told** with so few runs: whatever they had been, p would be "
            f"{verdict.lowest_p:.2f} at least" + (f" ({told})" if told else "")
        )
    word = {"better": "is **better** than", "worse": "is **worse** than", "no difference": "shows **no difference** to"}
    value, low, high = (float(number) for number in verdict.improvement)
    digits = 4 if abs(verdict.p - 0.05) < 0.001 else 3  # so many that it is seen on which side it is
    p = f"p = {verdict.p:.{digits}f}" if verdict.p >= 0.001 else "p < 0.001"
    told = f"{told}; " if told else ""
    return (
        f"{begin}{word[verdict.word]} `{theirs}` at the 95% level ({told}a run of it is better with a probability of "
        f"{value:.2f}, interval {low:.2f} to {high:.2f}; {p})"
    )


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each comparison with the reference."""
    sentences = []
    reference = comparison.reference
    others = comparison.algos[1:]
    for env in comparison.envs:
        for algo in others:
            for measure in MEASURES:
                ours, theirs = (comparison.scores(env, name, measure) for name in (algo, reference))
                if len(ours) and len(theirs):
                    told = (
                        f"interquartile means {number(stats.iqm(ours))} and {number(stats.iqm(theirs))} of "
                        f"{len(ours)} and {len(theirs)} runs"
                    )
                    verdict = stats.compare([ours], [theirs])
                    sentences.append(verdict_sentence(algo, reference, measure, f"**{env}**", verdict, told))
                elif any((result.env, result.algo) == (env, algo) for result in comparison.results):
                    sentences.append(
                        f"**{env}**, {measure}: `{algo}` **cannot be compared** with `{reference}`: "
                        f"{_ended_well(comparison, env, algo)}, {_ended_well(comparison, env, reference)}"
                    )
    for algo in others:
        envs = comparison.shared_envs([algo, reference])
        if len(envs) < 2:
            continue
        scaled = [env for env in envs if comparison.bounds(env)]
        for measure in MEASURES:
            # Only what is told needs a scale that environments share
            mine, its = ([comparison.scores(env, name, measure) for env in envs] for name in (algo, reference))
            told = ""
            if scaled:
                means = (stats.pooled_iqm(comparison.normalised(scaled, name, measure)) for name in (algo, reference))
                told = "normalised interquartile means {:.2f} and {:.2f}".format(*map(float, means))
                told += "" if scaled == envs else f" in {', '.join(scaled)}"
            where = f"**{', '.join(envs)} together**"
            sentences.append(verdict_sentence(algo, reference, measure, where, stats.compare(mine, its), told))
    return sentences


def _ended_well(comparison: Comparison, env: str, algo: str) -> str:
    all_runs = [result for result in comparison.results if (result.env, result.algo) == (env, algo)]
    if not all_runs:
        return f"`{algo}` has no runs there"
    return f"{len(comparison.runs(env, algo))} of {len(all_runs)} runs of `{algo}` ended well"


def number(value: Any) -> str:
    """A return, for people."""
    return f"{float(value):,.1f}"


def commands(comparison: Comparison) -> list[str]:
    """The command lines that make the results, one for all environments with the same algorithms, seeds and steps.

    :param comparison: the results
    """
    envs_of: dict[tuple[str, str], list[str]] = {}
    for env in comparison.envs:
        algos_of: dict[tuple[int, int], list[str]] = {}
        for algo in comparison.algos:
            seeds = [result.seed for result in comparison.results if (result.env, result.algo) == (env, algo)]
            if seeds:
                algos_of.setdefault((min(seeds), max(seeds) + 1), []).append(algo)
        settings = next(result.settings for result in comparison.results if result.env == env)
        for (first_seed, end), algos in algos_of.items():
            options = _options(settings, first_seed, end - first_seed)
            envs_of.setdefault((" ".join(algos), options), []).append(env)
    return [
        f"python -m sb3_scratch_dqn.bench run --algos {algos} --envs {' '.join(envs)} {options} --out results"
        for (algos, options), envs in envs_of.items()
    ]


def _options(settings: dict[str, Any], first_seed: int, seeds: int) -> str:
    options = [f"--first-seed {first_seed}"] if first_seed else []
    options.append(f"--seeds {seeds} -n {settings['n_timesteps']}")
    options.append(f"--evaluations {settings['n_evaluations']} --eval-episodes {settings['eval_episodes']}")
    if settings["same_settings"]:
        options.append(f"--same-settings {settings['same_settings']}")
    if settings["device"] != "cpu":
        options.append(f"--device {settings['device']}")
    if settings["gym_packages"]:
        options.append(f"--gym-packages {' '.join(settings['gym_packages'])}")
    return " ".join(options)
