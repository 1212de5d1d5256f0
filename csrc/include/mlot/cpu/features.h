// One side of a comparison of feature vectors: widened, made ready for the metric, and laid out as the tiles of
// pairwise.h read it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "mlot/cpu/metric.h"
#include "mlot/cpu/vector.h"

namespace mlot::MLOT_ISA {

enum class Role { row, column };  // x, y

constexpr double kSmallestNorm = 1e-8;

// Rows whose features stand together, and the columns of a tile.
template <class A>
constexpr int64_t kPanel = 2 * kWidth<A>;

// Calls body with a null pointer to the element type that `dtype` numbers, as the tables of kernels do.
template <class Body>
static inline void with_type(int dtype, const Body& body) {
  if (dtype == 0) body(static_cast<float*>(nullptr));
  if (dtype == 1) body(static_cast<bfloat16*>(nullptr));
  if (dtype == 2) body(static_cast<float16*>(nullptr));
  if (dtype == 3) body(static_cast<double*>(nullptr));
}

// Exchanges, in squares of 2 step, the upper right with the lower left quarter of two rows that lie `step` apart.
template <class A, int step, size_t... l>
MLOT_INLINE void exchange(Vector<A>& upper, Vector<A>& lower, std::index_sequence<l...>) {
  constexpr size_t W = kWidth<A>;
  const Vector<A> left = __builtin_shuffle(upper, lower, VectorBits<A>{(l & step ? W + l - step : l)...});
  lower = __builtin_shuffle(upper, lower, VectorBits<A>{(l & step ? W + l : l + step)...});
  upper = left;
}

// Rows become columns.
template <class A, int step = 1>
MLOT_INLINE void transpose(Vector<A> (&square)[kWidth<A>]) {
  if constexpr (step < kWidth<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<A>; ++i) {
      if (!(i & step)) exchange<A, step>(square[i], square[i + step], std::make_index_sequence<kWidth<A>>());
    }
    transpose<A, 2 * step>(square);
  }
}

// One side's features as the tiles read them. Which element is where:
//
//   vectors  [ceil(D / W)][rows][W]              W = kWidth<A> neighbouring features, zeros behind the last one
//   panels   [ceil(rows / P)][D][P]              P = kPanel<A> neighbouring rows, the last one as often as needed
//
// They are widened, and further made ready for the metric: unit vectors for `cosine`; for `cross_entropy` those of y
// are logs.
template <class A>
class Features {
 public:
  Features(Metric metric, Role role) : metric_(metric), role_(role) {}

