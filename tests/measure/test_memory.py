"""Peak memory is this process's own."""

from __future__ import annotations

import subprocess
import sys

from edgesam_deploy.measure.memory import peak_rss_mb


def test_a_process_does_not_inherit_its_parents_peak() -> None:
    held = bytearray(400_000_000)
    held[::4096] = b"x" * len(range(0, len(held), 4096))
    assert peak_rss_mb() > 400
    code = "from edgesam_deploy.measure.memory import peak_rss_mb; print(peak_rss_mb())"
    # preexec_fn makes it a fork of this very process, as another way to start one may be.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=int)
    assert 5 < float(done.stdout) < 200
