// AMX: packed rows are expanded into tiles in the L1 cache, which then multiply the tiles of all tokens.
#include <sys/syscall.h>
#include <unistd.h>

#include "amx.h"

namespace {

constexpr int MAX_TILES = 4;  // tiles of tokens whose sums stay in tile registers
constexpr int RING = 8;       // expanded tiles kept: expansion runs ahead of multiplication

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

// Adds chunks [begin, end) of one group of rows times T tiles of tokens to `sums`; `fresh`: the sums start at zero.
template <int T>
bool run_group(Source& source, const char* b, int64_t begin, int64_t end, float (*sums)[256], bool fresh) {
  alignas(64) uint16_t ring[RING][TILE * CHUNK];
  alignas(64) float other[2][256];
  constexpr int64_t STEP = T * TILE_BYTES;
  constexpr int LEAD = 2;
  if (source.blocks < GROUP) std::memset(ring, 0, sizeof(ring));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (!fresh) {
    _tile_loadd(0, sums[0], 64);
    if (T > 1) _tile_loadd(1, sums[1], 64);
    if (T > 2) _tile_loadd(2, sums[2], 64);
    if (T > 3) _tile_loadd(3, sums[3], 64);
  }
  const int64_t chunks = end - begin;
  b += begin * STEP;
  bool ok = true;
  for (int64_t c = 0; c < (chunks < LEAD ? chunks : LEAD); c++) ok &= source.next(ring[c % RING]);
  int64_t c = 0;
  for (; c + LEAD + 1 < chunks; c += 2, b += 2 * STEP) {
    multiply<T>(ring[c % RING], b, false);
    ok &= source.next(ring[(c + LEAD) % RING]);
    multiply<T>(ring[(c + 1) % RING], b + STEP, true);
    ok &= source.next(ring[(c + 1 + LEAD) % RING]);
    if (__builtin_expect(!ok, 0)) return false;
  }
  for (; c < chunks; c++, b += STEP) {
    multiply<T>(ring[c % RING], b, c & 1);
    if (c + LEAD < chunks) ok &= source.next(ring[(c + LEAD) % RING]);
  }
  _tile_stored(0, sums[0], 64);
  if (T == 1) {
    _tile_stored(1, other[0], 64);
    add(sums[0], other[0]);
  } else {
    _tile_stored(1, sums[1], 64);
  }
  if (T == 2) {
    _tile_stored(2, other[0], 64);
    _tile_stored(3, other[1], 64);
    add(sums[0], other[0]);
    add(sums[1], other[1]);
  }
  if (T > 2) _tile_stored(2, sums[2], 64);
  if (T > 3) _tile_stored(3, sums[3], 64);
  return ok;
}

struct Partial {
  alignas(64) float sums[MAX_TILES][256];
  Source source;
};

// Up to 64 tokens, T tiles of them: each 16 rows go through all columns, their sums staying in tiles. Where x does not
// fit the L2 cache, all of FEW groups go through the columns that do before the next columns are begun.
template <int T>
bool run_few(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t X_BYTES = 1 << 20, FEW = 64;
  const int64_t chunks = job.in / CHUNK, fit = X_BYTES / (T * TILE_BYTES);
  const int64_t sweep = chunks <= fit ? 1 : FEW, depth = chunks <= fit ? chunks : fit;
  Partial* partial = new Partial[sweep];
  const char* x = static_cast<const char*>(job.x);
  bool ok = true;
  for (int64_t group = begin; ok && group < end; group += sweep) {
    const int64_t here = end - group < sweep ? end - group : sweep;
    for (int64_t g = 0; g < here; g++) ok &= partial[g].source.open(job, group + g);
    for (int64_t c = 0; ok && c < chunks; c += depth)
      for (int64_t g = 0; ok && g < here; g++)
        ok = run_group<T>(partial[g].source, x, c, chunks - c < depth ? chunks : c + depth, partial[g].sums, c == 0);
    for (int64_t g = 0; ok && g < here; g++)
      for (int t = 0; t < T; t++) put_tile(job, (group + g) * TILE, t * TILE, partial[g].sums[t]);
  }
  delete[] partial;
  return ok;
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
  switch ((job.tokens + TILE - 1) / TILE) {
    case 1: return run_few<1>(job, begin, end);
    case 2: return run_few<2>(job, begin, end);
    case 3: return run_few<3>(job, begin, end);
    case 4: return run_few<4>(job, begin, end);
    default: return run_many(job, begin, end);
  }
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
    isa.tile[BF16] = {run_amx, TILE, INPUT_TILES};
    isa.pack_x = pack_x;
    return isa;
  }();
  return isa;
}
