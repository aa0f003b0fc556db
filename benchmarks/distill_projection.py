"""How long a distillation would take on hardware that is not here: arithmetic, from counted multiply-adds, the peaks in
engines/*.toml, the share of them that was fitted to published latencies, and what was measured here of decoding.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from edgesam_deploy.contract import Geometry
from edgesam_deploy.measure.efficiency import load_fit
from edgesam_deploy.target import Device, load_target

# (target, device) with the processor cores that load images beside the GPU: the Orin's own, elsewhere 16.
HARDWARE = (
    ("x86-gpu", "H100 SXM 80GB", 16),
    ("rtx", "GeForce RTX 4090", 16),
    ("agx-orin-64gb", "Jetson AGX Orin 64GB", 12),
)
COUNTS = (100_000, 11_000_000)
# Forward, and twice as much backward: for what comes in and for the weights.
TRAINING = 3
ASSUMPTIONS = (
    "one GPU, FP16 or bfloat16 products (--amp) that are summed in FP32, batches that fill it",
    "the share of the peak that TensorRT engines reach (edgesam_deploy/assets/efficiency.json) is reached by the "
    "teacher's pass and by training alike; PyTorch reaches less, so these are the shortest times to expect",
    "memory traffic, the optimizer and validation are not counted",
    "a student's training takes 3 times the multiply-adds of its forward pass",
    "images are JPEGs of SA-1B's size; a core decodes them as fast as one of the machine this was measured on, and "
    "every core loads; loading goes on beside the GPU, so the slower of the two sets the pace",
    "disks deliver what loaders and training ask for",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """teacher_macs, student_macs: of one image in their encoders. geometry: of the embeddings they share."""

    teacher: str
    student: str
    teacher_macs: int
    student_macs: int
    geometry: Geometry

    @property
    def bytes_per_image(self) -> int:
        """Of the cache: float16."""
        return 2 * self.geometry.embedding_channels * self.geometry.embedding_size**2


@dataclass(frozen=True, slots=True)
class Projection:
    """Hours of ``images`` once through the teacher, and of one epoch of the student from the cache.

    cores_to_feed: that the student's epoch would take to be bound by the GPU alone. *_bound: "gpu" or "loading".
    """

    device: str
    teacher: str
    student: str
    images: int
    cores: int
    teacher_hours: float
    teacher_bound: str
    epoch_hours: float
    epoch_bound: str
    cores_to_feed: float
    cache_gb: float
    arithmetic: tuple[str, ...]


def training_peak(device: Device) -> float:
    """10¹² operations a second with sums in FP32, which some cards have half of: their source then says "with FP32"."""
    stated = re.search(r"\(([\d.]+) with FP32\)", device.sources["fp16_dense_tflops"])
    return float(stated[1]) if stated else device.fp16_dense_tflops


def project(device: Device, cores: int, pair: Pair, images: int, per_core: float, share: float) -> Projection:
    """per_core: images a core loads per second. share: of the device's peak that is reached."""
    speed, loaded = training_peak(device) * 1e12 * share, per_core * cores
    teacher, student = speed / (2 * pair.teacher_macs), speed / (2 * TRAINING * pair.student_macs)
    hours = [images / min(rate, loaded) / 3600 for rate in (teacher, student)]
    bound = ["gpu" if rate < loaded else "loading" for rate in (teacher, student)]
    gigabytes = images * pair.bytes_per_image / 1e9
    c, e = pair.geometry.embedding_channels, pair.geometry.embedding_size
    arithmetic = (
        f"GPU: {training_peak(device):g}e12 operations/s × {share:g} = {speed:.4g} operations/s",
        f"teacher: {speed:.4g} / (2 × {pair.teacher_macs:.4g} MACs) = {teacher:.4g} images/s",
        f"student: {speed:.4g} / (2 × {TRAINING} × {pair.student_macs:.4g} MACs) = {student:.4g} images/s",
        f"loading: {per_core:.4g} images/s a core × {cores} cores = {loaded:.4g} images/s",
        f"teacher's pass: {images} / min({teacher:.4g}, {loaded:.4g}) / 3600 = {hours[0]:.4g} hours",
        f"one epoch: {images} / min({student:.4g}, {loaded:.4g}) / 3600 = {hours[1]:.4g} hours",
        f"cache: {images} × {c} × {e} × {e} × 2 bytes = {gigabytes:.4g} GB",
    )
    return Projection(device.name, pair.teacher, pair.student, images, cores, hours[0], bound[0], hours[1], bound[1],
                      student / per_core, gigabytes, arithmetic)  # fmt: skip


def projections(pairs: list[Pair], per_core: float) -> dict[str, Any]:
    """Every pair on every device, for every count of images. per_core: see ``project``."""
    share = load_fit().efficiency.compute
    found = []
    for target, name, cores in HARDWARE:
        device = next(d for d in load_target(target).devices if d.name == name)
        found += [asdict(project(device, cores, p, n, per_core, share)) for p in pairs for n in COUNTS]
    return {"share_of_peak": share, "per_core_images_s": per_core, "assumptions": ASSUMPTIONS, "rows": found}
