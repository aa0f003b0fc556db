"""Published files that other tools have on this machine already: the caches of Hugging Face and of torch.hub.

Their layouts are documented and read here without either library: ``hub/models--OWNER--NAME/snapshots/COMMIT/FILE``
with ``refs/REVISION`` holding a commit (https://huggingface.co/docs/huggingface_hub/guides/manage-cache), and
``hub/checkpoints/FILE`` (https://docs.pytorch.org/docs/stable/hub.html).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from edgesam_deploy.files import sha256_file
from edgesam_deploy.weights import PublishedFile

HUGGING_FACE = "huggingface.co"
_HUB_PATH = re.compile(
    r"/(?:(?P<kind>spaces|datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)


def fits(path: Path, published: PublishedFile) -> bool:
    """Whether the file is there and is the published one, as far as its size and sha256 are known."""
    try:
        size_bytes = path.stat().st_size if path.is_file() else None
        if size_bytes is None or published.size_bytes not in (None, size_bytes):
            return False
        return published.sha256 in (None, sha256_file(path))
    except OSError:  # another user's, or gone since
        return False


def find_elsewhere(published: PublishedFile) -> Path | None:
    """The published file in another tool's cache, or None.

    One whose sha256 nobody states counts only where its address says which it is: at its very revision on the Hub.
    """
    candidates = _hugging_face(published)
    if published.sha256 is not None:
        candidates = (*candidates, *_hugging_face(published, revision="*"), _torch_hub(published))
    return next((path for path in candidates if fits(path, published)), None)


def _hugging_face(published: PublishedFile, revision: str | None = None) -> tuple[Path, ...]:
    """Where the Hub's cache has the file, at the revision of its address or at any (``*``)."""
    address = urlparse(published.url)
    found = _HUB_PATH.fullmatch(address.path)
    if address.hostname != HUGGING_FACE or found is None:
        return ()
    folder = _hub_folder() / f"{found['kind'] or 'models'}--{found['name'].replace('/', '--')}"
    file = unquote(found["file"])
    if revision == "*":
        return tuple(snapshot / file for snapshot in _subfolders(folder / "snapshots"))
    return (folder / "snapshots" / _commit(folder, unquote(found["revision"])) / file,)


def _hub_folder() -> Path:
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(own).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return _user_cache() / "huggingface" / "hub"


def _commit(folder: Path, revision: str) -> str:
    """The commit that a branch or tag stood at when it was fetched; a commit stands for itself."""
    try:
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return revision


def _subfolders(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return


def _torch_hub(published: PublishedFile) -> Path:
    home = os.environ.get("TORCH_HOME")
    folder = Path(home).expanduser() if home else _user_cache() / "torch"
    return folder / "hub" / "checkpoints" / published.name


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
