"""Every TensorRT name that our code touches exists, as it is used, in every version that we support.

mypy checks the package against stubs made from the real bindings' listings (``trt_api/``), once per version; a use
under ``hasattr`` counts as guarded. The mutants, modules with one planted mistake each, show that the check can fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mypy", reason="the API check runs mypy")

from edgesam_deploy.runtime.bindings import _LEVELS
from edgesam_deploy.runtime.tensorrt import DTYPES

from .trt_api.stub import VERSIONS, load, write_stub

PACKAGE = Path(__file__).resolve().parent.parent / "edgesam_deploy"
SESSION, COMPILE, BINDINGS = "runtime/tensorrt.py", "stages/compile.py", "runtime/bindings.py"
PLANS = "runtime/plans.py"
TOUCHES_TENSORRT = re.compile(r"^\s*from edgesam_deploy\.runtime\.(bindings|tensorrt) import ", re.MULTILINE)
ERROR = re.compile(r"(?P<path>[^:]+\.py):(?P<line>\d+): error: (?P<text>.*)")
# On close the session sets what it frees to None: not a matter of names, and it refuses to run afterwards.
FREED = re.compile(r'has type "None", variable has type "(ICudaEngine|IExecutionContext)"')
HINT = "a class that is missing only from the listings here is to be added to REACHABLE in tests/trt_api/extract.py"
OLD, NEW = {"10.3.0", "10.16.1"}, {"11.4.0", "rtx-1.7.1"}
ALL, PLAIN = OLD | NEW, OLD | {"11.4.0"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One edit of one module. caught: the versions in which it must be an error; in the others it must be none.

    shows_later: the error is not on the edited line but where the value is used.
    """

    module: str
    before: str
    after: str
    caught: set[str]
    shows_later: bool = False


MUTANTS = {
    "fp16_flag": Mutant(COMPILE, "set_flag(trt.BuilderFlag.TF32)", "set_flag(trt.BuilderFlag.FP16)", NEW),
    "explicit_batch": Mutant(COMPILE, "Flag.STRONGLY_TYPED)", "Flag.EXPLICIT_BATCH)", NEW),
    "wrong_enum_member": Mutant(COMPILE, "ProfilingVerbosity.DETAILED", "ProfilingVerbosity.VERBOSE", ALL),
    "newer_enum_member": Mutant(COMPILE, "Level.AMPERE_PLUS", "Level.SAME_COMPUTE_CAPABILITY", {"10.3.0"}),
    "wrong_enum": Mutant(COMPILE, "trt.MemoryPoolType.WORKSPACE", "trt.ProfilingVerbosity.DETAILED", ALL),
    "removed_workspace": Mutant(
        COMPILE,
        "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * MB)",
        "config.max_workspace_size = options.workspace_mb * MB",
        ALL,
    ),
    "wrong_keyword": Mutant(COMPILE, "WORKSPACE, options.workspace_mb", "WORKSPACE, size=options.workspace_mb", ALL),
    "too_few_arguments": Mutant(COMPILE, "set_timing_cache(cache, False)", "set_timing_cache(cache)", ALL),
    "misspelt_method": Mutant(COMPILE, "profile.set_shape(", "profile.set_shapes(", ALL),
    "newer_method": Mutant(
        COMPILE,
        "plan = builder.build_serialized_network(network, config)",
        "plan = builder.build_serialized_network(network, config); builder.build_engine_with_config(network, config)",
        {"10.3.0", "rtx-1.7.1"},
    ),
    "read_only_property": Mutant(COMPILE, "config.progress_monitor =", "config.num_optimization_profiles =", ALL),
    "wrong_property_type": Mutant(COMPILE, "config.progress_monitor = Monitor()", "config.progress_monitor = 1", ALL),
    "method_as_property": Mutant(COMPILE, "fault.desc().split()", "fault.desc.split()", ALL),
    "guard_removed": Mutant(COMPILE, ' or not hasattr(config, "set_compute_capability")', "", PLAIN, shows_later=True),
    "wrong_callback": Mutant(
        SESSION,
        "def report_layer_time(self, layer_name: str, ms: float)",
        "def report_layer_time(self, ms: float, layer_name: str)",
        ALL,
    ),
    "none_not_checked": Mutant(COMPILE, "if plan is None:", "if stopped.is_set():", ALL, shows_later=True),
    "removed_property": Mutant(SESSION, "device_memory_size_v2", "device_memory_size", NEW),
    "newer_engine_method": Mutant(
        SESSION, "self._engine.device_memory_size_v2", "self._engine.get_engine_stat()", {"10.3.0"}
    ),
    "removed_context_property": Mutant(
        SESSION, "self._context.infer_shapes()", "[] if self._context.all_shape_inputs_specified else ['?']", NEW
    ),
    "removed_enqueue": Mutant(SESSION, "execute_async_v3(stream)", "execute_async_v2([], stream)", ALL),
    "removed_deserialize": Mutant(PLANS, ".deserialize_cuda_engine(data)", ".deserialize(data)", ALL),
    "arguments_swapped": Mutant(SESSION, "get_tensor_profile_shape(name, 0)", "get_tensor_profile_shape(0, name)", ALL),
    "wrong_argument_type": Mutant(SESSION, "set_tensor_address(name, address)", "set_tensor_address(name, None)", ALL),
    "no_logger": Mutant(PLANS, "trt.Runtime(logger())", "trt.Runtime()", ALL),
    "wrong_nested_class": Mutant(BINDINGS, "severity: trt.ILogger.Severity", "severity: trt.ILogger.Level", ALL),
}


