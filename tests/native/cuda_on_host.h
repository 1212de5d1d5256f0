// Runs CUDA C++ kernels on the host: one fiber per CUDA thread, so that a kernel's values, barriers and shared-memory
// layout can be tested where there is no GPU. The kernel source is compiled twice and unchanged: by nvcc for the
// device, by a host compiler with this header.
//
// What is modelled: grids of clusters of blocks, __syncthreads and its vote, __syncwarp, shuffles, votes and warp
// reductions, cluster barriers (arrive and wait apart) and distributed shared memory, asynchronous copies, atomics.
// Blocks of one cluster run concurrently, clusters run one after another. What is not: memory ordering finer than a
// barrier, static __shared__ variables, inline PTX, the bulk copy engine, grid-wide barriers.
//
// Fibers switch only where a thread waits. `order` decides who runs first between two waits: a kernel whose result
// depends on it lacks a barrier. Shared memory and the target of an asynchronous copy are poisoned until they are
// written or waited for. Threads that wait for one another for ever end in an exception, not in a hang.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __restrict__

#ifndef __VECTOR_TYPES_H__  // CUDA's own vector types, where cuda_bf16.h and its kin are included first
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
#endif

#ifndef __CUDA_BF16_H__  // storage types and their conversions, with CUDA's names; arithmetic is done in float
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return {f != f ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float f) { return {_Float16(f)}; }
#endif

namespace cuda_on_host {

constexpr unsigned kWarp = 32;
enum class Order { ascending, descending, shuffled };
enum class Wait { none, warp, block, cluster, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread{}, block{};
  unsigned rank_in_cluster = 0, linear = 0;  // `linear`: index of the thread in its block
  unsigned mask = 0;                         // lanes it waits for, where it waits for its warp
  unsigned arrived = 0, passed = 0;          // cluster barriers
  uint64_t offer = 0, inbox[kWarp] = {};     // what it gives to its warp, what its warp gave
  std::vector<std::vector<Copy>> copies{1};  // asynchronous copies, a group per commit
  Wait waits = Wait::none;
};

struct Cluster {
  std::vector<Fiber> fibers;              // blocks in rank order, threads in linear order
  std::vector<std::vector<char>> shared;  // one buffer per block
  unsigned threads = 0, blocks = 0;
  dim3 grid, block;
  ucontext_t scheduler;
  std::function<void()> body;
  std::string failure;
};

inline Cluster* cluster = nullptr;
inline Fiber* self = nullptr;

inline void wait(Wait kind, unsigned mask = ~0u) {
  self->waits = kind;
  self->mask = mask;
  swapcontext(&self->context, &cluster->scheduler);
}

inline void* shared_memory(unsigned rank) { return cluster->shared[rank].data(); }
inline void* shared_memory() { return shared_memory(self->rank_in_cluster); }

// The same address in the shared memory of block `rank` of this cluster.
inline void* map_shared(const void* pointer, unsigned rank) {
  return static_cast<char*>(shared_memory(rank)) +
         (static_cast<const char*>(pointer) - static_cast<char*>(shared_memory()));
}

// Every lane of `mask` offers `value`; afterwards `taken(lane)` is what that lane offered.
template <class T>
void offer(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  self->offer = 0;
  std::memcpy(&self->offer, &value, sizeof(T));
  wait(Wait::warp, mask);
}
template <class T>
T taken(unsigned lane) {
  T value;
  std::memcpy(&value, &self->inbox[lane], sizeof(T));
  return value;
}
template <class T>
T exchange(unsigned mask, T value, unsigned source) {
  offer(mask, value);
  return source < kWarp && (mask >> source & 1) ? taken<T>(source) : value;
}
template <class T, class Join>
T reduce(unsigned mask, T value, Join join) {
  offer(mask, value);
  bool first = true;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) value = first ? (first = false, taken<T>(lane)) : join(value, taken<T>(lane));
  return value;
}

inline void finish_copies(unsigned groups_left) {
  auto& groups = self->copies;  // the last one is open
  while (groups.size() > groups_left + 1) {
    for (Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin());
  }
}

inline void trampoline() {
  try {
    cluster->body();
  } catch (const std::exception& e) {
    cluster->failure = e.what();
  }
  self->waits = Wait::done;
  swapcontext(&self->context, &cluster->scheduler);
}

