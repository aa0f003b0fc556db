"""Downloads: kept once they are whole and right, and never otherwise. A server on this machine plays the publisher."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import Request

import pytest

from edgesam_deploy import local_caches, transfer
from edgesam_deploy.download import Consent, cache_folder, fetch
from edgesam_deploy.errors import CheckpointError, OutputError
from edgesam_deploy.files import CHUNK_BYTES
from edgesam_deploy.weights import PublishedFile

WEIGHTS = bytes(range(256)) * (CHUNK_BYTES // 256) + b"a second chunk"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
OLD = WEIGHTS[::-1]
HALF = len(WEIGHTS) // 2


class Publisher(BaseHTTPRequestHandler):
    """Answers every path by the function of ``ANSWERS`` with that name."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests.append(self.path)
        server.ranges.append((self.headers.get("Range"), self.headers.get("If-Range")))
        server.tokens.append(self.headers.get("Authorization"))
        self.close_connection = True
        ANSWERS[Path(urlparse(self.path).path).stem](self)

    def log_message(self, format: str, *args: object) -> None:
        """Keep stderr for what is under test."""

    def head(self, code: int | str = 200, **headers: str) -> None:
        self.send_response(int(code))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def serve(self, content: bytes, version: dict[str, str], sent: int | None = None) -> None:
        """As a server with ranges does: the rest after the asked byte, unless If-Range names another version.

        sent: hang up after so many bytes of the answer.
        """
        start, wanted = 0, self.headers.get("If-Range")
        if (asked := self.headers.get("Range")) and wanted in (None, *version.values()):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self.head(416, Content_Range=f"bytes */{len(content)}", Content_Length="0")
            return
        body = content[start:]
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.head(206, Content_Length=str(len(body)), Content_Range=span, **version)
        else:
            self.head(Content_Length=str(len(body)), **version)
        self.wfile.write(body[:sent])


