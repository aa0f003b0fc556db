"""A published file, once: from a cache on this machine, or downloaded with a progress bar, a licence and a hash."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgesam_deploy.errors import CheckpointError
from edgesam_deploy.files import output_errors, sha256_bytes, sha256_file
from edgesam_deploy.local_caches import find_elsewhere, fits
from edgesam_deploy.transfer import Part, part_of, receive
from edgesam_deploy.weights import PublishedFile

LOG = logging.getLogger("edgesam_deploy.download")
_YOURS = "or download it elsewhere and pass it with --checkpoint FILE"


@dataclass(frozen=True, slots=True)
class Consent:
    """What the user agrees to. licence: licences that forbid commercial use. unverified: files without a known sha256.

    tell: takes what the user must read, one line at a time.
    """

    licence: bool = False
    unverified: bool = False
    tell: Callable[[str], None] = LOG.warning


NO_CONSENT = Consent()


def cache_folder() -> Path:
    """``$EDGESAM_CACHE``, else ``edgesam-deploy`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("EDGESAM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgesam-deploy"


def fetch(published: PublishedFile, consent: Consent = NO_CONSENT) -> Path:
    """The published file on this machine: from our cache, from Hugging Face's or torch.hub's, or downloaded now.

    The cached name carries the hash, so two versions never collide; what came of a download that was cut off waits
    beside it as ``.part``. Raises CheckpointError when the address cannot be reached, what came has another sha256 (it
    is thrown away), or the user has not agreed to what they have to.
    """
    if published.sha256 is None and not consent.unverified:
        raise CheckpointError(
            f"nobody is known to state the sha256 of {published.url}, so what comes from there cannot be checked: take "
            f"it as it is with --accept-unverified, {_YOURS}"
        )
    path = cache_folder() / _cached_name(published)
    found = path if fits(path, published) else find_elsewhere(published)
    if found is None:
        found = _download(published, path, consent)
    elif found != path:
        consent.tell(f"found {found}; nothing is downloaded")
    if published.sha256 is None:
        consent.tell(f"{found} is unverified: its sha256 is {sha256_file(found)}; pin it in the recipe's [checkpoint]")
    return found


def _cached_name(published: PublishedFile) -> str:
    if published.sha256 is not None:
        return f"{published.sha256[:12]}-{published.name}"
    return f"unverified-{sha256_bytes(published.url.encode())[:12]}-{published.name}"


def _download(published: PublishedFile, path: Path, consent: Consent) -> Path:
    if not published.commercial and not consent.licence:
        raise CheckpointError(
            f"{published.url} may not be used commercially (licence {published.licence}): read {published.licence_url} "
            f"and accept it with --accept-license, {_YOURS}"
        )

    def wait() -> None:
        consent.tell(f"waiting for another process that downloads {published.url}")

    with output_errors(path), part_of(path, wait) as part:
        if fits(path, published):  # the other process was done
            return path
        found = _received(published, part, path, consent)
        if published.sha256 not in (None, found):
            raise CheckpointError(
                f"{published.url} gave a file with sha256 {found}, expected {published.sha256}: it was thrown away. "
                "Download it from a source you trust and pass it with --checkpoint"
            )
        part.finish(path)
    return path


def _received(published: PublishedFile, part: Part, path: Path, consent: Consent) -> str:
    """The sha256 of what has come into ``part``; one of the wrong hash leaves it empty."""
    with _progress(published, path.name, consent) as announce:
        found = receive(published, part, announce)
        if part.resumed and published.sha256 not in (None, found):
            # The beginning may be another version's, which a server without ETags and dates does not notice.
            part.clear()
            found = receive(published, part, announce)
    if published.sha256 not in (None, found):
        part.clear()
    return found


@contextmanager
def _progress(
    published: PublishedFile, name: str, consent: Consent
) -> Iterator[Callable[[int | None, int], Callable[[int], None]]]:
    """Once the server answers: what is downloaded and under which licence, then a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def announce(total_bytes: int | None, here_bytes: int) -> Callable[[int], None]:
            size = "a file" if total_bytes is None else f"{total_bytes / 1e6:.1f} MB"
            rest = f", going on after {here_bytes / 1e6:.1f} MB" if here_bytes else ""
            terms = f" ({published.licence_url})" if published.licence_url else ""
            consent.tell(f"downloading {size} from {published.url}{rest}; licence: {published.licence}{terms}")
            task = progress.add_task(name, total=total_bytes, completed=here_bytes)
            return lambda count: progress.advance(task, count)

        yield announce
