"""Memory and speed of ``sam-export distill`` at 1,000 and at 10,000 images, and what they mean for SA-1B's 11 million.

    python benchmarks/distill_scale.py --images DIR [--images DIR ...] [--student RECIPE] [--teacher reference]
        [--parts listing loading pass cached fly whole] [--updates 24]

200 of the images, evenly over all, are linked again and again under new names until there are 1,000, or 10,000: for the
process they are that many, and since image i and image i + 200 are the same, shard n and shard n + 10 of the teacher's
embeddings are, too. So the cache is computed for 200 images and its other shards are hard links to those, whose hashes
are checked and which are opened like any other.

listing: seconds and memory of finding the images, up to 100,000, and of a tar file. loading: images one core decodes
and resizes in a second, as they are and at SA-1B's size. pass: the teacher over the first 200 images of 1,000 and of
10,000, then killed. cached, fly: as many updates at 1,000 as at 10,000, from the cache and with the teacher beside.
whole: what grows with the images read, at 128 pixels and of small copies of the images, where there is time for it: the
teacher over all of them and an epoch from its cache, of which nothing is linked but the images; and an epoch with the
teacher beside. Resident memory of the process and of its loader process is read ten times a second; steady: the median
over the second half of the work. Parts run apart, each replaces its own section of
benchmarks/results/distill/scale.json; the projections are made anew whenever the sections they need are there. Work
folder: engines/.distill-scale, which cached needs from pass. On a quiet machine with two cores: listing and loading 1
minute, whole 10, each other part 2 to 3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from counts import count
from distill_projection import Pair, projections
from distill_runs import BACKBONE, RESULTS, ROOT, WEIGHTS, command, environment, origin, put, rows, shards, write_recipe
from distill_watch import Sample, summary, watch
from PIL import Image

from edgesam_deploy.distill.teacher import encoder_input
from edgesam_deploy.images import SUFFIXES, read_image
from edgesam_deploy.recipe import Recipe, load_recipe

WORK = ROOT / "engines" / ".distill-scale"
BASE, SHARD, SIZES, LISTED = 200, 20, (1_000, 10_000), (1_000, 10_000, 100_000)
SA1B_HW, SA1B_QUALITY, ENLARGED = (1500, 2250), 90, 8
# Updates that are not counted for speed: memory is taken and kernels are chosen.
WARMUP, BATCH, HELD = 4, 4, 8
# Of the part whole: pixels, and images of an update.
SMALL, WHOLE_BATCH = 128, 16
PUBLISHED = (("mobile_sam", "student_resnet18"),)


def all_images(folders: Sequence[Path]) -> list[Path]:
    found = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    if len(found) < BASE:
        sys.exit(f"expected at least {BASE} images in {', '.join(map(str, folders))}, found {len(found)}")
    return found


def chosen(folders: Sequence[Path]) -> list[Path]:
    """The images that are linked."""
    paths = all_images(folders)
    return [paths[i] for i in np.linspace(0, len(paths) - 1, BASE).round().astype(int)]


def links(folders: Sequence[Path], count: int) -> Path:
    """A folder of ``count`` links to the chosen images, in turn."""
    folder = WORK / f"images-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = [p.resolve() for p in chosen(folders)]
    for number in range(count):
        path = paths[number % BASE]
        (folder / f"{number:06d}{path.suffix.lower()}").symlink_to(path)
    return folder


def listing(options: argparse.Namespace) -> dict[str, Any]:
    roots = [links(options.images, count) for count in LISTED]
    archive = WORK / f"images-{SIZES[0]}.tar"
    with tarfile.open(archive, "w", dereference=True) as tar:
        tar.add(roots[0], "")
    found = []
    for root in (*roots, archive):
        own = [sys.executable, str(ROOT / "benchmarks" / "distill_listing.py"), str(root)]
        done = subprocess.run(own, env=environment(), capture_output=True, text=True, check=True)
        found.append({"form": "tar" if root == archive else "folder", **json.loads(done.stdout)})
    archive.unlink()
    return {"rows": found}


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """Images a core decodes in a second, and decodes and resizes for the student, as a loader process does."""
    paths, folder = chosen(options.images), WORK / "enlarged"
    folder.mkdir(parents=True, exist_ok=True)
    enlarged = [folder / f"{number}.jpg" for number in range(ENLARGED)]
    for path, source in zip(enlarged, paths[:: BASE // ENLARGED], strict=False):
        Image.fromarray(read_image(source)).resize(SA1B_HW[::-1]).save(path, quality=SA1B_QUALITY)
    recipe = load_recipe(student_recipe(options))
    as_they_are = _loaded(paths, recipe, 1)
    return {"as they are": as_they_are, "at SA-1B's size": {**_loaded(enlarged, recipe, 3), "image_hw": SA1B_HW}}


def _loaded(paths: Sequence[Path], recipe: Recipe, rounds: int) -> dict[str, Any]:
    spent = {"decoded": 0.0, "ready": 0.0}
    pixels = 0
    for path in list(paths) * rounds:
        started = time.perf_counter()
        image = read_image(path)
        decoded = time.perf_counter()
        encoder_input(image, recipe.geometry, recipe.pixels)
        spent["decoded"] += decoded - started
        spent["ready"] += time.perf_counter() - started
        pixels += image.shape[0] * image.shape[1]
    number = len(paths) * rounds
    return {"images": number, "mean_megapixels": pixels / number / 1e6,
            **{f"{what}_per_core_s": number / seconds for what, seconds in spent.items()}}  # fmt: skip


def teacher_pass(options: argparse.Namespace) -> dict[str, Any]:
    """The first 200 images of each corpus, on record shard by shard."""
    found = {}
    for size in SIZES:
        cache = WORK / f"cache-{size}"
        shutil.rmtree(cache, ignore_errors=True)
        run = [*words(options, size), "--epochs", 1, "--cache", cache, "-o", fresh("pass")]
        samples = _watched(run, partial(images_in, cache), stop=BASE)
        made = sorted(p.stat().st_mtime for p in cache.glob("shard-*.json"))[: BASE // SHARD]
        speed = SHARD * (len(made) - 1) / (made[-1] - made[0])
        found[str(size)] = {**summary(samples, BASE), "images_per_second": speed}
        for path in sorted(cache.glob("shard-*"))[2 * BASE // SHARD :]:  # begun before it was stopped
            path.unlink()
    digests = [
        [p.read_text(encoding="utf-8") for p in sorted((WORK / f"cache-{size}").glob("*-*.json"))[: BASE // SHARD]]
        for size in SIZES
    ]
    return {**compared(found), "shards_equal": digests[0] == digests[1]}


def cached(options: argparse.Namespace) -> dict[str, Any]:
    for size in SIZES:
        folder = WORK / f"cache-{size}"
        if shards(folder) < BASE // SHARD:
            sys.exit(f"{folder} holds no embeddings of the first {BASE} images: run the part pass first")
        for number in range(BASE // SHARD, size // SHARD):
            for suffix in (".npy", ".json"):
                path = folder / f"shard-{number:06d}{suffix}"
                path.unlink(missing_ok=True)
                os.link(folder / f"shard-{number % (BASE // SHARD):06d}{suffix}", path)
    return _updates(options, "cached", lambda size: ["--cache", WORK / f"cache-{size}"])


def fly(options: argparse.Namespace) -> dict[str, Any]:
    return _updates(options, "fly", lambda size: ["--on-the-fly"])


def _updates(options: argparse.Namespace, name: str, how: Callable[[int], list[object]]) -> dict[str, Any]:
    found = {}
    for size in SIZES:
        output = fresh(name)
        epochs = options.updates * BATCH / (size - HELD)
        run = [*words(options, size), *how(size), "--epochs", epochs, "--workers", 1, "-o", output]
        samples = _watched(run, partial(updates_in, output))
        log = rows(output / "log.csv")
        if len(log) != options.updates:
            sys.exit(f"{name} at {size} images ended after {len(log)} of {options.updates} updates")
        measured = [BATCH / float(row["images_per_second"]) for row in log[WARMUP:]]
        seconds = next(s.seconds for s in samples if s.done)
        found[str(size)] = {**summary(samples, options.updates), "seconds_to_first_update": seconds,
                            "images_per_second": BATCH / statistics.mean(measured),
                            "update_median_ms": 1e3 * statistics.median(measured)}  # fmt: skip
    return compared(found)


def whole(options: argparse.Namespace) -> dict[str, Any]:
    """Every image once, by the shipped reference model at another size."""
    pair = [write_recipe(WORK / f"{name}-{SMALL}.toml", SMALL, backbone)
            for name, backbone in ((BACKBONE, BACKBONE), ("teacher", None))]  # fmt: skip
    who = [pair[0], "--teacher", pair[1], "--checkpoint", WEIGHTS, "--batch", WHOLE_BATCH, "--teacher-batch",
           WHOLE_BATCH, "--epochs", 1]  # fmt: skip
    small = WORK / "small"
    small.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(chosen(options.images)):
        image = Image.fromarray(read_image(path))
        image.thumbnail((SMALL, SMALL))
        image.save(small / f"{number:03d}.jpg", quality=95)
    found: dict[str, dict[str, Any]] = {"cached": {}, "fly": {}}
    for way, size in product(found, SIZES):
        output = fresh(f"whole-{way}")
        run = [*who, *common(options, [small], size), "--workers", 1, "-o", output]
        run += ["--on-the-fly"] if way == "fly" else []
        started = time.monotonic()
        samples = _watched(run, partial(updates_in, output))
        updates = len(rows(output / "log.csv"))
        if updates != (size - HELD) // WHOLE_BATCH:
            sys.exit(f"an epoch of {size} images ended after {updates} updates")
        before = [sample.resident for sample in samples if not sample.done]
        found[way][str(size)] = {**summary(samples, updates), "before_updates_mb": max(before), "updates": updates,
                                 "seconds": time.monotonic() - started}  # fmt: skip
    return {way: compared(at, ("before_updates", "peak", "steady")) for way, at in found.items()}


def words(options: argparse.Namespace, size: int) -> list[object]:
    """What the runs of ``options``' teacher and student have in common."""
    weights = ["--checkpoint", WEIGHTS] if options.teacher == "reference" else []
    return [student_recipe(options), "--teacher", options.teacher, *weights, "--batch", BATCH,
            *common(options, options.images, size)]  # fmt: skip


