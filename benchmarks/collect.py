"""Put what sam-export said about one bundle into one result file; docker/bench.sh calls this for every bundle.

    python benchmarks/collect.py describe BUNDLE
    python benchmarks/collect.py write BUNDLE RESULTS [--build FILE] [--compile FILE] --verify FILE --bench FILE

describe prints "kit" or "bundle", target, recipe and precision. write makes RESULTS/<target>/<recipe>-<precision>.json,
whole or not at all, from the --json answers in the given files, the bundle's manifest, and where it ran: the image
(EDGESAM_IMAGE) and the commit (EDGESAM_REVISION, else git's). Only the standard library: runs wherever sam-export does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "manifest.json"
# Beyond this coefficient of variation other work disturbed the timing (as in `sam-export bench`).
NOISY_CV = 0.1
# What a result keeps of the manifest: where the bundle comes from.
ORIGIN = ("recipe", "checkpoint_sha256", "int8_encoding", "calibration", "tools", "engines", "verified")


class CollectError(Exception):
    """One line: what was expected, what came."""


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CollectError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CollectError(f"{path} must hold a JSON object, holds {type(value).__name__}")
    return value


def identity(manifest: dict[str, Any], path: Path) -> tuple[str, str, str]:
    """(target, recipe, precision), each fit to be a part of a file name."""
    try:
        names = (str(manifest["target"]), str(manifest["recipe"]["name"]), str(manifest["precision"]))
    except (KeyError, TypeError) as error:
        raise CollectError(f"{path} names no target, recipe or precision: {error}") from error
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise CollectError(f"{path}: {name!r} cannot be part of a file name")
    return names


def describe(bundle: Path) -> str:
    """A kit is a bundle whose backend runs engines and which has none yet."""
    manifest = read_json(bundle / MANIFEST)
    kit = str(manifest.get("backend")).startswith("tensorrt") and manifest.get("engines") is None
    return " ".join(("kit" if kit else "bundle", *identity(manifest, bundle / MANIFEST)))


def without_paths(value: Any, names: dict[str, str]) -> Any:
    """A JSON value with folders of this machine replaced by names, wherever they begin a string."""
    if isinstance(value, dict):
        return {k: without_paths(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(v, names) for v in value]
    for folder, name in names.items():
        if isinstance(value, str) and f"{value}/".startswith(f"{folder}/"):
            return name + value[len(folder) :]
    return value


def revision() -> str:
    """The commit, with "-dirty" where the checkout differs from it; "unknown" outside a checkout."""
    if given := os.environ.get("EDGESAM_REVISION"):
        return given
    try:
        answers = [
            subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answers[0].strip() + ("-dirty" if answers[1].strip() else "")


def collect(bundle: Path, answers: dict[str, Path]) -> dict[str, Any]:
    """The result of one bundle. answers: command name -> the file with its --json answer."""
    manifest_path = bundle / MANIFEST
    manifest = read_json(manifest_path)
    target, recipe, precision = identity(manifest, manifest_path)
    said = {name: read_json(path) for name, path in answers.items()}
    if said["verify"].get("passed") is not True:
        raise CollectError(f"{answers['verify']}: the bundle did not pass verification")
    try:
        listed = {n: e for n, e in manifest["files"].items() if n.endswith((".onnx", ".engine"))}
        files = {name: {key: entry[key] for key in ("sha256", "size_bytes")} for name, entry in listed.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CollectError(f"{manifest_path} does not list its files with sha256 and size: {error}") from error
    result = {
        "schema": 1,
        "target": target,
        "recipe": recipe,
        "precision": precision,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "image": os.environ.get("EDGESAM_IMAGE"),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "bundle": {
            "manifest_sha256": hashlib.sha256(manifest_path.read_bytes()).hexdigest(),
            **{key: manifest.get(key) for key in ORIGIN},
            "files": files,
        },
        **said,
    }
    # The build's stages lie beside the bundle.
    names = {str(bundle): f"{target}/{recipe}-{precision}", str(bundle.parent): target}
    return {key: without_paths(value, names) for key, value in result.items()}


def write(path: Path, result: dict[str, Any]) -> None:
    """Through a temporary file beside it, so that a reader finds the whole result or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def summary(path: Path, result: dict[str, Any]) -> str:
    """One line for people: the file, its two chief figures, and whether the second can be trusted."""
    try:
        iou, total = float(result["verify"]["mask_iou"]["mean"]), result["bench"]["parts"]["total"]
        median, cv = float(total["median_ms"]), float(total["cv"])
    except (KeyError, TypeError) as error:
        raise CollectError(f"the answers of sam-export verify and bench lack an entry: {error}") from error
    noise = f"; noisy, times vary by {cv:.0%}: stop other work and measure again" if cv > NOISY_CV else ""
    return f"{path}: mask IoU {iou:.4f} against PyTorch FP32, {median:.1f} ms from image to mask (median){noise}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe").add_argument("bundle", type=Path)
    writer = commands.add_parser("write")
    writer.add_argument("bundle", type=Path)
    writer.add_argument("results", type=Path)
    for name in ("build", "compile", "verify", "bench"):
        writer.add_argument(f"--{name}", type=Path, required=name in ("verify", "bench"))
    options = parser.parse_args()
    try:
        if options.command == "describe":
            print(describe(options.bundle))
            return
        named = {name: getattr(options, name) for name in ("build", "compile", "verify", "bench")}
        result = collect(options.bundle, {name: path for name, path in named.items() if path is not None})
        path = options.results / result["target"] / f"{result['recipe']}-{result['precision']}.json"
        line = summary(path, result)
        write(path, result)
    except (CollectError, OSError) as error:
        sys.exit(f"error: {error}")
    print(line)


if __name__ == "__main__":
    main()
