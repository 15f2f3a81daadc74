"""The README's examples run, and what it names exists."""

import re
from pathlib import Path

import pytest

from sb3_scratch_dqn.bench.report.comparison import make_comparison
from sb3_scratch_dqn.bench.results import read_results
from sb3_scratch_dqn.bench.run.plan import Run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_run(code, monkeypatch, tmp_path):
    code = code.replace("learn(50_000)", "learn(600)").replace("/tmp/", f"{tmp_path}/")
    exec(compile(code, "README.md", "exec"), {})


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 10
    headings = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    for link in links:
        assert link in headings or (ROOT / link).exists(), link


def test_the_layout_is_that_of_the_checkout():
    layout = re.search(r"## How the code is laid out\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    listed = {line.split()[0] for line in layout.splitlines() if line.startswith("  ")}
    modules = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "sb3_scratch_dqn").iterdir()
        if not path.name.startswith("__") and path.name not in ("py.typed", "hyperparams")
    }
    assert listed == modules


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)(?: |`|$)", README, re.MULTILINE):
        if target in ("demo", "test", "check", "format"):
            assert f"\n{target}:" in makefile


def test_results_are_those_of_the_report_and_can_be_compared():
    results = ROOT / "results"
    comparison = make_comparison(read_results(results))
    section = re.search(r"### Results\n(.*?)\n### ", README, re.DOTALL).group(1)
    rows = re.findall(r"^\| \S+-v\d .*$", section, re.MULTILINE)
    assert len(rows) == sum(len(comparison.algos_in(env)) for env in comparison.envs)
    report = (results / "report" / "report.md").read_text()
    for row in rows:
        assert row in report
    for result in comparison.results:
        assert result.path == str(results / Run(result.algo, result.env, result.seed, 1, 1, 1).path)
