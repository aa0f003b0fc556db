"""An explanation's sums by hand, what its page holds, and files that are none."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgesam_deploy.bundle import GRAPHS, NODES, Bundle
from edgesam_deploy.contract import Geometry
from edgesam_deploy.errors import BundleError
from edgesam_deploy.measure.explain import NODES_SCHEMA, NodeRecord, describe, explain, read_nodes, run_by
from edgesam_deploy.measure.explain_page import page
from edgesam_deploy.recipe import Pixels

KEPT = "the search keeps neck: in INT8 alone it costs 0.0120 mask IoU"
NASTY = 'neck"><script src="https://example.com/x.js"></script>'
ENCODER = [
    NodeRecord("stem/Conv_1", "Conv", "stem", "int8", None, 600, 4.0, 0.03, 0.001),
    NodeRecord("stem/Relu_1", "Relu", "stem", "fp16", None, 0, 3.5, None, None),
    NodeRecord("neck/Conv_2", "Conv", "neck", "fp16", KEPT, 300, 9.0, None, 0.012),
    NodeRecord("neck/MatMul_3", "MatMul", "neck", "int8", None, 100, 2.0, 0.02, 0.012),
    NodeRecord("/Sin", "Sin", "(top)", "fp32", "point encoding", 0, None, None, None),
]
DECODER = [NodeRecord("head/Gemm", "Gemm", "head", "fp32", "the decoder stays FP32", 50, None, None, None)]


def make_bundle(folder: Path, encoder: list[NodeRecord] = ENCODER, search: Any = None) -> Bundle:
    """A bundle of which only what explaining reads is there."""
    graphs = {name: {"nodes": [asdict(r) for r in rows]} for name, rows in (("encoder", encoder), ("decoder", DECODER))}
    (folder / NODES).write_text(json.dumps({"schema": NODES_SCHEMA, "graphs": graphs, "search": search}))
    return Bundle(
        path=folder,
        recipe="tiny",
        precision="int8",
        target="rtx",
        backend="tensorrt_rtx",
        backends=dict.fromkeys(GRAPHS, "tensorrt_rtx"),
        bf16=dict.fromkeys(GRAPHS, False),
        geometry=Geometry(128, 128, 8, 256, 4),
        pixels=Pixels(mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0)),
        verified=True,
        manifest={},
    )


def test_blocks_and_totals_by_hand(tmp_path: Path) -> None:
    encoder, decoder = explain(make_bundle(tmp_path)).graphs
    assert (encoder.graph, encoder.macs, decoder.macs) == ("encoder", 1000, 50)
    assert [(s.precision, s.nodes, s.weighted, s.macs, s.share) for s in encoder.shares] == [
        ("int8", 2, 2, 700, 0.7),
        ("fp16", 2, 1, 300, 0.3),
        ("fp32", 1, 0, 0, 0.0),
    ]
    assert [(b.block, b.nodes, b.weighted, b.macs, b.absmax, b.iou_cost, b.reasons) for b in encoder.blocks] == [
        ("stem", 2, 1, 600, 4.0, 0.001, ()),
        ("neck", 2, 2, 400, 9.0, 0.012, (KEPT,)),
        ("(top)", 1, 0, 0, None, None, ()),
    ]
    assert [describe(b.shares) for b in encoder.blocks] == ["int8 100.0 %", "int8 25.0 %, fp16 75.0 %", "fp32"]
    assert [r.node for r in encoder.not_int8] == ["neck/Conv_2"]
    assert [r.reason for r in decoder.not_int8] == ["the decoder stays FP32"]


def test_what_runs_it_is_told(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    mixed = replace(
        bundle,
        backends={"encoder": "onnxruntime", "decoder": "openvino"},
        bf16={"encoder": False, "decoder": True},
    )
    assert [run_by(graph) for graph in explain(mixed).graphs] == [
        "run by onnxruntime",
        "run by openvino, which computes in bfloat16 what is fp32 here",
    ]
    assert "run by openvino, which computes in bfloat16" in page(explain(mixed))


WRONG: dict[str, tuple[Any, str]] = {
    "not-json": ("{", "is not readable JSON"),
    "older": ({"encoder": {"Conv_1": ["int8", "Conv"]}}, "has no schema, as older versions wrote it"),
    "schema-1": ({"schema": 1, "graphs": {}}, "has schema 1; this version reads schema 2: build the bundle again"),
    "newer": ({"schema": 3, "graphs": {}}, "has schema 3; this version reads schema 2: upgrade edgesam-deploy"),
    "a-list": ([], "has no schema"),
    "no-decoder": ({"schema": 2, "graphs": {"encoder": {"nodes": []}}, "search": None}, "lacks or garbles an entry"),
    "no-search": (
        {"schema": 2, "graphs": {"encoder": {"nodes": []}, "decoder": {"nodes": []}}},
        "garbles an entry: 'search'",
    ),
}


@pytest.mark.parametrize(("content", "says"), WRONG.values(), ids=WRONG)
def test_a_file_that_is_none_is_refused_with_the_cure(tmp_path: Path, content: Any, says: str) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / NODES).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BundleError, match=re.escape(says)) as caught:
        read_nodes(bundle)
    assert re.search("sam-export build|upgrade", str(caught.value))


GARBLED: dict[str, dict[str, Any]] = {
    "precision": {"precision": "int4"},
    "macs": {"macs": -1},
    "macs-bool": {"macs": True},
    "absmax": {"absmax": "big"},
    "scale": {"scale": float("nan")},
    "iou-cost": {"iou_cost": [1]},
    "node": {"node": None},
    "twice": {"node": "neck/Conv_2"},
}


@pytest.mark.parametrize("change", GARBLED.values(), ids=GARBLED)
def test_a_garbled_row_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    bundle = make_bundle(tmp_path)
    raw = json.loads((tmp_path / NODES).read_text())
    raw["graphs"]["encoder"]["nodes"][0] |= change
    (tmp_path / NODES).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="lacks or garbles an entry"):
        read_nodes(bundle)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / NODES).unlink()
    with pytest.raises(BundleError, match=f"has no {NODES}.*sam-export build"):
        read_nodes(bundle)


class Reader(HTMLParser):
    """Collects a page's text, and checks that what opens also closes."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.drawn: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "xlink:href")]
        given = dict(attrs)
        if tag == "span" and given.get("class") in ("int8", "fp16", "fp32"):
            self.drawn.append((str(given["class"]), str(given["style"])))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_holds_every_block_and_node_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    explanation = explain(make_bundle(tmp_path))
    html = page(explanation)
    reader = read(html)
    for graph in explanation.graphs:
        for name in (*(b.block for b in graph.blocks), *(r.node for r in graph.nodes)):
            assert name in reader.text
    assert KEPT in reader.text
    assert reader.links == []
    assert not re.search(r"https?:|url\(|@import|//\w", html)
    assert not reader.tags & {"script", "link", "img", "iframe"}
    assert "prefers-color-scheme: dark" in html
    assert reader.drawn[:2] == [("int8", "width:70.000%"), ("fp16", "width:30.000%")]


