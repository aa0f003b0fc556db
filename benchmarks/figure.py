"""The README's picture: the shipped INT8 bundle on shipped photographs.

python benchmarks/figure.py [--output benchmarks/results/cpu/demo.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from edgesam_deploy import load_bundle, read_image, shipped_bundle
from edgesam_deploy.overlay import draw, write_picture
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.recipe import PACKAGE

PHOTOS = PACKAGE / "assets" / "photos" / "verify"
# photograph -> point (x, y) in its pixels
SHOTS = {"duck.jpg": (300, 350), "sheep.jpg": (250, 200), "kingfisher.jpg": (290, 180)}
HEIGHT = 360


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/demo.png"))
    options = parser.parse_args()
    pictures = []
    with load_bundle(shipped_bundle()).open() as predictor:
        for name, point in SHOTS.items():
            image = read_image(PHOTOS / name)
            predictor.set_image(image)
            prediction = predictor.predict([point], [1])
            best = int(prediction.iou_predictions.argmax())
            prompts = check_prompts([point], [1], None, (image.shape[0], image.shape[1]))
            mask, score = prediction.masks[best : best + 1].astype(bool), prediction.iou_predictions[best : best + 1]
            picture = draw(image, mask, prompts, score)
            pictures.append(picture.resize((picture.width * HEIGHT // picture.height, HEIGHT)))
    sheet = Image.new("RGB", (sum(p.width for p in pictures), HEIGHT))
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    write_picture(sheet, options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
