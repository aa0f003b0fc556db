"""Bundles: the folder that a build makes and a runtime loads.

    encoder.onnx  decoder.onnx   the two graphs (contract.py)
    manifest.json                schema, hashes, origin, geometry, image constants, results
    verify/                      images and answers.npz, the PyTorch FP32 model's answers (measure.accuracy)
    nodes.json                   kits only: what each node is meant to compute in (stages.typed_nodes)
    encoder.engine decoder.engine    plans, made by ``sam-export compile``; a bundle for a GPU without them is a *kit*

``load_bundle`` reads the manifest and compares every file's hash; what it returns was neither cut nor changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesam_deploy.contract import IMAGE_EMBEDDINGS, Geometry, GraphContract, TensorSpec, contracts
from edgesam_deploy.errors import BundleError, InputError, OutputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.recipe import PACKAGE, PRECISIONS, Pixels

if TYPE_CHECKING:
    from edgesam_deploy.predictor import Predictor
    from edgesam_deploy.runtime import SessionOptions
    from edgesam_deploy.runtime.plans import EngineRecord

SCHEMA = 1
MANIFEST = "manifest.json"
GRAPHS = ("encoder", "decoder")
ANSWERS = "verify/answers.npz"
NODES = "nodes.json"
# Backends that run plans, which are made on the device, and not the ONNX files themselves.
ENGINE_BACKENDS = ("tensorrt", "tensorrt_rtx")
ENGINE_SUFFIX = ".engine"
CURE = "Build it again or copy it whole"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded, intact bundle. manifest: its JSON as it stands, for origin and results."""

    path: Path
    recipe: str
    precision: str
    target: str
    backend: str
    geometry: Geometry
    pixels: Pixels
    verified: bool
    manifest: Mapping[str, Any]

    @property
    def compiled(self) -> bool:
        """Whether it runs as it is; a kit must be compiled on its device first."""
        return self.backend not in ENGINE_BACKENDS or self.manifest.get("engines") is not None

    def graph(self, name: str) -> Path:
        """The ONNX file of ``encoder`` or ``decoder``."""
        return self.path / f"{name}.onnx"

    def engine(self, name: str) -> Path:
        """The plan of ``encoder`` or ``decoder``, which a kit does not have yet."""
        return self.path / f"{name}{ENGINE_SUFFIX}"

    @contextmanager
    def open(
        self,
        threads: int | None = None,
        cuda: str = "ctypes",
        cuda_graph: bool = False,
        embedding_on_device: bool = True,
    ) -> Iterator[Predictor]:
        """A Predictor on this bundle's backend; sessions are freed on exit.

        threads: CPU threads, None for all cores. For engines: cuda, cuda_graph as in ``runtime.SessionOptions``, the
        graph is the encoder's; embedding_on_device: hand the embedding to the decoder without a copy. Raises
        BundleError if a graph's inputs or outputs are not those of the contract, if this is a kit or its engines are
        stale, and BackendError for engines of another machine.
        """
        from edgesam_deploy.runtime import SessionOptions

        files, trusted = {name: self.graph(name) for name in GRAPHS}, False
        if self.backend in ENGINE_BACKENDS:
            trusted = self._check_engines(cuda).version_compatible
            files = {name: self.engine(name) for name in GRAPHS}
        stay = (IMAGE_EMBEDDINGS,) if embedding_on_device else ()
        options = SessionOptions(threads, cuda, cuda_graph, stay, host_code=trusted)
        with open_graphs(files, self, options, self.backend) as predictor:
            yield predictor

    def _check_engines(self, cuda: str) -> EngineRecord:
        """What the engines are tied to. Raises unless they are there, built from these graphs and for this machine."""
        from edgesam_deploy.runtime.bindings import use
        from edgesam_deploy.runtime.cuda import open_cuda
        from edgesam_deploy.runtime.plans import EngineRecord, check_machine, check_record

        if not self.compiled:
            raise BundleError(
                f"{self.path} is a kit for '{self.target}': finish it on that device with  sam-export compile "
                f"{self.path}"
            )
        record = EngineRecord.parse(self.manifest["engines"], self.path / MANIFEST)
        check_record(record, self.path, {n: self.manifest["files"][f"{n}.onnx"]["sha256"] for n in GRAPHS})
        capability = open_cuda(cuda).compute_capability()
        check_machine(record, self.path, use(self.backend), capability)
        return record


@contextmanager
def open_graphs(
    graphs: Mapping[str, Path], bundle: Bundle, options: SessionOptions, backend: str
) -> Iterator[Predictor]:
    """A Predictor on given ``encoder`` and ``decoder`` files with the bundle's geometry and pixels."""
    from edgesam_deploy.predictor import Predictor
    from edgesam_deploy.runtime import BACKENDS, open_session

    if backend not in BACKENDS:
        raise BundleError(
            f"bundle {bundle.path} is for the backend '{backend}', this version has {', '.join(BACKENDS)}: "
            "upgrade edgesam-deploy"
        )
    expected = contracts(bundle.geometry)
    with ExitStack() as stack:
        sessions = {}
        for name in GRAPHS:
            # Prompts change their shape from call to call, so that a recorded graph pays for the encoder only; its
            # embedding stays on the device, masks do not.
            own = options if name == "encoder" else replace(options, cuda_graph=False, stay=())
            session = stack.enter_context(open_session(graphs[name], backend, own))
            _check_specs(session.specs(), expected[name], graphs[name])
            sessions[name] = session
        yield Predictor(sessions["encoder"], sessions["decoder"], bundle.geometry, bundle.pixels)


