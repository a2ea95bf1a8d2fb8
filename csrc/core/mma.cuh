// Tensor cores of sm_80 and later: C += A B for one warp, with A [16, K] and B [K, 8], and the loads of their
// fragments. Each wrapper is PTX and its twin in the host emulator. The warp is whole and converged.
//
// Layouts are the PTX ISA's ("Matrix Fragments for mma.m16n8k16" and "m16n8k8"). With g = lane / 4 and t = lane % 4:
//   K = 16, two elements a register, (c, c + 1) stands for two neighbours in k:
//     A.regs: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)   [row, k]
//     B.regs: (2t, g), (2t + 8, g)                                 [k, column]
//   K = 8 of tf32, one element a register:
//     A.regs: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)       [row, k]
//     B.regs: (t, g), (t + 4, g)                                   [k, column]
//   C.values: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)   [row, column]
#pragma once

#include "core/warp.cuh"

namespace pvk {

struct MmaA {
  uint32_t regs[4];
};
struct MmaB {
  uint32_t regs[2];
};
struct MmaC {
  float values[4];
};

// The element type of MmaA and MmaB that mma_m16n8k8 takes; made by to_tf32.
struct Tf32 {
  uint32_t bits;
};

// ---- what the last lane to arrive does for the whole warp: it reads and writes the others' operands ----
#if defined(PVK_SIMT)

#define PVK_UNCHECKED __attribute__((optimize("O3"), no_sanitize("thread,alignment,bounds")))

PVK_DEVICE void check_row(const void* row) {
  if (!simt::is_shared(row)) simt::fail("ldmatrix: expected the address of a row to be in shared memory");
  simt::check_access(row, 16, simt::Access::kRead);
}

struct LdmatrixOperands {
  uint32_t* regs;
  const unsigned char* row;
};

template <int N, bool TRANSPOSED>
PVK_UNCHECKED void finish_ldmatrix(void* const (&operands)[simt::kWarpSize], unsigned) {
  for (int matrix = 0; matrix < N; ++matrix) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r)
      __builtin_memcpy(rows[r], static_cast<const LdmatrixOperands*>(operands[matrix * 8 + r])->row, 16);
    for (int lane = 0; lane < simt::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = TRANSPOSED ? rows[2 * t][g] : rows[g][2 * t];
      const uint32_t high = TRANSPOSED ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
      static_cast<const LdmatrixOperands*>(operands[lane])->regs[matrix] = high << 16 | low;
    }
  }
}

struct MmaOperands {
  const MmaA* a;
  const MmaB* b;
  MmaC* c;
};

// Element `half` of a register.
template <typename scalar_t>
PVK_DEVICE float mma_element(uint32_t reg, int half) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    const uint32_t bits = reg >> 16 * half, magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    const float value = __builtin_bit_cast(float, magnitude) * 0x1p112f;
    const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinity and NaN
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) | special | sign);
  } else {  // bfloat16 and tf32 are floats without their low bits
    return __builtin_bit_cast(float, std::is_same_v<scalar_t, Tf32> ? reg & 0xffffe000u
                                     : half                         ? reg & 0xffff0000u
                                                                    : reg << 16);
  }
}

// Products and sums are in double, rounded once. A tensor core adds in its own order, with fewer bits.
template <typename scalar_t>
PVK_UNCHECKED void finish_mma(void* const (&operands)[simt::kWarpSize], unsigned) {
  constexpr int kEach = 4 / int(sizeof(scalar_t));  // elements of a register
  constexpr int K = 8 * kEach;
  double a[16][K], b[K][8], c[16][8];
  for (int lane = 0; lane < simt::kWarpSize; ++lane) {
    const MmaOperands& mine = *static_cast<const MmaOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < kEach; ++half)
        a[g + i % 2 * 8][kEach * t + i / 2 * (K / 2) + half] = mma_element<scalar_t>(mine.a->regs[i], half);
      c[g + i / 2 * 8][2 * t + i % 2] = mine.c->values[i];
    }
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < kEach; ++half)
        b[kEach * t + i * (K / 2) + half][g] = mma_element<scalar_t>(mine.b->regs[i], half);
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < simt::kWarpSize; ++lane) {
    float* const values = static_cast<const MmaOperands*>(operands[lane])->c->values;
    for (int i = 0; i < 4; ++i) values[i] = float(c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2]);
  }
}

