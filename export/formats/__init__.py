"""One file a format: what it reads, writes, proves and says of itself; `registry.py` one folder up names them.

A file here may use `frame/` and its own helpers in `onnx/` or `structural/`; it is imported only when it is asked for.
"""
