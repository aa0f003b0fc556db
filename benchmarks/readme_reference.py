"""How the reference model was trained, in RESULTS.md, and its curve, once ``reference_training.py`` was run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_tables import RESULTS, load, table

from edgesam_deploy.measure.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    LinearAxis,
    colours,
    frame,
    linear_y,
    svg,
)

SOURCE, CHART = RESULTS / "distill" / "reference.json", RESULTS / "distill" / "reference.svg"
STYLE = ".curve{stroke-width:1.6;fill:none}.clicks{stroke-dasharray:5 3}.stage{stroke:#999;stroke-dasharray:2 3}"
Row = Mapping[str, Any]


def stages() -> list[str]:
    """Every stage: what it learnt from, how long, and what the held-out images say after it."""
    if not SOURCE.is_file():
        return []
    result = load(SOURCE)
    header = ["stage", "updates", "views", "prompts", "minutes", "held out: boxes", "clicks"]
    rows, minutes = [], 0.0
    for name, entry in result["stages"].items():
        run = entry["run"]
        held = run["agreement" if of_teacher(entry) else "held_out"]
        minutes += run["seconds"] / 60
        views = run["step"] * run["processes"] * run["options"]["batch"]
        with_teacher = " with its teacher" if of_teacher(entry) else ""
        prompts = "–" if of_teacher(entry) else f"{views * run['options']['prompts']:,}"
        rows.append([f"{name}: {entry['about']}", f"{run['step']:,}", f"{views:,}", prompts,
                     f"{run['seconds'] / 60:.0f}", f"{held['box_iou']:.3f}{with_teacher}",
                     f"{held['click_iou']:.3f}{with_teacher}"])  # fmt: skip
    whole, *others = [entry["command"] for entry in result["stages"].values()]
    commands = "; ".join(f"`{command}`" for command in (whole, *(c.partition(" --dataset ")[0] + " …" for c in others)))
    return [
        f"**How the reference model was trained**, {minutes:.0f} minutes on {result['cores']} cores, "
        f"{result['machine']}, from weights of sha256 `{first(result)['init_sha256'][:8]}…`. Held out: mask IoU on 32 "
        "training photographs whose masks no stage learnt from, seen whole; for clicks the best of three. "
        f"{otherwise(result['stages'])}{averaged(result['stages'])}Before these stages lie 175 minutes more: "
        "`edgesam_deploy/assets/reference.md`, which says what limits the model, too. Source: "
        "`benchmarks/results/distill/reference.json`, `reference_training.py`.",
        "",
        *table(header, rows),
        "",
        f"![Mask IoU on held-out images over the training](results/distill/{CHART.name})",
        "",
        f"Commands: {commands}.",
    ]


# From which stage on the held-out images were counted otherwise, and how.
COUNTED = {
    "regions-1": "From `regions-1` on those of bsds500 count twice, and in `regions` masks of a single low-resolution "
    "pixel count, too, which is harder: as `regions` counts, the weights that `regions-1` began with have",
    "boxes-1": "Up to `regions` masks were compared at low resolution, from `boxes-1` on at the size of the view, "
    "where small ones are harder, and 85 % of the boxes were exact, not 50 %: so counted, the weights that `boxes-1` "
    "began with have",
    "boxes-2": "From `boxes-2` on images of bsds500 count three times and half of the boxes are exact: so counted, the "
    "weights that `boxes-2` began with have",
}


def otherwise(stages_of: Mapping[str, Row]) -> str:
    """What a stage that counts otherwise would have said of the weights that its part of the training began with."""
    found = {name: entry["before"] for name, entry in stages_of.items() if "before" in entry}
    return "".join(
        f"{COUNTED[name]} {before['box_iou']:.3f} for boxes and {before['click_iou']:.3f} for clicks. "
        for name, before in found.items()
    )


def averaged(stages_of: Mapping[str, Row]) -> str:
    """What was averaged in after a stage, and what the held-out images say of other shares."""
    told = ""
    for name, entry in stages_of.items():
        if (average := entry.get("average")) is not None:
            shares = ", ".join(
                f"{share}: {held['box_iou']:.3f} and {held['click_iou']:.3f}"
                for share, held in average["held_out"].items()
            )
            told += (
                f"After `{name}` {average['share']} of the weights `{average['of'][1][:8]}…` were averaged in, by "
                f"`average_weights.py`; boxes and clicks by that share: {shares}. "
            )
    return told


def of_teacher(entry: Row) -> bool:
    """Whether its validation compares with a teacher's masks, not with true ones."""
    return "agreement" in entry["run"]


def first(result: Row) -> Row:
    run: Row = next(iter(result["stages"].values()))["run"]
    return run


def charts() -> dict[Path, str]:
    return {CHART: _chart(load(SOURCE)["stages"])} if SOURCE.is_file() else {}


def _chart(stages_of: Mapping[str, Row]) -> str:
    """Mask IoU of held-out images by minutes of training, a line where a stage begins, a gap where they begin to be
    counted otherwise."""
    begin, begins = 0.0, {}
    parts: list[list[tuple[float, Row]]] = [[]]
    for name, entry in stages_of.items():
        begins[name] = begin
        run = entry["run"]
        if "before" in entry:
            parts.append([(begin, entry["before"])])
        for check in [] if of_teacher(entry) else entry["checks"]:
            parts[-1].append((begin + check["step"] / run["step"] * run["seconds"] / 60, check))
        begin += run["seconds"] / 60
    x = LinearAxis(0, begin, LEFT, WIDTH - RIGHT)
    y = linear_y([check[f"{kind}_iou"] for part in parts for _, check in part for kind in ("click", "box")])
    drawn = []
    for number, (name, at) in enumerate(begins.items()):
        left = f"{x.place(at):.1f}"
        drawn.append(
            f'<line class="stage" x1="{left}" y1="{TOP}" x2="{left}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{x.place(at) + 4:.1f}" y="{HEIGHT - BOTTOM - 8 - 14 * (number % 3)}">{name}</text>'
        )
    for kind, colour in colours(["box", "click"]).items():
        for part in parts:
            places = [(x.place(minute), y.place(check[f"{kind}_iou"])) for minute, check in part]
            line = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
            drawn.append(f'<polyline class="curve {kind}s" stroke="{colour}" points="{line}"/>')
        drawn.append(f'<text x="{places[-1][0] + 5:.1f}" y="{places[-1][1] + 4:.1f}">{kind}</text>')
    title = "The reference model over its training: mask IoU on held-out images, boxes (line) and clicks (dashes)"
    return svg(title, frame(x, y, "minutes of training", "mean mask IoU") + "".join(drawn), STYLE)
