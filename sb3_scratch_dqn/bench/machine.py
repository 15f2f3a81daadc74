"""The machine and this process: cores, memory, hardware, versions."""

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

# One thread for each library that starts threads
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}

_PACKAGES = ("sb3-scratch-dqn", "stable-baselines3", "sb3-contrib", "rl_zoo3", "torch", "gymnasium", "numpy")


@cache
def exit_with_parent(parent: int) -> None:
    """Exit this process when its parent exits, or immediately if the parent has exited already.

    :param parent: the id of the process that started this one. That process must pass its own id: after its death,
        ``os.getppid()`` returns the id of another process
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def n_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage() returns at least the memory of the parent process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor_name() -> str:
    """Return the model name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_device(device: str) -> None:
    """Raise ValueError unless this machine has a device.

    :param device: ``"cpu"`` or ``"cuda"``
    :raises ValueError: if PyTorch cannot use it
    """
    if device == "cuda" and not th.cuda.is_available():
        raise ValueError("--device cuda finds no GPU that this PyTorch can use; choose --device cpu")


def hardware(device: str) -> dict[str, Any]:
    """Return the hardware of this machine, ready for JSON.

    :param device: the training device; the GPU is only recorded for ``"cuda"``
    """
    return {
        "processor": processor_name(),
        "cores": n_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "gpu": th.cuda.get_device_name() if device == "cuda" and th.cuda.is_available() else None,
    }


def provenance(device: str) -> dict[str, Any]:
    """Return time, package versions, commit and hardware of a measurement, ready for JSON.

    :param device: the training device
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
    """Return the commit of the checkout that contains this package, or ``None`` if it is not in a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    modified = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "sb3_scratch_dqn", "hyperparams")
    return f"{commit} with changes" if commit and modified else commit or None


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
