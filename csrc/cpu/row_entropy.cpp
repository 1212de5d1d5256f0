// row_entropy on a CPU; compiled once per instruction set.
#include "mlot/cpu/row_entropy.h"

#include <algorithm>
#include <type_traits>

#include "mlot/cpu/row_gradient.h"
#include "mlot/cpu/row_statistics.h"

namespace mlot::MLOT_ISA {
namespace {

constexpr double kLog2 = 0.6931471805599453;

// Of 2 kWidth columns, in the order of load_pair<T>: all ones where the mask's byte is not 0.
template <class A>
struct MaskPair {
  VectorBits<A> part[2];
};

template <class T, class A = Accumulator<T>>
MLOT_INLINE MaskPair<A> load_mask_pair(const bool* mask) {
  if constexpr (std::is_same_v<T, bfloat16>) {  // two neighbours in 16 bits
    typedef uint16_t Halves __attribute__((vector_size(2 * kWidth<A>)));
    Halves both;
    __builtin_memcpy(&both, mask, sizeof(both));
    return {{VectorBits<A>(__builtin_convertvector(both & 0xff, VectorBits<A>) != 0),
             VectorBits<A>(__builtin_convertvector(both >> 8, VectorBits<A>) != 0)}};
  } else {
    MaskPair<A> pair;
    for (int h = 0; h < 2; ++h) {
      typedef uint8_t Bytes __attribute__((vector_size(kWidth<A>)));
      Bytes bytes;
      __builtin_memcpy(&bytes, mask + h * kWidth<A>, sizeof(bytes));
      pair.part[h] = VectorBits<A>(__builtin_convertvector(bytes, VectorBits<A>) != 0);
    }
    return pair;
  }
}

template <class A>
MLOT_INLINE Vector<A> where(VectorBits<A> mask, Vector<A> x) {
  return std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(x) & mask);
}

// Sums over a row's columns of 2^t, 2^t u and 2^t u^2, with t = (x - peak) factor and u = t - center: of all columns,
// and of those that are looked at.
struct EntropySums {
  double total = 0, first = 0;
  double kept_total = 0, kept_first = 0, kept_second = 0;

  // The same sums after every t has fallen by `fall`, at center 0.
  void lower(double fall) {
    const double factor = std::exp2(-fall);
    kept_second = factor * (kept_second - 2 * fall * kept_first + fall * fall * kept_total);
    kept_first = factor * (kept_first - fall * kept_total);
    kept_total *= factor;
    first = factor * (first - fall * total);
    total *= factor;
  }
};

// Adds `columns` columns. A NaN gets into `total` and `first`, and from there into every output of the row. Where
// `ahead` is not null, it fetches the chunk that starts there: arithmetic alone would leave the memory idle.
template <bool kMasked, class T, class A = Accumulator<T>>
void add_columns(const T* x, const bool* mask, int64_t columns, A peak, A factor, A center, const T* ahead,
                 EntropySums& sums) {
  T pad[kTile];
  bool mask_pad[kTile] = {};
  Vector<A> total[2] = {}, first[2] = {}, kept_total[2] = {}, kept_first[2] = {}, kept_second[2] = {};
  for (int64_t i = 0; i < tiles_of(columns); ++i) {
    const T* tile = tile_at(x, columns, i, pad);
    const bool* looked_at = mask + i * kTile;
    if (kMasked && tile == pad) {
      std::copy(looked_at, mask + columns, mask_pad);
      looked_at = mask_pad;
    }
    if (ahead) prefetch_tile(ahead + i * kTile);
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTile; j += 2 * kWidth<A>) {
      const Pair<A> values = load_pair(tile + j);
      MaskPair<A> keep;
      if constexpr (kMasked) keep = load_mask_pair<T>(looked_at + j);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Vector<A> t = at_least_smallest<A>((values.part[h] - peak) * factor);  // finite at -inf, where 2^t is 0
        const Vector<A> e = exp2_negative<A>(t), u = t - center, eu = e * u;
        total[h] += e;
        first[h] += eu;
        if constexpr (kMasked) {
          kept_total[h] += where<A>(keep.part[h], e);
          kept_first[h] += where<A>(keep.part[h], eu);
          kept_second[h] += where<A>(keep.part[h], eu * u);
        } else {
          kept_second[h] += eu * u;
        }
      }
    }
  }
  const auto both = [](const Vector<A>(&parts)[2]) { return double(sum<A>(parts[0] + parts[1])); };
  sums.total += both(total);
  sums.first += both(first);
  sums.kept_total += both(kMasked ? kept_total : total);
  sums.kept_first += both(kMasked ? kept_first : first);
  sums.kept_second += both(kept_second);
}

