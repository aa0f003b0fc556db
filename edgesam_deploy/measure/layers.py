"""What an engine consists of: its compiled layers, and the time that each takes.

Two sources say the same thing: the listing ``Layers:`` that a builder with DETAILED profiling verbosity logs at VERBOSE
(all there is on a machine without a GPU), and the engine inspector's JSON. Both come in two layouts. TensorRT 10 names
a tensor's type and layout in one text, ``"Format/Datatype": "Row major linear FP32"``; TensorRT 11 and TensorRT for RTX
in two, ``Datatype`` and ``Format``, and list constants apart from inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgesam_deploy.errors import BackendError, InputError

UNKNOWN = "unknown"
# TensorRT 10 states a convolution's weight apart from the tensors; it becomes a constant of this name.
WEIGHTS = "Weights"

_TYPES = {"float": "fp32", "float32": "fp32", "fp32": "fp32", "half": "fp16", "float16": "fp16", "fp16": "fp16"}
_TYPES |= {"bfloat16": "bf16", "bf16": "bf16", "float8": "fp8"}
_TYPES |= {name: name for name in ("fp8", "fp4", "int4", "int8", "uint8", "int32", "int64", "bool")}
_TYPE = re.compile(rf"\b({'|'.join(_TYPES)})\b", re.IGNORECASE)
_LISTING = re.compile(r"^(?:.*[\s\]])?Layers:[ \t]*\n(?=Name: )", re.MULTILINE)
_TENSOR = re.compile(r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([-\d, ]*)\](.*?) ?\}(?=, \{ Name: |$)")
# TensorRT 10 lists constants among the inputs; these are the names its compiler gives them.
_CONSTANT = re.compile(r"dconst|_constant(?:Float|Half|BFloat16|Int8)\b")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """shape: −1 where dynamic. dtype: "fp32", "fp16", "int8" ..., or "unknown". format: TensorRT's own words."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str


@dataclass(frozen=True, slots=True)
class CompiledLayer:
    """One layer of an engine. kind: TensorRT's LayerType. onnx_nodes: the nodes it comes from, in its order."""

    name: str
    kind: str
    inputs: tuple[TensorInfo, ...]
    constants: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    onnx_nodes: tuple[str, ...]
    tactic: str
    stream: int | None


@dataclass(frozen=True, slots=True)
class LayerTime:
    """share: of the sum of all layers' means, 0 to 1."""

    name: str
    mean_ms: float
    median_ms: float
    share: float


def layers_from_log(text: str) -> tuple[CompiledLayer, ...]:
    """Layers of the one listing ``Layers:`` in a builder's VERBOSE log, or in that message alone.

    Raises BackendError for a log without a listing, or with several (a build for several GPU architectures).
    """
    listings = list(_LISTING.finditer(text))
    if len(listings) != 1:
        raise BackendError(
            f"the builder's log must hold one listing 'Layers:', holds {len(listings)}: build for one architecture, "
            "with detailed profiling verbosity and a VERBOSE logger (only a process's first logger is ever used)"
        )
    found = []
    for line in text[listings[0].end() :].splitlines():
        if not line.startswith("Name: "):
            break
        found.append(_layer_from_line(line))
    return tuple(found)


def layers_from_inspector(text: str) -> tuple[CompiledLayer, ...]:
    """Layers from ``EngineInspector.get_engine_information(JSON)`` of TensorRT 10 or 11.

    Raises BackendError for text that is not that JSON, and for an engine built without detailed profiling verbosity.
    """
    try:
        # Not strict: node names are parted by raw control characters.
        layers = json.loads(text, strict=False)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(f"expected the engine inspector's JSON with its 'Layers', got {text[:60]!r}") from error
    if any(not isinstance(layer, dict) for layer in layers):
        raise BackendError(
            "the engine tells only the names of its layers: it was built without detailed profiling verbosity; compile "
            "it again with ProfilingVerbosity.DETAILED"
        )
    return tuple(_layer_from_json(layer) for layer in layers)


def layer_times(samples: Sequence[Mapping[str, float]]) -> tuple[LayerTime, ...]:
    """Statistics over runs of what an IProfiler reports: one mapping per run, layer name → milliseconds.

    In the order of the first run. Raises InputError for no runs and for runs that name different layers.
    """
    if not samples or not samples[0]:
        raise InputError("layer times need at least one profiled run with at least one layer, got none")
    names = list(samples[0])
    if any(set(run) != set(names) for run in samples):
        raise InputError("every profiled run must name the same layers: profile one engine with one shape profile")
    values = np.array([[run[name] for name in names] for run in samples], dtype=np.float64)
    means, total = values.mean(axis=0), float(values.mean(axis=0).sum())
    medians = np.median(values, axis=0)
    return tuple(
        LayerTime(name, float(mean), float(median), float(mean) / total if total else 0.0)
        for name, mean, median in zip(names, means, medians, strict=True)
    )