  // Takes `rows` rows of D features, strides in elements; what it held before is gone, its memory is used again.
  template <class T>
  void read(const T* values, int64_t rows, int64_t D, int64_t row_stride, int64_t column_stride) {
    rows_ = rows, D_ = D;
    vectors_.resize(blocks() * rows * kWidth<A>);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t block = 0; block < blocks(); ++block) {
        const T* from = values + i * row_stride + block * kWidth<A> * column_stride;
        copy(from, column_stride, std::min<int64_t>(kWidth<A>, D - block * kWidth<A>), at(vectors_.data(), block, i));
      }
    }
    if (metric_ == Metric::l1) look_for_infinities();
    if (metric_ == Metric::cosine) normalise();
    if (metric_ == Metric::cross_entropy && role_ == Role::column) take_logs();
    make_panels();
  }

  Metric metric() const { return metric_; }
  int64_t rows() const { return rows_; }
  int64_t width() const { return D_; }
  int64_t blocks() const { return (D_ + kWidth<A> - 1) / kWidth<A>; }
  int64_t sums_size() const { return blocks() * rows_ * kWidth<A>; }
  bool finite() const { return finite_; }

  // Where the vector `block` of row i is in an array of the layout of `vectors`.
  template <class Pointer>
  Pointer at(Pointer array, int64_t block, int64_t i) const {
    return array + (block * rows_ + i) * kWidth<A>;
  }
  const A* vector(int64_t block, int64_t i) const { return at(vectors_.data(), block, i); }
  // Where the features of row i are in its panel, from kPanel to kPanel elements.
  const A* column(int64_t i) const { return panels_.data() + i / kPanel<A> * kPanel<A> * D_ + i % kPanel<A>; }

  // Writes the gradient [rows, D] of these features, dense, of the sums that cost_backward_rows made for this side.
  template <class T>
  void write_gradient(const A* sums, T* out) const {
    for (int64_t i = 0; i < rows_; ++i, out += D_) {
      A along = 0;
      if (metric_ == Metric::cosine && passes_[i]) {
        Vector<A> product = {};
        for (int64_t block = 0; block < blocks(); ++block) product += load(vector(block, i)) * load(at(sums, block, i));
        along = sum<A>(product);
      }
      for (int64_t block = 0; block < blocks(); ++block) {
        Vector<A> g = load(at(sums, block, i));
        if (metric_ == Metric::sqeuclidean) g = g + g;
        if (metric_ == Metric::cosine) g = (load(vector(block, i)) * along - g) / norms_[i];
        if (metric_ == Metric::cross_entropy) {
          g = role_ == Role::row ? -g : -g / load(at(divisors_.data(), block, i));
        }
        const int64_t n = std::min<int64_t>(kWidth<A>, D_ - block * kWidth<A>);
        for (int64_t l = 0; l < n; ++l) narrow(g[l], out[block * kWidth<A> + l]);
      }
    }
  }

 private:
  template <class T>
  static void copy(const T* from, int64_t stride, int64_t n, A* to) {
    if (stride == 1 && n == kWidth<A>) {
      for (int l = 0; l < kWidth<A>; ++l) to[l] = wide(from[l]);
      return;
    }
    for (int64_t l = 0; l < n; ++l) to[l] = wide(from[l * stride]);
    std::fill(to + n, to + kWidth<A>, A(0));
  }

  void look_for_infinities() {
    A zeros = 0;  // NaN as soon as one of them is not finite
#pragma omp simd reduction(+ : zeros)
    for (size_t i = 0; i < vectors_.size(); ++i) zeros += vectors_[i] * 0;
    finite_ = zeros == 0;
  }

  void normalise() {
    norms_.resize(rows_), passes_.resize(rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      Vector<A> squares = {};
      for (int64_t block = 0; block < blocks(); ++block) squares += load(vector(block, i)) * load(vector(block, i));
      const A square = sum<A>(squares);
      passes_[i] = !(square <= A(kSmallestNorm * kSmallestNorm));
      norms_[i] = passes_[i] ? std::sqrt(square) : A(kSmallestNorm);
      for (int64_t block = 0; block < blocks(); ++block) {
        A* v = at(vectors_.data(), block, i);
        store<A>(load(v) / norms_[i], v);
      }
    }
  }

  void take_logs() {
    divisors_.resize(vectors_.size());
    for (size_t i = 0; i < vectors_.size(); i += kWidth<A>) {
      const Vector<A> v = load(&vectors_[i]);
      store<A>(v == A(0) ? all(A(1)) : v, &divisors_[i]);
      store<A>(logarithm<A>(v), &vectors_[i]);
    }
  }

  void make_panels() {
    constexpr int64_t W = kWidth<A>, P = kPanel<A>;
    const int64_t filled = (rows_ + P - 1) / P * P;
    panels_.resize(filled * D_);
    for (int64_t i = 0; i < filled; i += W) {
      A* to = panels_.data() + i / P * P * D_ + i % P;
      for (int64_t d = 0; d < D_; d += W) {
        Vector<A> square[W];
        for (int64_t l = 0; l < W; ++l) square[l] = load(vector(d / W, std::min(i + l, rows_ - 1)));
        transpose<A>(square);
        for (int64_t l = 0; l < std::min(W, D_ - d); ++l) store<A>(square[l], to + (d + l) * P);
      }
    }
  }

  Metric metric_;
  Role role_;
  int64_t rows_ = 0, D_ = 0;
  bool finite_ = true;  // known for l1 alone
  std::vector<A> vectors_, panels_;
  std::vector<A> norms_;      // [rows], of cosine: what the features were divided by
  std::vector<char> passes_;  // [rows], of cosine: the norm depends on the features
  std::vector<A> divisors_;   // as vectors, of cross_entropy's y: y, 1 where that is 0
};

}  // namespace mlot::MLOT_ISA
