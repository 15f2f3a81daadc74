"""Environments in processes of their own, when one of these processes ends."""

import signal
from multiprocessing.connection import wait
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper

# Seconds that a process whose pipe is closed may take to end
_PATIENCE = 2.0

# What a pipe raises whose other end is closed
PIPE_ERRORS = (EOFError, BrokenPipeError, ConnectionError)


def death_of_environment(env: VecEnv | None) -> ChildProcessError | None:
    """Describe the first process of a ``SubprocVecEnv`` that has ended. Call it after one of ``PIPE_ERRORS``.

    :param env: the environments, with or without wrappers
    :return: an error to raise; ``None`` if all processes run, or there are none
    """
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    if not isinstance(env, SubprocVecEnv) or env.closed:
        return None
    if not wait([process.sentinel for process in env.processes], _PATIENCE):
        return None
    number, process = next((number, one) for number, one in enumerate(env.processes) if not one.is_alive())
    return ChildProcessError(_message(number, process))


def _message(number: int, process: Any) -> str:
    status = f"exit status {process.exitcode}"
    if process.exitcode < 0:
        status = f"signal {-process.exitcode} ({signal.Signals(-process.exitcode).name})"
    advice = "where it raised an error, it printed that above"
    if type(process).__name__ == "ForkProcess":
        advice += (
            "; start_method='fork' copies locks that threads of PyTorch may hold, so that processes hang or end: "
            "use SubprocVecEnv(..., start_method='forkserver') or 'spawn'"
        )
    return f"env: the process of environment {number} ended with {status}; {advice}"
