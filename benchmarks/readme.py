"""Put the measured figures into README.md, between its markers, and into benchmarks/RESULTS.md, from the JSON files
that other scripts wrote, and draw the survey's charts.

    python benchmarks/readme.py [--check]

--check changes nothing and fails if one of them does not show what the files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import readme_distill
import readme_experiments
import readme_families
import readme_reference
import readme_students
import readme_survey
from result_tables import ROOT, load, of_earlier, table

RESULTS = ROOT / "benchmarks" / "results" / "cpu"
EFFICIENCY = ROOT / "edgesam_deploy" / "assets" / "efficiency.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def agreement() -> list[str]:
    result = read("agreement")
    header = ["against PyTorch FP32", "mean", "median", "p5", "small", "medium", "large", "clicks", "boxes"]
    rows = []
    for name, item in result["results"].items():
        iou, sizes, prompts = item["mask_iou"], item["by_size"], item["by_prompt"]
        means = [group["mean"] for group in (*(sizes[s] for s in ("small", "medium", "large")), *prompts.values())]
        rows.append([name, *(f"{v:.4f}" for v in (iou["mean"], iou["median"], iou["p5"], *means))])
    count = result["images"] * result["prompts_per_image"]
    return [
        f"**Mask IoU with the same weights in PyTorch FP32**, {result['images']} images of COCO val and DAVIS, {count} "
        f"prompts, `reference`. {of_earlier(recipe=result['recipe_digest'])}fp16 is measured on an emulated graph; "
        "the last row compares the encodings for TensorRT and for the CPU with each other. Source: "
        "`benchmarks/results/cpu/agreement.json`, `agreement.py`.",
        "",
        *table(header, rows),
    ]


def precision() -> list[str]:
    """What each way to INT8 costs in mask quality; FP32 is the row that the others lose against."""
    result = read("precision")
    sizes = ("small", "medium", "large")
    header = ["`reference`", "mask IoU with PyTorch", *sizes, "GT-box mIoU", "lost, points", *sizes]
    rows = []
    for row in result["rows"]:
        iou, truth = row["agreement"], row["ground_truth"]
        lost = [f"{truth['all']['drop_points']:.2f} ± {truth['all']['drop_standard_error']:.2f}"]
        lost += [f"{truth[size]['drop_points']:.2f}" for size in sizes]
        agreed = [f"{iou['mask_iou']['mean']:.4f} ± {iou['standard_error']:.4f}"]
        agreed += [f"{iou['by_size'][size]['mean']:.4f}" for size in sizes]
        rows.append([row["name"], *agreed, f"{truth['all']['miou']:.4f}", *lost])
    first = result["rows"][0]["ground_truth"]
    return [
        f"**What INT8 costs**, {result['witness']}. Mask IoU with the same weights in PyTorch FP32 on "
        f"{result['images']} images of COCO val and DAVIS, {result['images'] * result['prompts_per_image']} prompts; "
        f"mIoU with the truth for the true boxes of {first['all']['count']} COCO val objects. ±: standard error over "
        f"images. {of_earlier(recipe=result['recipe_digest'])}Source: `benchmarks/results/cpu/precision.json`, "
        "`precision.py`.",
        "",
        *table(header, rows),
    ]


def speed() -> list[str]:
    result = read("speed")
    rows = [
        [
            str(row["threads"]),
            f"{row['fp32']['median_ms']:.1f}",
            f"{row['int8']['median_ms']:.1f}",
            f"{row['speedup_median']:.2f}× ({row['speedup_q1']:.2f}–{row['speedup_q3']:.2f})",
        ]
        for row in result["encoder"]
    ]
    processes = result["processes"]
    return [
        f"**Image encoder, ONNX Runtime on {result['machine']}**, alternating in one run, medians (quartiles of the "
        "ratio). Source: `benchmarks/results/cpu/speed.json`, `speed.py`.",
        "",
        *table(["threads", "FP32 ms", "INT8 ms", "INT8 is faster by"], rows),
        "",
        f"Process start to written mask with the shipped bundle: {processes['first_mask']['median_ms'] / 1000:.2f} s; "
        f"`sam-export --help`: {processes['help']['median_ms'] / 1000:.2f} s.",
    ]


def int8_speed() -> list[str]:
    """Encoders on the CPU, every way to run them against samexporter's FP32."""
    result = read("int8-speed")
    rows = []
    for name, encoder in result["encoders"].items():
        for way, row in encoder["rows"].items():
            speedup = row["speedup"]
            ratio = f"{speedup['median']:.2f}× ({speedup['q1']:.2f}–{speedup['q3']:.2f})"
            share = f"{100 * row['gop_per_s'] * 1e9 / result['int8_limit']['limit']:.0f} %" if "int8" in way else "–"
            rows.append([name, way, f"{row['median_ms']:.0f}", ratio, share])
    limit = result["int8_limit"]
    return [
        f"**Image encoders on {result['machine']}**, {result['threads']} threads, {result['runs']} alternating runs, "
        "medians (quartiles of the ratio). The first row of each is the FP32 graph as samexporter exports it, on ONNX "
        "Runtime with its default options; the others are ours. MobileSAM and NanoSAM's ResNet-18 in shape and size, "
        f"with random weights. {of_earlier(macs=result['encoders']['reference']['macs'])}The last column: operations "
        "against what the CPU's INT8 units could do "
        f"({limit['unit'].replace('_', ' ')}: {limit['operations_per_cycle']} operations a cycle × "
        f"{limit['clock_hz'] / 1e9:.1f} GHz × {limit['cores']} cores). Source: "
        "`benchmarks/results/cpu/int8-speed.json`, `cpu_int8.py`.",
        "",
        *table(["encoder", "how", "ms", "faster by", "of the INT8 limit"], rows),
    ]


