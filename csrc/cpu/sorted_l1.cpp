// sorted_l1 on a CPU; compiled once per instruction set.
#include "mlot/cpu/sorted_l1.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "mlot/cpu/row_gradient.h"
#include "mlot/cpu/sorted_l1_gradient.h"
#include "mlot/cpu/sorted_l1_order.h"

namespace mlot::MLOT_ISA {
namespace {

// The wider of two accumulators.
template <class S, class T>
using Loss = std::conditional_t<sizeof(Accumulator<S>) >= sizeof(Accumulator<T>), Accumulator<S>, Accumulator<T>>;

// Where a pair of rows is worth a thread.
int64_t pairs_worth_a_thread(const LogitsRows (&sides)[2]) {
  return worth_a_thread(sides[0].vocab_size + sides[1].vocab_size);
}

// Of a side whose own row is `counted`; zeros otherwise. Where the pair is not `defined` its gradient is NaN.
template <class T, class A = Accumulator<T>>
void save(const SideOrder<T>& side, int64_t slot, bool counted, bool defined, const SortedL1Saved<void*>& saved) {
  const auto put = [slot](void* scalars, double value) { static_cast<A*>(scalars)[slot] = A(value); };
  A* steps = static_cast<A*>(saved.steps) + slot * 2 * kSavedSteps;
  if (!counted) {
    const auto& [peak, log_total, mean, scale, slope, total, moment, _] = saved;
    for (void* scalars : {peak, log_total, mean, scale, slope, total, moment}) put(scalars, 0);
    std::fill_n(steps, 2 * kSavedSteps, A(0));
    return;
  }
  put(saved.peak, side.row.peak), put(saved.log_total, side.log_total);
  put(saved.mean, side.row.mean), put(saved.scale, side.row.scale), put(saved.slope, side.row.slope);
  put(saved.total, defined ? side.head.total : NAN), put(saved.moment, defined ? side.moment() : NAN);
  if (defined) {
    side.steps.save(steps);
  } else {
    std::fill_n(steps, 2 * kSavedSteps, A(0));
    steps[0] = 1, steps[1] = NAN;
  }
}

// Owns the pair of rows at each of its slots: reads both, writes the loss and what backward needs of either side. The
// loss is the sum of the two sides' sums of sign p, each in float64 over partial sums of the accumulator's type.
template <class S, class T>
void forward(const SortedL1Forward& call, const Parallel& parallel) {
  const auto& sides = call.sides;
  parallel(sides[0].all_slots(), pairs_worth_a_thread(sides), [&](int64_t first, int64_t last) {
    SideOrder<S> student(sides[0], 1);
    SideOrder<T> teacher(sides[1], -1);
    for (int64_t slot = first; slot < last; ++slot) {
      const bool s = sides[0].index[slot] >= 0, t = sides[1].index[slot] >= 0;
      const bool defined = s && t && order_pair(student, teacher, slot, call.options);
      save(student, slot, s && t, defined, call.saved[0]);
      save(teacher, slot, s && t, defined, call.saved[1]);
      const double loss = defined ? student.head.total + teacher.head.total : s || t ? NAN : 0;
      static_cast<Loss<S, T>*>(call.loss)[slot] = Loss<S, T>(loss);
    }
  });
}

template <class T, class A = Accumulator<T>>
SignedGradient<A> signed_gradient(const LogitsRows& rows, const SortedL1Saved<const void*>& saved, double grad,
                                  int64_t slot) {
  const auto at = [slot](const void* scalars) { return double(static_cast<const A*>(scalars)[slot]); };
  const double scaled = rows.temperatures[0] * at(saved.scale);
  const double log_scale = rows.log_scale ? at(rows.log_scale) : 0;
  return {A(at(saved.peak)),
          A(kLog2E / scaled),
          A(grad * std::exp(-at(saved.log_total)) / scaled),
          A(std::exp(log_scale)),
          A(at(saved.total)),
          A(at(saved.mean)),
          A(at(saved.slope) * grad * at(saved.moment) / rows.temperatures[0])};
}

// What a thread needs for the rows whose steps forward could not leave.
template <class S, class T>
struct OrderScratch {
  SideOrder<S> student;
  SideOrder<T> teacher;
  Room<S> student_values, student_table;  // of gradient_by_value and gradient_by_bins
  Room<T> teacher_values, teacher_table;

  explicit OrderScratch(const LogitsRows (&sides)[2]) : student(sides[0], 1), teacher(sides[1], -1) {}

  void order(const SortedL1Backward& call, int64_t slot) {
    const int64_t longer = std::max(call.sides[0].vocab_size, call.sides[1].vocab_size);
    const bool tail = call.options.bucket && call.options.top_k < longer;  // its sign is that of a sum
    student.start_again(slot, call.saved[0], tail), teacher.start_again(slot, call.saved[1], tail);
    order_started(student, teacher, call.options);
  }