POINTS = [
    {"int8": [], "cost_ms": 8.0, "mask_iou": 1.0},
    {"int8": ["stem"], "cost_ms": 5.0, "mask_iou": 0.99},
    {"int8": ["neck"], "cost_ms": 6.0, "mask_iou": 0.97},
    {"int8": ["stem", "neck"], "cost_ms": 4.0, "mask_iou": 0.96},
]


def test_the_search_is_drawn(tmp_path: Path) -> None:
    """Every point once as tried, the frontier joined from the fastest, the chosen one marked."""
    frontier = [POINTS[3], POINTS[1], POINTS[0]]
    search = {"frontier": frontier, "points": POINTS, "chosen": POINTS[1], "min_iou": 0.98}
    html = page(explain(make_bundle(tmp_path, search=search)))
    reader = read(html)
    assert [html.count(f'class="{kind}"') for kind in ("tried", "point", "chosen", "limit")] == [4, 3, 1, 1]
    assert "Chosen: 5 ms, mask IoU 0.9900: 1 block in INT8." in reader.text
    assert "must reach 0.98" in reader.text
    (line,) = re.findall(r'<polyline class="line" points="([^"]*)"', html)
    corners = [tuple(map(float, corner.split(","))) for corner in line.split()]
    assert len(corners) == 3
    assert corners == sorted(corners), "faster to the left"
    assert [y for _, y in corners] == sorted((y for _, y in corners), reverse=True), "better masks further up"
    assert not re.search(r"https?:|url\(", html)


def test_a_search_without_points_is_not_drawn(tmp_path: Path) -> None:
    assert "<svg" not in page(explain(make_bundle(tmp_path, search={"verdict": "keep"})))
    with pytest.raises(BundleError, match="garbles its search"):
        page(explain(make_bundle(tmp_path, search={"frontier": [{"cost_ms": "fast"}]})))


def test_names_are_escaped(tmp_path: Path) -> None:
    nasty = [replace(r, block=NASTY, node=f"{NASTY}{i}", reason=r.reason and NASTY) for i, r in enumerate(ENCODER)]
    reader = read(page(explain(make_bundle(tmp_path, nasty))))
    assert "script" not in reader.tags
    assert NASTY in reader.text
