"""What ``sam-export distill`` promises, tried: a run that is killed, one in two processes, a cache that is damaged.

    python benchmarks/distill_proof.py [--parts resume processes cache] [--seed 0]

resume: a run is killed (SIGKILL) at three random moments, one in the teacher's pass and two between or within updates,
and started again with the same command: its student.pt must be that of a run that was let alone, byte for byte.
processes: two under torchrun (gloo) against one, the same images in every update and two of them at a time; losses
must agree to 1e-4. Beside them, for comparison, one process that computes all four at once: kernels round otherwise for
other batches, and training amplifies that, in one process as in two.
cache: a byte of a shard is changed; the next run must name the shard, and end with the same student.

All on photographs that come with the package; the teacher is the reference model at a smaller size, the student a
smaller network with initial weights. Each part stands alone and replaces its own section of
benchmarks/results/distill/proof.json. About four minutes on two cores. Exit code 1: a promise does not hold.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distill_runs import (
    BACKBONE,
    PHOTOS,
    RESULTS,
    WEIGHTS,
    command,
    environment,
    finish,
    origin,
    put,
    rows,
    shards,
    write_recipe,
)

from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.distill.samples import split
from edgesam_deploy.files import sha256_file

HELD, SHARD, SAVE_EVERY, PATIENCE_S = 4, 3, 2.5, 600
ALLOWED = 1e-4
GOING_ON, NEW = re.compile(r"going on at update (\d+) of"), re.compile(r"(\d+) of them new")


@dataclass(frozen=True, slots=True)
class Kill:
    """When a run is killed: ``delay_s`` after ``count`` shards, or updates, are on record."""

    during: str
    count: int
    delay_s: float


def words(folder: Path, size: int, updates: int, batch: int) -> list[object]:
    """A run of so many updates, without its output folder."""
    teacher = write_recipe(folder / "teacher.toml", size)
    student = write_recipe(folder / "student.toml", size, BACKBONE)
    train, _ = split(len(Corpus([PHOTOS])), HELD)
    return [student, "--teacher", teacher, "--checkpoint", WEIGHTS, "--images", PHOTOS, "--held", HELD, "--warmup", 5,
            "--epochs", updates * batch / len(train), "--log-every", 1, "--check-every", 10_000,
            "--shard-size", SHARD, "--teacher-batch", SHARD, "--device", "cpu"]  # fmt: skip


def plan(rng: np.random.Generator, shards: int, updates: int, shard_s: float, update_s: float) -> list[Kill]:
    """One kill in the teacher's pass and one in each half of the updates, none of them on the last."""
    half = updates // 2
    aims = [("teacher pass", 1, shards - 1, shard_s), ("updates", 1, half, update_s),
            ("updates", half, updates - 2, update_s)]  # fmt: skip
    return [Kill(what, int(rng.integers(low, high)), float(rng.uniform(0, each))) for what, low, high, each in aims]


def kill_at(run: list[object], kill: Kill, reached: Callable[[], int], story: Path) -> int:
    """Start it, and kill it at its moment; how many shards or updates were on record by then."""
    with story.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command(run), env=environment(), stdout=subprocess.DEVNULL, stderr=file)
        deadline = time.monotonic() + PATIENCE_S
        while reached() < kill.count:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                sys.exit(f"it ended, or hung, before it could be killed in its {kill.during}: {story.read_text()}")
            time.sleep(0.002)
        time.sleep(kill.delay_s)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            sys.exit("it was at its end before it could be killed: more --updates are needed")
    return reached()


