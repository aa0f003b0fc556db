"""How the reference model is trained: a curriculum of ``sam-export finetune``, each stage from the weights of the last.

    python benchmarks/reference_training.py --data DIR --work DIR --init FILE [--processes 2] [--stages NAME ...]

DIR of --data holds the packs bsds500, coco-subset, ecssd and sod-masks; no split for evaluation is learnt from. --init:
weights to begin with. --work keeps the runs, which go on where they stopped. Writes benchmarks/results/distill/
reference.json, an entry per stage: command, origin, seconds, and loss and mask IoU on held-out images over training.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_runs import RESULTS, ROOT
from distillation import LABELLED, curve

from edgesam_deploy.files import write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.stages.cache import tool_versions

OUTPUT = RESULTS / "reference.json"
# glibc gives large blocks back to the system and takes them again at every update; kept, a run is a tenth quicker.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


@dataclass(frozen=True, slots=True)
class Stage:
    """options: of the command, without what all stages share."""

    name: str
    about: str
    options: str


STAGES = (
    Stage(
        "ellipses-256", "the decoder alone learns boxes from ellipses, at half the size",
        "--learn decoder --image-size 256 --shapes 1 --axes 4 --prompts 64 --lr 8e-4 --final 0.2 --epochs 1.05",
    ),
    Stage(
        "ellipses-512", "the same at full size, in windows",
        "--learn decoder --shapes 1 --windows 1 --small 0.4 --prompts 96 --lr 3e-4 --final 0.3 --epochs 0.85",
    ),
    Stage(
        "masks", "the whole network learns true masks, in windows",
        "--shapes 0.1 --windows 0.8 --small 0.3 --box 0.55 --prompts 64 --lr 1.5e-4 --final 0.1 --epochs 4.2",
    ),
    Stage(
        "whole", "the same, most masks decoded in the whole embedding",
        "--shapes 0.1 --windows 0.3 --small 0.2 --box 0.55 --prompts 40 --lr 5e-5 --final 0.02 --epochs 1.05",
    ),
)  # fmt: skip
SHARED = "--batch 1 --warmup 20 --ema 0.99 --freeze-norm --held 32 --check-every 120 --threads 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    before = options.init.resolve()
    for stage in STAGES:
        if options.stages is None or stage.name in options.stages:
            entry = run(stage, before, options.work.resolve(), options.data.resolve(), options.processes)
            write(options.output, stage.name, entry)
            print(f"{stage.name}: wrote {options.output}")
        before = options.work.resolve() / stage.name / "student.pt"


def run(stage: Stage, before: Path, work: Path, data: Path, processes: int) -> dict[str, Any]:
    """Train to the end; the command as a reader would give it, and what it left. Ends this script where it fails."""
    last = stage is STAGES[-1]
    first = os.path.relpath(before, work)
    words = ["finetune", "reference", "--init", first, "-o", stage.name,
             *stage.options.split(), *SHARED.split(), *(["--half"] if last else []),
             *(part for text in LABELLED for part in ("--dataset", text.format(data=data)))]  # fmt: skip
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "edgesam_deploy", *words], check=False, cwd=work, env=environment
    )
    if done.returncode:
        sys.exit(f"{stage.name} ended with {done.returncode}")
    shown = shlex.join(["torchrun", *launcher[1:], "edgesam_deploy", *words]).replace(str(data), "DATA")
    if stage is STAGES[0]:  # from a file that lies anywhere
        shown = shown.replace(first, before.name)
    folder = work / stage.name
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {
        "about": stage.about,
        "command": shown,
        "run": {k: v for k, v in record.items() if k != "machine"},
        "log": curve(folder / "log.csv"),
        "checks": curve(folder / "checks.csv"),
    }


def write(path: Path, name: str, entry: dict[str, Any]) -> None:
    content: dict[str, Any] = {"stages": {}}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    stages = {**content["stages"], name: entry}
    ordered = {stage.name: stages[stage.name] for stage in STAGES if stage.name in stages}
    write_json(path, {"machine": machine(), "tools": tool_versions(), "stages": ordered})


if __name__ == "__main__":
    main()