template <bool kMasked, class T, class A = Accumulator<T>>
EntropySums sums_of(const T* x, const LogitsRows& rows, double factor, RowStatistics<A>& row) {
  EntropySums sums;
  const A center = row.mean * A(factor);
  for (int64_t start = 0; start < rows.vocab_size; start += kChunk) {
    const int64_t columns = std::min(kChunk, rows.vocab_size - start);
    if (!rows.standardize) {
      const A peak = tile_maxima(x + start, columns, static_cast<A*>(nullptr));
      if (peak > row.peak) {
        if (row.peak != -INFINITY) sums.lower((double(peak) - double(row.peak)) * factor);
        row.peak = peak;
      }
    }
    const A below = row.peak == -INFINITY ? A(0) : row.peak;  // -inf so far, whose 2^t is 0; or NaN, which shows
    const T* ahead = start + 2 * kChunk <= rows.vocab_size ? x + start + kChunk : nullptr;
    add_columns<kMasked>(x + start, kMasked ? rows.column_mask + start : nullptr, columns, below, A(factor), center,
                         ahead, sums);
  }
  return sums;
}

template <class A>
void write(const RowEntropyScalars<void*>& outputs, int64_t slot, double entropy, double mass, double log_total,
           double moment, const RowStatistics<A>& row) {
  static_cast<A*>(outputs.entropy)[slot] = A(entropy);
  static_cast<A*>(outputs.mass)[slot] = A(mass);
  static_cast<A*>(outputs.peak)[slot] = row.peak;
  static_cast<A*>(outputs.log_total)[slot] = A(log_total);
  static_cast<A*>(outputs.mean)[slot] = row.mean;
  static_cast<A*>(outputs.scale)[slot] = row.scale;
  static_cast<A*>(outputs.slope)[slot] = row.slope;
  static_cast<A*>(outputs.moment)[slot] = A(moment);
}

template <class T, class A = Accumulator<T>>
void forward_row(const LogitsRows& rows, const T* x, const RowEntropyScalars<void*>& outputs, int64_t slot) {
  RowStatistics<A> row = rows.standardize ? standardized(x, rows.vocab_size) : RowStatistics<A>{A(-INFINITY), 0, 1, 0};
  const double factor = kLog2E / (rows.temperatures[0] * double(row.scale));  // of x - peak in t
  const EntropySums sums =
      rows.column_mask ? sums_of<true>(x, rows, factor, row) : sums_of<false>(x, rows, factor, row);
  const double total = row.peak == -INFINITY ? NAN : sums.total;  // a row of -inf alone is 0 / 0, as in plain torch
  const double log_total = std::log(total);
  const double log_scale = rows.log_scale ? static_cast<const A*>(rows.log_scale)[slot] : 0;

  // On the columns looked at p = 2^t exp(offset) and log p = log(2) u + at_center. W may be taken about any point, and
  // near the row's mean its two terms are small.
  const double offset = log_scale - log_total, scale = std::exp(offset);
  const double at_center = offset + kLog2 * double(row.mean) * factor;
  double mass = 0, entropy = 0, moment = 0;
  if (scale != 0) {
    mass = scale * sums.kept_total;
    entropy = -scale * (kLog2 * sums.kept_first + at_center * sums.kept_total);
    moment = (mass - entropy) * sums.first / total;
    moment -= scale * (kLog2 * sums.kept_second + (at_center + 1) * sums.kept_first);
  }
  write(outputs, slot, entropy, mass, log_total, moment / factor, row);
}

// A row's scalars of the gradient, q grad_inverse ((M - H) - factor_of_p (log p + 1)) - (x - peak - mean)
// through_scale. In this form all is 0 where every logit is equal, whatever they are divided by.
template <class A>
struct GradientScalars {
  A peak, inverse, log_total;
  A grad_inverse;  // grad / (temperature scale)
  A rest;          // M - H
  A factor_of_p;   // exp(log_scale): p over q on the columns looked at
  A log_scale;     // + 1
  A mean, through_scale;
};

