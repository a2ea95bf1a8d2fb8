// The products of a chain's layers: MT x NT tiles of 16 channels by 8 columns, whose sums one warp holds.
//
// With g = lane / 4 and t = lane % 4, a lane reads rows g and g + 8 of a packed weight, and column g of the map, both
// at factors 4 t to 4 t + 3 of a tile of k. So fragments of tensor cores come without ldmatrix: factor 4 t + i stands
// where mma.cuh has (2t, 2t + 1, 2t + 8, 2t + 9), in both operands. Sums leave in the layout of MmaC.
#pragma once

#include "core/mma.cuh"
#include "core/warp.cuh"

namespace pvk::graph {

// What a warp multiplies: tiles of k from `begin` to `end`.
template <typename scalar_t, int MT, int NT>
struct Factors {
  const scalar_t* weight[MT];  // the tile of m's tiles of k
  const scalar_t* map;
  const int* table;  // of the layer: from a column's first element to a group of factors; -1: none, which is zero
  int source[NT];    // first element of column g
  int begin, end;
};

template <typename T>
PVK_DEVICE T load_group(const void* map, size_t bytes, bool there) {
  return there ? *reinterpret_cast<const T*>(static_cast<const unsigned char*>(map) + bytes) : T{};
}

// scalar_t of 16 bits, on tensor cores.
template <typename scalar_t>
struct HalfProduct {
  template <int MT, int NT>
  PVK_DEVICE static void add(MmaC (&sums)[MT][NT], const Factors<scalar_t, MT, NT>& f, int lane) {
    const int* const table = f.table + lane % 4;
#pragma unroll 4
    for (int k = f.begin; k < f.end; ++k) {
      MmaA a[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(f.weight[m] + (int64_t(k) * kWarpSize + lane) * 8));
        a[m] = {{raw.x, raw.y, raw.z, raw.w}};
      }
      const int offset = table[k * 4];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint2 raw = load_group<uint2>(f.map, size_t(f.source[n] + offset) * sizeof(scalar_t), offset >= 0);
        const MmaB b = {{raw.x, raw.y}};
#pragma unroll
        for (int m = 0; m < MT; ++m) mma_m16n8k16<scalar_t>(sums[m][n], a[m], b);
      }
    }
  }
};

// Rows g and g + 8 of a tile in float32.
struct FloatRows {
  float4 rows[2];
  PVK_DEVICE FloatRows(const float* weight, int k, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rows[half] = __ldg(reinterpret_cast<const float4*>(weight + ((int64_t(k) * 2 + half) * kWarpSize + lane) * 4));
  }
};

// float32 rounded to tf32, on tensor cores.
struct Tf32Product {
  template <int MT, int NT>
  PVK_DEVICE static void add(MmaC (&sums)[MT][NT], const Factors<float, MT, NT>& f, int lane) {
    const int* const table = f.table + lane % 4;
#pragma unroll 2
    for (int k = f.begin; k < f.end; ++k) {
      MmaA a[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const FloatRows w(f.weight[m], k, lane);
        const float4 &low = w.rows[0], &high = w.rows[1];
        a[m][0] = {{to_tf32(low.x), to_tf32(high.x), to_tf32(low.y), to_tf32(high.y)}};
        a[m][1] = {{to_tf32(low.z), to_tf32(high.z), to_tf32(low.w), to_tf32(high.w)}};
      }
      const int offset = table[k * 4];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float4 x = load_group<float4>(f.map, size_t(f.source[n] + offset) * sizeof(float), offset >= 0);
        const MmaB b[2] = {{{to_tf32(x.x), to_tf32(x.y)}}, {{to_tf32(x.z), to_tf32(x.w)}}};
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma_m16n8k8(sums[m][n], a[m][0], b[0]);
          mma_m16n8k8(sums[m][n], a[m][1], b[1]);
        }
      }
    }
  }
};

// float32 by fused multiply-adds: a lane sums its four factors for all columns, and at the end lanes add up over t.
struct FloatProduct {
  template <int MT, int NT>
  PVK_DEVICE static void add(MmaC (&sums)[MT][NT], const Factors<float, MT, NT>& f, int lane) {
    static_assert(MT == 1);
    float parts[2][NT * 8] = {};
    int source[NT * 8];
#pragma unroll
    for (int n = 0; n < NT * 8; ++n) source[n] = shfl(f.source[n / 8], n % 8 * 4);
    const int* const table = f.table + lane % 4;
#pragma unroll 1
    for (int k = f.begin; k < f.end; ++k) {
      const FloatRows w(f.weight[0], k, lane);
      const int offset = table[k * 4];
#pragma unroll
      for (int n = 0; n < NT * 8; ++n) {
        const float4 x = load_group<float4>(f.map, size_t(source[n] + offset) * sizeof(float), offset >= 0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4& row = w.rows[half];
          float& sum = parts[half][n];
          sum = fmaf(row.w, x.w, fmaf(row.z, x.z, fmaf(row.y, x.y, fmaf(row.x, x.x, sum))));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) scatter(parts[half] + n * 8, &sums[0][n].values[half * 2], lane % 4);
  }

  // Of 8 columns, each summed over the four lanes, lane t gets 2 t and 2 t + 1.
  PVK_DEVICE static void scatter(const float* columns, float* two, int t) {
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool upper = t >= 2;
      const float given = upper ? columns[i] : columns[4 + i];
      four[i] = (upper ? columns[4 + i] : columns[i]) + shfl_xor(given, 2);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool upper = t % 2 != 0;
      const float given = upper ? four[i] : four[2 + i];
      two[i] = (upper ? four[2 + i] : four[i]) + shfl_xor(given, 1);
    }
  }
};

}  // namespace pvk::graph
