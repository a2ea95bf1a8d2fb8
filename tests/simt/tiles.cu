// The tiles of core/fma_tile.cuh, both orders of both operands, in one block.
#include "core/fma_tile.cuh"
#include "selftest.cuh"

namespace selftest {
namespace {

using namespace pvk;

constexpr int kRows = 64, kColumns = 32, kDepth = 16;

// C [64, 32] = A [64, K] B [K, 32], all row major, K a multiple of 16. One block owns C.
template <typename T, bool A_BY_K, bool B_BY_K>
__global__ void fma_tile_kernel(const T* a, const T* b, T* c, int K) {
  using Tile = FmaTile<T, kRows, kColumns, kDepth, A_BY_K, B_BY_K, 8, 4>;
  struct alignas(16) Tiles {
    T a[Tile::A::kElements], b[Tile::B::kElements];
  };
  SIMT_SHARED(Tiles, tiles);
  const int thread = threadIdx.x;
  Tile tile;
  tile.clear();
  for (int k0 = 0; k0 < K; k0 += kDepth) {
    for (int i = thread; i < kRows * kDepth; i += Tile::kThreads)
      tiles.a[Tile::A::at(i / kDepth, i % kDepth)] = a[i / kDepth * K + k0 + i % kDepth];
    for (int i = thread; i < kColumns * kDepth; i += Tile::kThreads)
      tiles.b[Tile::B::at(i % kColumns, i / kColumns)] = b[(k0 + i / kColumns) * kColumns + i % kColumns];
    __syncthreads();
    tile.multiply(tiles.a, tiles.b, thread);
    __syncthreads();
  }
  tile.for_each(thread, [&](int row, int column, const T(&values)[Tile::kRun]) {
    for (int e = 0; e < Tile::kRun; ++e) c[row * kColumns + column + e] = values[e];
  });
}

template <typename T, bool A_BY_K, bool B_BY_K>
void multiply(const void* a, const void* b, void* c, int K) {
  const DeviceArray<T> device_a(a, size_t(kRows) * K), device_b(b, size_t(kColumns) * K);
  const DeviceArray<T> device_c(size_t(kRows) * kColumns);
  launch(fma_tile_kernel<T, A_BY_K, B_BY_K>, {dim3(1), dim3(kRows * kColumns / 32)}, device_a.data(), device_b.data(),
         device_c.data(), K);
  device_c.copy_to(c);
}

template <typename T>
void multiply(const void* a, const void* b, void* c, int K, bool a_by_k, bool b_by_k) {
  if (a_by_k && b_by_k) return multiply<T, true, true>(a, b, c, K);
  if (a_by_k) return multiply<T, true, false>(a, b, c, K);
  if (b_by_k) return multiply<T, false, true>(a, b, c, K);
  return multiply<T, false, false>(a, b, c, K);
}

}  // namespace

SELFTEST right_fma_tile(const void* a, const void* b, void* c, int K, int a_by_k, int b_by_k, int wide) {
  return catch_error([&] {
    return wide != 0 ? multiply<double>(a, b, c, K, a_by_k != 0, b_by_k != 0)
                     : multiply<float>(a, b, c, K, a_by_k != 0, b_by_k != 0);
  });
}

}  // namespace selftest