// Of 2 kWidth columns.
template <bool kMasked, bool kThroughScale, class T, class A = Accumulator<T>>
MLOT_INLINE void gradient_of(const T* x, const bool* mask, const GradientScalars<A>& s, T* out) {
  const Pair<A> values = load_pair(x);
  MaskPair<A> keep;
  if constexpr (kMasked) keep = load_mask_pair<T>(mask);
  Pair<A> gradient;
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const Vector<A> below = values.part[h] - s.peak;
    // Finite at -inf, where 2^t is 0.
    const Vector<A> log_q = larger(all(A(Exp2<A>::smallest * kLog2)), below * s.inverse - s.log_total);
    const Vector<A> q = exp2_negative<A>(log_q * A(kLog2E));
    Vector<A> of_p = s.factor_of_p * (log_q + s.log_scale);
    if constexpr (kMasked) of_p = where<A>(keep.part[h], of_p);
    Vector<A> dx = q * s.grad_inverse * (s.rest - of_p);
    if constexpr (kThroughScale) {
      dx = where<A>(VectorBits<A>(below != A(-INFINITY)), dx - (below - s.mean) * s.through_scale);
    }
    gradient.part[h] = dx;
  }
  store_pair(gradient, out);
}

template <bool kMasked, bool kThroughScale, class T, class A = Accumulator<T>>
void gradient_row(const T* x, const bool* mask, int64_t columns, const GradientScalars<A>& s, T* out) {
  constexpr int64_t kStep = 2 * kWidth<A>;
  int64_t j = 0;
  for (; j + kStep <= columns; j += kStep) {
    gradient_of<kMasked, kThroughScale>(x + j, kMasked ? mask + j : nullptr, s, out + j);
  }
  if (j == columns) return;
  T rest[kStep] = {}, rest_out[kStep];
  bool rest_mask[kStep] = {};
  std::copy(x + j, x + columns, rest);
  if (kMasked) std::copy(mask + j, mask + columns, rest_mask);
  gradient_of<kMasked, kThroughScale>(rest, rest_mask, s, rest_out);
  std::copy(rest_out, rest_out + (columns - j), out + j);
}

template <class T, class A = Accumulator<T>>
void backward_row(const LogitsRows& rows, const T* x, const RowEntropyScalars<const void*>& saved, double grad,
                  int64_t slot, T* out) {
  const auto at = [slot](const void* rows) { return static_cast<const A*>(rows)[slot]; };
  const double inverse = 1 / (rows.temperatures[0] * double(at(saved.scale)));
  const double log_scale = rows.log_scale ? double(at(rows.log_scale)) : 0;
  const double moment = at(saved.moment), slope = at(saved.slope);
  const GradientScalars<A> scalars{at(saved.peak),
                                   A(inverse),
                                   at(saved.log_total),
                                   A(grad * inverse),
                                   at(saved.mass) - at(saved.entropy),
                                   A(std::exp(log_scale)),
                                   A(std::exp(log_scale) == 0 ? 0 : log_scale + 1),  // p = 0 there: not 0 * -inf
                                   at(saved.mean),
                                   A(slope * grad * moment / rows.temperatures[0])};
  const auto run = rows.column_mask ? (slope != 0 ? gradient_row<true, true, T> : gradient_row<true, false, T>)
                                    : (slope != 0 ? gradient_row<false, true, T> : gradient_row<false, false, T>);
  run(x, rows.column_mask, rows.vocab_size, scalars, out);
}

template <class T, class A = Accumulator<T>>
void forward(const RowEntropyForward& call, const Parallel& parallel) {
  const LogitsRows& rows = call.rows;
  parallel(rows.all_slots(), worth_a_thread(rows.vocab_size), [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) {
      if (const T* x = row_of<T>(rows, slot)) {
        forward_row(rows, x, call.made, slot);
      } else {
        write(call.made, slot, 0, 0, 0, 0, RowStatistics<A>{0, 0, 0, 0});
      }
    }
  });
}

template <class T, class A = Accumulator<T>>
void backward(const RowEntropyBackward& call, const Parallel& parallel) {
  const LogitsRows& rows = call.rows;
  const auto at = [](const void* scalars, int64_t slot) { return static_cast<const A*>(scalars)[slot]; };
  for (int64_t slot = 0; slot < rows.all_slots(); ++slot) {
    const A entropy = at(call.saved.entropy, slot), mass = at(call.saved.mass, slot);
    static_cast<A*>(call.grad_log_scale)[slot] = rows.index[slot] < 0 ? A(0) : at(call.grad, slot) * (entropy - mass);
  }
  write_rows<T>(rows, call.grad_values, parallel, [&](int64_t slot, T* out) {
    backward_row(rows, row_of<T>(rows, slot), call.saved, at(call.grad, slot), slot, out);
  });
}

}  // namespace

extern const RowEntropy row_entropy = {{forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
                                       {backward<float>, backward<bfloat16>, backward<float16>, backward<double>}};

}  // namespace mlot::MLOT_ISA
