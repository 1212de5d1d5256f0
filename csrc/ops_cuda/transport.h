// What the doors of the transport operators share on a GPU.
#pragma once

#include "common.h"
#include "mlot/torch/transport.h"

namespace mlot::cuda {

// Of a number in sums.
inline int64_t bytes_of(ScalarType wide) { return wide == ScalarType::Double ? 8 : 4; }

// Device memory that a call works in.
inline Tensor room_of(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace mlot::cuda
