// The kernels over pairs of features and over transport problems.
#include <initializer_list>

#include "mlot/cpu/dispatch.h"
#include "mlot/cpu/pairwise_cost.h"
#include "mlot/cpu/sinkhorn.h"
#include "mlot/cpu/transport_cost.h"
#include "threads.h"

namespace {

// Two problems: two threads take one each, three share each one's rows where these are enough.
constexpr int64_t kProblems = 2, kFeatures = 19;

// Features [kProblems, M, kFeatures] and [kProblems, N, kFeatures], positive ones, as probabilities are.
struct Features {
  int64_t M, N;
  std::vector<float> x, y;

  Features(int64_t M_, int64_t N_)
      : M(M_),
        N(N_),
        x(random_values(kProblems * M * kFeatures, 0.1f, 1, 0)),
        y(random_values(kProblems * N * kFeatures, 0.1f, 1, 1)) {}

  mlot::FeaturePairs pairs(mlot::Metric metric) const {
    const auto side = [](const std::vector<float>& values, int64_t rows) -> mlot::FeatureRows {
      return {values.data(), 0, rows, rows * kFeatures, kFeatures, 1};
    };
    return {side(x, M), side(y, N), kProblems, kFeatures, metric};
  }
};

Run pairwise_cost(const Features& features, mlot::Metric metric, int64_t threads) {
  const mlot::PairwiseCost& kernels = MLOT_SELECT(pairwise_cost);
  const mlot::FeaturePairs pairs = features.pairs(metric);
  const std::vector<float> upstream = random_values(kProblems * features.M * features.N, -1, 1, 2);
  Run run;
  kernels.forward[0]({pairs, run.fresh(int64_t(upstream.size()))}, among(threads));
  kernels.backward[0](
      {pairs, upstream.data(), threads, run.fresh(int64_t(features.x.size())), run.fresh(int64_t(features.y.size()))},
      among(threads));
  return run;
}

// A way to solve problems of kRows and kColumns, which are as many elements as one problem's rows are shared for.
constexpr int64_t kRows = 520, kColumns = 515, kIterations = 4;

struct Solver {
  std::vector<float> row_marginal = random_values(kProblems * kRows, 0.1f, 1, 4),
                     column_marginal = random_values(kProblems * kColumns, 0.1f, 1, 5),
                     weight = random_values(kProblems * kColumns, 0, 1, 6),
                     of_problems = random_values(2 * kProblems, -1, 1, 7);
  std::vector<int64_t> row_lengths{kRows, kRows - 5}, column_lengths{kColumns - 70, kColumns};
  mlot::Domain domain;
  mlot::TransportGradient gradient;

  mlot::TransportOptions options(int64_t threads) const {
    return {.problems = kProblems,
            .rows = kRows,
            .columns = kColumns,
            .row_marginal = row_marginal.data(),
            .column_marginal = column_marginal.data(),
            .row_lengths = row_lengths.data(),
            .column_lengths = column_lengths.data(),
            .column_weight = weight.data(),
            .epsilon = 0.5,
            .iterations = kIterations,
            .marginals = mlot::Marginals::given,
            .tolerance = 0,
            .domain = domain,
            .gradient = gradient,
            .threads = threads};
  }

  mlot::TransportUpstream upstream() const { return {of_problems.data(), of_problems.data() + kProblems}; }
};

mlot::TransportOutputs outputs(Run& run, const Solver& solver) {
  const int64_t kept = solver.gradient == mlot::TransportGradient::unrolled ? kIterations : 0;
  return {run.fresh(kProblems),
          run.fresh(kProblems),
          run.fresh(kProblems * kRows),
          run.fresh(kProblems * kColumns),
          run.fresh<int64_t>(kProblems),
          kept ? run.fresh(kProblems * kept * kRows) : nullptr,
          kept ? run.fresh(kProblems * kept * kColumns) : nullptr};
}

mlot::TransportSaved saved(const mlot::TransportOutputs& made) {
  return {made.row_potential, made.column_potential, made.done, made.row_history, made.column_history};
}

mlot::TransportGradients gradients(Run& run) {
  return {run.fresh(kProblems * kRows), run.fresh(kProblems * kColumns), run.fresh(kProblems * kColumns)};
}

Run sinkhorn(const Solver& solver, const std::vector<float>& cost, int64_t threads) {
  const mlot::Sinkhorn& kernels = MLOT_SELECT(sinkhorn);
  const int64_t elements = kProblems * kRows * kColumns;
  const mlot::CostMatrices costs{cost.data(), kRows * kColumns, kColumns, 1};
  Run run;
  const mlot::SinkhornForward call{costs, solver.options(threads), run.fresh(elements), outputs(run, solver)};
  kernels.forward[0](call, among(threads));
  kernels.backward[0]({solver.upstream(), cost.data(), costs, solver.options(threads), saved(call.outputs),
                       run.fresh(elements), gradients(run)},
                      among(threads));
  return run;
}

Run transport_cost(const Solver& solver, const Features& features, mlot::Metric metric, int64_t threads) {
  const mlot::TransportCost& kernels = MLOT_SELECT(transport_cost);
  const mlot::FeaturePairs pairs = features.pairs(metric);
  Run run;
  const mlot::TransportCostForward call{pairs, solver.options(threads), outputs(run, solver)};
  kernels.forward[0](call, among(threads));
  kernels.backward[0]({solver.upstream(), pairs, solver.options(threads), saved(call.outputs),
                       run.fresh(int64_t(features.x.size())), run.fresh(int64_t(features.y.size())), gradients(run)},
                      among(threads));
  return run;
}

}  // namespace

bool pairs_are_the_same() {
  using enum mlot::Metric;
  bool same = true;
  const Features few(150, 37);
  for (const mlot::Metric metric : {l1, l2, sqeuclidean, cosine, cross_entropy}) {
    same &= same_on_several("pairwise_cost", [&](int64_t threads) { return pairwise_cost(few, metric, threads); });
  }
  const std::vector<float> cost = random_values(kProblems * kRows * kColumns, 0, 2, 8);
  const Features many(kRows, kColumns);
  for (const mlot::Domain domain : {mlot::Domain::log, mlot::Domain::scaling}) {
    for (const auto gradient :
         {mlot::TransportGradient::unrolled, mlot::TransportGradient::envelope, mlot::TransportGradient::implicit}) {
      const Solver solver{.domain = domain, .gradient = gradient};
      same &= same_on_several("sinkhorn", [&](int64_t threads) { return sinkhorn(solver, cost, threads); });
    }
    const Solver solver{.domain = domain, .gradient = mlot::TransportGradient::unrolled};
    for (const mlot::Metric metric : {l1, l2}) {
      same &= same_on_several("transport_cost",
                              [&](int64_t threads) { return transport_cost(solver, many, metric, threads); });
    }
  }
  return same;
}
