"""Small distillations for the scripts that prove and measure them: recipes made from the reference model's, the command
line, and what a run leaves behind.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.recipe import PACKAGE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "distill"
PHOTOS = PACKAGE / "assets" / "photos"
WEIGHTS = PACKAGE / "assets" / "reference.pt"
REFERENCE = ROOT / "export" / "reference.toml"
BACKBONE = "mobilenetv4_conv_small"


def write_recipe(path: Path, size: int, backbone: str | None = None) -> Path:
    """The reference recipe at another size, with another backbone if one is given; named as the file."""
    text = REFERENCE.read_text(encoding="utf-8")
    values = {"image_size": size, "prompt_size": size, "embedding_size": size // 16, "name": path.stem}
    for name, value in {**values, **({"backbone": backbone} if backbone else {})}.items():
        before = next(line for line in text.splitlines() if line.startswith(f"{name} ="))
        text = text.replace(before, f"{name} = {json.dumps(value)}")
    if backbone:  # its layers have other names than those that the reference's INT8 rules speak of
        text = "\n\n".join(part for part in text.split("\n\n") if "[precision.int8]" not in part)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def command(words: Sequence[object], processes: int = 1) -> list[str]:
    """``sam-export distill`` with these words, started ``processes`` times by torchrun if that is more than one."""
    launcher = ["-m", "edgesam_deploy"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *launcher]
    return [sys.executable, *launcher, "distill", *map(str, words)]


def environment() -> dict[str, str]:
    """This one's, in which the package is the one beside this script."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def finish(words: Sequence[object], processes: int = 1) -> str:
    """Run to the end; what it said. Ends this script with it if it fails."""
    done = subprocess.run(command(words, processes), env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command(words, processes))} ended with {done.returncode}:\n{done.stderr}")
    return done.stderr


def rows(path: Path) -> list[dict[str, str]]:
    """Whole lines of a run's log; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(value is not None for value in row.values())]


def shards(cache: Path) -> int:
    """How many are finished."""
    return len(list(cache.glob("shard-*.json")))


def origin(**more: Any) -> dict[str, Any]:
    return {
        "machine": machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "teacher_weights_sha256": sha256_file(WEIGHTS),
        **more,
    }


def put(path: Path, name: str, section: dict[str, Any]) -> None:
    """Replace one section of a result file; others stay."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**found, name: section})
