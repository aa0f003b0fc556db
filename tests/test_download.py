"""Downloads: kept once they are whole and right, and never otherwise. A server on this machine plays the publisher."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgesam_deploy.download import cache_folder, fetch
from edgesam_deploy.errors import CheckpointError, OutputError
from edgesam_deploy.files import CHUNK_BYTES

WEIGHTS = bytes(range(256)) * (CHUNK_BYTES // 256) + b"a second chunk"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


class Publisher(BaseHTTPRequestHandler):
    """Answers every path by the method of ``ANSWERS`` with that name."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests.append(self.path)
        self.close_connection = True
        ANSWERS[self.path.strip("/").partition(".")[0]](self)

    def log_message(self, format: str, *args: object) -> None:
        """Keep stderr for what is under test."""

    def head(self, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class Server(ThreadingHTTPServer):
    """requests: the paths that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Publisher)
        self.requests: list[str] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


def good(client: Publisher) -> None:
    client.head(Content_Length=str(len(WEIGHTS)))
    client.wfile.write(WEIGHTS)


def unannounced(client: Publisher) -> None:
    client.head(Connection="close")
    client.wfile.write(WEIGHTS)


def other(client: Publisher) -> None:
    client.head(Content_Length=str(len(WEIGHTS)))
    client.wfile.write(WEIGHTS[::-1])


def cut(client: Publisher) -> None:
    """Announce all, send half, hang up."""
    client.head(Content_Length=str(len(WEIGHTS)))
    client.wfile.write(WEIGHTS[: len(WEIGHTS) // 2])


def cut_unannounced(client: Publisher) -> None:
    client.head(Connection="close")
    client.wfile.write(WEIGHTS[: len(WEIGHTS) // 2])


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


def no_http(client: Publisher) -> None:
    client.wfile.write(b"hello\r\nthis is not HTTP\r\n")


def silent(_: Publisher) -> None:
    """Hang up without an answer."""


ANSWERS: dict[str, Callable[[Publisher], None]] = {
    f.__name__: f
    for f in (good, unannounced, other, cut, cut_unannounced, cut_chunked, empty, odd_length, missing, no_http, silent)
}


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
    """An empty cache folder, and a server that remembers nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGESAM_CACHE", str(folder))
    server.requests.clear()
    return folder


def kept(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


@pytest.mark.parametrize("size_bytes", [None, len(WEIGHTS)], ids=["size-unknown", "size-known"])
@pytest.mark.parametrize("answer", ["good", "unannounced", "odd_length"])
def test_a_good_file_is_kept_and_the_second_time_nobody_is_asked(
    server: Server, cache: Path, answer: str, size_bytes: int | None
) -> None:
    first = fetch(server.url(f"{answer}.pt"), SHA256, size_bytes)
    assert first.read_bytes() == WEIGHTS
    assert kept(cache) == [first.name] == [f"{SHA256[:12]}-{answer}.pt"]
    second = fetch(server.url(f"{answer}.pt"), SHA256, size_bytes)
    assert second == first
    assert server.requests == [f"/{answer}.pt"]


def test_a_file_that_was_altered_in_the_cache_is_fetched_again(server: Server, cache: Path) -> None:
    path = fetch(server.url("good.pt"), SHA256)
    path.write_bytes(WEIGHTS[:-1])
    assert fetch(server.url("good.pt"), SHA256).read_bytes() == WEIGHTS
    assert len(server.requests) == 2
    assert kept(cache) == [path.name]


REFUSED = {
    "other": ("other", None, "gave a file with sha256"),
    "other-size-known": ("other", len(WEIGHTS), "it was thrown away"),
    "other-size-announced": ("good", len(WEIGHTS) + 1, f"offers a file of {len(WEIGHTS)} bytes"),
    "cut": ("cut", None, f"broke off after {len(WEIGHTS) // 2} of {len(WEIGHTS)} bytes"),
    "cut-unannounced": ("cut_unannounced", None, "gave a file with sha256"),
    "cut-unannounced-size-known": ("cut_unannounced", len(WEIGHTS), "gave a file with sha256"),
    "cut-chunked": ("cut_chunked", None, "IncompleteRead"),
    "empty": ("empty", None, "gave a file with sha256"),
    "404": ("missing", None, "the server answers 404 Not Found"),
    "no-http": ("no_http", None, "BadStatusLine: hello"),
    "silent": ("silent", None, "closed connection"),
}


@pytest.mark.parametrize(("answer", "size_bytes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_file_is_refused_and_nothing_is_kept(
    server: Server, cache: Path, answer: str, size_bytes: int | None, says: str
) -> None:
    url = server.url(f"{answer}.pt")
    with pytest.raises(CheckpointError) as caught:
        fetch(url, SHA256, size_bytes)
    message = str(caught.value)
    assert url in message
    assert says in message
    assert "--checkpoint" in message
    assert len(message.splitlines()) == 1
    assert kept(cache) == []


def test_a_short_file_is_caught_by_its_hash_alone(server: Server, cache: Path) -> None:
    """Half of a file is not accepted even by a server that calls the half all there is."""
    half = hashlib.sha256(WEIGHTS[: len(WEIGHTS) // 2]).hexdigest()
    with pytest.raises(CheckpointError, match=f"sha256 {half}, expected {SHA256}"):
        fetch(server.url("cut_unannounced.pt"), SHA256)
    assert kept(cache) == []


def test_a_failed_download_leaves_the_cached_file_of_another_version(server: Server, cache: Path) -> None:
    path = fetch(server.url("good.pt"), SHA256)
    with pytest.raises(CheckpointError):
        fetch(server.url("good.pt"), "0" * 64)
    assert kept(cache) == [path.name]
    assert path.read_bytes() == WEIGHTS


def test_after_a_failure_the_next_try_succeeds(server: Server, cache: Path) -> None:
    with pytest.raises(CheckpointError):
        fetch(server.url("cut.pt"), SHA256)
    assert fetch(server.url("good.pt"), SHA256).read_bytes() == WEIGHTS


def _closed_port() -> str:
    with Server() as closed:
        return closed.url("good.pt")


UNREACHABLE = {
    "connection-refused": (_closed_port, "Connection refused"),
    "no-host": (lambda: "http:///good.pt", "no host given"),
    "no-url": (lambda: "weights/good.pt", "unknown url type"),
    "unknown-scheme": (lambda: "gopher://127.0.0.1/good.pt", "unknown url type"),
    "space-in-url": (lambda: "http://127.0.0.1/a b.pt", "InvalidURL"),
}


@pytest.mark.parametrize(("url", "says"), UNREACHABLE.values(), ids=UNREACHABLE)
def test_an_address_that_cannot_be_reached_is_one_line(cache: Path, url: Callable[[], str], says: str) -> None:
    address = url()
    with pytest.raises(CheckpointError, match=says) as caught:
        fetch(address, SHA256)
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
        fetch(server.url("good.pt"), SHA256)
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
