"""The survey's part of README.md and RESULTS.md, and its charts; nothing where ``survey.py`` has not yet been run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pareto import Mark, pareto
from result_tables import RESULTS, load, table

from edgesam_deploy.measure.protocol import BOX, BY_PREDICTED, CLICK, SAME_INDEX, SINGLE
from edgesam_deploy.recipe import load_recipe

FOLDER = RESULTS / "survey"
LATENCY, MACS = "pareto-latency.svg", "pareto-macs.svg"
NONE = "–"
BEST = "best of"
BOXES_METRIC = "mIoU, ground-truth boxes"
# What is drawn and quoted of the truth: the single mask of a true box.
WORTH = "mIoU, true box"
FP32 = "fp32"

Row = Mapping[str, Any]


def whole() -> list[str]:
    """Every model, precision and backend."""
    result = survey()
    if not result:
        return []
    header = ["model", "precision", "backend", "M params", "GMACs", "peak MB", "encoder ms", "decoder ms", WORTH]
    header += ["small", "medium", "large", "one click, best of 3", "by predicted IoU", "agreement, box", "click"]
    header += ["with its teacher, box", "click", "accuracy, as published"]
    rows = [
        [label, *_way(row), *_costs(entry, row), *_latencies(row), *_truth(row), *_agreement(row), _published(entry)]
        for label, entry in result["entries"].items()
        for row in entry["rows"]
    ]
    return [
        f"**Survey**: models by precision and backend. {_how(result)} Quartiles and 95 % intervals in brackets. "
        "Parameters and multiply-adds: encoder and decoder, an image and one prompt. Best of 3: the candidate closest "
        "to the truth, which only an oracle picks. Agreement: mIoU with the masks of the same network in PyTorch FP32, "
        "or of its teacher, to the same prompt. As published: by others, on other images; not measured here. "
        f"{_notes(result)}",
        "",
        *table(header, rows),
        "",
        *_pictures(result, "results/survey"),
    ]


def short() -> list[str]:
    """The fastest backend of each precision."""
    result = survey()
    if not result:
        return []
    header = ["model", "precision", "backend", "M params", "GMACs", "peak MB", "encoder + decoder ms", WORTH]
    rows = []
    for label, entry in result["entries"].items():
        for row in _fastest(entry):
            truth = _figure(row, "quality", "truth", BOX, SINGLE)
            agreed = _answer(row, "quality", BOX)
            rows.append([label, *_way(row), *_costs(entry, row), _ms(row), _miou(truth), _share(agreed)])
    return [
        f"**Models by precision**, each on its fastest backend. {_how(result)} Agreement: mIoU with the masks of the "
        "same network in PyTorch FP32, to the true boxes. All backends and one click: `benchmarks/RESULTS.md`.",
        "",
        *_pictures(result, "benchmarks/results/survey")[:1],
        "",
        *table([*header, "agreement"], rows),
    ]


def charts() -> dict[Path, str]:
    """The SVG files that the sections show."""
    result = survey()
    drawn = {FOLDER / LATENCY: _by_latency(result), FOLDER / MACS: _by_macs(result)} if result else {}
    return {path: text for path, text in drawn.items() if text is not None}


def survey() -> dict[str, Any]:
    """What was measured, empty where nothing was."""
    path = FOLDER / "survey.json"
    return load(path) if path.is_file() else {}


def _by_latency(result: Row) -> str | None:
    place = processor(next(iter(result["entries"].values())).get("speed"))
    marks = [
        Mark(f"{label} {row['precision']}", label, ms, found["miou"], tuple(found["interval"]))
        for label, entry in result["entries"].items()
        if processor(entry.get("speed")) == place
        for row in _fastest(entry)
        if (found := _figure(row, "quality", "truth", BOX, SINGLE)) and (ms := _latency(row)) is not None
    ]
    title = (
        "Mask quality against latency, fastest backend on one CPU; joined: what no other beats; bars: 95 % intervals"
    )
    return pareto(marks, title, "encoder and decoder, ms", WORTH) if marks else None


def _by_macs(result: Row) -> str | None:
    marks = [
        Mark(label, label, entry["macs"] / 1e9, found["miou"], tuple(found["interval"]))
        for label, entry in result["entries"].items()
        for found in [
            _figure(row, "quality", "truth", BOX, SINGLE) for row in entry["rows"] if row["precision"] == FP32
        ][:1]
        if found
    ]
    title = "Mask quality against multiply-adds, FP32; joined: what no other beats; bars: 95 % intervals"
    return pareto(marks, title, "GMACs of an image and one prompt", WORTH) if marks else None


def _pictures(result: Row, folder: str) -> list[str]:
    texts = {LATENCY: (_by_latency(result), "latency"), MACS: (_by_macs(result), "multiply-adds")}
    return [f"![Mask quality by {what}]({folder}/{name})" for name, (text, what) in texts.items() if text is not None]


def _how(result: Row) -> str:
    """What was measured on what."""
    entries = result["entries"].values()
    rows = [row for entry in entries for row in entry["rows"]]
    sentences = []
    datasets = [row["quality"]["origin"]["datasets"][0] for row in rows if row["quality"] is not None]
    for images, targets in dict.fromkeys((found["images"], found["targets"]) for found in datasets):
        sentences.append(f"Mask quality on {images} images of COCO val with {targets} objects.")
    timed = [entry["speed"] for entry in entries if entry.get("speed")]
    for threads, runs in dict.fromkeys((how["threads"], how["runs"]) for how in timed):
        sentences.append(f"Medians of {runs} alternating runs, {threads} threads.")
    for place in dict.fromkeys(processor(how) for how in timed):
        labels = [label for label, entry in result["entries"].items() if processor(entry.get("speed")) == place]
        sentences.append(f"On {place}: {', '.join(labels)}.")
    reference = result["entries"].get("reference", {})
    if reference and reference["checkpoint_sha256"] != load_recipe("reference").checkpoint.sha256:
        weights = reference["checkpoint_sha256"][:8]
        sentences.append(f"`reference` has here the weights {weights}…, which were shipped before: the same network.")
    if len(entries) > 1:
        sentences.append("Models were timed at different times: latencies compare within a model.")
    return " ".join([*sentences, "Source: `benchmarks/results/survey/survey.json`, `survey.py`."])


def processor(speed: Row | None) -> str | None:
    """What a model was timed on, and what of it speeds up INT8 and bfloat16."""
    if not speed:
        return None
    return f"{speed['machine']} {'with ' + ', '.join(speed['features']) if speed['features'] else 'without VNNI'}"


def _notes(result: Row) -> str:
    """What a reader must know of single rows, and why others are missing."""
    entries = result["entries"]
    rows = [(label, row) for label, entry in entries.items() for row in entry["rows"]]
    notes = dict.fromkeys(f"{row['precision']} on {row['backend']}: {row['note']}." for _, row in rows if row["note"])
    below = [f"{label} {row['precision']} on {row['backend']}" for label, row in rows if row["verified"] is False]
    random = [label for label, entry in entries.items() if entry["weights"] == "random"]
    return " ".join(
        [
            *notes,
            *(f"No {precision}: {why}." for precision, why in result["left_out"].items()),
            *([f"Below the mask IoU that its recipe demands: {', '.join(below)}."] if below else []),
            *([f"With random weights, so without quality: {', '.join(random)}."] if random else []),
        ]
    )


def _fastest(entry: Row) -> list[Row]:
    """A row for each precision, in the order in which they occur."""
    found: dict[str, Row] = {}
    for row in entry["rows"]:
        best, ms = found.get(row["precision"]), _latency(row)
        if best is None or (ms is not None and ms < (_latency(best) or float("inf"))):
            found[row["precision"]] = row
    return list(found.values())


def _way(row: Row) -> list[str]:
    return [row["precision"], row["backend"]]


def _costs(entry: Row, row: Row) -> list[str]:
    peak = row["peak_rss_mb"]
    return [f"{entry['parameters'] / 1e6:.2f}", f"{entry['macs'] / 1e9:.1f}", NONE if peak is None else f"{peak:.0f}"]


def _latency(row: Row) -> float | None:
    if row["latency"] is None:
        return None
    return float(sum(graph["median_ms"] for graph in row["latency"].values()))


def _ms(row: Row) -> str:
    ms = _latency(row)
    return NONE if ms is None else f"{ms:.1f}"


def _latencies(row: Row) -> list[str]:
    if row["latency"] is None:
        return [NONE, NONE]
    graphs = [row["latency"][name] for name in ("encoder", "decoder")]
    return [f"{g['median_ms']:.1f} ({g['q1_ms']:.1f}–{g['q3_ms']:.1f})" for g in graphs]


def _figure(row: Row, part: str, kind: str, prompt: str, answer: str) -> Row | None:
    """One of an evaluation's figures. answer: what its name starts with."""
    figures = row[part][kind] if row[part] is not None else []
    return next((f for f in figures if f["prompt"] == prompt and f["answer"].startswith(answer)), None)


