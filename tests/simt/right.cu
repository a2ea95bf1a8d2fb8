// Kernels that are right: the emulator must run them without a complaint, under every schedule. The same file makes a
// library for a GPU: nvcc -std=c++20 -O3 --expt-relaxed-constexpr -arch=sm_90 -Icsrc -shared -Xcompiler -fPIC.
// Pointers are the host's.
#include "core/async.cuh"
#include "core/cluster.cuh"
#include "core/mma.cuh"
#include "selftest.cuh"

// Clusters are of sm_90; for older devices the kernels that need them are empty.
#if defined(PVK_SIMT) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS 1
#else
#define HAS_CLUSTERS 0
#endif

namespace selftest {
namespace {

using namespace pvk;

constexpr int kThreads = 128;

unsigned blocks_for(int64_t items, int64_t of_block) {
  return unsigned(ceil_div(items, of_block));
}

// ---- one block ----

// Inclusive prefix sums. A block owns a row of at most 1024 elements, a thread an element. Warps scan by shuffles;
// warp 0 scans the warps' totals in shared memory, with a warp barrier on either side of each step's write.
__global__ void scan_kernel(const float* in, float* out, int n) {
  SIMT_SHARED(float[kWarpSize], totals);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const int64_t row = int64_t(blockIdx.x) * n;
  const int column = threadIdx.x;
  float sum = column < n ? in[row + column] : 0.0f;
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const float before = shfl_up(sum, delta);
    if (lane >= delta) sum += before;
  }
  if (lane == kWarpSize - 1) totals[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    float total = lane < warps ? totals[lane] : 0.0f;
    for (int delta = 1; delta < kWarpSize; delta *= 2) {
      sync_warp();
      totals[lane] = total;
      sync_warp();
      if (lane >= delta) total += totals[lane - delta];
    }
    sync_warp();
    totals[lane] = total;
  }
  __syncthreads();
  if (warp > 0) sum += totals[warp - 1];
  if (column < n) out[row + column] = sum;
}

// Sums of the block's elements, to out[block]. A tree in shared memory.
__global__ void __launch_bounds__(kThreads) reduce_kernel(const float* in, float* out, int n) {
  SIMT_SHARED(float[kThreads], partial);
  float sum = 0.0f;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) sum += in[i];
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}

// A block (32, 8) owns a tile [32, 32]. The odd pitch spreads a column of the tile over all banks.
template <typename T>
__global__ void __launch_bounds__(256) transpose_kernel(const T* in, T* out, int rows, int columns) {
  SIMT_SHARED(T[32][33], tile);
  const int x0 = blockIdx.x * 32, y0 = blockIdx.y * 32;
  for (int y = threadIdx.y; y < 32; y += 8) {
    if (y0 + y < rows && x0 + int(threadIdx.x) < columns)
      tile[y][threadIdx.x] = in[int64_t(y0 + y) * columns + x0 + threadIdx.x];
  }
  __syncthreads();
  for (int y = threadIdx.y; y < 32; y += 8) {
    if (x0 + y < columns && y0 + int(threadIdx.x) < rows)
      out[int64_t(x0 + y) * rows + y0 + threadIdx.x] = tile[threadIdx.x][y];
  }
}

