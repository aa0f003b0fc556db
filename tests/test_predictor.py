"""Our Predictor beside segment-anything's SamPredictor: the same weights, images of every odd kind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgesam_deploy.bundle import load_bundle, open_graphs
from edgesam_deploy.contract import Geometry
from edgesam_deploy.errors import ImageError, InputError, PromptError
from edgesam_deploy.images import read_image
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Pixels
from edgesam_deploy.runtime import SessionOptions

pytest.importorskip("torch", reason="needs the export extra")
PHOTOS = Path(__file__).resolve().parent.parent / "edgesam_deploy" / "assets" / "photos"
HEIGHTS_WIDTHS = [(1, 200), (200, 1), (1500, 2250), (640, 361), (77, 500), (512, 512)]


@pytest.fixture(scope="module")
def theirs(tiny_recipe: Path, checkpoint: Path) -> Any:
    from segment_anything import SamPredictor

    from edgesam_deploy.models.checkpoint import load_model
    from edgesam_deploy.recipe import load_recipe

    return SamPredictor(load_model(load_recipe(tiny_recipe), checkpoint))


@pytest.fixture(scope="module")
def ours(built: SimpleNamespace) -> Any:
    """The FP32 graphs of the tiny model on ONNX Runtime."""
    stages = built.stages
    graphs = {name: stages / f"simplify-{name}" / f"{name}.onnx" for name in ("encoder", "decoder")}
    with open_graphs(graphs, load_bundle(built.bundle), SessionOptions(), "onnxruntime") as predictor:
        yield predictor


def _photo(hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    from PIL import Image

    image = Image.fromarray(read_image(PHOTOS / "verify" / "cat.jpg"))
    return np.asarray(image.resize((hw[1], hw[0])))


def _prompts(hw: tuple[int, int]) -> list[dict[str, Any]]:
    height, width = hw
    centre, corner = [width / 2, height / 2], [width * 0.2, height * 0.3]
    box = [width * 0.1, height * 0.2, width * 0.8, height * 0.9]
    return [
        {"point_coords": [centre], "point_labels": [1]},
        {"point_coords": [centre, corner], "point_labels": [1, 0]},
        {"box": box},
        {"point_coords": [centre], "point_labels": [1], "box": box},
    ]


@pytest.mark.parametrize("hw", HEIGHTS_WIDTHS, ids=str)
def test_masks_are_sam_predictors(ours: Predictor, theirs: Any, hw: tuple[int, int]) -> None:
    image = _photo(hw)
    ours.set_image(image)
    theirs.set_image(image)
    np.testing.assert_allclose(ours.get_image_embedding(), theirs.get_image_embedding().numpy(), atol=0.02)
    ious = []
    for prompt in _prompts(hw):
        for multimask in (True, False):
            mine = ours.predict(**prompt, multimask_output=multimask)
            arrays = {k: np.asarray(v, dtype=np.float64) for k, v in prompt.items()}
            masks, scores, low_res = theirs.predict(**arrays, multimask_output=multimask)
            assert mine.masks.shape == masks.shape
            assert mine.low_res_masks.shape == low_res.shape
            np.testing.assert_allclose(mine.iou_predictions, scores, atol=0.01)
            ious += [mask_iou(a.astype(bool), b) for a, b in zip(mine.masks, masks, strict=True)]
    assert np.mean(ious) >= 0.999
    assert min(ious) >= 0.99


def test_mask_input_alone_and_with_a_point(ours: Predictor, theirs: Any) -> None:
    image = _photo((240, 320))
    ours.set_image(image)
    theirs.set_image(image)
    first = ours.predict([[160, 120]], [1], multimask_output=False)
    for prompt in ({}, {"point_coords": np.array([[160.0, 120.0]]), "point_labels": np.array([1])}):
        mine = ours.predict(**prompt, mask_input=first.low_res_masks, multimask_output=False, return_logits=True)
        logits, _, _ = theirs.predict(
            **prompt, mask_input=first.low_res_masks, multimask_output=False, return_logits=True
        )
        assert mine.masks.dtype == np.float32
        np.testing.assert_allclose(mine.masks, logits, atol=0.05 * np.abs(logits).max())


def test_many_prompts_in_one_call_are_the_single_calls(ours: Predictor) -> None:
    ours.set_image(_photo((240, 320)))
    boxes = np.array([[10, 10, 200, 200], [100, 50, 300, 220], [0, 0, 320, 240]], dtype=np.float64)
    together = ours.predict(box=boxes, multimask_output=False)
    assert together.masks.shape == (3, 1, 240, 320)
    for box, masks, scores in zip(boxes, together.masks, together.iou_predictions, strict=True):
        alone = ours.predict(box=box, multimask_output=False)
        assert mask_iou(masks[0].astype(bool), alone.masks[0].astype(bool)) >= 0.999
        np.testing.assert_allclose(scores, alone.iou_predictions, atol=1e-4)


def test_bgr_is_rgb_reversed_and_a_prediction_unpacks(ours: Predictor) -> None:
    image = _photo((240, 320))
    ours.set_image(image)
    rgb = ours.get_image_embedding()
    ours.set_image(np.ascontiguousarray(image[..., ::-1]), image_format="BGR")
    np.testing.assert_array_equal(ours.get_image_embedding(), rgb)
    masks, scores, low_res = ours.predict([[160, 120]], [1])
    assert masks.shape == (3, 240, 320)
    assert scores.shape == (3,)
    assert low_res.shape[0] == 3


def test_wrong_use_is_refused(ours: Predictor) -> None:
    with pytest.raises(ImageError, match=r"\(H,W,3\) of uint8, got float64"):
        ours.set_image(np.zeros((4, 4, 3)))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="at least 1x1"):
        ours.set_image(np.zeros((0, 4, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="'RGB' or 'BGR'"):
        ours.set_image(np.zeros((4, 4, 3), dtype=np.uint8), image_format="GRB")
    ours.set_image(_photo((24, 32)))
    with pytest.raises(PromptError, match="needs a prompt"):
        ours.predict()
    with pytest.raises(PromptError, match="mask_input must be logits of shape"):
        ours.predict([[1, 1]], [1], mask_input=np.zeros((1, 7, 7), dtype=np.float32))
    with pytest.raises(PromptError, match="NaN"):
        ours.predict([[1, 1]], [1], mask_input=np.full((1, 32, 32), np.nan, dtype=np.float32))
    ours.reset_image()
    with pytest.raises(InputError, match="set_image"):
        ours.predict([[1, 1]], [1])


class Answering:
    """A session that gives fixed outputs and keeps what it was fed."""

    def __init__(self, outputs: dict[str, npt.NDArray[Any]]) -> None:
        self.outputs, self.feeds = outputs, {}  # type: tuple[dict[str, Any], dict[str, Any]]

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def specs(self) -> Any:
        raise AssertionError("not asked for")

    def run(self, feeds: Any) -> dict[str, npt.NDArray[Any]]:
        self.feeds = dict(feeds)
        return self.outputs


def variant(masks: npt.NDArray[np.float32], iou: list[float], **geometry: Any) -> Predictor:
    """A Predictor of embedding size 2 on an image of 6x10 pixels; its decoder answers ``masks`` (M,8,8) and ``iou``."""
    sizes = {"image_size": 8, "prompt_size": 16, "embedding_size": 2, "embedding_channels": 4, "num_masks": len(masks)}
    features = {"image_embeddings": np.zeros((1, 4, 2, 2), dtype=np.float32)}
    if "high_res_channels" in geometry:
        features["high_res_feats_0"] = np.ones((1, 2, 8, 8), dtype=np.float32)
        features["high_res_feats_1"] = np.ones((1, 3, 4, 4), dtype=np.float32)
    answers = {"low_res_masks": masks[None], "iou_predictions": np.array([iou], dtype=np.float32)}
    pixels = Pixels((124.0, 116.0, 104.0), (58.0, 57.0, 57.0))
    predictor = Predictor(Answering(features), Answering(answers), Geometry(**sizes, **geometry), pixels)
    predictor.set_image(np.zeros((6, 10, 3), dtype=np.uint8))
    return predictor


def planes(*levels: float) -> npt.NDArray[np.float32]:
    return np.stack([np.full((8, 8), level, dtype=np.float32) for level in levels])


@pytest.mark.parametrize(
    ("rule", "levels", "single", "candidates"),
    [
        ("first", (5.0, 6.0, 7.0, 8.0), 5.0, [6.0, 7.0, 8.0]),
        ("best", (5.0, 6.0, 7.0, 8.0), 7.0, [5.0, 6.0, 7.0, 8.0]),
        ("stable", (5.0, 6.0, 7.0, 8.0), 5.0, [6.0, 7.0, 8.0]),
        ("stable", (0.01, 6.0, 7.0, 8.0), 7.0, [6.0, 7.0, 8.0]),
    ],
    ids=["first", "best", "stable", "unstable"],
)
def test_which_mask_is_the_single_answer(
    rule: str, levels: tuple[float, ...], single: float, candidates: list[float]
) -> None:
    predictor = variant(planes(*levels), [0.1, 0.5, 0.9, 0.4], single_mask=rule)
    prompt: Any = {"point_coords": [[5, 3]], "point_labels": [1]}
    _, iou, low_res = predictor.predict(**prompt, multimask_output=False)
    assert low_res[:, 0, 0].tolist() == [np.float32(single)]
    assert iou.shape == (1,)
    masks, _, low_res = predictor.predict(**prompt)
    assert low_res[:, 0, 0].tolist() == candidates
    assert masks.shape == (len(candidates), 6, 10)


def test_the_best_candidate_is_never_the_first_mask() -> None:
    """Where mask 0 is not trained to be an answer, a high iou_prediction of it says nothing."""
    predictor = variant(planes(5.0, 6.0, 7.0, 8.0), [0.95, 0.5, 0.9, 0.4], single_mask="candidate")
    _, iou, low_res = predictor.predict(box=[1, 1, 9, 5], multimask_output=False)
    assert (low_res[:, 0, 0].tolist(), iou.tolist()) == ([np.float32(7.0)], [np.float32(0.9)])
    assert predictor.predict(box=[1, 1, 9, 5]).low_res_masks[:, 0, 0].tolist() == [6.0, 7.0, 8.0]


def test_a_model_without_mask_prompts_refuses_them_by_name() -> None:
    predictor = variant(planes(1.0, 2.0, 3.0, 4.0), [0.1, 0.2, 0.3, 0.4], mask_input=False)
    predictor.predict(box=[1, 1, 9, 5])
    assert sorted(predictor.decoder.feeds) == ["image_embeddings", "point_coords", "point_labels"]
    with pytest.raises(PromptError, match="takes no mask as a prompt"):
        predictor.predict(box=[1, 1, 9, 5], mask_input=np.zeros((1, 8, 8), dtype=np.float32))


def test_finer_features_go_from_encoder_to_decoder_and_points_are_stretched() -> None:
    predictor = variant(planes(1.0, 2.0, 3.0, 4.0), [0.1, 0.2, 0.3, 0.4], high_res_channels=[2, 3], resize="stretch")
    predictor.predict(point_coords=[[10, 6]], point_labels=[1])
    feeds = predictor.decoder.feeds
    assert {"high_res_feats_0", "high_res_feats_1"} < set(feeds)
    np.testing.assert_allclose(feeds["point_coords"][0, 0], [16, 16])


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("resize", "crop", "geometry.resize must be one of"),
        ("single_mask", "last", "geometry.single_mask must be one of"),
        ("mask_input", 1, "geometry.mask_input must be true or false"),
        ("high_res_channels", [32], "two positive integers"),
        ("high_res_channels", [32, -1], "two positive integers"),
    ],
)
def test_geometry_variants_are_checked(entry: str, value: object, says: str) -> None:
    entries: dict[str, Any] = {entry: value}
    with pytest.raises(InputError, match=says):
        Geometry(64, 64, 4, 8, 4, **entries)
