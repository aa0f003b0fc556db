"""One table of models, precisions and backends: size, work, memory, latency, mask quality and agreement.

    python benchmarks/survey.py --build                [--only LABEL ...]
    python benchmarks/survey.py --quality --data DIR   [--only LABEL ...] [--workers 2]
    python benchmarks/survey.py --speed                [--only LABEL ...] [--threads 2] [--runs 21]

Each phase goes on where it was stopped, leaves out what is up to date (--again does not), and writes its part of
benchmarks/results/survey/survey.json, which ``readme.py`` makes tables and charts of. survey.toml lists the models.

--build makes the bundles by `sam-export build`, into engines/.survey, and counts parameters and multiply-adds.
--quality is `sam-export eval` on coco-subset/val in DIR, with boxes tight around the true masks and one click, against
the network's own masks in PyTorch FP32, and again against its teacher's where it has one; the records of all masks and
a picture of the worst stay in engines/.survey. --speed times encoder and decoder, the ways of a model in turn, and the
peak memory of a process that runs one of them once: with nothing else at work.

--limit evaluates the first images only, to try it out: it needs another --output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from survey_entries import BF16, TORCH, Entry, Way, load_entries, ways_here

from edgesam_deploy.device import cpu_features
from edgesam_deploy.errors import BundleError, EdgeSAMError, InputError
from edgesam_deploy.files import write_json
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.measure.memory import peak_rss_mb
from edgesam_deploy.recipe import PACKAGE, load_recipe
from edgesam_deploy.stages.evaluate import Model

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "results" / "survey" / "survey.json"
WORK = HERE.parent / "engines" / ".survey"
PHOTO = PACKAGE / "assets" / "photos" / "verify" / "dog.jpg"
WARMUP = 2
ANNOTATIONS = Path("coco-subset") / "instances_val.json"
# Of a row: what --quality and --speed fill in.
MEASURED = ("quality", "teacher", "latency", "peak_rss_mb")


def main() -> None:
    options = parse()
    if options.peak:
        label, precision, backend = options.peak
        (entry,) = (e for e in load_entries(options.entries, options.work) if e.label == label)
        print_peak(entry, Way(precision, backend), options.threads)
        return
    try:
        entries = with_weights(chosen(options))
    except EdgeSAMError as error:
        sys.exit(f"error: {error}")
    phases = {"build": build, "quality": quality, "speed": speed}
    failed = []
    for name, phase in phases.items():
        for entry in entries if getattr(options, name) else ():
            try:
                phase(entry, options)
            except (EdgeSAMError, RuntimeError, subprocess.CalledProcessError) as error:
                failed.append(f"{entry.label}: --{name}: {error}")
                say(f"failed: {failed[-1]}")
    if failed:
        sys.exit(f"{len(failed)} failed, the last: {failed[-1]}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for phase in ("build", "quality", "speed"):
        parser.add_argument(f"--{phase}", action="store_true")
    parser.add_argument("--entries", type=Path, default=HERE / "survey.toml", help="default: survey.toml")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="of the entries")
    parser.add_argument("--data", type=Path, help="the folder of coco-subset, for --quality")
    parser.add_argument("--limit", type=int, help="images, to try it out")
    parser.add_argument("--workers", type=int, default=1, help="processes of --quality")
    parser.add_argument("--threads", type=int, default=2, help="of --speed")
    parser.add_argument("--runs", type=int, default=21, help="of --speed")
    parser.add_argument("--again", action="store_true", help="also what is up to date")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of bundles and evaluations")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quality and options.data is None:
        parser.error("--quality needs --data DIR")
    if options.limit is not None and options.output.resolve() == OUTPUT:
        parser.error("--limit measures a part, which is no result: give another --output")
    if options.runs < 2:
        parser.error("--runs must be at least 2: quartiles need them")
    return options


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def chosen(options: argparse.Namespace) -> list[Entry]:
    entries = load_entries(options.entries, options.work)
    labels = [entry.label for entry in entries]
    if unknown := sorted(set(options.only or ()) - set(labels)):
        raise InputError(f"{options.entries} has no entry {', '.join(unknown)}, it has {', '.join(labels)}")
    return [entry for entry in entries if options.only is None or entry.label in options.only]


def with_weights(entries: Sequence[Entry]) -> list[Entry]:
    """Those that can be measured; of each other one a line says why not."""
    found = []
    for entry in entries:
        try:
            entry.weights()
            found.append(entry)
        except EdgeSAMError as error:
            say(f"{entry.label}: left out: {error}")
    return found


@contextmanager
def kept(entry: Entry, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The entry's part of the results, read now and written whole afterwards; those of entries no longer listed go."""
    labels = [e.label for e in load_entries(options.entries, options.work)]
    found = read(options.output)
    mine = found.setdefault(entry.label, {})
    yield mine
    _, left_out = ways_here()
    result = {
        "command": "python benchmarks/survey.py --build --quality --speed --data DIR",
        "left_out": left_out,
        "entries": {label: found[label] for label in labels if label in found},
    }
    write_json(options.output, result)


def read(path: Path) -> dict[str, Any]:
    """Label -> what is known of it."""
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else {}
    return entries