// Counts of values in [0, bins). Each block counts in shared memory of its own and adds that to the result.
__global__ void __launch_bounds__(kThreads) histogram_kernel(const int* in, unsigned* counts, int n, int bins) {
  SIMT_DYN_SHARED(unsigned, mine);
  for (int i = threadIdx.x; i < bins; i += kThreads) mine[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) atomicAdd(&mine[in[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += kThreads)
    if (mine[i] != 0) atomicAdd(&counts[i], mine[i]);
}

// Reverses the bytes of each of the block's words: bytes are written by four threads, words by one, and bytes read
// again.
__global__ void __launch_bounds__(kThreads) reverse_bytes_kernel(const unsigned char* in, unsigned char* out) {
  SIMT_SHARED(unsigned[kThreads / 4], words);
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(words);
  const int i = blockIdx.x * kThreads + threadIdx.x;
  bytes[threadIdx.x] = in[i];
  __syncthreads();
  if (threadIdx.x < kThreads / 4) {
    const unsigned word = words[threadIdx.x];
    words[threadIdx.x] = word >> 24 | (word >> 8 & 0xff00) | (word & 0xff00) << 8 | word << 24;
  }
  __syncthreads();
  out[i] = bytes[threadIdx.x];
}

// The halves of each warp go their own ways: the lower one sums its 16 values in shared memory, the upper one takes
// their maximum by shuffles and keeps it there.
__global__ void half_warps_kernel(const float* in, float* out) {
  SIMT_SHARED(float[kThreads], values);
  const int lane = threadIdx.x % kWarpSize, i = threadIdx.x;
  values[i] = in[i];
  if (lane < 16) {
    constexpr unsigned kLower = 0x0000ffffu;
    for (int half = 8; half > 0; half /= 2) {
      sync_warp(kLower);
      if (lane < half) values[i] += values[i + half];
    }
    sync_warp(kLower);
  } else {
    constexpr unsigned kUpper = 0xffff0000u;
    float most = values[i];
    for (int mask = 8; mask > 0; mask /= 2) most = max_of(most, __shfl_xor_sync(kUpper, most, mask, 16));
    sync_warp(kUpper);
    values[i] = most;
    sync_warp(kUpper);
  }
  out[i] = values[lane < 16 ? i - lane : i];
}

// Every warp starts with its own word; warp w waits until warp w - 1 has raised its flag, and adds its word to the sum.
__global__ void relay_kernel(const unsigned* in, unsigned* out) {
  SIMT_SHARED(unsigned[kWarpSize], flags);
  SIMT_SHARED(unsigned[kWarpSize], sums);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (threadIdx.x < kWarpSize) flags[threadIdx.x] = 0;
  __syncthreads();
  const unsigned mine = in[blockIdx.x * (blockDim.x / kWarpSize) + warp];
  if (lane == 0) {
    unsigned before = 0;
    if (warp > 0) {
      while (load_relaxed(&flags[warp - 1]) == 0) {}
      __threadfence_block();
      before = sums[warp - 1];
    }
    sums[warp] = before + mine;
    __threadfence_block();
    atomicExch(&flags[warp], 1u);
  }
  __syncthreads();
  if (lane == 0) out[blockIdx.x * (blockDim.x / kWarpSize) + warp] = sums[warp];
}

// ---- matrices ----

constexpr int kTileM = 64, kTileN = 64;  // of a block, whose four warps are 2 x 2
constexpr int kWarpM = 32, kWarpN = 32;
constexpr int kStages = 2;

// The tile of A has rows of 64 bytes, which the padding spreads over the banks.
template <typename scalar_t>
struct MatmulTiles {
  static constexpr int kDepth = 64 / int(sizeof(scalar_t));
  alignas(16) scalar_t a[kTileM][kDepth + 16 / sizeof(scalar_t)];
  alignas(16) scalar_t b[kDepth][kTileN + 8];
};

// Starts the copy of a tile, with zeros where it is outside of the matrix [rows, columns].
template <int BYTES, int COLUMNS, typename T, int ROWS, int PITCH>
PVK_DEVICE void load_tile(T (&tile)[ROWS][PITCH], const T* matrix, int64_t pitch, int row0, int column0, int rows,
                          int columns) {
  constexpr int kVec = BYTES / int(sizeof(T)), kVecs = COLUMNS / kVec;
  for (int i = threadIdx.x; i < ROWS * kVecs; i += kThreads) {
    const int y = i / kVecs, x = i % kVecs * kVec;
    const int left = row0 + y < rows ? max_of(0, min_of(kVec, columns - column0 - x)) : 0;
    const T* const from = left > 0 ? matrix + (row0 + y) * pitch + column0 + x : matrix;
    cp_async<BYTES>(&tile[y][x], from, unsigned(left * sizeof(T)));
  }
}

// The fragments of A rows [row, row + 16) and B columns [column, column + 8), from k on.
template <typename scalar_t>
PVK_DEVICE MmaA load_a(const MatmulTiles<scalar_t>& tiles, int row, int k) {
  const int lane = threadIdx.x % kWarpSize;
  MmaA a;
  ldmatrix(a.regs, &tiles.a[row + lane % 16][k + lane / 16 * int(16 / sizeof(scalar_t))]);
  if constexpr (std::is_same_v<scalar_t, float>)
    for (uint32_t& reg : a.regs) reg = to_tf32(__uint_as_float(reg));
  return a;
}

template <typename scalar_t>
PVK_DEVICE MmaB load_b(const MatmulTiles<scalar_t>& tiles, int k, int column) {
  const int lane = threadIdx.x % kWarpSize;
  MmaB b;
  if constexpr (std::is_same_v<scalar_t, float>) {
    for (int i = 0; i < 2; ++i) b.regs[i] = to_tf32(tiles.b[k + lane % 4 + 4 * i][column + lane / 4]);
  } else {
    ldmatrix_transposed(b.regs, &tiles.b[k + lane % 16][column]);
  }
  return b;
}

template <typename scalar_t>
PVK_DEVICE void multiply_add(MmaC& c, const MmaA& a, const MmaB& b SIMT_SITE) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    mma_m16n8k8(c, a, b SIMT_AT_SITE);
  } else {
    mma_m16n8k16<scalar_t>(c, a, b SIMT_AT_SITE);
  }
}