// Lets go of every group whose live threads have all arrived at the same barrier. False where nobody could go on.
inline bool release(Cluster& c) {
  bool any = false;
  auto arrived = [&](unsigned first, unsigned count, Wait kind, unsigned mask) {
    bool waiting = false;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& f = c.fibers[first + i];
      if (!(mask >> (i % kWarp) & 1) || f.waits == Wait::done) continue;
      if (f.waits != kind) return false;
      waiting = true;
    }
    return waiting;
  };
  auto free = [&](unsigned first, unsigned count, unsigned mask) {
    for (unsigned i = 0; i < count; ++i)
      if ((mask >> (i % kWarp) & 1) && c.fibers[first + i].waits != Wait::done) c.fibers[first + i].waits = Wait::none;
    any = true;
  };
  for (unsigned i = 0; i < c.fibers.size(); ++i) {
    Fiber& f = c.fibers[i];
    if (f.waits != Wait::warp) continue;
    unsigned warp = i - f.linear % kWarp, lanes = std::min(kWarp, c.threads - (f.linear - f.linear % kWarp)),
             mask = f.mask;
    if (!arrived(warp, lanes, Wait::warp, mask)) continue;
    for (unsigned to = 0; to < lanes; ++to)
      for (unsigned from = 0; from < lanes; ++from)
        if (mask >> to & mask >> from & 1) c.fibers[warp + to].inbox[from] = c.fibers[warp + from].offer;
    free(warp, lanes, mask);
  }
  for (unsigned b = 0; b < c.blocks; ++b)
    if (arrived(b * c.threads, c.threads, Wait::block, ~0u)) free(b * c.threads, c.threads, ~0u);
  unsigned phase = ~0u;  // how often every live thread has arrived at the cluster barrier
  for (Fiber& f : c.fibers)
    if (f.waits != Wait::done) phase = std::min(phase, f.arrived);
  for (Fiber& f : c.fibers)
    if (f.waits == Wait::cluster && phase > f.passed) ++f.passed, f.waits = Wait::none, any = true;
  return any;
}

inline void run(Cluster& c, Order order, uint64_t seed) {
  std::vector<unsigned> turn(c.fibers.size());
  for (unsigned i = 0; i < turn.size(); ++i) turn[i] = i;
  if (order == Order::descending) std::reverse(turn.begin(), turn.end());
  std::mt19937_64 random(seed);
  cluster = &c;
  for (;;) {
    if (order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), random);
    for (unsigned i : turn) {
      if (c.fibers[i].waits != Wait::none) continue;
      self = &c.fibers[i];
      swapcontext(&c.scheduler, &self->context);
    }
    if (!c.failure.empty()) throw std::runtime_error(c.failure);
    if (std::all_of(c.fibers.begin(), c.fibers.end(), [](const Fiber& f) { return f.waits == Wait::done; })) break;
    if (!release(c)) throw std::runtime_error("deadlock: the threads of a block wait at different barriers");
  }
  cluster = nullptr;
}

