"""Packed weights on NVIDIA GPUs. No figure measured on a GPU exists yet: see docs/gpu.md.

Modules (imported on demand; only `kernels` needs the package `triton`):
    layout           what the kernels read, derived from a stored pair at load and never stored
    kernels          Triton kernels: one streaming skeleton for 2:4, N:M, unstructured rows and a dense control
    launch           one call of a kernel with one configuration
    semi_structured  2:4 for the sparse tensor cores: cuSPARSELt and CUTLASS layouts, the choice of an algorithm
    dispatch         which of them serves which batch, by measurement
    ops              the torch operator `crepe_deploy::nm_linear_cuda`
    linear           the module that holds one weight on a device
"""
