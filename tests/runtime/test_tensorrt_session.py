"""TensorRTSession over a fake of the native seam: libcudart and the module ``tensorrt``, whose engines double."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgesam_deploy.errors import BackendError, InputError
from edgesam_deploy.runtime import SessionOptions, bindings, open_session
from edgesam_deploy.runtime.buffers import DeviceTensor
from edgesam_deploy.runtime.cuda import CudaRuntime
from edgesam_deploy.runtime.tensorrt import TensorRTSession

from . import fake_tensorrt
from .fake_cudart import CAPTURE_UNSUPPORTED, OUT_OF_MEMORY, FakeCudart
from .fake_tensorrt import plan_bytes

LISTINGS = Path(__file__).resolve().parent.parent / "trt_api"
H2D, D2H, SYNC = "cudaMemcpyAsync", "cudaMemcpyAsync", "cudaStreamSynchronize"
# (1, 3) pixels; up to 4 prompts of up to 2 points of (x, y)
ENCODER = plan_bytes({"image": ["UINT8", [1, 3], [1, 3]]}, {"embeddings": ["FLOAT", "image"]})
DECODER = plan_bytes(
    {"embeddings": ["FLOAT", [1, 3], [1, 3]], "coords": ["FLOAT", [1, 0, 2], [4, 2, 2]]},
    {"masks": ["FLOAT", "coords"], "echo": ["HALF", "embeddings"]},
)
EMBEDDINGS = np.array([[1, 2, 3]], np.float32)


class Bench:
    """A process with the fakes in place; ``open`` makes sessions of plans."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cudart = FakeCudart()
        self.cuda = CudaRuntime(self.cudart)  # type: ignore[arg-type]
        self.cudart.calls.clear()

    def plan(self, data: bytes) -> Path:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.engine"
        path.write_bytes(data)
        return path

    def open(self, data: bytes, **options: Any) -> TensorRTSession:
        return TensorRTSession(self.plan(data), SessionOptions(**options), "tensorrt", self.cuda)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setattr(bindings, "_state", bindings._State())
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make(made.cudart))
    return made


