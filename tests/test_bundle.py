"""Bundles: an intact one loads, any other is refused by one line that names what is wrong with it."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgesam_deploy.bundle import ANSWERS, MANIFEST, SCHEMA, check_replaceable, load_bundle
from edgesam_deploy.errors import BundleError, EdgeSAMError, InputError, MissingExtraError, OutputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.stages.verify import verify

Manifest = dict[str, Any]


@pytest.fixture
def copy(built: SimpleNamespace, tmp_path: Path) -> Path:
    """A bundle of the test's own to damage."""
    return Path(shutil.copytree(built.bundle, tmp_path / "copy"))


def edit(bundle: Path, change: Callable[[Manifest], object]) -> None:
    """Change a bundle's manifest in place."""
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def rehash(bundle: Path, name: str) -> None:
    """Let the manifest call the file what it now is: damage that hashes cannot show."""
    edit(bundle, lambda m: m["files"][name].update(sha256=sha256_file(bundle / name)))


def refusal(bundle: Path) -> str:
    """The one line that loading a bundle ends with."""
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(bundle) in message
    return message


def test_an_intact_bundle_loads_and_answers(built: SimpleNamespace) -> None:
    bundle = load_bundle(built.bundle)
    assert bundle.path == built.bundle
    assert (bundle.recipe, bundle.precision, bundle.target, bundle.backend) == ("tiny", "int8", "cpu", "onnxruntime")
    assert bundle.geometry.image_size == built.manifest["geometry"]["image_size"]
    assert bundle.verified is built.manifest["verified"] is built.result.passed
    with bundle.open(threads=1) as predictor:
        predictor.set_image(np.full((30, 50, 3), 127, dtype=np.uint8))
        assert predictor.predict([[10, 10]], [1]).masks.shape == (3, 30, 50)


def test_a_bundle_is_as_good_elsewhere_and_given_as_text(copy: Path) -> None:
    assert load_bundle(str(copy)).graph("encoder") == copy / "encoder.onnx"


def test_files_of_somebody_else_beside_a_bundles_do_not_matter(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert load_bundle(copy).recipe == "tiny"


def test_the_manifest_covers_every_file(built: SimpleNamespace) -> None:
    files = {p.relative_to(built.bundle).as_posix() for p in built.bundle.rglob("*") if p.is_file()}
    assert files - {MANIFEST} == set(built.manifest["files"])
    assert {"encoder.onnx", "decoder.onnx", ANSWERS} <= files


def test_a_bundle_tells_nothing_of_the_machine_that_made_it(built: SimpleNamespace) -> None:
    """No path of the build folder, of the checkout or of the user's home, in any file."""
    places = [built.bundle.parent, Path(__file__).resolve().parent.parent]
    places += [Path.home()] if Path.home() != Path("/") else []
    for path in (p for p in built.bundle.rglob("*") if p.is_file()):
        content = path.read_bytes()
        assert [str(place) for place in places if f"{place}/".encode() in content] == [], path.name


def test_one_changed_byte_in_any_file_is_found(copy: Path, built: SimpleNamespace) -> None:
    for name in built.manifest["files"]:
        whole = (copy / name).read_bytes()
        middle = len(whole) // 2
        (copy / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert f"is broken: {name} has sha256" in refusal(copy)
        (copy / name).write_bytes(whole)
    assert load_bundle(copy).recipe == "tiny"


def test_a_file_cut_short_is_found(copy: Path, built: SimpleNamespace) -> None:
    for name in built.manifest["files"]:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-1])
        assert f"is broken: {name}" in refusal(copy)
        (copy / name).write_bytes(whole)


def test_a_missing_file_is_found(copy: Path, built: SimpleNamespace) -> None:
    for name in built.manifest["files"]:
        (copy / name).rename(copy / "away")
        message = refusal(copy)
        assert f"is incomplete: {name} is missing" in message
        assert "copy it whole" in message
        (copy / "away").rename(copy / name)


