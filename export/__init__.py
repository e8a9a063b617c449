"""Checkpoint folder in, checkpoint folder out: the pipeline, the registry, and what `tyr` writes.

A format is one file in `formats/` and one line in `registry.py`; what all formats share is in `frame/`, and what only
ONNX graphs and smaller (structural) checkpoints need in the folders of that name.
"""
