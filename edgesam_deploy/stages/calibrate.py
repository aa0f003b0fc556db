"""Stage 3a: run calibration images through the FP32 graphs and record how large each tensor gets.

One pass serves both precisions: FP16 needs every tensor's largest |x|, INT8 the distribution of those it may quantize.
Memory does not grow with the number of images (they are fed one by one into histograms) nor with the model: largest
values are taken inside the graph, and tensors that go into histograms are fetched ``_PASS_BYTES`` at a time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgesam_deploy.contract import IMAGE, GraphContract, contracts
from edgesam_deploy.errors import GraphError, InputError
from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.measure.accuracy import default_prompts
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.recipe import Int8Rules, Recipe
from edgesam_deploy.runtime import Session, SessionOptions, Tensor, open_session
from edgesam_deploy.stages import external_data
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.histogram import Histogram
from edgesam_deploy.stages.placement import quantizable
from edgesam_deploy.transforms import to_encoder_input

MIN_IMAGES = 32
_PASS_BYTES = 1 << 30
# Sizes of dynamic axes for that sum: prompts, points and what follows from them.
_DYNAMIC = 8


@dataclass(frozen=True, slots=True)
class Ranges:
    """What calibration saw of one graph.

    absmax: largest |x| of every float tensor that a node writes or that is fed. amax: the |x| that a scale covers, by
    calibrator and percentile (``recipe.Int8Rules``), for tensors that may be quantized.
    """

    images: int
    images_digest: str
    calibrator: str
    percentile: float
    graph_sha256: str
    absmax: Mapping[str, float]
    amax: Mapping[str, float]


def calibrate(
    sources: Mapping[str, Path],
    images: Sequence[Path],
    recipe: Recipe,
    rules: Int8Rules,
    output: Path,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> dict[str, Ranges]:
    """Ranges of the simplified FP32 graphs ``encoder`` and, if it is given, ``decoder``, also written as JSON.

    The decoder answers the default clicks and boxes, and then the masks of its own answers. progress: wraps the
    iteration over images, for a progress bar. Raises GraphError for other graphs and for values that are not finite.
    """
    expected = contracts(recipe.geometry)
    image_size = _image_size(graphs.load(sources["encoder"], weights=False), sources["encoder"])
    padding = (recipe.pixels.padding, recipe.geometry.resize)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        watching = {
            name: stack.enter_context(_watching(source, rules, expected[name], Path(folder) / name))
            for name, source in sources.items()
        }
        for path in progress(images):
            if "decoder" not in watching:
                feeds = {IMAGE: to_encoder_input(read_image(path), image_size, *padding)}
                watching["encoder"].run(feeds)
                continue
            _ask(Predictor(watching["encoder"], watching["decoder"], recipe.geometry, recipe.pixels), path)
    digest = images_digest(images)
    ranges = {
        name: Ranges(
            images=len(images),
            images_digest=digest,
            calibrator=rules.calibrator,
            percentile=rules.percentile,
            graph_sha256=sha256_file(sources[name]),
            absmax=session.absmax,
            amax={t: h.amax(rules.calibrator, rules.percentile) for t, h in session.histograms.items()},
        )
        for name, session in watching.items()
    }
    write_json(output, {name: asdict(r) for name, r in ranges.items()})
    return ranges


def _ask(predictor: Predictor, path: Path) -> None:
    """The default clicks, then their masks as prompts, then the default boxes."""
    image = read_image(path)
    predictor.set_image(image)
    hw = (image.shape[0], image.shape[1])
    points, boxes = default_prompts(hw)
    clicks = check_prompts(points[:, None], np.ones((len(points), 1)), None, hw)
    masks = predictor.decode(clicks)[0]
    if predictor.geometry.mask_input:
        predictor.decoder.run(predictor.decoder_feeds(clicks, masks[:, :1]))
    predictor.decode(check_prompts(None, None, boxes, hw))


def calibration_images(folder: Path) -> list[Path]:
    """The images of a calibration set. Raises InputError if they are too few to be trusted, ImageError if none."""
    paths = list_images(folder)
    if len(paths) < MIN_IMAGES:
        raise InputError(
            f"calibration needs at least {MIN_IMAGES} images to be trusted, {folder} holds {len(paths)}: "
            "add photographs"
        )
    return paths


def load_ranges(path: Path) -> dict[str, Ranges]:
    """Read what ``calibrate`` wrote. Raises GraphError if it is not that."""
    try:
        return {name: Ranges(**entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
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


@contextmanager
def _watching(source: Path, rules: Int8Rules, contract: GraphContract, folder: Path) -> Iterator[_Watching]:
    """A session of a graph that returns what the graph returns and remembers how large its tensors get."""
    model = graphs.load(source)
    sizes = _float_tensors(model)
    wanted = quantizable(model, rules)
    passes = _passes({name: size for name, size in sizes.items() if name in wanted})
    folder.mkdir()
    with ExitStack() as stack:
        sessions = []
        for index, names in enumerate(passes):
            maxima = [name for name in sizes if name not in wanted] if index == 0 else []
            watched = _watched(model, names, maxima, contract, folder / f"{index}.onnx")
            sessions.append(stack.enter_context(open_session(watched, options=SessionOptions(frugal=True))))
        yield _Watching(sessions, contract, wanted & {*sizes, *(spec.name for spec in contract.inputs)})


class _Watching:
    """A session behind several: each returns the contract's outputs and tensors, or maxima, of its own."""

    def __init__(self, inner: Sequence[Session], contract: GraphContract, wanted: Iterable[str]) -> None:
        self.absmax: dict[str, float] = {}
        self.histograms = {name: Histogram() for name in sorted(wanted)}
        self._inner = inner
        self._contract = contract

    def __enter__(self) -> _Watching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def specs(self) -> GraphContract:
        return self._contract

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, value in feeds.items():
            self._remember(name, value)
            if name in self.histograms:
                self.histograms[name].add(value)
        outputs: dict[str, Tensor] = {}
        for session in self._inner:
            outputs |= session.run(feeds)
        seen = self.histograms.keys() & outputs.keys()
        for name in seen:
            self.histograms[name].add(outputs[name])
        for name, value in outputs.items():
            self._remember(name.removesuffix(_HIGH).removesuffix(_LOW), value)
        return {spec.name: outputs[spec.name] for spec in self._contract.outputs}

    def _remember(self, name: str, value: Tensor) -> None:
        array = np.asarray(value)
        largest = max(abs(float(array.max(initial=0))), abs(float(array.min(initial=0))))
        if not np.isfinite(largest):
            raise GraphError(f"the tensor '{name}' is not finite in FP32; the checkpoint is damaged")
        self.absmax[name] = max(largest, self.absmax.get(name, 0.0))


