// The kernels as torch sees them: the operator's CPU implementation, and C functions for everything else.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "nm.h"

namespace {

using namespace crepe;
using at::Tensor;

enum Choice : int8_t { AUTO = 0, STREAM = 1, TILE = 2, EXPAND = 3, DENSE = 4, CONTROL = 5 };
constexpr int BUCKETS = 10;

struct Level {
  const char* name;
  bool (*supported)();
  const Isa& (*isa)();
};

#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
}
bool has_amx() {
#ifdef __linux__
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d >> 22 & 1) && (d >> 24 & 1) && amx_permitted();  // AMX-BF16, AMX-TILE
#else
  return false;
#endif
}
#endif
bool always() { return true; }

const Level levels[] = {
#ifdef __x86_64__
    {"amx", has_amx, isa_amx},
    {"avx512bf16", has_avx512bf16, isa_avx512bf16},
    {"avx512", has_avx512, isa_avx512},
    {"avx2", has_avx2, isa_avx2},
#endif
    {"portable", always, isa_portable},
};

std::atomic<const Isa*> current{nullptr};

DType dtype_of(const Tensor& t) {
  if (t.scalar_type() == at::kBFloat16) return BF16;
  if (t.scalar_type() == at::kHalf) return FP16;
  TORCH_CHECK(t.scalar_type() == at::kFloat, "packed linear: dtype ", t.scalar_type(), " is not bf16, fp16 or fp32");
  return FP32;
}

int bucket_of(int64_t tokens) {
  int bucket = 0;
  while (bucket < BUCKETS - 1 && (int64_t(1) << bucket) < tokens) bucket++;
  return bucket;
}

// Without a measurement: AMX for everything where there is AMX, else registers for a few tokens, panels for a small
// batch, the dense GEMM for prefill.
Choice guess(const Isa& isa, DType dtype, int64_t tokens) {
  const bool tiles = isa.tile[dtype].input == INPUT_TILES;
  if (tokens <= 4 && !tiles) return STREAM;
  return tiles || tokens <= 32 ? TILE : EXPAND;
}

// Runs a kernel over the groups of rows that hold rows [first, first + count); `first` is a multiple of the group.
void run(Run kernel, int group, const Job& job, int64_t first, int64_t count) {
  std::atomic<bool> ok{true};
  at::parallel_for(first / group, (first + count + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
    if (!kernel(job, begin, end)) ok = false;
  });
  TORCH_CHECK(ok, "packed linear: the masks do not match the values; the weight is damaged");
}

Tensor prepare_x(const Isa& isa, const Kernel& kernel, const Tensor& x) {
  if (kernel.input == INPUT_SAME) return x;
  if (kernel.input == INPUT_FLOAT) return x.to(at::kFloat);
  const int64_t tokens = x.size(0), in = x.size(1), tiles = (tokens + 15) / 16;
  Tensor packed = at::empty({in / CHUNK * tiles * 512}, x.options());
  const void* from = x.const_data_ptr();
  void* to = packed.mutable_data_ptr();
  at::parallel_for(0, in / CHUNK, tokens > 16 ? 16 : 256,
                   [&](int64_t begin, int64_t end) { isa.pack_x(from, to, tokens, in, begin, end); });
  return packed;
}

Job job_of(const Tensor& values, const Tensor& mask, const Tensor& offsets, int64_t out, int64_t in) {
  TORCH_CHECK(in > 0 && in % CHUNK == 0, "packed linear: ", in, " input columns are not a multiple of ", CHUNK);
  const int64_t blocks = (out + ROWS - 1) / ROWS;
  TORCH_CHECK(out >= 0 && values.is_cpu() && values.is_contiguous() && values.dim() == 1 && values.numel() >= PAD,
              "packed linear: values must be a flat CPU tensor made by prepare()");
  TORCH_CHECK(mask.is_cpu() && mask.is_contiguous() && mask.scalar_type() == at::kInt &&
                  mask.numel() == blocks * ROWS * (in / CHUNK),
              "packed linear: the mask does not fit a weight of ", out, " x ", in);
  TORCH_CHECK(offsets.is_cpu() && offsets.is_contiguous() && offsets.scalar_type() == at::kLong &&
                  offsets.numel() == blocks + 1,
              "packed linear: the offsets do not fit a weight of ", out, " x ", in);
  Job job{};
  job.values = values.const_data_ptr();
  job.values_len = values.numel();
  job.mask = static_cast<const uint32_t*>(mask.const_data_ptr());
  job.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  job.out = out;
  job.in = in;
  return job;
}

