"""Resident memory and open files of a process and its children while it works, from /proc."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY_S = 0.1
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Memory:
    """10⁶ bytes. resident: all. files: of it, pages of mapped files, which the system may take back at any time."""

    resident: float
    files: float
    open_files: int


@dataclass(frozen=True, slots=True)
class Sample:
    """seconds: since the start. done: how much of the work. workers: the children, added up, so that what they share
    counts more than once."""

    seconds: float
    done: int
    main: Memory
    workers: Memory

    @property
    def resident(self) -> float:
        return self.main.resident + self.workers.resident

    @property
    def own(self) -> float:
        """Without pages of mapped files."""
        return self.resident - self.main.files - self.workers.files


def watch(process: subprocess.Popen[bytes], done: Callable[[], int], stop: int | None) -> list[Sample]:
    """Until it ends. stop: kill it once so much is done."""
    started, samples = time.monotonic(), []
    while process.poll() is None:
        reached = done()
        main, workers = memory(process.pid), [memory(child) for child in children(process.pid)]
        if main is not None:
            together = _sum([one for one in workers if one is not None])
            samples.append(Sample(time.monotonic() - started, reached, main, together))
        if stop is not None and reached >= stop:
            process.kill()
        time.sleep(EVERY_S)
    return samples


def summary(samples: Sequence[Sample], work: int) -> dict[str, Any]:
    """peak: the largest sample; steady: the median while the second half of the work is done."""
    late = [s for s in samples if 2 * s.done >= work]
    return {
        "peak_mb": max(s.resident for s in samples),
        "steady_mb": statistics.median(s.resident for s in late),
        "steady_own_mb": statistics.median(s.own for s in late),
        "workers_peak_mb": max(s.workers.resident for s in samples),
        "workers_steady_mb": statistics.median(s.workers.resident for s in late),
        "open_files": max(s.main.open_files + s.workers.open_files for s in samples),
        "samples": len(samples),
    }


def memory(pid: int) -> Memory | None:
    """None for a process that has ended."""
    try:
        status = (PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace")
        opened = sum(1 for _ in (PROC / str(pid) / "fd").iterdir())
    except OSError:
        return None
    found = dict(re.findall(r"^(VmRSS|RssFile):\s+(\d+) kB", status, re.MULTILINE))
    if not found:  # it has ended, and waits to be asked how
        return None
    resident, files = (int(found.get(name, 0)) * 1024 / 1e6 for name in ("VmRSS", "RssFile"))
    return Memory(resident, files, opened)


def children(parent: int) -> list[int]:
    """Its processes, and theirs."""
    parents: dict[int, int] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    found, last = set(), {parent}
    while last := {pid for pid, of in parents.items() if of in last}:
        found |= last
    return sorted(found)


def _sum(parts: Sequence[Memory]) -> Memory:
    return Memory(sum(p.resident for p in parts), sum(p.files for p in parts), sum(p.open_files for p in parts))
