"""Serving a checkpoint: vLLM with our plugin and kernels, ONNX Runtime, and one protocol for engines that are measured.

May import the core; knows nothing of exports or of `bench`, which measures with these engines.
"""
