#include "scalar.h"

#include <type_traits>

#include "mlot/cpu/scalar.h"
#include "mlot/cpu/vector.h"

namespace mlot::MLOT_ISA {
namespace {

void each_exp_negative(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp_negative(x[i]);
}

template <class A>
void each_exp2_negative(const A* t, A* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * kWidth<A>) {
    Pair<A> pair = load_pair(t + i);
    for (auto& part : pair.part) part = exp2_negative<A>(at_least_smallest<A>(part));
    store_pair(pair, out + i);
  }
}

template <class A>
void each_logarithm(const A* x, A* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<A>) store<A>(logarithm<A>(load(x + i)), out + i);
}

template <class T>
void each_wide(const uint16_t* bits, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = wide(T{bits[i]});
}

template <class T>
void each_narrow(const float* x, uint16_t* bits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T rounded;
    narrow(x[i], rounded);
    bits[i] = rounded.bits;
  }
}

// Where element i of 2 kWidth lies in a Pair that was loaded from T.
template <class T>
float& element(Pair<float>& pair, int i) {
  float* parts = reinterpret_cast<float*>(&pair);
  constexpr bool kNeighboursApart = std::is_same_v<T, bfloat16>;
  return kNeighboursApart ? parts[i % 2 * kWidth<float> + i / 2] : parts[i];
}

template <class T>
void each_load_pair(const uint16_t* bits, float* out, int64_t n) {
  for (int64_t start = 0; start < n; start += 2 * kWidth<float>) {
    Pair<float> pair = load_pair(reinterpret_cast<const T*>(bits + start));
    for (int i = 0; i < 2 * kWidth<float>; ++i) out[start + i] = element<T>(pair, i);
  }
}

template <class T>
void each_store_pair(const float* x, uint16_t* bits, int64_t n) {
  for (int64_t start = 0; start < n; start += 2 * kWidth<float>) {
    Pair<float> pair;
    for (int i = 0; i < 2 * kWidth<float>; ++i) element<T>(pair, i) = x[start + i];
    store_pair(pair, reinterpret_cast<T*>(bits + start));
  }
}

}  // namespace

extern const ScalarProbe scalar_probe = {
    each_exp_negative,
    each_exp2_negative<float>,
    each_exp2_negative<double>,
    each_logarithm<float>,
    each_logarithm<double>,
    {each_wide<bfloat16>, each_wide<float16>},
    {each_narrow<bfloat16>, each_narrow<float16>},
    {each_load_pair<bfloat16>, each_load_pair<float16>},
    {each_store_pair<bfloat16>, each_store_pair<float16>},
};

}  // namespace mlot::MLOT_ISA
