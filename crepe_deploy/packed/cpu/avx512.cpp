// See avx512.h; the kernels of machines with AVX-512 but without its BF16 and VBMI2 parts.
#include "avx512.h"

namespace {

template <DType D>
constexpr Kernel stream() {
  return {run_stream<Avx512<D>>, ROWS, INPUT_FLOAT, 0};
}
template <DType D>
constexpr Kernel panel() {
  return {run_panel<Avx512<D>>, ROWS * Avx512<D>::PANEL_BLOCKS, INPUT_FLOAT, 0};
}

}  // namespace

const crepe::Isa& crepe::isa_avx512() {
  static const Isa isa = {"avx512",
                          {stream<BF16>(), stream<FP16>(), stream<FP32>()},
                          {panel<BF16>(), panel<FP16>(), panel<FP32>()},
                          {{}, {}, {run_stream<Dense<Avx512<FP32>>>, ROWS, INPUT_FLOAT, 0}},
                          {run_expand<Avx512<BF16>>, run_expand<Avx512<FP16>>, run_expand<Avx512<FP32>>},
                          nullptr};
  return isa;
}
