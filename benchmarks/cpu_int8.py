"""INT8 against FP32 encoders on this CPU, the FP32 ones as samexporter exports them: one run, alternating.

    python benchmarks/cpu_int8.py [--threads 2] [--runs 15] [--output benchmarks/results/cpu/int8-speed.json]

Three encoders: the reference with its own weights, MobileSAM's TinyViT and NanoSAM's ResNet-18 in shape and size with
seeded random ones (theirs are a download; how long a graph takes hardly depends on them), both after batch statistics
were set on real photographs. Each is run as samexporter writes it, on ONNX Runtime with its default options, and as we
write it, on both CPU backends. Run it with nothing else at work. Milliseconds of a shared machine are upper bounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime
from int8_encoders import RANDOM_PHOTOS, SHIPPED, SUBJECTS, Subject, export_as_samexporter
from int8_limit import Peak, find_peak

from edgesam_deploy.bundle import ANSWERS, load_bundle, open_graphs, shipped_bundle
from edgesam_deploy.contract import IMAGE, IMAGE_EMBEDDINGS
from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.measure.accuracy import compare, load_answers
from edgesam_deploy.measure.compare import versions
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.recipe import PACKAGE
from edgesam_deploy.runtime import SessionOptions, open_session
from edgesam_deploy.runtime.openvino import native_bf16
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.calibrate import Ranges, calibrate
from edgesam_deploy.stages.export import export_model
from edgesam_deploy.stages.node_work import node_macs
from edgesam_deploy.stages.simplify import simplify
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import load_target
from edgesam_deploy.transforms import resized_hw, to_encoder_input

PHOTOS = PACKAGE / "assets" / "photos"
PHOTO = PHOTOS / "verify" / "duck.jpg"
WARMUP = 3

BASELINE = "samexporter fp32, onnxruntime"
# Pools of ONNX Runtime's default options spin for a while after a run; nobody else is timed before they sleep.
REST_S = 0.05

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a subject's encoder, on the photograph. int8: whether it counts towards the bar."""

    graph: Path
    run: Callable[[], Array]
    int8: bool


def export_as_ours(subject: Subject, folder: Path) -> tuple[Path, Path]:
    """Simplified FP32 encoder and decoder."""
    folder.mkdir()
    for name, proto in export_model(subject.model, subject.recipe).items():
        graphs.save(proto, folder / f"{name}-exported.onnx", {})
    encoder, decoder = (
        simplify(folder / f"{name}-exported.onnx", folder / f"{name}.onnx").output for name in ("encoder", "decoder")
    )
    return encoder, decoder


def quantize_as_ours(subject: Subject, encoder: Path, folder: Path) -> tuple[dict[str, Path], Sequence[str]]:
    """The INT8 graph by encoding, and the names of its INT8 nodes; rules: the CPU target's and the recipe's."""
    target = load_target("cpu")
    rules = target.rules_for(subject.recipe)
    images = list_images(PHOTOS / "calibration")
    if subject.weights != SHIPPED:
        images = images[:RANDOM_PHOTOS]
    ranges: Ranges = calibrate({"encoder": encoder}, images, subject.recipe, rules, folder / "ranges.json")["encoder"]
    typed = {
        encoding: type_graph(
            encoder, ranges, subject.recipe.fp16, rules, Typing(encoding, "fp32"), folder / f"{encoding}.onnx"
        )
        for encoding in ("tensorrt", "cpu")
    }
    return {encoding: result.output for encoding, result in typed.items()}, typed["cpu"].int8


def variants(
    subject: Subject, baseline: Path, encoder: Path, int8: Mapping[str, Path], threads: int
) -> dict[str, Variant]:
    """Ready sessions by name, the baseline first, each on the same photograph."""
    size, padding = subject.recipe.geometry.image_size, subject.recipe.pixels.padding
    photo = read_image(PHOTO)
    image = to_encoder_input(photo, size, padding)
    height, width = resized_hw((photo.shape[0], photo.shape[1]), size)
    pixels = np.ascontiguousarray(image[0, :, :height, :width].transpose(1, 2, 0), dtype=np.float32)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    theirs = onnxruntime.InferenceSession(str(baseline), settings, providers=["CPUExecutionProvider"])
    found = {BASELINE: Variant(baseline, lambda: theirs.run(None, {"input_image": pixels})[0], False)}

    def add(name: str, graph: Path, backend: str, bf16: bool = False, quantized: bool = True) -> None:
        session = open_session(graph, backend, SessionOptions(threads, bf16=bf16))
        found[name] = Variant(graph, lambda: cast(Array, session.run({IMAGE: image})[IMAGE_EMBEDDINGS]), quantized)

    add("fp32, onnxruntime", encoder, "onnxruntime", quantized=False)
    add("fp32, openvino", encoder, "openvino", quantized=False)
    if native_bf16():
        add("bf16, openvino", encoder, "openvino", bf16=True, quantized=False)
    add("int8 in cpu encoding, onnxruntime", int8["cpu"], "onnxruntime")
    for encoding, graph in int8.items():
        add(f"int8 in {encoding} encoding, openvino", graph, "openvino")
        if native_bf16():
            add(f"int8 in {encoding} encoding beside bf16, openvino", graph, "openvino", bf16=True)
    return found


