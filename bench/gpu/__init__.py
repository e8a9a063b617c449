"""The measurements of docs/gpu.md: needs torch, triton and transformers, and runs from a checkout without installation.

May import the packed kernels and the small files of the core; nothing else of bench/.
"""
