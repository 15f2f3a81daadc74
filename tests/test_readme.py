"""The README's examples run, and what it names exists."""

import re
from pathlib import Path

import pytest

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
