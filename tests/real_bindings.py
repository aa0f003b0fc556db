"""TensorRT's real Python bindings over stubs of its libraries, and the real libcudart: we load them and refuse clearly.

    python tests/real_bindings.py

For a machine without a GPU, with gcc and a package index. Per release the bindings' wheel is installed into a temporary
folder, and gcc makes libraries with the few functions it needs, which all return null, as TensorRT's do where CUDA
cannot start. Prints a line per release and step; the exit status is 1 if one is not as it should be.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RELEASES = (
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu12-bindings==10.16.1.11",
    "tensorrt-cu13-bindings==11.4.0.106",
)
# The releases of libcudart, with the CUDA version that they are of.
CUDARTS = {"nvidia-cuda-runtime-cu12==12.6.77": 12, "nvidia-cuda-runtime==13.0.96": 13}
LIBRARIES = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": ("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
}
# The front package and the package of libraries, as tensorrt_rtx ships its own.
FRONT = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
LIBS = """
import ctypes, glob, os
for path in glob.glob(os.path.join(os.path.dirname(__file__), "*.so*")):
    ctypes.CDLL(path)
"""
# Only TensorRT for RTX has it; the code asks before it uses it (see test_tensorrt_api.py).
GUARDED = {"ComputeCapability"}
CHAIN = re.compile(r"trt\.([\w.]+)")


def install(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--target", str(folder), requirement], check=True, stderr=subprocess.DEVNULL)


def make_front(requirement: str, folder: Path) -> None:
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(FRONT, encoding="utf-8")


def make_libraries(requirement: str, folder: Path) -> None:
    major = re.split("==|[.]", requirement)[1]
    package = folder / "tensorrt_libs"
    package.mkdir()
    (package / "__init__.py").write_text(LIBS, encoding="utf-8")
    for name, functions in LIBRARIES.items():
        source = package / f"{name}.c"
        source.write_text("".join(f"void *{f}(void) {{ return 0; }}\n" for f in functions), encoding="utf-8")
        library = f"lib{name}.so.{major}"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(package / library)]
        subprocess.run(["gcc", *flags, str(source)], check=True)


def dotted_names() -> set[str]:
    """Every ``trt.A.B`` in the package, as ``A.B``."""
    found = set()
    for path in (ROOT / "edgesam_deploy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (match := CHAIN.fullmatch(ast.unparse(node))):
                found.add(match[1])
    return {name for name in found if name.partition(".")[0] not in GUARDED}


def outcome(step: Any) -> tuple[bool, str]:
    """Whether a step failed as it should, with one line of ours, and what it said."""
    from edgesam_deploy.errors import EdgeSAMError

    try:
        return False, f"expected a refusal, got {step()!r}"
    except EdgeSAMError as error:
        return len(str(error).splitlines()) == 1, f"{type(error).__name__}: {error}"
    except Exception as error:
        return False, f"not ours: {type(error).__name__}: {error}"


def examine(folder: Path) -> int:
    """In a process of its own, with the bindings on its path: every step but the import must be refused by a line."""
    from edgesam_deploy.contract import GraphContract
    from edgesam_deploy.runtime import SessionOptions, bindings, open_session
    from edgesam_deploy.runtime.cuda import probe
    from edgesam_deploy.runtime.tensorrt import TensorRTSession
    from edgesam_deploy.stages.compile import CompileOptions, compile_graph

    if not (folder / "tensorrt_libs").exists():
        return report("without its libraries", *outcome(lambda: bindings.use("tensorrt")))
    library = bindings.use("tensorrt")
    import tensorrt

    missing = []
    for name in sorted(names := dotted_names()):
        thing = tensorrt
        for part in name.split("."):
            thing = getattr(thing, part, None)
        missing += [] if thing is not None else [name]
    bindings.logger()
    text = f"{library}, {len(names)} names looked up, missing: {', '.join(missing) or 'none'}; logger made"
    failed = report("imports", not missing, text)
    plan = folder / "x.engine"
    plan.write_bytes(b"ftrt" + bytes(64))
    nothing = GraphContract((), ())
    steps = {
        "probe": probe,
        "open_session": lambda: open_session(plan, "tensorrt"),
        "session, past the driver": lambda: TensorRTSession(plan, SessionOptions(), "tensorrt", object()),  # type: ignore[arg-type]
        "compile_graph": lambda: compile_graph(plan, folder / "y", nothing, CompileOptions(), library),
    }
    return failed + sum(report(name, *outcome(step)) for name, step in steps.items())


def examine_cudart(major: int) -> int:
    """In a process of its own: the package's library is found, has all that we call, and refuses without a driver."""
    from edgesam_deploy.runtime import cuda

    library = cuda.load_runtime(major)
    names = set(re.findall(r"\bcuda[A-Z]\w+(?=\"|\.restype|\()", Path(cuda.__file__).read_text(encoding="utf-8")))
    missing = [name for name in sorted(names) if not hasattr(library, name)]
    text = f"{Path(library._name).name}, {len(names)} functions looked up, missing: {', '.join(missing) or 'none'}"
    failed = report("loads", not missing, text)
    return failed + report("CudaRuntime", *outcome(lambda: cuda.CudaRuntime(library)))


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def report(step: str, good: bool, text: str) -> int:
    say(f"    {'ok  ' if good else 'FAIL'}  {step}: {text}")
    return 0 if good else 1


def apart(call: str, folder: Path) -> int:
    """Run a call of this module in a process that has the folder on its path; how many processes failed."""
    path = [str(folder), str(ROOT), str(ROOT / "tests")]
    script = f"import sys; sys.path[:0] = {path!r}\nimport pathlib, real_bindings\nsys.exit(real_bindings.{call})"
    status = subprocess.run([sys.executable, "-c", script], check=False).returncode
    if status < 0:
        report("crashed in native code", False, f"signal {-status}")
    return int(status != 0)


def main() -> int:
    failed = 0
    for requirement in (*RELEASES, *CUDARTS):
        say(f"{requirement}, Python {sys.version.split()[0]}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            install(requirement, folder)
            if requirement in CUDARTS:
                failed += apart(f"examine_cudart({CUDARTS[requirement]})", folder)
                continue
            for step in (make_front, make_libraries):
                step(requirement, folder)
                failed += apart(f"examine(pathlib.Path({name!r}))", folder)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
