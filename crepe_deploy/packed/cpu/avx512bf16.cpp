// See avx512bf16.h; fp16 and fp32 use AVX-512's own kernels, compiled here again.
#include "avx512bf16.h"

const crepe::Isa& crepe::isa_avx512bf16() {
  static const Isa isa = {"avx512bf16",
                          {stream<Bf16>(), stream<Avx512<FP16>>(), stream<Avx512<FP32>>()},
                          {panel<Bf16>(), panel<Avx512<FP16>>(), panel<Avx512<FP32>>()},
                          {stream<Dense<Bf16>>(), {}, stream<Dense<Avx512<FP32>>>()},
                          // moving 16-bit values needs no arithmetic
                          {run_expand<Bf16>, run_expand<Bf16>, run_expand<Avx512<FP32>>},
                          nullptr,
                          {run_decode<Place512<BF16>>, run_decode<Place512<FP16>>, run_decode<Place512<FP32>>}};
  return isa;
}