def shipped_bundle() -> Path:
    """The folder of the INT8 reference bundle inside the package."""
    return PACKAGE / "assets" / "bundles" / "reference-int8"


def load_bundle(path: str | Path, plans: bool = True) -> Bundle:
    """Load a bundle folder after checking its schema and the hash of every file.

    plans: False leaves engines unchecked, for those about to make new ones. Raises BundleError naming the file that is
    missing, altered or of another schema.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    for name, entry in manifest["files"].items():
        file = folder / name
        if file.suffix == ENGINE_SUFFIX and not plans:
            continue
        cure = f"Rebuild it on this device: sam-export compile {folder}" if file.suffix == ENGINE_SUFFIX else CURE
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise BundleError(f"{folder / MANIFEST} names a file outside the bundle: {name}")
        if not file.is_file():
            raise BundleError(f"bundle {folder} is incomplete: {name} is missing. {cure}")
        found = sha256_file(file)
        if found != entry["sha256"]:
            raise BundleError(
                f"bundle {folder} is broken: {name} has sha256 {found}, its manifest says {entry['sha256']}. {cure}"
            )
    return parse_manifest(manifest, folder)


def check_replaceable(folder: Path) -> None:
    """Raise OutputError unless a build may put its bundle at ``folder``: nothing is there, or a bundle is.

    A finished build replaces the folder with all that is in it; somebody's other files must not go that way.
    """
    if folder.name in ("", ".."):
        raise OutputError(f"cannot write a bundle to '{folder}': give the folder by its name, as in engines/mine")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise OutputError(
            f"cannot write a bundle to {folder}: the folder holds other files and no {MANIFEST}, and a build would "
            "replace them; give another --output"
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write a bundle to {folder}: it is a file, not a folder; give another --output")


def parse_manifest(manifest: Mapping[str, Any], folder: Path) -> Bundle:
    """The Bundle that a manifest describes; nothing but the manifest is looked at."""
    try:
        if manifest["precision"] not in PRECISIONS:
            raise BundleError(f"bundle {folder}: unknown precision {manifest['precision']!r}, expected {PRECISIONS}")
        missing = [f"{name}.onnx" for name in GRAPHS if f"{name}.onnx" not in manifest["files"]]
        if missing:
            raise BundleError(f"bundle {folder}: its manifest lists no {' and no '.join(missing)}")
        pixels = manifest["pixels"]
        return Bundle(
            path=folder,
            recipe=str(manifest["recipe"]["name"]),
            precision=str(manifest["precision"]),
            target=str(manifest["target"]),
            backend=str(manifest["backend"]),
            geometry=Geometry(**manifest["geometry"]),
            pixels=Pixels(mean=tuple(pixels["mean"]), std=tuple(pixels["std"])),
            verified=bool(manifest["verified"]),
            manifest=manifest,
        )
    except (KeyError, TypeError, InputError) as error:
        raise BundleError(f"{folder / MANIFEST} lacks or garbles an entry: {error}. Build the bundle again") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}. Give the folder that `sam-export build` made"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON: {error}. Build the bundle again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or not isinstance(manifest.get("files"), dict):
        raise BundleError(f"{path} is not a bundle manifest. Build the bundle again")
    if schema != SCHEMA:
        cure = "upgrade edgesam-deploy" if schema > SCHEMA else "build the bundle again"
        raise BundleError(f"{path} has schema {schema}, this version reads schema {SCHEMA}: {cure}")
    _check_entries(manifest, path)
    return manifest


def _check_entries(manifest: Mapping[str, Any], path: Path) -> None:
    """What a finished manifest has besides that of ``parse_manifest``: a hash for every file, and a threshold."""
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise BundleError(f"{path} states no sha256 for {name}. Build the bundle again")
    threshold = manifest.get("min_mask_iou")
    if not isinstance(threshold, int | float) or not 0.0 <= threshold <= 1.0:
        raise BundleError(f"{path}: min_mask_iou must be a number in 0..1, is {threshold!r}. Build the bundle again")


def _check_specs(found: GraphContract, expected: GraphContract, graph: Path) -> None:
    """Raise BundleError naming the first tensor that the manifest's geometry does not explain."""
    pairs = zip_longest((*expected.inputs, *expected.outputs), (*found.inputs, *found.outputs))
    for want, have in pairs:
        if want is None or have is None or not _same(want, have):
            raise BundleError(
                f"{graph} has other inputs or outputs than {MANIFEST} says: expected {want}, found {have}. "
                "Build the bundle again"
            )


def _same(want: TensorSpec, have: TensorSpec) -> bool:
    """Equal but for the names of dynamic axes, which a plan does not keep."""
    return (want.name, want.dtype, len(want.shape)) == (have.name, have.dtype, len(have.shape)) and all(
        a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in zip(want.shape, have.shape, strict=True)
    )
