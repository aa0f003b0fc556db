"""One file over HTTP into a ``.part`` file, going on where an earlier try was cut off."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, BinaryIO
from urllib.parse import urlparse

from edgesam_deploy import __version__
from edgesam_deploy.errors import CheckpointError
from edgesam_deploy.files import CHUNK_BYTES
from edgesam_deploy.local_caches import HUGGING_FACE
from edgesam_deploy.weights import PublishedFile

TIMEOUT_S = 30
# For a file whose size nobody states; the largest published checkpoint of the field has 2.6 GB.
CEILING_BYTES = 4 << 30
CURE = "Try again, or download it elsewhere and pass it with --checkpoint FILE"
_SCHEMES = ("https", "http")


class Part:
    """What has come of a file so far: ``NAME.part``, and in ``NAME.part.json`` which version of the file it is of.

    The version is what the server calls it (its ETag, or else the date of its last change). Appends only.
    resumed: whether it begins with what an earlier try left.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self._file = file
        self._note = path.with_name(f"{path.name}.json")
        self.resumed = self.size_bytes > 0

    @property
    def size_bytes(self) -> int:
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def version(self, url: str) -> str | None:
        """What the server at ``url`` called the file that this is a part of, if it said."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            return str(note["version"]) if note["url"] == url and note["version"] else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def begin(self, url: str, version: str | None) -> None:
        """Note whose first bytes follow."""
        self._note.write_text(json.dumps({"url": url, "version": version}) + "\n", encoding="utf-8")

    def digest(self) -> hashlib._Hash:
        """The sha256 of what is here, to go on with."""
        digest = hashlib.sha256()
        self._file.flush()
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            digest.update(chunk)
        return digest

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)

    def clear(self) -> None:
        self._file.truncate(0)
        self._note.unlink(missing_ok=True)
        self.resumed = False

    def finish(self, path: Path) -> None:
        """Take the place of ``path``."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._note.unlink(missing_ok=True)
        self.path.replace(path)


@contextmanager
def part_of(path: Path, wait: Callable[[], None]) -> Iterator[Part]:
    """The part of the file ``path``, for this process alone: ``wait`` is called before waiting for another one.

    Nothing is left of an empty part. OSErrors of the system pass.
    """
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(part, wait)
    with file:
        opened = Part(file, part)
        try:
            yield opened
        finally:
            if not opened.size_bytes:
                opened.clear()
                part.unlink(missing_ok=True)


def _locked(path: Path, wait: Callable[[], None]) -> BinaryIO:
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever held it may have renamed it since: then this is not the file of that name any more.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def receive(published: PublishedFile, part: Part, announce: Callable[[int | None, int], Callable[[int], None]]) -> str:
    """Let ``part`` become the published file, as far as the server has it; its sha256.

    announce(bytes in all if known, bytes here already) is called when they begin to come, what it returns with the
    number of bytes of each piece. Raises CheckpointError where they do not come, or are too many or too few; OSError
    of the system where they cannot be written. What came stays in the part then, unless it cannot be of the file.
    """
    if part.resumed:
        if published.sha256 and part.digest().hexdigest() == published.sha256:
            return published.sha256  # an earlier try was stopped after the last byte
        unknown = not (part.version(published.url) or published.sha256)  # of which version: no hash would tell
        if unknown or part.size_bytes >= _limit(published):
            part.clear()
    with _ask(published.url, part) as response:
        offset = part.size_bytes
        total = _total_bytes(response, published)
        if not offset:
            part.begin(published.url, _version(response.headers))
        digest = part.digest()
        advance = announce(total or published.size_bytes, offset)
        for chunk in _chunks(response, published.url):
            offset += len(chunk)
            if offset > _limit(published):
                part.clear()
                raise CheckpointError(f"{published.url} sends more than {_limit(published)} bytes. {CURE}")
            part.write(chunk)
            digest.update(chunk)
            advance(len(chunk))
    if total is not None and offset < total:  # urllib takes an early end of the connection for the end
        raise CheckpointError(
            f"the download of {published.url} broke off after {offset} of {total} bytes. Run the same command again to "
            "go on from there, or download it elsewhere and pass it with --checkpoint FILE"
        )
    return digest.hexdigest()


