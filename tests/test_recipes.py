"""The recipes in docs/architecture.md work when they are followed literally, in a copy of the package."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
RECIPES = dict(re.findall(r"^## (Recipe: .*?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"^   ```python (.*?)\n(.*?)^   ```$", re.MULTILINE | re.DOTALL)


def follow(recipe, folder):
    """Write the files, make the edits, and return the code to run."""
    code = []
    for options, block in BLOCK.findall(recipe):
        block = textwrap.dedent("".join(line[3:] or "\n" for line in block.splitlines(keepends=True)))
        words = dict(word.partition("=")[::2] for word in shlex.split(options.replace("\\n", "\n")))
        if "file" in words:
            assert not (folder / words["file"]).exists()
            (folder / words["file"]).write_text(block)
        elif "edit" in words:
            path = folder / words["edit"]
            place = words.get("after") or words["before"]
            text = path.read_text()
            assert text.count(place) == 1, f"{words['edit']} has {place!r} {text.count(place)} times"
            path.write_text(text.replace(place, place + block if "after" in words else block + place))
        else:
            assert "run" in words
            code.append(block)
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
    assert title.split()[-1] in done.stdout or done.stdout.strip()


def test_there_are_recipes_for_a_head_and_an_engine():
    assert list(RECIPES) == ["Recipe: add a head", "Recipe: add an engine"]
