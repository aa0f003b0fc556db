"""Targets: what the project knows about one kind of device, read from ``engines/<name>.toml``.

Peaks are dense: vendors like to print twice as much, for weights of which two in four are zero, and ours are not.
Every figure of a device names its source, or says how it was derived.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import RecipeError, TargetError
from edgesam_deploy.recipe import PRECISIONS, Int8Rules, Recipe, data_folder, int8_rules, read_toml

ENCODINGS = ("cpu", "tensorrt")
# What nodes that are not INT8 compute in, beside those that are.
RESTS = ("fp32", "fp16")
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_rtx")
# What a device states, and therefore what its sources must cover, no more and no less.
FIGURES = (
    "compute_capability",
    "memory_gb",
    "memory_bandwidth_gb_s",
    "fp16_dense_tflops",
    "int8_dense_tops",
    "power_modes",
)
_VERSION = re.compile(r"\d+(\.\d+)*")


def version_key(version: str) -> tuple[int, ...]:
    """``10.3.0.30`` -> (10, 3, 0, 30), to compare versions; letters after the digits (``11.4rc1``) do not count.

    Raises TargetError for a text that does not begin with a digit.
    """
    match = _VERSION.match(version)
    if match is None:
        raise TargetError(f"expected a version such as 10.3, got {version!r}")
    return tuple(int(part) for part in match[0].split("."))


@dataclass(frozen=True, slots=True)
class PowerMode:
    """One ``nvpmodel`` mode of a Jetson, or the power limit of a card.

    watts: the budget, None where the mode sets none. max_gpu_mhz: the GPU's highest clock, None where unknown.
    """

    name: str
    watts: float | None = None
    max_gpu_mhz: float | None = None

    def __post_init__(self) -> None:
        _check_text("power mode", self, "name")
        for name in ("watts", "max_gpu_mhz"):
            if getattr(self, name) is not None:
                _check_positive(f"power mode {self.name}", self, name)


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a target. sources: figure -> document, address or derivation.

    memory_gb: as sold, shared with the CPU on a Jetson. memory_bandwidth_gb_s: DRAM, 10⁹ bytes per second.
    fp16_dense_tflops, int8_dense_tops: tensor core peaks at the highest clock; a multiply-add is two operations.
    """

    name: str
    compute_capability: str
    memory_gb: float
    memory_bandwidth_gb_s: float
    fp16_dense_tflops: float
    int8_dense_tops: float
    power_modes: tuple[PowerMode, ...]
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        _check_text("device", self, "name")
        what = f"device {self.name}"
        if not re.fullmatch(r"\d+\.\d", self.compute_capability):
            raise TargetError(f"{what}: compute_capability must look like 8.7, got {self.compute_capability!r}")
        for name in ("memory_gb", "memory_bandwidth_gb_s", "fp16_dense_tflops", "int8_dense_tops"):
            _check_positive(what, self, name)
        if set(self.sources) != set(FIGURES) or not all(isinstance(s, str) and s for s in self.sources.values()):
            raise TargetError(f"{what}: every figure needs a source: expected {FIGURES}, got {tuple(self.sources)}")


@dataclass(frozen=True, slots=True)
class Release:
    """One JetPack release: the software that a Jetson comes with. l4t: the Jetson Linux release, as ``36.4.3``."""

    jetpack: str
    l4t: str
    tensorrt: str
    cuda: str
    python: str
    source: str

    def __post_init__(self) -> None:
        for name in ("jetpack", "l4t", "tensorrt", "cuda", "python"):
            if not _VERSION.fullmatch(getattr(self, name)):
                raise TargetError(f"release {self.jetpack}: {name} must be a version, got {getattr(self, name)!r}")
        _check_text(f"release {self.jetpack}", self, "source")


