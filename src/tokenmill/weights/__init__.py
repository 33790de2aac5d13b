"""Checkpoints, tensor formats, packing and the build cache."""
