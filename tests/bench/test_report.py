"""Reports on made-up runs with known scores."""

import json
import re

import matplotlib
import numpy as np
import pytest
from known_scores import PROVENANCE, make_run, report, write_run, write_runs

from sb3_scratch_dqn.bench.__main__ import main
from sb3_scratch_dqn.bench.report import stats
from sb3_scratch_dqn.bench.report.comparison import make_comparison
from sb3_scratch_dqn.bench.results import read_results
from sb3_scratch_dqn.bench.speed.results import CaseResult, Measurements, Round, read_speed, save_speed


@pytest.fixture(autouse=True)
def _few_shuffles(monkeypatch):
    """Verdicts near the level need more shuffles, but none is tested here."""
    monkeypatch.setattr(stats, "_SHUFFLES", 2_000)


def test_verdicts_agree_with_the_known_scores(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 100, "scratch_dqn:rainbow": 130, "qrdqn": 70})
    text = report(tmp_path)
    for where in ("**One-v0**", "**Two-v0**", "**One-v0, Two-v0 together**"):
        for measure in ("area under the learning curve", "final return"):
            assert f"{where}, {measure}: `scratch_dqn` shows **no difference** to `dqn` at the 95% level" in text
            assert f"{where}, {measure}: `scratch_dqn:rainbow` is **better** than `dqn` at the 95% level" in text
            assert f"{where}, {measure}: `qrdqn` is **worse** than `dqn` at the 95% level" in text
    assert "There are 18 comparisons here" in text


def test_numbers_agree_with_the_files(tmp_path):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=4, envs=["One-v0"])
    finals = sorted(
        float(np.mean(json.loads(path.read_text())["curve"]["returns"][-1])) for path in tmp_path.glob("*/*/*.json")
    )
    text = report(tmp_path)
    assert "| One-v0 | `dqn` | 4 | " in text
    assert f"{np.mean(finals[1:3]):.1f} (" in text  # the interquartile mean of four
    comparison = make_comparison(read_results(tmp_path))
    # The curve rises evenly from 0 to 100
    assert comparison.scores("One-v0", "dqn", "area under the learning curve").mean() == pytest.approx(50, abs=3)
    low, high = comparison.bounds("One-v0")
    assert (low, high) == (pytest.approx(0, abs=5), 100.0)
    assert "| One-v0 | `dqn` | 102 (" in text  # steps per second are 100 to 103
    assert "| 300 (300 to 300) | 1.00 |" in text  # MiB, and the share of processor time


def test_too_few_runs_have_no_verdict(tmp_path):
    write_runs(tmp_path, {"dqn": 0, "scratch_dqn": 100}, n_seeds=3)
    text = report(tmp_path)
    assert "`scratch_dqn` and `dqn` have **too few runs** for a verdict: p is at least 0.10 for any results" in text
    # Both environments together have enough
    assert "together**, final return: `scratch_dqn` is **better** than `dqn`" in text


def test_the_same_files_give_the_same_report(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 110}, n_seeds=3)
    main(["report", str(tmp_path), "--out", str(tmp_path / "a")])
    main(["report", str(tmp_path), "--out", str(tmp_path / "b")])
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"report.md", "report.html", "curves_over_steps.png", "profiles.png", "improvement.png"} <= names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_page_embeds_all_pictures(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "<algo> & co": 110}, n_seeds=3)
    text = report(tmp_path)
    page = (tmp_path / "report" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(sources) == text.count("![") > 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "&lt;algo&gt; &amp; co" in page
    assert "<algo>" not in page


def test_failed_runs_are_listed_and_left_out_of_the_results(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 100}, n_seeds=4)
    rng = np.random.default_rng(1)
    error = {"type": "RuntimeError", "message": "out of luck", "traceback": ""}
    failed = make_run("dqn", "One-v0", 4, 0, rng, status="failed", error=error)
    for name in ("curve", "training_seconds", "steps_per_second", "peak_memory_bytes"):
        del failed[name]
    write_run(tmp_path, failed)
    text = report(tmp_path)
    assert "**1 of 17 runs failed**" in text
    assert "`dqn`, One-v0, seed 4: RuntimeError: out of luck" in text
    assert "| One-v0 | 200 | 5 x 2 episodes | 5, 1 failed | 4 |" in text
    assert "| One-v0 | `dqn` | 4 |" in text


