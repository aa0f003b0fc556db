"""sam-export predict: a mask for points or a box on one image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgesam_deploy.cli.terminal import backend_option, json_option, print_json, threads_option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgesam_deploy.predictor import Prediction, Predictor

    _ParamType = click.ParamType[tuple[float, ...]]
else:  # older releases of click cannot be subscripted
    _ParamType = click.ParamType


class Numbers(_ParamType):
    """Comma-separated numbers, ``least`` to ``most`` of them."""

    def __init__(self, name: str, least: int, most: int) -> None:
        self.name = name
        self.least = least
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not self.least <= len(numbers) <= self.most:
            self.fail(f"expected numbers as {self.name}, got '{value}'", param, ctx)
        return numbers


@click.command("predict")
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--point", "points", multiple=True, type=Numbers("X,Y[,LABEL]", 2, 3), help="Label 1 (default) or 0. Repeatable."
)
@click.option("--box", "boxes", multiple=True, type=Numbers("X0,Y0,X1,Y1", 4, 4), help="Repeatable: one mask per box.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the picture with mask, prompts and score.")
@click.option(
    "--save-mask",
    type=click.Path(path_type=Path),
    help="Write the mask alone, 0 and 255 (with several boxes: their union).",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="Default: the shipped INT8 reference bundle.")
@backend_option
@threads_option
@json_option
def command(
    image: Path,
    points: tuple[tuple[float, ...], ...],
    boxes: tuple[tuple[float, ...], ...],
    output: Path | None,
    save_mask: Path | None,
    bundle: Path | None,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Segment what the prompts mean on IMAGE. Coordinates are pixels, (x, y) from the top left.

    One click alone is ambiguous and gets the best of three candidates by predicted IoU; anything else gets the single
    mask.
    """
    if not points and not boxes:
        raise click.UsageError("give at least one --point X,Y[,LABEL] or --box X0,Y0,X1,Y1")
    if points and len(boxes) > 1:
        raise click.UsageError("points go with one --box at most; for several boxes leave the points out")
    from edgesam_deploy.bundle import load_bundle, shipped_bundle
    from edgesam_deploy.images import read_image
    from edgesam_deploy.prompts import check_prompts

    for path in (output, save_mask):
        if path is not None:
            from edgesam_deploy.overlay import picture_format

            picture_format(path)
    pixels = read_image(image)
    coords = [[p[:2] for p in points]] if points else None
    labels = [[p[2] if len(p) == 3 else 1 for p in points]] if points else None
    prompts = check_prompts(coords, labels, list(boxes) or None, (pixels.shape[0], pixels.shape[1]))
    loaded = load_bundle(bundle or shipped_bundle()).on(backend)
    with loaded.open(threads) as predictor:
        predictor.set_image(pixels)
        masks, scores = _choose(_ask(predictor, coords, labels, list(boxes) or None))
    if output is not None:
        from edgesam_deploy.overlay import draw, write_picture

        write_picture(draw(pixels, masks, prompts, scores), output)
    if save_mask is not None:
        _save_mask(masks, save_mask)
    _report(masks, scores, output, save_mask, as_json)


def _ask(predictor: Predictor, coords: Any, labels: Any, boxes: Any) -> Prediction:
    ambiguous = boxes is None and len(coords[0]) == 1
    return predictor.predict(coords, labels, boxes, multimask_output=ambiguous)


def _choose(prediction: Prediction) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """The mask with the highest predicted IoU of each prompt: masks (B,H,W), scores (B,)."""
    import numpy as np

    best = prediction.iou_predictions.argmax(axis=1)
    rows = np.arange(len(best))
    return prediction.masks[rows, best].astype(bool), prediction.iou_predictions[rows, best]


def _save_mask(masks: npt.NDArray[np.bool_], path: Path) -> None:
    import numpy as np
    from PIL import Image

    from edgesam_deploy.overlay import write_picture

    write_picture(Image.fromarray(masks.any(axis=0).astype(np.uint8) * 255), path)


def _report(
    masks: npt.NDArray[np.bool_],
    scores: npt.NDArray[np.float32],
    output: Path | None,
    saved: Path | None,
    as_json: bool,
) -> None:
    rows = [_describe(mask, float(score)) for mask, score in zip(masks, scores, strict=True)]
    if as_json:
        print_json({"masks": rows, "output": output, "mask": saved})
        return
    for row in rows:
        box = ",".join(str(v) for v in row["box_xyxy"]) if row["box_xyxy"] else "none"
        click.echo(f"mask: {row['area_px']} pixels, box {box}, predicted IoU {row['predicted_iou']:.3f}")
    for path in (output, saved):
        if path is not None:
            click.echo(f"wrote {path}")


def _describe(mask: npt.NDArray[np.bool_], score: float) -> dict[str, Any]:
    """area in pixels, tight box (x0,y0,x1,y1, last pixel included) or None for an empty mask, predicted IoU."""
    import numpy as np

    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [int(cols[0]), int(rows[0]), int(cols[-1]), int(rows[-1])] if rows.size else None
    return {"area_px": int(mask.sum()), "box_xyxy": box, "predicted_iou": round(score, 4)}
