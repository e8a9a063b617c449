// The two kernels every ISA shares, over a trait that says how to expand a chunk and multiply by it.
// Everything is in an anonymous namespace: each file that includes this gets its own copy for its own ISA.
//
// A trait T has: Elem (stored value), X (element of x), Acc, Wide (32 expanded weights in registers), and
//   expand(const Elem*& p, uint32_t mask) -> Wide, advancing p; reads at most CHUNK elements from p
//   dot(Acc, Wide, const X* x) -> Acc; spill(X*, Wide); fill(const X*) -> Wide; raw(Elem*, p&, mask)
//   STEP elements in a Vec: load(const X*) -> Vec, mac(Acc, Vec, Vec) -> Acc
//   zero() -> Acc; sum(Acc) -> float; to_float(Elem); from_float(float) -> Elem
#pragma once
#include <cstring>
#include <type_traits>

#include "nm.h"

namespace {

using namespace crepe;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <DType D>
struct Scalar;

template <>
struct Scalar<FP32> {
  using Elem = float;
  static float to_float(float v) { return v; }
  static float from_float(float v) { return v; }
};

template <>
struct Scalar<BF16> {
  using Elem = uint16_t;
  static float to_float(uint16_t v) { return bits_to_float(uint32_t(v) << 16); }
  static uint16_t from_float(float v) {
    uint32_t bits = float_to_bits(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
};

template <>
struct Scalar<FP16> {
  using Elem = uint16_t;
  static float to_float(uint16_t v) {
    uint32_t sign = uint32_t(v & 0x8000) << 16, exponent = (v >> 10) & 31, fraction = v & 0x3ff;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
    float magnitude = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  static uint16_t from_float(float v) {
    uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {  // below 2^-14: let the addition round to multiples of 2^-24
      float shifted = bits_to_float(magnitude) + 0.5f;
      return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
    }
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
  }
};

template <class T>
inline void put(const Job& job, int64_t token, int64_t row, float value) {
  using Elem = typename T::Elem;
  if (row >= job.out) return;
  if (job.bias) value += T::to_float(static_cast<const Elem*>(job.bias)[row]);
  static_cast<Elem*>(job.y)[token * job.out + row] = T::from_float(value);
}

// Where block `block` starts and the last place a chunk may start at; false when the offset itself is outside.
template <class Elem>
inline bool bounds(const Job& job, int64_t block, const Elem*& p, const Elem*& last) {
  int64_t offset = job.offsets[block], limit = job.values_len - PAD;
  if (offset < 0 || offset > limit) return false;
  p = static_cast<const Elem*>(job.values) + offset;
  last = static_cast<const Elem*>(job.values) + limit;
  return true;
}

template <class T, int B>
inline bool stream_block(const Job& job, int64_t block, int64_t token) {
  using Elem = typename T::Elem;
  using X = typename T::X;
  const int64_t chunks = job.in / CHUNK;
  const uint32_t* mask = job.mask + block * chunks * ROWS;
  const X* x = static_cast<const X*>(job.x) + token * job.in;
  const Elem *p, *last;
  if (!bounds(job, block, p, last)) return false;
  typename T::Acc acc[ROWS][B];
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < B; b++) acc[r][b] = T::zero();
  for (int64_t c = 0; c < chunks; c++, mask += ROWS, x += CHUNK) {
    if (__builtin_expect(p > last, 0)) return false;
    __builtin_prefetch(reinterpret_cast<const char*>(p) + T::AHEAD);
    __builtin_prefetch(reinterpret_cast<const char*>(p) + T::AHEAD + 64);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      typename T::Wide w = T::expand(p, mask[r]);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) acc[r][b] = T::dot(acc[r][b], w, x + b * job.in);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < B; b++) put<T>(job, token + b, block * ROWS + r, T::sum(acc[r][b]));
  return true;
}

// All tokens, a few at a time; the block's packed bytes stay in the cache between them.
template <class T>
bool run_stream(const Job& job, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block++) {
    int64_t token = 0;
    bool ok = true;
    for (; ok && job.tokens - token >= 4; token += 4) ok = stream_block<T, 4>(job, block, token);
    const int64_t left = job.tokens - token;
    if (ok && left == 3) ok = stream_block<T, 3>(job, block, token);
    if (ok && left == 2) ok = stream_block<T, 2>(job, block, token);
    if (ok && left == 1) ok = stream_block<T, 1>(job, block, token);
    if (!ok) return false;
  }
  return true;
}

// The control of a measurement: the same loop over the same layout of a weight that keeps everything, without masks.
template <class T>
struct Dense : T {
  static typename T::Wide expand(const typename T::Elem*& p, uint32_t) {
    const typename T::Wide w = T::fill(p);
    p += CHUNK;
    return w;
  }
};

constexpr int DEEP = 512;  // columns of a panel, so that it stays in the L1 cache

// sums[token][row] += panel (R rows x columns) times B tokens from x, `columns` at a time.
template <class T, int R, int B>
inline void panel_tokens(const typename T::X* panel, const typename T::X* x, int64_t in, int64_t columns, float* sums) {
  typename T::Acc acc[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) acc[r][b] = T::zero();
  for (int64_t c = 0; c < columns; c += T::STEP) {
    typename T::Vec v[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) v[b] = T::load(x + b * in + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const typename T::Vec w = T::load(panel + r * DEEP + c);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) acc[r][b] = T::mac(acc[r][b], w, v[b]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) sums[b * R + r] += T::sum(acc[r][b]);
}

// PANEL_BLOCKS blocks at a time are expanded, DEEP columns at a time, into a panel that serves all tokens.
template <class T>
bool run_panel(const Job& job, int64_t begin, int64_t end) {
  using Elem = typename T::Elem;
  using X = typename T::X;
  constexpr int BLOCKS = T::PANEL_BLOCKS, R = BLOCKS * ROWS;
  const int64_t chunks = job.in / CHUNK, blocks = (job.out + ROWS - 1) / ROWS;
  alignas(64) X panel[R * DEEP] = {};
  float* sums = new float[job.tokens * R];
  bool ok = true;
  for (int64_t unit = begin; ok && unit < end; unit++) {
    const int64_t first = unit * BLOCKS;
    const int here = blocks - first < BLOCKS ? int(blocks - first) : BLOCKS;
    const Elem *p[BLOCKS], *last;
    for (int i = 0; i < here; i++) ok &= bounds(job, first + i, p[i], last);
    std::memset(sums, 0, sizeof(float) * job.tokens * R);
    for (int64_t start = 0; ok && start < chunks; start += DEEP / CHUNK) {
      const int64_t depth = chunks - start < DEEP / CHUNK ? chunks - start : DEEP / CHUNK;
      for (int i = 0; ok && i < here; i++) {
        const uint32_t* mask = job.mask + ((first + i) * chunks + start) * ROWS;
        for (int64_t c = 0; c < depth; c++, mask += ROWS) {
          if (__builtin_expect(p[i] > last, 0)) {
            ok = false;
            break;
          }
          for (int r = 0; r < ROWS; r++) T::spill(panel + (i * ROWS + r) * DEEP + c * CHUNK, T::expand(p[i], mask[r]));
        }
      }
      const X* x = static_cast<const X*>(job.x) + start * CHUNK;
      int64_t token = 0;
      for (; ok && job.tokens - token >= 3; token += 3)
        panel_tokens<T, R, 3>(panel, x + token * job.in, job.in, depth * CHUNK, sums + token * R);
      for (; ok && token < job.tokens; token++)
        panel_tokens<T, R, 1>(panel, x + token * job.in, job.in, depth * CHUNK, sums + token * R);
    }
    for (int64_t token = 0; ok && token < job.tokens; token++)
      for (int r = 0; r < R; r++) put<T>(job, token, first * ROWS + r, sums[token * R + r]);
  }
  delete[] sums;
  return ok;
}

// The dense weight (out, in) into job.y.
template <class T>
bool run_expand(const Job& job, int64_t begin, int64_t end) {
  using Elem = typename T::Elem;
  const int64_t chunks = job.in / CHUNK;
  Elem* dense = static_cast<Elem*>(job.y);
  for (int64_t block = begin; block < end; block++) {
    const uint32_t* mask = job.mask + block * chunks * ROWS;
    const int rows = job.out - block * ROWS < ROWS ? int(job.out - block * ROWS) : ROWS;
    const Elem *p, *last;
    if (!bounds(job, block, p, last)) return false;
    for (int64_t c = 0; c < chunks; c++, mask += ROWS) {
      if (__builtin_expect(p > last, 0)) return false;
      for (int r = 0; r < rows; r++) T::raw(dense + (block * ROWS + r) * job.in + c * CHUNK, p, mask[r]);
    }
  }
  return true;
}

// A chunk of a coded weight, code by code: code * scale in fp32, rounded to the dtype.
template <DType D>
struct Plain : Scalar<D> {
  using Elem = typename Scalar<D>::Elem;
  static void place(Elem* to, const int8_t*& p, uint32_t mask, float scale) {
    if (mask == 0xffffffffu) {
      for (int i = 0; i < CHUNK; i++) to[i] = Scalar<D>::from_float(float(p[i]) * scale);
      p += CHUNK;
      return;
    }
    std::memset(to, 0, sizeof(Elem) * CHUNK);
    for (; mask; mask &= mask - 1) to[__builtin_ctz(mask)] = Scalar<D>::from_float(float(*p++) * scale);
  }
};

// One row's codes go as bytes into a buffer that a whole chunk may be read from anywhere.
template <class P>
bool run_decode(const Coded& job, int64_t begin, int64_t end) {
  using Elem = typename P::Elem;
  const int64_t chunks = job.in / CHUNK, most = job.bits == 8 ? job.stride : 2 * job.stride;
  int8_t* row = new int8_t[most + CHUNK]();
  bool ok = true;
  for (int64_t r = begin; ok && r < end; r++) {
    const uint8_t* from = job.codes + r * job.stride;
    if (job.bits == 8) {
      std::memcpy(row, from, job.stride);
    } else {
      for (int64_t i = 0; i < job.stride; i++) {
        row[2 * i] = int8_t(uint8_t(from[i] << 4)) >> 4;
        row[2 * i + 1] = int8_t(from[i]) >> 4;
      }
    }
    const int8_t *p = row, *last = row + most;
    const Elem* scales = static_cast<const Elem*>(job.scales) + r * job.groups;
    Elem* to = static_cast<Elem*>(job.weight) + r * job.in;
    for (int64_t c = 0; c < chunks; c++, to += CHUNK) {
      uint32_t mask = 0xffffffffu;
      if (job.mask) std::memcpy(&mask, job.mask + (r * chunks + c) * 4, 4);
      if (__builtin_expect(p + __builtin_popcount(mask) > last, 0)) {
        ok = false;
        break;
      }
      P::place(to, p, mask, P::to_float(scales[c * CHUNK / job.width]));
    }
    ok = ok && last - p < (job.bits == 8 ? 1 : 2);
  }
  delete[] row;
  return ok;
}

// What an ISA's table holds: the two kernels of a trait, which wants `x` as its X says.
template <class T>
constexpr Input input_of = std::is_same_v<typename T::X, float> ? INPUT_FLOAT : INPUT_SAME;

template <class T>
constexpr Kernel stream() {
  return {run_stream<T>, ROWS, input_of<T>};
}

template <class T>
constexpr Kernel panel() {
  return {run_panel<T>, ROWS * T::PANEL_BLOCKS, input_of<T>};
}

// The table of an ISA whose trait T serves every dtype by way of fp32, and whose P places codes.
template <template <DType> class T, template <DType> class P = Plain>
constexpr Isa isa_of(const char* name) {
  return {name,
          {stream<T<BF16>>(), stream<T<FP16>>(), stream<T<FP32>>()},
          {panel<T<BF16>>(), panel<T<FP16>>(), panel<T<FP32>>()},
          {{}, {}, stream<Dense<T<FP32>>>()},
          {run_expand<T<BF16>>, run_expand<T<FP16>>, run_expand<T<FP32>>},
          nullptr,
          {run_decode<P<BF16>>, run_decode<P<FP16>>, run_decode<P<FP32>>}};
}

}  // namespace