def _answer(row: Row, part: str, prompt: str) -> Row | None:
    """The mask of the same index; where that means nothing to both, the one that the model ranks first."""
    same = _figure(row, part, "agreement", prompt, SAME_INDEX)
    return same if same is not None else _figure(row, part, "agreement", prompt, BY_PREDICTED)


def _miou(figure: Row | None) -> str:
    return NONE if figure is None else "{:.4f} ({:.3f}–{:.3f})".format(figure["miou"], *figure["interval"])


def _share(figure: Row | None) -> str:
    return NONE if figure is None else f"{figure['miou']:.4f}"


def _truth(row: Row) -> list[str]:
    box = _figure(row, "quality", "truth", BOX, SINGLE)
    sizes = box["by_size"] if box is not None else {}
    by_size = [f"{sizes[size]['miou']:.3f}" if size in sizes else NONE for size in ("small", "medium", "large")]
    clicks = [_figure(row, "quality", "truth", CLICK, answer) for answer in (BEST, BY_PREDICTED)]
    return [_miou(box), *by_size, *map(_miou, clicks)]


def _agreement(row: Row) -> list[str]:
    return [_share(_answer(row, part, prompt)) for part in ("quality", "teacher") for prompt in (BOX, CLICK)]


def _published(entry: Row) -> str:
    """The figure nearest to what is measured here, with its source."""
    quotes = entry["published"]
    if not quotes:
        return NONE
    quote = next((q for q in quotes if BOXES_METRIC in q["metric"]), quotes[0])
    return f"{quote['value']:g}: {quote['metric']}; {quote['source']}"