// C = A B, [M, K] by [K, N], all row major with pitches. A block owns a tile [64, 64] of C, a warp [32, 32], and walks
// along K; cp.async brings the next tiles of A and B while this one is multiplied. float is multiplied as tf32.
template <typename scalar_t, int BYTES>
__global__ void __launch_bounds__(kThreads) matmul_kernel(const scalar_t* a, const scalar_t* b, float* c, int M, int N,
                                                          int K, int64_t pitch_a, int64_t pitch_b) {
  using Tiles = MatmulTiles<scalar_t>;
  constexpr int kDepth = Tiles::kDepth, kStep = 32 / int(sizeof(scalar_t));
  SIMT_SHARED(Tiles[kStages], stages);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int row0 = blockIdx.y * kTileM, column0 = blockIdx.x * kTileN;
  const int warp_row = warp / 2 * kWarpM, warp_column = warp % 2 * kWarpN;
  const int steps = ceil_div(K, kDepth);

  const auto load_stage = [&](int step) {
    Tiles& tiles = stages[step % kStages];
    load_tile<BYTES, kDepth>(tiles.a, a, pitch_a, row0, step * kDepth, M, K);
    load_tile<BYTES, kTileN>(tiles.b, b, pitch_b, step * kDepth, column0, K, N);
    cp_async_commit();
  };

  MmaC sum[kWarpM / 16][kWarpN / 8] = {};
  load_stage(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load_stage(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const Tiles& tiles = stages[step % kStages];
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      MmaA row[kWarpM / 16];
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) row[i] = load_a(tiles, warp_row + i * 16, k);
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
        const MmaB column = load_b(tiles, k, warp_column + j * 8);
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) multiply_add<scalar_t>(sum[i][j], row[i], column);
      }
    }
    __syncthreads();  // the next step's copies overwrite this stage
  }

#pragma unroll
  for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + warp_row + i * 16 + lane / 4 + e / 2 * 8;
        const int column = column0 + warp_column + j * 8 + lane % 4 * 2 + e % 2;
        if (row < M && column < N) c[int64_t(row) * N + column] = sum[i][j].values[e];
      }
    }
  }
}

// One warp: C [16, 8] += A [16, K] B [K, 8], each fragment element by element as in the PTX ISA's formulas.
template <typename scalar_t>
__global__ void mma_tile_kernel(const scalar_t* a, const scalar_t* b, float* c) {
  constexpr int kElements = 16 / int(sizeof(scalar_t));  // of A a thread
  constexpr int K = 32 / int(sizeof(scalar_t));
  const int group = threadIdx.x >> 2, thread_in_group = threadIdx.x % 4;
  union {
    MmaA regs;
    scalar_t elements[kElements];
  } fragment_a = {};
  union {
    MmaB regs;
    scalar_t elements[kElements / 2];
  } fragment_b = {};
  MmaC fragment_c;
  for (int i = 0; i < kElements; ++i) {
    int row, column;
    if constexpr (sizeof(scalar_t) == 2) {
      row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      column = i < 4 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
    } else {
      row = i == 0 || i == 2 ? group : group + 8;
      column = i < 2 ? thread_in_group : thread_in_group + 4;
    }
    fragment_a.elements[i] = a[row * K + column];
  }
  for (int i = 0; i < kElements / 2; ++i) {
    int row;
    if constexpr (sizeof(scalar_t) == 2) {
      row = i < 2 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
    } else {
      row = i < 1 ? thread_in_group : thread_in_group + 4;
    }
    fragment_b.elements[i] = b[row * 8 + group];
  }
  const auto index_of_c = [&](int i) {
    const int row = i < 2 ? group : group + 8;
    return row * 8 + thread_in_group * 2 + (i & 1);
  };
  for (int i = 0; i < 4; ++i) fragment_c.values[i] = c[index_of_c(i)];
  multiply_add<scalar_t>(fragment_c, fragment_a.regs, fragment_b.regs);
  for (int i = 0; i < 4; ++i) c[index_of_c(i)] = fragment_c.values[i];
}

