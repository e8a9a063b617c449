// AVX-512 (F, BW, DQ, VL) without BF16 or VBMI2: sixteen values at a time, converted to fp32 and expanded there.
#pragma once
#include <immintrin.h>

#include "kernel.h"

namespace {

template <DType D>
inline __m512 load16(const typename Scalar<D>::Elem* p) {
  if constexpr (D == FP32) {
    return _mm512_loadu_ps(p);
  } else {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (D == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

template <DType D>
struct Avx512 : Scalar<D> {
  using Elem = typename Scalar<D>::Elem;
  using X = float;
  using Vec = __m512;
  static constexpr int AHEAD = 2048, STEP = 16, PANEL_BLOCKS = 2;
  struct Acc {
    __m512 v;
  };
  struct Wide {
    __m512 v[2];
  };

  static Acc zero() { return {_mm512_setzero_ps()}; }
  static float sum(Acc a) { return _mm512_reduce_add_ps(a.v); }
  static Wide expand(const Elem*& p, uint32_t mask) {
    const uint32_t low = mask & 0xffff;
    Wide w;
    w.v[0] = _mm512_maskz_expand_ps(__mmask16(low), load16<D>(p));
    w.v[1] = _mm512_maskz_expand_ps(__mmask16(mask >> 16), load16<D>(p + __builtin_popcount(low)));
    p += __builtin_popcount(mask);
    return w;
  }
  static Acc dot(Acc acc, const Wide& w, const float* x) {
    acc.v = _mm512_fmadd_ps(w.v[0], _mm512_loadu_ps(x), acc.v);
    acc.v = _mm512_fmadd_ps(w.v[1], _mm512_loadu_ps(x + 16), acc.v);
    return acc;
  }
  static Vec load(const float* x) { return _mm512_loadu_ps(x); }
  static Acc mac(Acc acc, Vec w, Vec x) { return {_mm512_fmadd_ps(w, x, acc.v)}; }
  static void spill(float* to, const Wide& w) {
    _mm512_storeu_ps(to, w.v[0]);
    _mm512_storeu_ps(to + 16, w.v[1]);
  }
  static Wide fill(const float* from) { return {{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}}; }
  static void raw(Elem* to, const Elem*& p, uint32_t mask) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++, mask >>= 16, to += 16) {
      const uint32_t low = mask & 0xffff;
      if constexpr (D == FP32) {
        _mm512_storeu_ps(to, _mm512_maskz_expand_ps(__mmask16(low), _mm512_loadu_ps(p)));
      } else {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        const __m256i half = _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(__mmask16(low), wide));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
      }
      p += __builtin_popcount(low);
    }
  }
};

// Sixteen codes at a time, widened, moved to their columns and multiplied in fp32.
template <DType D>
struct Place512 : Scalar<D> {
  using Elem = typename Scalar<D>::Elem;
  static void place(Elem* to, const int8_t*& p, uint32_t mask, float scale) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++, mask >>= 16, to += 16) {
      const uint32_t low = mask & 0xffff;
      const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      const __m512i there = _mm512_maskz_expand_epi32(__mmask16(low), codes);
      const __m512 w = _mm512_mul_ps(_mm512_cvtepi32_ps(there), _mm512_set1_ps(scale));
      if constexpr (D == FP32) {
        _mm512_storeu_ps(to, w);
      } else if constexpr (D == FP16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
      } else {
        const __m512i bits = _mm512_castps_si512(w);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
      }
      p += __builtin_popcount(low);
    }
  }
};

}  // namespace
