"""What the benchmarks measure besides time."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["peak_bytes"]


def peak_bytes() -> int:
    """The most memory that this process has held so far, in bytes."""
    try:
        # Not ru_maxrss, which on Linux a new process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
    except OSError:  # macOS, where it is in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