Tensor expand(const Tensor& values, const Tensor& mask, const Tensor& offsets, int64_t out, int64_t in) {
  Job job = job_of(values, mask, offsets, out, in);
  const Isa& isa = *current.load();
  Tensor dense = at::empty({out, in}, values.options());
  job.y = dense.mutable_data_ptr();
  run(isa.expand[dtype_of(values)], ROWS, job, 0, out);
  return dense;
}

// A few rows of the weight at a time become dense in one scratch buffer, which the dense GEMM then reads from the cache.
Tensor linear_by_panels(const Isa& isa, Job job, const Tensor& x, const Tensor& values,
                        const std::optional<Tensor>& bias) {
  constexpr int64_t PANEL_BYTES = 8 << 20;
  const int64_t row_bytes = job.in * values.element_size();
  const int64_t rows = std::max<int64_t>(64, PANEL_BYTES / row_bytes / 64 * 64);
  const Run expand_rows = isa.expand[dtype_of(values)];
  Tensor scratch = at::empty({std::min(rows, job.out), job.in}, values.options());
  Tensor y = at::empty({x.size(0), job.out}, x.options());
  for (int64_t first = 0; first < job.out; first += rows) {
    const int64_t count = std::min(rows, job.out - first);
    job.y = static_cast<char*>(scratch.mutable_data_ptr()) - first * row_bytes;
    run(expand_rows, ROWS, job, first, count);
    const std::optional<Tensor> part = bias ? std::optional<Tensor>(bias->narrow(0, first, count)) : std::nullopt;
    y.narrow(1, first, count).copy_(at::linear(x, scratch.narrow(0, 0, count), part));
  }
  return y;
}

