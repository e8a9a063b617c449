// The two kernels every ISA shares, over a trait that says how to expand a chunk and multiply by it.
// Everything is in an anonymous namespace: each file that includes this gets its own copy for its own ISA.
//
// A trait T has: Elem (stored value), X (element of x), Acc, Wide (32 expanded weights in registers), and
//   expand(const Elem*& p, uint32_t mask) -> Wide, advancing p; reads at most CHUNK elements from p
//   dot(Acc, Wide, const X* x) -> Acc; spill(X*, Wide); fill(const X*) -> Wide; raw(Elem*, p&, mask)
//   zero() -> Acc; sum(Acc) -> float; to_float(Elem); from_float(float) -> Elem
#pragma once
#include <cstring>

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

template <class T, int B>
inline void panel_tokens(const Job& job, int64_t block, int64_t token, const typename T::X* panel) {
  using X = typename T::X;
  const X* x = static_cast<const X*>(job.x) + token * job.in;
  typename T::Acc acc[ROWS][B];
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < B; b++) acc[r][b] = T::zero();
  for (int64_t c = 0; c < job.in; c += CHUNK) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      typename T::Wide w = T::fill(panel + r * job.in + c);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) acc[r][b] = T::dot(acc[r][b], w, x + b * job.in + c);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < B; b++) put<T>(job, token + b, block * ROWS + r, T::sum(acc[r][b]));
}

// Each block is expanded once into a panel (ROWS, in) that serves all tokens.
template <class T>
bool run_panel(const Job& job, int64_t begin, int64_t end) {
  using Elem = typename T::Elem;
  using X = typename T::X;
  const int64_t chunks = job.in / CHUNK;
  X* panel = static_cast<X*>(::operator new(sizeof(X) * ROWS * job.in, std::align_val_t(64)));
  bool ok = true;
  for (int64_t block = begin; ok && block < end; block++) {
    const uint32_t* mask = job.mask + block * chunks * ROWS;
    const Elem *p, *last;
    ok = bounds(job, block, p, last);
    for (int64_t c = 0; ok && c < chunks; c++, mask += ROWS) {
      if (__builtin_expect(p > last, 0)) ok = false;
      for (int r = 0; ok && r < ROWS; r++) T::spill(panel + r * job.in + c * CHUNK, T::expand(p, mask[r]));
    }
    int64_t token = 0;
    for (; ok && job.tokens - token >= 4; token += 4) panel_tokens<T, 4>(job, block, token, panel);
    for (; ok && token < job.tokens; token++) panel_tokens<T, 1>(job, block, token, panel);
  }
  ::operator delete(panel, std::align_val_t(64));
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

}  // namespace
