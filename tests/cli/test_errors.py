"""Every way a command can go wrong: its exit code and the one line it leaves on stderr.

A row is a command line, in which ``{name}`` stands for a thing of the scene below, the exit code (errors.py) and what
the line must say. Rows run in this process; what needs a process of its own follows the tables.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgesam_deploy.bundle import ANSWERS, MANIFEST, load_bundle
from edgesam_deploy.cli import main
from edgesam_deploy.files import sha256_file

torch = pytest.importorskip("torch", reason="building needs the export extra")
onnx = pytest.importorskip("onnx", reason="building needs the export extra")

PHOTO_HW = (60, 90)
CALIBRATION_IMAGES = 32


class Explosive:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _photographs(scene: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*PHOTO_HW, 3), dtype=np.uint8)
    Image.fromarray(picture).save(scene / "photo.jpg")
    whole = (scene / "photo.jpg").read_bytes()
    (scene / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (scene / "text.jpg").write_text("this is no photograph\n")
    (scene / "empty.jpg").write_bytes(b"")
    for folder, count in (("none", 0), ("few", 3), ("enough", CALIBRATION_IMAGES), ("broken", CALIBRATION_IMAGES)):
        (scene / folder).mkdir()
        for i in range(count):
            (scene / folder / f"{i:02}.jpg").write_bytes(whole)
    shutil.copyfile(scene / "cut.jpg", scene / "broken" / "03.jpg")


def _recipes(scene: Path, tiny: str) -> None:
    def write(name: str, text: str) -> None:
        assert text != tiny, f"the edit for {name} found nothing to change"
        (scene / f"{name}.toml").write_text(text, encoding="utf-8")

    (scene / "tiny.toml").write_text(tiny, encoding="utf-8")
    write("no-toml", tiny + "\na = = 1\n")
    write("no-summary", re.sub(r"^summary = .*$", "", tiny, flags=re.M))
    write("no-mean", re.sub(r"^mean = .*$", "", tiny, flags=re.M))
    write("no-opset", re.sub(r"^opset = .*$", "", tiny, flags=re.M))
    write("no-geometry", tiny.replace("[geometry]", "[geometries]"))
    write("no-pixels", re.sub(r"^\[pixels\]\nmean = .*\nstd = .*$", "", tiny, flags=re.M))
    write("no-threshold", re.sub(r"^int8 = .*$", "", tiny, flags=re.M))
    write("no-backbone", re.sub(r"^backbone = .*$", "", tiny, flags=re.M))
    write("more-geometry", tiny.replace("[geometry]", "[geometry]\ndepth = 3"))
    write("more-checkpoint", tiny.replace("[checkpoint]", "[checkpoint]\nmd5 = 'x'"))
    write("more-int8", tiny + "\n[precision.int8]\npercentil = 99.9\n")
    write("more-tables", tiny + "\n[precison.int8]\npercentile = 99.9\n")
    write("more-precisions", tiny + "\n[precision.int4]\nkeep = []\n")
    write("more-export", tiny.replace("[export]", "[export]\nopset_version = 18"))
    write("more-options", tiny.replace("[model]", "[model]\nwidth = 3"))
    write("text-size", re.sub(r"^image_size = .*$", 'image_size = "large"', tiny, flags=re.M))
    write("odd-size", re.sub(r"^image_size = .*$", "image_size = 127", tiny, flags=re.M))
    write("opset-11", re.sub(r"^opset = .*$", "opset = 11", tiny, flags=re.M))
    write("nan-mean", re.sub(r"^mean = .*$", "mean = [nan, 116.28, 103.53]", tiny, flags=re.M))
    write("zero-std", re.sub(r"^std = .*$", "std = [0.0, 57.12, 57.375]", tiny, flags=re.M))
    write("threshold-2", re.sub(r"^int8 = .*$", "int8 = 2.0", tiny, flags=re.M))
    write("percentile-0", tiny + "\n[precision.int8]\npercentile = 0\n")
    write("bad-regex", tiny + '\n[precision.int8]\nkeep = ["neck("]\n')
    write("text-keep", tiny + '\n[precision.int8]\nkeep = "neck"\n')
    write("number-keep", tiny + "\n[precision.int8]\nkeep = [7]\n")
    write("short-sha256", re.sub(r"^sha256 = .*$", 'sha256 = "abc"', tiny, flags=re.M))
    write("other-sha256", re.sub(r"^sha256 = .*$", f'sha256 = "{"0" * 64}"', tiny, flags=re.M))
    write("no-url", re.sub(r'^file = ".*"$', "", tiny, flags=re.M))
    write("refused-url", re.sub(r"^file = .*$", 'url = "http://127.0.0.1:1/weights.pt"', tiny, flags=re.M))
    unreached = re.sub(r"^file = .*$", 'url = "http://127.0.0.1:1/weights.pt"', tiny, flags=re.M)
    write("unverified", re.sub(r"^sha256.*$", "", unreached, flags=re.M))
    write(
        "non-commercial",
        re.sub(r"^(url = .*)$", r'\1\nlicence_url = "http://licence"\ncommercial = false', unreached, flags=re.M),
    )
    write("untrained", re.sub(r"\[checkpoint\]\n(?:.+\n)+", "", tiny))
    write("unknown-architecture", re.sub(r"^architecture = .*$", 'architecture = "perceptron"', tiny, flags=re.M))
    write("unknown-backbone", re.sub(r"^backbone = .*$", 'backbone = "hgnetv9_b0"', tiny, flags=re.M))


def _checkpoints(scene: Path, good: Path) -> None:
    state = torch.load(good, weights_only=True)
    first = sorted(state)[0]
    torch.save({k: v for k, v in state.items() if k != first}, scene / "missing.pt")
    torch.save({**state, "surplus": torch.zeros(1)}, scene / "extra.pt")
    torch.save({**state, first: torch.zeros(1, 2, 3)}, scene / "misshapen.pt")
    torch.save({**state, first: torch.full_like(state[first], float("nan"))}, scene / "nan.pt")
    torch.save({**state, 7: torch.zeros(1), "surplus": torch.zeros(1)}, scene / "number-key.pt")
    torch.save({"net": state, "epoch": 3}, scene / "training.pt")
    torch.save({"model": state, "ema": state, "epoch": 3}, scene / "two.pt")
    torch.save({f"module.{k}": v for k, v in state.items() if k != first}, scene / "parallel.pt")
    (scene / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    torch.save([torch.zeros(1)], scene / "list.pt")
    torch.save({"weights": Explosive(scene / "exploded")}, scene / "code.pt")
    (scene / "pickle.pt").write_bytes(pickle.dumps(Explosive(scene / "exploded"), protocol=2))
    (scene / "pickle-4.pt").write_bytes(pickle.dumps(Explosive(scene / "exploded"), protocol=4))
    whole = good.read_bytes()
    (scene / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (scene / "cut-pickle.pt").write_bytes(pickle.dumps({"a": 1.5}, protocol=2)[:-4])
    (scene / "text.pt").write_text("this is no checkpoint\n")
    (scene / "empty.pt").write_bytes(b"")
    (scene / "random.pt").write_bytes(np.random.default_rng(0).bytes(5000))


def _graphs(scene: Path, stages: Path) -> None:
    whole = (stages / "simplify-encoder" / "encoder.onnx").read_bytes()
    (scene / "encoder.onnx").write_bytes(whole)
    shutil.copyfile(stages / "simplify-decoder" / "decoder.onnx", scene / "decoder.onnx")
    shutil.copyfile(stages / "quantize-encoder" / "encoder.onnx", scene / "quantized.onnx")
    (scene / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (scene / "empty.onnx").write_bytes(b"")
    (scene / "random.onnx").write_bytes(np.random.default_rng(0).bytes(4000))
    (scene / "text.onnx").write_text("this is no graph\n")
    graph = onnx.load_from_string(whole)
    del graph.graph.node[:]
    (scene / "no-nodes.onnx").write_bytes(graph.SerializeToString())
    for name, operator, kind, shape in (
        ("three-axes", "Relu", onnx.TensorProto.FLOAT, ["a", "b", "c"]),
        ("strings", "Identity", onnx.TensorProto.STRING, [1]),
    ):
        ends = [onnx.helper.make_tensor_value_info(n, kind, shape) for n in "xy"]
        node = onnx.helper.make_graph([onnx.helper.make_node(operator, ["x"], ["y"])], "g", ends[:1], ends[1:])
        opset = [onnx.helper.make_opsetid("", 19)]
        onnx.save(onnx.helper.make_model(node, opset_imports=opset, ir_version=10), scene / f"{name}.onnx")


def _bundles(scene: Path, bundle: Path) -> None:
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(bundle, scene / name))

    damaged("bundle")
    _one_image(damaged("one-image"))
    graph = damaged("flipped") / "encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    (damaged("incomplete") / "decoder.onnx").unlink()
    for name, change in {
        "newer": {"schema": 2},
        "geometry": {"geometry": {**json.loads((bundle / MANIFEST).read_text())["geometry"], "image_size": 256}},
        "renamed": {"recipe": {"name": "reference", "digest": ""}},
    }.items():
        manifest = damaged(name) / MANIFEST
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))


def _one_image(bundle: Path) -> None:
    """Leave a bundle the first of its recorded answers, so that verifying it takes a moment."""
    with np.load(bundle / ANSWERS) as recorded:
        first = {name: recorded[name][:1] for name in recorded.files}
    np.savez_compressed(bundle / ANSWERS, **first)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][ANSWERS]["sha256"] = sha256_file(bundle / ANSWERS)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def _stages(scene: Path, stages: Path) -> None:
    """Work folders in which every stage is done, so that a build comes quickly to where it goes wrong."""
    for name in ("few", "broken", "none", "limit-stage", "limit-bundle"):
        shutil.copytree(stages, scene / "engines" / ".stages" / name, copy_function=os.link)
    shutil.rmtree(scene / "engines" / ".stages" / "limit-stage" / "encode-encoder")
    for name in ("limit-stage", "limit-bundle"):
        shutil.copytree(scene / "bundle", scene / "engines" / name)


@pytest.fixture(scope="module")
def scene(
    built: SimpleNamespace, tiny_recipe: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with everything a command may stumble over."""
    folder = tmp_path_factory.mktemp("scene")
    _photographs(folder)
    _recipes(folder, tiny_recipe.read_text(encoding="utf-8"))
    _checkpoints(folder, checkpoint)
    _graphs(folder, built.stages)
    _bundles(folder, built.bundle)
    _stages(folder, built.stages)
    (folder / "a-file").write_text("in the way")
    (folder / "holiday").mkdir()
    (folder / "holiday" / "beach.jpg").write_bytes(b"irreplaceable")
    return folder


