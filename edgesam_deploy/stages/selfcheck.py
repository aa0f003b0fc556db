"""One command for "does it work on this machine, and how fast": what people with a device can run and send.

Every bundle is compiled where it is a kit and the machine can, verified against the PyTorch model's recorded answers,
and measured. What fails is recorded with its reason, and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgesam_deploy.bundle import Bundle, load_bundle
from edgesam_deploy.device import Machine
from edgesam_deploy.errors import EdgeSAMError
from edgesam_deploy.measure.accuracy import AccuracyResult
from edgesam_deploy.measure.bench import BenchOptions, BenchResult, bench
from edgesam_deploy.measure.layers import LayerTime, layer_times
from edgesam_deploy.recipe import PACKAGE
from edgesam_deploy.stages.compile import CompileOptions
from edgesam_deploy.stages.finish import FinishResult, finish
from edgesam_deploy.stages.verify import verify
from edgesam_deploy.target import load_target

SCHEMA = 1
PHOTO = PACKAGE / "assets" / "photos" / "verify" / "duck.jpg"
# What a result depends on besides the machine; those that are not installed are left out.
PACKAGES = (
    "edgesam-deploy",
    "numpy",
    "onnxruntime",
    "openvino",
    "pillow",
    "tensorrt",
    "tensorrt-rtx",
    "pycuda",
    "torch",
)
LAYER_RUNS = 20


@dataclass(frozen=True, slots=True)
class BundleCheck:
    """What was found about one bundle. error: why it went no further, None if it went to the end.

    compiled: of a kit that was compiled here. layers: time per layer by graph, longest first, of engines.
    """

    bundle: str
    recipe: str
    precision: str
    target: str
    compiled: FinishResult | None
    accuracy: AccuracyResult | None
    min_mask_iou: float | None
    passed: bool | None
    bench: BenchResult | None
    layers: dict[str, list[LayerTime]] | None
    error: str | None


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """machine, target, why: as ``device`` sees them. packages: versions."""

    machine: Machine
    target: str
    why: str
    packages: dict[str, str]
    bundles: tuple[BundleCheck, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Bundles that did not go to the end."""
        return tuple(b.bundle for b in self.bundles if b.error is not None)

    @property
    def missed(self) -> tuple[str, ...]:
        """Bundles below their threshold."""
        return tuple(b.bundle for b in self.bundles if b.passed is False)


def check_bundle(given: Path, options: BenchOptions, say: Callable[[str], None]) -> BundleCheck:
    """Compile if need be, verify, measure. say: told what is going on."""
    path = given.resolve()
    facts = BundleCheck(path.name, "", "", "", None, None, None, None, None, None, None)
    try:
        bundle = load_bundle(path)
        threshold = float(bundle.manifest["min_mask_iou"])
        facts = replace(
            facts, recipe=bundle.recipe, precision=bundle.precision, target=bundle.target, min_mask_iou=threshold
        )
        if not bundle.compiled:
            say(f"compiling {path.name}")
            target = load_target(bundle.target)
            done = finish(bundle, target, CompileOptions(workspace_mb=target.workspace_mb), audited=True)
            # The builder's log is long, and said in the audit.
            engines = {name: replace(e, log=()) for name, e in done.engines.items()}
            facts = replace(facts, compiled=replace(done, engines=engines))
            bundle = load_bundle(path)
        say(f"verifying {path.name}")
        accuracy = verify(bundle, threads=options.threads)
        facts = replace(facts, accuracy=accuracy, passed=accuracy.mask_iou.mean >= threshold)
        say(f"measuring {path.name}")
        measured = bench(bundle, PHOTO, options)
        facts = replace(facts, bench=replace(measured, parts=replace(measured.parts, bundle=path.name)))
        return replace(facts, layers=_layers(bundle))
    except EdgeSAMError as error:
        return replace(facts, error=str(error).replace(str(path), path.name))