def test_an_algorithm_whose_runs_all_failed_cannot_be_compared(tmp_path):
    rng = np.random.default_rng(1)
    error = {"type": "RuntimeError", "message": "out of luck", "traceback": ""}
    write_run(tmp_path, make_run("dqn", "One-v0", 0, 100, rng))
    write_run(tmp_path, make_run("qrdqn", "One-v0", 0, 100, rng, status="failed", error=error))
    counts = "0 of 1 runs of `qrdqn` finished, 1 of 1 runs of `dqn` finished"
    assert f"`qrdqn` **cannot be compared** with `dqn`: {counts}" in report(tmp_path)


def test_the_output_of_a_failed_run_is_a_single_line_without_markdown(tmp_path):
    rng = np.random.default_rng(1)
    write_run(tmp_path, make_run("dqn", "One-v0", 0, 100, rng))
    error = {"type": "ProcessEnded", "message": "it printed: # a | b\n\n- `c`\n" + 1000 * "x", "traceback": ""}
    write_run(tmp_path, make_run("dqn", "One-v0", 1, 100, rng, status="failed", error=error))
    (line,) = [line for line in report(tmp_path).splitlines() if "seed 1" in line]
    assert line.startswith("- `dqn`, One-v0, seed 1: ProcessEnded: it printed: # a | b - 'c' xxx")
    assert len(line) < 400


def test_more_steps_than_requested_are_reported(tmp_path):
    rng = np.random.default_rng(1)
    write_run(tmp_path, make_run("dqn", "One-v0", 0, 100, rng, steps_taken=205))
    write_run(tmp_path, make_run("ppo", "One-v0", 0, 100, rng, steps_taken=16_384))
    text = report(tmp_path)
    assert "- `ppo`, One-v0: 16,384 instead of 200, with the last evaluation after 16,384" in text
    assert "`dqn`, One-v0: " not in text


def test_one_run_has_no_interval_and_few_have_a_warning(tmp_path):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=1, envs=["One-v0"])
    text = report(tmp_path)
    assert re.search(r"\| One-v0 \| `dqn` \| 1 \| [\d.]+ \| [\d.]+ \|\n", text)
    assert "| One-v0 | `dqn` | 100 | 300 | 1.00 |" in text
    assert "narrower than they should be" in text


def test_many_runs_have_no_warning(tmp_path):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=10, envs=["One-v0"])
    assert "narrower than they should be" not in report(tmp_path)


def test_algorithms_that_share_more_environments_have_another_aggregate(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 100, "qrdqn": 100}, n_seeds=4)
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 100}, n_seeds=4, envs=["Three-v0"])
    text = report(tmp_path)
    assert "**One-v0, Three-v0, Two-v0**, in which `dqn`, `scratch_dqn` have runs" in text
    assert "**One-v0, Two-v0**, in which `dqn`, `qrdqn`, `scratch_dqn` have runs" in text
    assert {"profiles.png", "profiles_2.png"} < {path.name for path in (tmp_path / "report").iterdir()}


def test_an_environment_in_which_no_algorithm_learns_has_a_verdict_but_no_scale(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 140})
    rng = np.random.default_rng(2)
    for algo in ("dqn", "scratch_dqn"):
        for seed in range(8):
            write_run(tmp_path, make_run(algo, "Hard-v0", seed, 0, rng, reward_threshold=None))
    assert make_comparison(read_results(tmp_path)).bounds("Hard-v0") is None
    text = report(tmp_path)
    assert "scores cannot be normalised: Hard-v0." in text
    assert "**One-v0, Two-v0**, in which" in text
    assert "**Hard-v0, One-v0, Two-v0 together**, final return: `scratch_dqn` is **better** than `dqn`" in text
    assert "in One-v0, Two-v0; probability of improvement" in text


def test_a_single_algorithm_is_aggregated_over_all_its_environments(tmp_path):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=1)
    text = report(tmp_path)
    assert "**One-v0, Two-v0**, in which `dqn` have runs" in text
    assert re.search(r"\| `dqn` \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|\n", text), "one run has no interval"


