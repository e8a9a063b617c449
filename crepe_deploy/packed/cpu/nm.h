// Shared declarations of the packed N:M kernels. Plain C++: no torch, so that each file compiles for its own ISA.
//
// Kernel layout of a packed weight (out, in): rows in blocks of ROWS, columns in chunks of CHUNK. For each block, for
// each chunk, for each row: one 32-bit mask word (stream `mask`) and the kept values under it (stream `values`).
// Both streams are read front to back whatever the pattern; a value's place follows from population counts.
// Missing rows of the last block have empty masks. `offsets[b]` is where block b's values start; PAD elements that
// no mask reaches follow the last value, so that a whole chunk may be read at once.
#pragma once
#include <cstdint>

namespace crepe {

constexpr int ROWS = 4;
constexpr int CHUNK = 32;
constexpr int PAD = ROWS * CHUNK;

enum DType : int { BF16 = 0, FP16 = 1, FP32 = 2 };

struct Job {
  const void* values;       // values_len elements of the dtype, PAD of them padding
  int64_t values_len;
  const uint32_t* mask;     // blocks * (in / CHUNK) * ROWS
  const int64_t* offsets;   // blocks + 1
  int64_t out, in, tokens;
  const void* x;            // as the kernel's Input says
  const void* bias;         // out elements of the dtype, or null
  void* y;                  // (tokens, out) of the dtype
};

// Codes and scales as they are stored (coded.py), and the dense weight (rows, in) of the scales' dtype that they become.
struct Coded {
  const uint8_t* codes;     // rows of `stride` bytes
  int64_t stride;
  const void* scales;       // rows of `groups`
  int64_t groups;
  const uint8_t* mask;      // rows of in / 8 bytes, or null: all is kept
  void* weight;
  int64_t in, width;        // columns, and how many of them share a scale
  int bits;
};

// What a kernel wants `x` to be: (tokens, in) of the dtype, of fp32, or AMX tiles made by `pack_x`.
enum Input : int { INPUT_SAME = 0, INPUT_FLOAT = 1, INPUT_TILES = 2 };

// Computes row groups [begin, end) of `group` rows. False: the masks lead outside the values (nothing was read there).
using Run = bool (*)(const Job&, int64_t begin, int64_t end);

// Decodes rows [begin, end). False: the masks do not fit the codes (nothing was read outside them).
using Decode = bool (*)(const Coded&, int64_t begin, int64_t end);

struct Kernel {
  Run run;             // null: this ISA has no such kernel for the dtype
  int group;           // rows in a unit of work, a multiple of ROWS
  Input input;
};

struct Isa {
  const char* name;
  Kernel stream[3];    // by DType: packed weights are expanded in registers, for each few tokens again
  Kernel tile[3];      // an expanded tile serves all tokens
  Kernel control[3];   // a dense weight in the same layout by the loop of `stream`; for measurements only, may lack
  Run expand[3];       // writes the dense weight to `y`; x, bias and tokens are ignored
  void (*pack_x)(const void* x, void* tiles, int64_t tokens, int64_t in, int64_t begin, int64_t end);  // chunks
  Decode decode[3];    // by DType
};

const Isa& isa_portable();
const Isa& isa_avx2();
const Isa& isa_avx512();
const Isa& isa_avx512bf16();
const Isa& isa_amx();
bool amx_permitted();  // asks the kernel for the tile state once

}  // namespace crepe
