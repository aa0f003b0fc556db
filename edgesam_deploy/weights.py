"""Where a recipe's weights come from: its ``[checkpoint]`` table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

from edgesam_deploy.errors import RecipeError


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One file at its publisher's address, and which of a network's tensors come from it.

    sha256: what the file must hash to, and sha256_source who states that; None where nobody does, and such a file needs
    the user's consent. size_bytes: for the progress bar and an early check.
    licence, licence_url, commercial (false: the licence forbids commercial use): None for what the checkpoint says.
    takes: prefixes of our tensor names; what the file holds besides is left. Empty: all of it.
    prefix: put before the file's own names. key: the entry of the file that holds the weights, such as "model_ema".
    """

    url: str
    sha256: str | None = None
    sha256_source: str | None = None
    size_bytes: int | None = None
    licence: str | None = None
    licence_url: str | None = None
    commercial: bool | None = None
    takes: tuple[str, ...] = ()
    prefix: str = ""
    key: str | None = None

    def __post_init__(self) -> None:
        _check_text("url", self.url)
        if not self.url.startswith(("https://", "http://")):
            raise RecipeError(f"checkpoint.url must begin with https:// or http://, got {self.url!r}")
        _check_facts(self)
        if not isinstance(self.takes, tuple) or not all(isinstance(start, str) and start for start in self.takes):
            raise RecipeError(f"checkpoint.parts takes must be a list of name prefixes, got {self.takes!r}")
        if not isinstance(self.prefix, str):
            raise RecipeError(f"checkpoint.parts prefix must be a text, got {self.prefix!r}")

    @property
    def name(self) -> str:
        """What the file is called there."""
        return urlparse(self.url).path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the weights come from: one of file, url and parts; none of them for a model that is yet to be trained.

    file: a path inside the package (``assets/...``). url: the publisher's address. parts: for a model published in
    several files, each with the tensors that it gives. The other entries are those of PublishedFile; sha256 guards a
    packaged file too, and parts have their own.
    """

    licence: str = ""
    file: str | None = None
    url: str | None = None
    parts: tuple[PublishedFile, ...] = ()
    sha256: str | None = None
    sha256_source: str | None = None
    size_bytes: int | None = None
    licence_url: str | None = None
    commercial: bool = True
    key: str | None = None

    def __post_init__(self) -> None:
        _check_facts(self)
        places = [name for name in ("file", "url", "parts") if getattr(self, name)]
        own = [name for name in ("sha256", "size_bytes", "key") if getattr(self, name) is not None]
        if len(places) > 1 or (own and places not in (["file"], ["url"])):
            raise RecipeError(
                "checkpoint needs exactly one of 'file' (packaged) and 'url' (downloaded), or 'parts' with their own "
                f"sha256, size_bytes and key; got {', '.join(places + own)}. A model yet to be trained has none of them"
            )
        if self.file is not None and self.sha256 is None:
            raise RecipeError("checkpoint.sha256 is missing: a packaged file needs it")
        if places and not self.licence:
            raise RecipeError("checkpoint.licence is missing")
        if len(self.parts) == 1 or not all(part.takes for part in self.parts):
            raise RecipeError("checkpoint.parts must be several files, each with what it 'takes'")
        for published in self.files:
            if not published.commercial and not published.licence_url:
                raise RecipeError("checkpoint.licence_url is missing: a licence that must be accepted has to be shown")

    @property
    def files(self) -> tuple[PublishedFile, ...]:
        """What is downloaded, in order, each with its licence: empty for packaged weights and for none."""
        parts = self.parts
        if self.url is not None:
            parts = (PublishedFile(self.url, self.sha256, self.sha256_source, self.size_bytes, key=self.key),)
        return tuple(
            dataclasses.replace(
                part,
                licence=part.licence or self.licence,
                licence_url=part.licence_url or self.licence_url,
                commercial=self.commercial if part.commercial is None else part.commercial,
            )
            for part in parts
        )


def parse_checkpoint(raw: Mapping[str, Any]) -> Checkpoint:
    """From a recipe's TOML table; an empty one has no weights. Raises RecipeError for unknown and wrong entries."""
    parts = raw.get("parts", [])
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise RecipeError(f"checkpoint.parts must be a list of tables, got {parts!r}")
    return Checkpoint(**_entries(Checkpoint, "checkpoint", {**raw, "parts": tuple(map(_part, parts))}))


def _part(raw: Mapping[str, Any]) -> PublishedFile:
    if "url" not in raw:
        raise RecipeError("checkpoint.parts: the entry 'url' is missing")
    return PublishedFile(**_entries(PublishedFile, "checkpoint.parts", raw))


def _entries(cls: type[Any], what: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    known = sorted(f.name for f in dataclasses.fields(cls))
    if unknown := sorted(set(raw) - set(known)):
        raise RecipeError(f"unknown entries {unknown} for {what}, expected {known}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}


def _check_facts(given: PublishedFile | Checkpoint) -> None:
    """What a checkpoint and each of its parts may state alike."""
    sha256, size_bytes = given.sha256, given.size_bytes
    if sha256 is not None:
        if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise RecipeError(f"checkpoint.sha256 must be 64 lower-case hex digits, got {sha256!r}")
        if not given.sha256_source:
            raise RecipeError("checkpoint.sha256_source is missing: say who states this sha256")
    if size_bytes is not None and (not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or size_bytes <= 0):
        raise RecipeError(f"checkpoint.size_bytes must be a positive integer, got {size_bytes!r}")
    if given.commercial is not None and not isinstance(given.commercial, bool):
        raise RecipeError(f"checkpoint.commercial must be true or false, got {given.commercial!r}")
    for name in ("licence", "licence_url", "sha256_source", "key"):
        value: Any = getattr(given, name)
        if value is not None:
            _check_text(name, value)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RecipeError(f"checkpoint.{name} must be a text, got {value!r}")
