"""Peak memory of a process."""

import resource
from pathlib import Path


def high_water_mark(restart: bool = False) -> int:
    """Peak resident memory of this process in bytes; `restart` first resets the peak (Linux only)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Not ru_maxrss, because a child process inherits its parent's peak.
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
