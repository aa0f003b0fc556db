"""What trainings give: each experiment is a few commands of sam-export, its curve, and its masks on evaluation images.

    python benchmarks/distillation.py --data DIR --work DIR [--earlier] [--experiments NAME ...] [--threads 2]
        [--amp bf16]

DIR of --data holds the packs that the README's reference model was trained on (bsds500, coco-subset, ecssd, sod-masks,
imagenet-sample); --work keeps the runs, which go on where they stopped. Writes benchmarks/results/distill/
experiments.json, an entry per experiment: commands, origin, seconds, loss and agreement over training, and `sam-export
eval` on coco-subset/val: mIoU with the true mask, and agreement with the teacher's masks for the same prompts; entries
of another teacher are given up. No evaluation split is learnt from, and of imagenet-sample only the three quarters that
are not for calibration. --earlier: the teacher is not the reference model but one that was shipped before, with an
HGNetV2-B0 encoder, whose weights the tests keep; it has another folder for --work, and earlier-experiments.json.
Several of these scripts may run at a time, with different experiments.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counts import count
from distill_runs import RESULTS, WEIGHTS, write_recipe

from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.recipe import load_recipe
from edgesam_deploy.stages.cache import tool_versions

ROOT = Path(__file__).resolve().parent.parent
# Pixels, the teacher's.
SIZE = 512
# Points of a curve that are kept.
POINTS = 60
# Photographs alone: folders of packs have label maps beside them.
IMAGES = "photographs"
PACKS = ("coco-subset/images/train2017", "bsds500/train", "bsds500/val", "ecssd/train")
LABELLED = ("coco:{data}/coco-subset/instances_train.json", "coco:{data}/coco-subset/instances_train.json",
            "coco:{data}/coco-subset/stuff_train.json", "labels:{data}/bsds500/train", "labels:{data}/bsds500/val",
            "masks:{data}/ecssd/train", "masks:{data}/sod-masks/train@{data}/bsds500/train")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Teacher:
    """recipe: a name, or a file in the folder of the runs; weights: there, too, or None for the recipe's own; source:
    what they are a copy of."""

    name: str
    recipe: str
    source: Path
    output: Path
    weights: str | None = None
    backbone: str | None = None

    def given(self, option: str, weights: str) -> list[str]:
        """Words of a command: which teacher, by ``option``, and its weights, by ``weights``."""
        return [*([option] if option else []), self.recipe, *([weights, self.weights] if self.weights else [])]

    def put(self, work: Path) -> None:
        """Its recipe and its weights, where they are files."""
        if self.backbone is not None and self.weights is not None and not (work / self.weights).is_file():
            write_recipe(work / self.recipe, SIZE, self.backbone)
            shutil.copyfile(self.source, work / self.weights)


SHIPPED = Teacher("reference", "reference", WEIGHTS, RESULTS / "experiments.json")
EARLIER = Teacher("earlier", "earlier.toml", ROOT / "tests" / "data" / "tiny.pt", RESULTS / "earlier-experiments.json",
                  "earlier.pt", "hgnetv2_b0")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Experiment:
    """pruned: the share of the teacher that the student lacks; backbone: of a student of its own; init: "pruned"
    weights, the name of the experiment whose student it goes on from, or None for random ones; options: of the command,
    without what all runs share."""

    about: str
    command: str
    pruned: float | None = None
    backbone: str | None = None
    init: str | None = None
    options: tuple[str, ...] = field(default=())

    def recipe(self, teacher: Teacher) -> str:
        if self.pruned is not None:
            return f"pruned-{self.pruned}/{teacher.name}_pruned{round(100 * self.pruned)}.toml"
        return f"students/{self.backbone}.toml"


EXPERIMENTS: dict[str, Experiment] = {
    "quarter": Experiment(
        "a quarter of the teacher's encoder MACs, from the pruned teacher, decoupled", "distill", 0.76, None, "pruned",
        ("--epochs", "10", "--batch", "4", "--lr", "1e-3", "--warmup", "100", "--colours", "0.3", "--ema", "0.998"),
    ),
    "continued": Experiment(
        "the same student, the same way, five more epochs", "distill", 0.76, None, "quarter",
        ("--epochs", "5", "--batch", "4", "--lr", "7e-4", "--warmup", "50", "--colours", "0.15", "--ema", "0.999"),
    ),
    "decoupled": Experiment(
        "the same student from random weights, decoupled", "distill", 0.76, None, None,
        ("--epochs", "2", "--batch", "4", "--lr", "2e-3", "--warmup", "50", "--colours", "0.3", "--ema", "0.998"),
    ),
    "scratch": Experiment(
        "the same student and its decoder from random weights, on true masks alone", "finetune", 0.76, None, None,
        ("--epochs", "1.2", "--batch", "2", "--prompts", "8", "--lr", "5e-4", "--warmup", "30", "--ema", "0.99"),
    ),
    "recovery": Experiment(
        "the teacher less 30 % of its encoder's MACs, recovered by distillation", "distill", 0.3, None, "pruned",
        ("--epochs", "2", "--batch", "4", "--lr", "5e-4", "--warmup", "50", "--colours", "0.3", "--ema", "0.998"),
    ),
}  # fmt: skip
# Of one teacher, under one budget, as many families of backbones.
BACKBONES = ("mobilenetv4_conv_small", "efficientvit_b0", "tf_efficientnetv2_b0", "repvit_m1", "hgnetv2_b0")
EXPERIMENTS |= {
    backbone: Experiment(
        "a student of this backbone, from random weights, decoupled", "distill", None, backbone, None,
        ("--epochs", "1", "--batch", "4", "--lr", "2e-3", "--warmup", "30", "--colours", "0.3", "--ema", "0.995"),
    )
    for backbone in BACKBONES
}  # fmt: skip


def call(work: Path, threads: int, *words: str) -> Any:
    """A command of sam-export with --json, in ``work``. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, "-m", "edgesam_deploy", *words, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=work, env=environment)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{shlex.join(command[2:])} ended with {done.returncode}")
    return json.loads(done.stdout)


