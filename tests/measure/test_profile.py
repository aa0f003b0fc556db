"""Counts against hand-computed and published figures, the other counters against ours, and what a worker measures."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="profiling needs the export extra")
onnx = pytest.importorskip("onnx", reason="profiling needs the export extra")

from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.profile import ENCODER, Latency, ModelProfile, Part, markdown, models_table, parts_table
from edgesam_deploy.measure.profile_chart import Bubble, chart
from edgesam_deploy.recipe import load_recipe
from edgesam_deploy.stages.profile import ProfileOptions, build_network, profile, sized
from edgesam_deploy.stages.profile_checks import _compare, _patched
from edgesam_deploy.stages.profile_count import Tally, Work, count
from edgesam_deploy.stages.profile_graph import profile_graph
from edgesam_deploy.stages.profile_parts import halves, stages
from edgesam_deploy.stages.profile_worker import checked, resident_mb


class Each(nn.Module):
    """One of every kind of product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.linear = nn.Linear(6, 10)
        self.table = nn.Parameter(torch.zeros(10, 4))
        self.never = nn.Linear(7, 7)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.linear(self.up(self.depthwise(self.conv(image))).flatten(2).transpose(1, 2))
        short = tokens[:, :9]
        attended = F.scaled_dot_product_attention(short, short, short) + torch.bmm(short @ short.transpose(1, 2), short)
        return torch.einsum("bnc,cd->bnd", attended, self.table)


# (B,3,16,20) -> (B,8,8,10) -> (B,8,8,10) -> (B,6,16,20) -> (B,320,10), of which 9 tokens attend.
CONVOLUTIONS = 8 * 8 * 10 * 3 * 9 + 8 * 8 * 10 * 25 + 8 * 8 * 10 * 6 * 4
LINEARS = 320 * 6 * 10 + 9 * 10 * 4
PRODUCTS = 2 * (2 * 9 * 9 * 10)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_by_hand(device: str, batch: int) -> None:
    with torch.device(device):
        module, image = Each().eval(), torch.zeros(batch, 3, 16, 20)
    tally = count(module, [image], {"all": module})
    kinds = {
        kind: sum(n for work, n in tally.macs.items() if work.kind == kind) for kind in {w.kind for w in tally.macs}
    }
    assert kinds == {
        "convolution": batch * CONVOLUTIONS,
        "linear": batch * LINEARS,
        "product": batch * PRODUCTS,
    }
    by_module = {name: sum(n for w, n in tally.macs.items() if w.module == name) for name in ("conv", "up", "linear")}
    assert by_module == {
        "conv": batch * 8 * 80 * 27,
        "up": batch * 8 * 80 * 24,
        "linear": batch * 320 * 60,
    }
    unread = {name for name, parameter in module.named_parameters() if id(parameter) not in tally.read}
    assert unread == {"never.weight", "never.bias"}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y.relu() + y  # y, its ReLU and the sum are alive together, besides the input
        y = self.second(y.transpose(2, 3).view(1, 4, -1, 1))  # views; the sum and the smaller map
        return y.relu_()  # in place


