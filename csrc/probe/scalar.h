// What one element goes through, over arrays: the probe's door to scalar.h and vector.h, in the chosen instruction set.
#pragma once

#include <cstdint>

namespace mlot {

struct ScalarProbe {
  // e^x and 2^t, for x and t from -inf to 0.
  void (*exp_negative)(const float* x, float* out, int64_t n);
  void (*exp2_negative)(const float* t, float* out, int64_t n);
  void (*exp2_negative_double)(const double* t, double* out, int64_t n);
  void (*logarithm)(const float* x, float* out, int64_t n);
  void (*logarithm_double)(const double* x, double* out, int64_t n);
  // bfloat16, float16; one by one and in vectors, where n is a multiple of 64.
  void (*wide[2])(const uint16_t* bits, float* out, int64_t n);
  void (*narrow[2])(const float* x, uint16_t* bits, int64_t n);
  void (*load_pair[2])(const uint16_t* bits, float* out, int64_t n);
  void (*store_pair[2])(const float* x, uint16_t* bits, int64_t n);
};

namespace baseline {
extern const ScalarProbe scalar_probe;
}
namespace avx2 {
extern const ScalarProbe scalar_probe;
}
namespace avx512 {
extern const ScalarProbe scalar_probe;
}

}  // namespace mlot
