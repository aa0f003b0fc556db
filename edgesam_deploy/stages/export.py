"""Stage 1: checkpoint -> encoder.onnx and decoder.onnx, FP32, straight from PyTorch's exporter."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from edgesam_deploy.contract import (
    POINTS_AXIS,
    PROMPTS_AXIS,
    GraphContract,
    contracts,
    decoder_contract,
    encoder_contract,
)
from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.models import graph_modules
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.models.session import PyTorchSession
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs

# The most prompts, and points of a prompt, that one decoder call may have.
MAX_DYNAMIC = 1024


@dataclass(frozen=True, slots=True)
class ExportResult:
    """encoder, decoder: the written files. max_error: ONNX Runtime against PyTorch, relative (graph.relative_error)."""

    encoder: Path
    decoder: Path
    encoder_nodes: int
    decoder_nodes: int
    max_error: float


def export(recipe: Recipe, checkpoint: Path, output: Path) -> ExportResult:
    """Export both graphs into the folder ``output``.

    Raises CheckpointError for weights that do not fit and GraphError if a graph breaks the contract or does not
    compute what PyTorch computes.
    """
    model = load_model(recipe, checkpoint)
    origin = {"stage": "export", "architecture": recipe.architecture, "torch": torch.__version__}
    origin["checkpoint_sha256"] = sha256_file(checkpoint)
    protos = export_model(model, recipe)
    for name, proto in protos.items():
        graphs.save(proto, output / f"{name}.onnx", origin)
    errors = [_compare(model, recipe, output / f"{name}.onnx", name) for name in protos]
    return ExportResult(
        encoder=output / "encoder.onnx",
        decoder=output / "decoder.onnx",
        encoder_nodes=len(protos["encoder"].graph.node),
        decoder_nodes=len(protos["decoder"].graph.node),
        max_error=max(errors),
    )


def export_model(model: nn.Module, recipe: Recipe) -> dict[str, onnx.ModelProto]:
    """``{"encoder": ..., "decoder": ...}`` as ONNX, tensors named by the contract, nodes by their module."""
    encoder, decoder = graph_modules(model, recipe)
    geometry = recipe.geometry
    prompts = torch.export.Dim(PROMPTS_AXIS, min=1, max=MAX_DYNAMIC)
    points = torch.export.Dim(POINTS_AXIS, min=1, max=MAX_DYNAMIC)
    axes = {PROMPTS_AXIS: prompts, POINTS_AXIS: points}
    dynamic = tuple(
        {i: axes[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} or None
        for spec in decoder_contract(geometry).inputs
    )
    return {
        "encoder": _export(encoder, _examples(encoder_contract(geometry)), encoder_contract(geometry), None, recipe),
        "decoder": _export(decoder, _examples(decoder_contract(geometry)), decoder_contract(geometry), dynamic, recipe),
    }


def check_contract(path: Path, contract: GraphContract) -> None:
    """Raise GraphError unless the graph's inputs and outputs are those of the contract, by name, dtype and shape."""
    with open_session(path) as session:
        found = session.specs()
    for kind, want, have in (("input", contract.inputs, found.inputs), ("output", contract.outputs, found.outputs)):
        if want != have:
            wrong = next((w for w, h in zip(want, have, strict=False) if w != h), want[-1])
            raise GraphError(f"{path} breaks the contract: expected {kind} {wrong}, the graph has {list(have)}")


def _examples(contract: GraphContract) -> tuple[Tensor, ...]:
    """Inputs to trace with: 2 prompts of 3 points, since an axis of length 1 would be taken for a constant."""
    sizes = {PROMPTS_AXIS: 2, POINTS_AXIS: 3}
    return tuple(
        torch.ones([sizes[d] if isinstance(d, str) else d for d in spec.shape], dtype=getattr(torch, spec.dtype))
        for spec in contract.inputs
    )


def _export(
    module: nn.Module, examples: tuple[Tensor, ...], contract: GraphContract, dynamic: Any, recipe: Recipe
) -> onnx.ModelProto:
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=recipe.opset,
            input_names=[s.name for s in contract.inputs],
            output_names=[s.name for s in contract.outputs],
            dynamic_shapes=dynamic,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise GraphError(f"PyTorch {torch.__version__} exported nothing for recipe '{recipe.name}'")
    proto: onnx.ModelProto = program.model_proto
    _name_nodes_by_module(proto)
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset != recipe.opset or graphs.foreign_nodes(proto):
        raise GraphError(
            f"PyTorch {torch.__version__} exported opset {opset} with {graphs.foreign_nodes(proto) or 'no'} foreign "
            f"operators; recipe '{recipe.name}' needs opset {recipe.opset} and the default ONNX domain only"
        )
    return proto


def _name_nodes_by_module(proto: onnx.ModelProto) -> None:
    """Name every node ``module.path/node``, so that a recipe's rules can say ``image_encoder\\.neck``."""
    seen: set[str] = set()
    for node in proto.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = [s for s in ast.literal_eval(scopes)[:-1] if s]
        name = f"{modules[-1] if modules else ''}/{node.name}"
        while name in seen:
            name += "_"
        seen.add(name)
        node.name = name


def _compare(model: nn.Module, recipe: Recipe, path: Path, name: str) -> float:
    """Relative error of the written graph against PyTorch's own modules. GraphError above ``graphs.AGREEMENT``."""
    contract = contracts(recipe.geometry)[name]
    check_contract(path, contract)
    feeds = graphs.example_feeds(graphs.load(path, weights=False), seed=1)
    module = dict(zip(("encoder", "decoder"), graph_modules(model, recipe), strict=True))[name]
    with open_session(path) as session:
        error = graphs.relative_error(PyTorchSession(module, contract).run(feeds), session.run(feeds))
    if error > graphs.AGREEMENT:
        raise GraphError(
            f"the exported {name} differs from PyTorch by {error:.2g} of its largest output, expected at most "
            f"{graphs.AGREEMENT:g}; report this with the recipe and the versions that `sam-export doctor` prints"
        )
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress on stdout and warns about its own internals; neither is for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
