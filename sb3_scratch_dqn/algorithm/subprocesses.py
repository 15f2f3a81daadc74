"""Detects environment processes of a ``SubprocVecEnv`` that have ended."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper

# Seconds to wait for a process to end after its pipe was closed
_EXIT_TIMEOUT = 2.0

# Errors of a pipe whose other end is closed
PIPE_ERRORS = (EOFError, BrokenPipeError, ConnectionError)


def _processes(env: VecEnv | None) -> SubprocVecEnv | None:
    """Return the ``SubprocVecEnv`` inside wrappers, ``None`` if there is none or it is closed."""
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env if isinstance(env, SubprocVecEnv) and not env.closed else None


def find_ended_process(env: VecEnv | None) -> ChildProcessError | None:
    """Return an error that describes the first environment process that has ended. Call it after ``PIPE_ERRORS``.

    :param env: the environments, with or without wrappers
    :return: the error to raise; ``None`` if all processes run, or ``env`` has none
    """
    envs = _processes(env)
    if envs is None:
        return None
    ended = wait([process.sentinel for process in envs.processes], _EXIT_TIMEOUT)
    for number, process in enumerate(envs.processes):
        if process.sentinel in ended:
            process.join()  # for its exit status
            return ChildProcessError(_message(number, process))
    return None


def _message(number: int, process: Any) -> str:
    status = f"exit status {process.exitcode}"
    if process.exitcode < 0:
        status = f"signal {-process.exitcode} ({signal.Signals(-process.exitcode).name})"
    advice = "if it raised an error, its traceback is printed above"
    if _is_forked(process):
        advice += (
            "; start_method='fork' copies locks held by threads of PyTorch, which can hang or end processes: "
            "use SubprocVecEnv(..., start_method='forkserver') or 'spawn'"
        )
    return f"env: the process of environment {number} ended with {status}; {advice}"


def _is_forked(process: Any) -> bool:
    return type(process).__name__ == "ForkProcess"


@contextmanager
def close_pipes_of_ended_processes(env: VecEnv | None) -> Iterator[None]:
    """Context in which reading from an environment process that has ended raises one of ``PIPE_ERRORS``.

    A pipe closes when every process that holds its other end has ended. Forked processes also hold the ends of their
    siblings, so SB3 would wait forever for one that has ended. A thread shuts the pipe down instead.

    :param env: the environments, with or without wrappers
    """
    envs = _processes(env)
    if envs is None or len(envs.processes) == 1 or not all(map(_is_forked, envs.processes)):
        yield
        return
    woken, wake = os.pipe()
    watcher = Thread(target=_shut_down_when_ended, args=(envs, woken), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        os.close(wake)
        watcher.join()
        os.close(woken)


def _shut_down_when_ended(envs: SubprocVecEnv, woken: int) -> None:
    remotes = {process.sentinel: remote for process, remote in zip(envs.processes, envs.remotes, strict=True)}
    waiting: list[int] = [*remotes, woken]
    while woken not in (ended := wait(waiting)):
        for sentinel in ended:
            waiting.remove(sentinel)  # type: ignore[arg-type]  # all are file descriptors
            remote = remotes[sentinel]
            if not remote.closed:
                # A duplicate of the file descriptor: shutting it down shuts down the pipe itself
                with socket.socket(fileno=os.dup(remote.fileno())) as pipe:
                    pipe.shutdown(socket.SHUT_RDWR)
