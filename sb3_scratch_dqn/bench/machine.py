"""What a machine is, and what a process took of it."""

import os
import platform
import resource
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch as th

# One thread for each library that has threads of its own
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}

_PACKAGES = ("sb3-scratch-dqn", "stable-baselines3", "sb3-contrib", "rl_zoo3", "torch", "gymnasium", "numpy")


@cache
def end_with(parent: int) -> None:
    """Let this process end when its parent has ended, and at once if that is so already.

    :param parent: the id of the process that started this one. That process must pass it in: after its death,
        ``os.getppid()`` gives the id of another one
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def n_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory that this process had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage() says is at least what the parent had
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """What the processor calls itself."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_device(device: str) -> None:
    """See whether this machine has a device.

    :param device: ``"cpu"`` or ``"cuda"``
    :raises ValueError: if it has not
    """
    if device == "cuda" and not th.cuda.is_available():
        raise ValueError("--device cuda finds no GPU that this PyTorch can use; choose --device cpu")


def hardware(device: str) -> dict[str, Any]:
    """What this machine is, ready for JSON.

    :param device: where something is trained
    """
    return {
        "processor": processor(),
        "cores": n_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "gpu": th.cuda.get_device_name() if device == "cuda" and th.cuda.is_available() else None,
    }


def origin(device: str) -> dict[str, Any]:
    """When, where and with what something is measured, ready for JSON.

    :param device: where something is trained
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "commit": _commit(),
        "hardware": hardware(device),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this package lies in; ``None`` if it lies in none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "sb3_scratch_dqn", "hyperparams")
    return f"{commit} with changes" if commit and changed else commit or None


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
