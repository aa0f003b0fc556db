"""From mask records to what is reported: mIoU by size and source, its interval, boundary F, calibration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesam_deploy.measure.accuracy import SIZE_CLASSES
from edgesam_deploy.measure.evaluate import TRUTH, MaskRecord

Floats = npt.NDArray[np.float64]
ABOVE = (0.5, 0.75, 0.9)
BINS = 10
RESAMPLES, SEED = 2000, 0


@dataclass(frozen=True, slots=True)
class Share:
    """mIoU of ``count`` masks."""

    miou: float
    count: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Masks whose predicted IoU lies in low..high; the means are None where there is none."""

    low: float
    high: float
    count: int
    predicted: float | None
    measured: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far the model's own estimate is right. error: expected calibration error over the bins, 0..1."""

    predicted: float
    measured: float
    error: float
    count: int
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class Quality:
    """One (dataset, prompt, answer). miou: the mean over masks; of a dataset by group, the mean of the groups' means.

    interval: 95 % of the mIoU by resampling the groups. above: share of masks with at least that IoU. calibration: None
    where no IoU was predicted.
    """

    dataset: str
    against: str
    prompt: str
    answer: str
    count: int
    groups: int
    miou: float
    interval: tuple[float, float]
    by_size: Mapping[str, Share]
    by_source: Mapping[str, Share]
    above: Mapping[str, float]
    boundary_f: float
    calibration: Calibration | None


def summarize(records: Iterable[MaskRecord], by_group: Callable[[str], bool]) -> list[Quality]:
    """A Quality for every (dataset, against, prompt, answer), in the order in which they occur, truth first.

    by_group: whether a dataset, by its name, counts groups alike rather than masks.
    """
    sorted_out: dict[tuple[str, str, str, str], list[MaskRecord]] = defaultdict(list)
    for record in records:
        sorted_out[record.dataset, record.against, record.prompt, record.answer].append(record)
    ordered = sorted(sorted_out, key=lambda key: key[1] != TRUTH)
    return [_quality(key, sorted_out[key], by_group(key[0])) for key in ordered]


def _quality(key: tuple[str, str, str, str], records: Sequence[MaskRecord], by_group: bool) -> Quality:
    ious = np.array([r.iou for r in records])
    groups = np.unique([r.group for r in records], return_inverse=True)[1].ravel()
    sizes, sources = (np.array([getattr(r, name) or "" for r in records]) for name in ("size", "source"))

    def share(chosen: npt.NDArray[np.bool_]) -> Share:
        return Share(mean(ious[chosen], groups[chosen], by_group), int(np.count_nonzero(chosen)))

    said = [r for r in records if r.predicted_iou is not None]
    return Quality(
        *key,
        count=len(records),
        groups=int(groups.max()) + 1,
        miou=mean(ious, groups, by_group),
        interval=bootstrap(ious, groups, by_group),
        by_size={name: share(sizes == name) for name in SIZE_CLASSES if (sizes == name).any()},
        by_source={str(name): share(sources == name) for name in np.unique(sources) if name},
        above={f"{limit:g}": float((ious >= limit).mean()) for limit in ABOVE},
        boundary_f=mean(np.array([r.boundary_f for r in records]), groups, by_group),
        calibration=calibrate(np.array([r.predicted_iou for r in said]), np.array([r.iou for r in said])),
    )


def mean(values: Floats, groups: npt.NDArray[np.intp], by_group: bool) -> float:
    """Of all values, or of the means of the groups that occur."""
    if not by_group:
        return float(values.mean())
    counts = np.bincount(groups)
    return float((np.bincount(groups, values)[counts > 0] / counts[counts > 0]).mean())


def bootstrap(values: Floats, groups: npt.NDArray[np.intp], by_group: bool) -> tuple[float, float]:
    """95 % interval of the mean when groups are drawn again, with replacement."""
    masks = np.bincount(groups)
    sums: Floats = np.bincount(groups, values).astype(np.float64)
    counts = np.ones(len(masks)) if by_group else masks.astype(np.float64)
    if by_group:
        sums = sums / masks
    rng = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(len(counts), size=len(counts))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def calibrate(predicted: Floats, measured: Floats) -> Calibration | None:
    """Ten bins of equal width in 0..1; an estimate outside belongs to the outermost bin, with its own value."""
    if not len(predicted):
        return None
    index = np.clip((predicted * BINS).astype(np.int64), 0, BINS - 1)
    bins, error = [], 0.0
    for i in range(BINS):
        chosen = index == i
        count = int(np.count_nonzero(chosen))
        means = (float(predicted[chosen].mean()), float(measured[chosen].mean())) if count else (None, None)
        bins.append(Bin(i / BINS, (i + 1) / BINS, count, *means))
        if means[0] is not None and means[1] is not None:
            error += count / len(predicted) * abs(means[0] - means[1])
    return Calibration(float(predicted.mean()), float(measured.mean()), error, len(predicted), tuple(bins))
