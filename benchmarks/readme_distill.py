"""What ``readme.py`` tells of distillation: its promises, tried, and what it takes; nothing that was not yet run."""

from __future__ import annotations

from typing import Any

from result_tables import RESULTS, load, of_earlier, table

FOLDER = RESULTS / "distill"
WORK = {"pass": "teacher's pass", "cached": "updates from the cache", "fly": "updates, teacher beside"}


# Of the part that reads every image.
WHOLE = {"cached": "all images: teacher's pass, then an epoch from the cache", "fly": "an epoch, teacher beside"}
KINDS = {"before_updates": "peak of the pass", "peak": "peak", "steady": "steady"}


def read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    return load(path) if path.is_file() else {}


def proof() -> list[str]:
    """Each promise, and what became of it."""
    found = read("proof")
    if not {"resume", "processes", "cache"} <= found.keys():
        return []
    killed, two, cache = found["resume"], found["processes"], found["cache"]
    kills = "; ".join(f"in the {kill['during']}, {kill['on_record']} of {kill['of']} done" for kill in killed["kills"])
    apart, at_once = two["differences"]["2 at a time"], two["differences"]["4 at once"]
    digests = list(two["student_sha256"].values())
    rows = [
        [
            f"killed at three random moments ({kills}) and started again: the same student, byte for byte",
            _verdict(killed),
            f"sha256 {killed['student_sha256']['let alone'][:12]}… and {killed['student_sha256']['killed'][:12]}…",
        ],
        [
            f"two processes (gloo) give one's losses to {two['allowed']:.0e} over {two['updates']} updates",
            _verdict(two),
            f"largest difference {apart['largest']:.1e}, students {_equal(digests[0], digests[1])}; one process that "
            f"computes each update's {two['images_per_update']} images at once rounds otherwise: within "
            f"{two['allowed']:.0e} for {at_once['agreed']} updates, {at_once['largest']:.1e} over all",
        ],
        [
            f"a byte of one of {cache['shards']} shards of the cache changed: named, computed again, the same student",
            _verdict(cache),
            f"“{cache['said'][0]}”; students {_equal(*cache['student_sha256'].values())}",
        ],
    ]
    origin = killed["origin"]
    return [
        f"**What `sam-export distill` promises**, tried on {origin['images']} photographs at {origin['image_size']} "
        f"pixels on {origin['machine']}. Source: `benchmarks/results/distill/proof.json`, `distill_proof.py`.",
        "",
        *table(["promise", "holds", "seen"], rows),
    ]


def _verdict(section: dict[str, Any]) -> str:
    return "yes" if section["holds"] else "**no**"


def _equal(one: str, other: str) -> str:
    return "equal byte for byte" if one == other else "not equal"


def cross_check() -> list[str]:
    """The evaluator and an independent one, of the shipped bundle."""
    found = read("cross-check")
    if not found:
        return []
    (rule,) = (row for row in found["eval"] if row["answer"] == "by predicted IoU")
    weights = found["checkpoint_sha256"]
    earlier = of_earlier("The model", weights=weights)
    return [
        f"**`sam-export eval` beside pycocotools**, NanoSAM's rule (true box, of all masks that with the highest "
        f"predicted IoU) on {found['masks']} objects of coco-subset/val, bundle `{found['bundle']}` of weights "
        f"{weights[:8]}…: {rule['miou']:.9f} and {found['pycocotools']:.9f}, {found['difference']:.1e} apart. "
        f"{earlier}Source: `benchmarks/results/distill/cross-check.json`, `eval_cross_check.py`.",
    ]


def scale() -> list[str]:
    """Memory at two sizes, speed, and what it would take elsewhere."""
    found = read("scale")
    if not {*WORK, "whole", "listing", "loading", "projection", "epoch_seconds"} <= found.keys():
        return []
    return [*_memory(found), "", *_listing(found), "", *_speed(found), "", *_projection(found)]


