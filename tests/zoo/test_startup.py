"""The code that runs at every start of the interpreter is fast and silent, and its errors do not stop the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STARTUP = Path(__file__).parents[2] / "startup"


def python(*args, **environment):
    """Run an interpreter in which the package is installed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **environment}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, cwd="/", timeout=120, check=False
    )


def python_without_packages(code, **environment):
    """Run an interpreter without site-packages, but with the startup folder in ``sys.path``."""
    return python("-S", "-c", f"import sys; sys.path.insert(0, {str(STARTUP)!r})\n{code}", **environment)


FAKE_ZOO = """
import os, pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "rl_zoo3").mkdir()
(folder / "rl_zoo3" / "__init__.py").write_text("")
(folder / "rl_zoo3" / "utils.py").write_text("ALGOS = {'dqn': object}")
sys.path.insert(0, str(folder))
"""


def test_the_installed_files_equal_those_of_the_repository():
    installed = python("-c", "import _sb3_scratch_dqn_zoo; print(_sb3_scratch_dqn_zoo.__file__)").stdout.strip()
    for path in STARTUP.glob("*sb3_scratch_dqn_zoo.*"):
        assert (Path(installed).parent / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("flags", [[], ["-I"], ["-E"], ["-W", "error"]])
def test_the_start_is_silent_and_imports_no_large_package(flags):
    code = (
        "import sys; print([m for m in ('torch', 'numpy', 'stable_baselines3', 'sb3_scratch_dqn') if m in sys.modules])"
    )
    result = python(*flags, "-c", code)
    assert result.returncode == 0
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_the_start_installs_one_finder_that_ignores_other_modules():
    code = (
        "import sys; finders = [f for f in sys.meta_path if type(f).__name__ == 'ZooFinder'];"
        "print(len(finders), finders[0].find_spec('json'), finders[0].find_spec('rl_zoo3'))"
    )
    assert python("-c", code).stdout.split() == ["1", "None", "None"]


def test_the_startup_module_imports_only_modules_that_are_already_loaded():
    code = "before = set(sys.modules); import site, _sb3_scratch_dqn_zoo; print(sorted(set(sys.modules) - before))"
    added = python_without_packages("import os, site\n" + code).stdout
    assert added.strip() == "['_sb3_scratch_dqn_zoo']"


@pytest.mark.parametrize(("value", "registered"), [("1", "False"), ("yes", "False"), ("0", "True"), ("", "True")])
def test_the_environment_variable_disables_registration(value, registered):
    code = "from rl_zoo3 import ALGOS; print('scratch_dqn' in ALGOS)"
    result = python("-c", code, SB3_SCRATCH_DQN_NO_ZOO=value)
    assert result.stdout.strip() == registered, result.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_algorithm_is_registered_in_child_processes(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "def registered():\n    from rl_zoo3 import ALGOS\n    return 'scratch_dqn' in ALGOS\n"
        "if __name__ == '__main__':\n"
        f"    print(multiprocessing.get_context({method!r}).Pool(1).apply(registered))\n"
    )
    assert python(str(script)).stdout.strip() == "True"


def test_a_missing_package_prints_one_line_and_the_zoo_works():
    result = python_without_packages(
        FAKE_ZOO
        + "import _sb3_scratch_dqn_zoo; _sb3_scratch_dqn_zoo.install()\n"
        + "import rl_zoo3.utils; print(list(rl_zoo3.utils.ALGOS))"
    )
    assert result.returncode == 0
    assert result.stdout.strip() == "['dqn']"
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("sb3_scratch_dqn: could not register scratch_dqn in RL Zoo: ModuleNotFoundError")


def test_a_broken_package_prints_one_line_and_the_zoo_works():
    result = python_without_packages(
        FAKE_ZOO
        + "(folder / 'sb3_scratch_dqn.py').write_text('raise RuntimeError(\"two\\\\nlines\")')\n"
        + "import _sb3_scratch_dqn_zoo; _sb3_scratch_dqn_zoo.install()\n"
        + "import rl_zoo3.utils; print(list(rl_zoo3.utils.ALGOS))"
    )
    assert result.returncode == 0
    assert result.stdout.strip() == "['dqn']"
    assert result.stderr == "sb3_scratch_dqn: could not register scratch_dqn in RL Zoo: RuntimeError: two lines\n"


def test_without_the_zoo_importing_it_raises_module_not_found():
    code = (
        "import _sb3_scratch_dqn_zoo; _sb3_scratch_dqn_zoo.install(); _sb3_scratch_dqn_zoo.install()\n"
        "print(sum(type(f).__name__ == 'ZooFinder' for f in sys.meta_path))\n"
        "try:\n    import rl_zoo3.utils\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    )
    assert python_without_packages(code).stdout.split() == ["1", "rl_zoo3"]


def test_a_module_of_the_zoo_keeps_its_loader_and_source():
    code = (
        "import inspect, rl_zoo3.utils as u;"
        "print(type(u.__loader__).__name__, inspect.getsource(u.linear_schedule).startswith('def linear_schedule'))"
    )
    assert python("-c", code).stdout.split() == ["SourceFileLoader", "True"]
