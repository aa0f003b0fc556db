"""What a model costs, part by part: parameters, multiply-adds, activation memory, latency; results and their tables.

One MAC is one multiply-add of a convolution or a product of matrices, bias not counted; it is two FLOPs. Most papers
of the field print MACs and call them FLOPs. Norms, activation functions and additions are no MACs.

``stages.profile`` fills these in for a recipe, ``stages.profile_graph`` for an ONNX graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONVENTION = (
    "One MAC is one multiply-add of a convolution or matrix product, and two FLOPs; bias, norms, activation functions "
    "and additions are not counted. Papers of this field mostly print MACs under the name FLOPs."
)
# How the products that make up MACs are told apart; "product" is of two activations, as in attention.
KINDS = ("convolution", "linear", "product")
ENCODER, PROMPTS, DECODER = PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one pass, medians over runs. cpu_ms: processor time of all threads, which other programs on the
    machine disturb less than wall-clock time (``median_ms``).
    """

    median_ms: float
    min_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a network at one input size, float32.

    parameters: elements. macs: by kind (``KINDS``). activation_bytes: of all tensors that operators write, views and
    weights left out. peak_bytes: the most that are alive at one time while it runs, its inputs among them. Attention is
    counted as written out; a fused kernel keeps its logits to itself. latency: None where it was not asked for.
    """

    name: str
    parameters: int
    macs: Mapping[str, int]
    activation_bytes: int
    peak_bytes: int
    latency: Latency | None = None

    @property
    def total_macs(self) -> int:
        return sum(self.macs.values())

    @property
    def macs_per_byte(self) -> float:
        """Arithmetic intensity: MACs for each byte of float32 weights and of activations, each counted once."""
        moved = 4 * self.parameters + self.activation_bytes
        return self.total_macs / moved if moved else 0.0


@dataclass(frozen=True, slots=True)
class Layer:
    """One module's own work. kind: its class."""

    name: str
    kind: str
    parameters: int
    macs: int


@dataclass(frozen=True, slots=True)
class Missed:
    """MACs that a counter leaves out, and why."""

    what: str
    macs: int
    why: str


@dataclass(frozen=True, slots=True)
class Check:
    """Another counter on the same pass. macs: what it says. missed: what it is known to leave out.

    unexplained: our MACs less its, less what it misses; 0 where the two agree.
    """

    part: str
    counter: str
    macs: int
    missed: tuple[Missed, ...]
    unexplained: int


@dataclass(frozen=True, slots=True)
class Run:
    """What latency and memory depend on. rss_mb: resident memory of a fresh process with the model built, and
    peak_rss_mb: the most it took for one image and its prompts; 10^6 bytes. load: runnable processes on the machine,
    averaged over the minute before, ours among them.
    """

    machine: str
    threads: int
    runs: int
    warmup: int
    rss_mb: float
    peak_rss_mb: float
    load: float


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """One recipe at one size. batch: images of the encoder, and prompts of the decoder, each of ``points`` points.

    parts: the encoder as published, and the prompt encoder and mask decoder as exported (which embeds a mask input
    whether one is given or not). stages: of the encoder. unused: parameters that the encoder does not read in a pass:
    classifiers it was trained with, tables that it keeps in another form. exported_macs, exported_parameters: of the
    encoder as it is exported, its branches merged. counted_on: "meta", where no weight takes memory, or "cpu".
    weights: whose the latency is, "random" or a file; "none" without one. published_params_m, published_macs_g: from
    the recipe, None where its authors print none or the size is another.
    """

    recipe: str
    family: str
    image_size: int
    batch: int
    points: int
    parts: tuple[Part, ...]
    stages: tuple[Part, ...]
    top: tuple[Layer, ...]
    unused: int
    exported_parameters: int
    exported_macs: int
    counted_on: str
    weights: str
    checks: tuple[Check, ...] = ()
    run: Run | None = None
    published_params_m: float | None = None
    published_macs_g: float | None = None

    @property
    def encoder(self) -> Part:
        return self.parts[0]

    @property
    def parameters(self) -> int:
        """Of the whole network, those that are never read included: what a checkpoint holds."""
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        return sum(part.total_macs for part in self.parts)

    @property
    def latency_ms(self) -> float | None:
        """Encoder and decoder, one after the other."""
        times = [part.latency.median_ms for part in self.parts if part.latency is not None]
        return sum(times) if times else None

    @property
    def cpu_ms(self) -> float | None:
        times = [part.latency.cpu_ms for part in self.parts if part.latency is not None]
        return sum(times) if times else None


@dataclass(frozen=True, slots=True)
class GraphProfile:
    """One ONNX graph. parameters: elements of its float and INT8 constants. macs: by operator.

    activation_bytes: of what its nodes write, in the graph's own types; constants, views and DequantizeLinear left out.
    peak_bytes: the most that are alive at a time in the graph's own order, its inputs among them. moved_bytes: what its
    kernels read and write (``stages.node_work``), weights included. top: its heaviest nodes; kind: their operator.
    """

    file: str
    nodes: int
    parameters: int
    macs: Mapping[str, int]
    activation_bytes: int
    peak_bytes: int
    moved_bytes: int
    top: tuple[Layer, ...]

    @property
    def total_macs(self) -> int:
        return sum(self.macs.values())

    @property
    def macs_per_byte(self) -> float:
        return self.total_macs / self.moved_bytes if self.moved_bytes else 0.0


