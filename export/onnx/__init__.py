"""Export `onnx`: graphs for ONNX Runtime, their proof, and what their initialisers hold. One noun a file."""