def _memory(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, title in WORK.items():
        at, ratio = found[name]["at"], found[name]["ratio"]
        for kind in ("peak", "steady"):
            values = [f"{one[f'{kind}_mb']:.0f} ({one[f'workers_{kind}_mb']:.0f})" for one in at.values()]
            rows.append([title, kind, *values, f"{100 * (ratio[kind] - 1):+.1f} %"])
    for way, title in WHOLE.items():
        at, ratio = found["whole"][way]["at"], found["whole"][way]["ratio"]
        for kind, name in KINDS.items():
            if (way, kind) != ("fly", "before_updates"):
                values = [f"{one[f'{kind}_mb']:.0f}" for one in at.values()]
                rows.append([title, name, *values, f"{100 * (ratio[kind] - 1):+.1f} %"])
    origin, sizes = found["cached"]["origin"], [f"{int(size):,} images" for size in found["cached"]["at"]]
    return [
        f"**Memory of `sam-export distill` by the number of images**, MB resident, of them loader processes in "
        f"brackets; teacher `{origin['teacher']}`, student `{origin['student']}`, equal work at both; and with every "
        "image read once, at 128 pixels, of small copies. "
        f"{of_earlier('The teacher', weights=origin['teacher_weights_sha256'])}The images are "
        f"{origin['images_linked']}, linked under new names until there are so many, and their shards likewise where "
        "the work is equal. "
        "Source: `benchmarks/results/distill/scale.json`, `distill_scale.py`.",
        "",
        *table(["work", "", *sizes, "more"], rows),
    ]


def _listing(found: dict[str, Any]) -> list[str]:
    rows = found["listing"]["rows"]
    told = [f"{r['images']:,} in a {r['form']} {r['seconds']:.2f} s and {r['memory_mb']:.0f} MB" for r in rows]
    return [f"Finding the images takes, at most: {'; '.join(told)}."]


def _speed(found: dict[str, Any]) -> list[str]:
    epoch, origin = found["epoch_seconds"], found["cached"]["origin"]
    small = {name: next(iter(found[name]["at"].values()))["images_per_second"] for name in WORK}
    told = ", ".join(f"{WORK[name]} {small[name]:.2f} images/s ({epoch[name]:.0f} s)" for name in WORK)
    loading = found["loading"]
    loaded = [f"{what} ({one['mean_megapixels']:.1f} megapixels) {one['decoded_per_core_s']:.0f} decoded, "
              f"{one['ready_per_core_s']:.0f} decoded and resized" for what, one in loading.items()
              if what != "origin"]  # fmt: skip
    return [
        f"On {origin['machine']}, {origin['threads']} threads: {told}; in brackets one pass over {epoch['images']:,} "
        f"images. A core loads, a second: {'; '.join(loaded)}."
    ]


def _projection(found: dict[str, Any]) -> list[str]:
    made = found["projection"]
    header = ["images", "teacher → student", "GPU", "teacher's pass, hours", "one epoch, hours", "cores to feed it"]
    rows = [
        [
            f"{row['images']:,}",
            f"{row['teacher']} → {row['student']}",
            row["device"],
            f"{row['teacher_hours']:.3g} ({row['teacher_bound']})",
            f"{row['epoch_hours']:.3g} ({row['epoch_bound']}, {row['cores']} cores)",
            f"{row['cores_to_feed']:.0f}",
            f"{row['cache_gb']:,.0f}",
        ]
        for row in sorted(made["rows"], key=lambda row: row["images"])
    ]
    return [
        "**What it would take elsewhere**: computed, not measured. In brackets: what sets the pace, the GPU or loading "
        f"images. Taken for granted: {'; '.join(made['assumptions'])}. The arithmetic of each row is in the file, for "
        "the first:",
        "",
        *(f"- {line}" for line in made["rows"][0]["arithmetic"]),
        "",
        *table([*header, "cache GB"], rows),
    ]