// One warp: regs [32, N] of the N matrices [8, 8] of 16 bits. Only the lanes that are asked give an address.
template <int N>
__global__ void ldmatrix_kernel(const uint16_t* matrices, uint32_t* regs, bool transposed) {
  SIMT_SHARED(uint4[8 * N], rows);
  const int lane = threadIdx.x;
  if (lane < 8 * N) {
    uint16_t row[8];
    for (int i = 0; i < 8; ++i) row[i] = matrices[lane * 8 + i];
    __builtin_memcpy(&rows[lane], row, sizeof(row));
  }
  sync_warp();
  uint32_t loaded[N];
  const uint4* const address = lane < 8 * N ? &rows[lane] : nullptr;
  if (transposed) {
    ldmatrix_transposed(loaded, address);
  } else {
    ldmatrix(loaded, address);
  }
  for (int i = 0; i < N; ++i) regs[lane * N + i] = loaded[i];
}

__global__ void to_tf32_kernel(const float* in, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = to_tf32(in[i]);
}

// ---- producers and consumers ----

constexpr int kTile = 128, kRing = 3;

// out[i] = in[i] + 2 in[i's mirror image in its tile of 128]. Warp 0 copies tiles to a ring, warps 1 to 4 consume them;
// an mbarrier tells that a slot is full (32 arrivals), another that it is free again (128: each warp arrives at once).
__global__ void __launch_bounds__(kWarpSize + kTile) pipeline_kernel(const float* in, float* out, int n) {
  SIMT_SHARED(float4[kRing][kTile / 4], ring);
  SIMT_SHARED(MBarrier[kRing], full);
  SIMT_SHARED(MBarrier[kRing], empty);
  const int lane = threadIdx.x % kWarpSize, tiles = ceil_div(n, kTile);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRing; ++i) {
      full[i].init(kWarpSize);
      empty[i].init(kTile);
    }
  }
  __syncthreads();

  int turn = 0;
  if (threadIdx.x < kWarpSize) {
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
      const int slot = turn % kRing, round = turn / kRing;
      if (round > 0) {
        while (!empty[slot].test_wait((round - 1) % 2)) {}
      }
      const int first = tile * kTile + lane * 4, left = max_of(0, min_of(4, n - first));
      cp_async<16>(&ring[slot][lane], in + (left > 0 ? first : 0), unsigned(left * sizeof(float)));
      cp_async_wait_all();
      full[slot].arrive();
    }
  } else {
    const int i = threadIdx.x - kWarpSize;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
      const int slot = turn % kRing, round = turn / kRing;
      full[slot].wait(round % 2);
      const float* const values = &ring[slot][0].x;
      const float result = values[i] + 2.0f * values[kTile - 1 - i];
      sync_warp();
      if (lane == 0) empty[slot].arrive(kWarpSize);
      if (tile * kTile + i < n) out[tile * kTile + i] = result;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRing; ++i) {
      full[i].invalidate();
      empty[i].invalidate();
    }
  }
}

// The same function by named barriers: 128 threads produce, 128 consume, through two slots.
__global__ void __launch_bounds__(2 * kTile) named_barrier_kernel(const float* in, float* out, int n) {
  constexpr unsigned kFull = 1, kEmpty = 3;
  SIMT_SHARED(float[2][kTile], slots);
  const int i = threadIdx.x % kTile, tiles = ceil_div(n, kTile);
  for (int tile = 0; tile < tiles; ++tile) {
    const int slot = tile % 2, index = tile * kTile + i;
    if (threadIdx.x < kTile) {
      if (tile >= 2) barrier_sync(kEmpty + slot, 2 * kTile);
      slots[slot][i] = index < n ? in[index] : 0.0f;
      barrier_arrive(kFull + slot, 2 * kTile);
    } else {
      barrier_sync(kFull + slot, 2 * kTile);
      if (index < n) out[index] = slots[slot][i] + 2.0f * slots[slot][kTile - 1 - i];
      if (tile + 2 < tiles) barrier_arrive(kEmpty + slot, 2 * kTile);
    }
  }
}

