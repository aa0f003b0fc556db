"""What ``survey.py`` measures: the models of a TOML file, and the ways in which each of them runs on this CPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgesam_deploy.device import int8_saturates
from edgesam_deploy.errors import InputError
from edgesam_deploy.recipe import load_recipe, read_toml
from edgesam_deploy.stages.evaluate import BundleModel, Model, RecipeModel, check_weights

FP32, BF16, INT8 = "fp32", "bf16", "int8"
TORCH, ORT, OPENVINO = "torch", "onnxruntime", "openvino"
# Bundle -> how `sam-export build` makes it. INT8 has a bundle for each backend, which run different encodings fastest.
BUILDS = {
    FP32: ("--precision", FP32, "--backend", ORT),
    f"{BF16}-{OPENVINO}": ("--precision", FP32, "--backend", OPENVINO, "--bf16"),
    f"{INT8}-{ORT}": ("--precision", INT8, "--backend", ORT),
    f"{INT8}-{OPENVINO}": ("--precision", INT8, "--backend", OPENVINO),
}
NO_FP16 = "no CPU backend computes in FP16: ONNX Runtime and OpenVINO compute such graphs in FP32"
NO_BF16 = "this CPU does not compute in bfloat16"
SATURATES = "rounded to INT8, summed in FP32: INT8 sums would saturate on this CPU"


@dataclass(frozen=True, slots=True)
class Way:
    """One precision on one backend."""

    precision: str
    backend: str

    @property
    def name(self) -> str:
        return f"{self.precision}, {self.backend}"

    @property
    def bundle(self) -> str | None:
        """Which of BUILDS runs, None for PyTorch."""
        if self.backend == TORCH:
            return None
        return FP32 if self.precision == FP32 else f"{self.precision}-{self.backend}"

    @property
    def note(self) -> str | None:
        """What its precision does not tell."""
        return SATURATES if (self.precision, self.backend) == (INT8, OPENVINO) and int8_saturates() else None


WAYS = (Way(FP32, TORCH), Way(FP32, ORT), Way(FP32, OPENVINO), Way(BF16, OPENVINO), Way(INT8, ORT), Way(INT8, OPENVINO))


def ways_here() -> tuple[list[Way], dict[str, str]]:
    """(what this machine computes, precision -> why it is left out)."""
    from edgesam_deploy.runtime.openvino import native_bf16

    if native_bf16():
        return list(WAYS), {"fp16": NO_FP16}
    return [way for way in WAYS if way.precision != BF16], {"fp16": NO_FP16, BF16: NO_BF16}


@dataclass(frozen=True, slots=True)
class Entry:
    """One model; see survey.toml. folder: of its bundles and evaluations. teacher: a recipe or a bundle's folder.
    ways: names of those that are measured, None for all."""

    label: str
    recipe: str
    folder: Path
    checkpoint: Path | None = None
    random_weights: bool = False
    teacher: str | None = None
    teacher_checkpoint: Path | None = None
    ways: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.label, re.ASCII):
            raise InputError(f"a label has letters, digits, '.', '_' and '-', got '{self.label}'")
        if self.random_weights and self.checkpoint is not None:
            raise InputError(f"{self.label}: random_weights and a checkpoint exclude each other")
        if self.teacher is None and self.teacher_checkpoint is not None:
            raise InputError(f"{self.label}: teacher_checkpoint goes with a teacher")
        if unknown := sorted(set(self.ways or ()) - {way.name for way in WAYS}):
            raise InputError(f"{self.label}: unknown ways {unknown}, expected some of {[way.name for way in WAYS]}")

    @property
    def random_file(self) -> Path:
        return self.folder / "random.pt"

    def weights(self) -> Path:
        """Raises CheckpointError where there are none; random ones may not have been made yet."""
        return self.random_file if self.random_weights else _weights(self.recipe, self.checkpoint)

    def measured(self) -> list[Way]:
        """The ways this machine computes, less those that are not asked for."""
        ways, _ = ways_here()
        return [way for way in ways if self.ways is None or way.name in self.ways]

    def model(self, way: Way) -> Model:
        if way.bundle is None:
            return RecipeModel(self.recipe, self.weights())
        return BundleModel(self.folder / way.bundle, way.backend)

    def network(self) -> RecipeModel:
        """In PyTorch FP32."""
        return RecipeModel(self.recipe, self.weights())

    def teacher_model(self) -> Model | None:
        """Raises CheckpointError where its weights are missing."""
        if self.teacher is None:
            return None
        if Path(self.teacher).is_dir():
            return BundleModel(Path(self.teacher))
        return RecipeModel(self.teacher, _weights(self.teacher, self.teacher_checkpoint))


def _weights(recipe: str, checkpoint: Path | None) -> Path:
    if checkpoint is None:
        from edgesam_deploy.models.checkpoint import checkpoint_path

        return checkpoint_path(load_recipe(recipe))
    check_weights(RecipeModel(recipe, checkpoint))
    return checkpoint


def load_entries(path: Path, work: Path) -> list[Entry]:
    """The entries of a TOML file, in its order. Raises InputError for what is not as survey.toml describes it."""
    listed = read_toml(path).get("entry")
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path} has no [[entry]]")
    entries = [_entry(raw, path, work) for raw in listed]
    labels = [entry.label for entry in entries]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InputError(f"{path} has two entries of the label '{twice}'")
    return entries


def _entry(raw: Mapping[str, Any], path: Path, work: Path) -> Entry:
    others = {"random_weights": bool, "ways": list}
    kinds = {field.name: others.get(field.name, str) for field in fields(Entry)}
    del kinds["folder"]
    if unknown := sorted(set(raw) - set(kinds)):
        raise InputError(f"{path}: unknown {unknown} in an entry, expected {sorted(kinds)}")
    for name in ("label", "recipe", *raw):
        if not isinstance(raw.get(name), kinds[name]):
            raise InputError(f"{path}: an entry needs '{name}' as {kinds[name].__name__}, got {raw.get(name)!r}")
    base = path.resolve().parent
    values = {**raw, "folder": work.resolve() / raw["label"]}
    values |= {name: _place(raw[name], base) for name in ("recipe", "teacher") if name in raw}
    values |= {name: base / raw[name] for name in ("checkpoint", "teacher_checkpoint") if name in raw}
    if "ways" in raw:
        values["ways"] = tuple(map(str, raw["ways"]))
    return Entry(**values)


def _place(name_or_path: str, base: Path) -> str:
    """A recipe's name as it is; a path from ``base`` on."""
    is_path = "/" in name_or_path or name_or_path.endswith(".toml")
    return str((base / name_or_path).resolve()) if is_path else name_or_path
