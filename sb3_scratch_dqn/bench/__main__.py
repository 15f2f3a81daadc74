"""The command line of the benchmarks."""

import argparse
from collections.abc import Sequence

import torch as th

from sb3_scratch_dqn.bench import replay


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
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    print(replay.run(options.rounds, options.largest, options.images))


def _positive(text: str) -> int:
    number = int(float(text))
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return number


if __name__ == "__main__":
    main()
