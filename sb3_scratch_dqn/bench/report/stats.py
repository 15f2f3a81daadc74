r"""The statistics of a comparison, after Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264).

Scores are a list with one array per task (environment), ``(..., N)`` for ``N`` runs; tasks may differ in their number
of runs. Leading axes are bootstrap resamples. Intervals are 95% percentile bootstrap intervals, stratified: the runs of
each task are resampled separately. All random numbers come from a generator with a fixed seed, so the same scores give
the same results.

Overlapping intervals do not decide whether one algorithm is better than another, because intervals of a handful of runs
are too narrow. The permutation test of :func:`compare` does. If two algorithms have the same distribution of scores,
whatever its shape, the test reports a difference in at most 5% of cases. If they differ only in spread, the rate is
only slightly higher with five or more runs each.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from math import comb, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import trim_mean

Array = npt.NDArray[np.float64]

# The scores of all runs, one array per task
Scores = Sequence[Array]

_SEED = 0
_RESAMPLES = 5_000
_MAX_ARRANGEMENTS = 200_000  # up to this number all are enumerated, such as those of ten and ten runs
_SHUFFLES = 100_000
_SHUFFLES_PER_CHUNK = 10_000
_LEVEL = 0.95


class Estimate(NamedTuple):
    """A statistic and its 95% interval: arrays of the same shape, or numbers."""

    value: Array
    low: Array
    high: Array


def iqm(scores: Array, axis: int = -1) -> Array:
    """Compute the interquartile mean: the mean without the lowest and the highest quarter of the runs.

    :param scores: the scores
    :param axis: the axis of the runs
    """
    return np.asarray(trim_mean(scores, 0.25, axis=axis))


def pooled_iqm(scores: Scores) -> Array:
    """Compute the interquartile mean of the runs of all tasks together, with the same weight for each task.

    :param scores: normalised scores, so that tasks can be pooled
    """
    pooled = np.concatenate(list(scores), axis=-1)
    counts = [task.shape[-1] for task in scores]
    if len(set(counts)) == 1:
        return iqm(pooled)
    # Each run has a weight; the lowest and the highest quarter of the total weight are left out
    weights = np.concatenate([np.full(count, 1 / count / len(counts)) for count in counts])
    order = np.argsort(pooled, axis=-1)
    ends = np.cumsum(weights[order], axis=-1)
    kept = np.minimum(ends, 0.75) - np.maximum(ends - weights[order], 0.25)
    return np.asarray(np.sum(np.take_along_axis(pooled, order, axis=-1) * np.maximum(kept, 0), axis=-1) / 0.5)


def mean_of_means(scores: Scores) -> Array:
    """Compute the mean over tasks of the mean over runs.

    :param scores: normalised scores
    """
    return np.asarray(np.mean([task.mean(axis=-1) for task in scores], axis=0))


def median_of_means(scores: Scores) -> Array:
    """Compute the median over tasks of the mean over runs.

    :param scores: normalised scores
    """
    return np.asarray(np.median([task.mean(axis=-1) for task in scores], axis=0))


def optimality_gap(scores: Scores) -> Array:
    """Compute by how much runs fall short of a score of 1, the mean over tasks; scores above 1 count as 1.

    :param scores: normalised scores
    """
    return np.asarray(np.mean([(1 - np.minimum(task, 1)).mean(axis=-1) for task in scores], axis=0))


def probability_of_improvement(ours: Scores, theirs: Scores) -> Array:
    """Compute the probability that a run of ours scores higher than a run of theirs, the mean over tasks.

    Ties count half.

    :param ours: scores of one algorithm
    :param theirs: scores of another algorithm in the same tasks
    """
    return np.asarray(np.mean([_win_rate(a, b) for a, b in zip(ours, theirs, strict=True)], axis=0))


def _win_rate(ours: Array, theirs: Array) -> Array:
    """Compute the probability of improvement in one task."""
    differences = ours[..., :, None] - theirs[..., None, :]
    return np.asarray((np.sign(differences).mean(axis=(-2, -1)) + 1) / 2)


def profile(scores: Scores, thresholds: Array) -> Array:
    """Compute the share of runs that score above each threshold, the mean over tasks.

    :param scores: scores of one algorithm
    :param thresholds: ``(K,)``
    :return: ``(..., K)``
    """
    return np.asarray(np.mean([(task[..., None] > thresholds).mean(axis=-2) for task in scores], axis=0))


# Intervals


def interval(scores: Scores, statistic: Callable[[Scores], Array], resamples: int = _RESAMPLES) -> Estimate:
    """Compute a statistic and its bootstrap interval.

    :param scores: scores of one algorithm, or those of several algorithms concatenated
    :param statistic: a function of scores, such as :func:`pooled_iqm`
    :param resamples: number of bootstrap resamples
    """
    rng = np.random.default_rng(_SEED)
    resampled = [task[rng.integers(len(task), size=(resamples, len(task)))] for task in scores]
    return _estimate(statistic(scores), statistic(resampled))


def iqm_interval(scores: Array) -> Estimate:
    """Compute the interquartile mean of the runs of one task and its bootstrap interval.

    :param scores: ``(N,)``
    """
    return interval([scores], lambda resampled: iqm(resampled[0]))


def curve_interval(returns: Array, resamples: int = _RESAMPLES) -> Estimate:
    """Compute the interquartile mean at each evaluation and its bootstrap interval.

    :param returns: ``(N, T)`` for ``N`` runs and ``T`` evaluations
    :param resamples: number of bootstrap resamples
    :return: each ``(T,)``
    """
    rng = np.random.default_rng(_SEED)
    rows = rng.integers(len(returns), size=(resamples, len(returns)))
    return _estimate(iqm(returns, axis=0), iqm(returns[rows], axis=1))


def _estimate(value: Array, resampled: Array) -> Estimate:
    low, high = np.quantile(resampled, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    return Estimate(value, low, high)


def improvement(ours: Scores, theirs: Scores, resamples: int = _RESAMPLES) -> Estimate:
    """Compute the probability of improvement and its bootstrap interval.

    :param ours: scores of one algorithm
    :param theirs: scores of another algorithm in the same tasks
    :param resamples: number of bootstrap resamples
    """
    n_tasks = len(ours)
    return interval(
        [*ours, *theirs],
        lambda scores: probability_of_improvement(scores[:n_tasks], scores[n_tasks:]),
        resamples,
    )


# The test


class Verdict(NamedTuple):
    """The result of a comparison of two algorithms.

    :param improvement: the probability of improvement and its interval
    :param p: the p-value: the probability of a difference at least as clear if the algorithms were equal
    :param min_p: the lowest p-value that is possible with this number of runs
    """

    improvement: Estimate
    p: float
    min_p: float

    @property
    def word(self) -> str:
        """``"better"``, ``"worse"`` or ``"no difference"``."""
        if self.p > 1 - _LEVEL:
            return "no difference"
        return "better" if self.improvement.value > 0.5 else "worse"

    @property
    def enough_runs(self) -> bool:
        """Whether there are enough runs for a difference to be significant."""
        return self.min_p <= 1 - _LEVEL


def compare(ours: Scores, theirs: Scores, resamples: int = _RESAMPLES, shuffles: int | None = None) -> Verdict:
    """Test whether one algorithm is better than another, with a two-sided permutation test.

    The test statistic is the probability of improvement divided by its standard error (Neubert & Brunner 2007,
    https://doi.org/10.1016/j.csda.2006.05.024). The assignment of runs to algorithms is permuted within each task.
    Without the standard error, an algorithm that only has a larger spread than another would often be called better or
    worse. The correction needs about five runs of each algorithm; with four, up to 13% of pairs that differ only in
    spread are still called better or worse.

    :param ours: scores of one algorithm
    :param theirs: scores of another algorithm in the same tasks
    :param resamples: number of bootstrap resamples for the interval
    :param shuffles: number of random permutations if there are too many to enumerate; ``None`` for enough to know ``p``
        to 0.002 near the level
    :raises ValueError: if a score is not finite
    """
    if not all(np.isfinite(task).all() for task in (*ours, *theirs)):
        raise ValueError("scores must be finite numbers")
    tasks = [_Task(a, b) for a, b in zip(ours, theirs, strict=True)]
    # Slightly reduced, because equal sums may differ in their last bits
    observed = np.abs(_test_statistic([task.observed() for task in tasks])) * (1 - 1e-9)
    n_arrangements = prod(task.n_arrangements for task in tasks)
    if n_arrangements <= _MAX_ARRANGEMENTS:
        p = float(np.mean(_all_test_statistics([task.enumerated() for task in tasks]) >= observed))
    else:
        rng, shuffles, n_extreme = np.random.default_rng(_SEED), shuffles or _SHUFFLES, 0
        for start in range(0, shuffles, _SHUFFLES_PER_CHUNK):
            count = min(_SHUFFLES_PER_CHUNK, shuffles - start)
            shuffled = np.abs(_test_statistic([task.shuffled(count, rng) for task in tasks]))
            n_extreme += int(np.count_nonzero(shuffled >= observed))
        # The observed arrangement counts as one of them, which keeps the test valid (p is never too small)
        p = (1 + n_extreme) / (1 + shuffles)
    return Verdict(improvement(ours, theirs, resamples), p, 2 / n_arrangements)


# The advantage of ours, which is the probability of improvement minus 1/2, and its variance; one array each
_Advantage = tuple[Array, Array]


def _test_statistic(advantages: Sequence[_Advantage]) -> Array:
    """Compute the mean advantage over tasks, in standard errors."""
    advantage, variance = (np.sum(parts, axis=0) for parts in zip(*advantages, strict=True))
    return np.asarray(advantage / np.sqrt(variance))


def _all_test_statistics(advantages: Sequence[_Advantage]) -> Array:
    """Compute the absolute test statistic of every combination of one arrangement per task."""
    advantage, variance = np.zeros(1), np.zeros(1)
    for task_advantage, task_variance in advantages:
        advantage = np.add.outer(advantage, task_advantage).ravel()
        variance = np.add.outer(variance, task_variance).ravel()
    return np.abs(_test_statistic([(advantage, variance)]))


class _Task:
    """The runs of two algorithms in one task, and which run scores higher than which.

    An arrangement assigns each run to one of the algorithms.
    """

    def __init__(self, ours: Array, theirs: Array) -> None:
        scores = np.concatenate([ours, theirs])
        # Sorted, so that the result does not depend on the order of the algorithms or runs
        order = np.argsort(scores, kind="stable")
        self._is_ours = (order < len(ours)).astype(float)
        scores = scores[order]
        # Of each run over each other run: 1 for a win, 1/2 for a tie
        self._wins = (np.sign(scores[:, None] - scores) + 1) / 2
        self._n, self._n_smaller = len(scores), min(len(ours), len(theirs))
        self.n_arrangements = comb(self._n, self._n_smaller)
        # Less than any variance except 0, which occurs if all runs of one algorithm win. With a variance of 0, only the
        # number of such tasks would distinguish arrangements of several tasks
        self._min_variance = (2 * len(ours) * len(theirs)) ** -2

    def observed(self) -> _Advantage:
        """Return the advantage as observed."""
        return self._advantage(self._is_ours[None])

    def enumerated(self) -> _Advantage:
        """Return the advantages of all arrangements."""
        chosen = np.zeros((self.n_arrangements, self._n))
        np.put_along_axis(chosen, _choices(self._n, self._n_smaller), 1, axis=1)
        return self._advantage(chosen)

    def shuffled(self, count: int, rng: np.random.Generator) -> _Advantage:
        """Return the advantages of random arrangements, ``(count,)`` each."""
        chosen = np.zeros((count, self._n))
        chosen[:, : self._n_smaller] = 1
        return self._advantage(rng.permuted(chosen, axis=1))

    def _advantage(self, is_ours: Array) -> _Advantage:
        """Return the advantages of arrangements: 1 for runs of ours and 0 for runs of theirs, ``(K, N)``."""
        n_ours = is_ours[0].sum()
        over_theirs = (1 - is_ours) @ self._wins.T / (self._n - n_ours)  # the share of theirs that a run wins over
        under_ours = is_ours @ self._wins / n_ours  # the share of ours that win over a run
        probability = np.sum(is_ours * over_theirs, axis=1) / n_ours
        variance = _variance(over_theirs, is_ours, probability) + _variance(under_ours, 1 - is_ours, probability)
        return probability - 0.5, np.maximum(variance, self._min_variance)


@cache
def _choices(n: int, k: int) -> npt.NDArray[np.int64]:
    """Return all ways to choose ``k`` of ``n`` indices, ``(K, k)``."""
    return np.array(list(combinations(range(n), k)))


def _variance(shares: Array, chosen: Array, mean: Array) -> Array:
    """Compute the variance of the mean of the chosen shares, which vary independently."""
    count = chosen[0].sum()
    squares = np.sum(chosen * (shares - mean[:, None]) ** 2, axis=1)
    return np.asarray(squares / max(count - 1, 1) / count)
