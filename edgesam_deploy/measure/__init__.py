"""Latency and accuracy of bundles; numpy only, so that a device without PyTorch measures the same things."""
