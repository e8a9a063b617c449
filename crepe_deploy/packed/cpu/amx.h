// What the AMX kernels share: the tile configuration, packing x into tiles, expanding weights into tiles, storing sums.
// A = 16 weight rows x 32 columns, B = 16 column pairs x 16 tokens, C (fp32) = 16 weight rows x 16 tokens.
#pragma once
#include "avx512bf16.h"

namespace {

constexpr int TILE = 16;                    // rows of a tile, tokens of a tile
constexpr int GROUP = TILE / ROWS;          // blocks of a tile
constexpr int64_t TILE_BYTES = 1024;
constexpr int SPAN = 32;                    // tiles of tokens whose x is packed together: 512 tokens

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Other code in this thread may believe its own tile configuration still holds: put it back.
struct Tiles {
  Config before;
  Tiles() {
    _tile_storeconfig(&before);
    const Config mine;
    _tile_loadconfig(&mine);
  }
  ~Tiles() {
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
  }
};

inline void transpose16(__m512i v[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Tiles of x, zero for tokens that are not there: [span of tokens][chunk][tile of the span][column pair][token].
void pack_x(const void* from, void* to, int64_t tokens, int64_t in, int64_t begin, int64_t end) {
  const uint16_t* x = static_cast<const uint16_t*>(from);
  for (int64_t first = 0; first < tokens; first += SPAN * TILE) {
    const int64_t here = tokens - first < SPAN * TILE ? tokens - first : SPAN * TILE;
    const int64_t tiles = (here + TILE - 1) / TILE;
    char* base = static_cast<char*>(to) + first / TILE * (in / CHUNK) * TILE_BYTES;
    for (int64_t c = begin; c < end; c++)
      for (int64_t tile = 0; tile < tiles; tile++) {
        __m512i v[16];
        for (int t = 0; t < 16; t++) {
          const int64_t token = tile * TILE + t;
          v[t] = token < here ? _mm512_loadu_si512(x + (first + token) * in + c * CHUNK) : _mm512_setzero_si512();
        }
        transpose16(v);
        char* out = base + (c * tiles + tile) * TILE_BYTES;
        for (int p = 0; p < 16; p++) _mm512_store_si512(out + p * 64, v[p]);
      }
  }
}

// One tile of sums (rows x tokens) into y, transposed, with bias.
inline void put_tile(const Job& job, int64_t row, int64_t token, const float* sums) {
  const int rows = job.out - row < TILE ? int(job.out - row) : TILE;
  const int tokens = job.tokens - token < TILE ? int(job.tokens - token) : TILE;
  const __mmask16 there = __mmask16((1u << rows) - 1);
  __m512i v[16];
  for (int i = 0; i < 16; i++) v[i] = _mm512_load_si512(sums + i * TILE);
  transpose16(v);
  __m512 bias = _mm512_setzero_ps();
  if (job.bias) {
    const __m256i half = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(job.bias) + row);
    bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  uint16_t* y = static_cast<uint16_t*>(job.y) + token * job.out + row;
  for (int t = 0; t < tokens; t++, y += job.out) {
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_add_ps(_mm512_castsi512_ps(v[t]), bias));
    _mm256_mask_storeu_epi16(y, there, (__m256i)half);
  }
}

// The expansion of 16 rows: four streams of packed blocks, one tile at a time.
struct Source {
  const uint16_t* p[GROUP];
  const uint16_t* last;
  const uint32_t* mask[GROUP];
  int blocks;

  bool open(const Job& job, int64_t group) {
    const int64_t chunks = job.in / CHUNK, all = (job.out + ROWS - 1) / ROWS;
    blocks = all - group * GROUP < GROUP ? int(all - group * GROUP) : GROUP;
    for (int i = 0; i < blocks; i++) {
      mask[i] = job.mask + (group * GROUP + i) * chunks * ROWS;
      if (!bounds(job, group * GROUP + i, p[i], last)) return false;
    }
    return true;
  }
  template <int N>
  inline bool next_n(uint16_t* tile) {
    bool ok = true;
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      ok &= p[i] <= last;
      const uint16_t* q = p[i] <= last ? p[i] : last;
      _mm_prefetch(reinterpret_cast<const char*>(q) + 1024, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(q) + 1088, _MM_HINT_T0);
      for (int r = 0; r < ROWS; r++) _mm512_store_si512(tile + (i * ROWS + r) * CHUNK, expand32(q, mask[i][r]));
      p[i] = q;
      mask[i] += ROWS;
    }
    return ok;
  }
  inline bool next(uint16_t* tile) {
    if (__builtin_expect(blocks == GROUP, 1)) return next_n<GROUP>(tile);
    if (blocks == 1) return next_n<1>(tile);
    if (blocks == 2) return next_n<2>(tile);
    return next_n<3>(tile);
  }
};

}  // namespace
