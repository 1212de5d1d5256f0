// How often each of the 65,536 values of a 16-bit dtype is in a row: all that there is to know of the row but its
// order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "mlot/cpu/vector.h"

namespace mlot::MLOT_ISA {

// A row's distinct logits in descending order, without -inf.
struct CountedValues {
  std::vector<float> x;
  std::vector<uint32_t> all, kept;  // how often; how often in columns that are looked at
  bool nan;                         // there is one

  void clear() { x.clear(), all.clear(), kept.clear(), nan = false; }

  void add(float value, uint32_t n, uint32_t n_kept) {
    if (!x.empty() && x.back() == value) {  // -0 behind 0
      all.back() += n, kept.back() += n_kept;
    } else {
      x.push_back(value), all.push_back(n), kept.push_back(n_kept);
    }
  }
};

template <class T>
constexpr uint32_t kInfinityCode = 0x7f80;
template <>
constexpr uint32_t kInfinityCode<float16> = 0x7c00;

// The smallest and the largest of a row's codes, as numbers without and with a sign: what bounds those of either sign.
struct CodeRange {
  uint16_t low = 0xffff, high = 0;
  int16_t signed_low = 0x7fff, signed_high = -0x8000;
};

// Counters that a thread's rows share; they are zeros between two rows.
template <class T>
class KeyHistogram {
 public:
  // `mask` is null where all columns are looked at.
  void count(const T* x, const bool* mask, int64_t columns, CountedValues& values) {
    values.clear();
    if (columns < kWorthCounting) return sort(x, mask, columns, values);
    if (!counts_) counts_.reset(static_cast<uint32_t*>(std::calloc(2 * kBank, sizeof(uint32_t))));
    if (!counts_) throw std::bad_alloc();
    CodeRange range;
    for (int64_t start = 0; start < columns; start += kBlock) {  // which stays in the L1 cache
      const int64_t n = std::min(kBlock, columns - start);
      extend(x + start, n, range);
      if (mask) {
        add_masked(x + start, mask + start, n);
      } else {
        add(x + start, n);
      }
    }
    for (int64_t code = range.signed_high | (kSkip - 1); code >= range.low; code -= kSkip) {
      if (skips(code - (kSkip - 1))) continue;
      for (int64_t i = 0; i < kSkip; ++i) take_code(uint32_t(code - i), mask, values);
    }
    const int64_t smallest_magnitude = range.signed_low < 0 ? uint16_t(range.signed_low) : kCodes;
    for (int64_t code = smallest_magnitude & -kSkip; code <= range.high; code += kSkip) {
      if (skips(code)) continue;
      for (int64_t i = 0; i < kSkip; ++i) take_code(uint32_t(code + i), mask, values);
    }
  }

 private:
  static constexpr int64_t kCodes = 65536, kBlock = 4096, kSkip = 16;
  // A bank's length, no multiple of a page: addresses that differ by one would be taken for dependent.
  static constexpr int64_t kBank = kCodes + 272;
  static constexpr int64_t kWorthCounting = 2048;  // columns; below, looking through the counters costs more

  // Two banks: an increment waits for the last one of the same counter, and neighbours are often equal.
  void add(const T* x, int64_t columns) {
    uint32_t *even = counts_.get(), *odd = even + kBank;
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      uint64_t four;
      __builtin_memcpy(&four, x + j, sizeof(four));
      ++even[four & 0xffff];
      ++odd[four >> 16 & 0xffff];
      ++even[four >> 32 & 0xffff];
      ++odd[four >> 48];
    }
    for (; j < columns; ++j) ++even[x[j].bits];
  }

  void add_masked(const T* x, const bool* mask, int64_t columns) {
    uint32_t* counts = counts_.get();
    const uint8_t* looked_at = reinterpret_cast<const uint8_t*>(mask);
    // Arithmetic, for a branch is mispredicted where the mask has no order.
    for (int64_t j = 0; j < columns; ++j) ++counts[x[j].bits + (1 - int64_t(looked_at[j])) * kBank];
  }

  static void extend(const T* x, int64_t columns, CodeRange& range) {
    uint16_t low = range.low, high = range.high;
    int16_t signed_low = range.signed_low, signed_high = range.signed_high;
#pragma omp simd reduction(min : low, signed_low) reduction(max : high, signed_high)
    for (int64_t j = 0; j < columns; ++j) {
      const uint16_t code = x[j].bits;
      const int16_t as_signed = int16_t(code);
      low = code < low ? code : low;
      high = code > high ? code : high;
      signed_low = as_signed < signed_low ? as_signed : signed_low;
      signed_high = as_signed > signed_high ? as_signed : signed_high;
    }
    range = {low, high, signed_low, signed_high};
  }

  // Whether none of kSkip codes is there.
  bool skips(int64_t code) const {
    const uint32_t *a = counts_.get() + code, *b = a + kBank;
    uint32_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < kSkip; ++i) any |= a[i] | b[i];
    return any == 0;
  }

  void take_code(uint32_t code, const bool* mask, CountedValues& values) {
    uint32_t &a = counts_[code], &b = counts_[kBank + code];
    if (a + b == 0) return;
    add_code(code, a + b, mask ? a : a + b, values);
    a = b = 0;
  }

  static void add_code(uint32_t code, uint32_t n, uint32_t kept, CountedValues& values) {
    if ((code & 0x7fff) > kInfinityCode<T>) {
      values.nan = true;
    } else if (code != (0x8000 | kInfinityCode<T>)) {
      values.add(wide(T{uint16_t(code)}), n, kept);
    }
  }

  void sort(const T* x, const bool* mask, int64_t columns, CountedValues& values) {
    keys_.resize(columns);
    for (int64_t j = 0; j < columns; ++j) {
      const uint32_t code = x[j].bits, order = code & 0x8000 ? code : 0x7fff - code;
      keys_[j] = order << 1 | uint32_t(mask && !mask[j]);
    }
    std::sort(keys_.begin(), keys_.end());
    for (const uint32_t key : keys_) {
      const uint32_t order = key >> 1, code = order & 0x8000 ? order : 0x7fff - order;
      add_code(code, 1, !(key & 1), values);
    }
  }

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  // [2, kBank]: of even and odd columns; with a mask, of those that are looked at and the others. Not a vector: what a
  // row has no codes for is then never touched.
  std::unique_ptr<uint32_t[], Free> counts_;
  std::vector<uint32_t> keys_;
};

}  // namespace mlot::MLOT_ISA
