"""Segment-Anything models on edge devices: export, quantize, verify, run."""

__version__ = "0.1.0"
