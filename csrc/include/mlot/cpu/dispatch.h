// Which instruction set the kernels run in: the best one of this machine, or the one that MLOT_CPU_CAPABILITY names.
#pragma once

namespace mlot {

enum class Isa { baseline, avx2, avx512 };

// Chosen at the first call and then kept. Throws std::runtime_error where MLOT_CPU_CAPABILITY is not one of default,
// avx2 and avx512, or is one that this machine does not have.
Isa isa();

}  // namespace mlot

// The object `name` of the chosen instruction set's namespace. A macro, because a name in a namespace is no template
// argument.
#ifndef MLOT_ONE_INSTRUCTION_SET
#define MLOT_SELECT(name)                                \
  (mlot::isa() == mlot::Isa::avx512 ? mlot::avx512::name \
   : mlot::isa() == mlot::Isa::avx2 ? mlot::avx2::name   \
                                    : mlot::baseline::name)
#else
#define MLOT_SELECT(name) (mlot::isa(), mlot::baseline::name)
#endif
