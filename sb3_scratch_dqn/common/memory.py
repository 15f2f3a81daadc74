"""How much memory there is."""

import pathlib

import psutil

# Where Linux says what a container may use, what it uses, and how much of that is copies of files that it can let go:
# control groups of version 2, then of version 1
_CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_memory() -> int:
    """Bytes that this process may still take without the machine, or the container, running out of memory."""
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file, details_file, reclaimable_name in _CONTAINER_FILES:
        try:
            limit = int(pathlib.Path(limit_file).read_text())
            used = int(pathlib.Path(usage_file).read_text())
            details = dict(line.split() for line in pathlib.Path(details_file).read_text().splitlines())
            reclaimable = int(details.get(reclaimable_name, 0))
        except (OSError, ValueError):  # no container, or one without a limit
            continue
        available = min(available, max(limit - used + reclaimable, 0))
    return available