  template <int kSide>
  auto& side() {
    return std::get<kSide>(std::tie(student, teacher));
  }
  template <int kSide>
  auto& values() {
    return std::get<kSide>(std::tie(student_values, teacher_values));
  }
  template <int kSide>
  auto& table() {
    return std::get<kSide>(std::tie(student_table, teacher_table));
  }
};

// The gradient of a side's row at `slot`: one read and one write where forward left the steps of its signs; where it
// did not, both rows of the pair are read and ordered once more.
template <int kSide, class S, class T, class Own = std::conditional_t<kSide == 0, S, T>>
void backward_row(const SortedL1Backward& call, int64_t slot, std::optional<OrderScratch<S, T>>& scratch, Own* out) {
  using A = Accumulator<Own>;
  const LogitsRows& rows = call.sides[kSide];
  const SortedL1Saved<const void*>& saved = call.saved[kSide];
  const Own* x = row_of<Own>(rows, slot);
  const int64_t n = rows.vocab_size;
  const double grad = static_cast<const A*>(call.grad[kSide])[slot];
  const SignedGradient<A> gradient = signed_gradient<Own>(rows, saved, grad, slot);
  const auto by_column = [&](const Steps<A>& steps) {
    StepTable<A> table(steps);
    gradient_by_column(
        x, n, gradient,
        [&](int64_t column, A value) {
          return rows.column_mask && !rows.column_mask[column] ? A(0) : table.next(value);
        },
        out);
  };
  Steps<A> saved_steps;
  if (saved_steps.load(static_cast<const A*>(saved.steps) + slot * 2 * kSavedSteps)) {
    gradient_by_steps(x, n, gradient, saved_steps, out);
    if (rows.column_mask) leave_out(x, rows.column_mask, n, gradient, out);
    return;
  }
  if (!scratch) scratch.emplace(call.sides);
  scratch->order(call, slot);
  const SideOrder<Own>& side = scratch->template side<kSide>();
  if (side.steps.split) return by_column(side.steps);
  if constexpr (sizeof(Own) == 2) {
    gradient_by_value(x, n, gradient, side.runs.x, side.steps, scratch->template values<kSide>(),
                      scratch->template table<kSide>(), out);
  } else {
    gradient_by_bins(x, n, gradient, side.steps, scratch->template table<kSide>(), out);
  }
  if (rows.column_mask) leave_out(x, rows.column_mask, n, gradient, out);
}

template <int kSide, class S, class T>
void backward_side(const SortedL1Backward& call, const Parallel& parallel) {
  using Own = std::conditional_t<kSide == 0, S, T>;
  using A = Accumulator<Own>;
  const LogitsRows &rows = call.sides[kSide], &others = call.sides[1 - kSide];
  const auto paired = [&](int64_t slot) { return rows.index[slot] >= 0 && others.index[slot] >= 0; };
  const A *grad = static_cast<const A*>(call.grad[kSide]), *total = static_cast<const A*>(call.saved[kSide].total);
  for (int64_t slot = 0; slot < rows.all_slots(); ++slot) {
    static_cast<A*>(call.grad_log_scale[kSide])[slot] = paired(slot) ? grad[slot] * total[slot] : A(0);
  }
  write_rows<Own>(rows, call.grad_values[kSide], parallel, [&](int64_t slot, Own* out) {
    if (!paired(slot)) std::fill_n(out, rows.vocab_size, Own{});
  });
  parallel(rows.all_slots(), worth_a_thread(rows.width), [&](int64_t first, int64_t last) {
    std::optional<OrderScratch<S, T>> scratch;
    for (int64_t slot = first; slot < last; ++slot) {
      if (!paired(slot)) continue;
      const int64_t place = slot / rows.slots * rows.positions + rows.index[slot];
      backward_row<kSide, S, T>(call, slot, scratch, static_cast<Own*>(call.grad_values[kSide]) + place * rows.width);
    }
  });
}

template <class S, class T>
void backward(const SortedL1Backward& call, const Parallel& parallel) {
  if (call.grad_values[0]) backward_side<0, S, T>(call, parallel);
  if (call.grad_values[1]) backward_side<1, S, T>(call, parallel);
}

}  // namespace

#define MLOT_BY_TEACHER(direction, S) \
  {direction<S, float>, direction<S, bfloat16>, direction<S, float16>, direction<S, double>}
#define MLOT_BY_DTYPES(direction)                                                                                \
  {MLOT_BY_TEACHER(direction, float), MLOT_BY_TEACHER(direction, bfloat16), MLOT_BY_TEACHER(direction, float16), \
   MLOT_BY_TEACHER(direction, double)}

extern const SortedL1 sorted_l1 = {MLOT_BY_DTYPES(forward), MLOT_BY_DTYPES(backward)};

#undef MLOT_BY_DTYPES
#undef MLOT_BY_TEACHER

}  // namespace mlot::MLOT_ISA
