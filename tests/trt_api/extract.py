"""Full listings of TensorRT's Python bindings -> the part that our code can reach, committed beside this script.

    python tests/trt_api/extract.py LISTING.json...

A listing has ``version``, ``module`` and ``classes``: name -> ``bases``, ``enum`` (its members) and ``attrs``, each
with ``kind`` (method, property, value, class), ``sig`` (pybind11's signatures) and ``rw``, read off an imported module.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# What the package gets from ``trt``, and what it gets from those. A version may lack one.
REACHABLE = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "DataType",
    "Dims",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProfiler",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserFlag",
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
    "TensorIOMode",
    "TensorLocation",
)


def extract(listing: dict[str, Any]) -> dict[str, Any]:
    """The reachable classes of a listing. Networks are parsed, not written by hand: without their ``add_*``."""
    classes = {}
    for name in REACHABLE:
        if name not in listing["classes"]:
            continue
        entry = listing["classes"][name]
        attrs = {n: a for n, a in entry["attrs"].items() if not (name == "INetworkDefinition" and n.startswith("add_"))}
        classes[name] = {"bases": entry["bases"], "enum": entry.get("enum"), "attrs": attrs}
    return {"module": listing["module"], "version": listing["version"], "classes": classes}


def render(part: dict[str, Any]) -> str:
    """JSON with one line per attribute, so that two versions can be compared with diff."""
    lines = [f'{{\n"module": {json.dumps(part["module"])},\n"version": {json.dumps(part["version"])},\n"classes": {{']
    blocks = []
    for name, entry in part["classes"].items():
        attrs = ",\n".join(f"  {json.dumps(n)}: {json.dumps(a)}" for n, a in sorted(entry["attrs"].items()))
        head = f'"bases": {json.dumps(entry["bases"])}, "enum": {json.dumps(entry["enum"])}'
        blocks.append(f'{json.dumps(name)}: {{{head}, "attrs": {{\n{attrs}\n}}}}')
    return "\n".join([*lines, ",\n".join(blocks), "}\n}\n"])


def main(paths: list[Path]) -> None:
    for path in paths:
        part = extract(json.loads(path.read_text(encoding="utf-8")))
        text = render(part)
        if json.loads(text) != part:
            raise SystemExit(f"{path}: what was rendered is not what was read")
        (HERE / path.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main([Path(p) for p in sys.argv[1:]])
