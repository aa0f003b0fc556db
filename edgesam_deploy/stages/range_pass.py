"""How large every tensor of both graphs gets: images and prompts through the FP32 graphs, |max| per tensor kept.

What decides which nodes FP16 may not touch (``stages.fp16``). Images go one by one and only maxima are kept.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from edgesam_deploy.contract import GraphContract, contracts
from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.measure.accuracy import answer
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.runtime import Session, Tensor, open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import activations, images_digest, watch


@dataclass(frozen=True, slots=True)
class Maxima:
    """By graph name: absmax, the largest |x| by tensor, inputs included; graph_sha256, of what was watched."""

    images: int
    images_digest: str
    graph_sha256: Mapping[str, str]
    absmax: Mapping[str, Mapping[str, float]]


class _Watching:
    """A session that returns what the graph returns, and remembers the largest |x| of every tensor."""

    def __init__(self, inner: Session, contract: GraphContract) -> None:
        self.absmax: dict[str, float] = {}
        self._inner = inner
        self._contract = contract

    def __enter__(self) -> _Watching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def specs(self) -> GraphContract:
        return self._contract

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self._inner.run(feeds)
        for name, value in (*feeds.items(), *values.items()):
            largest = float(np.abs(np.asarray(value), dtype=np.float64).max(initial=0.0))
            if not np.isfinite(largest):
                raise GraphError(f"the tensor '{name}' is not finite in FP32; the checkpoint is damaged")
            self.absmax[name] = max(largest, self.absmax.get(name, 0.0))
        return {spec.name: values[spec.name] for spec in self._contract.outputs}


def range_pass(
    sources: Mapping[str, Path],
    images: Sequence[Path],
    recipe: Recipe,
    output: Path,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Maxima:
    """Watch both FP32 graphs (by ``encoder`` and ``decoder``) on images with the default prompts; written as JSON."""
    expected = contracts(recipe.geometry)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        watching = {}
        for name, source in sources.items():
            model = graphs.load(source)
            watched = watch(model, activations(model), Path(folder) / f"{name}.onnx")
            watching[name] = _Watching(stack.enter_context(open_session(watched)), expected[name])
        predictor = Predictor(watching["encoder"], watching["decoder"], recipe.geometry, recipe.pixels)
        answer(predictor, images, progress=progress)
    maxima = Maxima(
        images=len(images),
        images_digest=images_digest(images),
        graph_sha256={name: sha256_file(path) for name, path in sources.items()},
        absmax={name: session.absmax for name, session in watching.items()},
    )
    write_json(output, asdict(maxima))
    return maxima


def load_maxima(path: Path) -> Maxima:
    """Read what ``range_pass`` wrote. Raises GraphError if it is not that."""
    try:
        return Maxima(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise GraphError(f"{path} is not a file of recorded maxima: {error}. Build again with --force") from error