def common(options: argparse.Namespace, folders: Sequence[Path], size: int) -> list[object]:
    """Nothing is saved or validated on the way, so that equal work is compared."""
    return ["--images", links(folders, size), "--held", HELD, "--threads", options.threads, "--shard-size",
            SHARD, "--log-every", 1, "--check-every", 1_000_000, "--save-every", 1_000_000,
            "--device", "cpu"]  # fmt: skip


def images_in(cache: Path) -> int:
    return SHARD * shards(cache)


def updates_in(run: Path) -> int:
    return len(rows(run / "log.csv"))


def student_recipe(options: argparse.Namespace) -> str:
    return options.student or str(write_recipe(WORK / f"{BACKBONE}-512.toml", 512, BACKBONE))


def fresh(name: str) -> Path:
    """An empty folder for a run."""
    folder = WORK / f"run-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _watched(run: Sequence[object], done: Callable[[], int], stop: int | None = None) -> list[Sample]:
    """Every moment of a run, to its end, or until it was killed with ``stop`` done."""
    story = WORK / "story"
    with story.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command(run), env=environment(), stdout=subprocess.DEVNULL, stderr=file)
        samples = watch(process, done, stop)
    if stop is None and process.returncode:
        sys.exit(f"it ended with {process.returncode}: {story.read_text(encoding='utf-8')}")
    if stop is not None and done() < stop:
        sys.exit(f"it ended before {stop} were done: {story.read_text(encoding='utf-8')}")
    return samples


