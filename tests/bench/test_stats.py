"""The statistics of a comparison, against rliable, SciPy, and runs from known distributions."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import brunnermunzel, permutation_test

from sb3_scratch_dqn.bench.report import stats

rliable_library = pytest.importorskip("rliable.library", reason="rliable, of the extra dev")
rliable_metrics = pytest.importorskip("rliable.metrics")

RNG = np.random.default_rng(0)
# Three tasks of different scale and spread, eight runs each
TASKS = [RNG.normal(0.2, 0.3, 8), RNG.uniform(0, 1.5, 8), RNG.exponential(0.7, 8)]
OTHERS = [task + 0.2 * RNG.normal(size=8) for task in TASKS]


def as_matrix(tasks):
    """Return the scores as rliable expects them: runs x tasks."""
    return np.stack(tasks, axis=1)


STATISTICS = {
    "iqm": (stats.pooled_iqm, rliable_metrics.aggregate_iqm),
    "mean": (stats.mean_of_means, rliable_metrics.aggregate_mean),
    "median": (stats.median_of_means, rliable_metrics.aggregate_median),
    "gap": (stats.optimality_gap, rliable_metrics.aggregate_optimality_gap),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_aggregates_equal_those_of_rliable(name):
    ours, theirs = STATISTICS[name]
    assert ours(TASKS) == pytest.approx(theirs(as_matrix(TASKS)), abs=1e-12)


@pytest.mark.parametrize("name", STATISTICS)
def test_intervals_agree_with_rliable_up_to_bootstrap_noise(name):
    ours, theirs = STATISTICS[name]
    estimate = stats.interval(TASKS, ours)
    _, bounds = rliable_library.get_interval_estimates(
        {"a": as_matrix(TASKS)}, lambda scores: np.array([theirs(scores)]), reps=5000
    )
    assert float(estimate.low) == pytest.approx(bounds["a"][0, 0], abs=0.02)
    assert float(estimate.high) == pytest.approx(bounds["a"][1, 0], abs=0.02)
    assert estimate.high - estimate.low > 0.2  # much more than the tolerance of 0.02


def test_the_probability_of_improvement_equals_that_of_rliable():
    ours = float(stats.probability_of_improvement(TASKS, OTHERS))
    theirs = rliable_metrics.probability_of_improvement(as_matrix(TASKS), as_matrix(OTHERS))
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_profiles_equal_those_of_rliable():
    thresholds = np.linspace(-0.5, 2, 26)
    theirs, _ = rliable_library.create_performance_profile({"a": as_matrix(TASKS)}, thresholds, reps=10)
    assert stats.profile(TASKS, thresholds) == pytest.approx(theirs["a"], abs=1e-12)


def test_the_curve_has_the_interquartile_mean_at_each_evaluation():
    returns = np.array([[1.0, 8.0], [2.0, 6.0], [3.0, 4.0], [100.0, 2.0]])
    estimate = stats.curve_interval(returns)
    assert estimate.value == pytest.approx([2.5, 5.0])
    separate = [stats.iqm_interval(column) for column in returns.T]
    assert estimate.low == pytest.approx([float(single.low) for single in separate])
    assert estimate.high == pytest.approx([float(single.high) for single in separate])


def test_ties_count_half():
    assert float(stats.probability_of_improvement([np.array([1.0, 2.0])], [np.array([1.0, 0.0])])) == 0.875


@pytest.mark.parametrize("ties", [False, True])
def test_the_permutation_test_agrees_with_the_exact_one(ties):
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(0.8, 1, 5), rng.normal(0, 1, 6)
    if ties:
        ours, theirs = ours.round(), theirs.round()

    def statistic(a, b):
        with np.errstate(all="ignore"):
            value = abs(brunnermunzel(a, b, distribution="normal").statistic)
        return 0.0 if stats.probability_of_improvement([a], [b]) == 0.5 else round(value, 9)

    exact = permutation_test(
        (ours, theirs), statistic, permutation_type="independent", alternative="greater", n_resamples=np.inf
    )
    assert 0.01 < exact.pvalue < 0.9
    assert stats.compare([ours], [theirs]).p == pytest.approx(exact.pvalue, abs=0.005)


def test_several_tasks_agree_with_a_naive_test():
    tasks = [(np.array([3.0, 5, 1]), np.array([2.0, 0, 4, 2])), (np.array([1.0, 9]), np.array([2.0, 3]))]

    def statistic(groups):
        advantage, variance = 0.0, 0.0
        for a, b in groups:
            over = np.array([np.mean([(x > y) + (x == y) / 2 for y in b]) for x in a])
            under = np.array([np.mean([(x > y) + (x == y) / 2 for x in a]) for y in b])
            advantage += over.mean() - 0.5
            variance += np.var(over, ddof=1) / len(a) + np.var(under, ddof=1) / len(b)
        return abs(advantage) / np.sqrt(variance) if variance else np.inf if advantage else 0.0

    def arrangements(a, b):
        pooled = np.concatenate([a, b])
        for chosen in combinations(range(len(pooled)), len(a)):
            rest = np.setdiff1d(np.arange(len(pooled)), chosen)
            yield pooled[list(chosen)], pooled[rest]

    observed = statistic(tasks)
    permuted = [statistic(groups) for groups in product(*(list(arrangements(a, b)) for a, b in tasks))]
    exact = np.mean(np.array(permuted) >= observed * (1 - 1e-9))
    assert stats.compare(*zip(*tasks, strict=True)).p == pytest.approx(exact, abs=0.005)


def test_p_depends_little_on_the_shuffles(monkeypatch):
    rng = np.random.default_rng(5)
    ours, theirs = [rng.normal(0.5, 1, 16)], [rng.normal(0, 1, 16)]
    ps = []
    for seed in range(5):
        monkeypatch.setattr(stats, "_SEED", seed)
        ps.append(stats.compare(ours, theirs, resamples=2).p)
    assert max(ps) - min(ps) < 0.004
    # It does not depend at all on the order of the algorithms or of the runs
    assert stats.compare(theirs, ours, resamples=2).p == ps[-1]
    assert stats.compare([ours[0][::-1]], theirs, resamples=2).p == ps[-1]


def test_p_is_exact_if_all_arrangements_are_enumerated():
    ours, theirs = np.array([0.0, 1, 2, 3, 4, 5, 8]), np.array([6.0, 7, 9])
    for a, b in ((ours, theirs), (theirs, ours), (ours[::-1], theirs)):
        assert stats.compare([a], [b]).p == pytest.approx(6 / 120, abs=1e-12)


@pytest.mark.parametrize(("n_tasks", "n_theirs"), [(6, 1), (10, 1), (4, 2), (7, 2)])
def test_single_runs_that_win_in_all_tasks_have_the_lowest_p(n_tasks, n_theirs):
    verdict = stats.compare([np.array([1.0])] * n_tasks, [np.linspace(0, 0.5, n_theirs)] * n_tasks)
    assert verdict.p == pytest.approx(verdict.min_p)
    assert verdict.p == pytest.approx(2 / (1 + n_theirs) ** n_tasks)
    assert verdict.word == "better"


def test_p_is_lower_for_wins_in_all_tasks_than_in_most():
    high, low = np.arange(4) + 100.0, np.arange(4) * 1.0
    everywhere = stats.compare([high, high, high], [low, low, low]).p
    mostly = stats.compare([high, high, low], [low, low, high]).p
    assert everywhere < mostly / 3


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        stats.compare([np.array([1.0, np.nan])], [np.array([1.0, 2.0])])


def test_tasks_with_more_runs_have_no_more_weight():
    easy, hard = np.array([0.9, 1.0]), np.array([0.1, 0.0])
    some, many = [np.tile(easy, 8), np.tile(hard, 2)], [np.tile(easy, 2), np.tile(hard, 8)]
    for statistic in (stats.pooled_iqm, stats.mean_of_means, stats.median_of_means, stats.optimality_gap):
        assert float(statistic(some)) == pytest.approx(float(statistic(many))), statistic
    assert float(stats.pooled_iqm(some)) == pytest.approx(float(stats.pooled_iqm([np.tile(easy, 8), np.tile(hard, 8)])))
    thresholds = np.linspace(-0.1, 1.1, 7)
    assert stats.profile(some, thresholds) == pytest.approx(stats.profile(many, thresholds))
    # The same for arrays with a leading axis
    both = [np.stack([task, task]) for task in some]
    assert stats.pooled_iqm(both) == pytest.approx(np.full(2, float(stats.pooled_iqm(some))))


def verdicts(n, shift, times, seed, n_tasks=1):
    """Return the words for runs with heavy tails, those of one algorithm shifted by a constant."""
    rng = np.random.default_rng(seed)
    words = []
    for _ in range(times):
        ours, theirs = ([rng.standard_t(3, n) for _ in range(n_tasks)] for _ in range(2))
        words.append(stats.compare([task + shift for task in ours], theirs, resamples=2, shuffles=400).word)
    return words


@pytest.mark.parametrize(("n", "n_tasks"), [(3, 1), (5, 1), (10, 1), (5, 3)])
def test_equal_algorithms_rarely_differ(n, n_tasks):
    words = verdicts(n, 0, 400, seed=n, n_tasks=n_tasks)
    # A share of 5% has a standard error of 1.1% here
    assert words.count("no difference") >= 0.92 * len(words)


@pytest.mark.parametrize(("n", "m"), [(10, 10), (5, 20), (5, 5)])
def test_algorithms_that_differ_only_in_spread_are_rarely_called_better_or_worse(n, m):
    rng = np.random.default_rng(n)
    words = [
        stats.compare([rng.normal(scale=10, size=n)], [rng.normal(size=m)], resamples=2, shuffles=400).word
        for _ in range(400)
    ]
    # Without the standard error these shares are 93% and 79%
    assert words.count("no difference") >= 0.92 * len(words)


def test_clear_differences_are_found():
    assert verdicts(10, 3, 50, seed=1).count("better") >= 48
    assert verdicts(10, -3, 50, seed=1).count("worse") >= 48


def test_three_runs_are_too_few_and_four_are_enough():
    three, four = (stats.compare([np.arange(n) + 100.0], [np.arange(n) * 1.0]) for n in (3, 4))
    assert (three.enough_runs, three.word) == (False, "no difference")
    assert three.min_p == pytest.approx(0.1)
    assert (four.enough_runs, four.word) == (True, "better")


def test_the_same_scores_give_the_same_figures():
    assert str(stats.compare(TASKS, OTHERS)) == str(stats.compare(TASKS, OTHERS))