def prune(teacher: Teacher, work: Path, share: float, threads: int) -> dict[str, Any]:
    """The pruned teacher: its folder is made once. Raises RuntimeError where it is of other weights."""
    folder, weights = work / f"pruned-{share}", sha256_file(teacher.source)
    report = folder / "prune.json"
    if not report.is_file():
        found = call(
            work, threads, "prune", *teacher.given("", "--checkpoint"), "--ratio", str(share), "-o", folder.name
        )
        kept = {k: v for k, v in found.items() if k not in ("recipe", "checkpoint")}
        write_json(report, {**kept, "teacher_sha256": weights})
    content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    if content.get("teacher_sha256") != weights:
        raise RuntimeError(f"{folder} was pruned out of other weights: give another --work")
    return content


def checkpoint_before(experiment: Experiment, teacher: Teacher) -> str:
    if experiment.init == "pruned":
        return experiment.recipe(teacher).replace(".toml", ".pt")
    return f"{experiment.init}/student.pt"


def words_of(name: str, teacher: Teacher, data: Path, threads: int, amp: str) -> list[str]:
    """The command of an experiment's run, as it is recorded."""
    experiment = EXPERIMENTS[name]
    words = [experiment.command, experiment.recipe(teacher), "-o", name, *experiment.options, "--held", "32", "--half",
             "--amp", amp, "--threads", str(threads), "--log-every", "10", "--check-every", "200"]  # fmt: skip
    if experiment.init is not None:
        words += ["--init", checkpoint_before(experiment, teacher)]
    if experiment.command == "distill":
        words += [*teacher.given("--teacher", "--checkpoint"), "--cache", "cache"]
        return [*words, "--images", IMAGES]
    return words + [part for text in LABELLED for part in ("--dataset", text.format(data=data))]


