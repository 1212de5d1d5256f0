#include "mlot/cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mlot {
namespace {

Isa best() {
#ifndef MLOT_ONE_INSTRUCTION_SET
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa choose() {
  const char* variable = std::getenv("MLOT_CPU_CAPABILITY");
  const std::string named = variable ? variable : "";
  if (named.empty()) return best();
  if (named != "default" && named != "avx2" && named != "avx512") {
    throw std::runtime_error("MLOT_CPU_CAPABILITY must be default, avx2 or avx512, got '" + named + "'");
  }
  const Isa asked = named == "avx512" ? Isa::avx512 : named == "avx2" ? Isa::avx2 : Isa::baseline;
  if (asked > best()) {
    throw std::runtime_error("MLOT_CPU_CAPABILITY=" + named +
                             ": this machine does not have it; unset it to run in the best one that it has");
  }
  return asked;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace mlot