_HIGH, _LOW = ":watched_max", ":watched_min"


def _watched(
    model: onnx.ModelProto, names: Sequence[str], maxima: Sequence[str], contract: GraphContract, path: Path
) -> Path:
    """A copy of the graph that returns ``names`` too, and the largest and smallest value of ``maxima``."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = [*names, *(spec.name for spec in contract.outputs if spec.name not in names)]
    nodes: list[onnx.NodeProto] = []
    wanted = set(maxima)
    for node in model.graph.node:
        nodes.append(node)
        # Right behind what writes it: the runtime goes through the nodes in this order and frees what it has used up.
        for name in wanted.intersection(node.output):
            for suffix, operator in ((_HIGH, "ReduceMax"), (_LOW, "ReduceMin")):
                nodes.append(helper.make_node(operator, [name], [name + suffix], name=name + suffix, keepdims=0))
                outputs.append(name + suffix)
    graphs.replace_nodes(watched, nodes)
    del watched.graph.output[:]
    for name in outputs:
        watched.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    external_data.write(watched, path)
    return path


def _float_tensors(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes by name of every float32 tensor that a node writes, in graph order; integer ones have no scale."""
    inferred = graphs.inferred(model)
    sizes = {
        v.name: 4 * int(np.prod([d.dim_value or _DYNAMIC for d in v.type.tensor_type.shape.dim], dtype=np.int64))
        for v in (*inferred.graph.value_info, *inferred.graph.output)
        if v.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    return {name: sizes[name] for node in model.graph.node for name in node.output if name in sizes}


def _passes(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in groups of at most ``_PASS_BYTES``, one group at least."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > _PASS_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
