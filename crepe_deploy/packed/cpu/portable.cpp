// Plain C++: the kernels for machines without AVX2. Vectorised only as far as the compiler manages.
#include "kernel.h"

namespace {

template <DType D>
struct Portable : Scalar<D> {
  using Elem = typename Scalar<D>::Elem;
  using X = float;
  static constexpr int AHEAD = 1024, STEP = 8, PANEL_BLOCKS = 1;
  struct Acc {
    float lane[8];
  };
  struct Wide {
    float lane[CHUNK];
  };
  using Vec = Acc;

  static Acc zero() { return Acc{}; }
  static float sum(const Acc& a) {
    return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
  }
  static Wide expand(const Elem*& p, uint32_t mask) {
    Wide w{};
    for (; mask; mask &= mask - 1) w.lane[__builtin_ctz(mask)] = Scalar<D>::to_float(*p++);
    return w;
  }
  static Acc dot(Acc acc, const Wide& w, const float* x) {
    for (int i = 0; i < CHUNK; i += 8)
      for (int j = 0; j < 8; j++) acc.lane[j] += w.lane[i + j] * x[i + j];
    return acc;
  }
  static Vec load(const float* x) {
    Vec v;
    std::memcpy(v.lane, x, sizeof(v.lane));
    return v;
  }
  static Acc mac(Acc acc, const Vec& w, const Vec& x) {
    for (int j = 0; j < 8; j++) acc.lane[j] += w.lane[j] * x.lane[j];
    return acc;
  }
  static void spill(float* to, const Wide& w) { std::memcpy(to, w.lane, sizeof(w.lane)); }
  static Wide fill(const float* from) {
    Wide w;
    std::memcpy(w.lane, from, sizeof(w.lane));
    return w;
  }
  static void raw(Elem* to, const Elem*& p, uint32_t mask) {
    std::memset(to, 0, sizeof(Elem) * CHUNK);
    for (; mask; mask &= mask - 1) to[__builtin_ctz(mask)] = *p++;
  }
};

}  // namespace

const crepe::Isa& crepe::isa_portable() {
  static const Isa isa = isa_of<Portable>("portable");
  return isa;
}
