"""How much memory this process has taken."""

from __future__ import annotations

import resource


def peak_rss_mb() -> float:
    """The largest resident memory of this process since its start, in 10^6 bytes (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
