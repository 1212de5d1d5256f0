// Signs of p_(i) - q_(i), found by counting: two rows in order become sums, and steps of the sign.
#pragma once

#include "mlot/cuda/scan.h"
#include "mlot/cuda/sorted_l1_count.h"

namespace mlot::cuda {

// Calls use(run) for this thread's share of a row's runs, in their order. Each thread of the cluster has neighbouring
// ones.
template <class Row, class Use>
__device__ inline void for_runs(const Row& row, Use use) {
  const int threads = int(cluster_size() * blockDim.x), each = (row.listed + threads - 1) / threads;
  const int64_t first = int64_t(cluster_rank() * blockDim.x + threadIdx.x) * each;
  const int begin = int(first < row.listed ? first : row.listed);
  const int end = begin + each < row.listed ? begin + each : row.listed;
  for (int i = row.first_run_from(begin), next; i < end; i = next) use(row.run(i, next));
}

// The same with use(run, met): what their probability meets in the other row.
template <class Own, class Other, class Use>
__device__ inline void for_runs_met(const Own& own, const Other& other, Use use) {
  using W = Wider<typename Own::A, typename Other::A>;
  Met met;
  for_runs(own, [&](const auto& run) {
    met = other.meet(W(own.law.log2_p(run.x)), met);
    use(run, met);
  });
}

// Of the signs of a run's ranks, which are 1 where the own probability is larger: their sum, and whether they differ.
struct Signs {
  int total;
  bool differ;
};

struct Ranking {
  int top_k;      // at most the columns of the longer row
  int tail_sign;  // of ranks from top_k on
};

__device__ inline Signs signs_of(int first, int last, Met met, Ranking ranking) {
  const auto most = [](int a, int b) { return a > b ? a : b; };
  const auto least = [](int a, int b) { return a < b ? a : b; };
  const int end = least(last, ranking.top_k);
  const int plus = most(end - most(first, met.no_smaller), 0), minus = most(least(end, met.larger) - first, 0);
  const int in_tail = most(last - most(first, ranking.top_k), 0), total = plus - minus + in_tail * ranking.tail_sign;
  const int signed_ranks = plus + minus + (ranking.tail_sign == 0 ? 0 : in_tail);
  const int magnitude = total < 0 ? -total : total;
  return {total, signed_ranks > 0 && magnitude != last - first};
}

// Equal means are equal to the bit.
template <class A>
__device__ inline A mean_sign(const Signs& signs, int first, int last) {
  return last - first == 1 ? A(signs.total) : A(signs.total) / A(last - first);
}

// Over a row: of sign p, and of sign p (x - peak).
struct SignedSums {
  double total = 0, moment = 0;

  __device__ static SignedSums join(const SignedSums& a, const SignedSums& b) {
    return {a.total + b.total, a.moment + b.moment};
  }
};

// How a mean sign changes along neighbouring runs.
template <class A>
struct SignChanges {
  A first = 0, last = 0;  // signs
  A last_x = 0;
  int runs = 0, changes = 0, split = 0;  // split: the signs of a run's ranks differ

