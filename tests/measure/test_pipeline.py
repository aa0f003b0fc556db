"""Pipeline latency: what each figure covers, by a clock that only the parts move; then the shipped bundle."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgesam_deploy.bundle import load_bundle, shipped_bundle
from edgesam_deploy.errors import ImageError, InputError
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.pipeline import PipelineOptions, frames_per_s, measure_pipeline

PHOTO = Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos" / "verify" / "duck.jpg"
IMAGE = np.zeros((48, 64, 3), dtype=np.uint8)


@dataclass
class Slow:
    """A predictor that takes 30 ms for an image and 5 ms for a click; its first call of either takes a second more."""

    now_ms: float = 0.0
    calls: list[tuple[str, object]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now_ms / 1e3

    def set_image(self, image: npt.NDArray[np.uint8]) -> None:
        self._take("set_image", image.shape[:2], 30)

    def predict(self, point_coords: object, point_labels: object, multimask_output: bool) -> None:
        assert (point_labels, multimask_output) == ([1], False)
        self._take("predict", point_coords, 5)

    def _take(self, name: str, what: object, ms: float) -> None:
        self.now_ms += ms if any(called == name for called, _ in self.calls) else ms + 1000
        self.calls.append((name, what))


def test_each_figure_covers_what_it_says() -> None:
    slow = Slow()
    result = measure_pipeline(slow, IMAGE, PHOTO, PipelineOptions(2, 1), clock=slow.clock)  # type: ignore[arg-type]
    means = {name: summary.mean_ms for name, summary in result.items()}
    assert means == pytest.approx({"set_image": 30, "predict": 5, "end_to_end": 35, "camera": 35})
    assert frames_per_s(result["camera"]) == pytest.approx(1000 / 35)
    # Three runs of each part; the file is decoded anew every time, at its own size.
    middle = [[32.0, 24.0]]
    hw = read_image(PHOTO).shape[:2]
    assert slow.calls[:6] == [("set_image", (48, 64))] * 3 + [("predict", middle)] * 3
    assert slow.calls[6:12] == [("set_image", hw), ("predict", [[hw[1] / 2, hw[0] / 2]])] * 3
    assert slow.calls[12:] == [("set_image", (48, 64)), ("predict", middle)] * 3


def test_the_camera_shows_its_frames_in_turn() -> None:
    slow = Slow()
    frames = [np.zeros((side, side, 3), dtype=np.uint8) for side in (10, 20)]
    measure_pipeline(slow, IMAGE, PHOTO, PipelineOptions(2, 1), frames, slow.clock)  # type: ignore[arg-type]
    assert [shape for name, shape in slow.calls[12:] if name == "set_image"] == [(10, 10), (20, 20), (10, 10)]


def test_the_shipped_bundle() -> None:
    pytest.importorskip("onnxruntime", reason="the shipped bundle needs the cpu extra")
    with load_bundle(shipped_bundle()).open(threads=1) as predictor:
        result = measure_pipeline(predictor, IMAGE, PHOTO, PipelineOptions(runs=2, warmup=0))
        assert list(result) == ["set_image", "predict", "end_to_end", "camera"]
        for s in result.values():
            assert 0 < s.min_ms <= s.median_ms <= s.p90_ms <= s.p95_ms <= s.p99_ms <= s.max_ms
            assert s.min_ms <= s.mean_ms <= s.max_ms
        with pytest.raises(ImageError, match=r"cannot read the image nowhere\.jpg"):
            measure_pipeline(predictor, IMAGE, Path("nowhere.jpg"), PipelineOptions(runs=1, warmup=0))


@pytest.mark.parametrize(
    ("runs", "warmup", "message"),
    [
        (0, 0, "runs must be a whole number from 1 on, got 0"),
        (1, -1, "warmup must be a whole number from 0 on, got -1"),
        (1.5, 0, "runs must be a whole number from 1 on, got 1.5"),
    ],
)
def test_options_that_cannot_be_met_are_refused(runs: int, warmup: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        PipelineOptions(runs, warmup)
    assert str(caught.value) == message