def test_activation_memory_by_hand() -> None:
    with torch.device("meta"):
        module, x = Chain(), torch.zeros(1, 4, 10, 1)
    size = 4 * 4 * 10
    tally = count(module, [x], {"first": module.first, "second": module.second})
    assert dict(tally.activation_bytes) == {"first": 3 * size, "second": size // 2}
    assert tally.peak_bytes == {"first": 4 * size, "second": 2 * size + size // 2}


def test_attention_that_pytorch_would_run_in_one_operator() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    x = torch.zeros(1, 3, 8)
    tally = count(layer, [x, x, x], {"all": layer})
    assert sum(tally.macs.values()) == 3 * 8 * 24 + 2 * (3 * 3 * 8) + 3 * 8 * 8


# recipe: (published millions of parameters of the whole, None where others are counted;
# (with the decoder? with products of activations, as in attention? published GMACs), …)
# Sources: https://github.com/mit-han-lab/efficientvit (applications/efficientvit_sam/README.md, Table 1): the encoder;
# https://github.com/xinghaochen/TinySAM (README): 487, 2976; https://arxiv.org/abs/2312.05284 (SlimSAM, Table 1): 372;
# https://github.com/chongzhou96/EdgeSAM (README): 641.1, 9.6, 2734.8, 38.2 and 22.1. The last two leave out products of
# activations, as SAM ViT-H's figures show.
PUBLISHED: dict[str, tuple[float | None, tuple[tuple[bool, bool, float], ...]]] = {
    "efficientvit_sam_l0": (34.8, ((False, True, 35),)),
    "sam_vit_b": (None, ((True, True, 487), (True, False, 372))),
    "sam_vit_h": (641.1, ((True, True, 2976), (True, False, 2734.8))),
    "mobile_sam": (None, ((True, False, 38.2),)),
    "edge_sam": (9.6, ((True, False, 22.1),)),
}


@pytest.mark.parametrize(("recipe", "params_m", "figures"), [(k, *v) for k, v in PUBLISHED.items()], ids=PUBLISHED)
def test_published_counts(recipe: str, params_m: float | None, figures: tuple[tuple[bool, bool, float], ...]) -> None:
    """Multiply-adds to 1.5 %, parameters to the last printed digit; and no weight takes memory meanwhile."""
    before = resident_mb("VmHWM")
    (found,) = profile(load_recipe(recipe), ProfileOptions(latency=False))
    assert resident_mb("VmHWM") - before < 600
    assert found.counted_on == "meta"
    for decoder, products, macs_g in figures:
        kinds = ("convolution", "linear", *(("product",) if products else ()))
        parts = found.parts if decoder else found.parts[:1]
        assert sum(part.macs[kind] for part in parts for kind in kinds) / 1e9 == pytest.approx(macs_g, rel=0.015)
    if params_m is not None:
        assert round(found.parameters / 1e6, 1) == params_m
    assert sum(stage.total_macs for stage in found.stages) == found.encoder.total_macs


def test_what_mobile_sam_carries_and_never_reads() -> None:
    """Its classifier, and the bias tables that it keeps gathered; the rest is the 9.8 M of EdgeSAM's README."""
    (found,) = profile(load_recipe("mobile_sam"), ProfileOptions(latency=False))
    tables = sum(depth * heads * window**2 for depth, heads, window in ((2, 4, 7), (6, 5, 14), (2, 10, 7)))
    assert found.unused == 320 * 1000 + 1000 + 2 * 320 + tables
    assert (found.parameters - found.unused) / 1e6 == pytest.approx(9.8, abs=0.05)
    assert [stage.name for stage in found.stages] == ["patch_embed", *(f"layers.{i}" for i in range(4)), "neck"]


class Block(nn.Sequential):
    def __init__(self, width: int = 4) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU())


class Tree(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def leaf() -> nn.Linear:
    return nn.Linear(2, 2)


TREES = {
    "children": (Tree(a=leaf(), b=leaf(), c=leaf()), ["a", "b", "c"]),
    "blocks": (
        Tree(embed=leaf(), blocks=nn.ModuleList(Block() for _ in range(2)), neck=leaf()),
        ["embed", "blocks.0", "blocks.1", "neck"],
    ),
    "single-layers-stay": (
        Tree(a=leaf(), b=leaf(), neck=nn.Sequential(nn.Linear(9, 9), nn.ReLU())),
        ["a", "b", "neck"],
    ),
    "wrapped": (Tree(trunk=Tree(a=leaf(), b=leaf(), c=leaf()), neck=leaf()), ["trunk.a", "trunk.b", "trunk.c", "neck"]),
    "heavy-child": (
        Tree(trunk=Tree(a=Block(9), b=Block(9), c=Block(9)), x=leaf(), y=leaf()),
        ["trunk.a", "trunk.b", "trunk.c", "x", "y"],
    ),
    "alike-stay": (Tree(a=Block(), b=Block(40), c=Block()), ["a", "b", "c"]),
    "without-parameters": (Tree(act=nn.ReLU(), a=leaf(), b=leaf(), c=leaf()), ["a", "b", "c"]),
    "nothing": (nn.ReLU(), []),
}


@pytest.mark.parametrize(("encoder", "names"), TREES.values(), ids=TREES)
def test_stages(encoder: nn.Module, names: list[str]) -> None:
    assert list(stages(encoder)) == names


def test_halves_of_a_decoder() -> None:
    inner = Tree(prompt_encoder=leaf(), mask_decoder=nn.Linear(3, 3))
    assert list(halves(inner)) == ["prompt_encoder", "mask_decoder"]
    assert list(halves(Tree(wrapped=inner))) == ["prompt_encoder", "mask_decoder"]
    assert list(halves(Tree(mask_decoder=leaf()))) == ["mask_decoder"]


def test_another_size_keeps_strides_and_frame() -> None:
    recipe = load_recipe("mobile_sam")
    half = sized(recipe, 512).geometry
    assert (half.image_size, half.prompt_size, half.embedding_size) == (512, 512, 32)
    assert sized(recipe, 1024) is recipe
    with pytest.raises(InputError, match="mobile_sam does not run at 1000 px: its encoder needs a multiple of 16"):
        sized(recipe, 1000)


def test_a_size_that_does_not_run_is_left_out_by_name(tiny_recipe: Path) -> None:
    recipe, said = load_recipe(tiny_recipe), list[str]()
    options = ProfileOptions(image_sizes=(64, 72, 128), batches=(1, 2), latency=False, top=0)
    found = profile(recipe, options, said.append)
    assert [(f.image_size, f.batch) for f in found] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    assert [line for line in said if "left out" in line] == [
        "left out: tiny does not run at 72 px: its encoder needs a multiple of 16"
    ]
    with pytest.raises(InputError, match="72 px"):
        profile(recipe, ProfileOptions(image_sizes=(72,), latency=False))
    with pytest.raises(InputError, match="7 px"):
        profile(recipe, ProfileOptions(image_sizes=(72, 7), latency=False))
    # A convolutional encoder does four times the work on four times the pixels; so do two images.
    first, twice, large = found[0].encoder, found[1].encoder, found[2].encoder
    assert twice.macs == {kind: 2 * n for kind, n in first.macs.items()}
    assert large.macs == {kind: 4 * n for kind, n in first.macs.items()}


def test_counting_and_wrong_options() -> None:
    for wrong in ({"runs": 0}, {"batches": (0,)}, {"image_sizes": (-1,)}, {"top": -1}, {"warmup": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            ProfileOptions(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def timed(tiny_recipe: Path, checkpoint: Path) -> ModelProfile:
    options = ProfileOptions(runs=1, warmup=0, threads=1, checkpoint=checkpoint)
    (found,) = profile(load_recipe(tiny_recipe), options)
    return found


def test_a_fresh_process_times_every_part(timed: ModelProfile, checkpoint: Path) -> None:
    assert timed.run is not None
    assert timed.weights == str(checkpoint)
    assert (timed.run.threads, timed.run.runs) == (1, 1)
    assert all(part.latency is not None and part.latency.median_ms > 0 for part in (*timed.parts, *timed.stages))
    # Of one run, the stages add up to the encoder.
    stage_ms = sum(stage.latency.median_ms for stage in timed.stages if stage.latency is not None)
    assert timed.encoder.latency is not None
    assert stage_ms == pytest.approx(timed.encoder.latency.median_ms)
    assert timed.run.peak_rss_mb >= timed.run.rss_mb > 4 * timed.parameters / 1e6


def test_other_counters_agree_or_are_explained(tiny_recipe: Path) -> None:
    said: list[str] = []
    found = checked(load_recipe(tiny_recipe), 1, said.append)
    counters = {check.counter.rpartition(" ")[0] for check in found}
    expected = {"torch FlopCounterMode", "torch.profiler"}
    if all(importlib.util.find_spec(name) for name in ("calflops", "transformers")):
        assert said == []
        expected.add("calflops")
    else:
        assert "pip install calflops transformers" in said[0]
    assert counters == expected
    assert {check.unexplained for check in found} == {0}
    by = {(check.part, check.counter.rpartition(" ")[0]): check for check in found}
    ours = profile(load_recipe(tiny_recipe), ProfileOptions(latency=False))[0]
    assert by[ENCODER, "torch FlopCounterMode"].macs == ours.encoder.total_macs
    # The two transposed convolutions of SAM's decoder, 8 x 8 x 256 -> 16 x 16 x 64 -> 32 x 32 x 32.
    (missed,) = by["decoder", "torch.profiler"].missed
    assert (missed.what, missed.macs) == ("transposed convolution", 64 * 256 * 64 * 4 + 256 * 64 * 32 * 4)


def test_what_no_rule_explains_is_told() -> None:
    work = Work("all", "", "linear", "aten.addmm", False, "torch.nn.functional.linear")
    at = replace(work, kind="product", call="torch.Tensor.matmul")
    tally = Tally()
    tally.macs.update({work: 100, at: 7})
    agreed = _compare("all", "calflops", tally, 100, _patched)
    assert [(m.what, m.macs) for m in agreed.missed] == [("product by torch.Tensor.matmul", 7)]
    assert agreed.unexplained == 0
    assert _compare("all", "calflops", tally, 90, _patched).unexplained == 10


def test_an_onnx_graph_by_hand(tmp_path: Path) -> None:
    weight = np.zeros((8, 3, 3, 3), dtype=np.float32)
    matrix = np.zeros((8, 5), dtype=np.float16)
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Relu", ["a"], ["b"], "relu"),
        onnx.helper.make_node("Reshape", ["b", "shape"], ["c"], "reshape"),
        onnx.helper.make_node("Cast", ["c"], ["d"], "cast", to=onnx.TensorProto.FLOAT16),
        onnx.helper.make_node("MatMul", ["d", "m"], ["y"], "matmul"),
    ]
    constants = [
        onnx.numpy_helper.from_array(weight, "w"),
        onnx.numpy_helper.from_array(matrix, "m"),
        onnx.numpy_helper.from_array(np.array([80, 8]), "shape"),
    ]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 10])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, [80, 5])
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], constants)
    opset = [onnx.helper.make_opsetid("", 19)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "g.onnx")
    found = profile_graph(tmp_path / "g.onnx")
    assert found.macs == {"Conv": 8 * 80 * 27, "MatMul": 80 * 5 * 8}
    assert found.parameters == 8 * 27 + 8 * 5
    a, half, x_bytes, y_bytes = 4 * 640, 2 * 640, 4 * 240, 2 * 400
    assert found.activation_bytes == 2 * a + half + y_bytes
    assert found.peak_bytes == x_bytes + 2 * a
    assert [(layer.name, layer.parameters) for layer in found.top] == [("conv", 216), ("matmul", 40)]
    # Conv and ReLU are one kernel, the cast another.
    assert found.moved_bytes == (x_bytes + 4 * 216 + a) + (a + half) + (half + 2 * 40 + y_bytes)