  // `b` follows.
  __device__ static SignChanges join(const SignChanges& a, const SignChanges& b) {
    if (a.runs == 0) return b;
    if (b.runs == 0) return a;
    const int between = a.last != b.first;
    return {a.first, b.last, b.last_x, a.runs + b.runs, a.changes + b.changes + between, a.split + b.split};
  }
};

// Room for what the threads of a cluster are joined by.
template <class A>
constexpr unsigned kPairJoin = kJoin<SignChanges<A>>;
static_assert(kPairJoin<float> >= kJoin<SignedSums> && kPairJoin<float> >= kJoin<Before>);

// What a row in bins has beside its runs (sorted_l1_binned.h), and others have not: the probability of a run that is
// not in sums already; these sums; where a step begins.
template <class Row, class Run>
__device__ inline double probability(const Row& row, const Run& run) {
  return double(row.law.p(run.x));
}
template <class Row>
__device__ inline double tail_in_sums(const Row&) {
  return 0;
}
template <class Row>
__device__ inline void add_sums(const Row&, int, SignedSums&) {}
template <class Row, class Run, class A>
__device__ inline A threshold(const Row&, const Run&, A last_x) {
  return last_x;
}

// The sum of p from rank top_k on.
template <class Row>
__device__ inline double tail_of(const Row& row, int top_k, void* joins) {
  SignedSums mine;
  for_runs(row, [&](const auto& run) {
    const int inside = run.last - (run.first > top_k ? run.first : top_k);
    if (inside > 0) mine.total += probability(row, run) * inside;
  });
  return over_cluster(mine, SignedSums::join, static_cast<SignedSums*>(joins)).total + tail_in_sums(row);
}

// What is asked of a pair of rows, of which the longer one has so many columns, with the sign of the tail for the side
// whose row is `own`.
template <class Own, class Other>
__device__ inline Ranking ranking_of(const Own& own, const Other& other, const SortedL1Options& options,
                                     int64_t longest, void* joins) {
  const int top_k = int(options.top_k < longest ? options.top_k : longest);
  if (!options.bucket || options.top_k >= longest) return {top_k, 0};
  const double tail = tail_of(own, top_k, joins), other_tail = tail_of(other, top_k, joins);
  return {top_k, int(tail > other_tail) - int(tail < other_tail)};
}

// Goes down one row's runs and writes its steps [kSavedSteps, 2]: a step's threshold is the last logit of the one
// before, or a number above its own logits that is no larger. Where they are too many, or a stable order is asked for
// and a run's ranks have several signs, a negative number in their place; where `poison` is NaN, one step of that sign.
// Returns the sums, which are NaN, too, then.
template <class Own, class Other, class A = typename Own::A>
__device__ inline SignedSums compare_side(const Own& own, const Other& other, Ranking ranking, bool mean_over_ties,
                                          double poison, A* steps, void* joins) {
  using Changes = SignChanges<A>;
  const unsigned thread = cluster_rank() * blockDim.x + threadIdx.x, threads = cluster_size() * blockDim.x;
  for (unsigned i = thread; i < 2 * kSavedSteps; i += threads) steps[i] = 0;
  SignedSums sums;
  Changes changes, before;
#pragma unroll 1
  for (int walk = 0; walk < 2; ++walk) {  // sums first, then steps, if this thread has any
    for_runs_met(own, other, [&](const auto& run, Met met) {
      const Signs signs = signs_of(run.first, run.last, met, ranking);
      const A sign = mean_sign<A>(signs, run.first, run.last);
      const Changes one{sign, sign, run.x, 1, 0, signs.differ && !mean_over_ties};
      if (walk == 0) {
        const double h = probability(own, run) * signs.total;
        sums.total += h;
        sums.moment += h * double(run.x - own.law.peak);
        changes = Changes::join(changes, one);
        return;
      }
      const A last_x = before.last_x;
      const int step = before.changes;
      before = Changes::join(before, one);
      if (before.changes > step) {
        steps[2 * before.changes] = threshold(own, run, last_x);
        steps[2 * before.changes + 1] = sign;
      }
    });
    if (walk == 1) break;
    sums = over_cluster(sums, SignedSums::join, static_cast<SignedSums*>(joins));
    add_sums(own, ranking.tail_sign, sums);
    const auto scanned = scan_over_cluster(changes, Changes::join, static_cast<Changes*>(joins));
    const bool fits = scanned.all.changes < kSavedSteps && scanned.all.split == 0, is_nan = poison != 0;
    if (thread == 0) {
      steps[0] = A(is_nan ? 1 : fits ? scanned.all.changes + 1 : -1);
      steps[1] = is_nan ? A(poison) : fits ? scanned.all.first : A(0);
    }
    before = scanned.before;
    if (is_nan || !fits || Changes::join(before, changes).changes == before.changes) break;
  }
  sums.total += poison;
  return sums;
}

}  // namespace mlot::cuda
