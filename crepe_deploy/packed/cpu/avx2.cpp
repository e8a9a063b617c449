// AVX2 + FMA + F16C: eight values at a time, moved to their columns by a permutation looked up by mask byte.
#include <immintrin.h>

#include "kernel.h"

namespace {

struct Table {
  // place[mask][j]: which kept value column j takes (any where column j is not kept).
  alignas(64) uint8_t place[256][8];
  Table() {
    for (int mask = 0; mask < 256; mask++)
      for (int j = 0, kept = 0; j < 8; j++) {
        place[mask][j] = uint8_t(kept & 7);
        kept += mask >> j & 1;
      }
  }
};
const Table table;

template <DType D>
inline __m256 load8(const typename Scalar<D>::Elem* p) {
  if constexpr (D == FP32) {
    return _mm256_loadu_ps(p);
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (D == FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

template <DType D>
struct Avx2 : Scalar<D> {
  using Elem = typename Scalar<D>::Elem;
  using X = float;
  using Vec = __m256;
  static constexpr int AHEAD = 1024, STEP = 8, PANEL_BLOCKS = 1;
  struct Acc {
    __m256 v;
  };
  struct Wide {
    __m256 v[4];
  };

  static Acc zero() { return {_mm256_setzero_ps()}; }
  static float sum(Acc a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static Wide expand(const Elem*& p, uint32_t mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    Wide w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, mask >>= 8) {
      const uint32_t byte = mask & 255;
      const __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(table.place[byte])));
      const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(byte)), bit), bit);
      w.v[i] = _mm256_and_ps(_mm256_permutevar8x32_ps(load8<D>(p), place), _mm256_castsi256_ps(kept));
      p += __builtin_popcount(byte);
    }
    return w;
  }
  static Acc dot(Acc acc, const Wide& w, const float* x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) acc.v = _mm256_fmadd_ps(w.v[i], _mm256_loadu_ps(x + 8 * i), acc.v);
    return acc;
  }
  static Vec load(const float* x) { return _mm256_loadu_ps(x); }
  static Acc mac(Acc acc, Vec w, Vec x) { return {_mm256_fmadd_ps(w, x, acc.v)}; }
  static void spill(float* to, const Wide& w) {
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + 8 * i, w.v[i]);
  }
  static Wide fill(const float* from) {
    Wide w;
    for (int i = 0; i < 4; i++) w.v[i] = _mm256_loadu_ps(from + 8 * i);
    return w;
  }
  static void raw(Elem* to, const Elem*& p, uint32_t mask) {
    std::memset(to, 0, sizeof(Elem) * CHUNK);
    for (; mask; mask &= mask - 1) to[__builtin_ctz(mask)] = *p++;
  }
};

}  // namespace

const crepe::Isa& crepe::isa_avx2() {
  static const Isa isa = isa_of<Avx2>("avx2");
  return isa;
}
