// row_divergence on a GPU, forward: a cluster of blocks owns a pair of rows, reads both for their scalars and, from the
// cache, again for their terms.
#include "mlot/cuda/row_divergence.h"

#include "mlot/cuda/divergence_head.h"
#include "mlot/cuda/launch.h"

namespace mlot::cuda {
inline namespace row_divergence_kernels {

// Of a pair. The moments are of x - peak: of H, and of what the student is held against.
struct DivergenceSums {
  double loss = 0, total[2] = {}, moment[2] = {}, of_target = 0;
};

__device__ inline DivergenceSums join(DivergenceSums a, const DivergenceSums& b) {
  a.loss += b.loss, a.of_target += b.of_target;
#pragma unroll
  for (int side = 0; side < 2; ++side) a.total[side] += b.total[side], a.moment[side] += b.moment[side];
  return a;
}

// Of the student's scaled logits, and of what they are held against.
template <class B>
struct MixtureSums {
  ExponentialSums<B, 1> own, target;
};

template <class B>
struct ForwardMemory {
  alignas(16) unsigned char joins[kJoin<DivergenceSums>];
  static_assert(sizeof(MixtureSums<B>) <= sizeof(DivergenceSums) && sizeof(Deviation<B>) <= sizeof(DivergenceSums));
  PairScalars<B> pair;
  double expected[2];  // of x - peak
  B share;
};

__device__ inline void write_no_pair(const RowDivergenceForward& call, Dtype wider, int64_t slot, bool one_counts) {
  for (int side = 0; side < 2; ++side) {
    const DivergenceSaved<void*>& saved = call.saved[side];
    for (void* scalars :
         {saved.peak, saved.log_total, saved.mean, saved.scale, saved.slope, saved.total, saved.moment}) {
      put_scalar(scalars, call.problem.dtypes[side], slot, 0);
    }
  }
  put_scalar(call.loss, wider, slot, one_counts ? NAN : 0);
  put_scalar(call.share, wider, slot, 0);
  put_scalar(call.target_log_total, wider, slot, 0);
}

// Reads a row once (standardized twice) for its scalars, which every block of the cluster keeps and one writes.
template <class B>
__device__ inline void begin_row(const RowDivergenceForward& call, int side, int64_t slot, bool writes,
                                 ForwardMemory<B>& memory) {
  const LogitsRows& rows = call.problem.sides[side];
  const Dtype dtype = call.problem.dtypes[side];
  const AnyRow<B> row = any_row<B>(rows, dtype, slot);
  const auto made = rows.standardize ? statistics<true, 1>(&row, rows, rows.temperature, memory.joins)
                                     : statistics<false, 1>(&row, rows, rows.temperature, memory.joins);
  const double scale = rounded_to_accumulator(dtype, made.scale.scale);
  const double log_total = rounded_to_accumulator(dtype, made.log_total[0]);
  if (threadIdx.x == 0) {
    const auto scaled = divergence_row<B>(rows, made.scale.peak, scale, log_total);
    if (side == 0) {
      memory.pair.student = scaled;
    } else {
      memory.pair.teacher = scaled;
      memory.pair.target_log_total = B(log_total);
    }
    memory.expected[side] = made.expected[0];
  }
  if (!writes) return;
  const DivergenceSaved<void*>& saved = call.saved[side];
  put_scalar(saved.peak, dtype, slot, made.scale.peak);
  put_scalar(saved.log_total, dtype, slot, log_total);
  put_scalar(saved.mean, dtype, slot, made.scale.mean);
  put_scalar(saved.scale, dtype, slot, scale);
  put_scalar(saved.slope, dtype, slot, made.scale.slope);
}

template <class B>
__device__ inline double log_total_of(const ExponentialSums<B, 1>& sums) {
  return double(sums.peak) + log(double(total_of(sums.total[0], sums.peak)));
}

// Reads both rows for the normalisers of the student and of what TAID holds it against; both in one way, for equal rows
// are to have equal ones.
template <class B>
__device__ inline void mix_rows(const RowDivergenceForward& call, int64_t slot, bool writes, ForwardMemory<B>& memory) {
  constexpr B kFactor = B(kLog2E);
  const PairScalars<B> pair = memory.pair;
  MixtureSums<B> mine;
  for_tiles<false, B>(call.problem, slot, [&](const ColumnTile<B>& tile) {
    B own[1][kColumnsAtOnce<B>], target[1][kColumnsAtOnce<B>];
#pragma unroll
    for (int i = 0; i < kColumnsAtOnce<B>; ++i) {
      own[0][i] = pair.student.scaled(tile.x[i]);
      target[0][i] = pair.target(own[0][i], pair.teacher.scaled(tile.y[i]));
    }
    const B of_own = raise_to(mine.own, own, kFactor), of_target = raise_to(mine.target, target, kFactor);
#pragma unroll
    for (int i = 0; i < kColumnsAtOnce<B>; ++i) {
      mine.own.add(own[0][i] - of_own, kFactor);
      mine.target.add(target[0][i] - of_target, kFactor);
    }
  });
  const auto add = [](const MixtureSums<B>& a, const MixtureSums<B>& b) {
    return MixtureSums<B>{join(a.own, b.own, kFactor), join(a.target, b.target, kFactor)};
  };
  const auto all = over_cluster(mine, add, reinterpret_cast<MixtureSums<B>*>(memory.joins));
  if (threadIdx.x != 0) return;
  const double log_total = log_total_of(all.own);
  memory.pair.student.log_total = B(rounded_to_accumulator(call.problem.dtypes[0], log_total));
  memory.pair.target_log_total = B(log_total_of(all.target));
  if (writes) put_scalar(call.saved[0].log_total, call.problem.dtypes[0], slot, log_total);
}

// Sums of this thread's share of the terms.
template <bool kPairs, bool kFloors, class B>
__device__ inline DivergenceSums sums_of(const DivergenceProblem& problem, const PairScalars<B>& pair, int64_t slot) {
  constexpr int n = kColumnsAtOnce<B>;
  const bool with_moments = problem.sides[0].standardize || problem.sides[1].standardize;
  const bool mixes = problem.options.interpolation < 1;
  B loss = 0, total[2] = {}, moment[2] = {}, of_target = 0;
  for_tiles<kPairs, B>(problem, slot, [&](const ColumnTile<B>& tile) {
    B of_student[n], of_teacher[n];
    with_kind(problem.options.kind, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const auto m = meet<kFloors>(pair, tile.x[i], tile.y[i], tile.leaves_out(i));
        const auto term = term_of<decltype(kind)::value>(m, pair.terms);
        loss += term.loss, of_student[i] = term.H[0], of_teacher[i] = term.H[1];
      }
    });
#pragma unroll
    for (int i = 0; i < n; ++i) total[0] += of_student[i], total[1] += of_teacher[i];
    if (!with_moments) return;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const B below_x = tile.x[i] - pair.student.peak, below_y = tile.y[i] - pair.teacher.peak;
      moment[0] += below_x == B(-INFINITY) ? B(0) : of_student[i] * below_x;
      moment[1] += below_y == B(-INFINITY) ? B(0) : of_teacher[i] * below_y;
      if (!mixes || below_y == B(-INFINITY)) continue;
      of_target += meet<false>(pair, tile.x[i], tile.y[i], false).softmax[1] * below_y;
    }
  });
  return {loss, {total[0], total[1]}, {moment[0], moment[1]}, of_target};
}

