"""The command line of the benchmarks."""

import argparse
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch as th

from sb3_scratch_dqn.bench.machine import check_device
from sb3_scratch_dqn.bench.report.report import write_report
from sb3_scratch_dqn.bench.run.grid import BACKENDS, run_all
from sb3_scratch_dqn.bench.run.plan import make_plan
from sb3_scratch_dqn.bench.speed import learning, replay
from sb3_scratch_dqn.bench.speed.results import read_speed, save_speed
from sb3_scratch_dqn.engines import ENGINE_NAMES


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line selects.

    :param arguments: the command line; ``None`` for that of the process
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_scratch_dqn.bench", description="Compare algorithms and measure speed."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    for add in (_add_run, _add_report, _add_speed, _add_replay):
        add(commands)
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    try:
        options.execute(options)
    except ValueError as error:  # an invalid option or file, found before anything is trained or written
        options.parser.error(str(error))


# Comparison of algorithms


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="train algorithms over many seeds",
        description="Train algorithms in environments with many seeds, and write one file per run. Runs whose file "
        "exists are skipped, so the same command continues after an interruption.",
    )
    parser.set_defaults(execute=_run, parser=parser)
    parser.add_argument(
        "--algos",
        nargs="+",
        required=True,
        metavar="ALGO[:SETTINGS]",
        help="algorithms of the Zoo; after a colon, a settings file or preset as for --conf-file",
    )
    parser.add_argument("--envs", nargs="+", required=True, metavar="ENV", help="environment ids")
    parser.add_argument("--seeds", type=_positive_int, default=10, metavar="N", help="number of seeds (default: 10)")
    parser.add_argument(
        "--first-seed", type=_non_negative_int, default=0, metavar="N", help="the lowest seed (default: 0)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the files of the runs")
    parser.add_argument(
        "-n",
        "--n-timesteps",
        type=_positive_int,
        metavar="N",
        help="environment steps of every run (default: from the settings)",
    )
    parser.add_argument(
        "--evaluations",
        type=_positive_int,
        default=20,
        metavar="N",
        help="evenly spaced evaluations per run (default: 20)",
    )
    parser.add_argument(
        "--eval-episodes", type=_positive_int, default=10, metavar="N", help="episodes per evaluation (default: 10)"
    )
    parser.add_argument("--same-settings", metavar="ALGO", help="use the settings of this algorithm for all algorithms")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="training device (default: cpu)")
    parser.add_argument(
        "--gym-packages", nargs="+", default=[], metavar="MODULE", help="modules that register environments"
    )
    parser.add_argument(
        "--jobs", type=_positive_int, metavar="N", help="parallel runs (default: one per processor core)"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="loky", help="joblib backend that executes the runs (default: loky)"
    )
    parser.add_argument("--address", help="address of a Ray or Dask cluster (default: start one on this machine)")
    parser.add_argument("--retry-failed", action="store_true", help="execute failed runs again")


def _run(options: argparse.Namespace) -> None:
    _check_folder("--out", options.out)
    if options.backend == "loky":  # the machines of a cluster may have other devices
        check_device(options.device)
    plan = make_plan(
        options.algos,
        options.envs,
        options.seeds,
        options.n_timesteps,
        options.evaluations,
        options.eval_episodes,
        options.device,
        options.same_settings,
        options.gym_packages,
        options.first_seed,
    )
    try:
        results = run_all(plan, options.out, options.backend, options.address, options.jobs, options.retry_failed)
    except KeyboardInterrupt:
        print("Stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    failed = [result for result in results if not result.done]
    for result in failed:
        print(f"{result.path} failed: {result.error}", file=sys.stderr)
    print(f"{len(results) - len(failed)} of {len(results)} runs are done, in {options.out}")
    if failed:
        sys.exit(1)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="compare the results of run",
        description="Write a report on the results of run: report.md with its figures, and report.html.",
    )
    parser.set_defaults(execute=_report, parser=parser)
    parser.add_argument("results", type=Path, metavar="FOLDER", help="output folder of run")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="output folder of the report (default: FOLDER/report)"
    )
    parser.add_argument(
        "--reference",
        metavar="ALGO",
        help="algorithm that the others are compared with (default: dqn if it has results)",
    )


def _report(options: argparse.Namespace) -> None:
    _check_folder("--out", options.out or options.results / "report")
    print(write_report(options.results, options.out, options.reference))


# Measurements of speed


def _add_speed(commands: Any) -> None:
    parser = commands.add_parser(
        "speed",
        help="measure the speed of training",
        description="Measure the speed of learn() and of updates, against SB3's DQN and, if it is installed, SBX's.",
    )
    parser.set_defaults(execute=_speed, parser=parser)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"cases to measure, of {', '.join(learning.CASES)} (default: all)"
    )
    parser.add_argument("--rounds", type=_positive_int, default=5, help="measurements per contestant (default: 5)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        metavar="NAME",
        help="contestants: sb3, sbx or engines of this package (default: all)",
    )
    parser.add_argument("--n-envs", type=_positive_int, help="number of vectorised environments (default: 1)")
    parser.add_argument(
        "--train-freq", type=_positive_int, help="env.step() calls between updates (default: from the case)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="training device (default: cpu)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of results; its report then shows the speeds, too"
    )


def _speed(options: argparse.Namespace) -> None:
    _check_choices("CASE", options.cases, learning.CASES)
    _check_choices("--contestants", options.contestants or (), ["sb3", "sbx", *ENGINE_NAMES])
    check_device(options.device)
    if options.out:
        _check_folder("--out", options.out)
        read_speed(options.out)  # a broken file must be reported before anything is measured
    cases = [
        learning.CASES[name].with_options(options.n_envs, options.train_freq)
        for name in options.cases or learning.CASES
    ]
    results = learning.run(cases, options.contestants, options.rounds, options.device)
    print("\n\n".join(result.markdown() for result in results))
    if options.out:
        print(f"Saved to {save_speed(results, options.out)}", file=sys.stderr)


def _check_folder(argument: str, folder: Path) -> None:
    """Raise ValueError unless a folder can be created or written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{argument} {str(folder)!r} must be a folder, but {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{argument} {str(folder)!r} is not writable")


def _check_choices(argument: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} {name!r} must be one of {', '.join(known)}")


def _add_replay(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="measure the memory and speed of replay buffers",
        description="Measure the memory and speed of replay buffers, against SB3's and, if it is installed, cpprb's.",
    )
    parser.set_defaults(execute=_replay, parser=parser)
    parser.add_argument("--rounds", type=_positive_int, default=9, help="measurements per contestant (default: 9)")
    parser.add_argument(
        "--largest",
        type=_positive_int,
        default=10**7,
        help="transitions of the largest prioritized buffer (default: 10^7)",
    )
    parser.add_argument(
        "--images", type=_positive_int, default=4000, help="transitions of the buffers of images (default: 4000)"
    )


def _replay(options: argparse.Namespace) -> None:
    print(replay.run(options.rounds, options.largest, options.images))


def _positive_int(text: str) -> int:
    return _int_at_least(1, text)


def _non_negative_int(text: str) -> int:
    return _int_at_least(0, text)


def _int_at_least(minimum: int, text: str) -> int:
    try:
        number = float(text)  # accepts 1e5
    except ValueError:
        number = -1.0
    if number < minimum or not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {minimum}")
    return int(number)


if __name__ == "__main__":
    main()
