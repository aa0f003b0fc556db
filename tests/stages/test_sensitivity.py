"""The search on the tiny reference: what it writes, what it reuses, and that its numbers are those of its graphs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.errors import GraphError, InputError, ThresholdError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.images import list_images
from edgesam_deploy.measure.accuracy import answer, compare
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Int8Rules, load_recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import assignments
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.assignments import Log
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.fp16 import emulate_fp16
from edgesam_deploy.stages.node_work import graph_cost
from edgesam_deploy.stages.search_cost import adjacent
from edgesam_deploy.stages.sensitivity import TuneOptions, TuneResult, load_tune, tune
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import Target, load_target

from ..conftest import PHOTOS

IMAGES = list_images(PHOTOS / "calibration")[:1]
OPTIONS = TuneOptions(min_iou=0.9, images=1, share=0.4, max_evaluations=16, runs=1, backend="onnxruntime")
KEEP_DECODER = Int8Rules(keep=("decoder", "prompt_encoder"))


# The tiny model is all launches on the real device: one of a hundredth of its peaks has something to gain.
ORIN = load_target("orin-nano-8gb")
DEVICE = replace(ORIN.devices[0], memory_bandwidth_gb_s=1.02, fp16_dense_tflops=0.17, int8_dense_tops=0.33)
SLOW = replace(ORIN, devices=(DEVICE,))


class Run:
    """One call of tune; counts the images that were decoded."""

    def __init__(self, built: SimpleNamespace, ranges: dict[str, Ranges], recipe: Path, folder: Path) -> None:
        self.sources = {n: built.stages / f"simplify-{n}" / f"{n}.onnx" for n in ("encoder", "decoder")}
        self.ranges = ranges
        self.recipe, self.folder = load_recipe(recipe), folder
        self.bars: list[str] = []

    def __call__(
        self, options: TuneOptions = OPTIONS, target: Target = SLOW, rules: Int8Rules = KEEP_DECODER
    ) -> TuneResult:
        how = Typing(target.int8_encoding, target.int8_rest)
        cache = self.folder / "evaluations.jsonl"
        return tune(
            self.sources, self.ranges, IMAGES, self.recipe, rules, target, how, options, cache, self.folder, self.bar
        )

    def bar(self, name: str, items: Iterable[Any], total: int | None) -> Iterable[Any]:
        self.bars.append(name)
        assert total is not None
        return items


@pytest.fixture(scope="module")
def run(
    built: SimpleNamespace,
    both_ranges: dict[str, Ranges],
    tiny_recipe: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    return Run(built, both_ranges, tiny_recipe, tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def found(run: Run) -> TuneResult:
    return run()


def test_it_passes_pays_and_names_its_layers(run: Run, found: TuneResult) -> None:
    chosen = found.search.chosen
    assert chosen is not None
    assert (found.search.verdict, found.rest, found.images) == ("int8", "fp16", 1)
    assert found.cost_source == "roofline, Jetson Orin Nano 8GB"
    assert chosen.mask_iou >= 0.9
    assert chosen.cost_ms < found.search.rest.cost_ms
    layers = [n.name for n in graphs.load(run.sources["encoder"]).graph.node if n.op_type == "Conv"]
    expected = {n for n in layers if found.block_of[n] in chosen.int8}
    assert set(found.int8["encoder"]) == expected
    assert list(found.int8["encoder"]) == [n for n in layers if n in expected]
    assert found.int8["decoder"] == ()
    assert set(found.search.alone) == set(found.layers)
    assert sum(found.layers.values()) == len(layers)
    assert {"each block alone", "search"} <= set(run.bars)


def test_its_numbers_are_those_of_its_graphs(run: Run, found: TuneResult, tmp_path: Path) -> None:
    """The chosen assignment, typed, emulated, run and priced here once more."""
    chosen = found.search.chosen
    assert chosen is not None
    cost, emulated = 0.0, {}
    for name, source in run.sources.items():
        typed = tmp_path / f"{name}.onnx"
        how = Typing("tensorrt", "fp16")
        type_graph(source, run.ranges[name], run.recipe.fp16, KEEP_DECODER, how, typed, found.int8[name])
        cost += graph_cost(typed, DEVICE).ms
        emulated[name] = emulate_fp16(typed, tmp_path / f"{name}-emulated.onnx")
    assert chosen.cost_ms == pytest.approx(cost)
    with open_session(run.sources["encoder"]) as encoder, open_session(run.sources["decoder"]) as decoder:
        answers = answer(Predictor(encoder, decoder, run.recipe.geometry, run.recipe.pixels), IMAGES)
    with open_session(emulated["encoder"]) as encoder, open_session(emulated["decoder"]) as decoder:
        predictor = Predictor(encoder, decoder, run.recipe.geometry, run.recipe.pixels)
        iou = compare(predictor, answers, IMAGES[0].parent, "here").mask_iou.mean
    assert chosen.mask_iou == pytest.approx(iou)


def test_what_it_writes(run: Run, found: TuneResult) -> None:
    assert load_tune(run.folder) == found
    assert json.dumps(found.summary())
    picture = ElementTree.fromstring((run.folder / "frontier.svg").read_text(encoding="utf-8"))
    words = " ".join(text for element in picture.iter() if (text := element.text))
    assert "mask IoU" in words
    assert len(found.search.frontier) >= 5
    marks = [e for e in picture.iter() if e.tag.endswith("circle") and e.get("class") == "point"]
    assert len(marks) == len(found.search.frontier)
    assert sum(e.get("class") == "chosen" for e in picture.iter()) == 1
    with pytest.raises(GraphError, match="does not hold a search"):
        load_tune(run.folder / "nothing")


def test_a_killed_search_goes_on_where_it_stopped(
    run: Run, found: TuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the evaluations and a torn line are left: only the other half is measured."""
    lines = (run.folder / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    kept = len(lines) // 2
    (tmp_path / "evaluations.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    measured: list[str] = []
    compare_masks = assignments.compare

    def counted(*arguments: Any) -> Any:
        measured.append("")
        return compare_masks(*arguments)

    monkeypatch.setattr(assignments, "compare", counted)
    monkeypatch.setattr(run, "folder", tmp_path)
    again = run()
    assert len(measured) == len(lines) - kept
    assert replace(again, minutes=0.0) == replace(found, minutes=0.0)
    measured.clear()
    assert replace(run(), minutes=0.0) == replace(found, minutes=0.0)
    assert measured == []


def test_keep_fp16_where_launches_are_all_there_is(
    run: Run, found: TuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 128 pixels the real device has nothing to gain, and says so with numbers; masks are known already."""
    (tmp_path / "evaluations.jsonl").write_bytes((run.folder / "evaluations.jsonl").read_bytes())
    monkeypatch.setattr(run, "folder", tmp_path)
    result = run(target=ORIN)
    assert result.search.verdict == "keep"
    assert result.int8 == {"encoder": (), "decoder": ()}
    fastest = min(point.cost_ms for point in result.search.points)
    assert result.search.rest.cost_ms < 1.05 * fastest
    assert result.sentence().startswith(f"keep fp16: the fastest assignment of INT8 takes {fastest:.3f} ms")
    result.demand()


def test_too_strict_a_budget_is_unmet_and_says_what_holds_it_back(run: Run, found: TuneResult) -> None:
    result = run(replace(OPTIONS, min_iou=1.0, max_evaluations=20))
    assert result.search.verdict == "unmet"
    assert result.int8 == {"encoder": (), "decoder": ()}
    assert result.search.closest is not None
    assert result.search.holding_back
    with pytest.raises(ThresholdError, match="reaches mask IoU 1: the closest has 0") as raised:
        result.demand()
    assert result.search.holding_back[0] in str(raised.value)
    # A block that loses more than half of the budget is opened.
    assert len(result.layers) > len(found.layers)


def test_times_of_a_cpu_are_measured(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "folder", tmp_path)
    result = run(replace(OPTIONS, share=0.9, threads=1), load_target("cpu"))
    assert result.cost_source == "measured on onnxruntime, 1 threads"
    assert result.rest == "fp32"
    assert result.search.rest.mask_iou > 0.999
    assert all(p.cost_ms > 0 for p in result.search.frontier)
    assert "time encoder" in run.bars
    assert result.search.verdict in ("int8", "keep", "unmet")
    assert result.sentence()


def test_blocks_are_adjacent_where_no_other_block_lies_between(run: Run) -> None:
    model = graphs.load(run.sources["encoder"])
    convs = [n.name for n in model.graph.node if n.op_type == "Conv"]
    pairs = adjacent(model, {name: frozenset((name,)) for name in convs})
    first, second = convs[0], convs[1]
    assert (min(first, second), max(first, second)) in pairs
    assert (min(first, convs[-1]), max(first, convs[-1])) not in pairs


def test_the_log_keeps_contexts_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, "one")
    log.add(0.5, 2.0, "key", ["a"])
    assert log.find("key", ["a"]) == 0.5
    assert Log(path, "two").find("key", ["a"]) is None
    with path.open("a", encoding="utf-8") as file:
        file.write('{"context": "one", "key"')
    Log(path, "one").add(0.25, 1.0, "other")
    again = Log(path, "one")
    assert (again.find("key", ["a"]), again.find("other"), again.seconds) == (0.5, 0.25, 3.0)


@pytest.mark.parametrize(
    "wrong", [{"min_iou": 1.5}, {"margin": 1.0}, {"images": 0}, {"share": 0.0}, {"backend": "tensorrt"}], ids=str
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        TuneOptions(**wrong)


def test_the_source_is_untouched(run: Run, found: TuneResult) -> None:
    assert all(sha256_file(path) == run.ranges[name].graph_sha256 for name, path in run.sources.items())
