"""search without build: the stages of a build up to its search, in the build's own work folder, so that both share."""

from __future__ import annotations

from pathlib import Path

from edgesam_deploy.stages.build import BuildOptions, job, prepare, source_images
from edgesam_deploy.stages.cache import StageCache, exclusive
from edgesam_deploy.stages.precision import Progress, calibrated, searched
from edgesam_deploy.stages.tune_result import TuneResult


def find_int8(options: BuildOptions, progress: Progress) -> tuple[TuneResult, Path]:
    """(what the search of a build found, the folder with its ``search.json`` and ``frontier.svg``)."""
    images = source_images(options)
    work = options.output.parent / ".stages" / options.output.name
    with exclusive(work):
        cache = StageCache(work, options.force)
        simplified, _ = prepare(options, images, cache, progress)
        todo = job(options, images, cache, progress)
        return searched(todo, *calibrated(todo, simplified)), cache.folder / "search"