// Owns one slot with a cluster: reads both rows for their scalars, once from memory (standardized twice), and from the
// cache for the terms of all columns that meet; where TAID mixes for the mixture's normaliser, and for adaptive_kl once
// for each digit of the head's end and once for its share. Writes the loss and what backward needs. Sums of a thread
// are in the accumulator, those of the cluster in float64.
template <class B, bool kPairs, bool kFloors>
__global__ void __launch_bounds__(kThreads, 2) forward(RowDivergenceForward call, double units) {
  MLOT_SHARED_MEMORY(ForwardMemory<B>, shared);
  ForwardMemory<B>& memory = *shared;
  const DivergenceProblem& problem = call.problem;
  constexpr Dtype kWider = sizeof(B) == 8 ? Dtype::float64 : Dtype::float32;
  const int64_t slot = blockIdx.x / cluster_size();
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const bool student_counts = problem.sides[0].index[slot] >= 0, teacher_counts = problem.sides[1].index[slot] >= 0;
  if (!student_counts || !teacher_counts) {
    if (writes) write_no_pair(call, kWider, slot, student_counts || teacher_counts);
    return;
  }
#pragma unroll 1
  for (int side = 0; side < 2; ++side) begin_row(call, side, slot, writes, memory);
  if (threadIdx.x == 0) memory.pair.interpolation = B(problem.options.interpolation);
  __syncthreads();
  if constexpr (!kPairs && !kFloors) {
    if (problem.options.interpolation < 1) mix_rows(call, slot, writes, memory);
  }
  if (threadIdx.x == 0) memory.share = 1, memory.pair.set_terms(problem, slot, memory.share);
  __syncthreads();
  if constexpr (!kFloors) {
    if (problem.options.kind == DivergenceKind::adaptive_kl) {
      const PairScalars<B> pair = memory.pair;
      HeadMemory& of_head = *reinterpret_cast<HeadMemory*>(shared + 1);
      const double share = share_of_forward<kPairs>(problem, pair, slot, units, of_head, memory.joins);
      if (threadIdx.x == 0) memory.share = B(share), memory.pair.set_terms(problem, slot, memory.share);
      __syncthreads();
    }
  }
  const auto add = [](const DivergenceSums& a, const DivergenceSums& b) { return join(a, b); };
  const DivergenceSums all = over_cluster(sums_of<kPairs, kFloors>(problem, PairScalars<B>(memory.pair), slot), add,
                                          reinterpret_cast<DivergenceSums*>(memory.joins));
  if (!writes) return;
  // What (q - p) in every term leaves of the loss: the difference of the masses.
  const auto& terms = memory.pair.terms;
  const double left = double(terms.balance) * (double(terms.scale[1]) - double(terms.scale[0]));
  put_scalar(call.loss, kWider, slot, all.loss + left);
  put_scalar(call.share, kWider, slot, memory.share);
  put_scalar(call.target_log_total, kWider, slot, memory.pair.target_log_total);
  for (int side = 0; side < 2; ++side) {
    const double expected = side == 1 && problem.options.interpolation < 1 ? all.of_target : memory.expected[side];
    const double total = side == 0 ? all.total[0] : all.total[1], moment = side == 0 ? all.moment[0] : all.moment[1];
    put_scalar(call.saved[side].total, problem.dtypes[side], slot, total);
    put_scalar(call.saved[side].moment, problem.dtypes[side], slot, moment - total * expected);
  }
}

