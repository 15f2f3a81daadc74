"""Imports between the rooms of the package go down, and none reaches into SB3's DQN.

The rooms, from the top: each may import those below it, and never one above. Imports for types alone count too.
"""

import ast
from pathlib import Path

import pytest

import sb3_scratch_dqn

ROOT = Path(sb3_scratch_dqn.__file__).parent
ROOMS = ("bench", "zoo", "algorithm", "engines", "networks", "values", "replay", "common")

FILES = sorted(ROOT.rglob("*.py"))


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path, for_types=True):
    """Names that a file imports from anywhere, with whether that happens when it is loaded."""
    tree = ast.parse(path.read_text())
    skipped = (
        set() if for_types else {id(inner) for node in ast.walk(tree) if is_for_types(node) for inner in ast.walk(node)}
    )
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node in tree.body
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in tree.body


def test_the_package_is_its_rooms():
    found = {path.name for path in ROOT.iterdir() if path.name not in ("__pycache__", "hyperparams")}
    assert found == {*ROOMS, "__init__.py", "py.typed"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room):
    below = ROOMS[ROOMS.index(room) :]
    for path in (ROOT / room).rglob("*.py"):
        for name, _ in imports(path):
            if name.startswith("sb3_scratch_dqn."):
                assert name.split(".")[1] in below, f"{path} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room):
    assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))


def test_only_conversion_and_benchmark_import_dqn_of_sb3_and_only_where_they_use_it():
    allowed = [*(ROOT / "bench").rglob("*.py"), ROOT / "algorithm" / "conversion.py"]
    for path in FILES:
        for name, when_loaded in imports(path, for_types=False):
            if name.startswith("stable_baselines3.dqn") or name in ("stable_baselines3.DQN", "stable_baselines3"):
                assert path in allowed, f"{path} imports {name}"
                assert not when_loaded, f"{path} imports {name} when it is loaded"
