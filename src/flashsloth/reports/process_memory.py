"""Memory that this process holds, in bytes."""

import sys
from pathlib import Path


def resident_bytes() -> int:
    """Memory that this process holds now (Linux), or has held at most (elsewhere)."""
    status = _status("VmRSS")
    return peak_resident_bytes() if status is None else status


def peak_resident_bytes() -> int:
    """The most memory this process has held."""
    # getrusage would also count what a parent held before it started this process
    status = _status("VmHWM")
    if status is not None:
        return status
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_resident_bytes() -> None:
    """Begin to look for the peak anew, where the system allows it: importing and building took memory too."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def _status(key: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
