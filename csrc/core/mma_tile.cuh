// A block's tile C [M, N] += A [M, K] B [K, N] on tensor cores, from operands in shared memory. 16-bit types multiply
// by mma.m16n8k16, float as tf32 by m16n8k8 (rounded to nearest as it is read); sums are float32 in registers.
//
// An operand lies in shared memory as OperandTile says, a step of 64 bytes along K at a time. Its 16-byte vectors are
// swizzled so that neither the reads of fragments nor whole-vector writes of neighbouring rows meet in a bank. The
// interface is FmaTile's (core/fma_tile.cuh).
#pragma once

#include "core/math.h"
#include "core/mma.cuh"

namespace pvk {

// Which index of an operand is dense in memory: K, or M (of A) or N (of B).
enum class Major { kK, kMN };

// A step of an operand: `kRows` rows (of A) or columns (of B) by kDepth of K. Elements of at least 4 bytes may also be
// read by plain code, through at().
template <typename scalar_t, Major kMajor, int kRowCount>
struct OperandTile {
  static constexpr Major kMajorOf = kMajor;
  static constexpr int kRows = kRowCount;
  static constexpr int kDepth = 64 / int(sizeof(scalar_t));
  static constexpr int kVec = 16 / int(sizeof(scalar_t));  // elements of a vector
  static constexpr int kElements = kRows * kDepth;
  static_assert(kMajor == Major::kK || kRows * sizeof(scalar_t) % 128 == 0);

  // Where element (row, k) is. Those of a vector follow each other: from a multiple of kVec along the dense index.
  static PVK_DEVICE int at(int row, int k) {
    if constexpr (kMajor == Major::kK) {
      return row * kDepth + ((k / kVec) ^ (row / 2 % 4)) * kVec + k % kVec;
    } else {  // fragments take 8 rows of K by 16 bytes of 16-bit types, 4 by 32 bytes of float
      const int turn = sizeof(scalar_t) == 2 ? k % 8 : k % 4 * 2;
      return k * kRows + ((row / kVec) ^ turn) * kVec + row % kVec;
    }
  }
};

// A warp owns WARP_M x WARP_N of the block's BLOCK_M x BLOCK_N. All of a block's threads call it with their number.
template <typename scalar_t, int BLOCK_M, int BLOCK_N, int WARP_M, int WARP_N, Major kMajorA, Major kMajorB>
class MmaTile {
 public:
  using Element = scalar_t;
  using Sum = float;
  using A = OperandTile<scalar_t, kMajorA, BLOCK_M>;
  using B = OperandTile<scalar_t, kMajorB, BLOCK_N>;
  static constexpr int kDepth = A::kDepth;
  static constexpr int kRun = 2;  // neighbouring columns that a thread owns
  static constexpr int kThreads = BLOCK_M / WARP_M * (BLOCK_N / WARP_N) * kWarpSize;
  static_assert(BLOCK_M % WARP_M == 0 && BLOCK_N % WARP_N == 0 && WARP_M % 16 == 0 && WARP_N % 16 == 0);

  PVK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) sums_[i][j] = {};
    }
  }

  // Adds the product of a step: a of A::kElements, b of B::kElements, aligned to 16 bytes.
  PVK_DEVICE void multiply(const scalar_t* a, const scalar_t* b, int thread) {
    constexpr int kStep = 2 * A::kVec;
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      MmaA rows[kTilesM];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) load_a(rows[i], a, first_row(thread) + 16 * i, k, thread % kWarpSize);
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        MmaB columns[2];
        load_b(columns, b, first_column(thread) + 8 * j, k, thread % kWarpSize);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if constexpr (std::is_same_v<scalar_t, float>) {
              mma_m16n8k8(sums_[i][j + e], rows[i], columns[e]);
            } else {
              mma_m16n8k16<scalar_t>(sums_[i][j + e], rows[i], columns[e]);
            }
          }
        }
      }
    }
  }

  // f(row, column, values): kRun sums, of (row, column) and the column after it.
  template <typename F>
  PVK_DEVICE void for_each(int thread, const F& f) const {
    const int lane = thread % kWarpSize;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float values[kRun] = {sums_[i][j].values[2 * half], sums_[i][j].values[2 * half + 1]};
          f(first_row(thread) + 16 * i + 8 * half + lane / 4, first_column(thread) + 8 * j + lane % 4 * 2, values);
        }
      }
    }
  }

 private:
  static constexpr int kTilesM = WARP_M / 16, kTilesN = WARP_N / 8, kWarpsN = BLOCK_N / WARP_N;

  static PVK_DEVICE int first_row(int thread) { return thread / kWarpSize / kWarpsN * WARP_M; }
  static PVK_DEVICE int first_column(int thread) { return thread / kWarpSize % kWarpsN * WARP_N; }

  // Rows [row, row + 16).
  static PVK_DEVICE void load_a(MmaA& out, const scalar_t* a, int row, int k, int lane) {
    if constexpr (kMajorA == Major::kK) {
      ldmatrix(out.regs, a + A::at(row + lane % 16, k + lane / 16 * A::kVec));
      round(out.regs);
    } else if constexpr (std::is_same_v<scalar_t, float>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out.regs[i] = to_tf32(a[A::at(row + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4)]);
    } else {
      ldmatrix_transposed(out.regs, a + A::at(row + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8));
    }
  }

  // Columns [column, column + 16), as two fragments.
  static PVK_DEVICE void load_b(MmaB (&out)[2], const scalar_t* b, int column, int k, int lane) {
    uint32_t regs[4];
    if constexpr (kMajorB == Major::kK) {
      ldmatrix(regs, b + B::at(column + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * B::kVec));
      round(regs);
    } else if constexpr (std::is_same_v<scalar_t, float>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) regs[i] = to_tf32(b[B::at(column + lane / 4 + i / 2 * 8, k + lane % 4 + i % 2 * 4)]);
    } else {
      ldmatrix_transposed(regs, b + B::at(column + lane / 16 * 8, k + lane / 8 % 2 * 8 + lane % 8));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i / 2].regs[i % 2] = regs[i];
  }

  static PVK_DEVICE void round(uint32_t (&regs)[4]) {
    if constexpr (std::is_same_v<scalar_t, float>) {
#pragma unroll
      for (uint32_t& reg : regs) reg = to_tf32(__uint_as_float(reg));
    }
  }

  MmaC sums_[kTilesM][kTilesN];
};

}  // namespace pvk