// ---- many blocks ----

// out = the sum of all. Every block leaves its sum in `partial`; the last one to have done so, by a counter, adds them.
__global__ void __launch_bounds__(kThreads)
    last_block_kernel(const float* in, float* partial, unsigned* done, float* out, int n) {
  SIMT_SHARED(float[kThreads / kWarpSize], sums);
  SIMT_SHARED(bool, is_last);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto sum_of_block = [&](float sum) {
    for (int delta = kWarpSize / 2; delta > 0; delta /= 2) sum += shfl_down(sum, delta);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < kThreads / kWarpSize; ++i) sum += sums[i];
    __syncthreads();
    return sum;
  };
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const float sum = sum_of_block(i < n ? in[i] : 0.0f);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicAdd(done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  float total = 0.0f;
  for (int b = threadIdx.x; b < int(gridDim.x); b += kThreads) total += partial[b];
  total = sum_of_block(total);
  if (threadIdx.x == 0) *out = total;
}

// Inclusive prefix sums of n. Blocks take their places by a counter; each waits for the flag of the one before it.
__global__ void __launch_bounds__(kWarpSize)
    look_back_kernel(const float* in, float* prefix, unsigned* flags, unsigned* places, float* out, int n) {
  const int lane = threadIdx.x;
  unsigned place = lane == 0 ? atomicAdd(places, 1u) : 0;
  place = shfl(place, 0);
  const int i = int(place) * kWarpSize + lane;
  float sum = i < n ? in[i] : 0.0f;
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const float before = shfl_up(sum, delta);
    if (lane >= delta) sum += before;
  }
  float before = 0.0f;
  if (lane == kWarpSize - 1) {
    if (place > 0) {
      while (load_relaxed(&flags[place - 1]) == 0) {}
      __threadfence();
      before = prefix[place - 1];
    }
    prefix[place] = before + sum;
    __threadfence();
    atomicExch(&flags[place], 1u);
  }
  before = shfl(before, kWarpSize - 1);
  if (i < n) out[i] = before + sum;
}

// Steps of the mean of a cell and its four neighbours, zeros outside; the result is in a or b by the parity of `steps`.
__global__ void __launch_bounds__(kThreads) stencil_kernel(float* a, float* b, int rows, int columns, int steps) {
  for (int step = 0; step < steps; ++step) {
    const float* const from = step % 2 ? b : a;
    float* const to = step % 2 ? a : b;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < rows * columns; i += gridDim.x * kThreads) {
      const int y = i / columns, x = i % columns;
      float sum = from[i];
      if (y > 0) sum += from[i - columns];
      if (y + 1 < rows) sum += from[i + columns];
      if (x > 0) sum += from[i - 1];
      if (x + 1 < columns) sum += from[i + 1];
      to[i] = 0.2f * sum;
    }
    grid_sync();
  }
}

// Sums of a row of n, a cluster each. Every block reduces its part in shared memory; block 0 reads all of theirs.
__global__ void __launch_bounds__(kThreads) cluster_reduce_kernel(const float* in, float* out, int n) {
#if HAS_CLUSTERS
  SIMT_SHARED(float[kThreads], partial);
  const int size = int(cluster_size()), rank = int(cluster_rank()), row = blockIdx.x / size;
  float sum = 0.0f;
  for (int i = rank * kThreads + threadIdx.x; i < n; i += size * kThreads) sum += in[int64_t(row) * n + i];
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  cluster_sync();
  if (rank == 0 && threadIdx.x < kWarpSize) {
    float total = int(threadIdx.x) < size ? *map_shared(&partial[0], threadIdx.x) : 0.0f;
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) total += shfl_xor(total, mask);
    if (threadIdx.x == 0) out[row] = total;
  }
  cluster_sync();  // block 0 has read
#endif
}

