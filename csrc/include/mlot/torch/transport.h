// What the doors of the transport operators share: last guards, outputs, schemas.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "mlot/torch/tensors.h"
#include "mlot/transport.h"

namespace mlot {

constexpr const char* kSinkhornForward =
    "sinkhorn_forward(Tensor cost, Tensor? row_marginal, Tensor? column_marginal, Tensor? row_lengths, "
    "Tensor? column_lengths, Tensor? column_weight, float epsilon, int iterations, str marginals, float tolerance, "
    "str domain, str gradient, bool return_plan) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kSinkhornBackward =
    "sinkhorn_backward(Tensor grad_transported, Tensor grad_regularized, Tensor grad_plan, Tensor cost, "
    "Tensor? row_marginal, Tensor? column_marginal, Tensor? row_lengths, Tensor? column_lengths, "
    "Tensor? column_weight, Tensor row_potential, Tensor column_potential, Tensor done, Tensor row_history, "
    "Tensor column_history, float epsilon, int iterations, str marginals, float tolerance, str domain, "
    "str gradient, bool return_plan) -> (Tensor, Tensor, Tensor, Tensor)";

constexpr const char* kTransportCostForward =
    "transport_cost_forward(Tensor x, Tensor y, Tensor? row_marginal, Tensor? column_marginal, Tensor? row_lengths, "
    "Tensor? column_lengths, Tensor? column_weight, str metric, float epsilon, int iterations, str marginals, "
    "float tolerance, str domain, str gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kTransportCostBackward =
    "transport_cost_backward(Tensor grad_transported, Tensor grad_regularized, Tensor x, Tensor y, "
    "Tensor? row_marginal, Tensor? column_marginal, Tensor? row_lengths, Tensor? column_lengths, "
    "Tensor? column_weight, str metric, float epsilon, int iterations, str marginals, float tolerance, str domain, "
    "str gradient, Tensor row_potential, Tensor column_potential, Tensor done, Tensor row_history, "
    "Tensor column_history, bool x_needed, bool y_needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";

using TransportCostOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using SinkhornOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline CostMatrices matrices(const Tensor& cost) {
  return {cost.const_data_ptr(), cost.stride(0), cost.stride(1), cost.stride(2)};
}

// mlot_kernels.transport.TransportOptions; holds the contiguous copies that `options` points into.
struct TransportArguments {
  std::optional<Tensor> row_marginal, column_marginal, row_lengths, column_lengths, column_weight;
  TransportOptions options;

  // `like` has the accumulator's dtype `wide`; B, M and N are the problems and their rows and columns.
  TransportArguments(int64_t B, int64_t M, int64_t N, ScalarType wide, const std::optional<Tensor>& row_marginal_,
                     const std::optional<Tensor>& column_marginal_, const std::optional<Tensor>& row_lengths_,
                     const std::optional<Tensor>& column_lengths_, const std::optional<Tensor>& column_weight_,
                     double epsilon, int64_t iterations, const std::string& marginals, double tolerance,
                     const std::string& domain, const std::string& gradient)
      : row_marginal(dense(row_marginal_, wide)),
        column_marginal(dense(column_marginal_, wide)),
        row_lengths(dense(row_lengths_, ScalarType::Long)),
        column_lengths(dense(column_lengths_, ScalarType::Long)),
        column_weight(dense(column_weight_, wide)) {
    const bool given = marginals == "given";
    STD_TORCH_CHECK(given || marginals == "uniform" || marginals == "unit", "marginals must be uniform, unit or given");
    STD_TORCH_CHECK(given == row_marginal.has_value() && given == column_marginal.has_value(),
                    "row_marginal and column_marginal must be there where marginals are given, and only there");
    STD_TORCH_CHECK(domain == "auto" || domain == "log" || domain == "scaling", "domain must be auto, log or scaling");
    STD_TORCH_CHECK(gradient == "unrolled" || gradient == "envelope" || gradient == "implicit",
                    "gradient must be unrolled, envelope or implicit");
    STD_TORCH_CHECK(epsilon > 0 && iterations >= 1 && tolerance >= 0, "epsilon, iterations or tolerance out of range");
    const auto sized = [](const std::optional<Tensor>& tensor, int64_t elements) {
      STD_TORCH_CHECK(!tensor || tensor->numel() == elements, "marginals, lengths or weights of another size");
    };
    sized(row_marginal, B * M), sized(column_marginal, B * N), sized(column_weight, B * N);
    sized(row_lengths, B), sized(column_lengths, B);
    const auto data = [](const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
    options = {.problems = B,
               .rows = M,
               .columns = N,
               .row_marginal = data(row_marginal),
               .column_marginal = data(column_marginal),
               .row_lengths = static_cast<const int64_t*>(data(row_lengths)),
               .column_lengths = static_cast<const int64_t*>(data(column_lengths)),
               .column_weight = data(column_weight),
               .epsilon = epsilon,
               .iterations = iterations,
               .marginals = given                    ? Marginals::given
                            : marginals == "uniform" ? Marginals::uniform
                                                     : Marginals::unit,
               .tolerance = tolerance,
               .domain = domain == "auto"  ? Domain::automatic
                         : domain == "log" ? Domain::log
                                           : Domain::scaling,
               .gradient = gradient == "unrolled"   ? TransportGradient::unrolled
                           : gradient == "envelope" ? TransportGradient::envelope
                                                    : TransportGradient::implicit,
               .threads = int64_t(torch::stable::get_num_threads())};
  }

  TransportArguments(const TransportArguments&) = delete;  // `options` points into its members
};

// The outputs that both operators have, fresh.
struct TransportTensors {
  Tensor transported, regularized, row_potential, column_potential, done, row_history, column_history;

