"""Command lines of small comparisons."""

import pytest

from sb3_scratch_dqn.bench.__main__ import main

SMALL = ["-n", "400", "--evaluations", "2", "--eval-episodes", "2"]
GRID = ["--algos", "dqn", "scratch_dqn:rainbow", "--envs", "CartPole-v1", "--seeds", "2", *SMALL]


def refusal(capsys, *arguments):
    """Return the error message of a command that is refused."""
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments)])
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())
