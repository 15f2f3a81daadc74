"""The section of a report on how its runs were made: commands, versions, machines, commits and settings."""

from collections.abc import Callable, Mapping
from typing import Any

from sb3_scratch_dqn.bench.report.comparison import Comparison
from sb3_scratch_dqn.bench.report.document import Document


def write_provenance(document: Document, comparison: Comparison) -> None:
    """Write the section on how the runs were made.

    :param document: the report
    :param comparison: the results of all runs
    """
    document.heading("How to reproduce")
    for command in _commands(comparison):
        document.code(command)
    document.items(_group_runs(comparison, describe_setup))
    document.items(_group_runs(comparison, lambda content: f"commit `{content.get('commit')}`"))
    rows = []
    for env in comparison.envs:
        for algo in comparison.algos_in(env):
            runs = comparison.runs(env, algo)
            settings = ", ".join(f"{name}={value}" for name, value in runs[0].settings["hyperparameters"].items())
            engines = sorted({str(run.content.get("engine") or "") for run in runs})
            rows.append([env, f"`{algo}`", ", ".join(engines), settings])
    if rows:
        document.table(["environment", "algorithm", "engine", "settings"], rows)


def _commands(comparison: Comparison) -> list[str]:
    """Return the command lines that reproduce the results.

    Environments with the same algorithms, seeds and settings share a command.

    :param comparison: the results
    """
    envs_of_command: dict[tuple[str, str], list[str]] = {}
    for env in comparison.envs:
        algos_of_seeds: dict[tuple[int, int], list[str]] = {}
        for algo in comparison.algos:
            seeds = [result.seed for result in comparison.all_runs(env, algo)]
            if seeds:
                algos_of_seeds.setdefault((min(seeds), max(seeds) + 1), []).append(algo)
        settings = next(result.settings for result in comparison.results if result.env == env)
        for (first_seed, end), algos in algos_of_seeds.items():
            options = _options(settings, first_seed, end - first_seed)
            envs_of_command.setdefault((" ".join(algos), options), []).append(env)
    return [
        f"python -m sb3_scratch_dqn.bench run --algos {algos} --envs {' '.join(envs)} {options} --out results"
        for (algos, options), envs in envs_of_command.items()
    ]


def _options(settings: dict[str, Any], first_seed: int, seeds: int) -> str:
    options = [f"--first-seed {first_seed}"] if first_seed else []
    options.append(f"--seeds {seeds} -n {settings['n_timesteps']}")
    options.append(f"--evaluations {settings['n_evaluations']} --eval-episodes {settings['eval_episodes']}")
    if settings["same_settings"]:
        options.append(f"--same-settings {settings['same_settings']}")
    if settings["device"] != "cpu":
        options.append(f"--device {settings['device']}")
    if settings["gym_packages"]:
        options.append(f"--gym-packages {' '.join(settings['gym_packages'])}")
    return " ".join(options)


def _group_runs(comparison: Comparison, describe: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """Return one line for each description, with the number of runs that it applies to unless it is the only one."""
    counts: dict[str, dict[str, int]] = {}
    for result in comparison.results:
        group = counts.setdefault(describe(result.content), {})
        name = f"`{result.algo}` in {result.env}"
        group[name] = group.get(name, 0) + 1
    if len(counts) == 1:
        return list(counts)
    return [
        f"{description}: " + ", ".join(f"{count} of {name}" for name, count in counts[description].items())
        for description in sorted(counts)
    ]


def describe_setup(provenance: Mapping[str, Any]) -> str:
    """Describe package versions and hardware on one line.

    :param provenance: the entries ``versions`` and ``hardware``, as in the file of a run
    """
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    hardware = provenance["hardware"]
    gpu = f", {hardware['gpu']}" if hardware.get("gpu") else ""
    return f"{versions}; {hardware['processor']}, {hardware['cores']} processors{gpu}, {hardware['system']}"