def _layer_from_line(line: str) -> CompiledLayer:
    head, _, rest = line.removeprefix("Name: ").partition(", Inputs: [")
    name, _, kind = head.partition(", LayerType: ")
    before, outputs_given, after = rest.partition("], Outputs: [")
    if not kind or not outputs_given:
        raise BackendError(f"expected 'Name: ..., LayerType: ..., Inputs: [...], Outputs: [...]', got {line[:100]!r}")
    inputs, _, constants = before.partition("], Constants: [")
    # Tensors hold brackets too, "Dimensions: [1,3]"; the list of them ends with a brace.
    outputs, _, fields = ("", "", after) if after.startswith("]") else after.partition("}], ")
    stream = re.search(r"\bStreamId: (\d+)", fields)
    tactic = re.search(r"\bTacticName: ([^,]*)", fields)
    weights = re.search(r'Weights: \{"Type": "(\w+)", "Count": (\d+)', fields)
    return _layer(
        name,
        kind,
        [_tensors_from_line(part) for part in (inputs, constants, outputs + "}")],
        fields.partition("Metadata: ")[2],
        (tactic.group(1) if tactic else "", int(stream.group(1)) if stream else None),
        {"Type": weights.group(1), "Count": int(weights.group(2))} if weights else None,
    )


def _tensors_from_line(text: str) -> list[TensorInfo]:
    found = []
    for name, shape, rest in _TENSOR.findall(text):
        separate = re.search(r"(?<!/)\bData[tT]ype: (\w+)", rest)
        layout = re.search(r"\bFormat(?:/Data[tT]ype)?: (.*)", rest)
        form = layout.group(1).strip() if layout else ""
        dtype = _dtype(separate.group(1) if separate else form)
        found.append(TensorInfo(name, tuple(int(v) for v in shape.split(",") if v.strip()), dtype, form))
    return found


def _layer_from_json(layer: Mapping[str, Any]) -> CompiledLayer:
    groups = [[_tensor_from_json(t) for t in layer.get(key) or ()] for key in ("Inputs", "Constants", "Outputs")]
    chosen = str(layer.get("TacticName") or layer.get("TacticValue") or "")
    where = (chosen, layer.get("StreamId"))
    weights = layer.get(WEIGHTS)
    return _layer(
        str(layer.get("Name", "")),
        str(layer.get("LayerType", "")),
        groups,
        str(layer.get("Metadata") or ""),
        where,
        weights,
    )


def _tensor_from_json(tensor: Mapping[str, Any]) -> TensorInfo:
    form = str(tensor.get("Format/Datatype", tensor.get("Format", "")))
    stated = tensor.get("Datatype", tensor.get("DataType", form))
    return TensorInfo(str(tensor.get("Name", "")), tuple(tensor.get("Dimensions", ())), _dtype(str(stated)), form)


def _layer(
    name: str,
    kind: str,
    groups: Sequence[list[TensorInfo]],
    metadata: str,
    where: tuple[str, int | None],
    weights: Mapping[str, Any] | None,
) -> CompiledLayer:
    """``weights``: how TensorRT 10 states a convolution's, ``{"Type": "Int8", "Count": 864}``."""
    inputs, constants, outputs = groups
    if not constants:
        constants = [t for t in inputs if _CONSTANT.search(t.name)]
        inputs = [t for t in inputs if not _CONSTANT.search(t.name)]
    if weights and weights.get("Count"):
        constants = [TensorInfo(WEIGHTS, (int(weights["Count"]),), _dtype(str(weights["Type"])), ""), *constants]
    return CompiledLayer(
        name, kind, tuple(inputs), tuple(constants), tuple(outputs), _onnx_nodes(metadata), where[0], where[1]
    )


def _onnx_nodes(metadata: str) -> tuple[str, ...]:
    """Names in ``[ONNX Layer: NAME]``, one after the other or parted by control characters; NAME may hold brackets."""
    names = (_to_matching_bracket(part) for part in metadata.split("[ONNX Layer: ")[1:])
    return tuple(dict.fromkeys(name for name in names if name))


def _to_matching_bracket(text: str) -> str:
    depth = 1
    for index, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if not depth:
            return text[:index]
    return text.rpartition("]")[0]


def _dtype(text: str) -> str:
    found = _TYPE.search(text)
    return _TYPES[found.group(1).lower()] if found else UNKNOWN
