"""The trainings' part of RESULTS.md, and its chart; nothing where ``distillation.py`` has not yet been run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_tables import RESULTS, load, of_earlier, table

from edgesam_deploy.measure.chart import LEFT, RIGHT, WIDTH, LinearAxis, colours, frame, linear_y, svg
from edgesam_deploy.measure.protocol import BOX, BY_PREDICTED, CLICK, SAME_INDEX, SINGLE

FOLDER = RESULTS / "distill"
# Results of one teacher, and the chart of them; of_earlier tells which teacher that is.
CHARTS = {"experiments.json": "agreement.svg", "earlier-experiments.json": "earlier-agreement.svg"}
STYLE = ".curve{stroke-width:1.6;fill:none}.clicks{stroke-dasharray:5 3}"
NONE = "–"
Row = Mapping[str, Any]


def experiments() -> list[str]:
    """Every experiment, by teacher: what it cost, and its masks before and after."""
    parts = [_of_teacher(source, chart) for source, chart in CHARTS.items() if (FOLDER / source).is_file()]
    return [line for number, part in enumerate(parts) for line in ([""] * (number > 0) + part)]


def _of_teacher(source: str, chart: str) -> list[str]:
    result = load(FOLDER / source)
    header = ["experiment", "encoder GMACs", "minutes", "updates", "agreement: click", "box", "mIoU, annotated box",
              "small", "medium", "large", "one click, by predicted IoU"]  # fmt: skip
    rows = [["the teacher", *_teacher(result)]]
    rows += [_row(name, entry) for name, entry in result["experiments"].items()]
    runs = [entry["run"] for entry in result["experiments"].values()]
    photographs = max(run["images"] for run in runs if "teacher" in run)
    commands = [f"`{entry['command']}`" for entry in result["experiments"].values()]
    drawn = [f"![Agreement with the teacher over training](results/distill/{chart})", ""] if _curves(result) else []
    return [
        "**Trainings**, each a few commands, on one thread beside other work: minutes, of the updates alone, are upper "
        "bounds. "
        "Agreement: mIoU with the teacher's masks to the same prompts, on all objects of coco-subset/val, which no run "
        "has seen; mIoU: with the true masks there (95 % interval). Before → after. Distilled from "
        f"{photographs} photographs without labels. {of_earlier('The teacher', macs=teacher_macs(result))}"
        f"Source: `benchmarks/results/distill/{source}`, `distillation.py`.",
        "",
        *table(header, rows),
        "",
        *drawn,
        "Commands: " + "; ".join(commands) + ".",
    ]


def encoding() -> list[str]:
    """Boxes learnt with one point encoding and with the other."""
    path = FOLDER / "encoding.json"
    if not path.is_file():
        return []
    result = load(path)
    names = {"random": "random frequencies, SAM's", "axes": f"along x and y (`--axes {result['axes']:g}`)"}
    rows = []
    for name, title in names.items():
        points = result["curves"][name]
        shown = [points[len(points) * third // 3 - 1] for third in (1, 2, 3)]
        for point in shown:
            cells = [f"{point[size]:.3f}" for size in ("small", "medium", "large", "mean")]
            rows.append([title, f"{point['step'] * result['boxes_per_step']:,}", *cells])
    return [
        "**Which point encoding teaches a decoder sooner what a box means**: mask IoU of ellipses in boxes "
        f"that were not learnt from ({result['checked_boxes']}, at 512 pixels), by COCO's sizes. The same random "
        "weights of decoder and prompt tables, the same boxes in the same order at 256 pixels, learning rate "
        f"{result['lr']:g}, the encoder of the reference model kept still. Source: "
        "`benchmarks/results/distill/encoding.json`, `point_encoding.py`.",
        "",
        *table(["positions", "boxes learnt from", "small", "medium", "large", "all"], rows),
    ]


def charts() -> dict[Path, str]:
    """Agreement over the updates of every distillation, a chart for each teacher."""
    curves = {
        FOLDER / chart: _curves(load(FOLDER / source))
        for source, chart in CHARTS.items()
        if (FOLDER / source).is_file()
    }
    return {path: _chart(of) for path, of in curves.items() if of}


def _curves(result: Row) -> dict[str, list[Row]]:
    return {
        name: entry["checks"]
        for name, entry in result["experiments"].items()
        if len(entry["checks"]) > 2 and "cosine" in entry["checks"][0]
    }


def _chart(curves: Mapping[str, list[Row]]) -> str:
    every = [point for points in curves.values() for point in points]
    x = LinearAxis(0, max(point["step"] for point in every), LEFT, WIDTH - RIGHT)
    y = linear_y([point[kind] for point in every for kind in ("click_iou", "box_iou")])
    colour_of = colours(list(curves))
    drawn = []
    for name, points in curves.items():
        for kind in ("box", "click"):
            places = " ".join(f"{x.place(p['step']):.1f},{y.place(p[f'{kind}_iou']):.1f}" for p in points)
            drawn.append(
                f'<polyline class="curve {kind}s" stroke="{colour_of[name]}" points="{places}"/>'
                f'<text x="{x.place(points[-1]["step"]) + 5:.1f}" y="{y.place(points[-1][f"{kind}_iou"]) + 4:.1f}">'
                f"{name}, {kind}</text>"
            )
    title = "Agreement with the teacher on 32 held-out training images: boxes (lines) and clicks (dashes)"
    frame_of = frame(x, y, "updates", "mean mask IoU with the teacher")
    return svg(title, frame_of + "".join(drawn), STYLE)


def teacher_macs(result: Row) -> int | None:
    """Of its encoder, where a student was pruned out of it."""
    of = [entry["pruned"]["macs_before"] for entry in result["experiments"].values() if "pruned" in entry]
    return int(of[0]) if of else None


def _teacher(result: Row) -> list[str]:
    found = teacher_macs(result)
    macs = f"{found / 1e9:.2f}" if found else NONE
    return [macs, NONE, NONE, "1", "1", *_truth(None, result["teacher"])]


def _row(name: str, entry: Row) -> list[str]:
    run, before, after = entry["run"], entry.get("before"), entry["after"]
    cells = [f"{name}: {entry['about']}", f"{encoder_macs(entry) / 1e9:.2f}", f"{run['seconds'] / 60:.0f}",
             str(run["step"])]  # fmt: skip
    for prompt in (CLICK, BOX):
        answers = [figure(each, "agreement", prompt, None) for each in (before, after)]
        cells.append(_arrow(*(None if a is None else f"{a['miou']:.3f}" for a in answers)))
    return [*cells, *_truth(before, after)]


def _truth(before: Row | None, after: Row) -> list[str]:
    boxes = [figure(each, "truth", BOX, SINGLE) for each in (before, after)]
    interval = boxes[1]["interval"] if boxes[1] else (0, 0)
    cells = [_arrow(*(f"{b['miou']:.3f}" if b else None for b in boxes)) + f" ({interval[0]:.3f}–{interval[1]:.3f})"]
    for size in ("small", "medium", "large"):
        cells.append(f"{boxes[1]['by_size'][size]['miou']:.3f}" if boxes[1] else NONE)
    clicks = [figure(each, "truth", CLICK, BY_PREDICTED) for each in (before, after)]
    return [*cells, _arrow(*(f"{c['miou']:.3f}" if c else None for c in clicks))]


def encoder_macs(entry: Row) -> int:
    return int(entry["pruned"]["macs_after"] if "pruned" in entry else entry["encoder_macs"])


def _arrow(before: str | None, after: str | None) -> str:
    return f"{before} → {after}" if before else after or NONE


def figure(found: Row | None, kind: str, prompt: str, answer: str | None) -> Row | None:
    for each in (found or {}).get(kind, ()):
        if each["prompt"] == prompt and each["answer"] in ((answer,) if answer else (SAME_INDEX, SINGLE)):
            return each  # type: ignore[no-any-return]
    return None
