"""What graphs ask of a device: MACs against torch's own count, and what boundaries between precisions cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.measure.roofline import Efficiency, peak
from edgesam_deploy.recipe import Int8Rules, PrecisionRules, load_recipe
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.node_work import graph_cost, kernels, node_macs
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import load_target

DEVICE = load_target("orin-nano-8gb").devices[0]
NO_LAUNCH = Efficiency(launch_ms=0.0)


def test_macs_are_what_torch_counts(built: SimpleNamespace, tiny_recipe: Path, checkpoint: Path) -> None:
    """FlopCounterMode counts two operations for a multiply-add, in the model as PyTorch runs it."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    from torch.utils.flop_counter import FlopCounterMode

    from edgesam_deploy.models import graph_modules
    from edgesam_deploy.models.checkpoint import load_model

    modules = graph_modules(load_model(load_recipe(tiny_recipe), checkpoint), load_recipe(tiny_recipe))
    for name, module in zip(("encoder", "decoder"), modules, strict=True):
        source = built.stages / f"simplify-{name}" / f"{name}.onnx"
        feeds = graphs.example_feeds(graphs.load(source))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*(torch.from_numpy(value) for value in feeds.values()))
        assert 2 * sum(node_macs(source, prompts=2, points=3).values()) == counter.get_total_flops()


def chain(folder: Path) -> Path:
    """x (1,8,16,16) -> Conv 3×3 a -> Relu -> Conv 3×3 b -> Conv 3×3 c -> + a's -> y, all of 8 channels."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(8, 8, 3, 3)).astype(np.float32), f"w{n}") for n in "abc"]
    nodes = [
        helper.make_node("Conv", ["x", "wa"], ["ta"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["ta"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "wb"], ["tb"], name="b", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["tb", "wc"], ["tc"], name="c", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["tc", "r"], ["y"], name="add"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8, 16, 16]) for n in "xy"]
    path = folder / "chain.onnx"
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    return path


DATA, WEIGHT = 8 * 16 * 16, 8 * 8 * 9  # elements of a tensor, of a weight


@pytest.mark.parametrize(
    ("int8", "rows"),
    [
        # Activations behind Relu and Add are computed by the convolution before them.
        ((), [("a", "fp16", 2 * (2 * DATA + WEIGHT)), ("b", "fp16", 2 * (2 * DATA + WEIGHT)),
              ("c", "fp16", 2 * (3 * DATA + WEIGHT))]),
        # b alone: r is read in float too, so its Q is a kernel of its own; b writes halves for c.
        (("b",), [("a", "fp16", 2 * (2 * DATA + WEIGHT)), ("r:q", "int8", 3 * DATA), ("b", "int8", 3 * DATA + WEIGHT),
                  ("c", "fp16", 2 * (3 * DATA + WEIGHT))]),
        # b and c: between them INT8; c reads r for the addition behind the same Q, and so does b.
        (("b", "c"), [("a", "fp16", 2 * (DATA + WEIGHT) + DATA), ("b", "int8", 2 * DATA + WEIGHT),
                      ("c", "int8", 4 * DATA + WEIGHT)]),
    ],
    ids=["none", "one", "two"],
)  # fmt: skip
def test_boundaries_between_precisions_cost_bytes(
    tmp_path: Path, int8: tuple[str, ...], rows: list[tuple[str, str, int]]
) -> None:
    source = chain(tmp_path)
    limits = dict.fromkeys(("x", "ta", "r", "tb", "tc", "y"), 1.0)
    ranges = Ranges(1, "", "minmax", 100.0, sha256_file(source), limits, limits)
    how = Typing("tensorrt", "fp16")
    type_graph(source, ranges, PrecisionRules(), Int8Rules(), how, tmp_path / "t.onnx", int8)
    found = [k for k in kernels(graphs.load(tmp_path / "t.onnx")) if not k.node.startswith("graph_")]
    casts = [k for k in found if "cast" in k.node.lower()]
    found = [k for k in found if k not in casts]
    assert [(k.node, k.precision) for k in found] == [row[:2] for row in rows]
    assert {k.node: k.operations for k in found if k.operations} == dict.fromkeys("abc", 2 * DATA * 8 * 9)
    ends = {"c": 2 * DATA} if not casts else {}
    for kernel, (name, _, expected) in zip(found, rows, strict=True):
        # The graph's own output is FP32, cast by the kernel that computes it.
        assert kernel.bytes in (expected, expected + ends.get(name, 0)), name


def test_a_shape_that_depends_on_values_is_an_error(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["y"], name="n")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1, None])],
    )
    path = tmp_path / "net.onnx"
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    with pytest.raises(GraphError, match="depends on values"):
        node_macs(path)


def test_int8_pays_on_the_reference(built: SimpleNamespace) -> None:
    """Fewer bytes, more operations a second: between the peaks' ratio and nothing at all."""
    source = built.stages / "simplify-encoder" / "encoder.onnx"
    typed = built.stages / "quantize-encoder" / "encoder.onnx"
    before, after = (graph_cost(path, DEVICE, NO_LAUNCH) for path in (source, typed))
    assert sum(k.operations for k in before.nodes) == sum(k.operations for k in after.nodes)
    assert 1.5 < before.ms / after.ms < peak(DEVICE, "int8") / peak(DEVICE, "fp32")