@dataclass(frozen=True, slots=True)
class Target:
    """backend: the runtime that runs its bundles. int8_encoding: how INT8 is written for it (``stages.cpu_encoding``).

    int8_rest: what computes beside INT8. int8: what INT8 may touch on it, entries of ``recipe.Int8Rules``; a recipe's
    own go before them (``rules_for``).

    precision: what is built unless another is asked for. tensorrt_min (included) and tensorrt_below (not included):
    the versions of TensorRT, or of TensorRT for RTX where that is the backend. workspace_mb: scratch memory that the
    engine builder may use, MiB. releases: the JetPack releases it is for, empty where there is no JetPack.
    """

    name: str
    summary: str
    backend: str
    int8_encoding: str
    precision: str
    int8_rest: str = "fp32"
    int8: Mapping[str, Any] = field(default_factory=dict)
    tensorrt_min: str | None = None
    tensorrt_below: str | None = None
    workspace_mb: int | None = None
    devices: tuple[Device, ...] = ()
    releases: tuple[Release, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"target {self.name}"
        known_values = {
            "int8_encoding": ENCODINGS,
            "int8_rest": RESTS,
            "backend": BACKENDS,
            "precision": PRECISIONS,
        }
        for name, known in known_values.items():
            if getattr(self, name) not in known:
                raise TargetError(f"{what}: {name} must be one of {known}, got {getattr(self, name)!r}")
        if not isinstance(self.int8, Mapping):
            raise TargetError(f"{what}: int8 must be a table of rules, got {self.int8!r}")
        try:
            int8_rules(self.int8)
        except RecipeError as error:
            raise TargetError(f"{what}: {error}") from error
        if not isinstance(self.notes, tuple) or not all(isinstance(note, str) for note in self.notes):
            raise TargetError(f"{what}: notes must be a list of sentences, got {self.notes!r}")
        if self.backend == "onnxruntime":
            given = [n for n in ("tensorrt_min", "tensorrt_below", "workspace_mb", "releases") if getattr(self, n)]
            if given:
                raise TargetError(f"{what}: {given} are for TensorRT, and its backend is {self.backend}")
            return
        self._check_tensorrt(what)

    def _check_tensorrt(self, what: str) -> None:
        if self.tensorrt_min is None or self.tensorrt_below is None or not self.devices:
            raise TargetError(f"{what}: backend {self.backend} needs tensorrt_min, tensorrt_below and devices")
        _check_positive(what, self, "workspace_mb")
        if version_key(self.tensorrt_min) >= version_key(self.tensorrt_below):
            raise TargetError(f"{what}: tensorrt_min {self.tensorrt_min} is not below {self.tensorrt_below}")
        for release in self.releases:
            if not self.accepts_tensorrt(release.tensorrt):
                raise TargetError(f"{what}: JetPack {release.jetpack} has TensorRT {release.tensorrt}, out of range")

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Those of its devices, ascending, each once."""
        return tuple(sorted({d.compute_capability for d in self.devices}, key=version_key))

    def rules_for(self, recipe: Recipe) -> Int8Rules:
        """What INT8 may touch of a recipe's model on this target: the target's rules, and the recipe's before them."""
        return int8_rules(self.int8, recipe.int8_entries)

    def accepts_tensorrt(self, version: str) -> bool:
        """Whether a TensorRT version, as ``10.3.0.30``, is in the target's range. Raises TargetError for no version."""
        if self.tensorrt_min is None or self.tensorrt_below is None:
            return False
        return version_key(self.tensorrt_min) <= version_key(version) < version_key(self.tensorrt_below)


def available_targets() -> tuple[str, ...]:
    """Names of the shipped targets, sorted."""
    return tuple(sorted(p.stem for p in data_folder("engines").glob("*.toml")))


def load_target(name: str) -> Target:
    """A shipped target by name. Raises TargetError for an unknown name or an invalid file."""
    if name not in available_targets():
        raise TargetError(f"unknown target '{name}': expected one of {', '.join(available_targets())}")
    path = data_folder("engines") / f"{name}.toml"
    try:
        raw = read_toml(path)
    except RecipeError as error:
        raise TargetError(str(error)) from error
    return parse_target(raw, path)


def parse_target(raw: Mapping[str, Any], path: Path) -> Target:
    """Validate the parsed TOML of one target. ``path`` is for messages only."""
    try:
        _check_entries("target", raw, Target)
        entries = dict(raw)
        entries["devices"] = tuple(_device(device) for device in raw.get("devices", ()))
        entries["releases"] = tuple(_build(Release, release) for release in raw.get("releases", ()))
        notes = raw.get("notes", [])
        entries["notes"] = tuple(notes) if isinstance(notes, list) else notes
        return Target(**entries)
    except KeyError as error:
        raise TargetError(f"target {path}: the entry {error} is missing") from error
    except (TypeError, ValueError, TargetError) as error:
        raise TargetError(f"target {path}: {error}") from error


def _device(raw: Mapping[str, Any]) -> Device:
    _check_entries("device", raw, Device)
    modes = tuple(_build(PowerMode, mode) for mode in raw["power_modes"])
    return Device(**{**raw, "power_modes": modes, "sources": dict(raw["sources"])})


def _build(cls: type[Any], raw: Mapping[str, Any]) -> Any:
    _check_entries(cls.__name__.lower(), raw, cls)
    return cls(**raw)


def _check_entries(what: str, raw: Iterable[str], cls: type[Any]) -> None:
    """A misspelt entry must not pass for one that was left out."""
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(raw) - known):
        raise TargetError(f"unknown entries {unknown} for {what}, expected {sorted(known)}")


def _check_positive(what: str, owner: object, name: str) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise TargetError(f"{what}: {name} must be a positive number, got {value!r}")


def _check_text(what: str, owner: object, name: str) -> None:
    value = getattr(owner, name)
    if not isinstance(value, str) or not value.strip():
        raise TargetError(f"{what}: {name} must be a text, got {value!r}")
