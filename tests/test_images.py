"""Image files of every kind a user may have: the right pixels, or one line that says what is wrong."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgesam_deploy.errors import ImageError
from edgesam_deploy.images import list_images, read_image

Pixels = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 24, 40
ORIENTATION = 0x0112  # the EXIF tag


def picture(height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """(H,W,3) noise: every pixel is its own, so that no flip or swapped axis goes unseen."""
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey_rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey[:, :, None], 3, axis=2)


def rgb_png(path: Path) -> Pixels:
    Image.fromarray(picture()).save(path, "PNG")
    return picture()


def bmp(path: Path) -> Pixels:
    Image.fromarray(picture()).save(path, "BMP")
    return picture()


def one_pixel(path: Path) -> Pixels:
    Image.fromarray(picture(1, 1)).save(path, "PNG")
    return picture(1, 1)


def one_row(path: Path) -> Pixels:
    Image.fromarray(picture(1, 900)).save(path, "PNG")
    return picture(1, 900)


def one_column(path: Path) -> Pixels:
    Image.fromarray(picture(900, 1)).save(path, "PNG")
    return picture(900, 1)


def grey(path: Path) -> Pixels:
    values = picture()[..., 0]
    Image.fromarray(values).save(path, "PNG")
    return grey_rgb(values)


def grey_alpha(path: Path) -> Pixels:
    values = picture()
    Image.merge("LA", [Image.fromarray(values[..., i]) for i in (0, 1)]).save(path, "PNG")
    return grey_rgb(values[..., 0])


def rgba(path: Path) -> Pixels:
    """Colour under full transparency is kept: alpha is dropped, not blended with some background."""
    alpha = np.zeros((HEIGHT, WIDTH, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([picture(), alpha], axis=2)).save(path, "PNG")
    return picture()


def _palette() -> tuple[Image.Image, Pixels]:
    colours = picture(1, 256)[0]
    indices = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colours.tobytes())
    return image, colours[np.asarray(image)]


def palette(path: Path) -> Pixels:
    image, expected = _palette()
    image.save(path, "PNG")
    return expected


def palette_with_transparency(path: Path) -> Pixels:
    """Pillow warns about these; a warning must not reach the user (here warnings are errors)."""
    image, expected = _palette()
    image.save(path, "PNG", transparency=bytes(range(256)))
    return expected


def black_and_white(path: Path) -> Pixels:
    values = (picture()[..., 0] > 127).astype(np.uint8) * 255
    Image.fromarray(values).convert("1").save(path, "PNG")
    return grey_rgb(values)


def cmyk(path: Path) -> Pixels:
    ink = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    ink[:, WIDTH // 2 :] = (0, 255, 255, 0)
    Image.frombytes("CMYK", (WIDTH, HEIGHT), ink.tobytes()).save(path, "TIFF")
    expected = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    expected[:, WIDTH // 2 :] = (255, 0, 0)
    return expected


def grey_16_bit(path: Path) -> Pixels:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    Image.fromarray(values).save(path, "PNG")
    return grey_rgb((values // 256).astype(np.uint8))


def animated_gif(path: Path) -> Pixels:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    expected = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    expected[..., 0] = 255
    return expected


def damaged_exif(path: Path) -> Pixels:
    """Cameras and editors leave such files; the pixels are whole."""
    Image.fromarray(picture()).save(path, "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x12")
    return picture()


GOOD = (
    rgb_png,
    bmp,
    one_pixel,
    one_row,
    one_column,
    grey,
    grey_alpha,
    rgba,
    palette,
    palette_with_transparency,
    black_and_white,
    cmyk,
    grey_16_bit,
    animated_gif,
    damaged_exif,
)


@pytest.mark.parametrize("make", GOOD, ids=lambda f: f.__name__)
def test_an_image_reads_as_rgb(tmp_path: Path, make: Callable[[Path], Pixels]) -> None:
    """Whatever its suffix says: all are named .jpg here."""
    path = tmp_path / "photo.jpg"
    expected = make(path)
    read = read_image(path)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    np.testing.assert_array_equal(read, expected)


def test_a_jpeg_reads_as_pillow_decodes_it(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(picture()).save(path)
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_image(path), np.asarray(image))


# EXIF orientation -> how a camera stores the upright picture under that tag.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(picture())
    stored = upright if (turn := STORED[orientation]) is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "portrait.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "portrait.png"), picture())


def test_a_portrait_jpeg_is_higher_than_wide(tmp_path: Path) -> None:
    """What a phone writes: landscape pixels and orientation 6."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (64, 48), "red").save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(tmp_path / "phone.jpg").shape == (64, 48, 3)