def packages() -> dict[str, str]:
    """Versions of what is installed of ``PACKAGES``."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_json(result: SelfCheck) -> dict[str, Any]:
    """Plain values, without the single queries of engines and without any path of the machine."""
    bundles = []
    for check in result.bundles:
        if check.bench is not None and check.bench.engines is not None:
            engines = {name: replace(e, samples=()) for name, e in check.bench.engines.items()}
            check = replace(check, bench=replace(check.bench, engines=engines))
        bundles.append(_nameless(asdict(check)))
    return {"schema": SCHEMA, **asdict(result), "bundles": bundles}


def report(result: SelfCheck) -> str:
    """The same for people, as Markdown."""
    machine = result.machine
    facts = [machine.model, machine.os, machine.jetpack and f"JetPack {machine.jetpack}"]
    facts += [", ".join(machine.gpu_names), machine.driver and f"driver for CUDA {machine.driver}"]
    lines = [
        "# sam-export selfcheck",
        "",
        f"- machine: {'; '.join(f for f in facts if f)}",
        f"- target: {result.target} ({result.why})",
        f"- packages: {', '.join(f'{k} {v}' for k, v in result.packages.items())}",
        "",
        "| bundle | mask IoU | threshold | encoder ms | decoder ms | prediction ms | frames/s | W | mJ/prediction |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(check) for check in result.bundles),
        "",
    ]
    for check in result.bundles:
        if check.error is not None:
            lines.append(f"- **{check.bundle}** went no further: {check.error}")
        for name, times in (check.layers or {}).items():
            longest = ", ".join(f"{t.name} {t.mean_ms:.3f} ms ({t.share:.0%})" for t in times[:5])
            lines.append(f"- {check.bundle}, {name}, longest layers: {longest}")
        if check.compiled is not None:
            for name, audit in check.compiled.audits.items():
                nodes = ", ".join(f"{count} {kind}" for kind, count in audit.nodes.items())
                lines.append(f"- {check.bundle}, {name}: {nodes}; {len(audit.mismatched)} not as meant")
    return "\n".join(lines) + "\n"


def _row(check: BundleCheck) -> str:
    iou = f"{check.accuracy.mask_iou.mean:.4f}" if check.accuracy else "–"
    threshold = "–" if check.min_mask_iou is None else f"{check.min_mask_iou:g}{'' if check.passed else ' missed'}"
    cells = [check.bundle, iou, threshold if check.accuracy else "–"]
    if check.bench is None:
        return f"| {' | '.join(cells)} | – | – | – | – | – | – |"
    parts, power = check.bench.parts.parts, check.bench.power
    medians = {name: parts[name].median_ms for name in ("encoder", "decoder", "total")}
    if check.bench.engines is not None:
        medians |= {name: e.latency.median_ms for name, e in check.bench.engines.items()}
    cells += [f"{v:.2f}" for v in medians.values()] + [f"{check.bench.camera_fps:.1f}"]
    cells.append("–" if power is None else f"{power.total_mean_w:.1f}")
    energy = None if power is None else power.energy_per_inference_mj
    cells.append("–" if energy is None else f"{energy:.0f}")
    return f"| {' | '.join(cells)} |"


def _layers(bundle: Bundle) -> dict[str, list[LayerTime]] | None:
    """Times per layer of both engines, longest first; None where the backend runs no engines."""
    from edgesam_deploy.images import read_image
    from edgesam_deploy.prompts import check_prompts
    from edgesam_deploy.runtime.tensorrt import TensorRTSession

    image = read_image(PHOTO)
    height, width = image.shape[:2]
    with bundle.open() as predictor:
        encoder, decoder = predictor.encoder, predictor.decoder
        if not isinstance(encoder, TensorRTSession) or not isinstance(decoder, TensorRTSession):
            return None
        predictor.set_image(image)
        prompts = check_prompts([[width / 2, height / 2]], [1], None, (height, width))
        feeds = {name: np.asarray(value) for name, value in predictor.decoder_feeds(prompts).items()}
        samples = {
            "encoder": encoder.layer_times(predictor.preprocess(image), LAYER_RUNS),
            "decoder": decoder.layer_times(feeds, LAYER_RUNS),
        }
    times = {name: layer_times(s) for name, s in samples.items()}
    return {name: sorted(t, key=lambda layer: -layer.mean_ms) for name, t in times.items()}


def _nameless(value: Any) -> Any:
    """Paths by their last name: a result that is sent around tells nothing of its machine's folders."""
    if isinstance(value, dict):
        return {k: _nameless(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_nameless(v) for v in value]
    return value.name if isinstance(value, Path) else value


def build_all(
    recipe: str, target: str, precisions: Sequence[str], folder: Path, say: Callable[[str], None]
) -> list[Path]:
    """The recipe built for the target in every precision, below ``folder``. Needs the export extra."""
    from edgesam_deploy.recipe import load_recipe
    from edgesam_deploy.stages.build import BuildOptions, build

    paths = []
    for precision in precisions:
        path = folder / f"{recipe}-{precision}"
        say(f"building {path.name}")
        build(BuildOptions(load_recipe(recipe), load_target(target), precision, path))
        paths.append(path)
    return paths
