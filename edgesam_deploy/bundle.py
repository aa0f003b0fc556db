"""Bundles: the folder that a build makes and a runtime loads.

    encoder.onnx  decoder.onnx   the two graphs (contract.py)
    encoder.onnx.data            weights of a graph over 2 GB, which one ONNX file cannot hold; beside either graph
    manifest.json                schema, hashes, origin, geometry, image constants, results
    verify/                      images and answers.npz, the PyTorch FP32 model's answers (measure.accuracy)
    nodes.json                   what each node is meant to compute in, and why (measure.explain)
    encoder.engine decoder.engine    plans, made by ``sam-export compile``; a bundle for a GPU without them is a *kit*

``load_bundle`` reads the manifest and compares every file's hash; what it returns was neither cut nor changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgesam_deploy.contract import Geometry, encoder_contract
from edgesam_deploy.errors import BundleError, InputError, OutputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.recipe import PACKAGE, PRECISIONS, Pixels

if TYPE_CHECKING:
    from edgesam_deploy.predictor import Predictor
    from edgesam_deploy.runtime import SessionOptions
    from edgesam_deploy.runtime.plans import EngineRecord

T = TypeVar("T")
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
    """A loaded, intact bundle. manifest: its JSON as it stands, for origin and results.

    backend: the encoder's. backends, bf16: of each graph, what runs it, and whether in bfloat16 (``runtime``).
    """

    path: Path
    recipe: str
    precision: str
    target: str
    backend: str
    backends: Mapping[str, str]
    bf16: Mapping[str, bool]
    geometry: Geometry
    pixels: Pixels
    verified: bool
    manifest: Mapping[str, Any]

    @property
    def compiled(self) -> bool:
        """Whether it runs as it is; a kit must be compiled on its device first."""
        return self.backend not in ENGINE_BACKENDS or self.manifest.get("engines") is not None

    def on(self, backend: str | None = None, bf16: bool = False) -> Bundle:
        """This bundle with both graphs on one CPU backend, or as it is. bf16: both in bfloat16; without it, those that
        the bundle runs so on that very backend.

        Raises InputError for another kind of backend, for a bundle of engines, and for bf16 on a backend without it.
        """
        from edgesam_deploy.runtime import BF16_BACKENDS, CPU_BACKENDS

        if backend is None:
            return self
        if self.backend in ENGINE_BACKENDS or backend not in CPU_BACKENDS:
            raise InputError(
                f"a bundle for a CPU can be run on {' or '.join(CPU_BACKENDS)}, asked for was '{backend}'; "
                f"{self.path} runs on {self.backend}"
            )
        if bf16 and backend not in BF16_BACKENDS:
            raise InputError(f"{backend} does not compute in bf16: that is for {', '.join(BF16_BACKENDS)}")
        kept = {name: self.bf16[name] and self.backends[name] == backend for name in GRAPHS}
        return replace(self, backend=backend, backends=_each(backend), bf16=_each(True) if bf16 else kept)

    @property
    def runs_on(self) -> str:
        """What computes, for people: one name, or each graph's where they differ."""
        names = {name: f"{self.backends[name]}{' bf16' if self.bf16[name] else ''}" for name in GRAPHS}
        if len(set(names.values())) == 1:
            return names["encoder"]
        return ", ".join(f"{backend} ({name})" for name, backend in names.items())

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
        backend: str | None = None,
    ) -> Iterator[Predictor]:
        """A Predictor on this bundle's backends; sessions are freed on exit.

        threads: CPU threads, None for all cores. backend: another for both graphs, see ``on``. For engines: cuda,
        cuda_graph as in ``runtime.SessionOptions``, the graph is the encoder's; embedding_on_device: hand the embedding
        to the decoder without a copy. Raises BundleError if a graph's inputs or outputs are not those of the contract,
        if this is a kit or its engines are stale, BackendError for engines of another machine, and MissingExtraError
        where the backend is not installed.
        """
        from edgesam_deploy.runtime import SessionOptions
        from edgesam_deploy.sessions import open_predictor

        if backend is not None:
            with self.on(backend).open(threads) as predictor:
                yield predictor
            return
        files, trusted = {name: self.graph(name) for name in GRAPHS}, False
        if self.backend in ENGINE_BACKENDS:
            trusted = self._check_engines(cuda).version_compatible
            files = {name: self.engine(name) for name in GRAPHS}
        stay = tuple(s.name for s in encoder_contract(self.geometry).outputs) if embedding_on_device else ()
        options = SessionOptions(threads, cuda, cuda_graph, stay, host_code=trusted)
        how = {name: (self.backends[name], replace(options, bf16=self.bf16[name])) for name in GRAPHS}
        with open_predictor(files, how, self.geometry, self.pixels) as predictor:
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
    """A Predictor on given ``encoder`` and ``decoder`` files with the bundle's geometry and pixels, on one backend."""
    from edgesam_deploy.sessions import open_predictor

    with open_predictor(graphs, _each((backend, options)), bundle.geometry, bundle.pixels) as predictor:
        yield predictor


def _each(value: T) -> dict[str, T]:
    return dict.fromkeys(GRAPHS, value)


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
            backends=_backends(manifest),
            bf16=_per_graph(manifest, "bf16", False),
            geometry=Geometry(**manifest["geometry"]),
            pixels=Pixels(mean=tuple(pixels["mean"]), std=tuple(pixels["std"])),
            verified=bool(manifest["verified"]),
            manifest=manifest,
        )
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise BundleError(f"{folder / MANIFEST} lacks or garbles an entry: {error}. Build the bundle again") from error


def _per_graph(manifest: Mapping[str, Any], entry: str, default: T) -> dict[str, T]:
    """An optional entry with a value for each graph; the default for those that it leaves out."""
    values = {**_each(default), **dict(manifest.get(entry) or {})}
    if set(values) != set(GRAPHS) or not all(isinstance(v, type(default)) for v in values.values()):
        raise InputError(f"'{entry}' must be of {type(default).__name__} for {' and '.join(GRAPHS)}, is {values}")
    return values


def _backends(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What runs each graph: ``backend`` the encoder, and both where nothing else is said or it runs engines."""
    backend = str(manifest["backend"])
    if backend in ENGINE_BACKENDS:
        return _each(backend)
    backends = _per_graph(manifest, "graph_backends", backend)
    if backends["encoder"] != backend or backends["decoder"] in ENGINE_BACKENDS:
        raise InputError(f"'backend' {backend} does not go with 'graph_backends' {backends}")
    return backends


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
