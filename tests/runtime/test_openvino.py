"""The OpenVINO backend: its numbers against PyTorch and ONNX Runtime, what it refuses, and what it leaves alone.

What needs no PyTorch also runs on Python 3.10 with the base install and the extras cpu and openvino.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgesam_deploy import load_bundle, shipped_bundle
from edgesam_deploy.bundle import open_graphs
from edgesam_deploy.contract import contracts
from edgesam_deploy.device import int8_saturates
from edgesam_deploy.errors import BackendError, GraphError, InputError
from edgesam_deploy.measure.accuracy import compare, load_answers
from edgesam_deploy.runtime import SessionOptions, open_session

# Not by pytest.importorskip: openvino's import tells its makers, unless it goes through our module (a test below).
if find_spec("openvino") is None:
    pytest.skip("needs the extra openvino", allow_module_level=True)

Feeds = dict[str, np.ndarray[Any, Any]]
ONE = SessionOptions(threads=1)


@pytest.fixture(scope="module")
def bundle_path() -> Path:
    return Path(os.environ.get("EDGESAM_TEST_BUNDLE") or shipped_bundle())


def feeds_of(bundle_path: Path, name: str, prompts: int = 1, points: int = 2, seed: int = 0) -> Feeds:
    """Random feeds for a graph, labels and flags as the contract has them."""
    geometry = load_bundle(bundle_path).geometry
    rng = np.random.default_rng(seed)
    if name == "encoder":
        return {"image": rng.integers(0, 256, (1, 3, geometry.image_size, geometry.image_size), dtype=np.uint8)}
    embedding = (1, geometry.embedding_channels, geometry.embedding_size, geometry.embedding_size)
    return {
        "image_embeddings": rng.normal(size=embedding).astype(np.float32) * 0.1,
        "point_coords": (rng.random((prompts, points, 2)) * geometry.prompt_size).astype(np.float32),
        "point_labels": rng.integers(-1, 4, (prompts, points)).astype(np.float32),
        "mask_input": rng.normal(size=(prompts, 1, geometry.mask_size, geometry.mask_size)).astype(np.float32),
        "has_mask_input": np.array([seed % 2], dtype=np.float32),
    }


def error_of(a: Feeds, b: Feeds) -> float:
    """The largest difference over the outputs, relative to the largest value of each."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[n] - b[n]).max() / np.abs(b[n]).max()) for n in b)


SHAPES = {"encoder": [(1, 2)], "decoder": [(1, 1), (1, 2), (3, 4), (2, 2)]}


@pytest.mark.parametrize("name", SHAPES)
def test_fp32_is_pytorchs_and_onnx_runtimes(
    built: SimpleNamespace, tiny_recipe: Path, checkpoint: Path, name: str
) -> None:
    """Within 1e-4, so that no part of it was computed in bfloat16, whose steps are 4e-3; one session, many shapes."""
    from edgesam_deploy.models import reference_predictor
    from edgesam_deploy.models.checkpoint import load_model
    from edgesam_deploy.recipe import load_recipe

    recipe = load_recipe(tiny_recipe)
    reference = getattr(reference_predictor(load_model(recipe, checkpoint), recipe), name)
    graph = built.stages / f"simplify-{name}" / f"{name}.onnx"
    with open_session(graph, "openvino", ONE) as openvino, open_session(graph, "onnxruntime", ONE) as onnxruntime:
        for seed, (prompts, points) in enumerate(SHAPES[name]):
            feeds = feeds_of(built.bundle, name, prompts, points, seed)
            if name == "decoder":
                feeds["point_labels"] = np.abs(feeds["point_labels"]) % 2  # clicks, so that PyTorch asks its own way
            got = openvino.run(feeds)
            assert error_of(got, reference.run(feeds)) <= 1e-4
            assert error_of(got, onnxruntime.run(feeds)) <= 1e-4
            assert {n: (v.dtype, v.flags.owndata) for n, v in got.items()} == dict.fromkeys(got, (np.float32, True))