def link_images(work: Path, data: Path) -> None:
    """The photographs to learn from, without the quarter of imagenet-sample that is for calibration."""
    every = sorted((data / "imagenet-sample").iterdir(), key=lambda path: path.name)
    found = [("0-imagenet", path) for number, path in enumerate(every) if number % 4]
    for number, pack in enumerate(PACKS, start=1):
        found += [(f"{number}-{pack.replace('/', '-')}", path) for path in (data / pack).glob("*.jpg")]
    for folder, path in found:
        link = work / IMAGES / folder / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path)


def evaluated(work: Path, data: Path, teacher: Teacher, student: tuple[str, str] | None) -> dict[str, list[Any]]:
    """What ``eval`` says of ground truth, and of a student's agreement with the teacher, without the calibration.

    student: recipe and checkpoint; None: of the teacher itself.
    """
    model = teacher.given("", "--checkpoint") if student is None else [student[0], "--checkpoint", student[1]]
    against = [] if student is None else teacher.given("--against", "--against-checkpoint")
    words = ["eval", *model, "--dataset", f"coco:{data}/coco-subset/instances_val.json", "--prompts", "box,click",
             "--workers", "2", "--threads", "1", *against]  # fmt: skip
    found = call(work, 1, *words)
    kinds = ("truth", "agreement")
    return {kind: [{k: v for k, v in q.items() if k != "calibration"} for q in found[kind] or ()] for kind in kinds}


def curve(path: Path) -> list[dict[str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    step = max(1, len(rows) // POINTS)
    return [row for number, row in enumerate(rows) if number % step == 0 or number == len(rows) - 1]


def run(name: str, teacher: Teacher, work: Path, data: Path, threads: int, amp: str) -> dict[str, Any]:
    experiment = EXPERIMENTS[name]
    of = experiment.recipe(teacher)
    entry: dict[str, Any] = {"about": experiment.about}
    if experiment.pruned is not None:
        entry["pruned"] = prune(teacher, work, experiment.pruned, threads)
    elif experiment.backbone is not None:
        recipe = load_recipe(str(write_recipe(work / of, SIZE, experiment.backbone)))
        entry["encoder_macs"] = count(recipe).encoder_macs
    words = words_of(name, teacher, data, threads, amp)
    call(work, threads, *words)
    entry["command"] = shlex.join(["sam-export", *words]).replace(str(data), "DATA")
    record = json.loads((work / name / "run.json").read_text(encoding="utf-8"))
    entry["run"] = {k: v for k, v in record.items() if k not in ("machine",)}
    entry["log"], entry["checks"] = curve(work / name / "log.csv"), curve(work / name / "checks.csv")
    if experiment.init is not None:
        entry["before"] = evaluated(work, data, teacher, (of, checkpoint_before(experiment, teacher)))
    entry["after"] = evaluated(work, data, teacher, (of, f"{name}/student.pt"))
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--earlier", action="store_true", help="the teacher is the reference model of before")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--amp", choices=["off", "bf16"], default="off", help="bf16: for a CPU that multiplies in it")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/distill")
    options = parser.parse_args()
    work, data = options.work.resolve(), options.data.resolve()
    teacher = EARLIER if options.earlier else SHIPPED
    output = options.output or teacher.output
    link_images(work, data)
    teacher.put(work)
    for name in options.experiments:
        entry = run(name, teacher, work, data, options.threads, options.amp)
        if "teacher" not in recorded(output, teacher):
            truth = evaluated(work, data, teacher, None)
            write_json(output, {**recorded(output, teacher), "teacher": truth})
        content = {**recorded(output, teacher), "machine": machine(), "tools": tool_versions()}
        write_json(output, {**content, "experiments": {**content["experiments"], name: entry}})
        print(f"{name}: wrote {output}", flush=True)


def recorded(path: Path, teacher: Teacher) -> dict[str, Any]:
    """What the file has of this teacher; what it has of another one does not compare, and is given up."""
    digest = sha256_file(teacher.source)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if content.get("teacher_sha256") == digest else {"experiments": {}, "teacher_sha256": digest}


if __name__ == "__main__":
    main()
