// See avx512bf16.h; fp16 and fp32 use AVX-512's own kernels, compiled here again.
#include "avx512bf16.h"

namespace {

template <class T>
constexpr Kernel stream(Input input) {
  return {run_stream<T>, ROWS, input, 0};
}
template <class T>
constexpr Kernel panel(Input input) {
  return {run_panel<T>, ROWS * T::PANEL_BLOCKS, input, 0};
}

}  // namespace

const crepe::Isa& crepe::isa_avx512bf16() {
  static const Isa isa = {
      "avx512bf16",
      {stream<Bf16>(INPUT_SAME), stream<Avx512<FP16>>(INPUT_FLOAT), stream<Avx512<FP32>>(INPUT_FLOAT)},
      {panel<Bf16>(INPUT_SAME), panel<Avx512<FP16>>(INPUT_FLOAT), panel<Avx512<FP32>>(INPUT_FLOAT)},
      {stream<Dense<Bf16>>(INPUT_SAME), {}, stream<Dense<Avx512<FP32>>>(INPUT_FLOAT)},
      {run_expand<Bf16>, run_expand<Bf16>, run_expand<Avx512<FP32>>},  // moving 16-bit values needs no arithmetic
      nullptr};
  return isa;
}