# Title, columns, rows.
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def models_table(models: Sequence[ModelProfile]) -> Table:
    """Title, columns and rows: one row for each recipe at each size. Latency and memory only where measured."""
    timed = any(model.run is not None for model in models)
    published = any(m.published_params_m or m.published_macs_g for m in models)
    columns = ["recipe", "px", "batch", "M params", "encoder M", "GMACs", "encoder G", "decoder G"]
    columns += ["published M", "published G"] if published else []
    columns += ["written MB", "peak MB", "MACs/byte"]
    columns += ["encoder ms", "prompts ms", "masks ms", "CPU ms", "RSS MB"] if timed else []
    return _title(models), tuple(columns), [_model_row(model, published, timed) for model in models]


def _title(models: Sequence[ModelProfile]) -> str:
    points = next((str(model.points) for model in models), "2")
    words = f"float32, prompts of {points} points; written, peak and MACs/byte: of the encoder"
    run = next((model.run for model in models if model.run is not None), None)
    if run is None:
        return words
    return f"{words}; median of {run.runs} runs, {run.threads} threads, {run.machine}"


def _model_row(model: ModelProfile, published: bool, timed: bool) -> tuple[str, ...]:
    encoder = model.encoder
    decoder = sum(part.total_macs for part in model.parts[1:])
    row = [model.recipe, str(model.image_size), str(model.batch), _mega(model.parameters), _mega(encoder.parameters)]
    row += [_giga(model.macs), _giga(encoder.total_macs), _giga(decoder)]
    row += [_figure(model.published_params_m), _figure(model.published_macs_g)] if published else []
    row += [_mb(encoder.activation_bytes), _mb(encoder.peak_bytes), f"{encoder.macs_per_byte:.1f}"]
    if timed:
        row += [_ms(part.latency) for part in model.parts]
        row += [_figure(model.cpu_ms), _figure(model.run.peak_rss_mb if model.run is not None else None)]
    return tuple(row)


def parts_table(model: ModelProfile) -> Table:
    """The three parts, and between them the stages of the encoder."""
    timed = model.run is not None
    columns = ("part", "M params", "GMACs", "%", *KINDS, "written MB", "peak MB", "MACs/byte")
    rows = []
    for part in (model.encoder, *model.stages, *model.parts[1:]):
        name = part.name if part in model.parts else f"  {part.name}"
        share = 100 * part.total_macs / model.macs if model.macs else 0.0
        kinds = [_giga(part.macs.get(kind, 0)) for kind in KINDS]
        row = [name, _mega(part.parameters), _giga(part.total_macs), f"{share:.1f}", *kinds]
        row += [_mb(part.activation_bytes), _mb(part.peak_bytes), f"{part.macs_per_byte:.1f}"]
        rows.append((*row, *([_ms(part.latency)] if timed else [])))
    return _heading(model), (*columns, *(["ms"] if timed else [])), rows


def _heading(model: ModelProfile) -> str:
    words = f"{model.recipe} at {model.image_size} px, batch {model.batch}; convolution, linear, product: GMACs"
    if model.unused:
        words += f"; {model.unused / 1e6:.2f} M of the parameters are not read in a pass"
    if model.exported_macs != model.encoder.total_macs or model.exported_parameters != model.encoder.parameters:
        words += (
            f"; encoder as exported {model.exported_parameters / 1e6:.2f} M and {model.exported_macs / 1e9:.2f} GMACs"
        )
    return words


def top_table(name: str, top: Sequence[Layer], total: int) -> Table:
    """The heaviest layers of a model, or nodes of a graph. total: MACs of all of them."""
    rows = [
        (layer.name, layer.kind, _mega(layer.parameters), _giga(layer.macs), f"{100 * layer.macs / total:.1f}")
        for layer in top
    ]
    return f"{name}: its heaviest layers", ("layer", "kind", "M params", "GMACs", "%"), rows


def checks_table(models: Sequence[ModelProfile]) -> Table:
    """Other counters beside ours; what they leave out, and what stays unexplained."""
    rows = []
    for model in models:
        ours = {ENCODER: model.encoder.total_macs, "decoder": sum(part.total_macs for part in model.parts[1:])}
        for check in model.checks:
            why = "; ".join(f"{missed.macs / 1e9:.3f} {missed.what}: {missed.why}" for missed in check.missed)
            gap = f"{check.unexplained / 1e9:.3f}"
            name = f"{model.recipe} {check.part}"
            rows.append((name, check.counter, f"{check.macs / 1e9:.3f}", f"{ours[check.part] / 1e9:.3f}", why, gap))
    return "other counters, GMACs", ("part", "counter", "says", "ours", "it leaves out", "unexplained"), rows


def graphs_table(graphs: Sequence[GraphProfile]) -> Table:
    rows = [
        (
            graph.file,
            str(graph.nodes),
            _mega(graph.parameters),
            f"{graph.total_macs / 1e9:.3f}",
            ", ".join(f"{op} {macs / 1e9:.3f}" for op, macs in graph.macs.items() if macs) or "–",
            _mb(graph.activation_bytes),
            _mb(graph.peak_bytes),
            f"{graph.macs_per_byte:.1f}",
        )
        for graph in graphs
    ]
    columns = ("graph", "nodes", "M params", "GMACs", "by operator", "written MB", "peak MB", "MACs/byte moved")
    return "ONNX graphs, in their own types; one prompt of 2 points", columns, rows


def markdown(tables: Sequence[Table]) -> str:
    """Tables as one Markdown text, with the convention under them."""
    blocks = []
    for title, columns, rows in tables:
        lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|').strip() for cell in row)} |" for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, CONVENTION]) + "\n"


def _mega(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _giga(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _ms(latency: Latency | None) -> str:
    return "–" if latency is None else f"{latency.median_ms:.1f}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
