"""The [checkpoint] table of a recipe: what it may say, and what it may not leave unsaid."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.recipe import available_recipes, load_recipe
from edgesam_deploy.weights import Checkpoint, PublishedFile, parse_checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHA256 = "0123456789abcdef" * 4
URL = "https://example.org/model.pt"
HASHED = f'sha256 = "{SHA256}"\nsha256_source = "its publisher"\n'
ONE = f'url = "{URL}"\nlicence = "Apache-2.0"\n'
PARTS = f"""
licence = "Apache-2.0"
licence_url = "https://example.org/LICENSE"
[[parts]]
url = "https://example.org/encoder.pt"
{HASHED}
size_bytes = 12
prefix = "image_encoder."
takes = ["image_encoder."]
[[parts]]
url = "https://example.org/decoder.pt"
licence = "S-Lab-1.0"
licence_url = "https://example.org/S-Lab"
commercial = false
takes = ["prompt_encoder.", "mask_decoder."]
key = "model_ema"
"""


def parse(text: str) -> Checkpoint:
    return parse_checkpoint(tomllib.loads(text))


def test_one_file_is_what_is_downloaded() -> None:
    checkpoint = parse(ONE + HASHED + 'size_bytes = 7\nkey = "ema"\ncommercial = false\nlicence_url = "https://l"\n')
    assert checkpoint.files == (
        PublishedFile(URL, SHA256, "its publisher", 7, "Apache-2.0", "https://l", False, key="ema"),
    )


def test_parts_have_the_licence_of_the_whole_unless_they_say_otherwise() -> None:
    encoder, decoder = parse(PARTS).files
    assert (encoder.licence, encoder.licence_url, encoder.commercial) == (
        "Apache-2.0",
        "https://example.org/LICENSE",
        True,
    )
    assert (encoder.sha256, encoder.size_bytes, encoder.prefix) == (SHA256, 12, "image_encoder.")
    assert (decoder.licence, decoder.licence_url, decoder.commercial) == (
        "S-Lab-1.0",
        "https://example.org/S-Lab",
        False,
    )
    assert (decoder.sha256, decoder.key) == (None, "model_ema")
    assert decoder.takes == ("prompt_encoder.", "mask_decoder.")


@pytest.mark.parametrize("text", ["", 'licence = "Apache-2.0"'], ids=["empty", "licence-of-what-it-will-be"])
def test_a_model_yet_to_be_trained_has_nothing_to_download(text: str) -> None:
    assert parse(text).files == ()


def test_packaged_weights_are_not_downloaded() -> None:
    assert parse(f'file = "assets/reference.pt"\nlicence = "Apache-2.0"\n{HASHED}').files == ()


WRONG = {
    "file-and-url": (ONE + HASHED + 'file = "a.pt"', "exactly one of 'file' (packaged) and 'url' (downloaded)"),
    "url-and-parts": (f'url = "{URL}"\n' + PARTS, "exactly one of"),
    "hash-of-nothing": (HASHED, "exactly one of"),
    "hash-of-several": (HASHED + PARTS, "'parts' with their own sha256"),
    "hash-without-source": (ONE + f'sha256 = "{SHA256}"', "sha256_source is missing"),
    "hash-short": (ONE + 'sha256 = "abc"\nsha256_source = "x"', "64 lower-case hex digits, got 'abc'"),
    "hash-upper-case": (ONE + HASHED.replace(SHA256, SHA256.upper()), "64 lower-case hex digits"),
    "hash-number": (ONE + "sha256 = 7", "64 lower-case hex digits, got 7"),
    "packaged-without-hash": ('file = "a.pt"\nlicence = "x"', "sha256 is missing: a packaged file needs it"),
    "no-licence": (f'url = "{URL}"', "checkpoint.licence is missing"),
    "size-text": (ONE + 'size_bytes = "7"', "size_bytes must be a positive integer, got '7'"),
    "size-true": (ONE + "size_bytes = true", "size_bytes must be a positive integer, got True"),
    "size-zero": (ONE + "size_bytes = 0", "size_bytes must be a positive integer, got 0"),
    "commercial-text": (ONE + 'commercial = "no"', "commercial must be true or false, got 'no'"),
    "commercial-number": (ONE + "commercial = 0", "commercial must be true or false, got 0"),
    "hidden-licence": (ONE + "commercial = false", "licence_url is missing"),
    "key-number": (ONE + "key = 7", "checkpoint.key must be a text, got 7"),
    "url-of-a-disk": (ONE.replace("https", "file"), "must begin with https:// or http://, got 'file://"),
    "url-number": ("url = 7\nlicence = 'x'", "checkpoint.url must be a text, got 7"),
    "unknown-entry": (ONE + "md5 = 'x'", "unknown entries ['md5'] for checkpoint, expected"),
    "unknown-entry-of-a-part": (PARTS + "\nmd5 = 'x'", "unknown entries ['md5'] for checkpoint.parts, expected"),
    "part-without-url": (PARTS + "\n[[parts]]\ntakes = ['a.']", "checkpoint.parts: the entry 'url' is missing"),
    "part-that-takes-nothing": (PARTS.replace('takes = ["image_encoder."]', ""), "with what it 'takes'"),
    "takes-text": (PARTS.replace('["image_encoder."]', '"image_encoder."'), "takes must be a list of name prefixes"),
    "takes-numbers": (PARTS.replace('["image_encoder."]', "[7]"), "takes must be a list of name prefixes, got (7,)"),
    "takes-anything": (PARTS.replace('["image_encoder."]', '[""]'), "takes must be a list of name prefixes"),
    "prefix-number": (PARTS.replace('prefix = "image_encoder."', "prefix = 7"), "prefix must be a text, got 7"),
    "one-part": (PARTS.partition("[[parts]]\nurl = \"https://example.org/decoder")[0], "must be several files"),
    "parts-table": ("licence = 'x'\n[parts]\nurl = 'x'", "checkpoint.parts must be a list of tables"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_table_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipes_say_who_states_a_hash_and_what_may_be_done_with_the_weights(name: str) -> None:
    checkpoint: Any = load_recipe(name).checkpoint
    for published in (checkpoint, *checkpoint.files):
        assert (published.sha256 is None) == (published.sha256_source is None)
    for published in checkpoint.files:
        assert published.url.startswith("https://")
        assert published.licence
        # The S-Lab licence is for non-commercial use; the Apache and BSD licences are for any.
        assert published.commercial != ("S-Lab" in published.licence)
