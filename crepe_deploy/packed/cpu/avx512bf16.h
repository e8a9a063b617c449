// AVX-512 with BF16 and VBMI2: 32 bf16 values expanded by one instruction, multiplied in pairs by another.
#pragma once
#include "avx512.h"

namespace {

inline __m512i expand32(const uint16_t*& p, uint32_t mask) {
  const __m512i w = _mm512_maskz_expand_epi16(__mmask32(mask), _mm512_loadu_si512(p));
  p += __builtin_popcount(mask);
  return w;
}

struct Bf16 : Scalar<BF16> {
  using X = uint16_t;
  using Vec = __m512i;
  static constexpr int AHEAD = 2048, STEP = 32, PANEL_BLOCKS = 2;
  struct Acc {
    __m512 v;
  };
  struct Wide {
    __m512i v;
  };

  static Acc zero() { return {_mm512_setzero_ps()}; }
  static float sum(Acc a) { return _mm512_reduce_add_ps(a.v); }
  static Wide expand(const uint16_t*& p, uint32_t mask) { return {expand32(p, mask)}; }
  static Acc dot(Acc acc, Wide w, const uint16_t* x) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_loadu_si512(x))};
  }
  static Vec load(const uint16_t* x) { return _mm512_loadu_si512(x); }
  static Acc mac(Acc acc, Vec w, Vec x) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)w, (__m512bh)x)}; }
  static void spill(uint16_t* to, Wide w) { _mm512_storeu_si512(to, w.v); }
  static Wide fill(const uint16_t* from) { return {_mm512_loadu_si512(from)}; }
  static void raw(uint16_t* to, const uint16_t*& p, uint32_t mask) { _mm512_storeu_si512(to, expand32(p, mask)); }
};

}  // namespace
