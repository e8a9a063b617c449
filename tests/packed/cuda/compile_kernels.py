"""Compile the kernels for a GPU that need not be here: `compile_kernels.py 90`. One line for each kernel."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crepe_deploy.packed.cuda import kernels

WORDS = {0: "*i64", 1: "*i32", 2: "*u16", 3: "*u16"}
LINEAR = ("x", "values", "meta", "offsets", "bias", "out", "partial", "counters", "M", "N", "K", "kept", "parts")


def build(capability: int, function: Any, kind: int, tokens: int, rows: int, shared: bool = True) -> Any:
    """The compiled linear kernel of one kind."""
    signature = dict.fromkeys(LINEAR, "*i32") | {"x": "*i64", "values": WORDS[kind], "bias": "*bf16", "out": "*bf16"}
    signature |= {"partial": "*fp32", "M": "i32", "N": "i32", "K": "i32", "kept": "i32", "parts": "i32"}
    constants = {"KIND": kind, "BF16": True, "BN": rows, "BM": tokens, "SHARED": shared, "BIAS": True, "EVEN": True}
    return compiled(capability, function, signature, constants)


def compiled(capability: int, function: Any, signature: dict[str, str], constants: dict[str, Any]) -> Any:
    """Compile one kernel with 16-byte aligned pointers and sizes."""
    names = [*signature, *constants]
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, name in enumerate(names) if signature.get(name, "").startswith("*") or name in "NK"}
    source = ASTSource(
        fn=function,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    options = {"num_warps": 4, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability: int) -> None:
    """Compile a representative of everything."""
    for kind, tokens in ((0, 1), (1, 1), (1, 4), (2, 1), (3, 1)):
        build(capability, kernels.stream_few, kind, tokens, 16)
        print("compiled few", kind, tokens)
    build(capability, kernels.stream_many, 1, 16, 64)
    print("compiled many")
    signature = {
        "out": "*i64",
        "values": "*u16",
        "meta": "*i32",
        "offsets": "*i32",
        "N": "i32",
        "K": "i32",
        "kept": "i32",
    }
    compiled(capability, kernels.expand_rows, signature, {"KIND": 2, "BN": 32})
    print("compiled expand")


if __name__ == "__main__":
    main(int(sys.argv[1]))