class Server(ThreadingHTTPServer):
    """requests: the paths that were asked for; ranges: what each said in Range and If-Range; tokens: in Authorization.

    release: what ``slow`` waits for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Publisher)
        self.requests: list[str] = []
        self.ranges: list[tuple[str | None, str | None]] = []
        self.tokens: list[str | None] = []
        self.release = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def forget(self) -> None:
        for memory in (self.requests, self.ranges, self.tokens):
            memory.clear()
        self.release.clear()


def good(client: Publisher) -> None:
    client.head(Content_Length=str(len(WEIGHTS)))
    client.wfile.write(WEIGHTS)


def unannounced(client: Publisher) -> None:
    client.head(Connection="close")
    client.wfile.write(WEIGHTS)


def other(client: Publisher) -> None:
    client.head(Content_Length=str(len(OLD)))
    client.wfile.write(OLD)


def cut(client: Publisher) -> None:
    """Announce all, send half, hang up."""
    client.head(Content_Length=str(len(WEIGHTS)))
    client.wfile.write(WEIGHTS[:HALF])


def cut_unannounced(client: Publisher) -> None:
    client.head(Connection="close")
    client.wfile.write(WEIGHTS[:HALF])


def cut_chunked(client: Publisher) -> None:
    client.head(Transfer_Encoding="chunked")
    client.wfile.write(b"5\r\nhello\r\nnot a length\r\n")


def empty(client: Publisher) -> None:
    client.head(Content_Length="0")


def odd_length(client: Publisher) -> None:
    client.head(Content_Length="many")
    client.wfile.write(WEIGHTS)


def missing(client: Publisher) -> None:
    client.send_error(404)


def gone(client: Publisher) -> None:
    client.send_error(410, "Moved\tto another galaxy")


def no_http(client: Publisher) -> None:
    client.wfile.write(b"hello\r\nthis is not HTTP\r\n")


def silent(_: Publisher) -> None:
    """Hang up without an answer."""


# Servers with ranges. ``flaky`` hangs up in the middle of the first answer, and has an ETag, a date or neither.
def flaky(client: Publisher) -> None:
    first = not client.headers.get("Range")
    client.serve(WEIGHTS, {"ETag": '"v2"'}, HALF if first else None)


def flaky_dated(client: Publisher) -> None:
    first = not client.headers.get("Range")
    date = {"ETag": 'W/"weak"', "Last_Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    client.serve(WEIGHTS, date, HALF if first else None)


def flaky_nameless(client: Publisher) -> None:
    client.serve(WEIGHTS, {}, None if client.headers.get("Range") else HALF)


def flaky_without_ranges(client: Publisher) -> None:
    client.head(Content_Length=str(len(WEIGHTS)), ETag='"v2"')
    client.wfile.write(WEIGHTS if client.headers.get("Range") else WEIGHTS[:HALF])


def flaky_elsewhere(client: Publisher) -> None:
    """Answers a request for the rest with another part of the file, which ends alike."""
    if not client.headers.get("Range"):
        client.serve(WEIGHTS, {"ETag": '"v2"'}, HALF if client.path.endswith("first.pt") else None)
        return
    client.head(206, Content_Length="10", Content_Range=f"bytes {len(WEIGHTS) - 10}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}")
    client.wfile.write(WEIGHTS[-10:])


def current(client: Publisher) -> None:
    """The same address later: another version of the file."""
    client.serve(WEIGHTS, {"ETag": '"v2"'})


def current_nameless(client: Publisher) -> None:
    client.serve(WEIGHTS, {})


def gated(client: Publisher) -> None:
    client.send_error(401)


def redirect(client: Publisher) -> None:
    client.head(302, Location="/good.pt", Content_Length="0")


def redirect_to_flaky(client: Publisher) -> None:
    client.head(307, Location="/flaky.pt", Content_Length="0")


def loop(client: Publisher) -> None:
    client.head(302, Location="/loop.pt", Content_Length="0")


def to_a_disk(client: Publisher) -> None:
    client.head(302, Location="file:///etc/passwd", Content_Length="0")


def to_ftp(client: Publisher) -> None:
    client.head(302, Location="ftp://127.0.0.1/good.pt", Content_Length="0")


def slow(client: Publisher) -> None:
    server = client.server
    assert isinstance(server, Server)
    client.head(Content_Length=str(len(WEIGHTS)))
    client.wfile.write(WEIGHTS[:HALF])
    client.wfile.flush()
    server.release.wait(30)
    client.wfile.write(WEIGHTS[HALF:])


def endless(client: Publisher) -> None:
    """More than anybody asked for, without saying so."""
    client.head(Connection="close")
    client.wfile.write(WEIGHTS * 3)


ANSWERS: dict[str, Callable[[Publisher], None]] = {
    f.__name__: f
    for f in (
        good, unannounced, other, cut, cut_unannounced, cut_chunked, empty, odd_length, missing, gone, gated, no_http,
        silent, flaky, flaky_dated, flaky_nameless, flaky_without_ranges, flaky_elsewhere, current, current_nameless,
        redirect, redirect_to_flaky, loop, to_a_disk, to_ftp, slow,
        endless,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Path:
    """An empty cache folder, no caches of other tools, no proxies, and a server that remembers nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGESAM_CACHE", str(folder))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "HF_TOKEN", "TORCH_HOME", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    server.forget()
    return folder


def file_at(url: str, sha256: str | None = SHA256, size_bytes: int | None = None) -> PublishedFile:
    source = "this test" if sha256 else None
    return PublishedFile(url, sha256, source, size_bytes, "Apache-2.0", "https://licence", True)