@pytest.mark.parametrize("stage", ["quantize-encoder", "encode-encoder"])
def test_int8_in_both_encodings_gives_the_masks_of_onnx_runtime(built: SimpleNamespace, stage: str) -> None:
    """Against PyTorch FP32, as good as ONNX Runtime within 0.01; not bit by bit: they round sums in another order."""
    bundle = load_bundle(built.bundle)
    files = {"encoder": built.stages / stage / "encoder.onnx", "decoder": bundle.graph("decoder")}
    answers = load_answers(bundle.path / "verify" / "answers.npz")
    iou = {}
    for backend in ("onnxruntime", "openvino"):
        with open_graphs(files, bundle, ONE, backend) as predictor:
            iou[backend] = compare(predictor, answers, bundle.path / "verify", backend).mask_iou.mean
    assert iou["openvino"] == pytest.approx(iou["onnxruntime"], abs=0.01)


KERNELS = {
    "simplify-encoder": ("f32", "f32"),
    "quantize-encoder": ("i8", "f32"),
    "encode-encoder": ("u8", "f32"),
    "simplify-encoder-bf16": ("bf16", "bf16"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have other kernels")
@pytest.mark.parametrize(("computes", "asked"), KERNELS.values(), ids=KERNELS)
def test_every_convolution_computes_as_the_graph_says(
    built: SimpleNamespace, request: pytest.FixtureRequest, computes: str, asked: str
) -> None:
    """By OpenVINO's own account: INT8 where there is Q/DQ, in both encodings, and else FP32."""
    from edgesam_deploy.runtime.openvino import _compile, _core, native_bf16

    if asked == "bf16" and not native_bf16():
        pytest.skip("this CPU does not compute in bfloat16")
    if int8_saturates():
        computes = "f32"  # where INT8 sums would saturate, its roundings alone are INT8
    stage = request.node.callspec.id.removesuffix("-bf16")
    graph = built.stages / stage / "encoder.onnx"
    if computes == "i8" and "u8" in convolutions(_core().compile_model(str(graph), "CPU")):
        computes = "f32"  # and where OpenVINO alone would take uint8 for int8, at the same loss
    compiled, _ = _compile(graph, 1, asked)
    assert convolutions(compiled) == [computes] * 49


def convolutions(compiled: Any) -> list[str]:
    """What each computes in, by OpenVINO's own account."""
    told = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    found = [t for t in told if str(t["layerType"].astype(str)) == "Convolution"]
    return [str(t["runtimePrecision"].astype(str)) for t in found]


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_specs_are_the_contracts(bundle_path: Path, name: str) -> None:
    bundle = load_bundle(bundle_path)
    contract = contracts(bundle.geometry)[name]
    with open_session(bundle.graph(name), "openvino", ONE) as session:
        found = session.specs()
        assert getattr(session, "threads", None) == 1
        assert str(getattr(session, "provider", "")).endswith("CPU, f32")
    for want, have in zip((*contract.inputs, *contract.outputs), (*found.inputs, *found.outputs), strict=True):
        assert have == want


def test_what_run_returned_and_what_it_was_given_stay_as_they_are(bundle_path: Path) -> None:
    first, second = (feeds_of(bundle_path, "decoder", prompts=p, seed=p) for p in (1, 2))
    given = {name: value.copy() for name, value in first.items()}
    with open_session(load_bundle(bundle_path).graph("decoder"), "openvino", ONE) as session:
        kept = session.run(first)
        copies = {name: value.copy() for name, value in kept.items()}
        for value in first.values():
            value.setflags(write=False)
        session.run(second)
        again = session.run(first)
    for name in kept:
        np.testing.assert_array_equal(kept[name], copies[name])
        np.testing.assert_array_equal(again[name], copies[name])
    for name in given:
        np.testing.assert_array_equal(first[name], given[name])


def test_arrays_of_any_memory_order_are_taken(bundle_path: Path) -> None:
    feeds = feeds_of(bundle_path, "decoder", prompts=2)
    with open_session(load_bundle(bundle_path).graph("decoder"), "openvino", ONE) as session:
        want = session.run(feeds)
        strided = {n: np.asfortranarray(v) if v.ndim > 1 else np.repeat(v, 2)[::2] for n, v in feeds.items()}
        assert error_of(session.run(strided), want) == 0.0


def test_threads_share_a_session(bundle_path: Path) -> None:
    """Answers to different prompts, asked at once from four threads, are those of asking one after the other."""
    asked = [feeds_of(bundle_path, "decoder", prompts=1 + i % 3, seed=i) for i in range(12)]
    with open_session(load_bundle(bundle_path).graph("decoder"), "openvino", ONE) as session:
        want = [session.run(feeds) for feeds in asked]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(session.run, asked))
    assert all(error_of(a, b) == 0.0 for a, b in zip(got, want, strict=True))


def change(feeds: Feeds, how: str) -> Feeds:
    if how == "missing":
        return {n: v for n, v in feeds.items() if n != "mask_input"}
    if how == "another":
        return {**feeds, "orig_im_size": np.zeros(2, np.float32)}
    if how == "dtype":
        return {**feeds, "point_coords": feeds["point_coords"].astype(np.float64)}
    if how == "rank":
        return {**feeds, "point_coords": feeds["point_coords"][0]}
    if how == "length":
        return {**feeds, "has_mask_input": np.zeros(2, np.float32)}
    if how == "none":
        return {**feeds, "point_coords": feeds["point_coords"][:0]}
    if how == "more-labels":
        return {**feeds, "point_labels": np.zeros((3, 2), np.float32)}
    return {**feeds, "mask_input": feeds["mask_input"][:1]}


REFUSED = {
    "missing": "expected image_embeddings, point_coords, point_labels, mask_input, has_mask_input, got",
    "another": "got has_mask_input, image_embeddings, mask_input, orig_im_size",
    "dtype": r"expected 'point_coords' of float32 \('prompts', 'points', 2\), got float64 \(2, 2, 2\)",
    "rank": r"expected 'point_coords' .* got float32 \(2, 2\)",
    "length": r"expected 'has_mask_input' of float32 \(1,\), got float32 \(2,\)",
    "none": r"expected 'point_coords' .* got float32 \(0, 2, 2\)",
    "more-labels": r"failed to run decoder\.onnx: 'point_labels' is of 3 prompts, the inputs before it of 2",
    "unequal": "'mask_input' is of 1 prompts, the inputs before it of 2",
}


@pytest.mark.parametrize(("how", "says"), REFUSED.items(), ids=REFUSED)
def test_feeds_that_are_not_the_graphs_are_refused_in_one_line(bundle_path: Path, how: str, says: str) -> None:
    feeds = feeds_of(bundle_path, "decoder", prompts=2)
    with open_session(load_bundle(bundle_path).graph("decoder"), "openvino", ONE) as session:
        with pytest.raises(BackendError, match=says) as caught:
            session.run(change(feeds, how))
        assert len(str(caught.value).splitlines()) == 1
        assert "src/" not in str(caught.value)
        assert error_of(session.run(feeds), session.run(feeds)) == 0.0  # and the session goes on


def test_a_closed_session_says_so(bundle_path: Path) -> None:
    with open_session(load_bundle(bundle_path).graph("decoder"), "openvino", ONE) as session:
        pass
    with pytest.raises(BackendError, match="closed"):
        session.run(feeds_of(bundle_path, "decoder"))
    with pytest.raises(BackendError, match="closed"):
        session.specs()


BROKEN = {
    "cut": (lambda data: data[:1000], "cannot load"),
    "end-cut": (lambda data: data[:-1000], "cannot load"),
    "text": (lambda data: b"this is no graph\n", "cannot load"),
    "zeros": (lambda data: bytes(1000), "cannot load|has no outputs"),
    "empty": (lambda data: b"", "is missing or empty"),
    "missing": (None, "is missing or empty"),
}


@pytest.mark.parametrize(("damage", "says"), BROKEN.values(), ids=BROKEN)
def test_a_graph_that_is_none_is_named_in_one_line(bundle_path: Path, tmp_path: Path, damage: Any, says: str) -> None:
    graph = tmp_path / "encoder.onnx"
    if damage is not None:
        graph.write_bytes(damage(load_bundle(bundle_path).graph("encoder").read_bytes()))
    with pytest.raises(GraphError, match=says) as caught:
        open_session(graph, "openvino", ONE)
    assert str(graph) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "src/" not in str(caught.value)


def test_an_operator_that_openvino_has_not_is_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind, [1, 3]) for name in ("x", "y")]
    body = helper.make_graph([helper.make_node("Foo", ["x"], ["y"], domain="my")], "g", values[:1], values[1:])
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("my", 1)]), tmp_path / "g.onnx")
    with pytest.raises(GraphError, match=r"cannot load .*my\.Foo"):
        open_session(tmp_path / "g.onnx", "openvino", ONE)


