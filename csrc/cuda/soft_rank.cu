// soft_rank on a GPU: a team of threads owns a row in shared memory, a warp where the row is short, else a block.
#include "mlot/cuda/soft_rank.h"

#include "mlot/cuda/launch.h"

namespace mlot::cuda {
inline namespace soft_rank_kernels {

constexpr int64_t kOfAWarp = 64;  // entries of a row, up to which its team is a warp

// The threads that own a row.
template <bool kBlock>
struct Team {
  int64_t row;
  int lane, lanes;

  __device__ Team()
      : row(kBlock ? int64_t(blockIdx.x) : (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp),
        lane(kBlock ? int(threadIdx.x) : int(threadIdx.x % kWarp)),
        lanes(kBlock ? int(blockDim.x) : kWarp) {}

  __device__ void sync() const { kBlock ? __syncthreads() : __syncwarp(); }
  __device__ bool all(bool mine) const { return kBlock ? __syncthreads_and(mine) : __all_sync(~0u, mine); }

  // Its part of the block's shared memory, of which each row takes so many bytes.
  __device__ unsigned char* part_of(unsigned char* shared, unsigned bytes) const {
    return shared + (kBlock ? 0 : threadIdx.x / kWarp * bytes);
  }
};

// A row in shared memory, `room` entries of it, a power of two: by column, then by position in descending order.
//
// A pooled block of neighbours has at its first position how much its entries are below the first one, in sum, and at
// both ends the position of the other end. What stands at positions inside is of no use any more.
template <class A>
struct Row {
  A *s, *below;
  int *column, *other_end;
  unsigned* begins;  // a bit for each position, set where a block begins

  static unsigned bytes(int64_t room) {
    return unsigned((room * (2 * sizeof(A) + 2 * sizeof(int)) + pieces(room, kWarp) * sizeof(unsigned) + 15) / 16 * 16);
  }

  __device__ Row(unsigned char* shared, int room)
      : s(reinterpret_cast<A*>(shared)),
        below(s + room),
        column(reinterpret_cast<int*>(below + room)),
        other_end(column + room),
        begins(reinterpret_cast<unsigned*>(other_end + room)) {}

  // s at i less s at j; an infinity is no distance from itself.
  __device__ A apart(int i, int j) const { return s[i] == s[j] ? A(0) : s[i] - s[j]; }
};

// Entries [first, last] that are pooled.
template <class A>
struct Pooled {
  int first, last;
  A below;

  __device__ A size() const { return A(last - first + 1); }
};

// Whether two neighbours must be pooled: their means are nearer to one another than epsilon times their mean ranks
// are, both multiplied with both sizes.
template <class A>
__device__ bool violate(const Row<A>& row, const Pooled<A>& left, const Pooled<A>& right, A half_epsilon) {
  const A a = left.size(), b = right.size();
  return row.apart(left.first, right.first) * a * b + left.below * b - right.below * a < half_epsilon * (a + b) * a * b;
}

template <class A>
__device__ Pooled<A> pooled(const Row<A>& row, const Pooled<A>& left, const Pooled<A>& right) {
  atomicAnd(&row.begins[right.first / kWarp], ~(1u << right.first % kWarp));  // other threads have bits of the word
  const A below = left.below + (right.below - right.size() * row.apart(left.first, right.first));
  return {left.first, right.last, below};
}

// Owns the positions [from, to) with a thread: joins what is pooled in front of `middle` to what is pooled behind it.
// Only around the middle can neighbours violate; what is pooled there may then violate with its next neighbour on
// either side. A block that goes never comes back: all levels of a row take some 2 n steps.
template <class A>
__device__ void join(const Row<A>& row, int from, int middle, int to, A half_epsilon) {
  const auto ending_at = [&](int last) {
    const int first = row.other_end[last];
    return Pooled<A>{first, last, row.below[first]};
  };
  const auto beginning_at = [&](int first) { return Pooled<A>{first, row.other_end[first], row.below[first]}; };
  const Pooled<A> left = ending_at(middle - 1), right = beginning_at(middle);
  if (!violate(row, left, right, half_epsilon)) return;
  Pooled<A> grown = pooled(row, left, right);
  for (bool grows = true; grows;) {
    grows = false;
    if (grown.first > from) {
      const Pooled<A> before = ending_at(grown.first - 1);
      if (violate(row, before, grown, half_epsilon)) grown = pooled(row, before, grown), grows = true;
    }
    if (grown.last + 1 < to) {
      const Pooled<A> behind = beginning_at(grown.last + 1);
      if (violate(row, grown, behind, half_epsilon)) grown = pooled(row, grown, behind), grows = true;
    }
  }
  row.other_end[grown.first] = grown.last;
  row.other_end[grown.last] = grown.first;
  row.below[grown.first] = grown.below;
}

// Bitonic, the larger first; of equals the lower column. No two entries are equal in both, so that there is one order.
template <bool kBlock, class A>
__device__ void sort(const Team<kBlock>& team, const Row<A>& row, int room) {
  for (int size = 2; size <= room; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = team.lane; pair < room / 2; pair += team.lanes) {
        const int i = 2 * pair - (pair & (stride - 1)), j = i + stride;
        const A x = row.s[i], y = row.s[j];
        const int of_x = row.column[i], of_y = row.column[j];
        const bool ordered = x > y || (x == y && of_x < of_y);
        if (ordered != ((i & size) == 0)) {
          row.s[i] = y, row.s[j] = x;
          row.column[i] = of_y, row.column[j] = of_x;
        }
      }
      team.sync();
    }
  }
}

// Owns a row with a team: reads it once, writes its ranks and what backward needs. Blocks of 1, 2, 4, ... positions
// are joined in pairs, a thread to a pair. What a row gives depends on it and on its width alone.
template <class T, bool kBlock, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, 4) forward(SoftRankForward call, int room, unsigned bytes) {
  MLOT_SHARED_MEMORY(unsigned char, shared);
  const Team<kBlock> team;
  if (team.row >= call.rows) return;  // a whole team
  const Row<A> row(team.part_of(shared, bytes), room);
  const int n = int(call.width);
  int length = n;
  if (call.lengths) {
    const int64_t given = call.lengths[team.row];
    length = given < 0 ? 0 : given < n ? int(given) : n;
  }
  const T* x = static_cast<const T*>(call.values) + team.row * call.row_stride;
  bool number = true;
  for (int i = team.lane; i < room; i += team.lanes) {
    A value = A(-INFINITY);  // beyond the length: behind all others, for their columns are higher
    if (i < length) value = widen(x[i]);
    number = number && value == value;
    row.s[i] = value == value ? value : A(0);
    row.column[i] = i;
    row.below[i] = 0;
    row.other_end[i] = i;
    if (i % kWarp == 0) row.begins[i / kWarp] = ~0u;
  }
  const bool has_nan = !team.all(number);
  team.sync();
  sort(team, row, room);
  const A epsilon = A(call.epsilon), half_epsilon = A(call.epsilon / 2);
  for (int half = 1; half < length; half *= 2) {
    for (int64_t from = int64_t(2) * half * team.lane; from + half < length; from += int64_t(2) * half * team.lanes) {
      const int first = int(from), to = first + 2 * half < length ? first + 2 * half : length;
      join(row, first, first + half, to, half_epsilon);
    }
    team.sync();
  }
  A* ranks = static_cast<A*>(call.ranks) + team.row * n;
  int32_t *order = call.order + team.row * n, *block = call.block + team.row * n;
  for (int i = team.lane; i < n; i += team.lanes) {
    const int column = row.column[i];
    order[i] = column;
    if (i >= length) {
      ranks[column] = 0;
      block[i] = ~i;
      continue;
    }
    int word = i / kWarp;
    unsigned bits = row.begins[word] & (~0u >> (kWarp - 1 - i % kWarp));
    while (bits == 0) bits = row.begins[--word];
    const int first = word * kWarp + kWarp - 1 - __clz(int(bits));
    const A size = A(row.other_end[first] - first + 1);
    const A above = -row.apart(first, i) - row.below[first] / size;
    ranks[column] = has_nan ? A(NAN) : above / epsilon + (A(length - first) - (size - 1) / 2);
    block[i] = has_nan ? n : fabs(row.s[i]) == A(INFINITY) ? ~first : first;
  }
}

