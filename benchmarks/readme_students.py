"""RESULTS.md's table of students of several backbones, and its chart; nothing where none was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import readme_experiments
import readme_survey
from pareto import Mark, pareto
from readme_experiments import encoder_macs, figure
from result_tables import load, table

from edgesam_deploy.measure.protocol import BOX, BY_PREDICTED, CLICK, SINGLE

SOURCE, CHART = "experiments.json", "students.svg"
NONE = "–"
Row = Mapping[str, Any]


def students() -> list[str]:
    """What each costs and what its masks are worth, the cheapest encoder first."""
    result = trained()
    found = backbones(result)
    if not found:
        return []
    header = ["backbone", "encoder GMACs", "M params", "minutes", "agreement: box", "click", "mIoU, annotated box",
              "small", "medium", "large", "one click, by predicted IoU", "FP32 ms", "INT8 ms",
              "INT8 is faster by"]  # fmt: skip
    of_teacher = in_survey(result["teacher_sha256"])
    rows = [["the teacher", *_macs(readme_experiments.teacher_macs(result)), *_parameters(of_teacher), NONE, "1", "1",
             *_truth(result["teacher"]), *_latencies(of_teacher)]]  # fmt: skip
    measured = []
    for name, entry in found.items():
        run, surveyed = entry["run"], in_survey(entry["run"]["checkpoint_sha256"])
        agreed = [figure(entry["after"], "agreement", prompt, None) for prompt in (BOX, CLICK)]
        cells = [*_macs(encoder_macs(entry)), *_parameters(surveyed), f"{run['seconds'] / 60:.0f}"]
        cells += [NONE if each is None else f"{each['miou']:.3f}" for each in agreed]
        rows.append([name, *cells, *_truth(entry["after"]), *_latencies(surveyed)])
        measured += [surveyed] if surveyed else []
    steps = sorted({entry["run"]["step"] for entry in found.values()})
    return [
        f"**Students of {len(found)} families of backbones, one teacher, one budget**: from random weights, decoupled, "
        f"{' or '.join(map(str, steps))} updates, one epoch; the teacher's decoder is kept. Their order says what "
        "learns fast from little, not what a long training ends with. Agreement and mIoU: as above, on "
        f"coco-subset/val. Parameters: with the decoder. {_timed(measured)}Source: "
        f"`benchmarks/results/distill/{SOURCE}`, `benchmarks/results/survey/survey.json`, `distillation.py`, "
        "`survey.py`.",
        "",
        *table(header, rows),
        "",
        f"![Mask quality of the students by multiply-adds](results/distill/{CHART})",
    ]


def charts() -> dict[Path, str]:
    marks = [
        Mark(name, name, encoder_macs(entry) / 1e9, found["miou"], tuple(found["interval"]))
        for name, entry in backbones(trained()).items()
        if (found := figure(entry["after"], "truth", BOX, SINGLE))
    ]
    title = "Students of one teacher after one epoch; joined: what no other beats; bars: 95 % intervals"
    drawn = pareto(marks, title, "GMACs of the encoder", "mIoU, annotated box") if marks else None
    return {readme_experiments.FOLDER / CHART: drawn} if drawn else {}


def trained() -> dict[str, Any]:
    path = readme_experiments.FOLDER / SOURCE
    return load(path) if path.is_file() else {"experiments": {}}


def backbones(result: Row) -> dict[str, Row]:
    """Name -> experiment, of students with a backbone of their own, by their encoders' multiply-adds."""
    found = {name: entry for name, entry in result["experiments"].items() if "encoder_macs" in entry}
    return dict(sorted(found.items(), key=lambda item: encoder_macs(item[1])))


def in_survey(digest: str) -> Row | None:
    """What the survey measured of the very weights of this sha256."""
    surveyed = readme_survey.survey().get("entries", {})
    return next((found for found in surveyed.values() if found["checkpoint_sha256"] == digest), None)


def _macs(macs: int | None) -> list[str]:
    return [NONE if macs is None else f"{macs / 1e9:.2f}"]


def _parameters(measured: Row | None) -> list[str]:
    return [f"{measured['parameters'] / 1e6:.2f}" if measured else NONE]


def _truth(found: Row) -> list[str]:
    box, click = figure(found, "truth", BOX, SINGLE), figure(found, "truth", CLICK, BY_PREDICTED)
    if box is None:
        return [NONE] * 5
    sizes = [f"{box['by_size'][size]['miou']:.3f}" for size in ("small", "medium", "large")]
    interval = "{:.3f}–{:.3f}".format(*box["interval"])
    return [f"{box['miou']:.3f} ({interval})", *sizes, f"{click['miou']:.3f}" if click else NONE]


def _latencies(measured: Row | None) -> list[str]:
    """Of encoder and decoder, on the faster backend of those measured."""
    fp32, int8 = (_fastest(measured, precision) for precision in ("fp32", "int8"))
    cells = [NONE if ms is None else f"{ms:.1f}" for ms in (fp32, int8)]
    return [*cells, f"{fp32 / int8:.2f}×" if fp32 and int8 else NONE]


def _fastest(measured: Row | None, precision: str) -> float | None:
    rows = [row for row in (measured or {}).get("rows", ()) if row["precision"] == precision and row["latency"]]
    return min((sum(graph["median_ms"] for graph in row["latency"].values()) for row in rows), default=None)


def _timed(measured: Sequence[Row]) -> str:
    """Which latencies these are."""
    found = [entry for entry in measured if entry.get("speed")]
    if not found:
        return ""
    places = dict.fromkeys(readme_survey.processor(entry["speed"]) for entry in found)
    threads = found[0]["speed"]["threads"]
    return (
        f"Latency: encoder and decoder, faster backend, medians, {threads} threads, {' and '.join(map(str, places))}. "
    )
