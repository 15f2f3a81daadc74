"""Each subpackage imports only those below it, and there are no circular imports. Imports for types alone count too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sb3_scratch_dqn

ROOT = Path(sb3_scratch_dqn.__file__).parent
SUBPACKAGES = ("bench", "zoo", "algorithm", "engines", "networks", "values", "replay", "common")

FILES = sorted(ROOT.rglob("*.py"))


def dotted(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def imported_modules(path):
    """Modules of the package that a file imports."""
    for name, _ in imports(path):
        while name.startswith("sb3_scratch_dqn"):
            if name in MODULES:
                yield name
                break
            name = name.rpartition(".")[0]


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


def test_the_package_is_its_subpackages():
    found = {path.name for path in ROOT.iterdir() if path.name not in ("__pycache__", "hyperparams")}
    assert found == {*SUBPACKAGES, "__init__.py", "py.typed"}


def test_tests_lie_in_folders_of_the_same_names():
    assert {*SUBPACKAGES} <= {path.name for path in Path(__file__).parent.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_a_subpackage_imports_only_those_below_it(name):
    below = SUBPACKAGES[SUBPACKAGES.index(name) :]
    for path in (ROOT / name).rglob("*.py"):
        for imported, _ in imports(path):
            if imported.startswith("sb3_scratch_dqn."):
                assert imported.split(".")[1] in below, f"{path} imports {imported}"


def test_no_files_import_each_other_in_a_circle():
    graph = {name: set(imported_modules(path)) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_a_subpackage_says_what_it_is_for(name):
    assert ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text()))


def test_only_conversion_and_benchmark_import_dqn_of_sb3_and_only_where_they_use_it():
    allowed = [*(ROOT / "bench").rglob("*.py"), ROOT / "algorithm" / "conversion.py"]
    for path in FILES:
        for name, when_loaded in imports(path, for_types=False):
            if name.startswith("stable_baselines3.dqn") or name in ("stable_baselines3.DQN", "stable_baselines3"):
                assert path in allowed, f"{path} imports {name}"
                assert not when_loaded, f"{path} imports {name} when it is loaded"
