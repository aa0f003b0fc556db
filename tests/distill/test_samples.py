"""Which images an update sees: every one once an epoch, the same for any number of processes, and after a stop."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.distill.options import DistillOptions
from edgesam_deploy.distill.samples import Steps, change_colours, split, updates, view
from edgesam_deploy.errors import InputError

Key = tuple[int, int, int]
OPTIONS = DistillOptions(batch=3, accumulate=2, seed=5)
IMAGES = np.arange(100, 120)


def keys(options: DistillOptions, start: int, stop: int, rank: int = 0, world: int = 1) -> list[list[Key]]:
    return list(Steps(IMAGES, options, start, stop, rank, world))


def test_an_epoch_is_every_image_once_in_another_order() -> None:
    seen = [k for micro in keys(OPTIONS, 0, 20) for k in micro]
    assert len(seen) == 20 * 6
    epochs = [[image for e, image, _ in seen if e == epoch] for epoch in range(6)]
    assert all(sorted(epoch) == IMAGES.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert keys(DistillOptions(batch=3, accumulate=2, seed=6), 0, 20) != keys(OPTIONS, 0, 20)


def test_a_stopped_run_sees_what_it_would_have_seen() -> None:
    assert keys(OPTIONS, 0, 7) + keys(OPTIONS, 7, 20) == keys(OPTIONS, 0, 20)
    assert len(Steps(IMAGES, OPTIONS, 7, 20, 0, 1)) == len(keys(OPTIONS, 7, 20))


def test_two_processes_share_what_one_sees() -> None:
    one = keys(DistillOptions(batch=6, seed=5), 0, 9)
    two = [keys(DistillOptions(batch=3, seed=5), 0, 9, rank, 2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_held_out_images_are_spread_and_apart() -> None:
    images, held = split(100, 10)
    assert len(held) == 10
    assert sorted([*images, *held]) == list(range(100))
    assert (held[0], held[-1]) == (0, 99)
    assert [len(part) for part in split(3, 32)] == [2, 1]


def test_updates_are_counted_over_all_processes() -> None:
    assert updates(600, DistillOptions(epochs=2, batch=5, accumulate=3), 4) == 20
    assert updates(1, DistillOptions(epochs=0.1), 1) == 1


def test_views_are_windows_and_colours_keep_the_shape() -> None:
    image = np.arange(40 * 60 * 3, dtype=np.int64).reshape(40, 60, 3) % 251
    photo = image.astype(np.uint8)
    rng = np.random.default_rng(0)
    rows = {tuple(pixel) for line in photo for pixel in line}
    for _ in range(20):
        cut = view(rng, photo)
        assert cut.shape[0] <= 40
        assert cut.shape[1] <= 60
        assert {tuple(pixel) for line in cut for pixel in line} <= rows
        changed = change_colours(rng, cut)
        assert changed.shape == cut.shape
        assert changed.dtype == np.uint8


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"loss": "l3"}, "loss must be one of huber, l1, mse, cosine"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": float("nan")}, "lr must be a finite number above 0"),
        ({"ema": 1.5}, r"ema must be in 0\.\.1"),
        ({"held": -1}, "held must be 0 or more"),
    ],
)
def test_wrong_options(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        DistillOptions(**wrong)  # type: ignore[arg-type]