# What stands in manifest.json -> what the message must say
UNREADABLE = {
    "empty": (b"", "is not readable JSON"),
    "garbage": (b"{{{", "is not readable JSON"),
    "cut": (b'{"schema": 1, "files": {', "is not readable JSON"),
    "binary": (bytes(range(256)), "is not readable JSON"),
    "not-utf-8": ('{"schema": 1, "name": "ü"}'.encode("latin-1"), "is not readable JSON"),
    "deeply-nested": (b"[" * 100_000, "is not readable JSON"),
    "a-list": (b"[1, 2]", "is not a bundle manifest"),
    "a-number": (b"1", "is not a bundle manifest"),
    "another-json": (b'{"name": "edgesam"}', "is not a bundle manifest"),
    "files-no-mapping": (b'{"schema": 1, "files": ["encoder.onnx"]}', "is not a bundle manifest"),
}


@pytest.mark.parametrize(("content", "says"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_manifest_that_is_none(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    message = refusal(tmp_path)
    assert f"{tmp_path / MANIFEST} {says}" in message
    assert "Build the bundle again" in message


def put(*path: str, value: object) -> Callable[[Manifest], None]:
    """A change that sets an entry, however deep."""

    def change(manifest: Manifest) -> None:
        for name in path[:-1]:
            manifest = manifest[name]
        manifest[path[-1]] = value

    return change


def drop(*path: str) -> Callable[[Manifest], None]:
    """A change that removes an entry, however deep."""

    def change(manifest: Manifest) -> None:
        for name in path[:-1]:
            manifest = manifest[name]
        del manifest[path[-1]]

    return change


ESCAPE = {"sha256": "0" * 64, "size_bytes": 1}
# A change to the manifest -> what the message must say
GARBLED: dict[str, tuple[Callable[[Manifest], None], str]] = {
    "newer-schema": (put("schema", value=SCHEMA + 1), f"this version reads schema {SCHEMA}: upgrade edgesam-deploy"),
    "older-schema": (put("schema", value=SCHEMA - 1), f"this version reads schema {SCHEMA}: build the bundle again"),
    "schema-text": (put("schema", value="1"), "is not a bundle manifest"),
    "no-schema": (drop("schema"), "is not a bundle manifest"),
    "no-files": (drop("files"), "is not a bundle manifest"),
    "file-above": (put("files", "../secret", value=ESCAPE), "names a file outside the bundle: ../secret"),
    "file-above-hidden": (put("files", "verify/../../secret", value=ESCAPE), "outside the bundle: verify/../../secret"),
    "file-absolute": (put("files", "/etc/hostname", value=ESCAPE), "outside the bundle: /etc/hostname"),
    "file-is-a-folder": (put("files", "verify", value=ESCAPE), "is incomplete: verify is missing"),
    "file-without-hash": (drop("files", "encoder.onnx", "sha256"), "states no sha256 for encoder.onnx"),
    "file-hash-number": (put("files", "encoder.onnx", "sha256", value=7), "states no sha256 for encoder.onnx"),
    "file-entry-text": (put("files", "encoder.onnx", value="x"), "states no sha256 for encoder.onnx"),
    "file-hash-of-another": (put("files", "encoder.onnx", "sha256", value="0" * 64), "is broken: encoder.onnx"),
    "no-encoder": (drop("files", "encoder.onnx"), "lists no encoder.onnx"),
    "no-decoder": (drop("files", "decoder.onnx"), "lists no decoder.onnx"),
    "no-precision": (drop("precision"), "lacks or garbles an entry: 'precision'"),
    "unknown-precision": (put("precision", value="int4"), "unknown precision 'int4'"),
    "no-backend": (drop("backend"), "lacks or garbles an entry: 'backend'"),
    "graph-backends-text": (put("graph_backends", value="openvino"), "lacks or garbles an entry"),
    "graph-backends-more": (put("graph_backends", value={"neck": "openvino"}), "'graph_backends' must be of str"),
    "graph-backends-number": (put("graph_backends", value={"decoder": 7}), "'graph_backends' must be of str"),
    "graph-backends-of-another": (put("graph_backends", value={"encoder": "openvino"}), "does not go with"),
    "graph-backends-mixed": (put("graph_backends", value={"decoder": "tensorrt"}), "does not go with"),
    "bf16-text": (put("bf16", value={"encoder": "yes"}), "'bf16' must be of bool for encoder and decoder"),
    "no-target": (drop("target"), "lacks or garbles an entry: 'target'"),
    "no-recipe": (drop("recipe"), "lacks or garbles an entry: 'recipe'"),
    "recipe-text": (put("recipe", value="tiny"), "lacks or garbles an entry"),
    "no-verified": (drop("verified"), "lacks or garbles an entry: 'verified'"),
    "no-geometry": (drop("geometry"), "lacks or garbles an entry: 'geometry'"),
    "geometry-list": (put("geometry", value=[128, 128]), "lacks or garbles an entry"),
    "geometry-more": (put("geometry", "depth", value=3), "lacks or garbles an entry"),
    "geometry-less": (drop("geometry", "num_masks"), "lacks or garbles an entry"),
    "geometry-negative": (put("geometry", "image_size", value=-1), "geometry.image_size must be a positive integer"),
    "no-pixels": (drop("pixels"), "lacks or garbles an entry: 'pixels'"),
    "pixels-two": (put("pixels", "mean", value=[1, 2]), "pixels.mean must be three numbers"),
    "pixels-text": (put("pixels", "mean", value="rgb"), "pixels.mean must be three numbers"),
    "no-threshold": (drop("min_mask_iou"), "min_mask_iou must be a number in 0..1, is None"),
    "threshold-text": (put("min_mask_iou", value="high"), "min_mask_iou must be a number in 0..1, is 'high'"),
    "threshold-above-1": (put("min_mask_iou", value=93), "min_mask_iou must be a number in 0..1, is 93"),
    "threshold-nan": (put("min_mask_iou", value=float("nan")), "min_mask_iou must be a number in 0..1, is nan"),
}


@pytest.mark.parametrize(("change", "says"), GARBLED.values(), ids=GARBLED)
def test_a_manifest_that_is_not_ours(copy: Path, change: Callable[[Manifest], None], says: str) -> None:
    edit(copy, change)
    assert says in refusal(copy)


@pytest.mark.parametrize("value", [float("nan"), 300.0], ids=str)
def test_pixel_constants_that_are_none(copy: Path, value: float) -> None:
    edit(copy, put("pixels", "mean", value=[value, 100.0, 100.0]))
    with pytest.raises(BundleError, match=r"pixels\.mean"), load_bundle(copy).open(threads=1) as predictor:
        predictor.set_image(np.zeros((4, 9, 3), dtype=np.uint8))


@pytest.mark.parametrize("make", [lambda _: None, Path.mkdir, Path.touch], ids=["missing", "empty-folder", "a-file"])
def test_a_path_that_is_no_bundle(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "folder")
    message = refusal(tmp_path / "folder")
    assert f"it has no {MANIFEST}" in message
    assert "Give the folder that `sam-export build` made" in message


@pytest.mark.parametrize(
    ("name", "value", "graph", "tensor"),
    [
        ("image_size", 256, "encoder", "name='image'"),
        ("embedding_size", 16, "encoder", "name='image_embeddings'"),
        ("embedding_channels", 128, "encoder", "name='image_embeddings'"),
        ("num_masks", 3, "decoder", "name='low_res_masks'"),
    ],
)
def test_a_geometry_that_is_not_the_graphs(copy: Path, name: str, value: int, graph: str, tensor: str) -> None:
    """The graph is named, and the first tensor that differs, as expected and as found."""
    edit(copy, put("geometry", name, value=value))
    bundle = load_bundle(copy)
    with pytest.raises(BundleError) as caught, bundle.open(threads=1):
        pytest.fail("the bundle opened")
    message = str(caught.value)
    assert message.startswith(f"{copy / graph}.onnx has other inputs or outputs than {MANIFEST} says: expected")
    assert message.count(tensor) == 2
    assert len(message.splitlines()) == 1


def test_the_graphs_of_a_bundle_are_not_exchanged_unseen(copy: Path) -> None:
    shutil.copyfile(copy / "decoder.onnx", copy / "encoder.onnx")
    rehash(copy, "encoder.onnx")
    with pytest.raises(BundleError, match=r"encoder\.onnx has other inputs"), load_bundle(copy).open(threads=1):
        pytest.fail("the bundle opened")


def test_a_backend_that_this_version_has_not(copy: Path) -> None:
    edit(copy, put("backend", value="quantum"))
    edit(copy, put("graph_backends", value=None))
    bundle = load_bundle(copy)
    with (
        pytest.raises(BundleError, match=r"for the backend 'quantum', this version has onnxruntime.*: upgrade"),
        bundle.open(),
    ):
        pytest.fail("the bundle opened")


def on(encoder: str, decoder: str, bf16: bool = False) -> Callable[[Manifest], object]:
    """A change that runs each graph on a backend. bf16: the encoder's."""
    backends = {"encoder": encoder, "decoder": decoder}
    return lambda m: m.update(backend=encoder, graph_backends=backends, bf16={"encoder": bf16, "decoder": False})


def test_a_manifest_of_before_runs_both_graphs_on_its_backend(copy: Path) -> None:
    edit(copy, lambda m: [m.pop(name, None) for name in ("graph_backends", "bf16")])
    bundle = load_bundle(copy)
    assert bundle.backends == {"encoder": "onnxruntime", "decoder": "onnxruntime"}
    assert bundle.bf16 == {"encoder": False, "decoder": False}
    assert bundle.runs_on == "onnxruntime"


def test_each_graph_runs_on_its_backend(copy: Path) -> None:
    if find_spec("openvino") is None:
        pytest.skip("needs the extra openvino")
    edit(copy, on("openvino", "onnxruntime"))
    bundle = load_bundle(copy)
    assert (bundle.backend, bundle.runs_on) == ("openvino", "openvino (encoder), onnxruntime (decoder)")
    with bundle.open(threads=1) as predictor:
        kinds = {type(session).__name__ for session in (predictor.encoder, predictor.decoder)}
        assert kinds == {"OpenVINOSession", "OnnxRuntimeSession"}
        predictor.set_image(np.full((30, 50, 3), 127, dtype=np.uint8))
        assert predictor.predict([[10, 10]], [1]).masks.shape == (3, 30, 50)
    with bundle.open(threads=1, backend="onnxruntime") as predictor:
        assert type(predictor.encoder).__name__ == "OnnxRuntimeSession"
    result = verify(bundle, threads=1)
    assert result.witness == bundle.runs_on
    # INT8 on the backend that runs it: not the recorded number to the last digit, but as good.
    assert result.mask_iou.mean == pytest.approx(bundle.manifest["results"]["mask_iou"]["mean"], abs=0.01)


def test_another_backend_takes_no_bf16_along(copy: Path) -> None:
    edit(copy, on("openvino", "onnxruntime", bf16=True))
    bundle = load_bundle(copy)
    assert bundle.runs_on == "openvino bf16 (encoder), onnxruntime (decoder)"
    assert bundle.on("openvino").runs_on == "openvino bf16 (encoder), openvino (decoder)"
    assert bundle.on("onnxruntime").runs_on == "onnxruntime"
    assert bundle.on("openvino", bf16=True).runs_on == "openvino bf16"
    assert bundle.on(None) is bundle


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "engines": ({"backend": "tensorrt"}, "can be run on onnxruntime or openvino, asked for was 'tensorrt'"),
    "unknown": ({"backend": "tpu"}, "can be run on onnxruntime or openvino, asked for was 'tpu'"),
    "bf16": ({"backend": "onnxruntime", "bf16": True}, "onnxruntime does not compute in bf16"),
}


@pytest.mark.parametrize(("asked", "says"), OTHER.values(), ids=OTHER)
def test_backends_that_a_bundle_cannot_be_run_on(built: SimpleNamespace, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_bundle(built.bundle).on(**asked)


def test_a_bundle_of_engines_runs_on_nothing_else(copy: Path) -> None:
    edit(copy, put("backend", value="tensorrt"))
    with pytest.raises(InputError, match=r"a bundle for a CPU can be run on .* runs on tensorrt$"):
        load_bundle(copy).on("openvino")


def test_openvino_that_is_missing_names_both_ways_out(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy, on("openvino", "onnxruntime"))
    for name in ("edgesam_deploy.runtime.openvino", "openvino"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError) as caught, load_bundle(copy).open(threads=1):
        pytest.fail("the bundle opened")
    assert str(caught.value) == (
        "this needs the Python package 'openvino', which is not installed: run  "
        "pip install 'edgesam-deploy[openvino]', or run the same graphs with  --backend onnxruntime"
    )
    with load_bundle(copy).open(threads=1, backend="onnxruntime") as predictor:
        assert type(predictor.decoder).__name__ == "OnnxRuntimeSession"


@pytest.mark.parametrize("content", [b"", b"no graph at all"], ids=["empty", "text"])
def test_a_graph_that_is_none_is_named(copy: Path, content: bytes) -> None:
    (copy / "encoder.onnx").write_bytes(content)
    rehash(copy, "encoder.onnx")
    bundle = load_bundle(copy)
    with pytest.raises(EdgeSAMError, match=r"encoder\.onnx") as caught, bundle.open(threads=1):
        pytest.fail("the bundle opened")
    assert len(str(caught.value).splitlines()) == 1


class Explosive:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def cut_answers(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty_answers(path: Path) -> None:
    path.write_bytes(b"")


def text_answers(path: Path) -> None:
    path.write_text("mask IoU 1.0")


def fewer_answers(path: Path) -> None:
    np.savez(path, files=np.array(["cat.jpg"]))


def pickled_answers(path: Path) -> None:
    bomb = np.empty(1, dtype=object)
    bomb[0] = Explosive(path.parent / "exploded")
    np.savez(path, files=bomb)


def bare_pickle(path: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps(Explosive(path.parent / "exploded")))


@pytest.mark.parametrize(
    "damage",
    [
        cut_answers,
        empty_answers,
        text_answers,
        fewer_answers,
        pickled_answers,
        bare_pickle,
    ],
    ids=lambda f: f.__name__,
)
def test_recorded_answers_that_are_none(copy: Path, damage: Callable[[Path], None]) -> None:
    """And whatever they hold, nothing is unpickled."""
    damage(copy / ANSWERS)
    rehash(copy, ANSWERS)
    with pytest.raises(BundleError) as caught:
        verify(load_bundle(copy))
    message = str(caught.value)
    assert f"{copy / ANSWERS} does not hold recorded answers" in message
    assert len(message.splitlines()) == 1
    assert not (copy / "verify" / "exploded").exists()
    del caught
    gc.collect()  # a file left open shows here, as a warning, and warnings are errors


def test_the_explosive_explodes_where_it_is_unpickled(tmp_path: Path) -> None:
    """Without this the test above could not fail."""
    (tmp_path / "verify").mkdir()
    pickled_answers(tmp_path / "verify" / "answers.npz")
    with np.load(tmp_path / "verify" / "answers.npz", allow_pickle=True) as file:
        assert file["files"].shape == (1,)
    assert (tmp_path / "verify" / "exploded").exists()


def test_a_bundle_without_answers_says_how_to_verify_it(copy: Path) -> None:
    edit(copy, drop("files", ANSWERS))
    with pytest.raises(BundleError, match=f"carries no {ANSWERS}; give images with --images"):
        verify(load_bundle(copy))


def test_a_build_may_replace_a_bundle_or_nothing(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (copy, tmp_path / "empty", tmp_path / "new", tmp_path / "deep" / "new"):
        check_replaceable(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "/"], ids=repr)
def test_a_bundle_needs_a_name(name: str) -> None:
    with pytest.raises(OutputError, match="give the folder by its name"):
        check_replaceable(Path(name))


def test_a_build_does_not_replace_other_things(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"irreplaceable")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"photos: the folder holds other files and no manifest\.json"):
        check_replaceable(tmp_path / "photos")
    with pytest.raises(OutputError, match="it is a file, not a folder"):
        check_replaceable(tmp_path / "file")