// The same sums. Every block writes its own into block 0's shared memory, and arrives at block 0's mbarrier.
__global__ void __launch_bounds__(kWarpSize) cluster_gather_kernel(const float* in, float* out, int n) {
#if HAS_CLUSTERS
  SIMT_SHARED(float[kWarpSize], sums);
  SIMT_SHARED(MBarrier, ready);
  const int size = int(cluster_size()), rank = int(cluster_rank()), row = blockIdx.x / size;
  if (rank == 0 && threadIdx.x == 0) {
    ready.init(unsigned(size));
    fence_mbarrier_init();
  }
  cluster_sync();
  float sum = 0.0f;
  for (int i = rank * kWarpSize + threadIdx.x; i < n; i += size * kWarpSize) sum += in[int64_t(row) * n + i];
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  if (threadIdx.x == 0) {
    *map_shared(&sums[rank], 0) = sum;
    arrive_cluster(map_shared(&ready, 0));
  }
  if (rank != 0) return;
  ready.wait_cluster(0);
  float total = int(threadIdx.x) < size ? sums[threadIdx.x] : 0.0f;
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) total += shfl_xor(total, mask);
  if (threadIdx.x == 0) out[row] = total;
#endif
}

// Counts of values in [0, 64 * size of the cluster), of which each block keeps 64, and adds to the others'.
__global__ void __launch_bounds__(kThreads) cluster_histogram_kernel(const int* in, unsigned* counts, int n) {
#if HAS_CLUSTERS
  constexpr int kBins = 64;
  SIMT_SHARED(unsigned[kBins], mine);
  if (threadIdx.x < kBins) mine[threadIdx.x] = 0;
  cluster_sync();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads)
    atomicAdd(map_shared(&mine[in[i] % kBins], unsigned(in[i] / kBins)), 1u);
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < kBins) counts[cluster_rank() * kBins + threadIdx.x] = mine[threadIdx.x];
#endif
}

__global__ void barriers_kernel(int barriers) {
  for (int i = 0; i < barriers; ++i) __syncthreads();
}

// ---- hosts ----

template <typename scalar_t, int BYTES>
void multiply(const void* a, const void* b, float* c, int M, int N, int K, int pitch_a, int pitch_b) {
  const DeviceArray<scalar_t> device_a(a, size_t(M) * pitch_a), device_b(b, size_t(K) * pitch_b);
  DeviceArray<float> device_c(size_t(M) * N);
  launch(matmul_kernel<scalar_t, BYTES>, {dim3(blocks_for(N, kTileN), blocks_for(M, kTileM)), dim3(kThreads)},
         device_a.data(), device_b.data(), device_c.data(), M, N, K, int64_t(pitch_a), int64_t(pitch_b));
  device_c.copy_to(c);
}

template <typename scalar_t>
void multiply_tile(const void* a, const void* b, float* c) {
  constexpr int K = 32 / int(sizeof(scalar_t));
  const DeviceArray<scalar_t> device_a(a, 16 * K), device_b(b, K * 8);
  DeviceArray<float> device_c(c, 16 * 8);
  launch(mma_tile_kernel<scalar_t>, {dim3(1), dim3(kWarpSize)}, device_a.data(), device_b.data(), device_c.data());
  device_c.copy_to(c);
}

template <typename T>
void transpose(const void* in, void* out, int rows, int columns) {
  const DeviceArray<T> device_in(in, size_t(rows) * columns), device_out(size_t(rows) * columns);
  launch(transpose_kernel<T>, {dim3(blocks_for(columns, 32), blocks_for(rows, 32)), dim3(32, 8)}, device_in.data(),
         device_out.data(), rows, columns);
  device_out.copy_to(out);
}

template <int N>
void load_matrices(const uint16_t* matrices, uint32_t* regs, bool transposed) {
  const DeviceArray<uint16_t> device_in(matrices, 64 * N);
  const DeviceArray<uint32_t> device_out(32 * N);
  launch(ldmatrix_kernel<N>, {dim3(1), dim3(kWarpSize)}, device_in.data(), device_out.data(), transposed);
  device_out.copy_to(regs);
}

template <typename Kernel>
void reduce_rows(Kernel kernel, const float* in, float* out, int rows, int n, int cluster, int threads) {
  const DeviceArray<float> device_in(in, size_t(rows) * n), device_out(rows);
  LaunchConfig config = {dim3(unsigned(rows * cluster)), dim3(unsigned(threads))};
  config.cluster = unsigned(cluster);
  launch(kernel, config, device_in.data(), device_out.data(), n);
  device_out.copy_to(out);
}

}  // namespace

