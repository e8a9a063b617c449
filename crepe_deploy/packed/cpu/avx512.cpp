// See avx512.h; the kernels of machines with AVX-512 but without its BF16 and VBMI2 parts.
#include "avx512.h"

const crepe::Isa& crepe::isa_avx512() {
  static const Isa isa = isa_of<Avx512, Place512>("avx512");
  return isa;
}
