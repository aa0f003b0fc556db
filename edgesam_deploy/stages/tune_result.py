"""What a search found, in words, as a file and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import GraphError, ThresholdError
from edgesam_deploy.files import write_bytes, write_json
from edgesam_deploy.measure.explain_search import search_section
from edgesam_deploy.stages.search import PAYS, Point, SearchResult

RESULT, PICTURE = "search.json", "frontier.svg"
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.axis{stroke:#333}.line{fill:none;stroke:#1769aa}.limit{stroke:#b00020;"
    "stroke-dasharray:4 3}.tried{fill:#bbb}.point{fill:#1769aa}.chosen{fill:none;stroke:#b00020;stroke-width:2}"
)


@dataclass(frozen=True, slots=True)
class TuneResult:
    """int8: INT8 nodes by graph, of the chosen assignment (none for "keep" and "unmet"). block_of: node → block.
    layers: how many each block holds. minutes: all measurements, those of earlier runs too. rest: the float type of all
    else. images: how many masks were measured on.
    """

    int8: Mapping[str, tuple[str, ...]]
    search: SearchResult
    block_of: Mapping[str, str]
    layers: Mapping[str, int]
    minutes: float
    min_iou: float
    cost_source: str
    rest: str
    images: int

    def summary(self) -> dict[str, Any]:
        """The search without the nodes, as JSON."""
        return {
            **_plain(self.search),
            "layers": dict(self.layers),
            "minutes": self.minutes,
            "min_iou": self.min_iou,
            "cost_source": self.cost_source,
            "rest_type": self.rest,
            "images": self.images,
        }

    def sentence(self) -> str:
        """The verdict in words, with its numbers."""
        found, rest = self.search, self.search.rest
        if found.verdict == "int8" and found.chosen is not None:
            return (
                f"INT8 in {len(found.chosen.int8)} of {len(self.layers)} blocks: {found.chosen.cost_ms:.3f} ms, "
                f"{rest.cost_ms / found.chosen.cost_ms:.2f}x as fast as {self.rest}, mask IoU "
                f"{found.chosen.mask_iou:.4f} ({self.cost_source})"
            )
        if found.verdict == "keep":
            fastest = min(found.points, key=lambda p: p.cost_ms)
            return (
                f"keep {self.rest}: the fastest assignment of INT8 takes {fastest.cost_ms:.3f} ms, {self.rest} "
                f"{rest.cost_ms:.3f} ms; {rest.cost_ms / fastest.cost_ms:.2f}x, less than the {PAYS:g}x that INT8 has "
                f"to gain ({self.cost_source})"
            )
        closest = found.closest or rest
        return (
            f"no assignment of INT8 that pays reaches mask IoU {self.min_iou:g}: the closest has "
            f"{closest.mask_iou:.4f} at {closest.cost_ms:.3f} ms ({self.rest}: {rest.mask_iou:.4f} at "
            f"{rest.cost_ms:.3f} ms); held back by "
            + ", ".join(f"{b} ({found.alone[b]:.4f})" for b in found.holding_back if b in found.alone)
        )

    def demand(self) -> None:
        """Raise ThresholdError unless the search found an assignment, be it the one without INT8."""
        if self.search.verdict == "unmet":
            raise ThresholdError(f"{self.sentence()}. Ask for less (--min-iou), or build {self.rest}")


def save_tune(result: TuneResult, folder: Path) -> None:
    """Write ``search.json`` and ``frontier.svg`` into a folder."""
    write_json(folder / RESULT, _plain(result))
    write_bytes(folder / PICTURE, _picture(result.summary()).encode())


def load_tune(path: Path) -> TuneResult:
    """Read what ``tune`` wrote into the folder ``path``. Raises GraphError if it is not that."""
    try:
        raw = json.loads((path / RESULT).read_text(encoding="utf-8"))
        searched = raw.pop("search")
        for name in ("chosen", "rest", "closest"):
            searched[name] = None if searched[name] is None else _point(searched[name])
        for name in ("frontier", "points"):
            searched[name] = tuple(_point(entry) for entry in searched[name])
        searched["holding_back"] = tuple(searched["holding_back"])
        raw["int8"] = {graph: tuple(nodes) for graph, nodes in raw["int8"].items()}
        return TuneResult(search=SearchResult(**searched), **raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise GraphError(f"{path} does not hold a search: {error}. Search again") from error


def _picture(summary: Mapping[str, Any]) -> str:
    """The chart of ``measure.explain_search`` as a file of its own."""
    section = search_section(summary)
    chart = section[section.index("<svg") : section.index("</svg>") + len("</svg>")]
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="960" height="420" '
    return chart.replace("<svg ", head, 1).replace(
        ">", f'><style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>', 1
    )


def _point(entry: Mapping[str, Any]) -> Point:
    return Point(frozenset(entry["int8"]), float(entry["mask_iou"]), float(entry["cost_ms"]))


def _plain(result: TuneResult | SearchResult) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, frozenset):
            return sorted(value)
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(asdict(result))
