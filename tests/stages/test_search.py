"""The search against the exhaustive optimum, on a small real network priced for a real device, and its verdicts."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.errors import InputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.recipe import Int8Rules, PrecisionRules
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.node_work import graph_cost
from edgesam_deploy.stages.search import PAYS, Assignment, Point, frontier, search
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import load_target

DEVICE = load_target("orin-nano-8gb").devices[0]
WIDTH, SIDE, DEPTH = 32, 32, 8


def toy(folder: Path, seed: int) -> Path:
    """image -> Conv 3→32 -> three residual pairs of Convs, ReLU between -> Conv 32→1 -> mask logits.

    Weights are random; some layers get output channels that are far larger than the others and are made up for in the
    next layer: in FP32 nothing changes, in INT8 these layers lose what is small.
    """
    rng = np.random.default_rng(seed)
    widths = [(WIDTH, 3), *[(WIDTH, WIDTH)] * (DEPTH - 2), (1, WIDTH)]
    weights = [rng.normal(0, (2 / (i * 9)) ** 0.5, (o, i, 3, 3)).astype(np.float32) for o, i in widths]
    for layer in rng.choice(range(1, DEPTH - 2, 2), 2, replace=False):
        factors = np.where(rng.random(WIDTH) < 0.1, 2.0 ** rng.integers(3, 7), 1.0).astype(np.float32)
        weights[layer] *= factors[:, None, None, None]
        weights[layer + 1] /= factors[None, :, None, None]
    nodes, last = [], "image"
    for index in range(DEPTH):
        conv = f"c{index}"
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [conv], name=f"layer{index}/Conv", pads=[1] * 4))
        last = conv
        if index and index < DEPTH - 1 and index % 2 == 0:
            nodes.append(helper.make_node("Add", [conv, f"r{index - 2}"], [f"a{index}"], name=f"layer{index}/Add"))
            last = f"a{index}"
        if index < DEPTH - 1:
            nodes.append(helper.make_node("Relu", [last], [f"r{index}"], name=f"layer{index}/Relu"))
            last = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["prompts", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["prompts", 1, SIDE, SIDE])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    path = folder / "toy.onnx"
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    return path


class Toy:
    """Mask IoU and price of every assignment of INT8 to the toy's layers."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.source = folder, toy(folder, seed)
        rng = np.random.default_rng(seed)
        coarse = rng.normal(size=(8, 3, 8, 8)).astype(np.float32)
        self.images = np.kron(coarse, np.ones((4, 4), dtype=np.float32))
        model = graphs.load(self.source)
        self.layers = [node.name for node in model.graph.node if node.op_type == "Conv"]
        names = [node.output[0] for node in model.graph.node]
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        watched.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names[:-1])
        (folder / "watched.onnx").write_bytes(watched.SerializeToString())
        values = self.run(folder / "watched.onnx") | {"image": self.images}
        absmax = {name: float(np.abs(value).max()) for name, value in values.items()}
        self.ranges = Ranges(8, "", "minmax", 100.0, sha256_file(self.source), absmax, absmax)
        self.middle = float(np.median(values[names[-1]]))
        self.masks = values[names[-1]] > self.middle
        self.known: dict[Assignment, tuple[float, float]] = {}
        self.asked: list[Assignment] = []

    def run(self, path: Path) -> dict[str, npt.NDArray[np.float32]]:
        with open_session(path) as session:
            return session.run({"image": self.images})

    def both(self, int8: Assignment) -> tuple[float, float]:
        """(mask IoU, ms) of an assignment."""
        if int8 not in self.known:
            path, how = self.folder / "typed.onnx", Typing("tensorrt", "fp32")
            type_graph(self.source, self.ranges, PrecisionRules(), Int8Rules(), how, path, sorted(int8))
            (logits,) = self.run(path).values()
            pairs = zip(logits > self.middle, self.masks, strict=True)
            iou = float(np.mean([mask_iou(got, want) for got, want in pairs]))
            self.known[int8] = iou, graph_cost(path, DEVICE).ms
        return self.known[int8]

    def iou(self, int8: Assignment) -> float:
        self.asked.append(int8)
        return self.both(int8)[0]

    def cost(self, int8: Assignment) -> float:
        return self.both(int8)[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_within_three_percent_of_the_exhaustive_optimum(tmp_path: Path, seed: int) -> None:
    """All 256 assignments of eight layers are tried beside; INT8 everywhere must fail, and nowhere be slow."""
    net = Toy(tmp_path, seed)
    everything = [frozenset(c) for n in range(DEPTH + 1) for c in combinations(net.layers, n)]
    table = {chosen: net.both(chosen) for chosen in everything}
    rest, whole = table[frozenset()], table[frozenset(net.layers)]
    assert whole[0] < 0.99
    for share in (0.3, 0.6):
        min_iou = 1.0 - share * (1.0 - whole[0])
        best = min(ms for iou, ms in table.values() if iou >= min_iou)
        assert best < rest[1] / PAYS, "otherwise there is nothing to find"
        net.asked.clear()
        found = search(net.layers, net.iou, net.cost, min_iou, 60)
        assert found.verdict == "int8"
        assert found.chosen is not None
        assert (found.chosen.mask_iou, found.chosen.cost_ms) == table[found.chosen.int8]
        assert found.chosen.mask_iou >= min_iou > whole[0]
        assert found.chosen.cost_ms <= 1.03 * best
        assert found.chosen.cost_ms < rest[1]
        assert len(net.asked) == len(set(net.asked)) == found.evaluations <= 60
        assert len(found.frontier) >= 5
        assert found.alone == {b: rest[0] - table[frozenset((b,))][0] for b in net.layers}
        assert search(net.layers, net.iou, net.cost, min_iou, 60) == found


LOSS = {"a": 0.001, "b": 0.002, "c": 0.2, "d": 0.003}


def losing(int8: Assignment) -> float:
    return 1.0 - sum(LOSS[b] for b in int8)


def saving(**gains: float) -> dict[str, float]:
    return {"a": 1.0, "b": 1.0, "c": 4.0, "d": 1.0} | gains


def test_what_does_not_gain_stays_in_the_rest() -> None:
    gains = saving(a=0.0, b=-0.5)
    found = search("abcd", losing, lambda int8: 10.0 - sum(gains[b] for b in int8), 0.5)
    assert found.chosen == Point(frozenset("cd"), losing(frozenset("cd")), 5.0)


def test_keep_where_nothing_pays() -> None:
    found = search("abcd", losing, lambda int8: 10.0 - 0.1 * len(int8), 0.9)
    assert (found.verdict, found.closest, found.holding_back) == ("keep", None, ())
    assert found.chosen == found.rest == Point(frozenset(), 1.0, 10.0)
    assert {p.int8 for p in found.points} >= {frozenset("abcd")}


def test_unmet_says_how_close_and_what_holds_back() -> None:
    """Only c pays, and it costs a fifth of the masks."""
    gains = saving(a=0.01, b=0.01, d=0.01)
    found = search("abcd", losing, lambda int8: 10.0 - sum(gains[b] for b in int8), 0.95)
    assert (found.verdict, found.chosen) == ("unmet", None)
    assert found.closest == Point(frozenset("c"), losing(frozenset("c")), 6.0)
    assert found.holding_back == ("c",)


def test_a_pair_that_only_harms_together_is_not_taken_together() -> None:
    def iou(int8: Assignment) -> float:
        return losing(int8) - 0.1 * ({"a", "d"} <= int8)

    found = search("abcd", iou, lambda int8: 10.0 - 2.0 * len(int8), 0.99)
    assert found.chosen is not None
    assert found.chosen.int8 in (frozenset("ab"), frozenset("bd"))


def test_blocks_that_only_pay_together_are_found() -> None:
    """Conversions around a lone block cost more than it gains."""
    order = "abcd"

    def cost(int8: Assignment) -> float:
        edges = sum((x in int8) != (y in int8) for x, y in pairwise(order))
        return 10.0 - sum(saving()[b] for b in int8) + 1.5 * edges

    found = search(order, lambda int8: 1.0 - 0.001 * len(int8), cost, 0.9)
    assert found.chosen is not None
    assert found.chosen.int8 == frozenset("abcd")


def test_the_frontier_is_filled_up_to_five_points() -> None:
    points = [
        Point(frozenset(name), iou, ms) for name, iou, ms in zip("abcdef", (5, 4, 3, 2, 1, 0), range(6), strict=True)
    ]
    assert [p.int8 for p in frontier(points)] == [frozenset(n) for n in "abcde"]
    rising = [Point(frozenset(name), i, i) for i, name in enumerate("abcdef")]
    assert list(frontier(rising)) == rising


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(InputError, match="name of its own"):
        search("aa", losing, lambda _: 1.0, 0.9)
    with pytest.raises(InputError, match="at least 6"):
        search("abcd", losing, lambda _: 1.0, 0.9, 5)
