"""What a GGUF file for llama.cpp needs: its name and sizes for a model, its vocabulary, and its types of weights.

Nothing here imports another folder of `export/`.
"""