SELFTEST right_scan(const float* in, float* out, int rows, int n) {
  return catch_error([&] {
    const DeviceArray<float> device_in(in, size_t(rows) * n), device_out(size_t(rows) * n);
    const unsigned threads = blocks_for(n, kWarpSize) * kWarpSize;
    launch(scan_kernel, {dim3(unsigned(rows)), dim3(threads)}, device_in.data(), device_out.data(), n);
    device_out.copy_to(out);
  });
}

SELFTEST right_reduce(const float* in, float* out, int n, int blocks) {
  return catch_error([&] {
    const DeviceArray<float> device_in(in, n), partial(blocks), device_out(1);
    launch(reduce_kernel, {dim3(unsigned(blocks)), dim3(kThreads)}, device_in.data(), partial.data(), n);
    launch(reduce_kernel, {dim3(1), dim3(kThreads)}, partial.data(), device_out.data(), blocks);
    device_out.copy_to(out);
  });
}

SELFTEST right_transpose(const void* in, void* out, int rows, int columns, int bytes) {
  return catch_error([&] {
    return bytes == 2 ? transpose<__half>(in, out, rows, columns) : transpose<float>(in, out, rows, columns);
  });
}

SELFTEST right_histogram(const int* in, unsigned* counts, int n, int bins, int blocks) {
  return catch_error([&] {
    const DeviceArray<int> device_in(in, n);
    DeviceArray<unsigned> device_counts(bins);
    device_counts.clear();
    launch(histogram_kernel, {dim3(unsigned(blocks)), dim3(kThreads), size_t(bins) * sizeof(unsigned)},
           device_in.data(), device_counts.data(), n, bins);
    device_counts.copy_to(counts);
  });
}

SELFTEST right_reverse_bytes(const unsigned char* in, unsigned char* out, int blocks) {
  return catch_error([&] {
    const size_t bytes = size_t(blocks) * kThreads;
    const DeviceArray<unsigned char> device_in(in, bytes), device_out(bytes);
    launch(reverse_bytes_kernel, {dim3(unsigned(blocks)), dim3(kThreads)}, device_in.data(), device_out.data());
    device_out.copy_to(out);
  });
}

SELFTEST right_half_warps(const float* in, float* out) {
  return catch_error([&] {
    const DeviceArray<float> device_in(in, kThreads), device_out(kThreads);
    launch(half_warps_kernel, {dim3(1), dim3(kThreads)}, device_in.data(), device_out.data());
    device_out.copy_to(out);
  });
}

SELFTEST right_relay(const unsigned* in, unsigned* out, int blocks, int warps) {
  return catch_error([&] {
    const DeviceArray<unsigned> device_in(in, size_t(blocks) * warps), device_out(size_t(blocks) * warps);
    launch(relay_kernel, {dim3(unsigned(blocks)), dim3(unsigned(warps) * kWarpSize)}, device_in.data(),
           device_out.data());
    device_out.copy_to(out);
  });
}

// dtype: 0 float as tf32, 1 half, 2 bfloat16. Pitches are in elements; those of 2 bytes each come in eights.
SELFTEST right_matmul(const void* a, const void* b, float* c, int M, int N, int K, int pitch_a, int pitch_b,
                      int dtype) {
  return catch_error([&] {
    if (dtype == 1) return multiply<__half, 16>(a, b, c, M, N, K, pitch_a, pitch_b);
    if (dtype == 2) return multiply<__nv_bfloat16, 16>(a, b, c, M, N, K, pitch_a, pitch_b);
    if (pitch_a % 4 == 0 && pitch_b % 4 == 0) return multiply<float, 16>(a, b, c, M, N, K, pitch_a, pitch_b);
    if (pitch_a % 2 == 0 && pitch_b % 2 == 0) return multiply<float, 8>(a, b, c, M, N, K, pitch_a, pitch_b);
    return multiply<float, 4>(a, b, c, M, N, K, pitch_a, pitch_b);
  });
}

SELFTEST right_mma_tile(const void* a, const void* b, float* c, int dtype) {
  return catch_error([&] {
    if (dtype == 1) return multiply_tile<__half>(a, b, c);
    if (dtype == 2) return multiply_tile<__nv_bfloat16>(a, b, c);
    return multiply_tile<float>(a, b, c);
  });
}

