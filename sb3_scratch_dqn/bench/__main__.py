"""The command line of the benchmarks."""

import argparse
from collections.abc import Sequence

import torch as th

from sb3_scratch_dqn.bench import replay, speed
from sb3_scratch_dqn.engines import ENGINE_NAMES


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line names.

    :param arguments: instead of those of the process
    """
    parser = argparse.ArgumentParser(prog="python -m sb3_scratch_dqn.bench", description="Benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    replay_parser = commands.add_parser(
        "replay",
        help="memory and speed of replay buffers",
        description="Memory and speed of replay, against SB3's buffers and, where it is installed, cpprb's.",
    )
    replay_parser.add_argument("--rounds", type=_positive, default=9, help="measurements of each case (default: 9)")
    replay_parser.add_argument(
        "--largest", type=_positive, default=10**7, help="transitions of the largest prioritized buffer (default: 10^7)"
    )
    replay_parser.add_argument(
        "--images", type=_positive, default=4000, help="transitions of the buffers of images (default: 4000)"
    )
    speed_parser = commands.add_parser(
        "speed",
        help="speed of training",
        description="Speed of learn() and of updates, against SB3's DQN and, where it is installed, SBX's.",
    )
    speed_parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"some of {', '.join(speed.CASES)}; default: all"
    )
    speed_parser.add_argument("--rounds", type=_positive, default=5, help="measurements of each case (default: 5)")
    speed_parser.add_argument(
        "--contestants", nargs="+", metavar="NAME", help="some of sb3, sbx and this package's engines (default: all)"
    )
    speed_parser.add_argument("--n-envs", type=_positive, help="environments in each case (default: 1)")
    speed_parser.add_argument("--train-freq", type=_positive, help="steps between updates (default: the case's own)")
    speed_parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    if options.command == "replay":
        print(replay.run(options.rounds, options.largest, options.images))
        return
    unknown = [name for name in options.cases if name not in speed.CASES]
    if unknown:
        speed_parser.error(f"CASE {unknown[0]!r} must be one of {', '.join(speed.CASES)}")
    known = ["sb3", "sbx", *ENGINE_NAMES]
    unknown = [name for name in options.contestants or () if name not in known]
    if unknown:
        speed_parser.error(f"--contestants {unknown[0]!r} must be one of {', '.join(known)}")
    chosen = [speed.CASES[name] for name in options.cases or speed.CASES]
    cases = [speed.changed(case, options.n_envs, options.train_freq) for case in chosen]
    print(speed.run(cases, options.contestants, options.rounds, options.device))


def _positive(text: str) -> int:
    number = int(float(text))
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return number


if __name__ == "__main__":
    main()
