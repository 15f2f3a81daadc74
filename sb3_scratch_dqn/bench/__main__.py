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
    """Run the benchmark that the command line names.

    :param arguments: instead of those of the process
    """
    parser = argparse.ArgumentParser(prog="python -m sb3_scratch_dqn.bench", description="Benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    for add in (_add_run, _add_report, _add_speed, _add_replay):
        add(commands)
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    try:
        options.execute(options)
    except ValueError as error:  # what cannot be is refused with one, before anything is trained or written
        options.parser.error(str(error))


# Side by side


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="train algorithms side by side",
        description="Train algorithms in environments, with many seeds, and leave a file of each run. "
        "Runs that are there already are not made again, so it can be stopped and started again.",
    )
    parser.set_defaults(execute=_run, parser=parser)
    parser.add_argument(
        "--algos",
        nargs="+",
        required=True,
        metavar="ALGO[:SETTINGS]",
        help="names of the Zoo, and behind a colon a settings file or preset, as --conf-file takes it",
    )
    parser.add_argument("--envs", nargs="+", required=True, metavar="ENV", help="names of environments")
    parser.add_argument("--seeds", type=_positive, default=10, metavar="N", help="how many seeds (default: 10)")
    parser.add_argument(
        "--first-seed", type=_whole, default=0, metavar="N", help="the lowest of these seeds (default: 0)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files of the runs go")
    parser.add_argument(
        "-n", "--n-timesteps", type=_positive, metavar="N", help="steps of every run (default: what its settings say)"
    )
    parser.add_argument(
        "--evaluations", type=_positive, default=20, metavar="N", help="of every run, evenly spaced (default: 20)"
    )
    parser.add_argument("--eval-episodes", type=_positive, default=10, metavar="N", help="of each (default: 10)")
    parser.add_argument("--same-settings", metavar="ALGO", help="all get the settings of this algorithm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument(
        "--gym-packages", nargs="+", default=[], metavar="MODULE", help="modules that register environments"
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs at a time (default: one a processor)")
    parser.add_argument("--backend", choices=BACKENDS, default="loky", help="what runs them (default: loky)")
    parser.add_argument("--address", help="of a cluster of Ray or Dask (default: one is made on this machine)")
    parser.add_argument("--retry-failed", action="store_true", help="make those runs again that failed")


def _run(options: argparse.Namespace) -> None:
    _check_folder("--out", options.out)
    if options.backend == "loky":  # a cluster may have what this machine has not
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
        print("Stopped; the same command goes on where this one was", file=sys.stderr)
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
        help="compare what run left",
        description="Write a report on the files that run left: report.md with its figures, and report.html.",
    )
    parser.set_defaults(execute=_report, parser=parser)
    parser.add_argument("results", type=Path, metavar="FOLDER", help="the folder that run wrote to")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the report (default: FOLDER/report)")
    parser.add_argument(
        "--reference", metavar="ALGO", help="what the others are compared with (default: dqn, if it is there)"
    )


def _report(options: argparse.Namespace) -> None:
    _check_folder("--out", options.out or options.results / "report")
    print(write_report(options.results, options.out, options.reference))


# Measurements


def _add_speed(commands: Any) -> None:
    parser = commands.add_parser(
        "speed",
        help="speed of training",
        description="Speed of learn() and of updates, against SB3's DQN and, where it is installed, SBX's.",
    )
    parser.set_defaults(execute=_speed, parser=parser)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(learning.CASES)}; default: all")
    parser.add_argument("--rounds", type=_positive, default=5, help="measurements of each case (default: 5)")
    parser.add_argument(
        "--contestants", nargs="+", metavar="NAME", help="some of sb3, sbx and this package's engines (default: all)"
    )
    parser.add_argument("--n-envs", type=_positive, help="environments in each case (default: 1)")
    parser.add_argument("--train-freq", type=_positive, help="steps between updates (default: the case's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a folder of results, whose report is to have the figures too"
    )


def _speed(options: argparse.Namespace) -> None:
    _check_choices("CASE", options.cases, learning.CASES)
    _check_choices("--contestants", options.contestants or (), ["sb3", "sbx", *ENGINE_NAMES])
    check_device(options.device)
    if options.out:
        _check_folder("--out", options.out)
        read_speed(options.out)  # a broken file is to be known of before anything is measured
    chosen = [learning.CASES[name] for name in options.cases or learning.CASES]
    cases = [learning.changed(case, options.n_envs, options.train_freq) for case in chosen]
    measured = learning.run(cases, options.contestants, options.rounds, options.device)
    print("\n\n".join(one.markdown() for one in measured))
    if options.out:
        print(f"Kept in {save_speed(measured, options.out)}", file=sys.stderr)


def _check_folder(argument: str, folder: Path) -> None:
    """Refuse what cannot be written to, before anything is measured."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise ValueError(f"{argument} {str(folder)!r} must be a folder, but {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{argument} {str(folder)!r} cannot be written to")


def _check_choices(argument: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} {name!r} must be one of {', '.join(known)}")


def _add_replay(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="memory and speed of replay buffers",
        description="Memory and speed of replay, against SB3's buffers and, where it is installed, cpprb's.",
    )
    parser.set_defaults(execute=_replay, parser=parser)
    parser.add_argument("--rounds", type=_positive, default=9, help="measurements of each case (default: 9)")
    parser.add_argument(
        "--largest", type=_positive, default=10**7, help="transitions of the largest prioritized buffer (default: 10^7)"
    )
    parser.add_argument(
        "--images", type=_positive, default=4000, help="transitions of the buffers of images (default: 4000)"
    )


def _replay(options: argparse.Namespace) -> None:
    print(replay.run(options.rounds, options.largest, options.images))


def _positive(text: str) -> int:
    return _whole(text, minimum=1)


def _whole(text: str, minimum: int = 0) -> int:
    try:
        number = float(text)  # 1e5 is one too
    except ValueError:
        number = -1.0
    if number < minimum or not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {minimum}")
    return int(number)


if __name__ == "__main__":
    main()
