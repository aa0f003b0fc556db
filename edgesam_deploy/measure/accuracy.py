"""Mask IoU against the PyTorch FP32 model, whose answers travel in a file.

The reference answers a fixed set of prompts once (``stages.reference``). Any backend is then measured on the same
prompts by the same rule, with or without PyTorch: the mask index is the reference's choice for both, masks are
compared at the original size, and two empty masks count 1.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import BundleError
from edgesam_deploy.files import write_bytes
from edgesam_deploy.images import read_image
from edgesam_deploy.masks import MASK_THRESHOLD, mask_iou
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import check_prompts

# Upper area limits in pixels of the original image (COCO's object sizes).
SIZE_CLASSES = {"small": 32.0**2, "medium": 96.0**2, "large": float("inf")}

# Default prompts, as shares of width and height: single clicks and boxes spread over the picture.
POINTS = ((0.5, 0.5), (0.3, 0.35), (0.7, 0.35), (0.5, 0.75))
BOXES = ((0.25, 0.25, 0.75, 0.75), (0.1, 0.1, 0.9, 0.9), (0.05, 0.45, 0.5, 0.95), (0.55, 0.1, 0.95, 0.6))


@dataclass(frozen=True, slots=True)
class Answers:
    """What the reference model answered on n images, P prompts each (single clicks first, then boxes).

    files: n names of images. points: (n,K,2), boxes: (n,P-K,4), both in the original frame, float64.
    embeddings: (n,C,E,E) float16. low_res: (n,P,4E,4E) float16 logits of the chosen mask. index: (n,P) the
    reference's choice among the M masks. iou_predictions: (n,P,M) float32.
    """

    files: tuple[str, ...]
    points: npt.NDArray[np.float64]
    boxes: npt.NDArray[np.float64]
    embeddings: npt.NDArray[np.float16]
    low_res: npt.NDArray[np.float16]
    index: npt.NDArray[np.int64]
    iou_predictions: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Measured:
    """Of n images, P prompts each. ious: (n,P). areas: (n,P), pixels of the reference masks. cosines: (n,)."""

    ious: npt.NDArray[np.float64]
    areas: npt.NDArray[np.int64]
    cosines: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution of mask IoU in 0..1 over ``count`` prompts."""

    mean: float
    median: float
    p5: float
    min: float
    count: int


@dataclass(frozen=True, slots=True)
class AccuracyResult:
    """Agreement with the reference. by_size: by area of the reference's mask, COCO's limits, only classes that occur.

    witness: what computed the masks (a backend, or "emulated fp16"). embedding_cosine: mean and min over images.
    """

    witness: str
    images: int
    mask_iou: Summary
    by_size: Mapping[str, Summary]
    by_prompt: Mapping[str, Summary]
    embedding_cosine_mean: float
    embedding_cosine_min: float


