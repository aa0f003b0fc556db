"""Every family of models through the whole tool, a row each: parity with upstream, export, engines, a mask.

    python benchmarks/families.py [--recipes NAME ...] [--again]

Writes benchmarks/results/families/families.json. For each recipe, in a process of its own: upstream's tensors load
strictly and ours answer as upstream's code did (the recorded comparison in tests/models, whose errors pytest reports);
`sam-export build` and `predict` run with initial weights (seed 0; published ones cannot be had everywhere, and nothing
here depends on them); both graphs are typed as FP16 and as INT8 beside FP16 and built with TensorRT for RTX, which
needs no GPU, and every node compiled otherwise than meant is listed. Rows that are there already are kept unless
--again asks for them; a row that fails says why.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgesam_deploy.bundle import GRAPHS
from edgesam_deploy.files import write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.models import build_model
from edgesam_deploy.recipe import PACKAGE, available_recipes, load_recipe
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.cache import tool_versions

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "families" / "families.json"
PHOTO = PACKAGE / "assets" / "photos" / "verify" / "dog.jpg"
POINT = "300,350"
LABELS = ("fp16", "int8 fp16")
CAPABILITY = "8.6"
# One size of each family; the others differ by numbers in their TOMLs only. recipe -> its file of tests/models, and the
# recorded listing of upstream's tensors: file and entry (segment-anything itself is installed, and asked).
FAMILIES: dict[str, tuple[str, str | None, str]] = {
    "sam_vit_b": ("test_sam_vit", None, ""),
    "mobile_sam": ("test_mobile_sam", "mobile_sam", "state"),
    "mobile_sam_v2": ("test_mobile_sam_v2", "mobile_sam_v2", "published_state"),
    "nanosam_resnet18": ("test_nanosam", "nanosam", "state"),
    "edge_sam": ("test_edge_sam", "edge_sam", "state"),
    "efficientvit_sam_l0": ("test_efficientvit_sam", "efficientvit_sam", "state"),
    "tiny_sam": ("test_tiny_sam", "tiny_sam", "state"),
    "repvit_sam": ("test_repvit_sam", "repvit_sam", "state"),
    "efficient_sam_ti": ("test_efficient_sam", "efficient_sam", "ti.state"),
    "slim_sam_77": ("test_slim_sam", "slim_sam", "77.state"),
    "sam2.1_hiera_tiny": ("test_sam2", "sam2", "state"),
    "edge_tam": ("test_sam2", "edge_tam", "state"),
}
STUDENTS = "student_"


def run(*arguments: object) -> dict[str, Any]:
    """A command of sam-export with --json. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, "-m", "edgesam_deploy", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"sam-export {arguments[0]}: {done.stderr.strip().splitlines()[-1:]}")
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def examine(name: str, work: Path) -> dict[str, Any]:
    """One row, everything but parity."""
    from rtx_audit import examine as audit_graphs

    recipe = load_recipe(name)
    torch.manual_seed(0)
    weights, images, bundle = work / "weights.pt", work / "images", work / "bundle"
    torch.save(initial(name).state_dict(), weights)
    images.mkdir()
    (images / PHOTO.name).write_bytes(PHOTO.read_bytes())
    options = ("--precision", "fp32", "--backend", "onnxruntime", "--checkpoint", weights, "--images", images)
    built = run("build", name, *options, "-o", bundle)
    stages = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["stages"]
    predicted = run("predict", PHOTO, "--point", POINT, "--bundle", bundle, "-o", work / "mask.png")
    sources = {g: work / ".stages" / "bundle" / f"simplify-{g}" / f"{g}.onnx" for g in GRAPHS}
    # All students have the decoder of the reference and of SAM, which other rows and rtx_audit.py build.
    audited = {"encoder": sources["encoder"]} if name.startswith(STUDENTS) else sources
    rows = audit_graphs(recipe, audited, CAPABILITY, LABELS, work)
    return {
        "recipe": name,
        "family": recipe.family,
        "contract": recipe.geometry.variant,
        "opset": recipe.opset,
        "foreign_nodes": {g: graphs.foreign_nodes(graphs.load(path)) for g, path in sources.items()},
        "nodes": {g: [stages[f"simplify-{g}"]["nodes_before"], stages[f"simplify-{g}"]["nodes_after"]] for g in GRAPHS},
        "simplifier": {g: stages[f"simplify-{g}"]["tool"] for g in GRAPHS},
        "export_error": stages["export"]["max_error"],
        "simplify_error": max(stages[f"simplify-{g}"]["max_error"] for g in GRAPHS),
        "mask_iou_fp32": built["mask_iou"]["mean"],
        "predict": predicted,
        "engines": rows,
    }


def initial(name: str) -> torch.nn.Module:
    """The network with seeded weights, a student's as ``int8_encoders.student`` makes them."""
    if name.startswith(STUDENTS):
        from int8_encoders import student

        model: torch.nn.Module = student(name).model
        return model
    return build_model(load_recipe(name))


def in_own_process(name: str) -> dict[str, Any]:
    """A row from a fresh process, which gives its memory back; with why it failed, if it did."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--one", name, "--output", str(output)]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            row: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        else:
            row = {"recipe": name, "failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def parity(files: set[str]) -> dict[str, dict[str, Any]]:
    """What the parity tests report, by file: how many ran, those that failed, and the largest error of them all."""
    if not files:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = [f"tests/models/{name}.py" for name in sorted(files)]
        command = [sys.executable, "-m", "pytest", "-q", *paths, f"--junitxml={report}", "-o", "junit_family=xunit1"]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        file = case.get("classname", "").rsplit(".", 1)[-1]
        entry = found.setdefault(file, {"tests": 0, "failed": [], "largest_error": 0.0})
        entry["tests"] += 1
        if case.find("failure") is not None or case.find("error") is not None:
            entry["failed"].append(case.get("name"))
        errors = [float(str(p.get("value"))) for p in case.iter("property") if p.get("name") == "largest_error"]
        entry["largest_error"] = max([entry["largest_error"], *errors])
    return found


def upstream_tensors(name: str) -> int:
    """How many tensors upstream's state dict has."""
    _, file, entry = FAMILIES[name]
    if file is None:
        with torch.device("meta"):
            return len(build_model(load_recipe(name)).state_dict())
    with np.load(ROOT / "tests" / "models" / "data" / f"{file}_outputs.npz") as recorded:
        return len(recorded[entry])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", help="default: one of each family, and every timm student")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            write_json(options.output, examine(options.one, Path(folder)))
        return
    students = [name for name in available_recipes() if name.startswith(STUDENTS)]
    names = options.recipes or [*FAMILIES, *students]
    rows: dict[str, Any] = {}
    if options.output.is_file():
        rows = {r["recipe"]: r for r in json.loads(options.output.read_text(encoding="utf-8"))["rows"]}
    compared = parity({FAMILIES[name][0] for name in names if name in FAMILIES})
    for name in names:
        if options.again or name not in rows or "failed" in rows[name]:
            rows[name] = in_own_process(name)
        if name in FAMILIES:
            rows[name]["parity"] = {**compared[FAMILIES[name][0]], "upstream_tensors": upstream_tensors(name)}
        print(f"{name}: {rows[name].get('failed', 'ok')}, {rows[name]['seconds']} s", flush=True)
        write_json(options.output, {"machine": machine(), "tools": tool_versions(), "rows": list(rows.values())})
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