def searches() -> list[str]:
    """What the precision search found, and how long it took."""
    rows = []
    for path in sorted((RESULTS.parent / "search").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        chosen, rest, blocks = found["chosen"], found["rest"], found["layers"]
        everything = min(found["points"], key=lambda point: point["cost_ms"])
        shown = [f"{rest['cost_ms'] / p['cost_ms']:.2f}× at {p['mask_iou']:.4f}" for p in (everything, chosen or rest)]
        picked = f"{len(chosen['int8'])} of {len(blocks)} blocks" if chosen is not None else "none"
        verdict = {"int8": picked, "keep": f"keep {found['rest_type']}", "unmet": "out of reach"}[found["verdict"]]
        weights = "" if found["weights"] == "shipped" else " (random weights)"
        minutes = f"{found['minutes']:.1f} ({found['evaluations']} × {found['images']} images)"
        name, budget = path.stem + weights, f"{found['min_iou']:g}"
        rows.append([name, found["cost_source"], budget, *shown, verdict, minutes])
    header = ["recipe-target", "time from", "budget", "fastest tried", "chosen", "in INT8", "minutes"]
    return [
        "**The precision search**: speed against no INT8 at all, at the mask IoU on calibration images, for the "
        "fastest assignment that was tried and for the fastest within the budget. Source: "
        "`benchmarks/results/search/`, `search.py`.",
        "",
        *table(header, rows),
    ]


def parity() -> list[str]:
    result = read("sam-predictor")
    lowest = min(row["mean"] for row in result["images"])
    return [
        f"**segment-anything's `SamPredictor` and ours**, same weights, {len(result['images'])} images (1×900, "
        f"1500×2250, EXIF portrait, grey, 16-bit, RGBA, CMYK …): mean mask IoU {result['mean']:.5f}, "
        f"lowest image {lowest:.5f}. "
        "Source: `benchmarks/results/cpu/sam-predictor.json`, `sam_predictor.py`.",
    ]


def quality() -> list[str]:
    """Ground-truth figures of the reference model beside the one before and two trivial answers to a box."""
    sources = {
        "shipped reference": read("reference-quality"),
        "an earlier one, HGNetV2-B0 without ImageNet": read("earlier-quality"),
    }
    header = ["mIoU against ground truth", "COCO val, true box", "small", "medium", "large", "BSDS test, one click",
              "ECSSD val, true box", "DAVIS, true box"]  # fmt: skip
    boxes = [("coco-subset", "GT box", "single", group) for group in ("all", "small", "medium", "large")]
    others = [("bsds500", "centre click", "best of 3", "60 images"), ("ecssd", "GT box", "single", "all"),
              ("davis-frames", "GT box", "single", "mean per sequence")]  # fmt: skip
    rows = []
    for name, source in sources.items():
        figures = {(f["pack"], f["prompt"], f["answer"], f["group"]): f for f in source["figures"]}
        rows.append([name, *(_with_interval(figures[key]) for key in (*boxes, *others))])
    trivials = {(f["answer"], f["group"]): f for f in sources["shipped reference"]["figures"]}
    for name in ("filled box", "inscribed ellipse"):
        trivial = [_with_interval(trivials[name, group]) for *_, group in boxes]
        rows.append([f"no model: {name}", *trivial, *["–"] * len(others)])
    return [
        "**The reference model is weak**: it was trained on a CPU from a few hundred images so that the whole path can "
        "be tried without a download. Use it to check your set-up, and MobileSAM or SAM for work. How it was trained: "
        "`benchmarks/RESULTS.md`. In brackets 95 % intervals, by resampling images; of one click the best of three "
        "masks. Source: `benchmarks/results/cpu/reference-quality.json`, `earlier-quality.json`, "
        "`reference_quality.py`.",
        "",
        *table(header, rows),
    ]


def _with_interval(figure: dict[str, Any]) -> str:
    ends = figure.get("interval")
    return f"{figure['miou']:.3f}" + (f" ({ends[0]:.3f}–{ends[1]:.3f})" if ends else "")


def audit() -> list[str]:
    result = load(RESULTS.parent / "rtx" / "audit.json")
    rows = [
        [
            f"{row['recipe']} {row['graph']}",
            row["precision"],
            ", ".join(f"{count} {kind}" for kind, count in row["compiled"].items()),
            str(len(row["mismatched"])),
            f"{row['seconds']:.1f}",
            f"{row['plan_mb']:.0f}",
        ]
        for row in result["graphs"]
    ]
    return [
        f"**Compiled as meant**, by the layer list of TensorRT for RTX {result['library'].split()[1]} on a machine "
        "without a GPU: nodes by the type they compute in. mixed: a kernel with FP16 and FP32 tensors, as at the edge "
        "of the FP32 point encoding. Seconds are upper bounds. Source: "
        "`benchmarks/results/rtx/audit.json`, `rtx_audit.py`.",
        "",
        *table(["graph", "precision", "nodes by compiled type", "not as meant", "seconds", "plan MB"], rows),
    ]


def students() -> list[str]:
    """Which backbones INT8 pays for."""
    result = load(RESULTS.parent / "students" / "students.json")
    rows = []
    for row in sorted(result["rows"], key=lambda r: -r["speedup"]["median"]):
        fp32, int8 = (row["variants"][row[f"best_{kind}"]] for kind in ("fp32", "int8"))
        speedup = row["speedup"]
        rows.append(
            [
                row["backbone"],
                f"{row['parameters'] / 1e6:.1f}",
                f"{row['macs'] / 1e9:.1f}",
                f"{100 * row['int8_macs_share']:.0f} %",
                f"{fp32['median_ms']:.0f}",
                f"{int8['median_ms']:.0f}",
                f"{speedup['median']:.2f}× ({speedup['q1']:.2f}–{speedup['q3']:.2f})",
                f"{fp32['peak_rss_mb']:.0f} → {int8['peak_rss_mb']:.0f}",
                f"{row['best_fp32'].split(', ')[1]} / {row['best_int8'].split(', ')[1]}",
            ]
        )
    header = ["backbone", "M parameters", "GMACs", "of them INT8", "FP32 ms", "INT8 ms", "INT8 is faster by"]
    header += ["peak MB", "backend"]
    return [
        f"**Which backbones INT8 pays for**, image encoders of the students at 1024 pixels on {result['machine']}, "
        f"{result['threads']} threads, {result['runs']} alternating runs, medians (quartiles of the ratio); the faster "
        "of ONNX Runtime and OpenVINO for each precision. Random weights: speed only. Source: "
        "`benchmarks/results/students/students.json`, `students.py`.",
        "",
        "![Bars: how many times faster INT8 is than FP32, by backbone](benchmarks/results/students/students.svg)",
        "",
        *table(header, rows),
    ]


def estimates() -> list[str]:
    """The latency model against published figures, those it was fitted to left out in turn."""
    result = load(EFFICIENCY)
    rows = []
    for kind, entries in (("left out of the fit in turn", result["fitted"]), ("never seen", result["tried"])):
        for row in entries:
            model = row["model_ms"] if row["left_out_ms"] is None else row["left_out_ms"]
            error = f"{100 * (model / row['measured_ms'] - 1):+.0f} %"
            rows.append([row["name"], row["device"], row["precision"], f"{row['measured_ms']:g}", f"{model:.2f}",
                         error, kind])  # fmt: skip
    share = result["efficiency"]
    return [
        f"**`sam-export estimate` against published latencies**: {100 * share['compute']:.0f} % of the arithmetic, "
        f"{100 * share['memory']:.0f} % of the bandwidth, {1e3 * share['launch_ms']:.0f} µs between kernels, fitted to "
        "EfficientViT-SAM on AGX Orin. Source: `edgesam_deploy/assets/efficiency.json`, `estimate_fit.py`, "
        "`estimate_try.py`, where each figure names its origin.",
        "",
        *table(["model", "device", "precision", "published ms", "estimated ms", "error", "the model had it"], rows),
    ]


def profiles() -> list[str]:
    """What every network costs: counted, and timed where it is small enough for a CPU."""
    result: dict[str, Any] = json.loads((RESULTS.parent / "profile" / "models.json").read_text(encoding="utf-8"))
    rows = []
    for name, model in result["models"].items():
        encoder, said = model["parts"][0], result["published"].get(name, {})
        amounts = [f"{model['parameters'] / 1e6:.2f}", _against(said.get("params_m"))]
        amounts += [f"{sum(encoder['macs'].values()) / 1e9:.2f}", f"{model['macs'] / 1e9:.2f}"]
        amounts += [_against(said.get("macs_g")), f"{encoder['peak_bytes'] / 1e6:.0f}"]
        times = [part["latency"]["cpu_ms"] for part in model["parts"] if part["latency"] is not None]
        times_ms = [f"{times[0]:.0f}", f"{sum(times[1:]):.0f}"] if times else ["–", "–"]
        rows.append([name, *amounts, *times_ms])
    header = ["recipe", "M params", "published", "encoder GMACs", "with decoder", "published", "peak MB"]
    run = next((model["run"] for model in result["models"].values() if model["run"]), None)
    how = (
        f" {run['runs']} runs with random weights, {run['threads']} thread, on {run['machine']}, which did other work "
        "meanwhile: for comparing models, not for planning with"
        if run
        else " not measured"
    )
    return [
        "**What each network costs** at its recipe's size, batch 1, one prompt of two points. MACs: multiply-adds of "
        "convolutions and matrix products. Behind each published count: how far ours is from it, counted in the way "
        "that fits all figures of that source best (encoder alone or with decoder, products of activations or not). "
        f"PyTorch's FlopCounterMode, its profiler and calflops, run on {_checked(result)} of them, agree but for "
        f"products that they cannot see: {_unexplained(result)} MACs are unexplained. Peak: activations of the encoder "
        "in FP32. Processor time of "
        f"PyTorch in FP32:{how}. Source: `benchmarks/results/profile/models.json`, `model_profile.py`.",
        "",
        *table([*header, "encoder CPU ms", "decoder CPU ms"], rows),
        "",
        "![Published models by parameters and multiply-adds](results/profile/models.svg)",
    ]


def _against(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['published']:g} ({100 * row['off']:+.1f} %)"


def _checked(result: dict[str, Any]) -> int:
    return sum(bool(model["checks"]) for model in result["models"].values())


def _unexplained(result: dict[str, Any]) -> int:
    return sum(abs(check["unexplained"]) for model in result["models"].values() for check in model["checks"])


IN_README = (readme_survey.short, agreement, precision, int8_speed, speed, estimates, students, quality)
IN_RESULTS = (
    readme_survey.whole,
    readme_reference.stages,
    readme_experiments.experiments,
    readme_students.students,
    readme_experiments.encoding,
    readme_distill.cross_check,
    readme_distill.proof,
    readme_distill.scale,
    readme_families.families,
    profiles,
    parity,
    searches,
    audit,
)
TITLE = """# Results

Longer tables than the README has room for. Generated by `python benchmarks/readme.py` from the files named; nothing is
typed by hand.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path, results = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = {
        path: before + "\n".join([BEGIN, "", *sections(IN_README), END]) + after,
        results: "\n".join([TITLE, *sections(IN_RESULTS)]),
        **readme_survey.charts(),
        **readme_experiments.charts(),
        **readme_students.charts(),
        **readme_reference.charts(),
    }
    for file, text in wanted.items():
        if options.check and (not file.is_file() or file.read_text(encoding="utf-8") != text):
            sys.exit(f"{file.name} is out of date: run python benchmarks/readme.py")
        if not options.check:
            file.write_text(text, encoding="utf-8")


def sections(makers: Sequence[Callable[[], list[str]]]) -> list[str]:
    """One after another, a blank line behind each that has something to show."""
    return [line for make in makers if (lines := make()) for line in (*lines, "")]


if __name__ == "__main__":
    main()