SELFTEST right_ldmatrix(const uint16_t* matrices, uint32_t* regs, int count, int transposed) {
  return catch_error([&] {
    if (count == 1) return load_matrices<1>(matrices, regs, transposed != 0);
    if (count == 2) return load_matrices<2>(matrices, regs, transposed != 0);
    return load_matrices<4>(matrices, regs, transposed != 0);
  });
}

SELFTEST right_to_tf32(const float* in, uint32_t* out, int n) {
  return catch_error([&] {
    const DeviceArray<float> device_in(in, n);
    const DeviceArray<uint32_t> device_out(n);
    launch(to_tf32_kernel, {dim3(blocks_for(n, 32)), dim3(32)}, device_in.data(), device_out.data(), n);
    device_out.copy_to(out);
  });
}

SELFTEST right_pipeline(const float* in, float* out, int n, int blocks) {
  return catch_error([&] {
    const DeviceArray<float> device_in(in, n), device_out(n);
    launch(pipeline_kernel, {dim3(unsigned(blocks)), dim3(kWarpSize + kTile)}, device_in.data(), device_out.data(), n);
    device_out.copy_to(out);
  });
}

SELFTEST right_named_barriers(const float* in, float* out, int n) {
  return catch_error([&] {
    const DeviceArray<float> device_in(in, n), device_out(n);
    launch(named_barrier_kernel, {dim3(1), dim3(2 * kTile)}, device_in.data(), device_out.data(), n);
    device_out.copy_to(out);
  });
}

SELFTEST right_last_block(const float* in, float* out, int n) {
  return catch_error([&] {
    const unsigned blocks = blocks_for(n, kThreads);
    const DeviceArray<float> device_in(in, n), partial(blocks), device_out(1);
    DeviceArray<unsigned> done(1);
    done.clear();
    launch(last_block_kernel, {dim3(blocks), dim3(kThreads)}, device_in.data(), partial.data(), done.data(),
           device_out.data(), n);
    device_out.copy_to(out);
  });
}

SELFTEST right_look_back(const float* in, float* out, int n, int cooperative) {
  return catch_error([&] {
    const unsigned blocks = blocks_for(n, kWarpSize);
    const DeviceArray<float> device_in(in, n), prefix(blocks), device_out(n);
    DeviceArray<unsigned> flags(blocks), places(1);
    flags.clear();
    places.clear();
    LaunchConfig config = {dim3(blocks), dim3(kWarpSize)};
    config.cooperative = cooperative != 0;
    launch(look_back_kernel, config, device_in.data(), prefix.data(), flags.data(), places.data(), device_out.data(),
           n);
    device_out.copy_to(out);
  });
}

SELFTEST right_stencil(const float* in, float* out, int rows, int columns, int steps, int blocks) {
  return catch_error([&] {
    const size_t count = size_t(rows) * columns;
    const DeviceArray<float> a(in, count), b(count);
    LaunchConfig config = {dim3(unsigned(blocks)), dim3(kThreads)};
    config.cooperative = true;
    launch(stencil_kernel, config, a.data(), b.data(), rows, columns, steps);
    (steps % 2 ? b : a).copy_to(out);
  });
}

SELFTEST right_cluster_reduce(const float* in, float* out, int rows, int n, int cluster) {
  return catch_error([&] { reduce_rows(cluster_reduce_kernel, in, out, rows, n, cluster, kThreads); });
}

SELFTEST right_cluster_gather(const float* in, float* out, int rows, int n, int cluster) {
  return catch_error([&] { reduce_rows(cluster_gather_kernel, in, out, rows, n, cluster, kWarpSize); });
}

SELFTEST right_cluster_histogram(const int* in, unsigned* counts, int n, int cluster) {
  return catch_error([&] {
    const DeviceArray<int> device_in(in, n);
    const DeviceArray<unsigned> device_counts(size_t(64) * cluster);
    LaunchConfig config = {dim3(unsigned(cluster)), dim3(kThreads)};
    config.cluster = unsigned(cluster);
    launch(cluster_histogram_kernel, config, device_in.data(), device_counts.data(), n);
    device_counts.copy_to(counts);
  });
}

// Nothing but barriers, to time them.
SELFTEST bench_barriers(int blocks, int threads, int barriers) {
  return catch_error([&] { launch(barriers_kernel, {dim3(unsigned(blocks)), dim3(unsigned(threads))}, barriers); });
}

}  // namespace selftest