Tensor nm_linear(const Tensor& input, const Tensor& values, const Tensor& mask, const Tensor& offsets,
                 const Tensor& plan, const std::optional<Tensor>& bias, const std::optional<Tensor>& dense,
                 int64_t out) {
  TORCH_CHECK(input.dim() >= 1 && input.is_cpu(), "packed linear: x must be a CPU tensor (..., in)");
  const int64_t in = input.size(-1);
  Job job = job_of(values, mask, offsets, out, in);
  const DType dtype = dtype_of(values);
  TORCH_CHECK(input.scalar_type() == values.scalar_type(), "packed linear: x is ", input.scalar_type(),
              ", the weight ", values.scalar_type());
  TORCH_CHECK(!bias || (bias->is_cpu() && bias->is_contiguous() && bias->dim() == 1 && bias->numel() == out &&
                        bias->scalar_type() == values.scalar_type()),
              "packed linear: the bias must be (", out, ") of the weight's dtype");
  TORCH_CHECK(plan.is_cpu() && plan.is_contiguous() && plan.scalar_type() == at::kChar && plan.numel() == BUCKETS,
              "packed linear: the plan must be int8 (", BUCKETS, ")");
  TORCH_CHECK(!dense || (dense->dim() == 2 && dense->size(0) == out && dense->size(1) == in),
              "packed linear: the dense copy has another shape");
  const Isa* isa = current.load();
  TORCH_CHECK(isa, "packed linear: no instruction set was chosen");
  auto shape = input.sizes().vec();
  shape.back() = out;
  Tensor x = input.reshape({-1, in}).contiguous();
  job.tokens = x.size(0);
  if (job.tokens == 0 || out == 0) return at::empty(shape, input.options());
  auto choice = Choice(static_cast<const int8_t*>(plan.const_data_ptr())[bucket_of(job.tokens)]);
  if (choice == AUTO || (choice == DENSE && !dense)) choice = guess(*isa, dtype, job.tokens);
  if (choice == DENSE) return at::linear(input, *dense, bias);
  if (choice == EXPAND) return linear_by_panels(*isa, job, x, values, bias).reshape(shape);
  const Kernel& kernel = (choice == STREAM ? isa->stream : choice == TILE ? isa->tile : isa->control)[dtype];
  TORCH_CHECK(kernel.run, "packed linear: these kernels have no such choice for this dtype");
  Tensor ready = prepare_x(*isa, kernel, x);
  Tensor y = at::empty(shape, input.options());
  job.x = ready.const_data_ptr();
  job.bias = bias ? bias->const_data_ptr() : nullptr;
  job.y = y.mutable_data_ptr();
  run(kernel.run, kernel.group, job, 0, out);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(crepe_deploy, CPU, m) {
  m.impl("nm_linear", nm_linear);
  m.impl("nm_expand", expand);
}

#pragma GCC visibility push(default)
extern "C" {

// The levels this machine supports, best first, one a line.
const char* crepe_supported() {
  static const std::string names = [] {
    std::string all;
    for (const Level& level : levels)
      if (level.supported()) all += std::string(level.name) + "\n";
    return all;
  }();
  return names.c_str();
}

// 0 when level `name` is now used, -1 when it is unknown or this machine does not support it.
int crepe_use(const char* name) {
  for (const Level& level : levels)
    if (!std::strcmp(level.name, name) && level.supported()) {
      current = &level.isa();
      return 0;
    }
  return -1;
}

// Moves values between the stored order (row by row, row r from row_start[r]) and the kernels' (see nm.h), with
// their masks and, towards the kernels, the blocks' offsets; `size` is an element's bytes. Returns -1, or the first row
// whose mask does not keep row_start[r + 1] - row_start[r] values.
int64_t crepe_relayout(char* stored, uint32_t* stored_mask, const int64_t* row_start, char* kernel,
                       uint32_t* kernel_mask, const int64_t* offsets, int64_t out, int64_t in, int64_t size,
                       int64_t to_kernel) {
  const int64_t chunks = in / CHUNK;
  std::atomic<int64_t> bad{-1};
  at::parallel_for(0, (out + ROWS - 1) / ROWS, 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      uint32_t* masks = kernel_mask + block * chunks * ROWS;
      const int rows = int(std::min<int64_t>(ROWS, out - block * ROWS));
      int64_t at[ROWS], k = offsets[block];
      for (int r = 0; r < rows; r++) {
        const int64_t row = block * ROWS + r;
        int64_t kept = 0;
        for (int64_t c = 0; c < chunks; c++)
          kept += __builtin_popcount(to_kernel ? stored_mask[row * chunks + c] : masks[c * ROWS + r]);
        at[r] = row_start[row];
        if (kept != row_start[row + 1] - row_start[row]) bad = row;
      }
      if (bad >= 0) return;
      for (int64_t c = 0; c < chunks; c++)
        for (int r = 0; r < ROWS; r++) {
          if (r >= rows) {
            if (to_kernel) masks[c * ROWS + r] = 0;
            continue;
          }
          uint32_t& there = stored_mask[(block * ROWS + r) * chunks + c];
          uint32_t& here = masks[c * ROWS + r];
          if (to_kernel) here = there;
          else there = here;
          const int64_t kept = __builtin_popcount(here);
          if (to_kernel) std::memcpy(kernel + k * size, stored + at[r] * size, kept * size);
          else std::memcpy(stored + at[r] * size, kernel + k * size, kept * size);
          at[r] += kept;
          k += kept;
        }
    }
  });
  return bad;
}

// Decodes a coded weight (rows, in) into `weight`; dtype: of scales and weight, as DType has it. Returns 0, or -1 where
// masks and codes disagree.
int crepe_decode(const uint8_t* codes, int64_t stride, const void* scales, int64_t groups, const uint8_t* mask,
                 void* weight, int64_t rows, int64_t in, int64_t width, int64_t bits, int64_t dtype) {
  const Coded job{codes, stride, scales, groups, mask, weight, in, width, int(bits)};
  const Decode decode = current.load()->decode[dtype];
  std::atomic<bool> ok{true};
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    if (!decode(job, begin, end)) ok = false;
  });
  return ok ? 0 : -1;
}

// Asks for huge pages under [start, start + bytes), which several threads may read faster. Returns 0 when granted.
int crepe_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + bytes) & ~(PAGE - 1);
  return first < last ? madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) : -1;
#else
  return (void)start, (void)bytes, -1;
#endif
}

}  // extern "C"
#pragma GCC visibility pop