def test_an_output_keeps_its_name_where_openvino_merges_it_with_another_tensor(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind, [1, 3]) for name in ("x", "zz")]
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Identity", ["a"], ["zz"])]
    body = helper.make_graph(nodes, "g", values[:1], values[1:])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    with open_session(tmp_path / "g.onnx", "openvino", ONE) as session:
        assert [spec.name for spec in session.specs().outputs] == ["zz"]
        assert session.run({"x": np.array([[-1, 0, 2]], np.float32)})["zz"].tolist() == [[0, 0, 2]]


def test_bf16_is_only_where_it_was_asked_for(bundle_path: Path) -> None:
    from edgesam_deploy.runtime.openvino import native_bf16

    graph, feeds = load_bundle(bundle_path).graph("decoder"), feeds_of(bundle_path, "decoder")
    if not native_bf16():
        pytest.skip("this CPU does not compute in bfloat16")
    with (
        open_session(graph, "openvino", SessionOptions(threads=1, bf16=True)) as half,
        open_session(graph, "openvino", ONE) as full,
    ):
        assert str(getattr(half, "provider", "")).endswith("CPU, bf16")
        # bfloat16 has 8 bits of precision: 2^-8 is a step.
        assert 1e-4 < error_of(half.run(feeds), full.run(feeds)) < 0.2


