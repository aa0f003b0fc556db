"""Targets: what the project knows about one kind of device, read from ``engines/<name>.toml``."""

from __future__ import annotations

from dataclasses import dataclass, fields

from edgesam_deploy.errors import TargetError
from edgesam_deploy.recipe import data_folder, read_toml

ENCODINGS = ("cpu", "tensorrt")


@dataclass(frozen=True, slots=True)
class Target:
    """backend: the runtime that runs its bundles. int8_encoding: how INT8 is written for it (design of Q/DQ)."""

    name: str
    summary: str
    backend: str
    int8_encoding: str

    def __post_init__(self) -> None:
        if self.int8_encoding not in ENCODINGS:
            raise TargetError(
                f"target {self.name}: int8_encoding must be one of {ENCODINGS}, got {self.int8_encoding!r}"
            )


def available_targets() -> tuple[str, ...]:
    """Names of the shipped targets, sorted."""
    return tuple(sorted(p.stem for p in data_folder("engines").glob("*.toml")))


def load_target(name: str) -> Target:
    """A shipped target by name. Raises TargetError for an unknown name or an invalid file."""
    if name not in available_targets():
        raise TargetError(f"unknown target '{name}': expected one of {', '.join(available_targets())}")
    path = data_folder("engines") / f"{name}.toml"
    raw = read_toml(path)
    names = {f.name for f in fields(Target)}
    if set(raw) != names:
        raise TargetError(f"target {path}: expected the entries {sorted(names)}, got {sorted(raw)}")
    return Target(**raw)