def truncated_jpeg(path: Path) -> None:
    Image.fromarray(picture(200, 300)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_header(path: Path) -> None:
    Image.fromarray(picture()).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:20])


def flipped_bytes(path: Path) -> None:
    """The first image data chunk of a PNG no longer matches its checksum, nor can it be inflated."""
    Image.fromarray(picture()).save(path, "PNG")
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT") + 4
    data[start : start + 8] = bytes(255 - b for b in data[start : start + 8])
    path.write_bytes(data)


def text_file(path: Path) -> None:
    path.write_text("this is no photograph\n" * 20)


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def missing(_: Path) -> None:
    pass


def a_folder(path: Path) -> None:
    path.mkdir()


def decompression_bomb(path: Path) -> None:
    """A few bytes that claim 400 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def integers_32_bit(path: Path) -> None:
    values = np.full((HEIGHT, WIDTH), 70_000, dtype=np.int32)
    Image.fromarray(values).save(path, "TIFF")


def floating_point(path: Path) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, dtype=np.float32)).save(path, "TIFF")


BAD = {
    truncated_jpeg: "truncated",
    truncated_header: "Truncated File Read",
    flipped_bytes: "image",
    text_file: "is not a readable image",
    empty_file: "is not a readable image",
    missing: "No such file",
    a_folder: "Is a directory",
    decompression_bomb: "decompression bomb",
    integers_32_bit: "expected 8- or 16-bit pixels, got 32-bit integers; convert it",
    floating_point: "expected 8- or 16-bit pixels, got floating point; convert it",
}


@pytest.mark.parametrize(("make", "says"), BAD.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_what_is_no_image_is_one_line_that_names_it(
    tmp_path: Path, make: Callable[[Path], None], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "photo.jpg"
    make(path)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert says in message
    assert len(message.splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_a_large_image_is_read_and_a_huge_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its limit and refuses above twice that: its warning is not an error of ours."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(picture(30, 40)).save(tmp_path / "large.png")
    Image.fromarray(picture(50, 41)).save(tmp_path / "huge.png")
    np.testing.assert_array_equal(read_image(tmp_path / "large.png"), picture(30, 40))
    with pytest.raises(ImageError, match="exceeds limit of 2000 pixels"):
        read_image(tmp_path / "huge.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_random_damage_is_an_image_error_or_pixels(tmp_path: Path, kind: str) -> None:
    """Files with flipped bytes and files cut short never raise anything else."""
    rng = np.random.default_rng(0)
    path = tmp_path / "photo"
    Image.fromarray(picture()).save(path, kind)
    whole = path.read_bytes()
    refused: list[str] = []
    for _ in range(40):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 3):
            damaged[position] = rng.integers(256)
        for data in (bytes(damaged), whole[: rng.integers(len(whole))]):
            path.write_bytes(data)
            try:
                read = read_image(path)
            except ImageError as error:
                refused.append(str(error))
            else:
                assert read.dtype == np.uint8
                assert read.shape[2:] == (3,)
    assert len(refused) >= 20, "most files that were cut short cannot be read"
    assert [m for m in refused if len(m.splitlines()) != 1] == []


def test_images_are_listed_by_name_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.webp", "d.tiff", "notes.txt", "a.png.json", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == ["a.png", "b.JPG", "c.webp", "d.tiff"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Path.mkdir, "holds no images; expected files ending in .bmp, .jpeg"),
        (missing, "is not a folder of images"),
        (text_file, "is not a folder of images"),
    ],
    ids=["empty-folder", "missing", "a-file"],
)
def test_a_folder_without_images_is_one_line(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    folder = tmp_path / "photos"
    make(folder)
    with pytest.raises(ImageError, match=says) as caught:
        list_images(folder)
    assert str(folder) in str(caught.value)