def fill(text: str, scene: Path) -> str:
    """``{name}`` becomes a path in the scene."""
    return re.sub(r"\{([^}]*)\}", lambda m: str(scene / m[1]), text)


def run(line: str, scene: Path) -> Result:
    """A command line in this process."""
    words = [fill(word, scene) for word in shlex.split(line)]
    return CliRunner().invoke(main, words, prog_name="sam-export")


def check(result: Result, code: int, says: tuple[str, ...], scene: Path) -> None:
    """The exit code, and one line on stderr that says everything in ``says``."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in says:
        assert fill(part, scene) in lines[0]
    assert result.exit_code == code
    assert not list(scene.rglob(".unfinished-*"))


Row = tuple[str, int, tuple[str, ...]]


def table(rows: dict[str, Row]) -> Any:
    """Parametrize over rows by their names."""
    return pytest.mark.parametrize(("line", "code", "says"), rows.values(), ids=rows)


CLICK = "predict {photo.jpg} --point 5,5 --bundle {bundle}"
REQUESTS: dict[str, Row] = {
    "unknown-recipe": ("build gpt", 2, ("unknown recipe 'gpt'", "expected one of", "reference", "path of a .toml")),
    "unknown-recipe-export": ("export gpt -o {out}", 2, ("unknown recipe 'gpt'",)),
    "unknown-recipe-quantize": ("quantize {encoder.onnx} --recipe gpt -o {out.onnx}", 2, ("unknown recipe 'gpt'",)),
    "missing-recipe-file": ("build {gone.toml}", 2, ("cannot read {gone.toml}: No such file",)),
    "unknown-target": ("build --target toaster", 2, ("unknown target 'toaster'", "expected one of", "cpu")),
    "unknown-backend": ("build {tiny.toml} --backend tflite", 2, ("backend must be one of onnxruntime, openvino",)),
    "cpu-backend-for-a-gpu": (
        "build {tiny.toml} --target rtx --backend openvino",
        2,
        ("backend must be one of", "for a CPU target; got openvino for rtx"),
    ),
    "bf16-for-a-gpu": ("build {tiny.toml} --target rtx --bf16", 2, ("bf16 is for CPU targets",)),
    "search-of-fp16": ("build {tiny.toml} --precision fp16 --search", 2, ("a search chooses what is INT8", "fp16")),
    "search-of-unknown-recipe": ("search gpt", 2, ("unknown recipe 'gpt'",)),
    "search-for-unknown-target": ("search --target toaster", 2, ("unknown target 'toaster'",)),
    "search-on-unknown-backend": ("search {tiny.toml} --backend tflite", 2, ("backend must be one of",)),
    "unknown-precision": ("build --precision int4", 2, ("unknown precision 'int4'", "fp32, fp16, int8")),
    "nan-point": (
        "predict {photo.jpg} --point nan,5 --bundle {bundle}",
        2,
        ("point_coords must be finite numbers", "nan"),
    ),
    "infinite-point": ("predict {photo.jpg} --point 5,inf --bundle {bundle}", 2, ("must be finite numbers", "inf")),
    "point-outside": (
        "predict {photo.jpg} --point 91,5 --bundle {bundle}",
        2,
        ("point (91, 5) lies outside the image, which is 90 pixels wide and 60 high", "from the top left"),
    ),
    "point-negative": ("predict {photo.jpg} --point -1,5 --bundle {bundle}", 2, ("point (-1, 5) lies outside",)),
    "label-2": ("predict {photo.jpg} --point 5,5,2 --bundle {bundle}", 2, ("1 (foreground) or 0 (background)", "2.")),
    "box-x1-below-x0": (
        "predict {photo.jpg} --box 50,5,10,40 --bundle {bundle}",
        2,
        ("x0,y0,x1,y1 with x0 < x1 and y0 < y1, got 50,5,10,40",),
    ),
    "box-outside": (
        "predict {photo.jpg} --box 5,5,10,400 --bundle {bundle}",
        2,
        ("box corner (10, 400) lies outside",),
    ),
    "nan-box": ("predict {photo.jpg} --box 5,5,10,nan --bundle {bundle}", 2, ("box must be finite numbers",)),
    "too-few-images": (
        "quantize {encoder.onnx} --calibration {few} -o {out.onnx}",
        2,
        ("calibration needs at least 32 images", "{few} holds 3", "add photographs"),
    ),
    "too-few-images-build": (
        "build {tiny.toml} --calibration {few} -o {engines/few}",
        2,
        ("calibration needs at least 32 images", "{few} holds 3"),
    ),
}


@table(REQUESTS)
def test_a_request_that_cannot_be_met(scene: Path, line: str, code: int, says: tuple[str, ...]) -> None:
    check(run(line, scene), code, says, scene)


# The recipe comes before the graph, which is broken too: exit code 1 would mean that the recipe passed.
QUANTIZE = "quantize {empty.onnx} -o {out.onnx} --recipe "
RECIPES: dict[str, Row] = {
    "no-toml": (QUANTIZE + "{no-toml.toml}", 2, ("{no-toml.toml} is not valid TOML", "line")),
    "missing-entry": (QUANTIZE + "{no-summary.toml}", 2, ("recipe {no-summary.toml}: the entry 'summary' is missing",)),
    "missing-mean": (QUANTIZE + "{no-mean.toml}", 2, ("recipe {no-mean.toml}", "mean")),
    "missing-opset": (QUANTIZE + "{no-opset.toml}", 2, ("the entry 'opset' is missing",)),
    "misspelt-table": (QUANTIZE + "{no-geometry.toml}", 2, ("unknown entries ['geometries'] for recipe, expected",)),
    "missing-table": (QUANTIZE + "{no-pixels.toml}", 2, ("the entry 'pixels' is missing",)),
    "missing-threshold": (QUANTIZE + "{no-threshold.toml}", 2, ("verify.min_mask_iou.int8 must be a number in 0..1",)),
    "unknown-entry": (QUANTIZE + "{more-geometry.toml}", 2, ("unknown entries ['depth'] for geometry",)),
    "unknown-checkpoint-entry": (QUANTIZE + "{more-checkpoint.toml}", 2, ("unknown entries ['md5'] for checkpoint",)),
    "unknown-int8-entry": (QUANTIZE + "{more-int8.toml}", 2, ("unknown entries ['percentil'] for int8rules",)),
    "unknown-table": (QUANTIZE + "{more-tables.toml}", 2, ("{more-tables.toml}", "precison")),
    "unknown-precision-table": (QUANTIZE + "{more-precisions.toml}", 2, ("{more-precisions.toml}", "int4")),
    "unknown-export-entry": (QUANTIZE + "{more-export.toml}", 2, ("{more-export.toml}", "opset_version")),
    "size-text": (QUANTIZE + "{text-size.toml}", 2, ("image_size must be a positive integer, got 'large'",)),
    "size-no-multiple": (QUANTIZE + "{odd-size.toml}", 2, ("image_size (127) must be a multiple of embedding_size",)),
    "opset-11": (QUANTIZE + "{opset-11.toml}", 2, ("export.opset must be 17..20", "got 11")),
    "mean-nan": (QUANTIZE + "{nan-mean.toml}", 2, ("{nan-mean.toml}", "pixels.mean", "nan")),
    "std-zero": (QUANTIZE + "{zero-std.toml}", 2, ("pixels.std must be positive, got (0.0, 57.12, 57.375)",)),
    "threshold-above-1": (QUANTIZE + "{threshold-2.toml}", 2, ("min_mask_iou.int8 must be a number in 0..1, got 2.0",)),
    "percentile-0": (QUANTIZE + "{percentile-0.toml}", 2, ("percentile must be a number in (50, 100], got 0",)),
    "keep-text": (QUANTIZE + "{text-keep.toml}", 2, ("{text-keep.toml}", "keep", "neck")),
    "keep-number": (QUANTIZE + "{number-keep.toml}", 2, ("{number-keep.toml}", "keep", "7")),
    "sha256-short": (
        QUANTIZE + "{short-sha256.toml}",
        2,
        ("checkpoint.sha256 must be 64 lower-case hex digits, got 'abc'",),
    ),
    "neither-file-nor-url": (QUANTIZE + "{no-url.toml}", 2, ("exactly one of 'file' (packaged) and 'url'",)),
    "keep-bad-regex": (
        QUANTIZE + "{bad-regex.toml}",
        2,
        ("{bad-regex.toml}: precision keep holds an invalid regular expression 'neck('",),
    ),
    "unknown-architecture": (
        "export {unknown-architecture.toml} -o {out}",
        2,
        ("unknown architecture 'perceptron'", "timm_fpn"),
    ),
    "unknown-backbone": ("export {unknown-backbone.toml} -o {out}", 2, ("hgnetv9_b0",)),
    "missing-backbone": ("export {no-backbone.toml} -o {out}", 2, ("backbone",)),
    "unknown-option": ("export {more-options.toml} -o {out} --checkpoint {missing.pt}", 2, ("width",)),
}


@table(RECIPES)
def test_a_recipe_that_does_not_validate(scene: Path, line: str, code: int, says: tuple[str, ...]) -> None:
    check(run(line, scene), code, says, scene)


EXPORT = "export {tiny.toml} -o {out} --checkpoint "
NO_CHECKPOINT = "is not a readable PyTorch checkpoint"
REFUSED = "is refused: it holds Python objects or code besides tensors"
CHECKPOINTS: dict[str, Row] = {
    "missing-file": (EXPORT + "{gone.pt}", 1, ("checkpoint {gone.pt} does not exist",)),
    "missing-file-build": (
        "build {tiny.toml} -o {engines/x} --checkpoint {gone.pt}",
        1,
        ("checkpoint {gone.pt} does not exist",),
    ),
    "a-folder": (EXPORT + "{few}", 1, ("{few}", NO_CHECKPOINT, "Is a directory")),
    "missing-tensor": (
        EXPORT + "{missing.pt}",
        1,
        ("{missing.pt} does not fit recipe 'tiny': 1 missing (image_encoder.", "Give the checkpoint of this model"),
    ),
    "extra-tensor": (EXPORT + "{extra.pt}", 1, ("{extra.pt} does not fit recipe 'tiny': 1 unexpected (surplus)",)),
    "misshapen-tensor": (
        EXPORT + "{misshapen.pt}",
        1,
        ("{misshapen.pt} does not fit recipe 'tiny': 1 misshapen (image_encoder.", "is (1, 2, 3), expected ("),
    ),
    "misshapen-build": (
        "build {tiny.toml} -o {engines/x} --checkpoint {misshapen.pt}",
        1,
        ("{misshapen.pt} does not fit recipe 'tiny'",),
    ),
    "truncated": (EXPORT + "{cut.pt}", 1, ("{cut.pt} " + NO_CHECKPOINT + " (truncated?)",)),
    "truncated-pickle": (EXPORT + "{cut-pickle.pt}", 1, ("{cut-pickle.pt}",)),
    "empty": (EXPORT + "{empty.pt}", 1, ("{empty.pt} " + NO_CHECKPOINT,)),
    "text": (EXPORT + "{text.pt}", 1, ("{text.pt} " + NO_CHECKPOINT,)),
    "random": (EXPORT + "{random.pt}", 1, ("{random.pt}",)),
    "an-image": (EXPORT + "{photo.jpg}", 1, ("{photo.jpg}",)),
    "a-graph": (EXPORT + "{encoder.onnx}", 1, ("{encoder.onnx}",)),
    "code": (EXPORT + "{code.pt}", 1, ("{code.pt} " + REFUSED, "expected a state dict")),
    "code-bare-pickle": (EXPORT + "{pickle.pt}", 1, ("{pickle.pt} " + REFUSED,)),
    "training-checkpoint": (EXPORT + "{training.pt}", 1, ("{training.pt} must hold a state dict", "'epoch', 'net'")),
    "two-sets-of-weights": (EXPORT + "{two.pt}", 1, ("{two.pt} holds several sets of weights, model and ema",)),
    "parallel-and-short": (EXPORT + "{parallel.pt}", 1, ("{parallel.pt} does not fit recipe 'tiny': 1 missing",)),
    "truncated-safetensors": (EXPORT + "{cut.safetensors}", 1, ("is not a readable safetensors file (truncated?)",)),
    "missing-safetensors": (EXPORT + "{gone.safetensors}", 1, ("checkpoint {gone.safetensors} does not exist",)),
    "too-many-files": (
        EXPORT + "{missing.pt} --checkpoint {extra.pt}",
        2,
        ("recipe 'tiny' takes one --checkpoint that holds everything; got 2",),
    ),
    "no-published-weights": (
        "export {untrained.toml} -o {out}",
        1,
        ("recipe 'tiny' has no published weights: give yours with --checkpoint FILE",),
    ),
    "no-published-weights-build": (
        "build {untrained.toml} -o {engines/x}",
        1,
        ("recipe 'tiny' has no published weights",),
    ),
    "unverified": (
        "export {unverified.toml} -o {out}",
        1,
        ("nobody is known to state the sha256 of http://127.0.0.1:1/weights.pt", "--accept-unverified"),
    ),
    "unverified-accepted": (
        "export {unverified.toml} -o {out} --accept-unverified",
        1,
        ("cannot download http://127.0.0.1:1/weights.pt", "Connection refused"),
    ),
    "non-commercial": (
        "export {non-commercial.toml} -o {out}",
        1,
        ("may not be used commercially (licence Apache-2.0)", "read http://licence", "accept it with --accept-license"),
    ),
    "non-commercial-build": (
        "build {non-commercial.toml} -o {engines/x}",
        1,
        ("may not be used commercially", "--accept-license"),
    ),
    "non-commercial-search": ("search {non-commercial.toml}", 1, ("may not be used commercially", "--accept-license")),
    "non-commercial-accepted": (
        "export {non-commercial.toml} -o {out} --accept-license",
        1,
        ("cannot download http://127.0.0.1:1/weights.pt", "Connection refused"),
    ),
    "a-list": (EXPORT + "{list.pt}", 1, ("{list.pt} must hold a state dict", "holds list")),
    "number-key": (EXPORT + "{number-key.pt}", 1, ("{number-key.pt}",)),
    "nan-weights": (EXPORT + "{nan.pt}", 1, ("{nan.pt}", "NaN")),
    "sha256-of-the-packaged-one": (
        "export {other-sha256.toml} -o {out}",
        1,
        ("tiny.pt was altered: expected sha256 " + "0" * 64, "install edgesam-deploy again"),
    ),
    "address-refused": (
        "export {refused-url.toml} -o {out}",
        1,
        ("cannot download http://127.0.0.1:1/weights.pt", "Connection refused", "--checkpoint"),
    ),
}


@table(CHECKPOINTS)
def test_a_checkpoint_that_is_none(
    scene: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int, says: tuple[str, ...]
) -> None:
    monkeypatch.setenv("EDGESAM_CACHE", str(scene / "cache"))
    check(run(line, scene), code, says, scene)
    assert not (scene / "exploded").exists(), "the checkpoint's code was run"


def test_the_explosive_checkpoint_explodes_where_it_is_unpickled(scene: Path, tmp_path: Path) -> None:
    """Without this the rows with code could not fail."""
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Explosive(tmp_path / "exploded"), protocol=2))
    pickle.loads((tmp_path / "pickle.pt").read_bytes())
    assert (tmp_path / "exploded").exists()


NO_GRAPH = "is not a valid ONNX graph (truncated or damaged)"
GRAPHS: dict[str, Row] = {
    f"{name}-{command}": (f"{command} {{{name}.onnx}} -o {{out.onnx}}", 1, says)
    for command in ("simplify", "quantize")
    for name, says in {
        "cut": ("{cut.onnx} " + NO_GRAPH, "Run the stage that makes it again"),
        "empty": ("{empty.onnx} is empty; expected an ONNX graph", "Run the stage that makes it again"),
        "random": ("{random.onnx} " + NO_GRAPH,),
        "text": ("{text.onnx} " + NO_GRAPH,),
        "gone": ("cannot read the ONNX graph {gone.onnx}: No such file",),
        "no-nodes": ("{no-nodes.onnx}",),
    }.items()
} | {
    "three-axes-quantize": (
        "quantize {three-axes.onnx} -o {out.onnx}",
        1,
        ("{three-axes.onnx} is not an image encoder: expected one input 'image' (1,3,S,S) of uint8, got the inputs x",),
    ),
    "text-simplify": (
        "simplify {strings.onnx} -o {out.onnx}",
        1,
        ("input 'x' must be a tensor of numbers, is STRING",),
    ),
    "folder-simplify": ("simplify {few} -o {out.onnx}", 1, ("cannot read the ONNX graph {few}: Is a directory",)),
    "decoder-quantize": (
        "quantize {decoder.onnx} --calibration {enough} -o {out.onnx}",
        1,
        ("{decoder.onnx} is not an image encoder", "Give the encoder that `sam-export simplify` made"),
    ),
    "quantized-quantize": (
        "quantize {quantized.onnx} --calibration {enough} -o {out.onnx}",
        1,
        ("{quantized.onnx} is quantized already", "give the FP32 encoder"),
    ),
}


@table(GRAPHS)
def test_a_graph_that_is_none(scene: Path, line: str, code: int, says: tuple[str, ...]) -> None:
    check(run(line, scene), code, says, scene)
    assert not (scene / "out.onnx").exists()


IMAGES: dict[str, Row] = {
    "no-calibration-folder": (
        "quantize {encoder.onnx} --calibration {gone} -o {out.onnx}",
        1,
        ("{gone} is not a folder of images",),
    ),
    "empty-calibration-folder": (
        "quantize {encoder.onnx} --calibration {none} -o {out.onnx}",
        1,
        ("{none} holds no images; expected files ending in .bmp",),
    ),
    "empty-calibration-folder-build": (
        "build {tiny.toml} --calibration {none} -o {engines/none}",
        1,
        ("{none} holds no images; expected files ending in .bmp",),
    ),
    "calibration-is-a-file": (
        "quantize {encoder.onnx} --calibration {photo.jpg} -o {out.onnx}",
        1,
        ("{photo.jpg} is not a folder of images",),
    ),
    "broken-calibration-image": (
        "quantize {encoder.onnx} --calibration {broken} -o {out.onnx}",
        1,
        ("cannot read the image {broken/03.jpg}: image file is truncated",),
    ),
    "broken-calibration-image-build": (
        "build {tiny.toml} --calibration {broken} -o {engines/broken}",
        1,
        ("cannot read the image {broken/03.jpg}: image file is truncated",),
    ),
    "empty-verification-folder": (
        "build {tiny.toml} --images {none} -o {engines/none}",
        1,
        ("{none} holds no images",),
    ),
    "broken-verification-image": (
        "build {tiny.toml} --images {broken} -o {engines/none}",
        1,
        ("cannot read the image {broken/03.jpg}: image file is truncated",),
    ),
    "missing-image": ("predict {gone.jpg} --point 5,5", 1, ("cannot read the image {gone.jpg}: No such file",)),
    "image-folder": ("predict {few} --point 5,5", 1, ("cannot read the image {few}: Is a directory",)),
    "text-image": ("predict {text.jpg} --point 5,5", 1, ("{text.jpg} is not a readable image",)),
    "empty-image": ("predict {empty.jpg} --point 5,5", 1, ("{empty.jpg} is not a readable image",)),
    "cut-image": ("predict {cut.jpg} --point 5,5", 1, ("cannot read the image {cut.jpg}: image file is truncated",)),
    "cut-image-bench": ("bench {bundle} --image {cut.jpg}", 1, ("cannot read the image {cut.jpg}",)),
}


@table(IMAGES)
def test_images_that_are_none(scene: Path, line: str, code: int, says: tuple[str, ...]) -> None:
    check(run(line, scene), code, says, scene)


BUNDLES: dict[str, Row] = {
    f"{name}-{command}": (line, 1, says)
    for command, line_of in {
        "predict": "predict {{photo.jpg}} --point 5,5 --bundle {{{}}}",
        "verify": "verify {{{}}}",
        "bench": "bench {{{}}} --runs 1 --warmup 0",
    }.items()
    for name, says in {
        "flipped": ("bundle {flipped} is broken: encoder.onnx has sha256", "Build it again or copy it whole"),
        "incomplete": ("bundle {incomplete} is incomplete: decoder.onnx is missing", "Build it again"),
        "newer": ("{newer/manifest.json} has schema 2, this version reads schema 1: upgrade edgesam-deploy",),
        "geometry": ("{geometry/encoder.onnx} has other inputs or outputs", "Build the bundle again"),
        "gone": ("{gone} is not a bundle: it has no manifest.json", "the folder that `sam-export build` made"),
    }.items()
    for line in [line_of.format(name)]
} | {
    "no-images": ("verify {bundle} --images {gone}", 1, ("{gone} is not a folder of images",)),
    "recipe-unknown-here": ("verify {bundle} --images {few}", 2, ("unknown recipe 'tiny'",)),
    "no-checkpoint": (
        "verify {renamed} --images {few} --checkpoint {gone.pt}",
        1,
        ("checkpoint {gone.pt} does not exist",),
    ),
    "another-checkpoint": (
        "verify {renamed} --images {few} --checkpoint {text.pt}",
        1,
        ("{text.pt} is not the checkpoint that {renamed} was built from", "--checkpoint"),
    ),
}


@table(BUNDLES)
def test_a_bundle_that_is_none(scene: Path, line: str, code: int, says: tuple[str, ...]) -> None:
    check(run(line, scene), code, says, scene)


BELOW_A_FILE = ("cannot write {a-file}/x", "{a-file} is not a folder")
OUTPUTS: dict[str, Row] = {
    "build": ("build {tiny.toml} -o {a-file/x}", 1, ("cannot use the work folder {a-file/.stages/x}", "--output")),
    "build-on-a-file": (
        "build {tiny.toml} -o {a-file}",
        1,
        ("{a-file}: it is a file, not a folder", "another --output"),
    ),
    "build-on-other-files": (
        "build {tiny.toml} -o {holiday}",
        1,
        ("{holiday}: the folder holds other files and no manifest.json", "another --output"),
    ),
    "build-without-a-name": ("build {tiny.toml} -o .", 1, ("to '.': give the folder by its name",)),
    "export": ("export {tiny.toml} -o {a-file/x}", 1, BELOW_A_FILE),
    "simplify": ("simplify {encoder.onnx} -o {a-file/x.onnx}", 1, BELOW_A_FILE),
    "simplify-onto-a-folder": ("simplify {encoder.onnx} -o {few}", 1, ("cannot write {few}: is a folder",)),
    "quantize": ("quantize {encoder.onnx} --calibration {enough} -o {a-file/x.onnx}", 1, BELOW_A_FILE),
    "predict": (CLICK + " -o {a-file/x.png}", 1, BELOW_A_FILE),
    "predict-mask": (CLICK + " --save-mask {a-file/x.png}", 1, BELOW_A_FILE),
    "predict-onto-a-folder": (CLICK + " -o {few}", 1, ("cannot tell the picture format of {few}",)),
    "unknown-suffix": (CLICK + " -o {out.xyz}", 1, ("cannot tell the picture format of {out.xyz}", ".png or .jpg")),
    "no-suffix": (CLICK + " --save-mask {out}", 1, ("cannot tell the picture format of {out}", ".png or .jpg")),
    "suffix-that-cannot-be-written": (CLICK + " -o {out.hdf}", 1, ("cannot encode {out.hdf}", ".png or .jpg")),
}


@table(OUTPUTS)
def test_an_output_that_cannot_be_written(scene: Path, line: str, code: int, says: tuple[str, ...]) -> None:
    check(run(line, scene), code, says, scene)
    assert (scene / "a-file").read_text() == "in the way"
    assert [p.name for p in (scene / "holiday").iterdir()] == ["beach.jpg"]


def test_a_missed_threshold_is_exit_code_3_after_the_whole_answer(scene: Path) -> None:
    """No INT8 bundle agrees with FP32 on every pixel."""
    result = run("verify {one-image} --min-iou 1.0", scene)
    check(result, 3, ("mask IoU 0.", "of {one-image} is below 1"), scene)
    assert "threshold 1: missed" in result.stdout


def test_a_missed_threshold_leaves_stdout_to_the_json(scene: Path) -> None:
    result = run("verify {one-image} --min-iou 1.0 --json", scene)
    check(result, 3, ("is below 1",), scene)
    assert json.loads(result.stdout)["passed"] is False


def test_the_scene_itself_is_in_order(scene: Path, tmp_path: Path) -> None:
    """What the tables damage works undamaged, so that it is the damage that fails there."""
    result = run(f"{CLICK} -o {tmp_path}/out.png --save-mask {tmp_path}/mask.png", scene)
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.png", "out.png"]
    result = run(f"simplify {{three-axes.onnx}} -o {tmp_path}/foreign.onnx", scene)
    assert result.exit_code == 0, "a foreign graph with three dynamic axes"
    for command in ("simplify", "quantize --calibration {enough} --recipe {tiny.toml}"):
        result = run(f"{command} {{encoder.onnx}} -o {tmp_path}/out.onnx", scene)
        assert result.exit_code == 0, result.output


USAGE: dict[str, tuple[str, str]] = {
    "unknown-command": ("deploy", "No such command 'deploy'"),
    "budget-out-of-range": ("build --min-iou 1.5", "1.5 is not in the range"),
    "unknown-option": ("build --fast", "No such option '--fast'"),
    "unknown-group-option": ("--fast", "No such option '--fast'"),
    "missing-image": ("predict", "Missing argument 'IMAGE'"),
    "missing-output": ("simplify {encoder.onnx}", "Missing option '-o'"),
    "surplus-argument": ("models reference cpu", "unexpected extra argument"),
    "no-prompt": ("predict {photo.jpg}", "give at least one --point X,Y[,LABEL] or --box X0,Y0,X1,Y1"),
    "points-and-boxes": (
        "predict {photo.jpg} --point 5,5 --box 1,1,9,9 --box 2,2,8,8",
        "points go with one --box at most",
    ),
    "point-of-one": ("predict {photo.jpg} --point 5", "'--point': expected numbers as X,Y[,LABEL], got '5'"),
    "point-of-four": ("predict {photo.jpg} --point 1,2,3,4", "'--point': expected numbers as X,Y[,LABEL]"),
    "point-of-letters": ("predict {photo.jpg} --point a,b", "expected numbers as X,Y[,LABEL], got 'a,b'"),
    "point-of-nothing": ("predict {photo.jpg} --point ''", "expected numbers as X,Y[,LABEL], got ''"),
    "point-with-a-gap": ("predict {photo.jpg} --point 1,,2", "expected numbers as X,Y[,LABEL], got '1,,2'"),
    "box-of-three": ("predict {photo.jpg} --box 1,2,3", "'--box': expected numbers as X0,Y0,X1,Y1, got '1,2,3'"),
    "unknown-encoding": ("quantize {encoder.onnx} --encoding gpu -o {out}", "'gpu' is not one of 'cpu', 'tensorrt'"),
    "no-threads": ("predict {photo.jpg} --point 5,5 --threads 0", "'--threads': 0 is not in the range"),
    "too-many-threads": ("bench {bundle} --threads 100000", "'--threads': 100000 is not in the range"),
    "no-runs": ("bench {bundle} --runs 0", "'--runs': 0 is not in the range"),
    "threshold-above-1": ("verify {bundle} --min-iou 93", "'--min-iou': 93.0 is not in the range"),
    "threshold-nan": ("verify {bundle} --min-iou nan", "'--min-iou': nan is not in the range"),
    "licence-without-images": ("verify {bundle} --accept-license", "--checkpoint goes with --images"),
    "checkpoint-without-images": ("verify {bundle} --checkpoint {gone.pt}", "--checkpoint goes with --images"),
}


@pytest.mark.parametrize(("line", "says"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_clicks_own_message(scene: Path, line: str, says: str) -> None:
    result = run(line, scene)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("Usage: sam-export")
    assert lines[-1].startswith("Error: ")
    assert says in lines[-1]


# What follows needs a process of its own.


def run_alone(line: str, scene: Path, setup: str = "") -> subprocess.CompletedProcess[str]:
    """``python -m edgesam_deploy`` in a new process; setup: Python statements that run before it."""
    words = [fill(word, scene) for word in shlex.split(line)]
    module = ["-m", "edgesam_deploy"]
    if setup:
        module = [
            "-c",
            f"{setup}\nimport runpy\nrunpy.run_module('edgesam_deploy', run_name='__main__', alter_sys=True)",
        ]
    return subprocess.run(
        [sys.executable, *module, *words], capture_output=True, text=True, check=False, timeout=120, cwd=scene
    )


def check_alone(done: subprocess.CompletedProcess[str], code: int, says: tuple[str, ...], scene: Path) -> None:
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in says:
        assert fill(part, scene) in lines[0]
    assert done.returncode == code
    assert not list(scene.rglob(".unfinished-*"))


ALONE = {
    "unknown-recipe": REQUESTS["unknown-recipe"],
    "nan-point": REQUESTS["nan-point"],
    "newer-bundle": BUNDLES["newer-predict"],
    "code-in-a-checkpoint": CHECKPOINTS["code"],
    "cut-graph": GRAPHS["cut-simplify"],
    "code-in-a-newer-pickle": (EXPORT + "{pickle-4.pt}", 1, ("{pickle-4.pt} " + REFUSED,)),
}


@table(ALONE)
def test_in_a_process_of_its_own_it_is_the_same(scene: Path, line: str, code: int, says: tuple[str, ...]) -> None:
    """Warnings of other libraries would show here."""
    check_alone(run_alone(line, scene), code, says, scene)
    assert not (scene / "exploded").exists(), "the checkpoint's code was run"


def limited(size_bytes: int) -> str:
    """Files may not grow larger: the system refuses in the middle of a write, as it does on a full disk."""
    return f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size_bytes}, {size_bytes}))"


LIMITED: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "picture": (CLICK + " -o {full.png}", 4096, ("cannot write {full.png}: File too large", "nothing was changed")),
    "stage": (
        "build {tiny.toml} -o {engines/limit-stage}",
        1 << 20,
        ("cannot write {engines}/.stages/limit-stage/", "File too large"),
    ),
    "bundle": (
        "build {tiny.toml} -o {engines/limit-bundle}",
        1 << 20,
        ("cannot write {engines/limit-bundle}: File too large", "nothing was changed there"),
    ),
    "temporary-graph": (
        "quantize {encoder.onnx} --calibration {enough} -o {out.onnx}",
        1 << 20,
        ("File too large",),
    ),
}


@pytest.mark.parametrize(("line", "size_bytes", "says"), LIMITED.values(), ids=LIMITED)
def test_a_full_disk_is_one_line_and_what_was_there_stays(
    scene: Path, line: str, size_bytes: int, says: tuple[str, ...]
) -> None:
    (scene / "full.png").write_bytes(b"the old picture")
    check_alone(run_alone(line, scene, limited(size_bytes)), 1, says, scene)
    assert (scene / "full.png").read_bytes() == b"the old picture"
    for name in ("limit-stage", "limit-bundle"):
        assert load_bundle(scene / "engines" / name).recipe == "tiny"


WITHOUT: dict[str, tuple[str, str, str]] = {
    "export": ("export {tiny.toml} -o {out}", "torch", "export"),
    "build": ("build {tiny.toml} -o {engines/x}", "torch", "export"),
    "simplify": ("simplify {encoder.onnx} -o {out.onnx}", "onnx", "export"),
    "quantize": ("quantize {encoder.onnx} -o {out.onnx}", "onnx", "export"),
    "verify-images": ("verify {renamed} --images {few}", "torch", "export"),
    "predict": (CLICK, "onnxruntime", "cpu"),
    "bench": ("bench {bundle} --runs 1", "onnxruntime", "cpu"),
}


@pytest.mark.parametrize(("line", "package", "extra"), WITHOUT.values(), ids=WITHOUT)
def test_a_missing_extra_names_the_command_that_installs_it(scene: Path, line: str, package: str, extra: str) -> None:
    done = run_alone(line, scene, f"import sys\nsys.modules[{package!r}] = None")
    check_alone(done, 1, (f"'{package}', which is not installed", f"pip install 'edgesam-deploy[{extra}]'"), scene)


def test_a_reader_that_has_gone_is_no_error(scene: Path) -> None:
    """As in ``sam-export models | head -0``."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "edgesam_deploy", "models", "--json"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_no_space_for_temporary_files_is_one_line(scene: Path) -> None:
    """An error of the system that no stage expects still ends in one line."""
    nowhere = "import tempfile\ntempfile.tempdir = '/proc/nowhere'"
    done = run_alone("quantize {encoder.onnx} --calibration {enough} -o {out.onnx}", scene, nowhere)
    check_alone(done, 1, ("No such file or directory", "/proc/nowhere"), scene)
