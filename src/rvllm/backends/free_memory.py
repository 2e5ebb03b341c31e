"""Memory of the machine that this process can still take."""

from __future__ import annotations

from pathlib import Path

HUGE = 1 << 62


def free_bytes() -> int:
    """What the system has available, within this process's control group."""
    system = HUGE
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                system = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return min(system, _control_group_free())


def _control_group_free() -> int:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return HUGE
