"""Targets: the shipped ones hold together and state sources, wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgesam_deploy.errors import TargetError
from edgesam_deploy.recipe import data_folder, read_toml
from edgesam_deploy.target import FIGURES, Device, PowerMode, available_targets, load_target, parse_target, version_key

TARGETS = [load_target(name) for name in available_targets()]
DEVICES = [(target, device) for target in TARGETS for device in target.devices]
EACH_DEVICE = pytest.mark.parametrize(("target", "device"), DEVICES, ids=[d.name for _, d in DEVICES])


def test_the_targets_there_are() -> None:
    assert {t.name: (t.backend, t.compute_capabilities) for t in TARGETS} == {
        "cpu": ("onnxruntime", ()),
        "orin-nano-8gb": ("tensorrt", ("8.7",)),
        "orin-nx-16gb": ("tensorrt", ("8.7",)),
        "agx-orin-64gb": ("tensorrt", ("8.7",)),
        "thor": ("tensorrt", ("11.0",)),
        "x86-gpu": ("tensorrt", ("8.0", "8.9", "9.0")),
        "rtx": ("tensorrt_rtx", ("8.6", "8.9", "12.0")),
    }


def test_cpu_is_what_it_was() -> None:
    cpu = load_target("cpu")
    assert (cpu.backend, cpu.int8_encoding, cpu.precision) == ("onnxruntime", "cpu", "int8")
    assert (cpu.devices, cpu.releases, cpu.workspace_mb, cpu.tensorrt_min) == ((), (), None, None)
    assert not cpu.accepts_tensorrt("10.3")


@EACH_DEVICE
def test_every_figure_has_a_source(target: Any, device: Device) -> None:
    assert tuple(device.sources) == FIGURES
    # Printed figures name a document; others say how they came about.
    assert all("://" in s or "DS-" in s or "TB-" in s or s.startswith("derived: ") for s in device.sources.values())


@EACH_DEVICE
def test_peaks_are_dense(target: Any, device: Device) -> None:
    """Tensor cores do twice as many INT8 as FP16 operations: a sparse figure beside a dense one would show."""
    assert device.int8_dense_tops / device.fp16_dense_tflops == pytest.approx(2, rel=0.04)


# Tensor core rates per SM and clock, multiply-add = 2, from NVIDIA's architecture whitepapers: A100 (1024 FP16
# multiply-adds per SM), H100 (2048), GA102, AD102 and GB202 (512, FP16 accumulation). Orin's tensor cores are those of
# the A100, Thor's are twice those of the H100. SM counts and boost clocks are the devices'.
RATES = [
    ("A100 SXM 80GB", 108, 1410, 2 * 1024),
    ("H100 SXM 80GB", 132, 1830, 2 * 2048),
    ("GeForce RTX 3090", 82, 1695, 2 * 512),
    ("GeForce RTX 4090", 128, 2520, 2 * 512),
    ("GeForce RTX 5090", 170, 2407, 2 * 512),
    ("L40S", 142, 2520, 2 * 512),
    ("Jetson Orin Nano 8GB", 8, 1020, 2 * 1024),
    ("Jetson AGX Orin 64GB", 16, 1300, 2 * 1024),
    ("Jetson T5000", 20, 1570, 2 * 4096),
]


@pytest.mark.parametrize(("name", "sm_count", "clock_mhz", "operations"), RATES, ids=[row[0] for row in RATES])
def test_peaks_are_units_times_clock(name: str, sm_count: int, clock_mhz: float, operations: int) -> None:
    device = next(d for _, d in DEVICES if d.name == name)
    assert device.fp16_dense_tflops == pytest.approx(sm_count * clock_mhz * operations / 1e6, rel=0.03)


# Memory bus and data rate, from the same documents: a second way to the bandwidth.
BUSES = [
    ("Jetson Orin Nano 8GB", 128, 6400),
    ("Jetson Orin NX 16GB", 128, 6400),
    ("Jetson AGX Orin 64GB", 256, 6400),
    ("Jetson T5000", 256, 8533),
    ("GeForce RTX 3090", 384, 19500),
    ("GeForce RTX 4090", 384, 21000),
    ("GeForce RTX 5090", 512, 28000),
    ("L4", 192, 12500),
    ("L40S", 384, 18000),
]


@pytest.mark.parametrize(("name", "bits", "megatransfers_s"), BUSES, ids=[row[0] for row in BUSES])
def test_bandwidth_is_bus_times_rate(name: str, bits: int, megatransfers_s: int) -> None:
    device = next(d for _, d in DEVICES if d.name == name)
    assert device.memory_bandwidth_gb_s == pytest.approx(bits / 8 * megatransfers_s / 1e3, rel=0.01)


@EACH_DEVICE
def test_a_builder_leaves_most_of_the_memory(target: Any, device: Device) -> None:
    assert target.workspace_mb * 1.048576e6 <= device.memory_gb * 1e9 / 5


@pytest.mark.parametrize("target", [t for t in TARGETS if t.releases], ids=lambda t: t.name)
def test_releases_of_jetson_targets(target: Any) -> None:
    thor = target.name == "thor"
    assert [r.jetpack for r in target.releases] == (["7.0", "7.1", "7.2"] if thor else ["6.1", "6.2", "7.2"])
    for release in target.releases:
        six = release.jetpack.startswith("6")
        assert release.tensorrt == ("10.3" if six else "10.16" if release.jetpack == "7.2" else "10.13")
        assert release.python == ("3.10" if six else "3.12")
        assert release.cuda.startswith("12.6" if six else "13.")


@pytest.mark.parametrize(
    ("target", "version", "accepted"),
    [
        ("orin-nano-8gb", "10.3.0.30", True),
        ("orin-nano-8gb", "10.16.1.11", True),
        ("orin-nano-8gb", "11.4.0.106", True),
        ("orin-nano-8gb", "8.6.2", False),
        ("orin-nano-8gb", "10.2.9", False),
        ("orin-nano-8gb", "12.0", False),
        ("thor", "10.3.0", False),
        ("rtx", "1.7.1.116", True),
        ("rtx", "10.3", False),
    ],
)
def test_versions_in_range(target: str, version: str, accepted: bool) -> None:
    assert load_target(target).accepts_tensorrt(version) is accepted


def test_versions_compare_by_number() -> None:
    assert version_key("10.16") > version_key("10.3.0.30") > version_key("10.3")
    assert version_key("11.4rc1") == (11, 4)
    with pytest.raises(TargetError, match=r"expected a version such as 10\.3, got 'unknown'"):
        version_key("unknown")


def orin() -> dict[str, Any]:
    """The parsed TOML of a target, to be spoilt."""
    return read_toml(data_folder("engines") / "orin-nano-8gb.toml")


def spoilt(**changes: Any) -> dict[str, Any]:
    return {**orin(), **changes}


def spoilt_device(**changes: Any) -> dict[str, Any]:
    raw = orin()
    raw["devices"][0].update(changes)
    return raw


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in orin().items() if k != name}


def release(**changes: Any) -> dict[str, Any]:
    return spoilt(releases=[{**orin()["releases"][0], **changes}])


WRONG = {
    "wrong-rule": (spoilt(int8={"depthwise": "no"}), "precision.int8.depthwise must be true or false"),
    "wrong-rules": (spoilt(int8="none"), "int8 must be a table"),
    "wrong-rest": (spoilt(int8_rest="bf8"), "int8_rest must be one of"),
    "unknown-entry": (spoilt(workspace_gb=1), "unknown entries ['workspace_gb'] for target"),
    "unknown-device-entry": (spoilt_device(tdp_w=7), "unknown entries ['tdp_w'] for device"),
    "unknown-mode-entry": (
        spoilt_device(power_modes=[{"name": "7W", "watt": 7}]),
        "unknown entries ['watt'] for powermode",
    ),
    "unknown-release-entry": (release(cudnn="9.3"), "unknown entries ['cudnn'] for release"),
    "no-backend": (without("backend"), "'backend'"),
    "no-workspace": (without("workspace_mb"), "workspace_mb must be a positive number, got None"),
    "no-devices": (without("devices"), "needs tensorrt_min, tensorrt_below and devices"),
    "no-sources": (
        spoilt(devices=[{k: v for k, v in orin()["devices"][0].items() if k != "sources"}]),
        "the entry 'sources' is missing",
    ),
    "backend": (spoilt(backend="tflite"), "backend must be one of"),
    "encoding": (spoilt(int8_encoding="gpu"), "int8_encoding must be one of"),
    "precision": (spoilt(precision="int4"), "precision must be one of"),
    "notes": (spoilt(notes="text"), "notes must be a list of sentences"),
    "range": (spoilt(tensorrt_below="10.3"), "tensorrt_min 10.3 is not below 10.3"),
    "range-text": (spoilt(tensorrt_min="new"), "expected a version such as 10.3, got 'new'"),
    "old-release": (release(tensorrt="8.6"), "JetPack 6.1 has TensorRT 8.6, out of range"),
    "release-text": (release(l4t="R36"), "l4t must be a version, got 'R36'"),
    "cpu-with-workspace": (spoilt(backend="onnxruntime"), "are for TensorRT, and its backend is onnxruntime"),
    "capability": (spoilt_device(compute_capability="sm_87"), "compute_capability must look like 8.7, got 'sm_87'"),
    "no-memory": (spoilt_device(memory_gb=0), "memory_gb must be a positive number, got 0"),
    "text-peak": (spoilt_device(int8_dense_tops="33"), "int8_dense_tops must be a positive number, got '33'"),
    "nan-peak": (spoilt_device(fp16_dense_tflops=float("nan")), "fp16_dense_tflops must be a positive number"),
    "missing-source": (spoilt_device(sources={"memory_gb": "a data sheet"}), "every figure needs a source"),
    "empty-source": (spoilt_device(sources=dict.fromkeys(FIGURES, "")), "every figure needs a source"),
    "no-watts": (spoilt_device(power_modes=[{"name": "7W", "watts": -7}]), "watts must be a positive number, got -7"),
}


@pytest.mark.parametrize(("raw", "message"), WRONG.values(), ids=WRONG)
def test_wrong_targets_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_target(raw, Path("wrong.toml"))
    assert message in str(caught.value)
    assert "wrong.toml" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_target_that_is_spoilt_above_is_right() -> None:
    """Without this the refusals could be of something else."""
    assert parse_target(orin(), Path("right.toml")) == load_target("orin-nano-8gb")


def test_a_mode_may_have_no_limits() -> None:
    assert PowerMode("MAXN") == PowerMode("MAXN", None, None)
