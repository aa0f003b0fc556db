"""Every layout on a tiny made-up dataset: which targets it has, and what is said of one that is broken."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools", reason="needs the eval extra")

from edgesam_deploy.errors import InputError
from edgesam_deploy.masks import tight_box
from edgesam_deploy.measure.datasets import LAYOUTS, DatasetOptions, open_dataset
from edgesam_deploy.measure.truths import Target

from .. import made_up_datasets as made
from ..made_up_datasets import HW, SCENES, disc, rectangle


def targets(text: str, options: DatasetOptions | None = None) -> dict[str, list[Target]]:
    return {image.name: list(image.targets(HW)) for image in open_dataset(text, options).images}


def same(found: list[Target], masks: tuple[np.ndarray, ...]) -> bool:
    return len(found) == len(masks) and all(
        np.array_equal(t.mask, m) and t.mask.dtype == np.bool_ for t, m in zip(found, masks, strict=True)
    )


def test_coco(tmp_path: Path) -> None:
    found = targets(f"coco:{made.coco(tmp_path)}")
    assert list(found) == ["images/1.jpg", "images/2.jpg"], "an image without annotations is not asked about"
    first, second = found.values()
    assert [t.id for t in first] == ["11", "12"]
    assert same(first, SCENES[0])
    assert [t.source for t in first] == ["polygons", "panoptic"]
    assert same(second, (rectangle(20, 10, 60, 50),)), "a polygon's pixels, and no crowd"
    assert second[0].source is None
    assert first[0].area == SCENES[0][0].sum() + 0.5, "the annotation's own area"
    assert first[0].box_xyxy.tolist() == [9.5, 8.0, 50.5, 40.0], "the annotation's own box"


def test_coco_options(tmp_path: Path) -> None:
    text = f"coco:{made.coco(tmp_path / 'a')}"
    crowds = targets(text, DatasetOptions(crowds=True))
    assert [t.id for t in crowds["images/2.jpg"]] == ["21", "22"]
    tight = targets(text, DatasetOptions(tight_boxes=True))["images/1.jpg"][0]
    assert tight.box_xyxy.tolist() == tight_box(SCENES[0][0]).tolist() == [10, 8, 50, 40]
    assert tight.area == SCENES[0][0].sum() + 0.5
    assert list(targets(text, DatasetOptions(limit=1))) == ["images/1.jpg"]
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "a" / "images").rename(elsewhere)
    (elsewhere / "images").symlink_to(elsewhere)
    assert list(targets(text, DatasetOptions(images=elsewhere))) == ["images/1.jpg", "images/2.jpg"]


def test_a_box_over_the_edge_is_cut_at_it(tmp_path: Path) -> None:
    file = made.coco(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [-0.4, 8.0, 90.8, 32.0]
    file.write_text(json.dumps(content))
    assert targets(f"coco:{file}")["images/1.jpg"][0].box_xyxy.tolist() == [0.0, 8.0, 90.0, 40.0]


def test_lvis(tmp_path: Path) -> None:
    dataset = open_dataset(f"lvis:{made.lvis(tmp_path)}")
    assert [image.path.name for image in dataset.images] == ["000000000001.jpg", "000000000002.jpg"]
    assert same(list(dataset.images[0].targets(HW)), SCENES[0])


def test_sa1b(tmp_path: Path) -> None:
    found = targets(f"sa1b:{made.sa1b(tmp_path)}")
    assert list(found) == ["sa_9", "sa_10"], "in the order of their numbers"
    assert same(found["sa_10"], SCENES[0])
    assert [t.id for t in found["sa_10"]] == ["1000", "1001"]


def test_labels(tmp_path: Path) -> None:
    found = targets(f"labels:{made.labels(tmp_path)}")["7"]
    assert [t.id for t in found] == ["seg0:1", "seg0:2", "seg0:3", "seg1:1", "seg1:9"]
    assert np.array_equal(found[2].mask, SCENES[0][1])
    assert found[2].area == SCENES[0][1].sum()
    speck = targets(f"labels:{tmp_path}", DatasetOptions(min_share=9 / (HW[0] * HW[1])))["7"]
    assert [t.id for t in speck][-1] == "seg1:200"


def test_masks(tmp_path: Path) -> None:
    found = targets(f"masks:{made.masks(tmp_path)}")
    assert list(found) == ["a", "b"]
    assert same(found["a"], SCENES[0][:1])
    assert found["a"][0].box_xyxy.tolist() == [10, 8, 50, 40]


def test_masks_with_images_elsewhere_are_those_of_the_masks(tmp_path: Path) -> None:
    made.masks(tmp_path / "images")
    (tmp_path / "truth").mkdir()
    (tmp_path / "images" / "a.png").rename(tmp_path / "truth" / "a.png")
    (image,) = open_dataset(f"masks:{tmp_path / 'truth'}", DatasetOptions(images=tmp_path / "images")).images
    assert image.path == tmp_path / "images" / "a.jpg"


@pytest.mark.parametrize("mode", ["1", "P"])
def test_a_mask_may_be_stored_in_one_bit_or_with_a_palette(tmp_path: Path, mode: str) -> None:
    made.masks(tmp_path)
    Image.open(tmp_path / "a.png").convert(mode).save(tmp_path / "a.png")
    assert same(targets(f"masks:{tmp_path}")["a"], SCENES[0][:1])


def test_davis_groups_frames_by_sequence(tmp_path: Path) -> None:
    flat = open_dataset(f"davis:{made.davis(tmp_path / 'flat')}")
    assert [image.group for image in flat.images] == ["cow_walk", "cow_walk", "dog"]
    assert flat.by_group
    tree = open_dataset(f"davis:{made.davis_tree(tmp_path / 'tree')}")
    assert [(image.name, image.group) for image in tree.images] == [
        ("cow/00000", "cow"),
        ("cow/00001", "cow"),
        ("dog/00000", "dog"),
    ]
    assert same(list(tree.images[0].targets(HW)), SCENES[1])
    alone = open_dataset(f"masks:{tmp_path / 'tree'}")
    assert [image.group for image in alone.images] == ["cow/00000", "cow/00001", "dog/00000"]
    assert not alone.by_group


def test_cityscapes(tmp_path: Path) -> None:
    made.cityscapes(tmp_path)
    for place in (tmp_path, tmp_path / "leftImg8bit" / "val"):
        (found,) = targets(f"cityscapes:{place}").values()
        assert [t.id for t in found] == ["24000", "26001"]
        assert same(found, SCENES[0][::-1])
    made.cityscapes(tmp_path, "train")
    with pytest.raises(InputError, match=r"has the splits train, val: give one, as .*leftImg8bit/val"):
        open_dataset(f"cityscapes:{tmp_path}")


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_an_image_can_be_sent_to_another_process(tmp_path: Path, layout: str) -> None:
    images = open_dataset(f"{layout}:{getattr(made, layout)(tmp_path)}").images
    sent = pickle.loads(pickle.dumps(images))
    assert sent == images
    found, kept = list(sent[0].targets(HW)), list(images[0].targets(HW))
    assert [t.id for t in found] == [t.id for t in kept]


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut_rle(annotation: dict) -> None:
    """Within the last number, so that the others are whole."""
    annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"][:-3]


# layout -> a change to the dataset in a folder, what the one line must say
BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing image": (
        "coco",
        lambda f: (f / "images/2.jpg").unlink(),
        r"expected the image .*images/2.jpg, .*--images",
    ),
    "truncated json": (
        "coco",
        lambda f: cut(f / "instances.json"),
        r"expected annotations in JSON, .*instances.json is",
    ),
    "no lists": ("coco", lambda f: (f / "instances.json").write_text("[]"), "expected the lists 'images' and 'annot"),
    "no box": (
        "coco",
        lambda f: edit(f / "instances.json", lambda c: c["annotations"][0].pop("bbox")),
        r"annotation 11 is not COCO's: .*KeyError: 'bbox'",
    ),
    "no height": (
        "coco",
        lambda f: edit(f / "instances.json", lambda c: c["images"][0].pop("height")),
        "an entry lacks or garbles 'height'",
    ),
    "unlisted image": (
        "coco",
        lambda f: (
            edit(f / "instances.json", lambda c: c["images"].pop())
            or edit(f / "instances.json", lambda c: c["annotations"][0].update(image_id=5))
        ),
        "annotations of image 5, which its 'images' do not list",
    ),
    "empty mask": (
        "coco",
        lambda f: edit(
            f / "instances.json", lambda c: c["annotations"][0].update(segmentation=made.rle(np.zeros(HW, np.bool_)))
        ),
        r"annotation 11 of image images/1.jpg .* has no pixel: .*--skip-empty",
    ),
    "box of no width": (
        "coco",
        lambda f: edit(f / "instances.json", lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 9])),
        r"annotation 11 of image .* has a box with no area",
    ),
    "cut rle": (
        "coco",
        lambda f: edit(f / "instances.json", lambda c: cut_rle(c["annotations"][0])),
        r"annotation 11 is not COCO's: .*ValueError: RLE with runs of \d+ pixels for 5400 of its size 90x60; "
        r"correct it in .*instances.json, or take it out",
    ),
    "runs of few pixels": (
        "sa1b",
        lambda f: edit(
            f / "sa_9.json", lambda c: c["annotations"][1].update(segmentation={"size": [*HW], "counts": [0, 3]})
        ),
        r"annotation 901 is not COCO's: .*RLE with runs of 3 pixels for 5400 .*sa_9.json",
    ),
    "a point for a polygon": (
        "coco",
        lambda f: edit(f / "instances.json", lambda c: c["annotations"][0].update(segmentation=[[1, 2]])),
        r"annotation 11 is not COCO's: .*no polygon of at least 3 points; correct it in .*instances.json",
    ),
    "area not finite": (
        "lvis",
        lambda f: edit(f / "lvis.json", lambda c: c["annotations"][0].update(area=float("nan"))),
        r"annotation 11 is not COCO's: .*not finite: bbox \[9.5, .*\], area nan; correct it in .*lvis.json",
    ),
    "box not finite": (
        "sa1b",
        lambda f: edit(f / "sa_9.json", lambda c: c["annotations"][0].update(bbox=[0, 0, float("inf"), 9])),
        r"annotation 900 is not COCO's: .*not finite: bbox \[0, 0, inf, 9\], area 1280.5; correct it in .*sa_9.json",
    ),
    "box past all numbers": (
        "coco",
        lambda f: edit(f / "instances.json", lambda c: c["annotations"][0].update(bbox=[0, 0, 10**400, 9])),
        r"annotation 11 is not COCO's: .*OverflowError: .*instances.json",
    ),
    "size not a number": (
        "sa1b",
        lambda f: edit(f / "sa_9.json", lambda c: c["image"].update(height=float("nan"))),
        r"sa_9.json is not SA-1B's: .*lacks or garbles cannot convert float NaN",
    ),
    "rle of another size": (
        "coco",
        lambda f: edit(
            f / "instances.json", lambda c: c["annotations"][0].update(segmentation=made.rle(disc(5, 5, 4.0, (20, 30))))
        ),
        r"annotation 11 is 30x20 pixels large and its image images/1.jpg .* 90x60",
    ),
    "mask of another size": (
        "masks",
        lambda f: made.grey(np.full((9, 9), 255, np.uint8), f / "a.png"),
        r"a.png is 9x9 pixels large and its image a .* 90x60: expected the same size",
    ),
    "missing mask": ("masks", lambda f: (f / "b.png").unlink(), r"b.jpg has no mask: expected b.png"),
    "grey mask": (
        "masks",
        lambda f: made.grey(SCENES[0][0].astype(np.uint8), f / "a.png"),
        r"a.png is not a binary mask: expected 255 = object and 0 = background, got 1 too",
    ),
    "cut mask": ("masks", lambda f: cut(f / "a.png"), r"expected a PNG of labels, .*a.png is not readable"),
    "coloured mask": (
        "masks",
        lambda f: made.grey(np.zeros((*HW, 3), np.uint8), f / "a.png"),
        r"expected one channel of labels in .*a.png, got 3",
    ),
    "no label map": ("labels", lambda f: [p.unlink() for p in f.glob("*.png")], r"7.jpg has no label map"),
    "no sa1b json": (
        "sa1b",
        lambda f: [p.unlink() for p in f.glob("*.json")],
        r"holds no image .*: expected sa_\*.json",
    ),
    "cut sa1b json": ("sa1b", lambda f: cut(f / "sa_9.json"), r"expected annotations in JSON, .*sa_9.json"),
    "no ids": (
        "cityscapes",
        lambda f: [p.unlink() for p in f.rglob("*Ids.png")],
        r"has no instance ids: expected .*gtFine",
    ),
    "no sequence": (
        "davis",
        lambda f: (f / "dog_00000.jpg").rename(f / "dog.jpg") and (f / "dog_00000.png").rename(f / "dog.png"),
        "has SEQUENCE_FRAME.jpg",
    ),
}


@pytest.mark.parametrize(("layout", "change", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_dataset_is_refused_in_one_line(
    tmp_path: Path, layout: str, change: Callable[[Path], None], said: str
) -> None:
    text = f"{layout}:{getattr(made, layout)(tmp_path)}"
    change(tmp_path)
    with pytest.raises(InputError, match=said) as raised:
        targets(text)
    assert "\n" not in str(raised.value)


def test_empty_targets_can_be_left_out(tmp_path: Path) -> None:
    file = made.coco(tmp_path)
    edit(file, lambda c: c["annotations"][0].update(segmentation=made.rle(np.zeros(HW, np.bool_))))
    assert [t.id for t in targets(f"coco:{file}", DatasetOptions(skip_empty=True))["images/1.jpg"]] == ["12"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ade20k:x", r"a dataset is LAYOUT:PATH with a layout of coco, .*, got 'ade20k:x'"),
        ("instances.json", r"a dataset is LAYOUT:PATH"),
        ("coco:", r"a dataset is LAYOUT:PATH"),
        ("coco:nowhere.json", r"at nowhere.json, which does not exist"),
    ],
)
def test_what_names_no_dataset_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_dataset(text)


def test_a_file_where_a_folder_is_expected_and_the_other_way_round(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a JSON file for the layout 'coco'"):
        open_dataset(f"coco:{tmp_path}")
    with pytest.raises(InputError, match="expected a folder for the layout 'masks'"):
        open_dataset(f"masks:{made.coco(tmp_path)}")
    with pytest.raises(InputError, match="leave out --images"):
        open_dataset(f"labels:{made.labels(tmp_path)}", DatasetOptions(images=tmp_path))
