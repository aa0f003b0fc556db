"""Download a published file once, with a progress bar and a hash, into a cache folder."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

from edgesam_deploy.errors import CheckpointError
from edgesam_deploy.files import CHUNK_BYTES, sha256_file, writing

TIMEOUT_S = 30
_CURE = "Try again, or download it elsewhere and pass it with --checkpoint FILE"


def cache_folder() -> Path:
    """``$EDGESAM_CACHE``, else ``edgesam-deploy`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("EDGESAM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgesam-deploy"


def fetch(url: str, sha256: str, size_bytes: int | None = None) -> Path:
    """The file at ``url``, from the cache if it is there with the right hash.

    The cached name carries the hash, so two versions never collide. Raises CheckpointError when the address cannot
    be reached or what came has another sha256; a wrong file is never kept.
    """
    path = cache_folder() / f"{sha256[:12]}-{Path(urlparse(url).path).name}"
    if path.is_file() and sha256_file(path) == sha256:
        return path
    with writing(path) as temporary:
        _download(url, temporary, size_bytes, path)
        found = sha256_file(temporary)
        if found != sha256:
            raise CheckpointError(
                f"{url} gave a file with sha256 {found}, expected {sha256}: it was thrown away. "
                "Download it from a source you trust and pass it with --checkpoint"
            )
    return path


def _download(url: str, output: Path, size_bytes: int | None, final: Path) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT_S) as response,
            output.open("wb") as file,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            announced = _announced_bytes(response.headers.get("Content-Length"), url, size_bytes)
            task = progress.add_task(final.name, total=announced or size_bytes)
            received = 0
            while chunk := response.read(CHUNK_BYTES):
                received += file.write(chunk)
                progress.advance(task, len(chunk))
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        raise CheckpointError(f"cannot download {url}: {_reason(error)}. {_CURE}") from error
    if announced is not None and received < announced:  # urllib takes an early end of the connection for the end
        raise CheckpointError(f"the download of {url} broke off after {received} of {announced} bytes. {_CURE}")


def _announced_bytes(header: str | None, url: str, expected: int | None) -> int | None:
    """The Content-Length if there is one; CheckpointError where it shows another file before any of it is fetched."""
    announced = int(header) if header and header.isascii() and header.isdigit() else None
    if announced is not None and expected is not None and announced != expected:
        raise CheckpointError(f"{url} offers a file of {announced} bytes, expected {expected}. {_CURE}")
    return announced


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it is the open answer of the server, too
        return f"the server answers {error.code} {error.reason}"
    text = " ".join(str(getattr(error, "reason", None) or error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, HTTPException) else text or type(error).__name__
