"""The statistics of a comparison, against rliable, SciPy, and runs whose distribution is known."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, permutation_test

from sb3_scratch_dqn.bench import stats

rliable_library = pytest.importorskip("rliable.library", reason="rliable, of the extra dev")
rliable_metrics = pytest.importorskip("rliable.metrics")

RNG = np.random.default_rng(0)
# Three tasks of different scale and spread, eight runs each
TASKS = [RNG.normal(0.2, 0.3, 8), RNG.uniform(0, 1.5, 8), RNG.exponential(0.7, 8)]
OTHERS = [task + 0.2 * RNG.normal(size=8) for task in TASKS]


def as_matrix(tasks):
    """Runs x tasks, as rliable wants them."""
    return np.stack(tasks, axis=1)


STATISTICS = {
    "iqm": (stats.pooled_iqm, rliable_metrics.aggregate_iqm),
    "mean": (stats.mean_of_means, rliable_metrics.aggregate_mean),
    "median": (stats.median_of_means, rliable_metrics.aggregate_median),
    "gap": (stats.optimality_gap, rliable_metrics.aggregate_optimality_gap),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_aggregates_are_those_of_rliable(name):
    ours, theirs = STATISTICS[name]
    assert ours(TASKS) == pytest.approx(theirs(as_matrix(TASKS)), abs=1e-12)


@pytest.mark.parametrize("name", STATISTICS)
def test_intervals_are_those_of_rliable_up_to_the_chance_of_a_bootstrap(name):
    ours, theirs = STATISTICS[name]
    estimate = stats.interval(TASKS, ours)
    _, ends = rliable_library.get_interval_estimates(
        {"a": as_matrix(TASKS)}, lambda scores: np.array([theirs(scores)]), reps=5000
    )
    assert float(estimate.low) == pytest.approx(ends["a"][0, 0], abs=0.02)
    assert float(estimate.high) == pytest.approx(ends["a"][1, 0], abs=0.02)
    assert estimate.high - estimate.low > 0.2  # so 0.02 says something


def test_the_probability_of_improvement_is_that_of_rliable():
    ours = float(stats.probability_of_improvement(TASKS, OTHERS))
    theirs = rliable_metrics.probability_of_improvement(as_matrix(TASKS), as_matrix(OTHERS))
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_profiles_are_those_of_rliable():
    thresholds = np.linspace(-0.5, 2, 26)
    theirs, _ = rliable_library.create_performance_profile({"a": as_matrix(TASKS)}, thresholds, reps=10)
    assert stats.profile(TASKS, thresholds) == pytest.approx(theirs["a"], abs=1e-12)


def test_the_curve_has_the_interquartile_mean_at_each_evaluation():
    returns = np.array([[1.0, 8.0], [2.0, 6.0], [3.0, 4.0], [100.0, 2.0]])
    estimate = stats.curve_interval(returns)
    assert estimate.value == pytest.approx([2.5, 5.0])
    each = [stats.interval([column], lambda drawn: stats.iqm(drawn[0])) for column in returns.T]
    assert estimate.low == pytest.approx([float(one.low) for one in each])
    assert estimate.high == pytest.approx([float(one.high) for one in each])


def test_ties_count_half():
    assert float(stats.probability_of_improvement([np.array([1.0, 2.0])], [np.array([1.0, 0.0])])) == 0.875


def test_the_permutation_test_agrees_with_the_exact_one():
    ours, theirs = RNG.normal(0.8, 1, 5), RNG.normal(0, 1, 6)

    def statistic(a, b):
        return abs(stats.probability_of_improvement([a], [b]) - 0.5)

    exact = permutation_test(
        (ours, theirs), statistic, permutation_type="independent", alternative="greater", n_resamples=np.inf
    )
    assert stats.compare([ours], [theirs]).p == pytest.approx(exact.pvalue, abs=0.02)
    assert stats.compare([ours], [theirs]).p == pytest.approx(mannwhitneyu(ours, theirs).pvalue, abs=0.02)


def verdicts(n, shift, times, seed, n_tasks=1):
    """The words for runs with heavy tails, of which one algorithm's are shifted by so much."""
    rng = np.random.default_rng(seed)
    words = []
    for _ in range(times):
        ours, theirs = ([rng.standard_t(3, n) for _ in range(n_tasks)] for _ in range(2))
        words.append(stats.compare([task + shift for task in ours], theirs, resamples=400).word)
    return words


@pytest.mark.parametrize(("n", "n_tasks"), [(3, 1), (5, 1), (10, 1), (5, 3)])
def test_equal_algorithms_rarely_differ(n, n_tasks):
    words = verdicts(n, 0, 400, seed=n, n_tasks=n_tasks)
    # A share of 5% has a standard error of 1.1% here
    assert words.count("no difference") >= 0.92 * len(words)


def test_the_test_is_not_blind():
    assert verdicts(10, 3, 50, seed=1).count("better") >= 48
    assert verdicts(10, -3, 50, seed=1).count("worse") >= 48


def test_three_runs_can_tell_nothing_and_four_can():
    three, four = (stats.compare([np.arange(n) + 100.0], [np.arange(n) * 1.0]) for n in (3, 4))
    assert (three.possible, three.word) == (False, "no difference")
    assert three.lowest_p == pytest.approx(0.1)
    assert (four.possible, four.word) == (True, "better")


def test_the_same_scores_give_the_same_figures():
    assert str(stats.compare(TASKS, OTHERS)) == str(stats.compare(TASKS, OTHERS))