template <class B>
void launch_forward(const RowDivergenceForward& call, void* stream) {
  const DivergenceProblem& problem = call.problem;
  const bool pairs = problem.options.pairs, floors = problem.options.floor > 0;
  const int64_t longer = problem.sides[problem.sides[0].vocab_size < problem.sides[1].vocab_size].vocab_size;
  const RowShape row = shape_of_row(longer, kColumnsAtOnce<B>);
  // A probability of 1 in units: so many that 64 bits hold the sum, in which a pair's column may stand again and again.
  double units = 0x1p62;
  for (int64_t most = 1; pairs && most < problem.options.pair_count; most *= 2) units /= 2;
  const unsigned head = problem.options.kind == DivergenceKind::adaptive_kl ? sizeof(HeadMemory) : 0;
  const Shape shape{problem.sides[0].all_slots() * row.cluster, row.threads, row.cluster,
                    unsigned(sizeof(ForwardMemory<B>)) + head};
  const auto without = pairs ? forward<B, true, false> : forward<B, false, false>;
  const auto with = pairs ? forward<B, true, true> : forward<B, false, true>;
  launch(floors ? with : without, shape, stream, call, units);
}

}  // namespace row_divergence_kernels

void launch_row_divergence_forward(const RowDivergenceForward& call, void* stream) {
  (call.problem.in_double() ? launch_forward<double> : launch_forward<float>)(call, stream);
}

}  // namespace mlot::cuda
