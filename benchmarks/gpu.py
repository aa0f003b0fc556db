"""Whatever GPU there is: the CUDA seam against torch, and latency of encoder and decoder through the backends at hand.

    python benchmarks/gpu.py --target h200 [--recipes reference mobile_sam sam_vit_b] [--seconds 3]

Writes benchmarks/results/<target>/gpu.json. A backend that is not installed, or refuses, is recorded with its reason.
Without a GPU the same runs on the CPU, which only shows that the script works. Latency does not depend on the weights:
a recipe whose checkpoint is not at hand gets seeded random ones, and the result says so.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgesam_deploy.contract import contracts
from edgesam_deploy.errors import EdgeSAMError
from edgesam_deploy.files import write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.models import build_model, graph_modules
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import PACKAGE, PrecisionRules, Recipe, load_recipe
from edgesam_deploy.runtime.cuda import IMPLEMENTATIONS, open_cuda
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.export import export_model
from edgesam_deploy.stages.fp16 import convert_to_fp16
from edgesam_deploy.stages.simplify import simplify

Feeds = Mapping[str, npt.NDArray[Any]]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MIN_RUNS = 5


def time_ms(run: Callable[[], object], seconds: float) -> dict[str, float]:
    """Median, quartiles and p95 of one call, by CUDA events on a GPU; warm-up of a tenth of the time, or 3 calls."""
    samples: list[float] = []
    for _ in range(3):
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < MIN_RUNS:
        if ON_GPU:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            run()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last))
        else:
            started = time.perf_counter()
            run()
            samples.append((time.perf_counter() - started) * 1e3)
    low, median, high = statistics.quantiles(samples, n=4)
    p95 = float(np.percentile(samples, 95))
    return {"median_ms": median, "q1_ms": low, "q3_ms": high, "p95_ms": p95, "runs": len(samples)}


def model_of(recipe: Recipe) -> tuple[Any, str]:
    """(the model, what its weights are)."""
    if recipe.checkpoint.file is not None:
        return load_model(recipe, PACKAGE / recipe.checkpoint.file), "the recipe's own"
    torch.manual_seed(0)
    return build_model(recipe), "random, seed 0"


def torch_runs(module: torch.nn.Module, feeds: Feeds, half: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(backend, one call) for eager torch, a CUDA graph of it, and torch.compile; FP16 on a GPU only."""
    if half and not ON_GPU:
        return  # autocast to float16 takes seconds on a CPU and says nothing
    tensors = [torch.from_numpy(v).to(DEVICE) for v in feeds.values()]
    module = module.to(DEVICE)

    def call(m: Callable[..., Any] = module) -> object:
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.float16, enabled=half):
            return m(*tensors)

    yield "torch", call
    if ON_GPU:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            call()
        yield "torch, CUDA graph", recorded.replay
        compiled = torch.compile(module)
        yield "torch.compile", lambda: call(compiled)


@contextmanager
def onnxruntime_run(graph: Path, feeds: Feeds) -> Iterator[Callable[[], object]]:
    """One call of ONNX Runtime with inputs and outputs on the device. Raises where it would fall back to the CPU."""
    import onnxruntime as ort

    wanted = "CUDAExecutionProvider" if ON_GPU else "CPUExecutionProvider"
    session = ort.InferenceSession(str(graph), providers=[wanted], disabled_optimizers=["Pad_Fusion"])
    if session.get_providers()[0] != wanted:
        raise RuntimeError(f"asked for {wanted}, it runs on {session.get_providers()[0]}")
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, DEVICE.type, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, DEVICE.type)
    yield lambda: session.run_with_iobinding(binding)


def attempt(results: list[dict[str, Any]], facts: dict[str, Any], run: Callable[[], Mapping[str, Any]]) -> None:
    """Append what ``run`` measured, or why it could not."""
    try:
        results.append({**facts, **run()})
    except Exception as error:  # every backend fails in its own way, and a reason is a result here
        results.append({**facts, "refused": " ".join(str(error).split())[:300] or repr(error)})
    print(results[-1], flush=True)


