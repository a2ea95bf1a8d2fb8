// A block's tile of C += A B by fused multiply-adds: A [M, K] and B [K, N] are read from shared memory, C stays in
// registers. For float32, each product exact and each sum rounded once, and for double. A float32 sum adds up those of
// each DEPTH along k, in their order; a double one runs along k.
//
// An operand lies in shared memory either by k (each row of A, or column of B, is contiguous along k), or not (each k
// has all rows of A, or columns of B, in a row). Vectors of 16 bytes along the contiguous dimension stay together.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"

namespace pvk {

// Where A's element (i, k) is, or B's (k, i): SIZE rows or columns, DEPTH along k. Padding by one vector spreads rows
// of k over the banks.
template <typename T, int SIZE, int DEPTH, bool BY_K>
struct FmaOperand {
  static constexpr bool kByK = BY_K;
  static constexpr int kPitch = BY_K ? DEPTH + kVec16<T> : SIZE;
  static constexpr int kElements = kPitch * (BY_K ? SIZE : DEPTH);
  static_assert(SIZE % kVec16<T> == 0 && DEPTH % kVec16<T> == 0);

  PVK_DEVICE static constexpr int at(int i, int k) { return BY_K ? i * kPitch + k : k * kPitch + i; }
};

// THREADS threads own C [M, N], each TM x TN elements of it. All of a block's threads, or THREADS neighbours, call it
// with their number.
template <typename T, int M, int N, int DEPTH, bool A_BY_K, bool B_BY_K, int TM, int TN>
struct FmaTile {
  using Element = T;  // in shared memory
  using Sum = T;
  using A = FmaOperand<T, M, DEPTH, A_BY_K>;
  using B = FmaOperand<T, N, DEPTH, B_BY_K>;
  static constexpr int kDepth = DEPTH;
  static constexpr int kRowThreads = M / TM, kColumnThreads = N / TN;
  static constexpr int kThreads = kRowThreads * kColumnThreads;
  static constexpr int kVec = kVec16<T>;
  static constexpr int kRun = B_BY_K ? 1 : kVec;  // neighbouring columns that a thread owns
  static_assert(M % TM == 0 && N % TN == 0 && kThreads % kWarpSize == 0);
  static_assert((A_BY_K || TM % kVec == 0) && (B_BY_K || TN % kVec == 0));

  T sums[TM][TN];

  PVK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < TM; ++i) {
#pragma unroll
      for (int j = 0; j < TN; ++j) sums[i][j] = T(0);
    }
  }

  // C += A B over the DEPTH of both.
  PVK_DEVICE void multiply(const T* a, const T* b, int thread) {
    if constexpr (sizeof(T) == 4) {  // a sum of DEPTH products is exact to fewer roundings than one of all of k
      T part[TM][TN] = {};
      add_product(part, a, b, thread);
#pragma unroll
      for (int i = 0; i < TM; ++i) {
#pragma unroll
        for (int j = 0; j < TN; ++j) sums[i][j] += part[i][j];
      }
    } else {
      add_product(sums, a, b, thread);
    }
  }

  // f(row, column, values): kRun sums, of (row, column) and the columns after it.
  template <typename F>
  PVK_DEVICE void for_each(int thread, const F& f) const {
    const int row = thread / kColumnThreads, column = thread % kColumnThreads;
#pragma unroll
    for (int i = 0; i < TM; ++i) {
#pragma unroll
      for (int j = 0; j < TN; j += kRun) {
        T values[kRun];
#pragma unroll
        for (int e = 0; e < kRun; ++e) values[e] = sums[i][j + e];
        f(place<A, kRowThreads>(row, i), place<B, kColumnThreads>(column, j), values);
      }
    }
  }

 private:
  PVK_DEVICE static void add_product(T (&to)[TM][TN], const T* a, const T* b, int thread) {
    constexpr int kStep = A_BY_K || B_BY_K ? kVec : 1;
    const int row = thread / kColumnThreads, column = thread % kColumnThreads;
#pragma unroll(DEPTH / kStep > 8 ? 2 : DEPTH / kStep)
    for (int k = 0; k < DEPTH; k += kStep) {
      T x[kStep][TM];
      load<A, TM, kRowThreads>(x, a, row, k);
      if constexpr (B_BY_K) {  // a column at a time: fewer registers
#pragma unroll
        for (int j = 0; j < TN; ++j) {
          const auto y = vector_at(b + B::at(column + j * kColumnThreads, k));
#pragma unroll
          for (int s = 0; s < kStep; ++s) {
#pragma unroll
            for (int i = 0; i < TM; ++i) to[i][j] = fma(x[s][i], y.data[s], to[i][j]);
          }
        }
      } else {
#pragma unroll
        for (int s = 0; s < kStep; ++s) {
          T y[1][TN];
          load<B, TN, kColumnThreads>(y, b, column, k + s);
#pragma unroll
          for (int i = 0; i < TM; ++i) {
#pragma unroll
            for (int j = 0; j < TN; ++j) to[i][j] = fma(x[s][i], y[0][j], to[i][j]);
          }
        }
      }
    }
  }

  PVK_DEVICE static VecN<T, kVec> vector_at(const T* shared) { return *reinterpret_cast<const VecN<T, kVec>*>(shared); }

  // The row (or column) of the thread's i-th element: by k, lanes take neighbouring rows, which lie in different banks;
  // else each takes whole vectors.
  template <typename Operand, int OWNERS>
  PVK_DEVICE static int place(int owner, int i) {
    if constexpr (Operand::kByK) return owner + i * OWNERS;
    return i / kVec * OWNERS * kVec + owner * kVec + i % kVec;
  }

  template <typename Operand, int COUNT, int OWNERS, int STEPS>
  PVK_DEVICE static void load(T (&out)[STEPS][COUNT], const T* shared, int owner, int k) {
    if constexpr (Operand::kByK) {
      static_assert(STEPS == kVec);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const auto vec = vector_at(shared + Operand::at(place<Operand, OWNERS>(owner, i), k));
#pragma unroll
        for (int s = 0; s < STEPS; ++s) out[s][i] = vec.data[s];
      }
    } else {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int i = 0; i < COUNT; i += kVec) {
          const auto vec = vector_at(shared + Operand::at(place<Operand, OWNERS>(owner, i), k + s));
#pragma unroll
          for (int e = 0; e < kVec; ++e) out[s][i + e] = vec.data[e];
        }
      }
    }
  }
};

}  // namespace pvk