// Launches `body` (a call of the kernel) over the grid; `blocks_per_cluster` consecutive x-blocks make a cluster.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned blocks_per_cluster, std::function<void()> body,
                   Order order = Order::ascending, uint64_t seed = 0) {
  if (grid.x % blocks_per_cluster) throw std::invalid_argument("grid.x must be a multiple of the cluster size");
  constexpr size_t kStack = 64 << 10;
  Cluster c;
  c.grid = grid, c.block = block, c.body = std::move(body);
  c.threads = block.x * block.y * block.z, c.blocks = blocks_per_cluster;
  c.fibers.resize(size_t(c.threads) * c.blocks);
  for (auto& f : c.fibers) f.stack.reset(new char[kStack]);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += c.blocks) {
        c.shared.assign(c.blocks,
                        std::vector<char>(shared_bytes, char(0xcd)));  // poison: shared memory starts undefined
        for (unsigned i = 0; i < c.fibers.size(); ++i) {
          Fiber& f = c.fibers[i];
          f.linear = i % c.threads, f.rank_in_cluster = i / c.threads, f.waits = Wait::none, f.arrived = f.passed = 0,
          f.copies.assign(1, {});
          f.thread = {f.linear % block.x, f.linear / block.x % block.y, f.linear / (block.x * block.y)};
          f.block = {x + f.rank_in_cluster, y, z};
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.get();
          f.context.uc_stack.ss_size = kStack;
          f.context.uc_link = nullptr;
          makecontext(&f.context, trampoline, 0);
        }
        run(c, order, seed + x + 7919ull * (y + 7919ull * z));
      }
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::self->thread)
#define blockIdx (cuda_on_host::self->block)
#define blockDim (cuda_on_host::cluster->block)
#define gridDim (cuda_on_host::cluster->grid)
#define warpSize 32

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Wait::block); }
inline int __syncthreads_and(int p) {
  using namespace cuda_on_host;
  self->offer = p != 0;
  wait(Wait::block);
  bool all = true;
  const Fiber* first = self - self->linear;
  for (unsigned i = 0; i < cluster->threads; ++i) all &= first[i].waits == Wait::done || first[i].offer != 0;
  wait(Wait::block);  // nobody offers anything else before all have looked
  return all;
}
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_host::wait(cuda_on_host::Wait::warp, mask); }
inline unsigned __lane() { return cuda_on_host::self->linear % 32; }
template <class T>
T __shfl_sync(unsigned m, T v, int lane, int w = 32) {
  return cuda_on_host::exchange(m, v, (__lane() & ~(w - 1)) + (lane & (w - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int = 32) {
  return cuda_on_host::exchange(m, v, __lane() ^ x);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  return cuda_on_host::exchange(m, v, __lane() % w + d < unsigned(w) ? __lane() + d : __lane());
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  return cuda_on_host::exchange(m, v, __lane() % w >= d ? __lane() - d : __lane());
}
inline unsigned __ballot_sync(unsigned m, int p) {
  return cuda_on_host::reduce(m, unsigned(p != 0) << __lane(), [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }
template <class T>
unsigned __match_any_sync(unsigned m, T v) {
  cuda_on_host::offer(m, v);
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    same |= unsigned((m >> lane & 1) && cuda_on_host::taken<T>(lane) == v) << lane;
  return same;
}
template <class T>
T __reduce_add_sync(unsigned m, T v) {
  return cuda_on_host::reduce(m, v, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned m, T v) {
  return cuda_on_host::reduce(m, v, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned m, T v) {
  return cuda_on_host::reduce(m, v, [](T a, T b) { return std::min(a, b); });
}

inline unsigned __clusterRelativeBlockRank() { return cuda_on_host::self->rank_in_cluster; }
inline unsigned __clusterSizeInBlocks() { return cuda_on_host::cluster->blocks; }
inline void __cluster_barrier_arrive() {
  if (cuda_on_host::self->arrived++ != cuda_on_host::self->passed)
    throw std::runtime_error("a thread arrived twice at a cluster barrier without waiting");
}
inline void __cluster_barrier_wait() {
  if (cuda_on_host::self->arrived == cuda_on_host::self->passed)
    throw std::runtime_error("a thread waits at a cluster barrier where it has not arrived");
  cuda_on_host::wait(cuda_on_host::Wait::cluster);
}
inline void* __cluster_map_shared_rank(const void* p, unsigned rank) { return cuda_on_host::map_shared(p, rank); }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  std::memset(to, 0xcd, bytes);  // what a kernel reads that does not wait
  cuda_on_host::self->copies.back().push_back({to, from, bytes - zeros});
  if (zeros) std::memset(static_cast<char*>(to) + bytes - zeros, 0, zeros);
}
inline void __pipeline_commit() { cuda_on_host::self->copies.emplace_back(); }
inline void __pipeline_wait_prior(unsigned groups) { cuda_on_host::finish_copies(groups); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicSub(T* p, T v) {
  T old = *p;
  *p = old - v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  T old = *p;
  *p = std::min(old, v);
  return old;
}
template <class T>
T atomicAnd(T* p, T v) {
  T old = *p;
  *p = old & v;
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  T old = *p;
  *p = old | v;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  T old = *p;
  if (old == expected) *p = v;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class To, class From>
To __bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) { return __bits<unsigned>(x); }
inline int __float_as_int(float x) { return __bits<int>(x); }
inline float __uint_as_float(unsigned x) { return __bits<float>(x); }
inline float __int_as_float(int x) { return __bits<float>(x); }