// Owns a row's gradient with a team: reads upstream's once, writes it once. A warp sums a block, its lanes a stride
// apart, in an order that depends on the block's size alone.
template <class T, bool kBlock, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, 4) backward(SoftRankBackward call, int room, unsigned bytes) {
  MLOT_SHARED_MEMORY(unsigned char, shared);
  const Team<kBlock> team;
  if (team.row >= call.rows) return;  // a whole team
  A* const grad = reinterpret_cast<A*>(team.part_of(shared, bytes));
  int* const block = reinterpret_cast<int*>(grad + room);
  const int n = int(call.width);
  const A* upstream = static_cast<const A*>(call.grad) + team.row * n;
  const int32_t* order = call.order + team.row * n;
  T* gradient = static_cast<T*>(call.gradient) + team.row * n;
  for (int i = team.lane; i < n; i += team.lanes) {
    grad[i] = upstream[order[i]];
    block[i] = call.block[team.row * n + i];
  }
  team.sync();
  const A epsilon = A(call.epsilon);
  const auto alone = [&](int i) { return block[i] == i && !(i + 1 < n && block[i + 1] == i); };
  for (int i = team.lane; i < n; i += team.lanes) {
    if (block[i] < 0 || block[i] == n || alone(i)) {
      narrow(block[i] < 0 ? A(0) : block[i] == n ? A(NAN) : (grad[i] - grad[i]) / epsilon, gradient[order[i]]);
    }
  }
  for (int first = team.lane / kWarp; first < n; first += team.lanes / kWarp) {
    if (block[first] != first || alone(first)) continue;  // the whole warp
    A sum = 0, size = 0;
    for (int i = first + team.lane % kWarp; i < n && block[i] == first; i += kWarp) sum += grad[i], size += 1;
    const auto plus = [](A a, A b) { return a + b; };
    const A mean = from_lane(over_warp(sum, plus), 0) / from_lane(over_warp(size, plus), 0);
    for (int i = first + team.lane % kWarp; i < n && block[i] == first; i += kWarp) {
      narrow((grad[i] - mean) / epsilon, gradient[order[i]]);
    }
  }
}