def _ask(url: str, part: Part) -> HTTPResponse:
    """The server's answer, which goes on where the part ends; the part is emptied where it cannot."""
    offset = part.size_bytes
    if offset:
        try:
            response = _open(url, offset, part.version(url))
        except urllib.error.HTTPError as error:
            if error.code != 416:  # the server has nothing behind that byte: the file has changed
                raise _failure(url, error) from error
            error.close()
        else:
            range_start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if response.status == 206 and range_start and int(range_start[1]) == offset:
                return response
            if response.status != 206:  # the whole file: it has changed, or this server has no ranges
                part.clear()
                return response
            response.close()
        part.clear()
    try:
        return _open(url, 0, None)
    except urllib.error.HTTPError as error:
        raise _failure(url, error) from error


def _open(url: str, offset: int, version: str | None) -> HTTPResponse:
    try:
        # Compressed, it would have another length and another hash; and some servers refuse urllib by its name.
        request = urllib.request.Request(
            url, headers={"User-Agent": f"edgesam-deploy/{__version__}", "Accept-Encoding": "identity"}
        )
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        if offset and version:
            request.add_header("If-Range", version)
        authorize(request)
        response: HTTPResponse = _opener().open(request, timeout=TIMEOUT_S)
        return response
    except urllib.error.HTTPError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise _failure(url, error) from error


def _opener() -> urllib.request.OpenerDirector:
    """Only HTTP, through the proxies of the environment: urllib's own opener would read local files, too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        Redirects,
    ):
        opener.add_handler(handler())
    return opener


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows the server to http and https addresses, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlparse(newurl).scheme
        if scheme not in _SCHEMES or (urlparse(req.full_url).scheme == "https" and scheme != "https"):
            fp.close()
            raise urllib.error.URLError(f"it leads on to {newurl}, and only https may follow https")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            authorize(request)
        return request


def authorize(request: urllib.request.Request) -> None:
    """Give the user's ``$HF_TOKEN`` to Hugging Face over https, and to nobody else.

    It is not among the headers that urllib repeats for the address that a server leads on to.
    """
    address, token = urlparse(request.full_url), os.environ.get("HF_TOKEN")
    if token and address.scheme == "https" and address.netloc in (HUGGING_FACE, f"{HUGGING_FACE}:443"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")


def _total_bytes(response: HTTPResponse, published: PublishedFile) -> int | None:
    """The size of the whole file if the server says; CheckpointError where it shows another file, or one too large."""
    if response.status == 206:
        header = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        header = response.headers.get("Content-Length", "")
    if not (header.isascii() and header.isdigit()):
        return None
    total = int(header)
    if published.size_bytes is not None and total != published.size_bytes:
        raise CheckpointError(
            f"{published.url} offers a file of {total} bytes, expected {published.size_bytes}. {CURE}"
        )
    if total > _limit(published):
        raise CheckpointError(f"{published.url} offers a file of {total} bytes, more than {CEILING_BYTES}. {CURE}")
    return total


def _limit(published: PublishedFile) -> int:
    return published.size_bytes or CEILING_BYTES


def _version(headers: HTTPMessage) -> str | None:
    """What If-Range takes: a strong ETag, or the date of the last change."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _chunks(response: HTTPResponse, url: str) -> Iterator[bytes]:
    try:
        while chunk := response.read1(CHUNK_BYTES):
            yield chunk
    except (OSError, HTTPException, ValueError) as error:
        raise _failure(url, error) from error


def _failure(url: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot download {url}: {_reason(error, url)}. {CURE}")


def _reason(error: Exception, url: str) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it is the open answer of the server, too
        gated = error.code in (401, 403) and urlparse(url).hostname == HUGGING_FACE
        hint = "; if one has to log in for it, set HF_TOKEN" if gated else ""
        return " ".join(f"the server answers {error.code} {error.reason}".split()) + hint
    text = " ".join(str(getattr(error, "reason", None) or error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, HTTPException) else text or type(error).__name__
