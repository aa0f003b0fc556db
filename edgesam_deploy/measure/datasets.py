"""Images with true masks, in the layouts that the field publishes them in, read one image at a time.

    coco        a JSON of instances; images at file_name, from the JSON's folder on
    lvis        the same, images at the last two parts of coco_url
    sa1b        a folder of sa_N.jpg and sa_N.json
    labels      a folder of ID.jpg and ID.seg0.png, ID.seg1.png, …: label maps of several people, as BSDS500's
    masks       a folder of ID.jpg and ID.png, 255 = object; or DAVIS's JPEGImages and Annotations
    davis       as masks; the frames of a sequence are one group: SEQUENCE_FRAME.jpg, or a folder for each sequence
    cityscapes  the folder that holds leftImg8bit and gtFine, or one split in it

A dataset is listed at once, which finds missing images before any work; masks are decoded when an image is asked for
its targets, and not kept. How each kind of file becomes masks: ``measure.truths``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.truths import (
    BinaryMask,
    CocoAnnotations,
    InstanceIds,
    LabelMaps,
    Sa1bFile,
    Target,
    Truth,
    read_json,
    targets_of,
)

PHOTOGRAPHS = (".jpg", ".jpeg")
CITYSCAPES_IMAGE, CITYSCAPES_IDS = "_leftImg8bit.png", "_gtFine_instanceIds.png"


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """What is taken of a dataset, and from where.

    images: the folder of its images where they do not lie as the layout says (coco, lvis, masks, davis). crowds: take
    annotations with iscrowd = 1, too. min_share: of the image, from which on a label of a label map is a target.
    tight_boxes: boxes tight around the masks in place of the annotations' own. skip_empty: leave out targets that have
    no pixel or no box, which are an error otherwise. limit: images, from the first on; None for all.
    """

    images: Path | None = None
    crowds: bool = False
    min_share: float = 0.005
    tight_boxes: bool = False
    skip_empty: bool = False
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class EvalImage:
    """One image and where its truth is. group: what it is resampled with: its sequence, or itself."""

    name: str
    group: str
    path: Path
    truth: Truth
    skip_empty: bool = False

    def targets(self, image_hw: tuple[int, int]) -> Iterator[Target]:
        """The true masks, decoded one by one, of an image that was found to be (H,W) pixels large.

        Raises InputError for a mask of another size, and for an empty one unless such are skipped.
        """
        return targets_of(self.truth, f"image {self.name} ({self.path})", image_hw, self.skip_empty)


@dataclass(frozen=True, slots=True)
class Dataset:
    """name: layout and the end of the path. by_group: its mIoU is the mean of the groups' means, as DAVIS's."""

    name: str
    layout: str
    by_group: bool
    images: tuple[EvalImage, ...]


# (name, group, photograph, its truth)
Listed = tuple[str, str, Path, Truth]
Lister = Callable[[Path, DatasetOptions], Iterable[Listed]]


def open_dataset(text: str, options: DatasetOptions | None = None) -> Dataset:
    """The dataset that ``LAYOUT:PATH`` means, in its own order (folders: by name).

    Raises InputError for an unknown layout, a path or image that is not there, and files that are not of the layout.
    """
    how = options or DatasetOptions()
    layout, colon, place = text.partition(":")
    if layout not in LAYOUTS or not colon or not place:
        raise InputError(f"a dataset is LAYOUT:PATH with a layout of {', '.join(LAYOUTS)}, got '{text}'")
    path = Path(place)
    if not path.exists():
        raise InputError(f"expected the dataset {text} at {path}, which does not exist")
    if path.is_file() != (layout in ("coco", "lvis")):
        kind = "a JSON file" if layout in ("coco", "lvis") else "a folder"
        raise InputError(f"expected {kind} for the layout '{layout}', {path} is none")
    if how.images is not None and layout not in ("coco", "lvis", "masks", "davis"):
        raise InputError(f"the images of the layout '{layout}' lie at fixed places: leave out --images")
    images: list[EvalImage] = []
    for name, group, photograph, truth in LAYOUTS[layout](path, how):
        if how.limit is not None and len(images) == how.limit:
            break
        if not photograph.is_file():
            cure = " or say where its images are with --images" if layout in ("coco", "lvis", "masks", "davis") else ""
            raise InputError(f"{text}: expected the image {photograph}, which is not there: add it{cure}")
        images.append(EvalImage(name, group, photograph, truth, how.skip_empty))
    if not images:
        raise InputError(f"{text} holds no image with a target: expected {EXPECTED[layout]}")
    return Dataset(":".join((layout, "/".join(path.resolve().parts[-2:]))), layout, layout == "davis", tuple(images))


def _coco(path: Path, how: DatasetOptions) -> Iterator[Listed]:
    return _annotated(path, how, lambda info: Path(info["file_name"]))


def _lvis(path: Path, how: DatasetOptions) -> Iterator[Listed]:
    return _annotated(path, how, lambda info: Path(*Path(info["coco_url"]).parts[-2:]))


def _annotated(path: Path, how: DatasetOptions, place: Callable[[Mapping[str, Any]], Path]) -> Iterator[Listed]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise InputError(f"{path} is not of the layout: expected the lists 'images' and 'annotations' in it")
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    try:
        for annotation in content["annotations"]:
            if how.crowds or not annotation.get("iscrowd"):
                by_image[annotation["image_id"]].append(annotation)
        for info in content["images"]:
            found = by_image.pop(info["id"], [])
            if found:
                truth = CocoAnnotations(tuple(found), (info["height"], info["width"]), path, how.tight_boxes)
                yield info.get("file_name", str(place(info))), str(info["id"]), _beside(path, how) / place(info), truth
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not of the layout: an entry lacks or garbles {error}; download it again"
        ) from error
    if by_image:
        raise InputError(f"{path} has annotations of image {next(iter(by_image))}, which its 'images' do not list")


def _beside(path: Path, how: DatasetOptions) -> Path:
    return how.images if how.images is not None else path.parent


def _sa1b(path: Path, how: DatasetOptions) -> Iterator[Listed]:
    for file in sorted(path.glob("sa_*.json"), key=lambda p: (len(p.name), p.name)):
        yield file.stem, file.stem, file.with_suffix(".jpg"), Sa1bFile(file, how.crowds, how.tight_boxes)


def _labels(path: Path, how: DatasetOptions) -> Iterator[Listed]:
    for photograph in _photographs(path):
        maps = sorted(path.glob(f"{photograph.stem}.seg*.png"))
        if not maps:
            raise InputError(f"{photograph} has no label map: expected {photograph.stem}.seg0.png beside it")
        yield photograph.stem, photograph.stem, photograph, LabelMaps(tuple(maps), how.min_share)


def _masks(path: Path, how: DatasetOptions) -> Iterator[Listed]:
    if (path / "JPEGImages").is_dir():
        yield from _davis_tree(path, how)
        return
    if how.images is not None:
        listed = [(_photograph(how.images, mask.stem), mask) for mask in sorted(path.glob("*.png"))]
    else:
        listed = [(photograph, photograph.with_suffix(".png")) for photograph in _photographs(path)]
    for photograph, mask in listed:
        if not mask.is_file():
            raise InputError(f"{photograph} has no mask: expected {mask.name} beside it")
        yield mask.stem, mask.stem, photograph, BinaryMask(mask)


def _davis(path: Path, how: DatasetOptions) -> Iterator[Listed]:
    for name, _, photograph, truth in _masks(path, how):
        sequence, mark, _ = name.rpartition("/" if "/" in name else "_")
        if not mark:
            raise InputError(f"the layout 'davis' has SEQUENCE_FRAME.jpg or SEQUENCE/FRAME.jpg, got {photograph}")
        yield name, sequence, photograph, truth


def _davis_tree(path: Path, how: DatasetOptions) -> Iterator[Listed]:
    if how.images is not None:
        raise InputError(f"{path} has its images in JPEGImages: leave out --images")
    folders = [p for p in sorted((path / "Annotations").glob("480p")) or [path / "Annotations"] if p.is_dir()]
    for folder in folders:
        photographs = path / "JPEGImages" / folder.relative_to(path / "Annotations")
        for mask in sorted(folder.glob("*/*.png")):
            name = f"{mask.parent.name}/{mask.stem}"
            yield name, name, _photograph(photographs / mask.parent.name, mask.stem), BinaryMask(mask)


def _cityscapes(path: Path, how: DatasetOptions) -> Iterator[Listed]:
    splits = (
        [path] if path.parent.name == "leftImg8bit" else sorted(p for p in path.glob("leftImg8bit/*") if p.is_dir())
    )
    if len(splits) > 1:
        raise InputError(f"{path} has the splits {', '.join(p.name for p in splits)}: give one, as {splits[-1]}")
    for split in splits:
        for photograph in sorted(split.glob(f"*/*{CITYSCAPES_IMAGE}")):
            name = photograph.name.removesuffix(CITYSCAPES_IMAGE)
            ids = split.parent.parent / "gtFine" / split.name / photograph.parent.name / f"{name}{CITYSCAPES_IDS}"
            if not ids.is_file():
                raise InputError(f"{photograph} has no instance ids: expected {ids}")
            yield name, name, photograph, InstanceIds(ids)


def _photographs(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTOGRAPHS)


def _photograph(folder: Path, stem: str) -> Path:
    """The photograph of that name, or where it would be."""
    found = (folder / f"{stem}{suffix}" for suffix in (*PHOTOGRAPHS, ".JPEG", ".JPG"))
    return next((p for p in found if p.is_file()), folder / f"{stem}.jpg")


LAYOUTS: dict[str, Lister] = {
    "coco": _coco,
    "lvis": _lvis,
    "sa1b": _sa1b,
    "labels": _labels,
    "masks": _masks,
    "davis": _davis,
    "cityscapes": _cityscapes,
}
EXPECTED = {
    "coco": "annotations that are not crowds",
    "lvis": "annotations",
    "sa1b": "sa_*.json beside sa_*.jpg",
    "labels": "ID.jpg beside ID.seg0.png",
    "masks": "ID.jpg beside ID.png, or JPEGImages and Annotations",
    "davis": "SEQUENCE_FRAME.jpg beside SEQUENCE_FRAME.png, or JPEGImages and Annotations",
    "cityscapes": f"leftImg8bit/SPLIT/CITY/*{CITYSCAPES_IMAGE}",
}
