r"""The statistics of a comparison, after Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264).

Scores come as a list with one array for each task (environment), ``(..., N)`` for ``N`` runs; tasks may differ in their
number of runs. Leading axes are those of a bootstrap. Intervals are those of the percentile bootstrap at 95%, in which
the runs of each task are drawn anew (stratified). Everything random comes from a generator with a fixed seed, so the
same scores give the same figures.

Whether one algorithm is better than another is not read off overlapping intervals, which are too narrow for a handful
of runs, but tested (:func:`compare`): with runs of equal distribution, whatever that is, the test calls one of them
better in at most 5% of comparisons, and with five runs or more in hardly more where only the spread differs.
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

# Scores of all runs, task by task
Scores = Sequence[Array]

_SEED = 0
_RESAMPLES = 5_000
_MOST_ARRANGEMENTS = 200_000  # up to which all are looked at, as those of ten runs and ten
_SHUFFLES = 100_000
_SHUFFLES_AT_ONCE = 10_000
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
    """The interquartile mean of the runs of all tasks together, in which each task has the same weight.

    :param scores: normalised, so that those of different tasks may be compared
    """
    pooled = np.concatenate(list(scores), axis=-1)
    counts = [task.shape[-1] for task in scores]
    if len(set(counts)) == 1:
        return iqm(pooled)
    # Each run has a share of what is ranked, of which the lowest and the highest quarter are left out
    shares = np.concatenate([np.full(count, 1 / count / len(counts)) for count in counts])
    order = np.argsort(pooled, axis=-1)
    ends = np.cumsum(shares[order], axis=-1)
    kept = np.minimum(ends, 0.75) - np.maximum(ends - shares[order], 0.25)
    return np.asarray(np.sum(np.take_along_axis(pooled, order, axis=-1) * np.maximum(kept, 0), axis=-1) / 0.5)


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
    """How far runs fall short of 1, the mean over tasks; what is above 1 does not make up for it.

    :param scores: likewise
    """
    return np.asarray(np.mean([(1 - np.minimum(task, 1)).mean(axis=-1) for task in scores], axis=0))


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
    """The share of runs that score above a threshold, the mean over tasks.

    :param scores: of one algorithm
    :param thresholds: ``(K,)``
    :return: ``(..., K)``
    """
    return np.asarray(np.mean([(task[..., None] > thresholds).mean(axis=-2) for task in scores], axis=0))


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


def improvement(ours: Scores, theirs: Scores, resamples: int = _RESAMPLES) -> Estimate:
    """The probability of improvement, and its interval.

    :param ours: of one algorithm
    :param theirs: of another, in the same tasks
    :param resamples: how often runs are drawn anew
    """
    n_tasks = len(ours)
    return interval(
        [*ours, *theirs], lambda drawn: probability_of_improvement(drawn[:n_tasks], drawn[n_tasks:]), resamples
    )


# The test


class Verdict(NamedTuple):
    """What a comparison of two algorithms says.

    :param improvement: the probability that a run of the first one is better, with its interval
    :param p: of runs that differ as clearly, if neither algorithm were better
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


def compare(ours: Scores, theirs: Scores, resamples: int = _RESAMPLES, shuffles: int | None = None) -> Verdict:
    """Test whether one algorithm is better than another: a permutation test, two-sided.

    Its statistic is the probability of improvement over its standard error (Neubert & Brunner 2007,
    https://doi.org/10.1016/j.csda.2006.05.024); which algorithm a run belongs to is permuted within each task. Without
    the standard error, an algorithm that is only less steady than another would often be called better or worse. It
    takes about five runs of each for that; with four, up to 13% of those that differ in spread alone still are.

    :param ours: of one algorithm
    :param theirs: of another, in the same tasks
    :param resamples: how often runs are drawn anew for the interval
    :param shuffles: how often they are shuffled where they cannot be arranged in all ways; ``None`` for so often that
        ``p`` is known to 0.002 near the level
    :raises ValueError: if a score is no number
    """
    if not all(np.isfinite(task).all() for task in (*ours, *theirs)):
        raise ValueError("scores must be finite numbers")
    tasks = [_Task(a, b) for a, b in zip(ours, theirs, strict=True)]
    # Less than nothing: sums that are the same may come out differently in their last bits
    seen = np.abs(_clearness([task.seen() for task in tasks])) * (1 - 1e-9)
    arrangements = prod(task.n_arrangements for task in tasks)
    if arrangements <= _MOST_ARRANGEMENTS:
        p = float(np.mean(_clearness_of_all([task.arranged() for task in tasks]) >= seen))
    else:
        rng, shuffles, as_much = np.random.default_rng(_SEED), shuffles or _SHUFFLES, 0
        for begin in range(0, shuffles, _SHUFFLES_AT_ONCE):
            count = min(_SHUFFLES_AT_ONCE, shuffles - begin)
            shuffled = np.abs(_clearness([task.shuffled(count, rng) for task in tasks]))
            as_much += int(np.count_nonzero(shuffled >= seen))
        # The arrangement that was seen is one of them, which keeps the test from being too sure of itself
        p = (1 + as_much) / (1 + shuffles)
    return Verdict(improvement(ours, theirs, resamples), p, 2 / arrangements)


