"""What a server takes in memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def peak_bytes(pid: int) -> int:
    """Return the largest resident memory so far of a process and of all in its session, summed.

    Memory that processes share counts for each of them.
    """
    return sum(_status(process, "VmHWM") for process in _session(pid))


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and of all in its session, summed."""
    return sum(_status(process, "VmRSS") for process in _session(pid))


def _session(pid: int) -> list[Path]:
    """The /proc folders of the processes in the session that `pid` leads."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # It may end while it is looked at.
        with suppress(OSError):
            # Fields after the name, which may hold spaces: state, parent, group, session.
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid:
                found.append(process)
    return found


def _status(process: Path, key: str) -> int:
    with suppress(OSError):
        for line in (process / "status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0