def latencies(recipe: Recipe, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Encoder and decoder of one recipe, in FP32 and FP16, on every backend."""
    results: list[dict[str, Any]] = []
    model, weights = model_of(recipe)
    for name, proto in export_model(model, recipe).items():
        graphs.save(proto, folder / f"{name}.onnx", {})
    modules = dict(zip(("encoder", "decoder"), graph_modules(model, recipe), strict=True))
    for name, module in modules.items():
        fp32, fp16 = folder / f"{name}.simple.onnx", folder / f"{name}.fp16.onnx"
        simplify(folder / f"{name}.onnx", fp32)
        convert_to_fp16(fp32, PrecisionRules(), fp16)
        feeds = one_prompt(graphs.example_feeds(graphs.load(fp32), seed=2))
        for precision, graph in (("fp32", fp32), ("fp16", fp16)):
            facts = {"recipe": recipe.name, "weights": weights, "graph": name, "precision": precision}
            for backend, run in torch_runs(module, feeds, precision == "fp16"):
                attempt(results, {**facts, "backend": backend}, partial(time_ms, run, seconds))
            attempt(results, {**facts, "backend": "onnxruntime"}, partial(_timed, graph, feeds, seconds))
            attempt(results, {**facts, "backend": "tensorrt_rtx"}, partial(_rtx, recipe, name, graph, feeds))
    return results


def one_prompt(feeds: Feeds) -> Feeds:
    """The example feeds with one prompt of two points: a click and SAM's padding point, or a box."""
    return {n: v[:1, :2] if n.startswith("point") else v[:1] if n == "mask_input" else v for n, v in feeds.items()}


def _timed(graph: Path, feeds: Feeds, seconds: float) -> dict[str, float]:
    with onnxruntime_run(graph, feeds) as run:
        return time_ms(run, seconds)


def _rtx(recipe: Recipe, name: str, graph: Path, feeds: Feeds) -> dict[str, Any]:
    """Compile with TensorRT for RTX and measure the engine; says what happens on GPUs that it does not know."""
    from edgesam_deploy.measure.engine_latency import EngineLatencyOptions, measure_engine
    from edgesam_deploy.runtime import SessionOptions
    from edgesam_deploy.runtime.bindings import use
    from edgesam_deploy.runtime.tensorrt import TensorRTSession
    from edgesam_deploy.stages.compile import CompileOptions, compile_graph

    plan = graph.with_suffix(".engine")
    built = compile_graph(graph, plan, contracts(recipe.geometry)[name], CompileOptions(), use("tensorrt_rtx"))
    with TensorRTSession(plan, SessionOptions(), "tensorrt_rtx") as session:
        session.stage(feeds)
        measured = measure_engine(session.cuda, session, EngineLatencyOptions(duration_s=2.0))
    compute = measured.gpu_compute
    return {
        "median_ms": compute.median_ms,
        "p95_ms": compute.p95_ms,
        "runs": measured.queries,
        "mb": built.size_bytes / 1e6,
    }


def seam() -> dict[str, Any]:
    """Each implementation of the CUDA seam: data moved, an event timed, a graph replayed, beside torch."""
    results: dict[str, Any] = {}
    for name in IMPLEMENTATIONS:
        try:
            results[name] = check_seam(name)
        except (EdgeSAMError, ImportError) as error:
            results[name] = {"refused": str(error)}
    return results


def check_seam(implementation: str) -> dict[str, Any]:
    """Raises BackendError where there is no GPU. Copies 64 MB, and compares addresses and times with torch's."""
    cuda = open_cuda(implementation)
    size = 64 << 20
    values = torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE)
    stream, first, last = cuda.stream_create(), cuda.event_create(), cuda.event_create()
    host = cuda.malloc_host(size)
    view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
    torch.cuda.synchronize()
    cuda.event_record(first, stream)
    cuda.copy_to_host(host, values.data_ptr(), size, stream)
    cuda.event_record(last, stream)
    cuda.event_synchronize(last)
    facts: dict[str, Any] = {
        "compute_capability": cuda.compute_capability(),
        "runtime_version": list(cuda.runtime_version()),
        "torch_capability": list(torch.cuda.get_device_capability()),
        "bytes_equal_to_torch": bool((view == values.cpu().numpy()).all()),
        "d2h_64mb_ms": cuda.elapsed_ms(first, last),
    }
    device = cuda.malloc(size)
    try:
        graph = cuda.capture(stream, lambda: cuda.copy_to_device(device, host, size, stream))
        view[:] = 7
        cuda.graph_launch(graph, stream)
        cuda.stream_synchronize(stream)
        view[:] = 0
        cuda.copy_to_host(host, device, size, stream)
        cuda.stream_synchronize(stream)
        facts["graph_replayed"] = bool((view == 7).all())
        cuda.graph_destroy(graph)
    except EdgeSAMError as error:
        facts["graph_replayed"] = str(error)
    cuda.free(device)
    cuda.free_host(host)
    cuda.event_destroy(first)
    cuda.event_destroy(last)
    cuda.stream_destroy(stream)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--recipes", nargs="+", default=["reference", "mobile_sam", "sam_vit_b"])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    result: dict[str, Any] = {
        "command": f"python benchmarks/gpu.py --target {options.target} --recipes {' '.join(options.recipes)} "
        f"--seconds {options.seconds:g}",
        "gpu": torch.cuda.get_device_name() if ON_GPU else None,
        "machine": machine(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "tf32": True,
        "tools": tool_versions(),
        "seam": seam(),
        "latency": [],
    }
    output = options.output or Path("benchmarks/results") / options.target / "gpu.json"
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as folder:
            result["latency"] += latencies(load_recipe(name), options.seconds, Path(folder))
        write_json(output, result)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
