// rank_truncate and gather_columns on a GPU: the columns' sums, the k largest of them, every row's log-probabilities
// there.
#include "mlot/cuda/rank_truncate.h"

#include "mlot/cuda/launch.h"
#include "mlot/cuda/rows.h"
#include "mlot/cuda/select.h"

namespace mlot::cuda {
inline namespace rank_truncate_kernels {

constexpr unsigned kFewThreads = 128;  // of a block that owns a row's k columns

// Owns one slot with a block: reads its row at its columns, writes its log-probabilities there and their mass. `sums`
// is null where nothing was ranked: else a NaN among a ranking's sums, which stands first, shows in all that was
// ranked.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kFewThreads) gather(RankTruncateForward call, const A* sums, int64_t of_sequence) {
  MLOT_SHARED_MEMORY(A, shared);
  const LogitsRows& rows = call.sums.rows;
  const Temperatures& temperatures = call.sums.temperatures;
  const int64_t slot = blockIdx.x, slots = slots_of(rows), sequence = slot / rows.slots;
  const T* row = row_of<T>(rows, slot);
  const int64_t* columns = call.columns + (call.columns_of_each_row ? slot : sequence) * call.k;
  const A peak = at<A>(call.sums.saved.peak, slot), scale = at<A>(call.sums.saved.scale, slot);
  A more = row ? at<A>(rows.log_scale, slot) : A(0);
  if (sums && !(rows.column_mask && !rows.column_mask[columns[0]])) {
    const A first = sums[sequence * of_sequence + columns[0]];
    if (first != first) more = NAN;
  }
  A mass = 0;
  for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) {
    const int64_t column = columns[i];
    const bool exists = column >= 0 && column < rows.vocab_size;
    const bool left_out = exists && rows.column_mask && !rows.column_mask[column];
    const A below = row && exists ? widen(row[column]) - peak : A(0);
    for (int r = 0; r < temperatures.count; ++r) {
      const int64_t place = r * slots + slot;
      A log_p = below / (A(temperatures.at[r]) * scale) - at<A>(call.sums.saved.log_total, place) + more;
      if (left_out && log_p == log_p) log_p = -INFINITY;
      if (!exists) log_p = NAN;
      if (!row) log_p = 0;
      put<A>(call.log_probabilities, place * call.k + i, log_p);
      if (r == 0 && row) mass += A(exp(double(log_p)));
    }
  }
  mass = over_cluster(mass, [](A a, A b) { return a + b; }, shared);
  if (threadIdx.x == 0) put<A>(call.kept_mass, slot, mass);
}

template <class T>
void launch_forward(const RankTruncateForward& call, void* stream) {
  using A = Accumulator<T>;
  const LogitsRows& rows = call.sums.rows;
  const bool together = call.ranks_together();
  (together ? column_sums<T> : row_scalars<T>)(call.sums, stream);
  const int64_t of_ranking = call.sums.rankings ? rows.sequences / call.sums.rankings : 0;  // sequences
  Selection to{rows.column_mask, rows.vocab_size, call.k, 0, 1, call.columns, call.found};
  if (together) {
    to.rows = call.sums.rankings, to.copies = of_ranking;
    select_of_matrix<A>(call.sums.sums, of_ranking * parts_of(rows.slots) * call.sums.width, to, stream);
  } else if (call.ranks) {
    to.rows = rows.all_slots();
    select_of_slots<T>(rows, call.sums.saved.log_total, to, stream);
  }
  // Ranked apart, sequence b's sums begin behind those of b sequences; ranked as one, all are the first's.
  const int64_t of_sequence = call.scope == RankScope::batch ? 0 : parts_of(rows.slots) * call.sums.width;
  launch(gather<T>, Shape{rows.all_slots(), threads_of_a_block(kFewThreads), 1, kJoin<A>}, stream, call,
         static_cast<const A*>(together ? call.sums.sums : nullptr), of_sequence);
}

}  // namespace rank_truncate_kernels

extern const RankTruncate rank_truncate = {
    {launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>}};

}  // namespace mlot::cuda
