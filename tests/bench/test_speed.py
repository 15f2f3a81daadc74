"""The benchmarks of speed: timing, tables, the command line."""

import re

import pytest
import torch as th

from sb3_scratch_dqn.bench.__main__ import main
from sb3_scratch_dqn.bench.speed import learning
from sb3_scratch_dqn.bench.speed.results import CaseResult, Measurements, Round
from sb3_scratch_dqn.bench.speed.timing import Timings, table, time_in_turn


def test_contestants_are_timed_in_turn():
    turns = []
    timings = time_in_turn({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    order = re.sub(r"(.)\1+", r"\1", "".join(turns))
    assert order.endswith("ababab")
    assert {name: len(times) for name, times in timings.times.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_single_rounds():
    timings = Timings({"ours": [1.0, 2.0, 9.0], "theirs": [2.0, 8.0, 3.0]})
    assert timings.median("ours") == 2.0
    assert timings.ratios("ours", "theirs") == [0.25, 0.5, 3.0]


def test_all_engines_of_a_device_take_part_by_default():
    assert [name for name in learning.select_contestants(None, "cpu") if name != "sbx"] == ["sb3", "eager", "fused"]
    assert [name for name in learning.select_contestants(None, "cuda") if name != "sbx"] == [
        "sb3",
        "eager",
        "cuda_graph",
    ]
    assert learning.select_contestants(["fused"], "cuda") == ["fused"]


def test_tables_are_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_benchmark_of_replay(capsys, monkeypatch):
    monkeypatch.setattr("sb3_scratch_dqn.bench.speed.timing._SECONDS", 1e-4)
    monkeypatch.setattr("sb3_scratch_dqn.bench.speed.replay._VECTOR_CAPACITY", 1000)
    main(["replay", "--rounds", "1", "--largest", "1e4", "--images", "250"])
    printed = capsys.readouterr().out
    for title in ("Memory", "Adding and sampling against SB3", "Frames against full observations", "Prioritized"):
        assert f"### {title}" in printed
    # 2 x 4 frames of 84 x 84, an action of 8 bytes, and 4 each for reward, end and timeout
    assert "| SB3 `ReplayBuffer` | 56,468 |" in printed
    ours = float(re.search(r"\| ours \| ([\d,]+) \|", printed)[1].replace(",", ""))
    # A frame, its age, and the index of its episode's last frame; four frames in 250, and room for 17 last frames
    assert 56_468 / ours == pytest.approx(56_468 / (84 * 84 * (1 + 4 / 250 + 16 / 250) + 7 + 8 + 12), rel=0.01)


def test_the_benchmark_of_speed(capsys, monkeypatch):
    monkeypatch.setitem(learning.CASES, "defaults", learning.CASES["defaults"]._replace(steps=40))
    main(["speed", "defaults", "--rounds", "2", "--contestants", "sb3", "fused", "--n-envs", "2", "--train-freq", "8"])
    printed = capsys.readouterr().out
    assert "### SB3's defaults, CartPole, 2 environments, train_freq=8" in printed
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in printed.splitlines()}
    assert rows["sb3"][3] == rows["sb3"][4] == "1.00 (1.00-1.00)"
    assert float(rows["fused"][4].split()[0]) > 0
    assert int(rows["fused"][-1].split()[0].replace(",", "")) > 50


def test_a_contestant_that_fails_is_reported_and_the_others_are_measured(capsys, monkeypatch):
    case = learning.CASES["defaults"]
    unsupported = {"policy_kwargs": {"optimizer_class": th.optim.SGD}}
    monkeypatch.setitem(learning.CASES, "defaults", case._replace(steps=40, settings=unsupported))
    main(["speed", "defaults", "--rounds", "1", "--contestants", "fused", "eager"])
    printed = capsys.readouterr().out
    assert "fused: ValueError: engine='fused' cannot be used here" in printed
    assert "| eager |" in printed
    assert "| fused |" not in printed


def test_ratios_above_one_are_faster():
    rounds = [Round(2.0, 0.2), Round(4.0, 0.4)]
    contestants = {
        "sb3": Measurements([Round(6.0, 0.6), Round(20.0, 0.4)], 2**30),
        "fused": Measurements(rounds, 2**29),
        "sbx": "ImportError: no",
    }
    text = CaseResult("a case", 4_000, contestants, {}).markdown()
    assert "| fused | 1,333 | 3 | 4.00 (3.00-5.00) | 2.00 (1.00-3.00) | 512 MiB |" in text
    assert "sbx: ImportError: no" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["replay", "--rounds", "0"],
        ["replay", "--largest", "x"],
        ["nothing"],
        ["speed", "nothing"],
        ["speed", "--contestants", "nobody"],
    ],
)
def test_an_invalid_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: python -m sb3_scratch_dqn.bench" in capsys.readouterr().err