// One kernel or the other for all rows, of which each takes so many bytes of shared memory.
template <class Call>
void launch_teams(void (*of_warps)(Call, int, unsigned), void (*of_blocks)(Call, int, unsigned), const Call& call,
                  int room, unsigned bytes, void* stream) {
  const unsigned threads = threads_of_a_block(kThreads);
  if (call.width > kOfAWarp) {
    launch(of_blocks, Shape{call.rows, threads, 1, bytes}, stream, call, room, bytes);
  } else if (call.width > 0) {
    const unsigned warps = threads / kWarp;
    launch(of_warps, Shape{pieces(call.rows, warps), threads, 1, warps * bytes}, stream, call, room, bytes);
  }
}

int room_of(int64_t width) {
  int room = 1;
  while (room < width) room *= 2;
  return room;
}

template <class T>
void launch_forward(const SoftRankForward& call, void* stream) {
  const int room = room_of(call.width);
  launch_teams(forward<T, false>, forward<T, true>, call, room, Row<Accumulator<T>>::bytes(room), stream);
}

template <class T>
void launch_backward(const SoftRankBackward& call, void* stream) {
  const int room = room_of(call.width);
  const unsigned bytes = unsigned(room * (sizeof(Accumulator<T>) + sizeof(int)));
  launch_teams(backward<T, false>, backward<T, true>, call, room, bytes, stream);
}

}  // namespace soft_rank_kernels

const SoftRank soft_rank{
    {launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>},
    {launch_backward<float>, launch_backward<bfloat16>, launch_backward<float16>, launch_backward<double>},
};

}  // namespace mlot::cuda