def coords(prompts: int, points: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(prompts * points * 2, dtype=np.float32).reshape(prompts, points, 2) + 1


def test_the_fake_has_only_names_of_the_real_bindings() -> None:
    for path in sorted(LISTINGS.glob("*.json")):
        classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
        for fake in fake_tensorrt.CLASSES:
            real = set(classes[fake.__name__]["attrs"]) | set(classes[fake.__name__]["enum"] or ())
            public = {name for name in vars(fake) if not name.startswith("_")} - {"refuse"}
            assert public <= real, f"{path.stem}: {fake.__name__}"


def test_a_run_copies_in_enqueues_copies_out_and_then_waits(bench: Bench) -> None:
    with bench.open(DECODER) as session:
        bench.cudart.calls.clear()
        results = session.run({"embeddings": EMBEDDINGS, "coords": coords(3)})
        assert bench.cudart.calls == [H2D, H2D, "enqueue", D2H, D2H, SYNC]
    assert {name: a.dtype.name for name, a in results.items()} == {"masks": "float32", "echo": "float16"}
    np.testing.assert_array_equal(results["masks"], coords(3) * 2)
    np.testing.assert_array_equal(results["echo"], EMBEDDINGS * 2)
    assert bench.cudart.live == {}


def test_uint8_goes_in_and_float_comes_out(bench: Bench) -> None:
    with bench.open(ENCODER) as session:
        result = session.run({"image": np.array([[0, 100, 120]], np.uint8)})
        np.testing.assert_array_equal(result["embeddings"], [[0, 200, 240]])


def test_buffers_are_made_once_for_the_largest_shapes(bench: Bench) -> None:
    with bench.open(DECODER) as session:
        # 3 floats; 4 prompts of 2 points of 2 floats, in and out; 3 halves
        sizes = [12, 64, 64, 6]
        assert sorted(bench.cudart.sizes("device")) == sorted(sizes)
        assert sorted(bench.cudart.sizes("pinned")) == sorted(sizes)
        assert session.device_memory_bytes == fake_tensorrt.ACTIVATIONS + sum(sizes)
        bench.cudart.calls.clear()
        for prompts, points in ((1, 1), (4, 2), (2, 0), (4, 1)):
            result = session.run({"embeddings": EMBEDDINGS, "coords": coords(prompts, points)})
            np.testing.assert_array_equal(result["masks"], coords(prompts, points) * 2)
        assert {"cudaMalloc", "cudaMallocHost", "cudaFree"} & set(bench.cudart.calls) == set()


def test_results_are_not_overwritten_by_the_next_run(bench: Bench) -> None:
    with bench.open(DECODER) as session:
        first = session.run({"embeddings": EMBEDDINGS, "coords": coords(2)})
        session.run({"embeddings": EMBEDDINGS, "coords": coords(2) * 10})
        np.testing.assert_array_equal(first["masks"], coords(2) * 2)


def test_specs_are_the_engines(bench: Bench) -> None:
    with bench.open(DECODER) as session:
        specs = session.specs()
        assert [(s.name, s.dtype, s.shape) for s in specs.inputs] == [
            ("embeddings", "float32", (1, 3)),
            ("coords", "float32", ("?", "?", 2)),
        ]
        assert [(s.name, s.dtype, s.shape) for s in specs.outputs] == [
            ("masks", "float32", ("?", "?", 2)),
            ("echo", "float16", (1, 3)),
        ]
        assert session.provider == "tensorrt 10.3.0, compute capability 8.7"
        assert json.loads(session.inspect()) == {"Layers": ["double"]}


def test_layer_times_are_summed_by_name_and_run(bench: Bench) -> None:
    with bench.open(DECODER) as session:
        feeds = {"embeddings": EMBEDDINGS, "coords": coords(1)}
        times = session.layer_times(feeds, 2)
        session.run(feeds)
        assert times == [{"double": 0.75, "reformat": 0.125}] * 2
        assert session._context.profiler is None  # it slows every run


def calls_of_construction(bench: Bench) -> int:
    bench.cudart.calls.clear()
    with bench.open(DECODER):
        count = len(bench.cudart.calls)
    bench.cudart.calls.clear()
    return count


def test_an_error_at_any_call_while_opening_frees_all(bench: Bench) -> None:
    count = calls_of_construction(bench)
    assert count >= 9  # a stream, and two buffers for each of four tensors
    for k in range(1, count + 1):
        bench.cudart.calls.clear()
        bench.cudart.fail = {k: OUT_OF_MEMORY}
        with pytest.raises(BackendError, match=r"^CUDA: cuda\w+ failed: cudaErrorMemoryAllocation \(2\)") as caught:
            bench.open(DECODER)
        failed = bench.cudart.calls[k - 1]
        assert failed in str(caught.value)
        assert bench.cudart.live == {}, f"after call {k}, {failed}"
        assert bench.cudart.last_error == 0


@pytest.mark.parametrize("graph", [False, True], ids=["launch", "graph"])
def test_an_error_at_any_call_of_a_run_is_told_and_all_is_freed_on_exit(bench: Bench, graph: bool) -> None:
    feeds = {"embeddings": EMBEDDINGS, "coords": coords(2)}
    with bench.open(DECODER, cuda_graph=graph) as session:
        bench.cudart.calls.clear()
        session.run(feeds)
        calls = list(bench.cudart.calls)
    for k, name in enumerate(calls, start=1):
        if name in ("enqueue", "cudaGraphDestroy"):
            continue  # not CUDA's; what cannot be destroyed cannot be freed
        with bench.open(DECODER, cuda_graph=graph) as session:
            bench.cudart.calls.clear()
            bench.cudart.fail = {k: CAPTURE_UNSUPPORTED}
            with pytest.raises(BackendError, match=f"^CUDA: {name} failed"):
                session.run(feeds)
            bench.cudart.fail = {}
            assert bench.cudart.captures == {}
            np.testing.assert_array_equal(session.run(feeds)["masks"], coords(2) * 2)
        assert bench.cudart.live == {}, f"after call {k}, {name}"


def test_closing_twice_is_safe_and_a_closed_session_says_so(bench: Bench) -> None:
    session = bench.open(DECODER)
    session.close()
    session.close()
    for use in (lambda: session.run(FEEDS), session.specs, session.inspect, lambda: session.device_memory_bytes):
        with pytest.raises(BackendError, match=r"the session of .*\.engine is closed"):
            use()


def test_an_output_that_stays_feeds_another_session_without_a_copy(bench: Bench) -> None:
    with bench.open(ENCODER, stay=("embeddings",)) as encoder, bench.open(DECODER) as decoder:
        bench.cudart.calls.clear()
        kept = encoder.run({"image": np.array([[1, 2, 3]], np.uint8)})["embeddings"]
        assert isinstance(kept, DeviceTensor)
        assert kept.shape == (1, 3)
        assert bench.cudart.calls == [H2D, "enqueue", SYNC]
        bench.cudart.calls.clear()
        results = decoder.run({"embeddings": kept, "coords": coords(2)})
        assert bench.cudart.calls == [H2D, "enqueue", D2H, D2H, SYNC]
        np.testing.assert_array_equal(results["echo"], [[4, 8, 12]])
        # and back to an array
        np.testing.assert_array_equal(decoder.run({"embeddings": EMBEDDINGS, "coords": coords(1)})["echo"], [[2, 4, 6]])
        np.testing.assert_array_equal(np.asarray(kept), [[2, 4, 6]])
    assert bench.cudart.live == {}


def test_what_stayed_is_gone_when_its_session_runs_again(bench: Bench) -> None:
    with bench.open(ENCODER, stay=("embeddings",)) as encoder, bench.open(DECODER) as decoder:
        old = encoder.run({"image": np.zeros((1, 3), np.uint8)})["embeddings"]
        new = encoder.run({"image": np.ones((1, 3), np.uint8)})["embeddings"]
        with pytest.raises(BackendError, match="'embeddings' of an earlier run was overwritten"):
            decoder.run({"embeddings": old, "coords": coords(1)})
        with pytest.raises(BackendError, match="overwritten"):
            np.asarray(old)
        np.testing.assert_array_equal(decoder.run({"embeddings": new, "coords": coords(1)})["echo"], [[4, 4, 4]])


def test_what_stayed_is_gone_when_its_session_times_its_layers(bench: Bench) -> None:
    with bench.open(ENCODER, stay=("embeddings",)) as encoder:
        kept = encoder.run({"image": np.zeros((1, 3), np.uint8)})["embeddings"]
        encoder.layer_times({"image": np.ones((1, 3), np.uint8)}, 1)
        with pytest.raises(BackendError, match="overwritten"):
            np.asarray(kept)


def test_what_stayed_keeps_its_shape_when_other_feeds_are_staged(bench: Bench) -> None:
    with bench.open(DECODER, stay=("masks",)) as decoder:
        kept = decoder.run({"embeddings": EMBEDDINGS, "coords": coords(4)})["masks"]
        decoder.stage({"embeddings": EMBEDDINGS, "coords": coords(1)})
        np.testing.assert_array_equal(np.asarray(kept), coords(4) * 2)


def test_what_stayed_is_gone_when_its_session_is_closed(bench: Bench) -> None:
    with bench.open(ENCODER, stay=("embeddings",)) as encoder:
        kept = encoder.run({"image": np.zeros((1, 3), np.uint8)})["embeddings"]
    with pytest.raises(BackendError):
        _ = kept.address


FEEDS = {"embeddings": EMBEDDINGS, "coords": coords(1)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"embeddings": EMBEDDINGS}, "the engine needs the input 'coords', got embeddings"),
    "nothing": ({}, "the engine needs the input 'embeddings', got none"),
    "too-many-prompts": (
        FEEDS | {"coords": coords(5)},
        r"'coords' of \(1, 0, 2\) to \(4, 2, 2\), got \(5, 1, 2\).*fewer prompts or points.*--max-prompts",
    ),
    "too-many-points": (FEEDS | {"coords": coords(1, 3)}, r"got \(1, 3, 2\).*--max-points"),
    "no-prompts": (FEEDS | {"coords": coords(0)}, r"got \(0, 1, 2\)"),
    "wrong-rank": (FEEDS | {"coords": np.zeros((1, 2), np.float32)}, r"got \(1, 2\)"),
    "wrong-size": (FEEDS | {"embeddings": np.zeros((1, 4), np.float32)}, r"'embeddings' of \(1, 3\)"),
    "wrong-type": (FEEDS | {"coords": coords(1).astype(np.float64)}, "input 'coords' is float32, got float64"),
}