def rows_of(entry: Entry, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Raises BundleError where the entry was not built."""
    rows: list[dict[str, Any]] = read(options.output).get(entry.label, {}).get("rows", [])
    if not rows:
        raise BundleError(f"{options.output} has no bundles of {entry.label}: run --build first")
    for row in rows:
        if entry.model(way_of(row)).origin() != row["origin"]:
            raise BundleError(f"{entry.label}, {way_of(row).name}, is not what was built: run --build again")
    return rows


def way_of(row: Mapping[str, Any]) -> Way:
    return Way(row["precision"], row["backend"])


def build(entry: Entry, options: argparse.Namespace) -> None:
    """All bundles, the counts, and the entry's rows: with what was measured, where they are what it was measured of."""
    from survey_bundles import facts, make_bundle, make_random, row

    recipe = load_recipe(entry.recipe)
    make_random(entry)
    ways = entry.measured()
    for name in dict.fromkeys(way.bundle for way in ways if way.bundle is not None):
        say(f"{entry.label}: {name}")
        make_bundle(entry, recipe, name, options.again)
    # A build leaves bfloat16 where it gains no time: then it is no way of its own.
    rows = [r for r in (row(entry, w) for w in ways) if r["precision"] != BF16 or BF16 in r["origin"]["runs_on"]]
    with kept(entry, options) as mine:
        before = {way_of(r): r for r in mine.get("rows", [])}
        for new in rows:
            old = before.get(way_of(new), {})
            same = old.get("origin") == new["origin"]
            new |= {name: old.get(name) if same else None for name in MEASURED}
        mine |= {**facts(entry, recipe), "rows": rows}


def quality(entry: Entry, options: argparse.Namespace) -> None:
    """mIoU with the truth and agreement of every row; nothing of random weights."""
    from survey_eval import evaluate, is_current

    from edgesam_deploy.measure.datasets import DatasetOptions, open_dataset

    if entry.random_weights:
        return
    rows = rows_of(entry, options)
    dataset = f"coco:{options.data.resolve() / ANNOTATIONS}"
    images = len(open_dataset(dataset, DatasetOptions(limit=options.limit)).images)
    words = ["--workers", str(options.workers)]
    words += ["--limit", str(options.limit)] if options.limit is not None else []
    teacher = teacher_of(entry)
    for found in rows:
        way, model = way_of(found), entry.model(way_of(found))
        compared: dict[str, Model | None] = {"quality": None if way.backend == TORCH else entry.network()}
        compared |= {"teacher": teacher} if teacher is not None else {}
        for name, against in compared.items():
            if not options.again and is_current(found[name], model, against, images):
                continue
            say(f"{entry.label}, {way.name}: evaluating{' against its teacher' if name == 'teacher' else ''}")
            output = entry.folder / "eval" / f"{way.precision}-{way.backend}-{name}"
            answer = evaluate(model, against, dataset, output, *words)
            with kept(entry, options) as mine:
                (target,) = (r for r in mine["rows"] if way_of(r) == way)
                target[name] = answer


def teacher_of(entry: Entry) -> Model | None:
    """None also where its weights are missing, which a line says."""
    try:
        return entry.teacher_model()
    except EdgeSAMError as error:
        say(f"{entry.label}: not compared with its teacher: {error}")
        return None


def speed(entry: Entry, options: argparse.Namespace) -> None:
    """Latencies of all rows, in turn, and their peak memories."""
    from edgesam_deploy.stages.cache import tool_versions

    rows = rows_of(entry, options)
    tools = {name: tool_versions()[name] for name in ("torch", "onnxruntime", "openvino")}
    how = {"machine": machine(), "features": list(cpu_features() or ()), "threads": options.threads,
           "runs": options.runs, "warmup": WARMUP, "versions": tools}  # fmt: skip
    complete = all(found["latency"] is not None and found["peak_rss_mb"] is not None for found in rows)
    if complete and read(options.output)[entry.label].get("speed") == how and not options.again:
        return
    say(f"{entry.label}: timing {', '.join(way_of(found).name for found in rows)}")
    ways = [way_of(found) for found in rows]
    latencies = timed(entry, ways, options)
    peaks = {way: peak_memory(entry, way, options) for way in ways}
    with kept(entry, options) as mine:
        for found in mine["rows"]:
            way = way_of(found)
            found |= {"latency": latencies[way], "peak_rss_mb": peaks[way]}
        mine["speed"] = how


def timed(entry: Entry, ways: Sequence[Way], options: argparse.Namespace) -> dict[Way, dict[str, dict[str, float]]]:
    """Median and quartiles by way and graph, all ways open at once and in turn."""
    from speed import spread

    from edgesam_deploy.measure.compare import time_graphs

    with ExitStack() as stack:
        opened = {way.name: stack.enter_context(entry.model(way).open(options.threads)) for way in ways}
        samples = time_graphs(opened, read_image(PHOTO), options.runs, WARMUP)
    return {way: {graph: spread(times[way.name]) for graph, times in samples.items()} for way in ways}


def peak_memory(entry: Entry, way: Way, options: argparse.Namespace) -> float:
    """10⁶ bytes, of a fresh process that runs both graphs once."""
    command = [sys.executable, __file__, "--peak", entry.label, way.precision, way.backend]
    command += ["--entries", str(options.entries), "--work", str(options.work), "--threads", str(options.threads)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def print_peak(entry: Entry, way: Way, threads: int) -> None:
    image = read_image(PHOTO)
    height, width = image.shape[:2]
    with entry.model(way).open(threads) as predictor:
        predictor.set_image(image)
        predictor.predict([[width / 2, height / 2]], [1])
    print(peak_rss_mb())


if __name__ == "__main__":
    main()
