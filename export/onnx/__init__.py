"""What an ONNX graph is made of and proven by; the format itself is `formats/onnx.py`.

Everything here needs the extra `onnx`; it imports `serve/ort.py`, the code that will run the graph, and no exporter.
"""
