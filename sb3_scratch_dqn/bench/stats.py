r"""The statistics of a comparison, after Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264).

Scores come as a list with one array for each task (environment), ``(..., N)`` for ``N`` runs; tasks may differ in their
number of runs. Leading axes are those of a bootstrap. Intervals are those of the percentile bootstrap at 95%, in which
the runs of each task are drawn anew (stratified). Everything random comes from a generator with a fixed seed, so the
same scores give the same figures.

Whether one algorithm is better than another is not read off overlapping intervals, which are too narrow for a handful
of runs, but tested: with runs of equal distribution, whatever that is, the test calls one of them better in at most 5%
of comparisons.
"""

from collections.abc import Callable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import trim_mean

Array = npt.NDArray[np.float64]

# Scores of all runs, task by task
Scores = Sequence[Array]

_SEED = 0
_RESAMPLES = 5_000
_LEVEL = 0.95


class Estimate(NamedTuple):
    """A figure and its interval at 95%; arrays of the same shape, or numbers."""

    value: Array
    low: Array
    high: Array


def iqm(scores: Array, axis: int = -1) -> Array:
    """The interquartile mean: without the lowest and the highest quarter of the runs.

    :param scores: with the runs along ``axis``
    :param axis: which one that is
    """
    return np.asarray(trim_mean(scores, 0.25, axis=axis))


def pooled_iqm(scores: Scores) -> Array:
    """The interquartile mean of the runs of all tasks together.

    :param scores: normalised, so that those of different tasks may be compared
    """
    return iqm(np.concatenate(list(scores), axis=-1))


def mean_of_means(scores: Scores) -> Array:
    """The mean over tasks of the mean over runs.

    :param scores: likewise
    """
    return np.asarray(np.mean([task.mean(axis=-1) for task in scores], axis=0))


def median_of_means(scores: Scores) -> Array:
    """The median over tasks of the mean over runs.

    :param scores: likewise
    """
    return np.asarray(np.median([task.mean(axis=-1) for task in scores], axis=0))


def optimality_gap(scores: Scores) -> Array:
    """How far runs fall short of 1, on average; what is above 1 does not make up for it.

    :param scores: likewise
    """
    return np.asarray(np.mean(1 - np.minimum(np.concatenate(list(scores), axis=-1), 1), axis=-1))


def probability_of_improvement(ours: Scores, theirs: Scores) -> Array:
    """The probability that a run of ours scores higher than one of theirs, the mean over tasks; ties count half.

    :param ours: of one algorithm
    :param theirs: of another, in the same tasks
    """
    return np.asarray(np.mean([_share_of_wins(a, b) for a, b in zip(ours, theirs, strict=True)], axis=0))


def _share_of_wins(ours: Array, theirs: Array) -> Array:
    """The same for one task."""
    differences = ours[..., :, None] - theirs[..., None, :]
    return np.asarray((np.sign(differences).mean(axis=(-2, -1)) + 1) / 2)


def profile(scores: Scores, thresholds: Array) -> Array:
    """The share of runs that score above a threshold, the mean over all runs of all tasks.

    :param scores: of one algorithm
    :param thresholds: ``(K,)``
    :return: ``(..., K)``
    """
    return np.asarray((np.concatenate(list(scores), axis=-1)[..., None] > thresholds).mean(axis=-2))


# Intervals


def interval(scores: Scores, statistic: Callable[[Scores], Array], resamples: int = _RESAMPLES) -> Estimate:
    """A statistic, and what it would be with other runs.

    :param scores: of one algorithm, or of several behind each other
    :param statistic: one of those above, or the like
    :param resamples: how often runs are drawn anew
    """
    rng = np.random.default_rng(_SEED)
    drawn = [task[rng.integers(len(task), size=(resamples, len(task)))] for task in scores]
    return _estimate(statistic(scores), statistic(drawn))


def curve_interval(returns: Array, resamples: int = _RESAMPLES) -> Estimate:
    """The interquartile mean at each evaluation, and its interval.

    :param returns: ``(N, T)`` for ``N`` runs and ``T`` evaluations
    :param resamples: how often runs are drawn anew
    :return: each ``(T,)``
    """
    rng = np.random.default_rng(_SEED)
    rows = rng.integers(len(returns), size=(resamples, len(returns)))
    return _estimate(iqm(returns, axis=0), iqm(returns[rows], axis=1))


def _estimate(value: Array, drawn: Array) -> Estimate:
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    return Estimate(value, low, high)


# The test


class Verdict(NamedTuple):
    """What a comparison of two algorithms says.

    :param improvement: the probability that a run of the first one is better, with its interval
    :param p: of runs that differ as much, if both came from the same distribution
    :param lowest_p: the lowest that ``p`` can be with so many runs
    """

    improvement: Estimate
    p: float
    lowest_p: float

    @property
    def word(self) -> str:
        """``"better"``, ``"worse"`` or ``"no difference"``."""
        if self.p > 1 - _LEVEL:
            return "no difference"
        return "better" if self.improvement.value > 0.5 else "worse"

    @property
    def possible(self) -> bool:
        """Whether there are enough runs for any difference to be seen."""
        return self.lowest_p <= 1 - _LEVEL


def compare(ours: Scores, theirs: Scores, resamples: int = _RESAMPLES) -> Verdict:
    """Test whether one algorithm is better than another: a permutation test, two-sided.

    Its statistic is the probability of improvement; which algorithm a run belongs to is shuffled within each task.

    :param ours: of one algorithm
    :param theirs: of another, in the same tasks
    :param resamples: how often runs are shuffled, and drawn anew for the interval
    """
    n_tasks = len(ours)
    seen = abs(probability_of_improvement(ours, theirs) - 0.5)
    rng = np.random.default_rng(_SEED)
    shuffled = np.zeros(resamples)
    arrangements = 1.0
    for a, b in zip(ours, theirs, strict=True):
        together = np.tile(np.concatenate([a, b]), (resamples, 1))
        together = rng.permuted(together, axis=1)
        shuffled += _share_of_wins(together[:, : len(a)], together[:, len(a) :]) / n_tasks
        arrangements *= comb(len(a) + len(b), len(a))
    # The arrangement that was seen is one of them, which keeps the test from being too sure of itself
    as_much = np.abs(shuffled - 0.5) >= seen - 1e-12
    p = (1 + np.count_nonzero(as_much)) / (1 + resamples)

    both = [*ours, *theirs]
    improvement = interval(both, lambda drawn: probability_of_improvement(drawn[:n_tasks], drawn[n_tasks:]), resamples)
    return Verdict(improvement, p, 2 / arrangements)