#undef PVK_UNCHECKED
#endif

// ---- ldmatrix ----

// Loads N (1, 2 or 4) matrices [8, 8] of 16-bit elements from shared memory. Lane 8 i + r gives the address of row r of
// matrix i, a multiple of 16 (lanes from 8 N on are not asked). Lane 4 g + t gets (g, 2t) and (g, 2t + 1) of matrix i
// in regs[i]. Elements of 32 bits go as pairs: a matrix is [8, 4], and the lane gets (g, t).
template <int N>
PVK_DEVICE void ldmatrix(uint32_t (&regs)[N], const void* row SIMT_SITE) {
  static_assert(N == 1 || N == 2 || N == 4);
#if defined(PVK_SIMT)
  if (simt::lane_id() < 8 * N) check_row(row);
  LdmatrixOperands operands = {regs, static_cast<const unsigned char*>(row)};
  simt::collective("ldmatrix", kFullWarp, &operands, finish_ldmatrix<N, false> SIMT_AT_SITE);
#else
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(regs[0])
                 : "r"(shared_offset(row))
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(regs[0]), "=r"(regs[1])
                 : "r"(shared_offset(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
                 : "r"(shared_offset(row))
                 : "memory");
  }
#endif
}

// Of the transposed matrices: lane 4 g + t gets (2t, g) and (2t + 1, g).
template <int N>
PVK_DEVICE void ldmatrix_transposed(uint32_t (&regs)[N], const void* row SIMT_SITE) {
  static_assert(N == 1 || N == 2 || N == 4);
#if defined(PVK_SIMT)
  if (simt::lane_id() < 8 * N) check_row(row);
  LdmatrixOperands operands = {regs, static_cast<const unsigned char*>(row)};
  simt::collective("ldmatrix.trans", kFullWarp, &operands, finish_ldmatrix<N, true> SIMT_AT_SITE);
#else
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(regs[0])
                 : "r"(shared_offset(row))
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(regs[0]), "=r"(regs[1])
                 : "r"(shared_offset(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
                 : "r"(shared_offset(row))
                 : "memory");
  }
#endif
}

// ---- mma.sync ----

// C += A B with K = 16; scalar_t is __half or __nv_bfloat16.
template <typename scalar_t>
PVK_DEVICE void mma_m16n8k16(MmaC& c, const MmaA& a, const MmaB& b SIMT_SITE) {
  static_assert(std::is_same_v<scalar_t, __half> || std::is_same_v<scalar_t, __nv_bfloat16>);
#if defined(PVK_SIMT)
  MmaOperands operands = {&a, &b, &c};
  simt::collective("mma.m16n8k16", kFullWarp, &operands, finish_mma<scalar_t> SIMT_AT_SITE);
#else
  if constexpr (std::is_same_v<scalar_t, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])
        : "r"(a.regs[0]), "r"(a.regs[1]), "r"(a.regs[2]), "r"(a.regs[3]), "r"(b.regs[0]), "r"(b.regs[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])
        : "r"(a.regs[0]), "r"(a.regs[1]), "r"(a.regs[2]), "r"(a.regs[3]), "r"(b.regs[0]), "r"(b.regs[1]));
  }
#endif
}

// C += A B with K = 8, of tf32.
PVK_DEVICE void mma_m16n8k8(MmaC& c, const MmaA& a, const MmaB& b SIMT_SITE) {
#if defined(PVK_SIMT)
  MmaOperands operands = {&a, &b, &c};
  simt::collective("mma.m16n8k8", kFullWarp, &operands, finish_mma<Tf32> SIMT_AT_SITE);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])
      : "r"(a.regs[0]), "r"(a.regs[1]), "r"(a.regs[2]), "r"(a.regs[3]), "r"(b.regs[0]), "r"(b.regs[1]));
#endif
}

// To the nearest of tf32's 10 fraction bits, ties away from zero. mma_m16n8k8 alone would cut the bits off.
PVK_DEVICE uint32_t to_tf32(float value) {
#if defined(PVK_SIMT)
  const uint32_t bits = __float_as_uint(value);
  return value != value ? 0x7fffffffu : (bits + 0x1000u) & 0xffffe000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

}  // namespace pvk
