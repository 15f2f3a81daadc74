"""The package exports what the README tells people to use, and the README names all that it exports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_scratch_dqn

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_exported_names():
    assert sb3_scratch_dqn.__all__ == [
        "CnnPolicy",
        "DQNPolicy",
        "ImplicitQNetwork",
        "MaskInInfo",
        "MlpPolicy",
        "MultiInputPolicy",
        "QNetwork",
        "ScratchDQN",
        "ScratchReplayBuffer",
        "register",
    ]


@pytest.mark.parametrize("name", sb3_scratch_dqn.__all__)
def test_each_name_exists_is_documented_and_in_the_readme(name):
    assert getattr(sb3_scratch_dqn, name).__doc__
    assert re.search(rf"\b{name}\b", README)


def test_what_the_readme_imports_from_the_package_is_exported():
    imported = set(re.findall(r"from sb3_scratch_dqn import (\w+)", README))
    qualified = set(re.findall(r"\bsb3_scratch_dqn\.(\w+)\b(?!/)", README)) - {"bench", "zoo"}
    assert imported | qualified <= set(sb3_scratch_dqn.__all__)


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="has no attribute 'Register'"):
        sb3_scratch_dqn.Register  # noqa: B018


def test_importing_the_package_imports_neither_optuna_nor_the_zoo():
    code = "import sys, sb3_scratch_dqn; assert not {'optuna', 'rl_zoo3', 'matplotlib.pyplot'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
