"""Recipes: everything the project knows about one model, read from ``export/<name>.toml``.

A recipe is frozen on load; whoever needs a pixel constant, a size, a checkpoint address or a
precision rule reads it here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgesam_deploy.contract import Geometry
from edgesam_deploy.errors import InputError, RecipeError
from edgesam_deploy.published import Published, parse_published
from edgesam_deploy.weights import Checkpoint, parse_checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10: JetPack 6
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parent
PRECISIONS = ("fp32", "fp16", "int8")
CALIBRATORS = ("minmax", "entropy", "percentile")
RESIDUAL_ADDS = ("none", "conv", "all")
_TABLES = (
    "name",
    "summary",
    "family",
    "model",
    "checkpoint",
    "geometry",
    "pixels",
    "export",
    "precision",
    "verify",
    "published",
)
# Facts about the model that shape neither its networks nor its bundles.
_NOT_IN_DIGEST = ("family", "published")


@dataclass(frozen=True, slots=True)
class Pixels:
    """RGB normalisation constants, in units of uint8 pixel values: (pixel - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) != 3 or not all(isinstance(v, int | float) and math.isfinite(v) for v in value):
                raise RecipeError(f"pixels.{name} must be three numbers (R, G, B), got {value!r}")
        if not 0 <= min(self.mean) <= max(self.mean) <= 255:
            raise RecipeError(f"pixels.mean must be in 0..255, got {self.mean!r}")
        if min(self.std) <= 0:
            raise RecipeError(f"pixels.std must be positive, got {self.std!r}")

    @property
    def padding(self) -> tuple[int, int, int]:
        """The uint8 colour that normalises closest to 0, SAM's padding value."""
        r, g, b = (round(v) for v in self.mean)
        return (r, g, b)


@dataclass(frozen=True, slots=True)
class PrecisionRules:
    """What a precision may touch, for one of the two graphs.

    keep: regular expressions; a node whose name or output matches one stays in FP32.
    """

    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_keep(self.keep)


@dataclass(frozen=True, slots=True)
class Int8Rules:
    """How INT8 is calibrated and where Q/DQ goes; see ``stages.quantize``.

    Defaults, then what the target says (``[int8]`` in its TOML), then what the recipe says (``[precision.int8]``):
    ``target.int8_rules``.

    keep: as in PrecisionRules. calibrator: how a scale is chosen from the |x| that calibration saw, "minmax" (the
    largest), "entropy" (least Kullback-Leibler divergence) or "percentile" (the share, in percent, that it covers; the
    rest saturates). equalize: even out the channels of neighbouring convolutions first (``stages.equalize``), for
    models in which some are far larger than others. bias_correction: take the mean error of every INT8 layer of the
    encoder out again by its bias (``stages.bias_correction``); costs a pass over some images per layer.

    Which layers besides ordinary convolutions and products with a weight: depthwise (grouped convolutions),
    conv_transpose, attention (products of two activations). residual_add: which additions read INT8: "none"; "conv",
    where convolutional branches meet; "all", those of a transformer's residual stream too, which is known to collapse.
    """

    keep: tuple[str, ...] = ()
    calibrator: str = "percentile"
    percentile: float = 99.99
    equalize: bool = False
    bias_correction: bool = False
    depthwise: bool = True
    conv_transpose: bool = False
    attention: bool = False
    residual_add: str = "conv"

    def __post_init__(self) -> None:
        _check_keep(self.keep)
        number = isinstance(self.percentile, int | float) and not isinstance(self.percentile, bool)
        if not number or not 50.0 < self.percentile <= 100.0:
            raise RecipeError(f"precision.int8.percentile must be a number in (50, 100], got {self.percentile!r}")
        for name in ("equalize", "bias_correction", "depthwise", "conv_transpose", "attention"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"precision.int8.{name} must be true or false, got {getattr(self, name)!r}")
        for name, known in (("calibrator", CALIBRATORS), ("residual_add", RESIDUAL_ADDS)):
            if getattr(self, name) not in known:
                raise RecipeError(f"precision.int8.{name} must be one of {known}, got {getattr(self, name)!r}")


def int8_rules(*layers: Mapping[str, Any]) -> Int8Rules:
    """Rules from TOML tables, a later one before an earlier one. Raises RecipeError for an unknown or wrong entry."""
    entries: dict[str, Any] = {}
    for layer in layers:
        entries |= layer
    rules: Int8Rules = _build(Int8Rules, entries)
    return rules


