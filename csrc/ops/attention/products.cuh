// What a warp multiplies: scores of its rows A by the columns B, A Bᵀ, and sums W B of B's rows by weights W that lie
// in registers as scores do. 16-bit types go to tensor cores, others to fused multiply-adds. A and B lie in shared
// memory, rows of kFeatures and a padding of 16 bytes: the vectors of 8 rows that follow each other lie in different
// banks.
#pragma once

#include "core/math.h"
#include "core/mma.cuh"

namespace pvk::attention {

template <typename scalar_t>
constexpr bool kIsHalf = sizeof(scalar_t) == 2;
template <typename scalar_t>
constexpr int kLaneRows = sizeof(scalar_t) == 8 ? 1 : 2;
template <typename scalar_t>
constexpr int kWarpRows = 8 * kLaneRows<scalar_t>;

// A warp's tile: a quad of lanes shares lane / 4 + 8 r, and each of the four has runs of RUN neighbouring columns.
template <typename scalar_t, int COLUMNS, int RUN>
struct Fragment {
  using T = opmath_t<scalar_t>;
  static constexpr int kRows = kLaneRows<scalar_t>, kColumns = COLUMNS, kCount = COLUMNS / 4, kRun = RUN;
  static_assert(kCount % RUN == 0 && (RUN == 2 || !kIsHalf<scalar_t>));

  std::conditional_t<kIsHalf<scalar_t>, MmaC[ceil_div(COLUMNS, 8)], T[kRows][kCount]> parts;

  PVK_DEVICE T& at(int r, int c) {
    if constexpr (kIsHalf<scalar_t>) {
      return parts[c / 2].values[2 * r + c % 2];
    } else {
      return parts[r][c];
    }
  }
  static PVK_DEVICE int row(int lane, int r) { return lane / 4 + 8 * r; }
  static PVK_DEVICE int column(int lane, int c) { return c / RUN * 4 * RUN + lane % 4 * RUN + c % RUN; }

  // f(r, c, value) of all.
  template <typename F>
  PVK_DEVICE void for_each(const F& f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) f(r, c, at(r, c));
    }
  }
  PVK_DEVICE void clear() {
    for_each([](int, int, T& value) { value = T(0); });
  }
};

template <typename scalar_t, int COLUMNS>
using Scores = Fragment<scalar_t, COLUMNS, kIsHalf<scalar_t> ? 2 : 1>;
template <typename scalar_t, int FEATURES>
using Sums = Fragment<scalar_t, FEATURES, kIsHalf<scalar_t> ? 2 : kVec16<scalar_t>>;

template <typename scalar_t, int FEATURES>
constexpr int kPitch = FEATURES + kVec16<scalar_t>;
template <typename scalar_t, int COLUMNS>
constexpr int kWeightPitch = COLUMNS + kVec16<scalar_t>;

template <typename scalar_t>
PVK_DEVICE VecN<scalar_t, kVec16<scalar_t>> vector_at(const scalar_t* shared) {
  return *reinterpret_cast<const VecN<scalar_t, kVec16<scalar_t>>*>(shared);
}

template <typename scalar_t>
PVK_DEVICE uint32_t pair_of(float low, float high) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    __builtin_memcpy(&bits, &pair, sizeof(bits));
    return bits;
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    __builtin_memcpy(&bits, &pair, sizeof(bits));
    return bits;
  }
}

