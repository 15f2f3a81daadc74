"""Environments in processes of their own, when one of these processes ends."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper

# Seconds that a process whose pipe is closed may take to end
_PATIENCE = 2.0

# What a pipe raises whose other end is closed
PIPE_ERRORS = (EOFError, BrokenPipeError, ConnectionError)


def _processes(env: VecEnv | None) -> SubprocVecEnv | None:
    """The environments in processes of their own, inside wrappers."""
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env if isinstance(env, SubprocVecEnv) and not env.closed else None


def find_dead_environment(env: VecEnv | None) -> ChildProcessError | None:
    """Describe the first process of a ``SubprocVecEnv`` that has ended. Call it after one of ``PIPE_ERRORS``.

    :param env: the environments, with or without wrappers
    :return: an error to raise; ``None`` if all processes run, or there are none
    """
    envs = _processes(env)
    if envs is None:
        return None
    ended = wait([process.sentinel for process in envs.processes], _PATIENCE)
    for number, process in enumerate(envs.processes):
        if process.sentinel in ended:
            process.join()  # for its exit status
            return ChildProcessError(_message(number, process))
    return None


def _message(number: int, process: Any) -> str:
    status = f"exit status {process.exitcode}"
    if process.exitcode < 0:
        status = f"signal {-process.exitcode} ({signal.Signals(-process.exitcode).name})"
    advice = "where it raised an error, it printed that above"
    if _is_forked(process):
        advice += (
            "; start_method='fork' copies locks that threads of PyTorch may hold, so that processes hang or end: "
            "use SubprocVecEnv(..., start_method='forkserver') or 'spawn'"
        )
    return f"env: the process of environment {number} ended with {status}; {advice}"


def _is_forked(process: Any) -> bool:
    return type(process).__name__ == "ForkProcess"


@contextmanager
def unblock_on_death(env: VecEnv | None) -> Iterator[None]:
    """Let this process not wait for an answer of an environment whose process has ended.

    A pipe closes when all processes that have its other end have ended. A forked process has those of its siblings too,
    so that SB3 would wait forever for one that ended. Here the pipe is shut down then, and waiting for it raises one of
    ``PIPE_ERRORS``.

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
            waiting.remove(sentinel)  # type: ignore[arg-type]  # all are numbers of files
            remote = remotes[sentinel]
            if not remote.closed:
                # A copy of the number, for a moment: its pipe is the same
                with socket.socket(fileno=os.dup(remote.fileno())) as pipe:
                    pipe.shutdown(socket.SHUT_RDWR)