  TransportTensors(const Tensor& like, ScalarType wide, const TransportOptions& options)
      : transported(fresh(like, {options.problems}, wide)),
        regularized(fresh(like, {options.problems}, wide)),
        row_potential(fresh(like, {options.problems, options.rows}, wide)),
        column_potential(fresh(like, {options.problems, options.columns}, wide)),
        done(fresh(like, {options.problems}, ScalarType::Long)),
        row_history(fresh(like, {options.problems, kept(options), options.rows}, wide)),
        column_history(fresh(like, {options.problems, kept(options), options.columns}, wide)) {}

  TransportOutputs pointers(const TransportOptions& options) const {
    const bool keeps = kept(options) > 0;
    return {transported.mutable_data_ptr(),
            regularized.mutable_data_ptr(),
            row_potential.mutable_data_ptr(),
            column_potential.mutable_data_ptr(),
            static_cast<int64_t*>(done.mutable_data_ptr()),
            keeps ? row_history.mutable_data_ptr() : nullptr,
            keeps ? column_history.mutable_data_ptr() : nullptr};
  }

 private:
  static int64_t kept(const TransportOptions& options) {
    return options.gradient == TransportGradient::unrolled ? options.iterations : 0;
  }

  static Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
  }
};

// What forward left and what comes from above, dense.
struct TransportBackwardTensors {
  Tensor grad_transported, grad_regularized, row_potential, column_potential, done, row_history, column_history;
  Tensor grad_row_marginal, grad_column_marginal, grad_column_weight;

  TransportBackwardTensors(const TransportOptions& options, ScalarType wide, const Tensor& grad_transported_,
                           const Tensor& grad_regularized_, const Tensor& row_potential_,
                           const Tensor& column_potential_, const Tensor& done_, const Tensor& row_history_,
                           const Tensor& column_history_)
      : grad_transported(dense(grad_transported_, wide)),
        grad_regularized(dense(grad_regularized_, wide)),
        row_potential(dense(row_potential_, wide)),
        column_potential(dense(column_potential_, wide)),
        done(dense(done_)),
        row_history(dense(row_history_, wide)),
        column_history(dense(column_history_, wide)),
        grad_row_marginal(torch::stable::new_empty(row_potential, row_potential.sizes())),
        grad_column_marginal(torch::stable::new_empty(column_potential, column_potential.sizes())),
        grad_column_weight(torch::stable::new_empty(column_potential, column_potential.sizes())) {
    const int64_t B = options.problems, M = options.rows, N = options.columns;
    STD_TORCH_CHECK(grad_transported.numel() == B && grad_regularized.numel() == B, "upstream gradients must be [B]");
    STD_TORCH_CHECK(row_potential.numel() == B * M && column_potential.numel() == B * N && done.numel() == B,
                    "potentials must be [B, M] and [B, N], done [B]");
    STD_TORCH_CHECK(done.scalar_type() == ScalarType::Long, "done must be int64");
    STD_TORCH_CHECK(
        options.gradient != TransportGradient::unrolled ||
            (row_history.numel() == B * options.iterations * M && column_history.numel() == B * options.iterations * N),
        "histories must be [B, L, M] and [B, L, N]");
  }

  TransportUpstream upstream() const { return {grad_transported.const_data_ptr(), grad_regularized.const_data_ptr()}; }

  TransportSaved saved() const {
    return {row_potential.const_data_ptr(), column_potential.const_data_ptr(),
            static_cast<const int64_t*>(done.const_data_ptr()), row_history.const_data_ptr(),
            column_history.const_data_ptr()};
  }

  TransportGradients gradients() const {
    return {grad_row_marginal.mutable_data_ptr(), grad_column_marginal.mutable_data_ptr(),
            grad_column_weight.mutable_data_ptr()};
  }
};

}  // namespace mlot
