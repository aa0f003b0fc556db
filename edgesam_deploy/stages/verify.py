"""Last stage: compare a bundle's masks with the PyTorch FP32 model's. Needs neither torch nor, but for FP16, onnx."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgesam_deploy.bundle import ANSWERS, ENGINE_BACKENDS, GRAPHS, Bundle, open_graphs
from edgesam_deploy.errors import BundleError, MissingExtraError
from edgesam_deploy.measure.accuracy import AccuracyResult, Answers, compare, load_answers
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.runtime import SessionOptions

EMULATED = "emulated fp16"
TYPED = "typed graph on onnxruntime"


def verify(
    bundle: Bundle,
    answers: Answers | None = None,
    folder: Path | None = None,
    threads: int | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> AccuracyResult:
    """Measure a bundle against recorded answers: its own, or given ones about images in ``folder``.

    A compiled bundle is measured by its engines, a kit by its typed graphs on ONNX Runtime, a CPU's bundle by the
    backends that run it (``Bundle.on`` for others). FP16 on a CPU is always measured by its FP32 emulation on ONNX
    Runtime (``stages.fp16``), since the CPU backends hide half precision's faults. Raises BundleError if the bundle
    carries no answers.
    """
    if answers is None:
        if ANSWERS not in bundle.manifest["files"]:
            raise BundleError(f"bundle {bundle.path} carries no {ANSWERS}; give images with --images DIR")
        answers, folder = load_answers(bundle.path / ANSWERS), bundle.path / "verify"
    with witness(bundle, threads) as (predictor, name):
        return compare(predictor, answers, folder or bundle.path / "verify", name, progress)


@contextmanager
def witness(bundle: Bundle, threads: int | None = None) -> Iterator[tuple[Predictor, str]]:
    """(a Predictor whose arithmetic is the device's, what it is)."""
    what = witness_name(bundle)
    if what not in (EMULATED, TYPED):
        with bundle.open(threads) as predictor:
            yield predictor, what
        return
    with tempfile.TemporaryDirectory() as folder:
        graphs = {name: bundle.graph(name) for name in GRAPHS}
        if what == EMULATED:
            graphs = _emulated(graphs, Path(folder))
        with open_graphs(graphs, bundle, SessionOptions(threads), "onnxruntime") as predictor:
            yield predictor, what


def witness_name(bundle: Bundle) -> str:
    """What ``witness`` measures a bundle by."""
    if bundle.compiled and (bundle.precision != "fp16" or bundle.backend in ENGINE_BACKENDS):
        return bundle.runs_on
    return EMULATED if _half(bundle) else TYPED


def _half(bundle: Bundle) -> bool:
    """Whether its graphs hold FP16: all of them, or beside INT8."""
    return "fp16" in (bundle.precision, bundle.manifest.get("rest"))


def _emulated(graphs: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    try:
        from edgesam_deploy.stages.fp16 import emulate_fp16
    except ImportError as error:
        raise MissingExtraError("onnx", "export") from error
    return {name: emulate_fp16(graph, folder / f"{name}.onnx") for name, graph in graphs.items()}
