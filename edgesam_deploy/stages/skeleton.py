"""Typed graphs of a recipe's network without its weights: for what depends on shapes and types alone.

What a graph costs on a device, and what its builder makes of it, does not depend on the values of its weights. Initial
ones spare a download, and ranges of 1 a calibration; such graphs are never shipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from edgesam_deploy.errors import InputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.models import build_model
from edgesam_deploy.recipe import PRECISIONS, Int8Rules, PrecisionRules, Recipe
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.export import export_model
from edgesam_deploy.stages.simplify import simplify
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import Target

SEED = 0


def simplified_graphs(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """``encoder`` and ``decoder`` of the recipe in FP32, simplified, with initial weights, in ``folder``."""
    torch.manual_seed(SEED)
    protos = export_model(build_model(recipe), recipe)
    found = {}
    for name in list(protos):
        exported, found[name] = folder / f"{name}.exported.onnx", folder / f"{name}.fp32.onnx"
        graphs.save(protos.pop(name), exported, {})
        simplify(exported, found[name])
        graphs.remove(exported)
    return found


def typed_graphs(
    sources: Mapping[str, Path], recipe: Recipe, target: Target, precision: str, folder: Path
) -> dict[str, Path]:
    """Simplified FP32 graphs in a precision as ``sam-export build`` would write them for an engine of the target.

    The decoder of an INT8 build is not INT8, as in a build without a search. Raises InputError for a precision that
    does not exist.
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision '{precision}': expected one of {', '.join(PRECISIONS)}")
    rest = target.int8_rest if precision == "int8" else precision
    found = {}
    for name, source in sources.items():
        int8 = None if precision == "int8" and name == "encoder" else ()
        found[name] = type_without_ranges(
            source, recipe.fp16, target.rules_for(recipe), rest, folder / f"{name}.{precision}.{rest}.onnx", int8
        )
    return found


def type_without_ranges(
    source: Path, fp16: PrecisionRules, rules: Int8Rules, rest: str, output: Path, int8: tuple[str, ...] | None
) -> Path:
    """``stages.typed.type_graph`` in TensorRT's encoding, no range calling for more than the rules do."""
    if rest == "fp32" and int8 == ():
        return source
    return type_graph(source, unit_ranges(source), fp16, rules, Typing("tensorrt", rest), output, int8).output


def unit_ranges(source: Path) -> Ranges:
    """As if every tensor of the graph stayed within ±1."""
    model = graphs.inferred(graphs.load(source, weights=False))
    tensors = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    ones = {tensor.name: 1.0 for tensor in tensors}
    return Ranges(0, "made up", "minmax", 100.0, sha256_file(source), ones, ones)
