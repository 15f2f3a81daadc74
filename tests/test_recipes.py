"""The recipes in docs/architecture.md work when they are followed literally, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
RECIPES = dict(re.findall(r"^## (Recipe: .*?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"^   ```(python|diff) (\w+)(?:=(\S+))?\n(.*?)^   ```$", re.MULTILINE | re.DOTALL)


def lines_of(diff, signs):
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in signs)


def follow(recipe, folder):
    """Write the files, make the edits, and return the code to run."""
    code = []
    for language, action, name, indented in BLOCK.findall(recipe):
        block = "".join(line[3:] or "\n" for line in indented.splitlines(keepends=True))
        if action == "run":
            code.append(block)
        elif language == "python":
            assert not (folder / name).exists()
            (folder / name).write_text(block)
        else:
            before, after = lines_of(block, " -"), lines_of(block, " +")
            text = (folder / name).read_text()
            assert text.count(before) == 1, f"{name} has {before!r} {text.count(before)} times"
            (folder / name).write_text(text.replace(before, after))
    return code


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_works_when_it_is_followed_literally(title, tmp_path):
    shutil.copytree(
        ROOT / "sb3_scratch_dqn", tmp_path / "sb3_scratch_dqn", ignore=shutil.ignore_patterns("__pycache__")
    )
    (code,) = follow(RECIPES[title], tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"Recipe: add a head": "ScaledHead", "Recipe: add an engine": "the debug engine"}[title] in done.stdout


def test_there_are_recipes_for_a_head_and_an_engine():
    assert list(RECIPES) == ["Recipe: add a head", "Recipe: add an engine"]