def model(name: str, parameters: int, macs: int, ms: float | None = None) -> ModelProfile:
    latency = Latency(ms, ms, ms) if ms is not None else None
    part = Part(ENCODER, parameters, {"convolution": macs, "linear": 0, "product": 0}, 1000, 500, latency)
    rest = tuple(Part(n, 0, {}, 0, 0, latency) for n in ("prompt_encoder", "mask_decoder"))
    return ModelProfile(name, "F", 64, 1, 2, (part, *rest), (part,), (), 0, parameters, macs, "meta", "none")


def test_intensity_and_tables() -> None:
    found = model("a|b", 250, 4000)
    assert found.encoder.macs_per_byte == 2.0  # 1000 bytes of weights, 1000 of activations
    assert Part("none", 0, {}, 0, 0).macs_per_byte == 0.0
    text = markdown([models_table([found]), parts_table(found)])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "a\\|b" in text
    first = rows[0].count(" | ")
    assert rows[2].count(" | ") == first
    assert "encoder ms" not in text


def test_chart() -> None:
    bubbles = [
        Bubble("small <1>", "A", 5, 2, 10.0),
        Bubble("large", "B", 600, 2900, 40.0),
        Bubble("near", "A", 5, 2, 10.0),
    ]
    root = ElementTree.fromstring(chart(bubbles, "latency"))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    titles = {str(c[0].text).partition(" (")[0]: c for c in circles}
    assert set(titles) == {"small <1>", "large", "near"}
    # Area goes with time: four times the time, twice the radius.
    assert float(titles["large"].get("r", "")) == pytest.approx(2 * float(titles["near"].get("r", "")), rel=0.01)
    assert titles["small <1>"].get("fill") != titles["large"].get("fill")
    assert float(titles["large"].get("cx", "")) > float(titles["near"].get("cx", ""))
    assert float(titles["large"].get("cy", "")) < float(titles["near"].get("cy", ""))
    labels = {str(e.text): float(e.get("y", "")) for e in root.iter() if e.tag.endswith("text") and e.text in titles}
    assert abs(labels["small <1>"] - labels["near"]) >= 13
    hollow = ElementTree.fromstring(chart([bubbles[0], Bubble("untimed", "C", 7, 3)], "latency"))
    assert sorted(c.get("fill", "") == "none" for c in hollow.iter() if c.tag.endswith("circle")) == [False, True]
    assert "hollow: not timed" in ElementTree.tostring(hollow, encoding="unicode")
    with pytest.raises(InputError, match="at least one model"):
        chart([], "")
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="positive numbers"):
            Bubble("x", "A", wrong, 1.0)


def test_networks_on_the_meta_device_hold_no_memory() -> None:
    network = build_network(load_recipe("mobile_sam"), "meta")
    for module in (network.model, network.exported, network.decoder):
        held = {name: t.nbytes for name, t in module.state_dict(keep_vars=True).items() if t.device.type != "meta"}
        assert sum(held.values()) < 1000, held  # SAM makes its pixel constants on the CPU, wherever it is told to be