def kept(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


@pytest.mark.parametrize("size_bytes", [None, len(WEIGHTS)], ids=["size-unknown", "size-known"])
@pytest.mark.parametrize("answer", ["good", "unannounced", "odd_length", "current"])
def test_a_good_file_is_kept_and_the_second_time_nobody_is_asked(
    server: Server, cache: Path, answer: str, size_bytes: int | None
) -> None:
    published = file_at(server.url(f"{answer}.pt"), size_bytes=size_bytes)
    first = fetch(published)
    assert first.read_bytes() == WEIGHTS
    assert kept(cache) == [first.name] == [f"{SHA256[:12]}-{answer}.pt"]
    assert fetch(published) == first
    assert server.requests == [f"/{answer}.pt"]


def test_a_file_that_was_altered_in_the_cache_is_fetched_again(server: Server, cache: Path) -> None:
    path = fetch(file_at(server.url("good.pt")))
    path.write_bytes(WEIGHTS[:-1])
    assert fetch(file_at(server.url("good.pt"))).read_bytes() == WEIGHTS
    assert len(server.requests) == 2
    assert kept(cache) == [path.name]


REFUSED = {
    "other": ("other", None, "gave a file with sha256"),
    "other-size-known": ("other", len(WEIGHTS), "it was thrown away"),
    "other-size-announced": ("good", len(WEIGHTS) + 1, f"offers a file of {len(WEIGHTS)} bytes"),
    "cut-unannounced": ("cut_unannounced", None, "gave a file with sha256"),
    "cut-unannounced-size-known": ("cut_unannounced", len(WEIGHTS), "gave a file with sha256"),
    "endless-size-known": ("endless", len(WEIGHTS), f"sends more than {len(WEIGHTS)} bytes"),
    "empty": ("empty", None, "gave a file with sha256"),
    "404": ("missing", None, "the server answers 404 Not Found"),
    "410": ("gone", None, "the server answers 410 Moved to another galaxy"),
    "no-http": ("no_http", None, "BadStatusLine: hello"),
    "silent": ("silent", None, "closed connection"),
    "redirect-loop": ("loop", None, "the server answers 302 The HTTP server returned a redirect error"),
    "redirect-to-a-disk": ("to_a_disk", None, "Redirection to url 'file:///etc/passwd' is not allowed"),
    "redirect-to-ftp": ("to_ftp", None, "it leads on to ftp://127.0.0.1/good.pt, and only https may follow https"),
}


@pytest.mark.parametrize(("answer", "size_bytes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_file_is_refused_and_nothing_is_kept(
    server: Server, cache: Path, answer: str, size_bytes: int | None, says: str
) -> None:
    url = server.url(f"{answer}.pt")
    with pytest.raises(CheckpointError) as caught:
        fetch(file_at(url, size_bytes=size_bytes))
    message = str(caught.value)
    assert url in message
    assert says in message
    assert "--checkpoint" in message
    assert len(message.splitlines()) == 1
    assert kept(cache) == []


def test_files_that_an_address_tells_apart_by_its_query_are_kept_apart(server: Server, cache: Path) -> None:
    """As on Google Drive, whose files are all called ``download``."""
    agreed = Consent(unverified=True)
    paths = [fetch(file_at(server.url(f"{name}?id={name}"), sha256=None), agreed) for name in ("good", "unannounced")]
    assert len(set(paths)) == 2
    assert [path.suffix for path in paths] == ["", ""]
    assert len(server.requests) == 2


@pytest.mark.parametrize("answer", ["good", "unannounced"], ids=["announced", "streamed"])
def test_a_file_above_the_ceiling_is_refused_where_nobody_states_its_size(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(transfer, "CEILING_BYTES", len(WEIGHTS) - 1)
    with pytest.raises(CheckpointError, match=rf"{len(WEIGHTS)} bytes, more than|more than {len(WEIGHTS) - 1} bytes"):
        fetch(file_at(server.url(f"{answer}.pt")))
    assert kept(cache) == []
    assert fetch(file_at(server.url(f"{answer}.pt"), size_bytes=len(WEIGHTS))).read_bytes() == WEIGHTS


def test_a_short_file_is_caught_by_its_hash_alone(server: Server, cache: Path) -> None:
    """Half of a file is not accepted even by a server that calls the half all there is."""
    half = hashlib.sha256(WEIGHTS[:HALF]).hexdigest()
    with pytest.raises(CheckpointError, match=f"sha256 {half}, expected {SHA256}"):
        fetch(file_at(server.url("cut_unannounced.pt")))
    assert kept(cache) == []


def test_a_failed_download_leaves_the_cached_file_of_another_version(server: Server, cache: Path) -> None:
    path = fetch(file_at(server.url("good.pt")))
    with pytest.raises(CheckpointError):
        fetch(file_at(server.url("good.pt"), "0" * 64))
    assert kept(cache) == [path.name]
    assert path.read_bytes() == WEIGHTS


def test_a_redirect_is_followed(server: Server, cache: Path) -> None:
    assert fetch(file_at(server.url("redirect.pt"))).read_bytes() == WEIGHTS
    assert server.requests == ["/redirect.pt", "/good.pt"]
    assert kept(cache) == [f"{SHA256[:12]}-redirect.pt"]


# A download that is cut off, and the next one.

WHOLE = (None, None)
REST = f"bytes={HALF}-"
RESUMED = {
    "by-etag": ("flaky.pt", [WHOLE, (REST, '"v2"')]),
    "by-date": ("flaky_dated.pt", [WHOLE, (REST, "Wed, 21 Oct 2015 07:28:00 GMT")]),
    "by-hash-alone": ("flaky_nameless.pt", [WHOLE, (REST, None)]),
    "server-without-ranges": ("flaky_without_ranges.pt", [WHOLE, (REST, '"v2"')]),
    "through-a-redirect": ("redirect_to_flaky.pt", [WHOLE, WHOLE, (REST, '"v2"'), (REST, '"v2"')]),
}


@pytest.mark.parametrize(("name", "asked"), RESUMED.values(), ids=RESUMED)
def test_a_download_that_was_cut_off_goes_on(
    server: Server, cache: Path, name: str, asked: list[tuple[str | None, str | None]]
) -> None:
    published = file_at(server.url(name), size_bytes=len(WEIGHTS))
    with pytest.raises(CheckpointError, match=f"broke off after {HALF} of {len(WEIGHTS)} bytes.*same command again"):
        fetch(published)
    final = f"{SHA256[:12]}-{name}"
    assert kept(cache) == [f"{final}.part", f"{final}.part.json"]
    assert (cache / f"{final}.part").read_bytes() == WEIGHTS[:HALF]
    told: list[str] = []
    assert fetch(published, Consent(tell=told.append)).read_bytes() == WEIGHTS
    assert server.ranges == asked
    assert kept(cache) == [final]
    assert ("going on after 0.5 MB" in told[0]) == (name != "flaky_without_ranges.pt")


def test_what_came_before_a_broken_chunk_is_kept_for_the_next_try(server: Server, cache: Path) -> None:
    with pytest.raises(CheckpointError, match="IncompleteRead"):
        fetch(file_at(server.url("cut_chunked.pt")))
    assert all(".part" in name for name in kept(cache))


def begun(cache: Path, url: str, content: bytes, version: str | None) -> Path:
    """What an earlier process left of a download of ``url``."""
    cache.mkdir()
    part = cache / f"{SHA256[:12]}-{url.rpartition('/')[2]}.part"
    part.write_bytes(content)
    if version is not None:
        part.with_name(f"{part.name}.json").write_text(json.dumps({"url": url, "version": version}))
    return part


CHANGED = {
    # what is there, its version, where the file is now -> the ranges that are asked for
    "by-etag": (OLD[:HALF], '"v1"', "current", [(REST, '"v1"')]),
    "by-hash": (OLD[:HALF], None, "current_nameless", [(REST, None), WHOLE]),
    "it-is-shorter-now": (OLD * 2, None, "current", [(f"bytes={2 * len(OLD)}-", None), WHOLE]),
    "another-range-than-asked": (WEIGHTS[:HALF], '"v2"', "flaky_elsewhere", [(REST, '"v2"'), WHOLE]),
    "it-had-all-come": (WEIGHTS, '"v2"', "current", []),
    "its-note-is-damaged": (WEIGHTS[:HALF], "", "current", [(REST, None)]),
}


@pytest.mark.parametrize(("content", "version", "answer", "asked"), CHANGED.values(), ids=CHANGED)
def test_what_is_there_is_no_obstacle_whatever_became_of_the_file(
    server: Server,
    cache: Path,
    content: bytes,
    version: str | None,
    answer: str,
    asked: list[tuple[str | None, str | None]],
) -> None:
    url = server.url(f"{answer}.pt")
    part = begun(cache, url, content, version)
    if version == "":
        part.with_name(f"{part.name}.json").write_text("{")
    assert fetch(file_at(url)).read_bytes() == WEIGHTS
    assert server.ranges == asked
    assert kept(cache) == [part.name.removesuffix(".part")]


def test_more_than_the_file_has_is_not_gone_on_with(server: Server, cache: Path) -> None:
    url = server.url("current.pt")
    begun(cache, url, OLD + b"more", '"v2"')
    assert fetch(file_at(url, size_bytes=len(WEIGHTS))).read_bytes() == WEIGHTS
    assert server.ranges == [WHOLE]


def test_a_wrong_file_is_not_fetched_twice_because_an_older_one_had_begun(server: Server, cache: Path) -> None:
    url = server.url("other.pt")
    begun(cache, url, WEIGHTS[:HALF], '"v2"')
    with pytest.raises(CheckpointError, match="it was thrown away"):
        fetch(file_at(url))
    assert len(server.requests) == 1
    assert kept(cache) == []


def _closed_port() -> str:
    with Server() as closed:
        return closed.url("good.pt")


UNREACHABLE = {
    "connection-refused": (_closed_port, "Connection refused"),
    "no-host": (lambda: "http:///good.pt", "no host given"),
    "space-in-url": (lambda: "http://127.0.0.1/a b.pt", "InvalidURL"),
}


@pytest.mark.parametrize(("url", "says"), UNREACHABLE.values(), ids=UNREACHABLE)
def test_an_address_that_cannot_be_reached_is_one_line(cache: Path, url: Callable[[], str], says: str) -> None:
    address = url()
    with pytest.raises(CheckpointError, match=says) as caught:
        fetch(file_at(address))
    message = str(caught.value)
    assert message.startswith(f"cannot download {address}: ")
    assert "--checkpoint" in message
    assert len(message.splitlines()) == 1
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_is_an_output_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGESAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="is not a folder"):
        fetch(file_at(server.url("good.pt")))
    assert server.requests == [], "nothing is fetched that could not be kept"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"EDGESAM_CACHE": "/own", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/edgesam-deploy"),
        ({"EDGESAM_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/edgesam-deploy"),
    ],
    ids=["own", "xdg", "home"],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("EDGESAM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


# Who gets the user's token, and where a server may lead to.

TOKENS = {
    "hub": ("https://huggingface.co/a/b/resolve/main/c.pt", True),
    "hub-with-its-port": ("https://huggingface.co:443/a/b/resolve/main/c.pt", True),
    "hub-in-clear": ("http://huggingface.co/a/b/resolve/main/c.pt", False),
    "hub-on-another-port": ("https://huggingface.co:8443/c.pt", False),
    "its-own-files-elsewhere": ("https://cdn-lfs.huggingface.co/c.pt", False),
    "ends-alike": ("https://nothuggingface.co/c.pt", False),
    "begins-alike": ("https://huggingface.co.example.org/c.pt", False),
    "as-a-user": ("https://huggingface.co@example.org/c.pt", False),
    "with-a-user": ("https://user@huggingface.co/c.pt", False),
    "another-publisher": ("https://dl.fbaipublicfiles.com/c.pth", False),
}


@pytest.mark.parametrize(("url", "given"), TOKENS.values(), ids=TOKENS)
def test_the_token_is_for_hugging_face_over_https_alone(monkeypatch: pytest.MonkeyPatch, url: str, given: bool) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    request = Request(url)
    transfer.authorize(request)
    assert request.get_header("Authorization") == ("Bearer secret" if given else None)
    # What urllib repeats for the next address is ``headers``.
    assert "Authorization" not in request.headers


def test_no_token_goes_to_a_publisher(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(file_at(server.url("redirect.pt")))
    assert server.tokens == [None, None]


def test_what_one_has_to_log_in_for_names_the_token_on_hugging_face_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = []
    for host in ("huggingface.co", "127.0.0.1"):
        monkeypatch.setattr(transfer, "HUGGING_FACE", host)
        with pytest.raises(CheckpointError, match="the server answers 401 Unauthorized") as caught:
            fetch(file_at(server.url("gated.pt")))
        messages.append(str(caught.value))
    assert ["set HF_TOKEN" in message for message in messages] == [False, True]


LED_ON = {
    # from, to -> whether it is followed, and whether the token goes along
    "hub-to-its-store": ("https://huggingface.co/a", "https://cdn-lfs.huggingface.co/b", True, False),
    "hub-to-hub": ("https://huggingface.co/a", "https://huggingface.co/b", True, True),
    "https-to-http": ("https://huggingface.co/a", "http://huggingface.co/b", False, False),
    "http-to-https": ("http://example.org/a", "https://example.org/b", True, False),
    "http-to-http": ("http://example.org/a", "http://example.org/b", True, False),
    "https-to-ftp": ("https://example.org/a", "ftp://example.org/b", False, False),
    "https-to-a-disk": ("https://example.org/a", "file:///etc/passwd", False, False),
}


@pytest.mark.parametrize(("start", "end", "followed", "token"), LED_ON.values(), ids=LED_ON)
def test_where_a_server_may_lead_to(
    monkeypatch: pytest.MonkeyPatch, start: str, end: str, followed: bool, token: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    request = Request(start, headers={"Range": REST})
    transfer.authorize(request)

    def follow() -> Request | None:
        return transfer.Redirects().redirect_request(request, BytesIO(), 302, "Found", HTTPMessage(), end)

    if not followed:
        with pytest.raises(URLError, match="only https may follow https"):
            follow()
        return
    after = follow()
    assert after is not None
    assert (after.full_url, after.get_header("Range")) == (end, REST)
    assert (after.get_header("Authorization") is not None) == token


# What the user has to agree to.


def test_the_licence_is_told_when_the_download_begins_and_not_again(server: Server, cache: Path) -> None:
    told: list[str] = []
    published = file_at(server.url("good.pt"))
    for _ in range(2):
        fetch(published, Consent(tell=told.append))
    assert told == [f"downloading 1.0 MB from {published.url}; licence: Apache-2.0 (https://licence)"]


def test_a_licence_against_commercial_use_has_to_be_accepted(server: Server, cache: Path) -> None:
    published = replace(file_at(server.url("good.pt")), licence="S-Lab-1.0", commercial=False)
    with pytest.raises(CheckpointError) as caught:
        fetch(published, Consent(unverified=True))
    for part in (published.url, "S-Lab-1.0", "https://licence", "--accept-license", "--checkpoint"):
        assert part in str(caught.value)
    assert (server.requests, kept(cache)) == ([], [])
    assert fetch(published, Consent(licence=True)).read_bytes() == WEIGHTS
    assert fetch(published).read_bytes() == WEIGHTS, "what is here needs no download"


def test_a_file_whose_hash_nobody_states_has_to_be_accepted(server: Server, cache: Path) -> None:
    published = file_at(server.url("good.pt"), sha256=None)
    with pytest.raises(CheckpointError) as caught:
        fetch(published, Consent(licence=True))
    for part in (published.url, "--accept-unverified", "--checkpoint"):
        assert part in str(caught.value)
    assert (server.requests, kept(cache)) == ([], [])
    told: list[str] = []
    path = fetch(published, Consent(unverified=True, tell=told.append))
    assert path.read_bytes() == WEIGHTS
    assert told[1:] == [f"{path} is unverified: its sha256 is {SHA256}; pin it in the recipe's [checkpoint]"]
    with pytest.raises(CheckpointError, match="--accept-unverified"):
        fetch(published)
    assert fetch(published, Consent(unverified=True, tell=told.append)) == path
    assert len(server.requests) == 1


def test_an_unverified_download_goes_on_only_where_the_server_names_its_version(server: Server, cache: Path) -> None:
    agreed = Consent(unverified=True)
    for name, asked in (("flaky.pt", (REST, '"v2"')), ("flaky_nameless.pt", WHOLE)):
        server.forget()
        published = file_at(server.url(name), sha256=None)
        with pytest.raises(CheckpointError, match="broke off"):
            fetch(published, agreed)
        if asked == WHOLE:
            with pytest.raises(CheckpointError, match="broke off"):
                fetch(published, agreed)
        else:
            assert fetch(published, agreed).read_bytes() == WEIGHTS
        assert server.ranges == [WHOLE, asked]


# What other tools have fetched already.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(folder: Path, name: str, content: bytes, commit: str = COMMIT, revision: str | None = "main") -> Path:
    """A file as Hugging Face's cache keeps it: a link from the snapshot to a blob, and a ref to the snapshot."""
    repository = folder / name
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    path = repository / "snapshots" / commit / "weights" / "good.pt"
    for place in (blob, path):
        place.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    path.symlink_to(blob)
    if revision is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return path


MODEL = "models--owner--name"
HUBS: dict[str, tuple[dict[str, str], str]] = {
    "HF_HUB_CACHE": ({"HF_HUB_CACHE": "{0}/a", "HF_HOME": "{0}/b"}, "a"),
    "HUGGINGFACE_HUB_CACHE": ({"HUGGINGFACE_HUB_CACHE": "{0}/a"}, "a"),
    "HF_HOME": ({"HF_HOME": "{0}/b"}, "b/hub"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "{0}/c"}, "c/huggingface/hub"),
    "HOME": ({"XDG_CACHE_HOME": "", "HOME": "{0}/d"}, "d/.cache/huggingface/hub"),
}


@pytest.mark.parametrize(("environment", "folder"), HUBS.values(), ids=HUBS)
@pytest.mark.parametrize("sha256", [SHA256, None], ids=["hash-known", "hash-unknown"])
def test_a_file_in_hugging_faces_cache_is_not_fetched_again(
    server: Server,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    folder: str,
    sha256: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    path = hub(tmp_path / folder, MODEL, WEIGHTS)
    told: list[str] = []
    published = file_at("https://huggingface.co/owner/name/resolve/main/weights/good.pt", sha256)
    assert fetch(published, Consent(unverified=True, tell=told.append)) == path
    assert told[0] == f"found {path}; nothing is downloaded"
    assert kept(cache) == []


@pytest.fixture
def local_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The server of this test plays the Hub, too."""
    monkeypatch.setattr(local_caches, "HUGGING_FACE", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return lambda name, content, *others: hub(tmp_path / "hub", name, content, *others)


OTHER_COMMIT = COMMIT[::-1]
ADDRESS = "owner/name/resolve/{}/weights/good.pt"
HITS = {
    # address, hash -> content, commit, ref in the cache -> taken from there
    "at-its-commit": (ADDRESS.format(COMMIT), None, (WEIGHTS, COMMIT, None), True),
    "a-space": ("spaces/" + ADDRESS.format("main"), SHA256, (WEIGHTS, COMMIT, "main"), True),
    "another-commit-same-file": (ADDRESS.format("v9"), SHA256, (WEIGHTS, OTHER_COMMIT, "main"), True),
    "another-commit-hash-unknown": (ADDRESS.format("v9"), None, (WEIGHTS, OTHER_COMMIT, "main"), False),
    "stale": (ADDRESS.format("main"), SHA256, (OLD, COMMIT, "main"), False),
    "another-repository": ("owner/other/resolve/main/weights/good.pt", SHA256, (WEIGHTS, COMMIT, "main"), False),
    "another-file": ("owner/name/resolve/main/other/good.pt", SHA256, (WEIGHTS, COMMIT, "main"), False),
    "no-address-of-the-hub": ("owner/name/raw/main/weights/good.pt", SHA256, (WEIGHTS, COMMIT, "main"), False),
}


@pytest.mark.parametrize(("address", "sha256", "cached", "hit"), HITS.values(), ids=HITS)
def test_only_the_very_file_is_taken_from_hugging_faces_cache(
    server: Server,
    cache: Path,
    local_hub: Callable[..., Path],
    address: str,
    sha256: str | None,
    cached: tuple[bytes, str, str | None],
    hit: bool,
) -> None:
    there = local_hub("spaces--owner--name" if address.startswith("spaces") else MODEL, *cached)
    path = fetch(file_at(server.url(address), sha256), Consent(unverified=True))
    assert path.read_bytes() == WEIGHTS
    assert (path == there) == hit
    assert server.requests == ([] if hit else [f"/{address}"])
    assert there.read_bytes() == cached[0]


@pytest.mark.parametrize(("content", "hit"), [(WEIGHTS, True), (OLD, False)], ids=["the-file", "stale"])
def test_a_file_in_torch_hubs_cache_is_taken_if_its_hash_is_right(
    server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, hit: bool
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    there = tmp_path / "torch" / "hub" / "checkpoints" / "good.pt"
    there.parent.mkdir(parents=True)
    there.write_bytes(content)
    path = fetch(file_at(server.url("good.pt")))
    assert path.read_bytes() == WEIGHTS
    assert (path == there, len(server.requests)) == (hit, 0 if hit else 1)


# What needs processes of its own.

FETCH = """
import sys
from edgesam_deploy.download import Consent, fetch
from edgesam_deploy.weights import PublishedFile
{setup}
say = lambda line: print(line, flush=True)
print("at", fetch(PublishedFile({url!r}, {sha256!r}, "this test", licence="x", commercial=True), Consent(tell=say)))
"""


def another_process(url: str, setup: str = "") -> subprocess.Popen[str]:
    script = FETCH.format(url=url, sha256=SHA256, setup=setup)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_that_want_the_same_file_fetch_it_once(server: Server, cache: Path) -> None:
    url = server.url("slow.pt")
    with another_process(url) as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith("downloading 1.0 MB")
        with another_process(url) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == f"waiting for another process that downloads {url}\n"
            server.release.set()
            ends = [process.communicate(timeout=30) for process in (first, second)]
    name = f"{SHA256[:12]}-slow.pt"
    assert ends == [(f"at {cache / name}\n", "")] * 2
    assert server.requests == ["/slow.pt"]
    assert kept(cache) == [name]
    assert (cache / name).read_bytes() == WEIGHTS


def test_a_killed_download_goes_on(server: Server, cache: Path) -> None:
    with another_process(server.url("slow.pt")) as first:
        part = cache / f"{SHA256[:12]}-slow.pt.part"
        for _ in range(1000):
            if part.is_file() and part.stat().st_size > 0:
                break
            time.sleep(0.02)
        first.kill()
    server.release.set()
    begun_bytes = part.stat().st_size
    assert 0 < begun_bytes < len(WEIGHTS)
    assert fetch(file_at(server.url("slow.pt"))).read_bytes() == WEIGHTS
    assert server.ranges == [WHOLE, (f"bytes={begun_bytes}-", None)]
    assert kept(cache) == [f"{SHA256[:12]}-slow.pt"]


def test_a_full_disk_is_one_line_and_with_room_again_the_download_goes_on(server: Server, cache: Path) -> None:
    limit = HALF
    setup = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    url = server.url("current.pt")
    with another_process(url, setup) as process:
        _, error = process.communicate(timeout=30)
    final = cache / f"{SHA256[:12]}-current.pt"
    expected = f"edgesam_deploy.errors.OutputError: cannot write {final}: File too large; nothing was changed there"
    assert error.splitlines()[-1] == expected
    assert fetch(file_at(url)).read_bytes() == WEIGHTS
    assert server.ranges == [WHOLE, (f"bytes={limit}-", '"v2"')]
    assert kept(cache) == [final.name]
