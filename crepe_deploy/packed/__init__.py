"""Packed N:M weights: the `crepe-nm` format, and the linear layer that multiplies by it without unpacking it.

What is stored, and everything that runs on a CPU, stands here; a GPU's part in `cuda`, the choice among kernels in
`tuning`, which knows neither. Modules, imported on demand so that this package stays light:
    format        pack, unpack, validate: pure functions of tensors
    coded         the same of version 3: codes and scales, with or without a mask
    parts         the stored tensors of a weight in every version: names, sizes, checks, and the way back
    config        the `quantization_config` of a packed checkpoint
    linear        PackedLinear, the module that holds packed weights; on a CUDA device it hands them to `cuda.linear`
    coded_linear  CodedLinear, its counterpart for version 3, and the operator `crepe_deploy::coded_linear`
    hf_quantizer  `from_pretrained` of a packed checkpoint; vLLM's counterpart is `serve.vllm_packed`
    prepare       the CPU kernels' own layout, derived at load and never stored
    ops           the torch operator `crepe_deploy::nm_linear`
    dispatch      which kernel serves which shape, by measurement
    native        building and loading the C++ kernels in `cpu/`
"""
