"""Stage 3a: run calibration images through the FP32 encoder and record how large each tensor gets.

Images are fed one by one and only histograms are kept, so memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from edgesam_deploy.contract import IMAGE
from edgesam_deploy.errors import GraphError, InputError
from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.recipe import Pixels
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.transforms import to_encoder_input

MIN_IMAGES = 32
_BINS = 2048


@dataclass(frozen=True, slots=True)
class Ranges:
    """What calibration saw. absmax: largest |x| per tensor. amax: the |x| that the chosen percentile covers."""

    images: int
    images_digest: str
    percentile: float
    graph_sha256: str
    absmax: Mapping[str, float]
    amax: Mapping[str, float]


class Histogram:
    """Counts of |x| in equal bins from 0; when a larger value comes, the range doubles and bins merge in pairs."""

    def __init__(self) -> None:
        self.limit = 0.0
        self.absmax = 0.0
        self.counts = np.zeros(_BINS, dtype=np.int64)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Add an array of any shape. Raises GraphError for values that are not finite."""
        magnitudes = np.abs(values).ravel()
        top = float(magnitudes.max(initial=0.0))
        if not np.isfinite(top):
            raise GraphError("calibration met a value that is not finite in FP32; the checkpoint is damaged")
        self.absmax = max(self.absmax, top)
        if self.limit == 0.0:
            self.limit = top
        while 0.0 < self.limit < top:
            self.limit *= 2
            half = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([half, np.zeros(_BINS - half.size, dtype=np.int64)])
        if self.limit > 0.0:
            bins = np.minimum((magnitudes * np.float32(_BINS / self.limit)).astype(np.int32), _BINS - 1)
            self.counts += np.bincount(bins, minlength=_BINS)

    def percentile(self, percent: float) -> float:
        """The smallest bin edge that covers ``percent`` of the values; never above the largest value seen."""
        if percent >= 100.0 or self.absmax == 0.0:
            return self.absmax
        covered = np.cumsum(self.counts)
        index = int(np.searchsorted(covered, covered[-1] * percent / 100.0))
        return min(self.absmax, (index + 1) * self.limit / _BINS)


def calibrate(
    graph: Path,
    images: Path | Sequence[Path],
    output: Path,
    pixels: Pixels,
    percentile: float,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> Ranges:
    """Write the ranges of every activation of an encoder graph as JSON.

    graph: a simplified FP32 encoder (uint8 image in). images: files, or a folder of at least ``MIN_IMAGES``.
    percentile: share of values, in percent, that a scale must cover; 100 takes the maximum.
    progress: wraps the iteration over images, for a progress bar.
    """
    paths = calibration_images(images) if isinstance(images, Path) else list(images)
    model = graphs.load(graph)
    size = _image_size(model, graph)
    names = activations(model)
    histograms = {name: Histogram() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        watched = watch(model, names, Path(folder) / "watched.onnx")
        with open_session(watched) as session:
            for path in progress(paths):
                feeds = {IMAGE: to_encoder_input(read_image(path), size, pixels.padding)}
                for name, value in session.run(feeds).items():
                    histograms[name].add(value)
    ranges = Ranges(
        images=len(paths),
        images_digest=images_digest(paths),
        percentile=percentile,
        graph_sha256=sha256_file(graph),
        absmax={name: h.absmax for name, h in histograms.items()},
        amax={name: h.percentile(percentile) for name, h in histograms.items()},
    )
    write_json(output, asdict(ranges))
    return ranges


def calibration_images(folder: Path) -> list[Path]:
    """The images of a calibration set. Raises InputError if they are too few to be trusted, ImageError if none."""
    paths = list_images(folder)
    if len(paths) < MIN_IMAGES:
        raise InputError(
            f"calibration needs at least {MIN_IMAGES} images to be trusted, {folder} holds {len(paths)}: "
            "add photographs"
        )
    return paths


def load_ranges(path: Path) -> Ranges:
    """Read what ``calibrate`` wrote. Raises GraphError if it is not that."""
    try:
        return Ranges(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise GraphError(f"{path} is not a file of calibration ranges: {error}. Calibrate again") from error


def images_digest(paths: Sequence[Path]) -> str:
    """sha256 over the images' own sha256, in order: the identity of a calibration set."""
    return hashlib.sha256("".join(sha256_file(p) for p in paths).encode()).hexdigest()


def _image_size(model: onnx.ModelProto, path: Path) -> int:
    """S of an FP32 image encoder. Raises GraphError for any other graph."""
    shapes: dict[str, list[int]] = {
        i.name: [d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in model.graph.input
        if i.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    }
    shape = shapes.get(IMAGE, [])
    if len(model.graph.input) != 1 or len(shape) != 4 or shape[2] != shape[3] or not shape[3]:
        found = ", ".join(i.name for i in model.graph.input) or "none"
        raise GraphError(
            f"{path} is not an image encoder: expected one input '{IMAGE}' (1,3,S,S) of uint8, got the inputs {found}. "
            "Give the encoder that `sam-export simplify` made"
        )
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise GraphError(f"{path} is quantized already: give the FP32 encoder that `sam-export simplify` made")
    return shape[3]


def activations(model: onnx.ModelProto) -> list[str]:
    """Every float32 tensor that a node writes; integer ones have no scale."""
    inferred = onnx.shape_inference.infer_shapes(model)
    floats = {
        v.name
        for v in (*inferred.graph.value_info, *inferred.graph.output)
        if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    return [name for node in model.graph.node for name in node.output if name in floats]


def watch(model: onnx.ModelProto, names: Sequence[str], path: Path) -> Path:
    """A copy of the graph that returns ``names`` too."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in names:
        watched.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    path.write_bytes(watched.SerializeToString())
    return path
