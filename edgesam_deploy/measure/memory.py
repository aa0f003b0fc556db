"""How much memory this process has taken."""

from __future__ import annotations

import re
import resource
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_rss_mb() -> float:
    """The largest resident memory of this process since its start, in 10^6 bytes.

    From the kernel's own mark where there is one: what ``getrusage`` tells also counts the process that started this
    one, up to the moment when this program took its place.
    """
    try:
        mark = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    except OSError:
        mark = None
    # Linux counts in KiB, in both places.
    peak_kib = int(mark[1]) if mark else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_kib * 1024 / 1e6