def compared(found: dict[str, dict[str, Any]], names: Sequence[str] = ("peak", "steady")) -> dict[str, Any]:
    small, large = (found[str(size)] for size in SIZES)
    ratios = {name: large[f"{name}_mb"] / small[f"{name}_mb"] for name in names}
    return {"at": found, "ratio": ratios}


def pair(teacher: Recipe, student: Recipe) -> Pair:
    both = [count(recipe).encoder_macs for recipe in (teacher, student)]
    return Pair(teacher.name, student.name, both[0], both[1], teacher.geometry)


def project(options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """The pair that was measured where the teacher is a recipe, and a published one."""
    names = [] if (Path(options.teacher) / "manifest.json").is_file() else [(options.teacher, student_recipe(options))]
    pairs = [pair(load_recipe(teacher), load_recipe(student)) for teacher, student in (*names, *PUBLISHED)]
    return projections(pairs, found["loading"]["at SA-1B's size"]["ready_per_core_s"])


def epoch_seconds(options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Of the images that there are, at the speeds that were measured."""
    images = len(all_images(options.images))
    speeds = {name: found[name]["at"][str(SIZES[0])]["images_per_second"] for name in ("pass", "cached", "fly")}
    return {"images": images, **{name: images / speed for name, speed in speeds.items()}}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "listing": listing,
    "loading": loading,
    "pass": teacher_pass,
    "cached": cached,
    "fly": fly,
    "whole": whole,
}


def describe(name: str, section: dict[str, Any]) -> list[str]:
    """One part, for people."""
    if name == "listing":
        return [f"{r['images']} images found in a {r['form']}: {r['seconds']:.2f} s, {r['memory_mb']:.0f} MB"
                for r in section["rows"]]  # fmt: skip
    if name == "loading":
        return [
            f"a core loads {how}, {one['mean_megapixels']:.1f} megapixels: {one['decoded_per_core_s']:.0f} decoded, "
            f"{one['ready_per_core_s']:.0f} decoded and resized a second"
            for how, one in section.items()
        ]
    if name == "whole":
        return [
            f"every image once, {way}: {SIZES[1]} images take "
            + ", ".join(f"{ratio:.3f} ({kind})" for kind, ratio in one["ratio"].items())
            + f" of the memory of {SIZES[0]}; "
            + ", ".join(f"steady {at['steady_mb']:.0f} MB, {at['seconds']:.0f} s" for at in one["at"].values())
            for way, one in section.items()
        ]
    head = [f"{name}: {SIZES[1]} images take {section['ratio']['peak']:.3f} of the memory of {SIZES[0]} at the peak, "
            f"{section['ratio']['steady']:.3f} steadily"]  # fmt: skip
    return head + [
        f"  {size} images: peak {one['peak_mb']:.0f} MB, steady {one['steady_mb']:.0f} MB (loader "
        f"{one['workers_steady_mb']:.0f}), {one['open_files']} files open at most, "
        f"{one['images_per_second']:.2f} images/s"
        for size, one in section["at"].items()
    ]


def told(projected: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{row['images']} images, {row['teacher']} to {row['student']}, {row['device']}: teacher's pass "
        f"{row['teacher_hours']:.3g} h ({row['teacher_bound']}), an epoch {row['epoch_hours']:.3g} h "
        f"({row['epoch_bound']}), cache {row['cache_gb']:.0f} GB"
        for row in projected
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, action="append", required=True, help="a folder; may be given again")
    parser.add_argument("--student", help="a recipe; default: a small one made from the reference recipe")
    parser.add_argument("--teacher", default="reference", help="a recipe, or a bundle of one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    teacher = Path(options.teacher).name
    for name in options.parts:
        started = time.monotonic()
        section = PARTS[name](options)
        made = origin(teacher=teacher, student=load_recipe(student_recipe(options)).name, threads=options.threads,
                      batch=BATCH, images_linked=BASE, seconds=round(time.monotonic() - started, 1))  # fmt: skip
        put(options.output, name, {**section, "origin": made})
        print(*describe(name, section), f"  {made['seconds']} s", sep="\n", flush=True)
    found = json.loads(options.output.read_text(encoding="utf-8"))
    if "loading" in found:
        projected = project(options, found)
        put(options.output, "projection", projected)
        print(*told(projected["rows"]), sep="\n")
    if {"pass", "cached", "fly"} <= found.keys():
        put(options.output, "epoch_seconds", epoch_seconds(options, found))


if __name__ == "__main__":
    main()
