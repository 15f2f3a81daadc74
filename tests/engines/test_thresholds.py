"""The script behind the figures of the engines' thresholds runs."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "engine_thresholds.py"


@pytest.mark.parametrize("name", ["relu", "noise", "passes", "flush", "transfer"])
def test_a_table_is_printed_and_the_threshold_is_unchanged(name, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("engine_thresholds", PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "SCALE", 1e-3)
    before = script.dense._NUMPY_RELU_MAX_SIZE, script.dense._OUTPUT_NOISE_MAX_ROWS
    getattr(script, name)()
    assert len(capsys.readouterr().out.splitlines()) > 4
    assert before == (script.dense._NUMPY_RELU_MAX_SIZE, script.dense._OUTPUT_NOISE_MAX_ROWS)