@pytest.mark.parametrize(("feeds", "message"), REFUSED.values(), ids=REFUSED)
def test_feeds_that_do_not_fit_are_refused_before_any_cuda_call(
    bench: Bench, feeds: dict[str, Any], message: str
) -> None:
    with bench.open(DECODER) as session:
        bench.cudart.calls.clear()
        with pytest.raises(InputError, match=message):
            session.run(feeds)
        assert bench.cudart.calls == []
        np.testing.assert_array_equal(session.run(FEEDS)["masks"], coords(1) * 2)


def test_a_kept_tensor_of_another_type_is_refused(bench: Bench) -> None:
    """As an array of another type is: its bytes would be misread."""
    half = plan_bytes({"image": ["UINT8", [1, 3], [1, 3]]}, {"embeddings": ["HALF", "image"]})
    with bench.open(half, stay=("embeddings",)) as encoder, bench.open(DECODER) as decoder:
        kept = encoder.run({"image": np.zeros((1, 3), np.uint8)})["embeddings"]
        with pytest.raises(InputError, match="input 'embeddings' is float32, got float16"):
            decoder.run({"embeddings": kept, "coords": coords(1)})


def test_arrays_of_any_layout_are_taken(bench: Bench) -> None:
    with bench.open(DECODER) as session:
        strided = np.asfortranarray(coords(4, 4))[::2, ::-2]
        results = session.run({"embeddings": EMBEDDINGS, "coords": strided})
        np.testing.assert_array_equal(results["masks"], strided * 2)


