// sorted_l1 on a GPU, forward: a cluster of blocks brings both rows of a pair into order, as far as signs need it, and
// finds every sign by counting.
#include "mlot/cuda/sorted_l1.h"

#include <type_traits>

#include "mlot/cuda/column_sums.h"
#include "mlot/cuda/sorted_l1_backward.h"
#include "mlot/cuda/sorted_l1_launch.h"

namespace mlot::cuda {
inline namespace sorted_l1_kernels {

// The wider of two accumulators.
template <class S, class T>
using Loss = Wider<Accumulator<S>, Accumulator<T>>;

// Where not both rows of a pair count: zeros; a loss of NaN where one does. One block.
template <class S, class T>
__device__ inline void write_no_pair(const SortedL1Forward& call, int64_t slot, bool one_counts) {
  const auto write_side = [&](auto zero, const SortedL1Saved<void*>& saved) {
    using A = decltype(zero);
    for (unsigned i = threadIdx.x; i < 2 * kSavedSteps; i += blockDim.x) {
      put<A>(saved.steps, slot * 2 * kSavedSteps + i, 0);
    }
    if (threadIdx.x == 0) put<A>(saved.total, slot, 0), put<A>(saved.moment, slot, 0);
  };
  write_side(Accumulator<S>(), call.saved[0]);
  write_side(Accumulator<T>(), call.saved[1]);
  if (threadIdx.x == 0) put<Loss<S, T>>(call.loss, slot, one_counts ? NAN : 0);
}

// The rows of the pair at a slot; false where not both count, and then all is written that is written of none.
template <class S, class T>
__device__ inline bool take_pair(const SortedL1Forward& call, int64_t slot, const S*& student, const T*& teacher) {
  student = row_of<S>(call.sides[0], slot);
  teacher = row_of<T>(call.sides[1], slot);
  if (student && teacher) return true;
  if (cluster_rank() == 0) write_no_pair<S, T>(call, slot, student || teacher);
  return false;
}

// Compares two rows in order, in float64 sums, and writes all that is written of the pair.
template <class Student, class Teacher>
__device__ inline void write_pair(const SortedL1Forward& call, int64_t slot, const Student& student,
                                  const Teacher& teacher, void* joins) {
  const double poison = double(student.law.poison) + double(teacher.law.poison);
  const Ranking ranking = ranking_of(student, teacher, call.options, longer(call.sides[0], call.sides[1]), joins);
  const auto compare = [&](const auto& own, const auto& other, int side, int tail_sign) {
    using A = typename std::decay_t<decltype(own)>::A;
    const SortedL1Saved<void*>& saved = call.saved[side];
    const SignedSums sums = compare_side(own, other, {ranking.top_k, tail_sign}, call.options.mean_over_ties, poison,
                                         static_cast<A*>(saved.steps) + slot * 2 * kSavedSteps, joins);
    if (cluster_rank() == 0 && threadIdx.x == 0) {
      put<A>(saved.total, slot, sums.total);
      put<A>(saved.moment, slot, sums.moment - sums.total * double(at<A>(call.expected[side], slot)));
    }
    return sums.total;
  };
  const double loss =
      compare(student, teacher, 0, ranking.tail_sign) + compare(teacher, student, 1, -ranking.tail_sign);
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    put<Wider<typename Student::A, typename Teacher::A>>(call.loss, slot, loss);
  }
}

// Owns one pair of rows with a cluster: reads both once, counts them by value in shared memory, goes down the values
// that occur, and writes the loss and what backward needs of either side. One exp for each value.
template <class S, class T>
__global__ void __launch_bounds__(kPairThreads, 1) forward_by_counting(SortedL1Forward call) {
  MLOT_SHARED_MEMORY(unsigned char, shared);
  const CountMemory memory(shared + kPairJoin<float>);
  const int64_t slot = cluster_number();
  const S* student;
  const T* teacher;
  if (!take_pair(call, slot, student, teacher)) return;
  const auto s = count_row(student, call.sides[0], likelihood<void*, float>(call.sides[0], call.saved[0], slot), memory,
                           0, shared);
  const auto t = count_row(teacher, call.sides[1], likelihood<void*, float>(call.sides[1], call.saved[1], slot), memory,
                           1, shared);
  write_pair(call, slot, s, t, shared);
  cluster_sync();  // nobody reads from a block that has ended
}

// In the place of the student's number of steps: what is open of this pair has no room, and nothing is written of it.
constexpr double kLeft = -2;

// Owns one pair of rows with a cluster: reads both twice, or three times, counts them in bins of log2 p in shared
// memory, lists and sorts what is in bins that the counts give no sign, and writes the loss and what backward needs of
// either side; or that the pair is left. Signs are those of forward_by_sorting; its sums are in another order, which
// the rows' lengths fix, too. One exp for each logit.
template <class S, class T>
__global__ void __launch_bounds__(kPairThreads, 1) forward_by_bins(SortedL1Forward call, BinSizes sizes) {
  using A = Accumulator<S>;
  static_assert(std::is_same_v<A, Accumulator<T>>);
  MLOT_SHARED_MEMORY(unsigned char, shared);
  const BinMemory memory(shared + kBinJoin, sizes);
  const int64_t slot = cluster_number();
  const S* student;
  const T* teacher;
  if (!take_pair(call, slot, student, teacher)) return;
  memory.clear();
  const SlotIndex<A> none{0, 0, sizes.bins, 0, memory.map};
  const auto row = [&](auto element, int side) {
    return BinnedRow<decltype(element)>{nullptr,
                                        0,
                                        likelihood<void*, A>(call.sides[side], call.saved[side], slot),
                                        none,
                                        memory.ranks[side],
                                        memory.slots[side],
                                        memory.sums + side};
  };
  BinnedRow<S> s = row(S(), 0);
  BinnedRow<T> t = row(T(), 1);
  const int64_t longest = longer(call.sides[0], call.sides[1]);
  const unsigned top_k = unsigned(call.options.top_k < longest ? call.options.top_k : longest);
  const bool is_nan = s.law.poison != 0 || t.law.poison != 0;  // and so is all that is written, whatever the order
  if (is_nan || bin_pair(student, teacher, call.sides, top_k, memory, s, t, shared)) {
    write_pair(call, slot, s, t, shared);
  } else if (cluster_rank() == 0 && threadIdx.x == 0) {
    put<A>(call.saved[0].steps, slot * 2 * kSavedSteps, kLeft);
  }
  cluster_sync();  // nobody reads from a block that has ended
}

// Owns every so many-th pair of rows with a cluster, or of those that are left: reads both once, sorts their keys in
// the cluster's own room, goes down their runs of equal logits, and writes the loss and what backward needs of either
// side. One exp for each run.
template <class S, class T>
__global__ void __launch_bounds__(kPairThreads, 1) forward_by_sorting(SortedL1Forward call, bool only_left) {
  using SA = Accumulator<S>;
  using TA = Accumulator<T>;
  MLOT_SHARED_MEMORY(unsigned char, shared);
  SortMemory& memory = *reinterpret_cast<SortMemory*>(shared + kPairJoin<Loss<S, T>>);
  auto* const s_keys = of_room<DescendingKey<S>>(call.room, call.room.keys[0]);
  auto* const t_keys = of_room<DescendingKey<T>>(call.room, call.room.keys[1]);
  for (int64_t slot = cluster_number(); slot < slots_of(call.sides[0]); slot += clusters_of_grid()) {
    if (only_left && at<SA>(call.saved[0].steps, slot * 2 * kSavedSteps) != SA(kLeft)) continue;
    const S* student;
    const T* teacher;
    if (!take_pair(call, slot, student, teacher)) continue;
    const int s_listed = sort_row(student, call.sides[0], s_keys, of_room<DescendingKey<S>>(call.room, call.room.spare),
                                  nullptr, nullptr, memory, shared);
    const int t_listed = sort_row(teacher, call.sides[1], t_keys, of_room<DescendingKey<T>>(call.room, call.room.spare),
                                  nullptr, nullptr, memory, shared);
    const SortedRow<S> s{s_keys, s_listed, likelihood<void*, SA>(call.sides[0], call.saved[0], slot)};
    const SortedRow<T> t{t_keys, t_listed, likelihood<void*, TA>(call.sides[1], call.saved[1], slot)};
    write_pair(call, slot, s, t, shared);
    cluster_sync();  // before the next pair's keys
  }
}

// A row's scalars, in a read of its own.
template <class T>
void launch_scalars(const SortedL1Forward& call, int side, void* stream) {
  const SortedL1Saved<void*>& saved = call.saved[side];
  ColumnSums scalars{};
  scalars.rows = call.sides[side];
  scalars.temperatures = temperatures_of({call.sides[side].temperature});
  scalars.saved = {saved.log_total, call.expected[side], saved.peak, saved.mean, saved.scale, saved.slope};
  row_scalars<T>(scalars, stream);
}

template <class S, class T>
void launch_forward(const SortedL1Forward& call, void* stream) {
  launch_scalars<S>(call, 0, stream);
  launch_scalars<T>(call, 1, stream);
  if constexpr (sizeof(S) == 2 && sizeof(T) == 2) {
    if (are_counted(call.sides[0], call.sides[1])) {
      return launch(forward_by_counting<S, T>, counting_shape(call.sides[0]), stream, call);
    }
  }
  bool only_left = false;
  // float64 beside another type is rare, and would take registers that there are not.
  if constexpr (std::is_same_v<Accumulator<S>, Accumulator<T>>) {
    const Binning binning = binning_of(call.sides[0], call.sides[1], kLogitBytes<S, T>);
    if (binning.pays) launch(forward_by_bins<S, T>, binning.shape, stream, call, binning.sizes);
    only_left = binning.pays;
  }
  launch(forward_by_sorting<S, T>, sorting_shape<Loss<S, T>>(call.sides[0], call.sides[1], call.room), stream, call,
         only_left);
}

SortRoom room_for(const LogitsRows (&sides)[2], const int64_t (&bytes)[2], bool with_columns) {
  constexpr int64_t kMostClusters = 1024;  // more than a GPU runs at once
  SortRoom room{};
  int64_t most = 0, longest = 0;  // `most`: a float for each column of a sequence and for each 64 logits
  const auto place = [&](int64_t size) {
    const int64_t at = room.each;
    room.each += (size + 15) / 16 * 16;
    return at;
  };
  const int64_t slots = sides[0].all_slots();
  for (int i = 0; i < 2; ++i) {
    const int64_t size = sides[i].vocab_size * bytes[i];
    longest = size > longest ? size : longest;
    room.keys[i] = place(size);
    most += sides[i].vocab_size * (4 * sides[i].sequences + slots / 16);
  }
  room.spare = place(longest);
  if (with_columns) {
    room.columns = place(4 * sides[0].vocab_size);
    room.spare_columns = place(4 * sides[0].vocab_size);
  }
  room.clusters = most / room.each;
  if (room.clusters < 1) room.clusters = 1;
  if (room.clusters > kMostClusters) room.clusters = kMostClusters;
  if (room.clusters > slots) room.clusters = slots;
  return room;
}

bool are_counted(const LogitsRows (&sides)[2], const int64_t (&bytes)[2]) {
  return bytes[0] == 2 && bytes[1] == 2 && are_counted(sides[0], sides[1]);
}

}  // namespace sorted_l1_kernels

SortRoom room_of_forward(const LogitsRows (&sides)[2], const int64_t (&bytes)[2]) {
  return are_counted(sides, bytes) ? SortRoom{} : room_for(sides, bytes, false);
}

SortRoom room_of_backward(const LogitsRows (&sides)[2], const int64_t (&bytes)[2], const SortedL1Options& options) {
  return options.mean_over_ties && are_counted(sides, bytes) ? SortRoom{} : room_for(sides, bytes, true);
}

#define MLOT_BY_TEACHER(direction, S) \
  {direction<S, float>, direction<S, bfloat16>, direction<S, float16>, direction<S, double>}
#define MLOT_BY_DTYPES(direction)                                                                                \
  {MLOT_BY_TEACHER(direction, float), MLOT_BY_TEACHER(direction, bfloat16), MLOT_BY_TEACHER(direction, float16), \
   MLOT_BY_TEACHER(direction, double)}

extern const SortedL1 sorted_l1 = {MLOT_BY_DTYPES(launch_forward), MLOT_BY_DTYPES(launch_sorted_l1_backward)};

#undef MLOT_BY_DTYPES
#undef MLOT_BY_TEACHER

}  // namespace mlot::cuda