def test_algorithms_with_more_environments_than_the_reference_share_its_group(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 100}, n_seeds=4)
    write_runs(tmp_path, {"scratch_dqn": 100}, n_seeds=4, envs=["Three-v0"])
    write_runs(tmp_path, {"qrdqn": 100}, n_seeds=4, envs=["One-v0"])
    assert make_comparison(read_results(tmp_path)).groups() == [["dqn", "scratch_dqn"]]


def test_the_scale_starts_at_the_mean_of_untrained_agents_not_at_the_best(tmp_path):
    rng = np.random.default_rng(2)
    for seed in range(10):
        content = make_run("dqn", "One-v0", seed, 55, rng, reward_threshold=None)
        content["curve"]["returns"][0] = [60.0, 60.0] if seed == 0 else [10.0, 10.0]
        write_run(tmp_path, content)
    low, high = make_comparison(read_results(tmp_path)).bounds("One-v0")
    assert low == pytest.approx(15)
    assert 50 < high < 60


def test_pictures_of_an_earlier_report_are_removed_and_other_files_kept(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 100}, n_seeds=4)
    report(tmp_path)
    own = tmp_path / "report" / "own.png"
    own.write_text("a picture of the user")
    with (tmp_path / "report" / "report.md").open("a") as file:
        file.write("![mine](own.png)")
    assert (tmp_path / "report" / "profiles.png").exists()
    for path in (tmp_path / "Two-v0").rglob("*.json"):
        path.unlink()
    report(tmp_path)
    assert not (tmp_path / "report" / "profiles.png").exists()
    assert own.exists()


def test_settings_of_matplotlib_do_not_change_the_report(tmp_path):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=2, envs=["One-v0"])
    main(["report", str(tmp_path), "--out", str(tmp_path / "a")])
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        main(["report", str(tmp_path), "--out", str(tmp_path / "b")])
        assert matplotlib.rcParams["font.size"] == 20
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_runs_of_several_commits_are_listed_separately(tmp_path):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=3, envs=["One-v0"])
    write_run(tmp_path, make_run("dqn", "One-v0", 3, 100, np.random.default_rng(0), commit="def"))
    text = report(tmp_path)
    assert "- commit `abc`: 3 of `dqn` in One-v0" in text
    assert "- commit `def`: 1 of `dqn` in One-v0" in text
    assert "- python 3.11, torch 2; a processor, 2 processors, a system\n" in text


def test_the_reference_can_be_chosen(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn": 130})
    assert "`dqn` is **worse** than `scratch_dqn`" in report(tmp_path, "--reference", "scratch_dqn")


def test_the_report_lists_the_commands_that_reproduce_the_runs(tmp_path):
    write_runs(tmp_path, {"dqn": 100, "scratch_dqn:rainbow": 100}, n_seeds=2)
    expected = (
        "python -m sb3_scratch_dqn.bench run --algos dqn scratch_dqn:rainbow --envs One-v0 Two-v0 --seeds 2 -n 200 "
        "--evaluations 4 --eval-episodes 2 --out results"
    )
    assert expected in report(tmp_path)


def test_the_commands_start_at_the_first_seed(tmp_path):
    for seed in (100, 101):
        write_run(tmp_path, make_run("dqn", "One-v0", seed, 100, np.random.default_rng(0)))
    assert "--algos dqn --envs One-v0 --first-seed 100 --seeds 2 -n 200" in report(tmp_path)


def test_results_of_the_speed_benchmark_are_saved_and_reported(tmp_path):
    write_runs(tmp_path, {"dqn": 100}, n_seeds=1)
    rounds = [Round(1.0, 0.1), Round(2.0, 0.2)]
    twice = [Round(0.5, 0.1), Round(1.0, 0.2)]
    sb3 = Measurements(rounds, 2**30)
    cases = [
        CaseResult("a case", 100, {"sb3": sb3, "fused": Measurements(twice, 2**29)}, PROVENANCE),
        CaseResult("another case", 100, {"sb3": sb3, "sbx": "ImportError: no"}, PROVENANCE),
    ]
    save_speed(cases, tmp_path)
    save_speed(cases[1:], tmp_path)  # replaces the earlier result of the same case
    assert read_speed(tmp_path) == cases
    text = report(tmp_path)
    assert "| fused | 133 | 7 | 2.00 (2.00-2.00) | 1.00 (1.00-1.00) | 512 MiB |" in text
    assert "sbx: ImportError: no" in text
    assert (tmp_path / "report" / "speed.png").stat().st_size > 1000
