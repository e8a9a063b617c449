// AMX: packed rows are expanded into tiles in the L1 cache, which then multiply the tiles of all tokens.
// A = 16 weight rows x 32 columns, B = 16 column pairs x 16 tokens, C (fp32) = 16 weight rows x 16 tokens.
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512bf16.h"

namespace {

constexpr int TILE = 16;                    // rows of a tile, tokens of a tile
constexpr int GROUP = TILE / ROWS;          // blocks of a tile
constexpr int64_t TILE_BYTES = 1024;
constexpr int MAX_TILES = 4;                // tiles of tokens in one pass
constexpr int SPAN = 32;                    // tiles of tokens whose x is packed together: 512 tokens
constexpr int RING = 8;                     // expanded tiles kept: expansion runs ahead of multiplication

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

// C tiles 0-3, A tiles 4-5, B tiles 6-7. With one or two tiles of tokens, odd chunks have sums of their own.
template <int T>
inline void multiply(const uint16_t* a, const char* b, bool odd) {
  if constexpr (T == 1) {
    if (odd) {
      _tile_loadd(5, a, 64);
      _tile_loadd(7, b, 64);
      _tile_dpbf16ps(1, 5, 7);
    } else {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
  } else if constexpr (T == 2) {
    if (odd) {
      _tile_loadd(5, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, b + TILE_BYTES, 64);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + TILE_BYTES, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
  } else {
    if (odd) {
      _tile_loadd(5, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 5, 6);
      _tile_loadd(7, b + TILE_BYTES, 64);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, b + 2 * TILE_BYTES, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (T == 4) {
        _tile_loadd(7, b + 3 * TILE_BYTES, 64);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + TILE_BYTES, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, b + 2 * TILE_BYTES, 64);
      _tile_dpbf16ps(2, 4, 6);
      if constexpr (T == 4) {
        _tile_loadd(7, b + 3 * TILE_BYTES, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
  }
}

inline void add(float* to, const float* from) {
  for (int i = 0; i < 256; i += 16)
    _mm512_store_ps(to + i, _mm512_add_ps(_mm512_load_ps(to + i), _mm512_load_ps(from + i)));
}

template <int T>
bool run_group(const Job& job, int64_t group, int64_t first_tile, int64_t all_tiles) {
  const int64_t chunks = job.in / CHUNK;
  alignas(64) uint16_t ring[RING][TILE * CHUNK];
  alignas(64) float sums[MAX_TILES][256];
  const char* b = static_cast<const char*>(job.x) + first_tile * TILE_BYTES;
  const int64_t b_step = all_tiles * TILE_BYTES;
  Source source;
  if (!source.open(job, group)) return false;
  if (source.blocks < GROUP) std::memset(ring, 0, sizeof(ring));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  constexpr int LEAD = 2;
  bool ok = true;
  for (int64_t c = 0; c < (chunks < LEAD ? chunks : LEAD); c++) ok &= source.next(ring[c % RING]);
  int64_t c = 0;
  for (; c + LEAD + 1 < chunks; c += 2, b += 2 * b_step) {
    multiply<T>(ring[c % RING], b, false);
    ok &= source.next(ring[(c + LEAD) % RING]);
    multiply<T>(ring[(c + 1) % RING], b + b_step, true);
    ok &= source.next(ring[(c + 1 + LEAD) % RING]);
    if (__builtin_expect(!ok, 0)) return false;
  }
  for (; c < chunks; c++, b += b_step) {
    multiply<T>(ring[c % RING], b, c & 1);
    if (c + LEAD < chunks) ok &= source.next(ring[(c + LEAD) % RING]);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  if (T == 1) add(sums[0], sums[1]);
  if (T == 2) {
    add(sums[0], sums[2]);
    add(sums[1], sums[3]);
  }
  for (int t = 0; t < T; t++) put_tile(job, group * TILE, (first_tile + t) * TILE, sums[t]);
  return ok;
}

// Up to 64 tokens: each 16 rows go through all columns once, their sums staying in tiles.
bool run_few(const Job& job, int64_t begin, int64_t end) {
  const int64_t tiles = (job.tokens + TILE - 1) / TILE;
  for (int64_t group = begin; group < end; group++) {
    bool ok;
    switch (tiles) {
      case 1: ok = run_group<1>(job, group, 0, tiles); break;
      case 2: ok = run_group<2>(job, group, 0, tiles); break;
      case 3: ok = run_group<3>(job, group, 0, tiles); break;
      default: ok = run_group<4>(job, group, 0, tiles);
    }
    if (!ok) return false;
  }
  return true;
}

// Many tokens: blocks of columns whose x stays in the L2 cache, as do the sums of WIDE groups of rows; two groups are
// expanded at a time into the L1 cache and multiply two tiles of tokens at a time.
constexpr int DEPTH = 16;  // chunks in a block of columns
constexpr int WIDE = 16;   // groups of 16 rows

struct Scratch {
  alignas(64) uint16_t a[2][DEPTH][TILE * CHUNK];
  alignas(64) float sums[WIDE * SPAN][256];
};

// C tiles 0-3 = groups x tiles of tokens, A tiles 4-5, B tiles 6-7; `second` says whether the second tile is there.
inline void multiply_pair(const Scratch& s, float* c0, float* c1, const char* b, int64_t b_step, int depth, bool second) {
  _tile_loadd(0, c0, 64);
  _tile_loadd(2, c1, 64);
  if (second) {
    _tile_loadd(1, c0 + 256, 64);
    _tile_loadd(3, c1 + 256, 64);
    for (int k = 0; k < depth; k++, b += b_step) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, s.a[0][k], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, s.a[1][k], 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, b + TILE_BYTES, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(1, c0 + 256, 64);
    _tile_stored(3, c1 + 256, 64);
  } else {
    for (int k = 0; k < depth; k++, b += b_step) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, s.a[0][k], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, s.a[1][k], 64);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
  _tile_stored(0, c0, 64);
  _tile_stored(2, c1, 64);
}

bool run_wide(const Job& job, Scratch& s, int64_t group, int groups, int64_t first, int64_t tiles) {
  const int64_t chunks = job.in / CHUNK;
  Source source[WIDE + 1];
  for (int g = 0; g < groups; g++)
    if (!source[g].open(job, group + g)) return false;
  std::memset(s.sums, 0, sizeof(s.sums[0]) * (groups + (groups & 1)) * tiles);
  for (int64_t c = 0; c < chunks; c += DEPTH) {
    const int depth = chunks - c < DEPTH ? int(chunks - c) : DEPTH;
    const char* b = static_cast<const char*>(job.x) + (first * chunks + c * tiles) * TILE_BYTES;
    for (int g = 0; g < groups; g += 2) {
      bool ok = true;
      if (g + 1 == groups || source[g + 1].blocks < GROUP) std::memset(s.a, 0, sizeof(s.a));
      for (int k = 0; k < depth; k++) {
        ok &= source[g].next(s.a[0][k]);
        if (g + 1 < groups) ok &= source[g + 1].next(s.a[1][k]);
      }
      if (!ok) return false;
      for (int64_t t = 0; t < tiles; t += 2)
        multiply_pair(s, s.sums[g * tiles + t], s.sums[(g + 1) * tiles + t], b + t * TILE_BYTES, tiles * TILE_BYTES, depth,
                      t + 1 < tiles);
    }
  }
  for (int g = 0; g < groups; g++)
    for (int64_t t = 0; t < tiles; t++) put_tile(job, (group + g) * TILE, (first + t) * TILE, s.sums[g * tiles + t]);
  return true;
}

bool run_many(const Job& job, int64_t begin, int64_t end) {
  const int64_t all = (job.tokens + TILE - 1) / TILE;
  Scratch* scratch = new Scratch;
  bool ok = true;
  for (int64_t first = 0; ok && first < all; first += SPAN)
    for (int64_t group = begin; ok && group < end; group += WIDE)
      ok = run_wide(job, *scratch, group, end - group < WIDE ? int(end - group) : WIDE, first,
                    all - first < SPAN ? all - first : SPAN);
  delete scratch;
  return ok;
}

bool run_amx(const Job& job, int64_t begin, int64_t end) {
  Tiles tiles;
  return job.tokens <= MAX_TILES * TILE ? run_few(job, begin, end) : run_many(job, begin, end);
}

bool ask_permission() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

}  // namespace

bool crepe::amx_permitted() {
  static const bool permitted = ask_permission();
  return permitted;
}

const crepe::Isa& crepe::isa_amx() {
  static const Isa isa = [] {
    Isa isa = isa_avx512bf16();
    isa.name = "amx";
    isa.tile[BF16] = {run_amx, TILE, INPUT_TILES, 0};
    isa.pack_x = pack_x;
    return isa;
  }();
  return isa;
}