# The advantage of ours, which is how far the probability of improvement is from 1/2, and its variance; an array each
_Advantage = tuple[Array, Array]


def _clearness(advantages: Sequence[_Advantage]) -> Array:
    """How far the mean advantage over tasks is from 0, in standard errors."""
    advantage, variance = (np.sum(parts, axis=0) for parts in zip(*advantages, strict=True))
    return np.asarray(advantage / np.sqrt(variance))


def _clearness_of_all(advantages: Sequence[_Advantage]) -> Array:
    """The same, without its sign, of each arrangement of one task with each of the others."""
    advantage, variance = np.zeros(1), np.zeros(1)
    for more, its_variance in advantages:
        advantage = np.add.outer(advantage, more).ravel()
        variance = np.add.outer(variance, its_variance).ravel()
    return np.abs(_clearness([(advantage, variance)]))


class _Task:
    """The runs of two algorithms in one task, of which it is known which win over which."""

    def __init__(self, ours: Array, theirs: Array) -> None:
        together = np.concatenate([ours, theirs])
        # In the order of their scores, so that nothing depends on which algorithm, or run, comes first
        order = np.argsort(together, kind="stable")
        self._is_ours = (order < len(ours)).astype(float)
        together = together[order]
        # Of each run over each other one: 1 for a win, 1/2 for a tie
        self._wins = (np.sign(together[:, None] - together) + 1) / 2
        self._n, self._n_fewer = len(together), min(len(ours), len(theirs))
        self.n_arrangements = comb(self._n, self._n_fewer)
        # Less than any variance but 0, which it would have where one algorithm wins always; then nothing but the number
        # of such tasks would tell arrangements of several tasks apart
        self._least_variance = (2 * len(ours) * len(theirs)) ** -2

    def seen(self) -> _Advantage:
        """How it is."""
        return self._advantage(self._is_ours[None])

    def arranged(self) -> _Advantage:
        """How it would be for each choice of as many runs."""
        chosen = np.zeros((self.n_arrangements, self._n))
        np.put_along_axis(chosen, _choices(self._n, self._n_fewer), 1, axis=1)
        return self._advantage(chosen)

    def shuffled(self, count: int, rng: np.random.Generator) -> _Advantage:
        """How it would be where it was drawn by lot which runs are whose, ``(count,)`` each."""
        chosen = np.zeros((count, self._n))
        chosen[:, : self._n_fewer] = 1
        return self._advantage(rng.permuted(chosen, axis=1))

    def _advantage(self, is_ours: Array) -> _Advantage:
        """The same for rows that say which runs are ours, ``(K, N)``."""
        n_ours = is_ours[0].sum()
        over_theirs = (1 - is_ours) @ self._wins.T / (self._n - n_ours)  # the share of theirs that a run wins over
        under_ours = is_ours @ self._wins / n_ours  # the share of ours that win over a run
        probability = np.sum(is_ours * over_theirs, axis=1) / n_ours
        variance = _variance(over_theirs, is_ours, probability) + _variance(under_ours, 1 - is_ours, probability)
        return probability - 0.5, np.maximum(variance, self._least_variance)


@cache
def _choices(n: int, k: int) -> npt.NDArray[np.int64]:
    """All ways to choose ``k`` of ``n`` places, ``(K, k)``."""
    return np.array(list(combinations(range(n), k)))


def _variance(shares: Array, chosen: Array, mean: Array) -> Array:
    """Of the mean of the chosen shares, which each vary by themselves."""
    count = chosen[0].sum()
    squares = np.sum(chosen * (shares - mean[:, None]) ** 2, axis=1)
    return np.asarray(squares / max(count - 1, 1) / count)