WARM_AND_CAPTURE = [
    "enqueue",
    SYNC,
    "cudaStreamBeginCapture",
    "enqueue",
    "cudaStreamEndCapture",
    "cudaGraphInstantiateWithFlags",
    "cudaGraphDestroy",
]


def test_a_graph_is_recorded_once_per_shapes_and_then_launched(bench: Bench) -> None:
    with bench.open(DECODER, cuda_graph=True) as session:

        def run(prompts: int, scale: float) -> list[str]:
            bench.cudart.calls.clear()
            result = session.run({"embeddings": EMBEDDINGS * scale, "coords": coords(prompts) * scale})
            np.testing.assert_array_equal(result["masks"], coords(prompts) * scale * 2)
            np.testing.assert_array_equal(result["echo"], EMBEDDINGS * scale * 2)
            return list(bench.cudart.calls)

        launch = ["cudaGraphLaunch", D2H, D2H, SYNC]
        assert run(2, 1) == [H2D, H2D, *WARM_AND_CAPTURE, *launch]
        for scale in (2, 3):
            assert run(2, scale) == [H2D, H2D, *launch]
        assert run(3, 4) == [H2D, H2D, "cudaGraphExecDestroy", *WARM_AND_CAPTURE, *launch]
        assert bench.cudart.live["executable"] == 1
    assert bench.cudart.live == {}


def test_a_graph_is_recorded_again_for_another_address(bench: Bench) -> None:
    with (
        bench.open(ENCODER, stay=("embeddings",)) as encoder,
        bench.open(DECODER, cuda_graph=True) as decoder,
    ):
        decoder.run({"embeddings": EMBEDDINGS, "coords": coords(1)})
        kept = encoder.run({"image": np.array([[1, 2, 3]], np.uint8)})["embeddings"]
        results = decoder.run({"embeddings": kept, "coords": coords(1)})
        np.testing.assert_array_equal(results["echo"], [[4, 8, 12]])