// to = A Bᵀ, of the warp's rows a and of COLUMNS rows b. Wide types sum even and odd features apart: half the
// roundings.
template <int FEATURES, typename scalar_t, int COLUMNS, int RUN>
PVK_DEVICE void multiply_rows(Fragment<scalar_t, COLUMNS, RUN>& to, const scalar_t* a, const scalar_t* b, int lane) {
  constexpr int P = kPitch<scalar_t, FEATURES>;
  to.clear();
  if constexpr (kIsHalf<scalar_t>) {
    const scalar_t* const a_row = a + lane % 16 * P + lane / 16 * 8;
    const scalar_t* const b_row = b + (lane / 16 * 8 + lane % 8) * P + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < FEATURES; k += 16) {
      MmaA rows;
      ldmatrix(rows.regs, a_row + k);
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 16) {
        uint32_t regs[4];
        ldmatrix(regs, b_row + j * P + k);
        mma_m16n8k16<scalar_t>(to.parts[j / 8], rows, {regs[0], regs[1]});
        mma_m16n8k16<scalar_t>(to.parts[j / 8 + 1], rows, {regs[2], regs[3]});
      }
    }
  } else {
    constexpr int V = kVec16<scalar_t>, R = kLaneRows<scalar_t>;
    Fragment<scalar_t, COLUMNS, RUN> odd;
    odd.clear();
#pragma unroll 2
    for (int k = 0; k < FEATURES; k += V) {
      VecN<scalar_t, V> x[R];
#pragma unroll
      for (int r = 0; r < R; ++r) x[r] = vector_at(a + to.row(lane, r) * P + k);
#pragma unroll
      for (int c = 0; c < COLUMNS / 4; ++c) {
        const auto y = vector_at(b + to.column(lane, c) * P + k);
#pragma unroll
        for (int e = 0; e < V; e += 2) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            to.parts[r][c] = fma(x[r].data[e], y.data[e], to.parts[r][c]);
            odd.parts[r][c] = fma(x[r].data[e + 1], y.data[e + 1], odd.parts[r][c]);
          }
        }
      }
    }
    to.for_each([&](int r, int c, scalar_t& sum) { sum += odd.parts[r][c]; });
  }
}

// to += W B, of COLUMNS rows b. scratch: the warp's, of its rows by kWeightPitch, where it is not on tensor cores.
template <int FEATURES, typename scalar_t, int COLUMNS, int RUN>
PVK_DEVICE void add_weighted(Sums<scalar_t, FEATURES>& to, Fragment<scalar_t, COLUMNS, RUN>& weights, const scalar_t* b,
                             scalar_t* scratch, int lane) {
  constexpr int P = kPitch<scalar_t, FEATURES>;
  if constexpr (kIsHalf<scalar_t>) {
    const scalar_t* const b_row = b + (lane / 8 % 2 * 8 + lane % 8) * P + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < COLUMNS; k += 16) {
      MmaA rows;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const two = weights.parts[k / 8 + i / 2].values + i % 2 * 2;
        rows.regs[i] = pair_of<scalar_t>(two[0], two[1]);
      }
#pragma unroll
      for (int j = 0; j < FEATURES; j += 16) {
        uint32_t regs[4];
        ldmatrix_transposed(regs, b_row + k * P + j);
        mma_m16n8k16<scalar_t>(to.parts[j / 8], rows, {regs[0], regs[1]});
        mma_m16n8k16<scalar_t>(to.parts[j / 8 + 1], rows, {regs[2], regs[3]});
      }
    }
  } else {
    constexpr int V = kVec16<scalar_t>, R = kLaneRows<scalar_t>, W = kWeightPitch<scalar_t, COLUMNS>;
    sync_warp();
    weights.for_each(
        [&](int r, int c, scalar_t value) { scratch[weights.row(lane, r) * W + weights.column(lane, c)] = value; });
    sync_warp();
#pragma unroll 1
    for (int k = 0; k < COLUMNS; k += V) {
      VecN<scalar_t, V> x[R];
#pragma unroll
      for (int r = 0; r < R; ++r) x[r] = vector_at(scratch + to.row(lane, r) * W + k);
#pragma unroll
      for (int e = 0; e < V; ++e) {
#pragma unroll
        for (int c = 0; c < FEATURES / 4; c += V) {
          const auto y = vector_at(b + (k + e) * P + to.column(lane, c));
#pragma unroll
          for (int i = 0; i < V; ++i) {
#pragma unroll
            for (int r = 0; r < R; ++r) to.parts[r][c + i] = fma(x[r].data[e], y.data[i], to.parts[r][c + i]);
          }
        }
      }
    }
  }
}

}  // namespace pvk::attention
