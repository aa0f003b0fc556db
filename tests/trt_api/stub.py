"""A listing of TensorRT's bindings -> a stub package that mypy checks our code against.

Names, signatures, enum members and which properties can be set are the listing's. What a pybind11 listing cannot say is
in the tables here: the types of properties, what converts to ``Dims``, which calls answer None when they fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VERSIONS = ("10.3.0", "10.16.1", "11.4.0", "rtx-1.7.1")

# pybind11's way to name a type -> Python's. An older pybind11 says int where a newer one says SupportsInt; both refuse
# a float, and hand a callback a plain int.
SPELLING = (
    (r"nvonnxparser::IParserError", "ParserError"),
    (r"(?:\w+::)+(\w+)", r"\1"),
    (r"typing(?:_extensions)?\.SupportsInt", "int"),
    (r"typing\.SupportsFloat", "float"),
    (r"\bbuffer\b|typing_extensions\.Buffer", "Buffer"),
    (r"typing_extensions\.CapsuleType|\bcapsule\b", "object"),
    (r"collections\.abc\.Sequence", "Sequence"),
    (r"\bList\b", "list"),
    (r"\bTuple\b", "tuple"),
    (r"\blist\b(?!\[)", "list[Any]"),
    (r"\btuple\b(?!\[)", "tuple[Any, ...]"),
)
# A property's type where its name is not that of a class (``profiler``: IProfiler).
PROPERTIES = {
    "name": "str",
    "shape": "Dims",
    "dtype": "DataType",
    "nbytes": "int",
    "device_memory_size": "int",
    "device_memory_size_v2": "int",
    "is_network_input": "bool",
    "is_network_output": "bool",
    "all_shape_inputs_specified": "bool",
    "all_binding_shapes_specified": "bool",
}
# NVIDIA's reference: "or None if it could not be deserialized", "None if it failed"; a null pointer in C++ is None.
NULLABLE = {"deserialize_cuda_engine", "create_execution_context", "build_serialized_network", "get_timing_cache"}
# Slots of the C API that a listing of attributes does not show.
SLOTS = {"IHostMemory": ["def __buffer__(self, flags: int, /) -> memoryview: ..."]}
IMPORTED = {"Any", "Buffer", "ClassVar", "Iterator", "NoReturn", "None", "Sequence"}
HEAD = """\
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NoReturn, overload
from typing_extensions import Buffer

__version__: str
"""


def load(version: str) -> dict[str, Any]:
    listing: dict[str, Any] = json.loads((HERE / f"{version}.json").read_text(encoding="utf-8"))
    return listing


def write_stub(listing: dict[str, Any], folder: Path) -> None:
    """``folder/tensorrt``, for MYPYPATH. Types that are only named become classes without attributes."""
    lines = [line for name, entry in listing["classes"].items() for line in _class(name, entry, listing["classes"])]
    named = {word for line in lines for word in re.findall(r"(?:: |-> |\[|\| )([A-Z]\w+)", line)}
    opaque = sorted(named - set(listing["classes"]) - IMPORTED)
    package = folder / "tensorrt"
    package.mkdir(parents=True)
    body = [HEAD, *lines, *(f"class {name}: ..." for name in opaque)]
    (package / "__init__.pyi").write_text("\n".join(body) + "\n", encoding="utf-8")


def _class(name: str, entry: dict[str, Any], classes: dict[str, Any]) -> Iterator[str]:
    yield f"class {name}{'({})'.format(', '.join(entry['bases'])) if entry['bases'] else ''}:"
    yield "    ..."
    if entry["enum"] is not None:
        yield from _enum(name, entry["enum"], "    ")
        return
    values = [n for n, a in entry["attrs"].items() if a["kind"] == "value"]
    nested = [n for n, a in entry["attrs"].items() if a["kind"] == "class" and not entry["bases"]]
    for inner in nested:
        yield f"    class {inner}:"
        yield from _enum(f"{name}.{inner}", values, "        ")
        yield from (f"    {v}: ClassVar[{name}.{inner}]" for v in values)
    for attr, facts in entry["attrs"].items():
        if facts["kind"] == "method":
            yield from _method(attr, facts["sig"])
        elif facts["kind"] == "property":
            kind = _property_type(attr, classes)
            yield f"    @property\n    def {attr}(self) -> {kind}: ..."
            if facts.get("rw"):
                # An interface is held by pointer: None takes it away again.
                given = f"{kind} | None" if kind in classes and kind.startswith("I") else _accepted(kind)
                yield f"    @{attr}.setter\n    def {attr}(self, value: {given}) -> None: ..."
    yield from (f"    {slot}" for slot in SLOTS.get(name, ()))
    if "__len__" in entry["attrs"] and "__getitem__" in entry["attrs"]:
        # Python iterates over what has __getitem__ by itself; mypy wants it said.
        item = re.search(r"-> (\w+)", entry["attrs"]["__getitem__"]["sig"][0])
        yield f"    def __iter__(self) -> Iterator[{item.group(1) if item else 'Any'}]: ..."


def _enum(name: str, members: list[str], indent: str) -> Iterator[str]:
    yield from (f"{indent}{member}: ClassVar[{name}]" for member in members)
    yield f"{indent}__members__: ClassVar[dict[str, {name}]]"
    yield f"{indent}@property\n{indent}def name(self) -> str: ..."
    yield f"{indent}@property\n{indent}def value(self) -> int: ..."
    yield f"{indent}def __init__(self, value: int) -> None: ..."
    yield f"{indent}def __int__(self) -> int: ..."


def _method(name: str, signatures: list[str]) -> Iterator[str]:
    if name == "__init__" and not signatures:
        # pybind11 gives a class without a constructor an __init__ that always raises.
        yield "    def __init__(self, nobody_makes_one: NoReturn) -> None: ..."
    for signature in signatures:
        found = re.fullmatch(r"(?:\d+\. )?\w+\((.*)\) -> (.*)", signature)
        if found is None:
            raise ValueError(f"cannot read the signature {signature!r}")
        arguments = ", ".join(["self", *_arguments(found.group(1))])
        result = _spell(found.group(2)) + (" | None" if name in NULLABLE else "")
        overload = "    @overload\n" if len(signatures) > 1 else ""
        yield f"{overload}    def {name}({arguments}) -> {result}: ..."


def _arguments(text: str) -> Iterator[str]:
    """Of ``self: X, a: int, b: str = None``, all but self. An ``arg0`` has no name in C++ and cannot be given by it."""
    parts = re.split(r", (?=\w+: )", text)[1:]
    for part in parts:
        name, _, rest = part.partition(": ")
        kind, _, default = rest.partition(" = ")
        kind = _accepted(_spell(kind)) + (" | None" if default == "None" else "")
        yield f"{name}: {kind}{' = ...' if default else ''}"
    if parts and all(part.startswith("arg") for part in parts):
        yield "/"


def _spell(kind: str) -> str:
    for pattern, replacement in SPELLING:
        kind = re.sub(pattern, replacement, kind)
    return kind


def _accepted(kind: str) -> str:
    """What may be given where a type is wanted: the bindings convert tuples and lists to Dims."""
    return {"Dims": "Dims | tuple[int, ...] | list[int]"}.get(kind, kind)


def _property_type(name: str, classes: dict[str, Any]) -> str:
    camel = "".join(part.capitalize() for part in name.split("_"))
    if name in PROPERTIES:
        return PROPERTIES[name]
    if name.startswith(("num_", "max_")):
        return "int"
    return next((c for c in (camel, f"I{camel}") if c in classes), "Any")
