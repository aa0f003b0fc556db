"""sam-export quantize: a simplified FP32 encoder -> INT8 with explicit Q/DQ."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from edgesam_deploy.cli.terminal import json_option, plain, print_json, track


@click.command("quantize")
@click.argument("encoder", type=click.Path(path_type=Path))
@click.option("--recipe", default="reference", show_default=True, help="Whose pixel constants and INT8 rules to use.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Folder of at least 32 images. Default: shipped.")
@click.option(
    "--encoding",
    type=click.Choice(["cpu", "tensorrt"]),
    default="tensorrt",
    show_default=True,
    help="int8 for TensorRT, or its uint8 twin for ONNX Runtime.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The quantized graph.")
@json_option
def command(encoder: Path, recipe: str, calibration: Path | None, encoding: str, output: Path, as_json: bool) -> None:
    """Calibrate and quantize the simplified FP32 graph ENCODER."""
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.files import check_writable
    from edgesam_deploy.recipe import load_recipe

    loaded = load_recipe(recipe)
    try:
        from edgesam_deploy.stages.build import PHOTOS
        from edgesam_deploy.stages.calibrate import calibrate, calibration_images
        from edgesam_deploy.stages.cpu_encoding import encode_for_cpu
        from edgesam_deploy.stages.quantize import quantize
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export") from error
    images = calibration_images(calibration or PHOTOS / "calibration")
    check_writable(output)
    with tempfile.TemporaryDirectory() as folder:
        ranges = calibrate(
            {"encoder": encoder},
            images,
            loaded,
            loaded.int8,
            Path(folder) / "ranges.json",
            lambda items: track("calibrate", items, len(images)),
        )["encoder"]
        typed = output if encoding == "tensorrt" else Path(folder) / "encoder.onnx"
        result = quantize(encoder, ranges, loaded.int8, typed)
        if encoding == "cpu":
            encode_for_cpu(typed, ranges, output)
    if as_json:
        print_json({**plain(result), "output": str(output), "encoding": encoding, "images": len(images)})
        return
    click.echo(
        f"wrote {output}: {result.quantized} of {result.weighted} weighted layers in INT8, {result.activations} "
        f"quantized tensors, {len(images)} calibration images, {encoding} encoding"
    )