def measure(subject: Subject, folder: Path, threads: int, runs: int, peak: Peak | None) -> dict[str, Any]:
    """Everything that is reported of one encoder."""
    baseline = export_as_samexporter(subject, folder / "samexporter.onnx")
    encoder, decoder = export_as_ours(subject, folder / "ours")
    int8, names = quantize_as_ours(subject, encoder, folder)
    rows = variants(subject, baseline, encoder, int8, threads)
    expected = rows[BASELINE].run()
    cosines = {name: _cosine(expected, row.run()) for name, row in rows.items()}
    samples = _rested(rows, runs)
    macs = node_macs(encoder)
    total, quantized = sum(macs.values()), sum(macs.get(name, 0) for name in names)
    report: dict[str, Any] = {
        "weights": subject.weights,
        "image_size": subject.recipe.geometry.image_size,
        "macs": total,
        "int8_macs_share": quantized / total,
        "bar": subject.bar,
        "rows": {
            name: {
                **_spread(samples[name]),
                "speedup": _speedup(samples[BASELINE], samples[name]),
                "cosine_to_baseline": cosines[name],
                "gop_per_s": 2e-6 * total / statistics.median(samples[name]),
                "graph_sha256": sha256_file(row.graph),
            }
            for name, row in rows.items()
        },
    }
    best = min((name for name, row in rows.items() if row.int8), key=lambda n: statistics.median(samples[n]))
    rate = 1e9 * report["rows"][best]["gop_per_s"]
    speedup = report["rows"][best]["speedup"]["median"]
    report["best_int8"] = {"row": best, "speedup_median": speedup, "passes": speedup >= subject.bar}
    if peak is not None:
        shares = {"percent_of_int8_limit": peak.limit, "percent_of_measured_products": peak.measured}
        report["best_int8"] |= {name: 100 * rate / whole for name, whole in shares.items()}
    if subject.weights == SHIPPED:
        report["mask_iou"] = _mask_iou(int8, decoder, threads)
        report["mask_iou_wanted"] = subject.recipe.min_mask_iou["int8"]
    return report


def _rested(samples: Mapping[str, Variant], runs: int) -> dict[str, list[float]]:
    """Milliseconds of each variant's runs, by turns, after the pools of the one before have gone to sleep."""
    found: dict[str, list[float]] = {name: [] for name in samples}
    for run in range(WARMUP + runs):
        for name in list(samples) if run % 2 == 0 else reversed(list(samples)):
            time.sleep(REST_S)
            started = time.perf_counter()
            samples[name].run()
            if run >= WARMUP:
                found[name].append((time.perf_counter() - started) * 1e3)
    return found


def _cosine(first: Array, second: Array) -> float:
    a, b = (x.astype(np.float64).ravel() for x in (first, second))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_ms": median, "q1_ms": low, "q3_ms": high}


def _speedup(baseline: list[float], samples: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of runs that followed each other."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(baseline, samples, strict=True)], n=4)
    return {"median": median, "q1": low, "q3": high}


def _mask_iou(int8: Mapping[str, Path], decoder: Path, threads: int) -> dict[str, float]:
    """Mean mask IoU against PyTorch FP32 on the shipped bundle's photographs, as `sam-export verify` measures it."""
    path = shipped_bundle()
    bundle, answers = load_bundle(path), load_answers(path / ANSWERS)
    found = {}
    for encoding, backend in (("cpu", "onnxruntime"), ("cpu", "openvino"), ("tensorrt", "openvino")):
        files = {"encoder": int8[encoding], "decoder": decoder}
        with open_graphs(files, bundle, SessionOptions(threads), backend) as predictor:
            result = compare(predictor, answers, path / "verify", backend)
        found[f"int8 in {encoding} encoding, {backend}"] = result.mask_iou.mean
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="names of encoders; all of them if not given")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/int8-speed.json"))
    options = parser.parse_args()
    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        peak = find_peak(options.threads, Path(folder))
        for make in SUBJECTS:
            if options.only and make.__name__ not in options.only:
                continue
            subject, own = make(), Path(folder) / make.__name__
            own.mkdir()
            reports[subject.name] = measure(subject, own, options.threads, options.runs, peak)
            _show(subject.name, reports[subject.name])
    write_json(
        options.output,
        {
            "command": f"python benchmarks/cpu_int8.py --threads {options.threads} --runs {options.runs}",
            "machine": machine(),
            "threads": options.threads,
            "runs": options.runs,
            "baseline": "samexporter's export in our words (TorchScript exporter, opset 18, normalisation and padding "
            "inside, not simplified) on ONNX Runtime with default session options except the number of threads",
            "int8_limit": None if peak is None else {**asdict(peak), "limit": peak.limit, "clock": "/proc/cpuinfo"},
            "encoders": reports,
            "versions": versions({"onnxruntime", "openvino"}),
            "tools": tool_versions(),
        },
    )


def _show(name: str, report: Mapping[str, Any]) -> None:
    print(f"{name}: {report['macs'] / 1e9:.1f} GMAC, {100 * report['int8_macs_share']:.1f} % of them in INT8")
    for row, r in report["rows"].items():
        print(
            f"  {row:46s} {r['median_ms']:7.1f} ms ({r['q1_ms']:.1f}-{r['q3_ms']:.1f})  {r['speedup']['median']:5.2f}x "
            f"({r['speedup']['q1']:.2f}-{r['speedup']['q3']:.2f})  {r['gop_per_s']:6.0f} GOP/s  "
            f"cosine {r['cosine_to_baseline']:.4f}"
        )
    print("  best INT8: " + ", ".join(f"{key} {value}" for key, value in report["best_int8"].items()))
    for row, iou in report.get("mask_iou", {}).items():
        print(f"  mask IoU, {row}: {iou:.4f}")


if __name__ == "__main__":
    main()
