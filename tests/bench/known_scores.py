"""Made-up runs with known scores."""

import numpy as np

from sb3_scratch_dqn.bench.__main__ import main
from sb3_scratch_dqn.bench.run.grid import write_result
from sb3_scratch_dqn.bench.run.plan import Run

STEPS = [0, 50, 100, 150, 200]
PROVENANCE = {
    "started": "2026-01-01T00:00:00+00:00",
    "versions": {"python": "3.11", "torch": "2"},
    "commit": "abc",
    "hardware": {"processor": "a processor", "cores": 2, "memory_bytes": 2**34, "system": "a system", "gpu": None},
}


def make_run(algo, env, seed, level, rng, **changes):
    """Return the file content of a run whose return rises linearly to a level, with a standard deviation of 5."""
    returns = [[level * step / 200 + rng.normal(scale=5) for _ in range(2)] for step in STEPS]
    content = {
        "format": 1,
        "algo": algo,
        "env": env,
        "seed": seed,
        "reward_threshold": 100.0,
        **PROVENANCE,
        "status": "done",
        "settings": {**Run(algo, env, seed, 200, 4, 2).common_settings(), "hyperparameters": {"gamma": 0.99}},
        "engine": None,
        "curve": {
            "steps": STEPS,
            "seconds": [step / 100 for step in STEPS],
            "cpu_seconds": [step / 100 for step in STEPS],
            "returns": returns,
            "lengths": [[10, 10]] * 5,
        },
        "training_seconds": 2.0,
        "steps_per_second": 100.0 + seed,
        "peak_memory_bytes": 300 * 2**20,
        "wall_seconds": 3.0,
    }
    return {**content, **changes}


def write_run(folder, content):
    run = Run(content["algo"], content["env"], content["seed"], 200, 4, 2)
    write_result(content, folder / run.path)
    return folder / run.path


def write_runs(folder, levels, n_seeds=8, envs=("One-v0", "Two-v0")):
    """Write runs of each algorithm at its level."""
    rng = np.random.default_rng(0)
    for env in envs:
        for algo, level in levels.items():
            for seed in range(n_seeds):
                write_run(folder, make_run(algo, env, seed, level, rng))


def report(folder, *arguments):
    main(["report", str(folder), *arguments])
    return (folder / "report" / "report.md").read_text()