def resume(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    same = [*words(folder, options.size, options.updates, 2), "--batch", 2, "--colours", 0.5, "--threads", 1]
    whole, again = folder / "whole", folder / "again"
    finish([*same, "-o", whole])
    steps, made = rows(whole / "log.csv"), sorted(p.stat().st_mtime for p in (whole / "cache").glob("shard-*.json"))
    update_s = float(steps[-1]["seconds"]) / len(steps)
    shard_s = (made[-1] - made[0]) / (len(made) - 1)
    # Rarer than updates, so that a kill loses some, which have to be made again.
    same += ["--save-every", SAVE_EVERY * update_s]
    kills, stories = [], []
    for number, kill in enumerate(plan(np.random.default_rng(options.seed), len(made), len(steps), shard_s, update_s)):
        story = folder / f"story-{number}"
        in_pass = kill.during == "teacher pass"
        reached = (lambda: shards(again / "cache")) if in_pass else (lambda: last_update(again))
        found = kill_at([*same, "-o", again], kill, reached, story)
        stories.append(story.read_text(encoding="utf-8"))
        kills.append({"during": kill.during, "on_record": found, "of": len(made) if in_pass else len(steps),
                      "delay_ms": round(1e3 * kill.delay_s, 1)})  # fmt: skip
    stories.append(finish([*same, "-o", again]))
    for entry, after in zip(kills, stories[1:], strict=True):
        entry["went_on_at_update"] = told(GOING_ON, after)
        entry["shards_made_then"] = told(NEW, after)
    digests = [sha256_file(path / "student.pt") for path in (whole, again)]
    logs = [[{k: r[k] for k in ("step", "loss", "cosine", "rate", "grad_norm")} for r in rows(p / "log.csv")]
            for p in (whole, again)]  # fmt: skip
    return {
        "updates": len(steps),
        "shards": len(made),
        "kills": kills,
        "student_sha256": {"let alone": digests[0], "killed": digests[1]},
        "logs_equal": logs[0] == logs[1],
        "holds": digests[0] == digests[1] and logs[0] == logs[1],
    }


def told(pattern: re.Pattern[str], story: str) -> int:
    """The number in what a run said; 0 where it said nothing of the kind."""
    found = pattern.search(story)
    return int(found[1]) if found else 0


def last_update(run: Path) -> int:
    found = rows(run / "log.csv")
    return int(found[-1]["step"]) if found else 0


def processes(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    same = [*words(folder, options.size, 50, 4), "--optimizer", "sgd", "--freeze-norm", "--lr", 0.005, "--threads", 1,
            "--cache", folder / "cache"]  # fmt: skip
    ways: dict[str, tuple[list[object], int]] = {
        "two processes": (["--batch", 2], 2),
        "one process, 2 images at a time": (["--batch", 2, "--accumulate", 2], 1),
        "one process, 4 images at once": (["--batch", 4], 1),
    }
    losses, digests = {}, {}
    for number, (name, (batches, count)) in enumerate(ways.items()):
        finish([*same, *batches, "-o", folder / str(number)], count)
        losses[name] = [float(r["loss"]) for r in rows(folder / str(number) / "log.csv")]
        digests[name] = sha256_file(folder / str(number) / "student.pt")
    two, apart, at_once = losses.values()
    differences = {"2 at a time": difference(two, apart), "4 at once": difference(two, at_once)}
    return {
        "updates": len(two),
        "images_per_update": 4,
        "loss_first": two[0],
        "loss_last": two[-1],
        "allowed": ALLOWED,
        "differences": differences,
        "losses": losses,
        "student_sha256": digests,
        "holds": len(two) == len(apart) == len(at_once) == 50 and differences["2 at a time"]["largest"] <= ALLOWED,
    }


def difference(one: list[float], other: list[float]) -> dict[str, float | int]:
    """Of the losses of two runs. agreed: updates from the first on whose losses are within ALLOWED."""
    found = [abs(a - b) for a, b in zip(one, other, strict=True)]
    agreed = next((i for i, value in enumerate(found) if value > ALLOWED), len(found))
    return {"largest": max(found), "at_update": int(np.argmax(found)) + 1, "agreed": agreed}


def cache(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    same = [*words(folder, options.size, 10, 2), "--batch", 2, "--threads", 1, "--cache", folder / "cache"]
    finish([*same, "-o", folder / "before"])
    rng = np.random.default_rng(options.seed)
    paths = sorted((folder / "cache").glob("shard-*.npy"))
    path = paths[int(rng.integers(len(paths)))]
    before, position = sha256_file(path), int(rng.integers(path.stat().st_size))
    flip(path, position)
    said = finish([*same, "-o", folder / "after"])
    lines = [line.replace(f"{folder}/", "") for line in said.splitlines() if path.name in line]
    digests = [sha256_file(folder / name / "student.pt") for name in ("before", "after")]
    return {
        "shards": len(paths),
        "changed": {"shard": path.name, "byte": position, "of": path.stat().st_size},
        "said": lines,
        "shard_restored": sha256_file(path) == before,
        "student_sha256": {"before": digests[0], "after": digests[1]},
        "holds": len(lines) == 1 and sha256_file(path) == before and digests[0] == digests[1],
    }


def flip(path: Path, position: int) -> None:
    """Change one byte where it lies."""
    with path.open("r+b") as file:
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ 0xFF]))


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """What a part found, for people."""
    verdict = "holds" if found["holds"] else "DOES NOT HOLD"
    if name == "resume":
        kills = [
            f"  killed in its {k['during']} with {k['on_record']} of {k['of']} done, {k['delay_ms']:.0f} ms into the "
            f"next; went on at update {k['went_on_at_update']}, {k['shards_made_then']} shards left to make"
            for k in found["kills"]
        ]
        digest = found["student_sha256"]["killed"]
        return [f"killed three times, {found['updates']} updates: {verdict}", *kills, f"  student.pt {digest[:16]}…"]
    if name == "processes":
        apart, at_once = found["differences"].values()
        two, one, _ = found["student_sha256"].values()
        same = two == one
        return [
            f"two processes against one, {found['updates']} updates: {verdict}",
            f"  losses, from {found['loss_first']:.4f} to {found['loss_last']:.4f}, differ by at most "
            f"{apart['largest']:.1e} (allowed: {found['allowed']:.0e}) from those of one process that takes 2 images "
            f"at a time as well; the students are {'the same bytes' if same else 'not the same bytes'}",
            f"  one process that takes 4 at once, and rounds otherwise, agrees to {found['allowed']:.0e} for "
            f"{at_once['agreed']} updates, and to {at_once['largest']:.1e} over all",
        ]
    return [f"a byte of {found['changed']['shard']} changed: {verdict}", *(f"  said: {line}" for line in found["said"])]


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "resume": resume,
    "processes": processes,
    "cache": cache,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=256, help="of images, pixels")
    parser.add_argument("--updates", type=int, default=40, help="of the run that is killed")
    parser.add_argument("--output", type=Path, default=RESULTS / "proof.json")
    options = parser.parse_args()
    good = True
    for name in options.parts:
        folder, started = Path(tempfile.mkdtemp(prefix="distill-proof-")), time.monotonic()
        try:
            found = PARTS[name](folder, options)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = round(time.monotonic() - started, 1)
        print(*lines(name, found), f"  {seconds:.0f} s", sep="\n", flush=True)
        inputs = {"student_backbone": BACKBONE, "image_size": options.size, "images": len(Corpus([PHOTOS])),
                  "images_sha256": Corpus([PHOTOS]).digest(), "seed": options.seed}  # fmt: skip
        put(options.output, name, {**found, "seconds": seconds, "origin": origin(**inputs)})
        good = good and found["holds"]
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
