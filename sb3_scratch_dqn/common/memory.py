"""Available memory of the machine or container."""

import pathlib

import psutil

# (limit, usage, statistics, name in the statistics of the page cache that the kernel can reclaim) of a Linux container:
# control groups of version 2, then of version 1
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_memory() -> int:
    """Return the number of bytes that can be allocated without exhausting the memory of the machine or container."""
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file, stat_file, reclaimable_name in _CGROUP_FILES:
        try:
            limit = int(pathlib.Path(limit_file).read_text())
            used = int(pathlib.Path(usage_file).read_text())
            statistics = dict(line.split() for line in pathlib.Path(stat_file).read_text().splitlines())
            reclaimable = int(statistics.get(reclaimable_name, 0))
        except (OSError, ValueError):  # not in a container, or no limit is set
            continue
        available = min(available, max(limit - used + reclaimable, 0))
    return available
