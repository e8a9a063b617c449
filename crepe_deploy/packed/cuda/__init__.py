"""Packed weights on NVIDIA GPUs: all that runs there, and nothing else. No figure measured on a GPU exists yet: see
docs/gpu.md.

Modules (imported on demand; only the first three need the package `triton`):
    kernels          Triton kernels: one streaming skeleton for 2:4, N:M, unstructured rows and a dense control
    groups           their part that learns the four entries of a group, for each kind of weight
    products         their part that multiplies a few tokens
    layout           what the kernels read, derived from a stored pair at load and never stored
    launch           one call of a kernel with one configuration
    semi_structured  2:4 for the sparse tensor cores: cuSPARSELt's layout, and the algorithms it has
    dispatch         which of them serves which batch, by measurement
    ops              the torch operator `crepe_deploy::nm_linear_cuda`
    linear           the module that holds one weight on a device
"""
