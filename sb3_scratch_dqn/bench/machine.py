"""What a machine is, and what a process took of it."""

import os
import platform
import resource
import sys
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


def n_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """What the processor calls itself."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(device: str) -> dict[str, Any]:
    """What this machine is, ready for JSON.

    :param device: where something is trained
    """
    return {
        "processor": processor(),
        "cores": n_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "gpu": th.cuda.get_device_name() if device == "cuda" else None,
    }
