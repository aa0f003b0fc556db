"""Importing is free, running a bundle needs no training framework, and imports between our modules go down only."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgesam_deploy.cli import COMMANDS

PACKAGE = Path(__file__).resolve().parent.parent / "edgesam_deploy"
PHOTO = PACKAGE / "assets" / "photos" / "verify" / "duck.jpg"

# What may be loaded, besides the standard library and ourselves, before a command does its work.
FREE = {"click", "numpy"}
# What a device has: the base install and the backends of its CPU (and what these bring along).
ON_A_DEVICE = {"click", "numpy", "PIL", "rich", "pygments", "markdown_it", "mdurl", "onnxruntime", "tomli"}
ON_A_DEVICE |= {"openvino", "packaging"}
# What only exporting and quantizing may load.
HEAVY = {"torch", "torchvision", "timm", "onnx", "onnxscript", "onnxsim", "onnxslim", "segment_anything", "scipy"}

SCRIPT = """
import json, sys
before = set(sys.modules)
try:
    {statement}
finally:
    print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""
CLI = "from edgesam_deploy.cli import main; main({words!r}, prog_name='sam-export')"


def loaded(statement: str, folder: Path) -> set[str]:
    """The top-level modules that a statement loads in a fresh process, without the standard library and ours."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(statement=statement)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    modules = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert "edgesam_deploy" in modules
    # The hooks of editable installs are the environment's, not ours.
    return {m for m in modules - sys.stdlib_module_names - {"edgesam_deploy"} if not m.startswith("__editable__")}


STATEMENTS = {
    "the-package": "import edgesam_deploy",
    "its-names": "import edgesam_deploy; dir(edgesam_deploy); edgesam_deploy.__version__",
    "help": CLI.format(words=["--help"]),
    "version": CLI.format(words=["--version"]),
    **{f"help-of-{name}": CLI.format(words=[name, "--help"]) for name in COMMANDS},
}


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_importing_and_help_are_free(tmp_path: Path, statement: str) -> None:
    assert loaded(statement, tmp_path) <= FREE


def test_the_check_sees_what_is_loaded(tmp_path: Path) -> None:
    """Without this the tests here could not fail."""
    assert "PIL" in loaded("import edgesam_deploy.images", tmp_path)


COMMANDS = {
    "predict": ["predict", str(PHOTO), "--point", "300,300", "-o", "out.png", "--bundle", "{bundle}"],
    "predict-box": ["predict", str(PHOTO), "--box", "10,10,300,300", "--save-mask", "out.png", "--bundle", "{bundle}"],
    "verify": ["verify", "{bundle}"],
    "bench": ["bench", "{bundle}", "--runs", "1", "--warmup", "0"],
    "explain": ["explain", "{bundle}", "--html", "page.html"],
    "models": ["models"],
    "targets": ["targets"],
    "doctor": ["doctor"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_for_devices_need_only_what_a_device_has(
    built: SimpleNamespace, tmp_path: Path, words: list[str]
) -> None:
    words = [w.format(bundle=built.bundle) for w in words]
    modules = loaded(CLI.format(words=words), tmp_path)
    assert modules & HEAVY == set()
    assert modules <= ON_A_DEVICE


def test_evaluating_a_bundle_needs_no_torch(built: SimpleNamespace, tmp_path: Path) -> None:
    """Beside what a device has, the extra for it: scipy and pycocotools."""
    pytest.importorskip("scipy", reason="needs the eval extra")
    from .made_up_datasets import coco

    words = ["eval", str(built.bundle), "--dataset", f"coco:{coco(tmp_path)}", "--baselines", "-o", "out"]
    modules = loaded(CLI.format(words=words), tmp_path)
    assert modules & HEAVY == {"scipy"}
    # Compiled extensions bring nameless helpers along.
    named = {name for name in modules if not name.startswith("_")} - {"cython_runtime"}
    assert named <= ON_A_DEVICE | {"scipy", "pycocotools"}


def test_a_python_program_on_a_device_needs_only_what_a_device_has(built: SimpleNamespace, tmp_path: Path) -> None:
    program = (
        "import edgesam_deploy as e\n"
        f"    with e.load_bundle({str(built.bundle)!r}).open(threads=1) as p:\n"
        f"        p.set_image(e.read_image({str(PHOTO)!r}))\n"
        "        assert p.predict([[300, 300]], [1]).masks.any()"
    )
    assert loaded(program, tmp_path) <= ON_A_DEVICE


# The layers, from the top. A module imports from itself (a folder from all that is in it) and from the layers below it,
# whether at its top, in a function or for type checking. Those of one layer do not know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("distill", "stages"),
    ("measure", "models"),
    ("bundle", "overlay"),  # a bundle opens itself: it knows the runtime and the predictor, not they it
    ("sessions",),
    ("predictor",),
    ("runtime",),
    ("device", "masks", "prompts"),
    ("counts", "transforms", "target"),
    ("download", "images", "recipe"),
    ("transfer",),
    ("local_caches",),
    ("files", "published", "weights"),
    ("contract",),
    ("errors",),
)
LEVEL = {name: len(LAYERS) - i for i, layer in enumerate(LAYERS) for name in layer}
# The package itself: its version, and names that are loaded when they are first used.
ROOT = "__init__"


def modules() -> dict[str, Path]:
    """Our modules by their dotted name below the package; distill, a tool beside the product, is left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "distill":
            found[".".join(parts)] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every absolute module name that a file imports anywhere, with its line; ``from a import b`` is also ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "edgesam_deploy" else []
            yield from ((name, node.lineno) for name in names or [str(node.module)])


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Which of our modules a file imports: the first part below the package, ROOT for the package itself."""
    for name, line in imports(path):
        head, *rest = name.split(".")
        if head == "edgesam_deploy":
            yield (rest[0] if rest and rest[0] in LEVEL else ROOT), line


def test_every_module_has_its_layer() -> None:
    assert {name.partition(".")[0] for name in modules()} - {ROOT} <= set(LEVEL)


def test_every_layer_has_its_modules() -> None:
    assert set(LEVEL) - {"distill"} <= {name.partition(".")[0] for name in modules()}


@pytest.mark.parametrize("name", [n for n in modules() if n != ROOT])
def test_imports_go_down_only(name: str) -> None:
    own = name.partition(".")[0]
    upwards = {
        (own, other, line)
        for other, line in own_imports(modules()[name])
        if other not in (ROOT, own) and LEVEL[other] >= LEVEL[own]
    }
    assert upwards == set()


# All that a device runs.
LIGHT = (
    "runtime",
    "predictor",
    "sessions",
    "overlay",
    "bundle",
    "masks",
    "prompts",
    "transforms",
    "images",
    "recipe",
    "target",
)
LIGHT += ("device", "download", "transfer", "local_caches", "weights", "files", "contract", "errors", "measure")
# module -> what it must not import
FORBIDDEN = dict.fromkeys(LIGHT, HEAVY) | {"cli": HEAVY | {"PIL", "rich"}}
# module -> what it, of all its layer, may import: an extra of its own
ALLOWED = {"measure.boundaries": {"scipy"}}
# Imports of the CLI inside a function are its work; at the top of a module they would cost every --help.
TOP_ONLY = {"cli"}


@pytest.mark.parametrize("name", [n for n in modules() if n.partition(".")[0] in FORBIDDEN])
def test_torch_and_the_onnx_tools_stay_above(name: str) -> None:
    own = name.partition(".")[0]
    path = modules()[name]
    found = {n.partition(".")[0] for n, _ in (top_imports(path) if own in TOP_ONLY else imports(path))}
    assert found & FORBIDDEN[own] == ALLOWED.get(name, set())


def top_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported."""
    inner = {
        line
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _type_checking(node)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return ((name, line) for name, line in imports(path) if line not in inner)


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
