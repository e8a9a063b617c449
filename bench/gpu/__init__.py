"""Measure the packed GPU kernels; see docs/gpu.md."""
