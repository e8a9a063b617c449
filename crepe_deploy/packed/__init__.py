"""Packed N:M weights: the `crepe-nm` format, kernels that multiply by it, and a linear layer built on them.

Modules (imported on demand, so that this package stays light):
    format     pack, unpack, validate: pure functions of tensors
    prepare    the kernels' own layout, derived at load and never stored
    linear     PackedLinear, the module that holds packed weights
    ops        the torch operator `crepe_deploy::nm_linear`
    dispatch   which kernel serves which shape, by measurement
    native     building and loading the C++ kernels
"""