@dataclass(frozen=True, slots=True)
class Allowed:
    """A name that some versions lack, used where a guard in our code has shown that it is there.

    guard: the attribute that our code asks for, with its class; in every listing the name is there if it is.
    """

    module: str
    name: str
    guard: tuple[str, str]
    reason: str


CAPABILITIES = ("IBuilderConfig", "set_compute_capability")
ALLOWED = (
    Allowed(COMPILE, "ComputeCapability", CAPABILITIES, "the type of that method's argument"),
    Allowed(COMPILE, "num_compute_capabilities", CAPABILITIES, "how many times that method is to be called"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """An error of mypy's. module: below the package, the mutant's own file for a mutant."""

    module: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"edgesam_deploy/{self.module}:{self.line}: {self.text}"


def allowed_by(found: Found) -> list[Allowed]:
    return [a for a in ALLOWED if a.module == found.module and f'no attribute "{a.name}"' in found.text]


def mutant_module(name: str) -> str:
    return MUTANTS[name].module.replace(".py", f"__{name}.py")


def origin(module: str) -> str:
    """The module of a mutant's file."""
    return re.sub(r"__\w+\.py$", ".py", module)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, and beside each mutated module its mutants."""
    root = tmp_path_factory.mktemp("mutants")
    package = root / "edgesam_deploy"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    for name, mutant in MUTANTS.items():
        text = (package / mutant.module).read_text(encoding="utf-8")
        assert mutant.before in text, f"mutant {name}: {mutant.module} no longer has {mutant.before!r}"
        (package / mutant_module(name)).write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def checked(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    """What mypy finds in all modules that touch TensorRT, and in the mutants, by TensorRT's version."""
    package = copied / "edgesam_deploy"
    paths = [p for p in sorted(package.rglob("*.py")) if TOUCHES_TENSORRT.search(p.read_text(encoding="utf-8"))]
    paths += [package / BINDINGS, *package.glob("runtime/bindings__*.py")]
    return {version: check(version, copied, paths, tmp_path_factory) for version in VERSIONS}


def check(version: str, copied: Path, paths: list[Path], folders: pytest.TempPathFactory) -> list[Found]:
    stub = folders.mktemp("stub")
    write_stub(load(version), stub)
    flags = [
        "--config-file=",
        "--strict",
        "--python-version=3.10",
        "--ignore-missing-imports",
        "--follow-imports=silent",
    ]
    flags += ["--no-warn-unused-ignores", "--no-error-summary", "--hide-error-context", "--no-pretty"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, f"--cache-dir={copied / '.mypy_cache'}", *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        cwd=copied,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, (stub, copied)))},
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = []
    for line in done.stdout.splitlines():
        if FREED.search(line):
            continue
        if match := ERROR.match(line):
            module = (copied / match["path"]).relative_to(copied / "edgesam_deploy").as_posix()
            errors.append(Found(module, int(match["line"]), match["text"]))
        else:
            assert ": note: " in line, line
    return errors


@pytest.mark.parametrize("version", VERSIONS)
def test_all_that_is_used_is_there(checked: dict[str, list[Found]], version: str) -> None:
    ours = [e for e in checked[version] if e.module == origin(e.module)]
    missing = [str(e) for e in ours if not allowed_by(e)]
    assert not missing, "\n".join([f"TensorRT {version}:", *missing, HINT])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_caught(checked: dict[str, list[Found]], copied: Path, name: str) -> None:
    """In the versions it is one in. What mypy says of the original too (where it is allowed) is not counted."""
    mutant, path = MUTANTS[name], mutant_module(name)
    caught = []
    for version, errors in checked.items():
        original = {e.text for e in errors if e.module == mutant.module}
        caught += [(version, e) for e in errors if e.module == path and e.text not in original]
    assert {version for version, _ in caught} == mutant.caught
    after = (copied / "edgesam_deploy" / path).read_text(encoding="utf-8").splitlines()
    before = (copied / "edgesam_deploy" / mutant.module).read_text(encoding="utf-8").splitlines()
    edited = {i for i, (old, new) in enumerate(zip(before, after, strict=True), start=1) if old != new}
    lines = {e.line for _, e in caught}
    assert min(lines) > max(edited) if mutant.shows_later else lines <= edited


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda a: a.name)
def test_what_is_allowed_is_needed_and_guarded(checked: dict[str, list[Found]], entry: Allowed) -> None:
    errors = [e for found in checked.values() for e in found if e.module == entry.module]
    assert any(entry in allowed_by(e) for e in errors), f"{entry} is no longer needed: remove it"
    assert f'hasattr(config, "{entry.guard[1]}")' in (PACKAGE / entry.module).read_text(encoding="utf-8")
    for version in VERSIONS:
        classes = load(version)["classes"]
        names = set(classes) | set(classes[entry.guard[0]]["attrs"])
        assert (entry.guard[1] in names) <= (entry.name in names), version


@pytest.mark.parametrize("version", VERSIONS)
def test_names_that_are_looked_up_as_text_are_there(version: str) -> None:
    """mypy cannot follow ``getattr``: the tables of names are checked here."""
    classes: dict[str, Any] = load(version)["classes"]
    assert set(DTYPES) <= set(classes["DataType"]["enum"])
    assert set(_LEVELS) <= set(classes["ILogger"]["attrs"])


def test_no_other_name_is_looked_up_as_text() -> None:
    """Nothing else hides a use from mypy: no getattr, and no type: ignore but where a class is derived."""
    hidden = re.compile(r"getattr\(trt|getattr\(.*trt\.|trt\..*type: ignore")
    uses = {
        (path.relative_to(PACKAGE).as_posix(), line.strip())
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if hidden.search(line) and not line.lstrip().startswith("class ")
    }
    assert uses == {(BINDINGS, "names = {getattr(trt.ILogger, name): name for name in _LEVELS}")}
