"""Segment-Anything models on edge devices: export, quantize, verify, run.

    from edgesam_deploy import load_bundle, read_image, shipped_bundle

    with load_bundle(shipped_bundle()).open() as predictor:
        predictor.set_image(read_image(path))
        prediction = predictor.predict(point_coords=[[x, y]], point_labels=[1])

Importing this package imports nothing heavy; each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgesam_deploy.bundle import Bundle, load_bundle, shipped_bundle
    from edgesam_deploy.errors import EdgeSAMError
    from edgesam_deploy.images import read_image
    from edgesam_deploy.predictor import Prediction, Predictor

__version__ = "0.1.0"

__all__ = ["Bundle", "EdgeSAMError", "Prediction", "Predictor", "load_bundle", "read_image", "shipped_bundle"]

_HOMES = {
    "Bundle": "bundle",
    "EdgeSAMError": "errors",
    "Prediction": "predictor",
    "Predictor": "predictor",
    "load_bundle": "bundle",
    "read_image": "images",
    "shipped_bundle": "bundle",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgesam_deploy' has no attribute '{name}'")
    return getattr(import_module(f"edgesam_deploy.{_HOMES[name]}"), name)