def test_a_capture_that_tensorrt_refuses_leaves_the_session_usable(bench: Bench) -> None:
    with bench.open(DECODER, cuda_graph=True) as session:
        session._context._seen = NeverWarm()
        with pytest.raises(BackendError, match="did not run: IExecutionContext::enqueueV3: Error Code 1"):
            session.run(FEEDS)
        assert bench.cudart.captures == {}
        session._context._seen = set()
        np.testing.assert_array_equal(session.run(FEEDS)["masks"], coords(1) * 2)
    assert bench.cudart.live == {}


class NeverWarm(set[Any]):
    """No shapes were seen, whatever was run: every capture fails."""

    def __contains__(self, shapes: object) -> bool:
        return False


def test_a_run_that_tensorrt_refuses_gives_its_reason(bench: Bench) -> None:
    with bench.open(DECODER) as session:
        session._context.refuse = True
        with pytest.raises(BackendError) as caught:
            session.run(FEEDS)
        assert str(caught.value).endswith(
            ".engine did not run: IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (boom)"
        )


BAD_PLANS: dict[str, tuple[bytes, str]] = {
    "garbled": (b"ftrt not a plan", r"tensorrt 10\.3\.0 cannot load .*: IRuntime.* Error Code 1: bad plan; rebuild it"),
    "wrong-magic": (b"\x08\x08onnx", r"not a plan \(it begins with b'\\x08\\x08on', not b'ftrt'\), expected one of"),
    "empty": (b"", r"not a plan \(it begins with b'', not b'ftrt'\)"),
    "of-the-other": (plan_bytes({}, {}, b"vtrt"), "is a plan of tensorrt_rtx, expected one of tensorrt; rebuild it"),
    "unknown-type": (
        plan_bytes({"x": ["BF16", [1], [1]]}, {"y": ["FLOAT", "x"]}),
        "tensor 'x' has the type BF16; expected one of FLOAT",
    ),
}


@pytest.mark.parametrize(("data", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_a_plan_that_cannot_be_used_is_refused_in_one_line(bench: Bench, data: bytes, message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        bench.open(data)
    assert len(str(caught.value).splitlines()) == 1
    assert bench.cudart.live == {}


def test_a_runtime_that_cannot_start_is_told_in_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings turn the library's null pointer into a TypeError, and the reason is in the log."""

    def refuse(logger: Any) -> None:
        logger.log(logger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", refuse)
    with pytest.raises(BackendError, match="CUDA initialization failure with error: 35"):
        bench.open(DECODER)
    assert bench.cudart.live == {}


def test_an_output_whose_shape_is_not_known_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffer could be too small: TensorRT would write past it."""
    unknown = fake_tensorrt.Dims((-1, 2))
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "get_tensor_shape", lambda self, name: unknown)
    with pytest.raises(BackendError, match="'masks'"):
        bench.open(DECODER)
    assert bench.cudart.live == {}


def test_an_output_that_is_to_stay_must_be_one(bench: Bench) -> None:
    with pytest.raises(InputError, match="embedings"):
        bench.open(ENCODER, stay=("embedings",))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_the_driver_is_asked_before_tensorrt_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(bindings, "_state", bindings._State())
    monkeypatch.setattr(bindings, "import_module", never)
    monkeypatch.setattr("ctypes.CDLL", no_library)
    plan = tmp_path / "x.engine"
    plan.write_bytes(plan_bytes({}, {}, b"ftrt" if backend == "tensorrt" else b"vtrt"))
    with pytest.raises(BackendError, match="no NVIDIA driver on this machine"):
        open_session(plan, backend)


def no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


never: Callable[[str], Any] = lambda name: pytest.fail(f"{name} was imported")  # noqa: E731