def default_prompts(hw: tuple[int, int]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Points (K,2) and boxes (L,4) in the original frame of an image of (height, width) ``hw``."""
    height, width = hw
    points = np.array(POINTS) * (width, height)
    boxes = np.array(BOXES) * (width, height, width, height)
    return points, boxes


def answer(
    predictor: Predictor,
    paths: Sequence[Path],
    prompts: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Answers:
    """Ask a predictor on image files; prompts: points (K,2) and boxes (L,4) per image, None for the default ones."""
    asked = prompts if prompts is not None else [None] * len(paths)
    rows = [_answer_one(predictor, paths[i], asked[i]) for i in progress(range(len(paths)))]
    points, boxes, embeddings, low_res, index, iou = (np.stack(column) for column in zip(*rows, strict=True))
    return Answers(
        files=tuple(p.name for p in paths),
        points=points,
        boxes=boxes,
        embeddings=embeddings.astype(np.float16),
        low_res=low_res.astype(np.float16),
        index=index,
        iou_predictions=iou,
    )


def compare(
    predictor: Predictor,
    answers: Answers,
    folder: Path,
    witness: str,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> AccuracyResult:
    """Measure ``predictor`` against recorded answers; the images lie in ``folder`` under their recorded names."""
    return summarize_answers(witness, answers, measure(predictor, answers, folder, progress))


def measure(
    predictor: Predictor,
    answers: Answers,
    folder: Path,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Measured:
    """What ``compare`` summarizes, mask by mask."""
    ious: list[float] = []
    areas: list[int] = []
    cosines: list[float] = []
    for i in progress(range(len(answers.files))):
        image = read_image(folder / answers.files[i])
        predictor.set_image(image)
        cosines.append(_cosine(predictor.get_image_embedding()[0], answers.embeddings[i]))
        masks, _ = _all_masks(predictor, answers.points[i], answers.boxes[i], image.shape[:2])
        chosen = masks[np.arange(len(masks)), answers.index[i]]
        for got, want in zip(chosen, answers.low_res[i], strict=True):
            pair = np.stack([got, want.astype(np.float32)])
            mine, theirs = predictor.postprocess(pair, image.shape[:2]) > MASK_THRESHOLD
            ious.append(mask_iou(mine, theirs))
            areas.append(int(np.count_nonzero(theirs)))
    shape = answers.index.shape
    return Measured(np.array(ious).reshape(shape), np.array(areas).reshape(shape), np.array(cosines))


def summarize_answers(witness: str, answers: Answers, measured: Measured) -> AccuracyResult:
    """Distributions of what was measured, over all masks and by group."""
    ious, areas = measured.ious.ravel(), measured.areas.ravel()
    sizes = np.array([size_class(float(a)) for a in areas])
    clicks = np.tile(np.arange(answers.index.shape[1]) < answers.points.shape[1], len(answers.files))
    return AccuracyResult(
        witness=witness,
        images=len(answers.files),
        mask_iou=summarize(ious),
        by_size={name: summarize(ious[sizes == name]) for name in SIZE_CLASSES if (sizes == name).any()},
        by_prompt={"point": summarize(ious[clicks]), "box": summarize(ious[~clicks])},
        embedding_cosine_mean=float(measured.cosines.mean()),
        embedding_cosine_min=float(measured.cosines.min()),
    )


def save_answers(answers: Answers, path: Path) -> None:
    """Write answers as a compressed npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        files=np.array(answers.files),
        points=answers.points,
        boxes=answers.boxes,
        embeddings=answers.embeddings,
        low_res=answers.low_res,
        index=answers.index,
        iou_predictions=answers.iou_predictions,
    )
    write_bytes(path, buffer.getvalue())


def load_answers(path: Path) -> Answers:
    """Read ``save_answers``'s file. Nothing is unpickled. Raises BundleError if it is not such a file."""
    try:
        # Opened here: numpy leaves a file open that it got by name and could not read.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            fields = {name: file[name] for name in file.files}
        return Answers(files=tuple(str(n) for n in fields.pop("files")), **fields)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} does not hold recorded answers: {error}. Build the bundle again") from error


def size_class(area: float) -> str:
    """COCO's name for an area in pixels. Raises ValueError for one that is not finite."""
    if not math.isfinite(area):
        raise ValueError(f"expected an area of finitely many pixels, got {area}")
    return next(name for name, limit in SIZE_CLASSES.items() if area < limit)


def summarize(values: npt.NDArray[np.float64]) -> Summary:
    """Distribution of a non-empty array."""
    return Summary(
        mean=float(values.mean()),
        median=float(np.median(values)),
        p5=float(np.percentile(values, 5)),
        min=float(values.min()),
        count=int(values.size),
    )


def _answer_one(
    predictor: Predictor, path: Path, prompts: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None
) -> tuple[npt.NDArray[np.generic], ...]:
    image = read_image(path)
    predictor.set_image(image)
    points, boxes = prompts or default_prompts((image.shape[0], image.shape[1]))
    masks, iou = _all_masks(predictor, points, boxes, image.shape[:2])
    # One click is ambiguous: the best of the multimask candidates. A box is not: the single mask.
    index = np.zeros(len(masks), dtype=np.int64)
    index[: len(points)] = 1 + iou[: len(points), 1:].argmax(axis=1)
    return points, boxes, predictor.get_image_embedding()[0], masks[np.arange(len(masks)), index], index, iou


def _all_masks(
    predictor: Predictor, points: npt.NDArray[np.float64], boxes: npt.NDArray[np.float64], hw: tuple[int, ...]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Low-res masks (P,M,4E,4E) and iou_predictions (P,M): one click per prompt, then one box per prompt."""
    size = (hw[0], hw[1])
    clicks = check_prompts(points[:, None], np.ones((len(points), 1)), None, size)
    by_point, by_box = predictor.decode(clicks), predictor.decode(check_prompts(None, None, boxes, size))
    return np.concatenate([by_point[0], by_box[0]]), np.concatenate([by_point[1], by_box[1]])


def _cosine(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """0 for an embedding that is not finite: one that overflowed agrees with nothing."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if not np.isfinite(x).all():
        return 0.0
    return float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-12))
