"""Seconds and memory of finding the images of one corpus, as JSON, in a process without PyTorch (``distill_scale.py``).

python benchmarks/distill_listing.py ROOT
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.measure.memory import peak_rss_mb


def main() -> None:
    before, started = peak_rss_mb(), time.perf_counter()
    corpus = Corpus([Path(sys.argv[1])])
    seconds, peak = time.perf_counter() - started, peak_rss_mb()
    print(json.dumps({"images": len(corpus), "seconds": seconds, "memory_mb": peak - before}))


if __name__ == "__main__":
    main()