def test_bf16_is_refused_where_there_is_none(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgesam_deploy.runtime import openvino

    graph, options = load_bundle(bundle_path).graph("decoder"), SessionOptions(threads=1, bf16=True)
    monkeypatch.setattr(openvino, "native_bf16", lambda: False)
    with pytest.raises(BackendError, match=r"does not compute in bfloat16: run without bf16, or .*onnxruntime"):
        open_session(graph, "openvino", options)
    with pytest.raises(InputError, match="onnxruntime does not compute in bf16: that is for openvino"):
        open_session(graph, "onnxruntime", options)


def test_threads_are_a_positive_number(bundle_path: Path) -> None:
    with pytest.raises(InputError, match="threads must be at least 1"):
        open_session(load_bundle(bundle_path).graph("decoder"), "openvino", SessionOptions(threads=0))


ALONE = """
import json, os, sys
before = os.sched_getaffinity(0)
from edgesam_deploy import load_bundle
with load_bundle({bundle!r}).open(threads=1, backend="openvino") as predictor:
    import numpy as np
    predictor.set_image(np.zeros((40, 60, 3), np.uint8))
    predictor.predict([[3, 3]], [1])
assert os.sched_getaffinity(0) == before
print(json.dumps(sorted(m for m in sys.modules if "telemetry" in m or m in ("torch", "onnx"))))
"""


def test_it_prints_nothing_and_tells_nobody(bundle_path: Path, tmp_path: Path) -> None:
    """openvino_telemetry sends an event when openvino is imported, and leaves an id in ~/intel: here it does neither.

    What openvino calls telemetry of its own is the stub that it has for where that package is missing.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(bundle=str(bundle_path))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment | {"HOME": str(tmp_path)},
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert [m for m in json.loads(done.stdout) if not m.startswith("openvino.")] == []
    assert list(tmp_path.iterdir()) == []
