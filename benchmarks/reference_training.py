"""How the reference model is trained: a curriculum of ``sam-export``, each stage from the weights of the last.

    python benchmarks/reference_training.py --data DIR --work DIR --init FILE --backbone FILE [--stages NAME ...]

DIR of --data holds the packs bsds500, coco-subset, ecssd, imagenet-sample and sod-masks; no split for evaluation is
learnt from. --init: weights to begin with, of the network ``teacher.toml`` that is written to --work; --backbone: see
``reference_start.py``. --work keeps the runs; a stage that is finished there is taken as it is. Writes benchmarks/
results/distill/reference.json, an entry per stage: command, origin, seconds, loss and mask IoU over training.
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

from distill_runs import RESULTS, ROOT, write_recipe
from distillation import IMAGES, LABELLED, SIZE, curve, link_images

from edgesam_deploy.files import write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.stages.cache import tool_versions

OUTPUT = RESULTS / "reference.json"
# glibc gives large blocks back to the system and takes them again at every update; kept, a run is a tenth quicker.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


START = "start.pt"
OFTEN = (*LABELLED[:5], *LABELLED[3:5], *LABELLED[3:])  # bsds500 three times
TEACHER = "teacher"  # the network of the stages before the backbone that knows ImageNet


@dataclass(frozen=True, slots=True)
class Stage:
    """options: of the command, without what all stages share. recipe: of the network that learns."""

    name: str
    about: str
    options: str
    recipe: str = "reference"
    command: str = "finetune"
    datasets: tuple[str, ...] = LABELLED


STAGES = (
    Stage(
        "ellipses-256", "the decoder alone learns boxes from ellipses, at half the size",
        "--learn decoder --image-size 256 --shapes 1 --axes 4 --prompts 64 --lr 8e-4 --warmup 20 --final 0.2 "
        "--epochs 1.05 --ema 0.99", TEACHER,
    ),
    Stage(
        "ellipses-512", "the same at full size, in windows",
        "--learn decoder --shapes 1 --windows 1 --small 0.4 --prompts 96 --lr 3e-4 --warmup 20 --final 0.3 "
        "--epochs 0.85 --ema 0.99", TEACHER,
    ),
    Stage(
        "decoder", "the decoder alone learns true masks, in windows",
        "--learn decoder --shapes 0.2 --windows 0.9 --small 0.4 --box 0.5 --prompts 64 --lr 2.5e-4 --warmup 20 "
        "--final 0.05 --epochs 1.5 --ema 0.99", TEACHER,
    ),
    Stage(
        "embeddings", "a new encoder, whose backbone knows ImageNet, learns the embeddings of the one so far",
        "--on-the-fly --views 0.5 --loss mse --prompts 16 --lr 1e-3 --warmup 20 --final 0.05 --epochs 1 --ema 0.98",
        command="distill",
    ),
    Stage(
        "masks", "the whole network learns true masks, boxes in windows",
        "--shapes 0.1 --windows 0.8 --small 0.3 --box 0.55 --prompts 44 --lr 2e-4 --warmup 20 --final 0.03 "
        "--epochs 3.3 --ema 0.99",
    ),
    Stage(
        "regions", "the same, bsds500 twice, more small boxes and ellipses",
        "--shapes 0.2 --windows 0.95 --small 0.5 --box 0.75 --prompts 36 --lr 1.7e-4 --warmup 10 --final 0.03 "
        "--epochs 2.2 --ema 0.99", datasets=(*LABELLED[:5], *LABELLED[3:]),
    ),
    Stage(
        "boxes", "the decoder alone learns where a small box lies, as a caller enlarges its mask",
        "--learn decoder --shapes 0.7 --windows 1 --small 1 --box 0.85 --exact 0.9 --prompts 96 --lr 3e-4 --warmup 10 "
        "--final 0.2 --epochs 3 --ema 0.99",
    ),
    Stage(
        "together", "the whole network again, bsds500 three times",
        "--shapes 0.35 --windows 0.97 --small 0.8 --box 0.55 --exact 0.85 --prompts 56 --lr 1.6e-4 --warmup 10 "
        "--final 0.03 --epochs 2.4 --ema 0.99", datasets=OFTEN,
    ),
    Stage(
        "last", "the decoder alone again, true masks of all sizes and ellipses: the stage before forgets places",
        "--learn decoder --shapes 0.4 --windows 0.97 --small 0.85 --box 0.65 --exact 0.9 --prompts 80 --lr 2.5e-4 "
        "--warmup 10 --final 0.03 --epochs 1.5 --ema 0.99", datasets=OFTEN,
    ),
)  # fmt: skip
SHARED = "--freeze-norm --threads 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--amp", choices=["off", "bf16"], default="off", help="bf16: for a CPU that multiplies in it")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work, data = options.work.resolve(), options.data.resolve()
    write_recipe(work / f"{TEACHER}.toml", SIZE, "hgnetv2_b0")
    link_images(work, data)
    before = options.init.resolve()
    for stage in STAGES:
        if options.stages is None or stage.name in options.stages:
            if stage.command == "distill":
                start(options.backbone, before, work / START)
            entry = run(stage, before, work, data, options)
            write(options.output, stage.name, entry)
            print(f"{stage.name}: wrote {options.output}")
        before = work / stage.name / "student.pt"


def start(backbone: Path, before: Path, output: Path) -> None:
    words = ["--backbone", str(backbone), "--decoder", str(before), "--output", str(output)]
    if not output.is_file():
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "reference_start.py"), *words], check=True)


def command(stage: Stage, before: Path, work: Path, data: Path, amp: str) -> list[str]:
    """The words of sam-export, given in the folder ``work``."""
    recipe = f"{TEACHER}.toml" if stage.recipe == TEACHER else stage.recipe
    first = os.path.relpath(before, work)
    words = [stage.command, recipe, "-o", stage.name, *stage.options.split(), *SHARED.split(), "--amp", amp]
    if stage.command == "distill":
        words += ["--teacher", f"{TEACHER}.toml", "--checkpoint", first, "--init", START, "--batch", "2",
                  "--teacher-batch", "2", "--held", "16", "--check-every", "150", "--images", IMAGES]  # fmt: skip
        return words
    words += ["--init", first, "--batch", "1", "--held", "32", "--check-every", "120"]
    words += ["--half"] * (stage is STAGES[-1])
    return words + [part for text in stage.datasets for part in ("--dataset", text.format(data=data))]


def run(stage: Stage, before: Path, work: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train to the end, unless that was done before; the command as a reader would give it, and what it left. Ends this
    script where it fails."""
    words = command(stage, before, work, data, options.amp)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes), "-m"]
    folder = work / stage.name
    if not (folder / "run.json").is_file():
        environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "edgesam_deploy", *words], check=False, cwd=work, env=environment
        )
        if done.returncode:
            sys.exit(f"{stage.name} ended with {done.returncode}")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    shown = shlex.join(["torchrun", *launcher[1:], "edgesam_deploy", *words]).replace(str(data), "DATA")
    return {
        "about": stage.about,
        "command": shown.replace(os.path.relpath(before, work), before.name) if stage is STAGES[0] else shown,
        "run": {k: v for k, v in record.items() if k != "machine"},
        "log": curve(folder / "log.csv"),
        "checks": curve(folder / "checks.csv"),
    }


def write(path: Path, name: str, entry: dict[str, Any]) -> None:
    content: dict[str, Any] = {"stages": {}}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    stages = {**content["stages"], name: entry}
    write_json(path, {"machine": machine(), "cores": os.cpu_count(), "tools": tool_versions(), "stages": stages})


if __name__ == "__main__":
    main()