def _check_keep(keep: object) -> None:
    if not isinstance(keep, tuple) or not all(isinstance(pattern, str) for pattern in keep):
        raise RecipeError(f"precision keep must be a list of regular expressions, got {keep!r}")
    for pattern in keep:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"precision keep holds an invalid regular expression {pattern!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model, from checkpoint to thresholds. ``digest`` identifies its content.

    family: the models it is listed with, such as "EfficientViT-SAM". int8_entries: what the recipe itself says of INT8;
    the rest is the target's, or the default (``int8_rules``). published: what its authors say of it.
    """

    name: str
    summary: str
    family: str
    architecture: str
    options: Mapping[str, Any]
    checkpoint: Checkpoint
    geometry: Geometry
    pixels: Pixels
    opset: int
    fp16: PrecisionRules
    int8_entries: Mapping[str, Any]
    min_mask_iou: Mapping[str, float]
    published: Published
    digest: str = field(compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or not self.family.strip():
            raise RecipeError(f"recipe {self.name}: family must be a text, got {self.family!r}")
        if not 17 <= self.opset <= 20:
            raise RecipeError(
                f"recipe {self.name}: export.opset must be 17..20 (fused LayerNormalization needs 17, "
                f"TensorRT 10.3 reads up to 20), got {self.opset}"
            )
        for precision in PRECISIONS:
            value = self.min_mask_iou.get(precision)
            if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise RecipeError(
                    f"recipe {self.name}: verify.min_mask_iou.{precision} must be a number in 0..1, got {value!r}"
                )
        int8_rules(self.int8_entries)

    @property
    def int8(self) -> Int8Rules:
        """The recipe's rules with defaults for what it leaves open, and no target's."""
        return int8_rules(self.int8_entries)


def data_folder(kind: str) -> Path:
    """The folder of ``export`` or ``engines`` TOMLs: inside an installed package, or beside it in a checkout."""
    installed = PACKAGE / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def available_recipes() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(p.stem for p in data_folder("export").glob("*.toml")))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or any recipe by the path of its TOML file.

    Raises RecipeError for an unknown name and for a file that does not validate.
    """
    path = recipe_path(name_or_path)
    return parse_recipe(read_toml(path), path)


def recipe_path(name_or_path: str | Path) -> Path:
    """The TOML of a shipped recipe, or the path as it is. Raises RecipeError for an unknown name."""
    path = Path(name_or_path)
    if path.suffix == ".toml":
        return path
    if str(name_or_path) not in available_recipes():
        raise RecipeError(
            f"unknown recipe '{name_or_path}': expected one of {', '.join(available_recipes())}, "
            "or the path of a .toml file"
        )
    return data_folder("export") / f"{name_or_path}.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; RecipeError names the file and what is wrong with it."""
    try:
        parsed: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    return parsed


def parse_recipe(raw: Mapping[str, Any], path: Path) -> Recipe:
    """Validate the parsed TOML of one recipe. ``path`` is for messages only."""
    try:
        model, precision = dict(raw["model"]), dict(raw.get("precision", {}))
        _check_entries("recipe", raw, _TABLES)
        _check_entries("precision", precision, PRECISIONS[1:])
        _check_entries("export", raw["export"], ("opset",))
        _check_entries("verify", raw["verify"], ("min_mask_iou",))
        _check_entries("verify.min_mask_iou", raw["verify"]["min_mask_iou"], PRECISIONS)
        return Recipe(
            name=str(raw["name"]),
            summary=str(raw["summary"]),
            family=raw["family"],
            architecture=str(model.pop("architecture")),
            options=model,
            checkpoint=parse_checkpoint(raw.get("checkpoint", {})),
            geometry=_build(Geometry, raw["geometry"]),
            pixels=_build(Pixels, raw["pixels"]),
            opset=int(raw["export"]["opset"]),
            fp16=_build(PrecisionRules, precision.get("fp16", {})),
            int8_entries=dict(precision.get("int8", {})),
            min_mask_iou=dict(raw["verify"]["min_mask_iou"]),
            published=parse_published(raw.get("published", {})),
            digest=_digest(raw),
        )
    except KeyError as error:
        raise RecipeError(f"recipe {path}: the entry {error} is missing") from error
    except (TypeError, ValueError, InputError) as error:
        raise RecipeError(f"recipe {path}: {error}") from error


def _build(cls: type[Any], raw: Mapping[str, Any]) -> Any:
    _check_entries(cls.__name__.lower(), raw, [f.name for f in dataclasses.fields(cls)])
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


def _check_entries(what: str, raw: Mapping[str, Any], known: Iterable[str]) -> None:
    """A misspelt entry must not pass for one that was left out."""
    if unknown := sorted(set(raw) - set(known)):
        raise RecipeError(f"unknown entries {unknown} for {what}, expected {sorted(known)}")


def _digest(raw: Mapping[str, Any]) -> str:
    """sha256 of what shapes the networks and bundles: comments and what others publish do not count as a change."""
    content = {name: entry for name, entry in raw.items() if name not in _NOT_IN_DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
