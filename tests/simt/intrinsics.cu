// One function for each intrinsic, which applies it to arrays on the device: test_intrinsics.py compares the results
// with numpy's and torch's. Every operand and result has 8 bytes, of which it takes the first. Also a library for a
// GPU.
#include <cstring>

#include "selftest.cuh"

namespace selftest {
namespace {

using namespace pvk;

constexpr int kThreads = 128;

template <typename T>
PVK_DEVICE T from_bits(uint64_t bits) {
  T value;
  memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

template <typename T>
PVK_DEVICE uint64_t to_bits(const T& value) {
  uint64_t bits = 0;
  memcpy(&bits, static_cast<const void*>(&value), sizeof(T));
  return bits;
}

// A thread owns an element.
template <typename Intrinsic>
__global__ void map_kernel(const uint64_t* x, const uint64_t* y, const uint64_t* z, uint64_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = Intrinsic::apply(x[i], y[i], z[i]);
}

const char* map(void (*kernel)(const uint64_t*, const uint64_t*, const uint64_t*, uint64_t*, int), const uint64_t* x,
                const uint64_t* y, const uint64_t* z, uint64_t* out, int n) {
  return catch_error([&] {
    const DeviceArray<uint64_t> device_x(x, n), device_y(y, n), device_z(z, n), device_out(n);
    launch(kernel, {dim3(unsigned(ceil_div(n, kThreads))), dim3(kThreads)}, device_x.data(), device_y.data(),
           device_z.data(), device_out.data(), n);
    device_out.copy_to(out);
  });
}

// x, y and z are of type T.
#define MAP(name, T, expression)                                                                              \
  struct name##_op {                                                                                          \
    static PVK_DEVICE uint64_t apply(uint64_t x_bits, uint64_t y_bits, uint64_t z_bits) {                     \
      [[maybe_unused]] const T x = from_bits<T>(x_bits), y = from_bits<T>(y_bits), z = from_bits<T>(z_bits);  \
      return to_bits(expression);                                                                             \
    }                                                                                                         \
  };                                                                                                          \
  }                                                                                                           \
  SELFTEST intrinsics_##name(const uint64_t* x, const uint64_t* y, const uint64_t* z, uint64_t* out, int n) { \
    return map(map_kernel<name##_op>, x, y, z, out, n);                                                       \
  }                                                                                                           \
  namespace {

// ---- 16-bit floats ----

#define NARROW(name, expression)       \
  MAP(name##_half, __half, expression) \
  MAP(name##_bfloat16, __nv_bfloat16, expression)
#define PAIR(name, expression)          \
  MAP(name##_half, __half2, expression) \
  MAP(name##_bfloat16, __nv_bfloat162, expression)

#define CONVERSIONS(half, T)                               \
  MAP(half##_to_float, T, __##half##2float(x))             \
  MAP(half##_from_float_rn, float, __float2##half##_rn(x)) \
  MAP(half##_from_float_rz, float, __float2##half##_rz(x)) \
  MAP(half##_from_float_rd, float, __float2##half##_rd(x)) \
  MAP(half##_from_float_ru, float, __float2##half##_ru(x)) \
  MAP(half##_from_double_rn, double, __double2##half(x))
CONVERSIONS(half, __half)
CONVERSIONS(bfloat16, __nv_bfloat16)

#define WITH_INTEGER(half, T, int, Int, rn)                  \
  MAP(half##_to_##int##_##rn, T, __##half##2##int##_##rn(x)) \
  MAP(half##_from_##int##_##rn, Int, __##int##2##half##_##rn(x))
#define WITH_INTEGERS(half, T, rn)                  \
  WITH_INTEGER(half, T, short, short, rn)           \
  WITH_INTEGER(half, T, ushort, unsigned short, rn) \
  WITH_INTEGER(half, T, int, int, rn)               \
  WITH_INTEGER(half, T, uint, unsigned, rn)         \
  WITH_INTEGER(half, T, ll, long long, rn)          \
  WITH_INTEGER(half, T, ull, unsigned long long, rn)
WITH_INTEGERS(half, __half, rn)
WITH_INTEGERS(half, __half, rz)
WITH_INTEGERS(half, __half, rd)
WITH_INTEGERS(half, __half, ru)
WITH_INTEGERS(bfloat16, __nv_bfloat16, rn)
WITH_INTEGERS(bfloat16, __nv_bfloat16, rz)
WITH_INTEGERS(bfloat16, __nv_bfloat16, rd)
WITH_INTEGERS(bfloat16, __nv_bfloat16, ru)

NARROW(hadd, __hadd(x, y))
NARROW(hsub, __hsub(x, y))
NARROW(hmul, __hmul(x, y))
NARROW(hdiv, __hdiv(x, y))
NARROW(plus, x + y)
NARROW(minus, x - y)
NARROW(times, x* y)
NARROW(over, x / y)
NARROW(hfma, __hfma(x, y, z))
NARROW(hfma_relu, __hfma_relu(x, y, z))
NARROW(hfma_sat, __hfma_sat(x, y, z))
NARROW(hadd_sat, __hadd_sat(x, y))
NARROW(hneg, __hneg(x))
NARROW(habs, __habs(x))
NARROW(hmax, __hmax(x, y))
NARROW(hmin, __hmin(x, y))
NARROW(hmax_nan, __hmax_nan(x, y))
NARROW(hmin_nan, __hmin_nan(x, y))
NARROW(hisnan, int(__hisnan(x)))
NARROW(hisinf, __hisinf(x))
NARROW(hsqrt, hsqrt(x))
NARROW(hrsqrt, hrsqrt(x))
NARROW(hrcp, hrcp(x))
NARROW(hexp, hexp(x))
NARROW(hexp2, hexp2(x))
NARROW(hexp10, hexp10(x))
NARROW(hlog, hlog(x))
NARROW(hlog2, hlog2(x))
NARROW(hlog10, hlog10(x))
NARROW(hsin, hsin(x))
NARROW(hcos, hcos(x))
NARROW(htanh, htanh(x))
NARROW(hceil, hceil(x))
NARROW(hfloor, hfloor(x))
NARROW(htrunc, htrunc(x))
NARROW(hrint, hrint(x))

PAIR(hadd2, __hadd2(x, y))
PAIR(hsub2, __hsub2(x, y))
PAIR(hmul2, __hmul2(x, y))
PAIR(h2div, __h2div(x, y))
PAIR(hfma2, __hfma2(x, y, z))
PAIR(hmax2, __hmax2(x, y))
PAIR(hmin2, __hmin2(x, y))
PAIR(h2exp, h2exp(x))
PAIR(h2rsqrt, h2rsqrt(x))

#define COMPARE(eq)                       \
  NARROW(h##eq, int(__h##eq(x, y)))       \
  NARROW(h##eq##u, int(__h##eq##u(x, y))) \
  PAIR(h##eq##2, __h##eq##2(x, y))        \
  PAIR(hb##eq##2, int(__hb##eq##2(x, y))) \
  PAIR(h##eq##2_mask, __h##eq##2_mask(x, y))
COMPARE(eq)
COMPARE(ne)
COMPARE(lt)
COMPARE(le)
COMPARE(gt)
COMPARE(ge)

// ---- float and double ----

#define ROUNDED(rn)                                      \
  MAP(fadd_##rn, float, __fadd_##rn(x, y))               \
  MAP(fsub_##rn, float, __fsub_##rn(x, y))               \
  MAP(fmul_##rn, float, __fmul_##rn(x, y))               \
  MAP(fdiv_##rn, float, __fdiv_##rn(x, y))               \
  MAP(frcp_##rn, float, __frcp_##rn(x))                  \
  MAP(fsqrt_##rn, float, __fsqrt_##rn(x))                \
  MAP(fmaf_##rn, float, __fmaf_##rn(x, y, z))            \
  MAP(double2float_##rn, double, __double2float_##rn(x)) \
  MAP(float2int_##rn, float, __float2int_##rn(x))        \
  MAP(float2uint_##rn, float, __float2uint_##rn(x))      \
  MAP(float2ll_##rn, float, __float2ll_##rn(x))          \
  MAP(float2ull_##rn, float, __float2ull_##rn(x))        \
  MAP(double2int_##rn, double, __double2int_##rn(x))     \
  MAP(double2ll_##rn, double, __double2ll_##rn(x))       \
  MAP(int2float_##rn, int, __int2float_##rn(x))          \
  MAP(uint2float_##rn, unsigned, __uint2float_##rn(x))   \
  MAP(ll2float_##rn, long long, __ll2float_##rn(x))      \
  MAP(ull2float_##rn, unsigned long long, __ull2float_##rn(x))
ROUNDED(rn)
ROUNDED(rz)
ROUNDED(rd)
ROUNDED(ru)

MAP(fdividef, float, __fdividef(x, y))
MAP(expf, float, __expf(x))
MAP(exp10f, float, __exp10f(x))
MAP(logf, float, __logf(x))
MAP(log2f, float, __log2f(x))
MAP(log10f, float, __log10f(x))
MAP(powf, float, __powf(x, y))
MAP(sinf, float, __sinf(x))
MAP(cosf, float, __cosf(x))
MAP(tanf, float, __tanf(x))
MAP(rsqrtf, float, rsqrtf(x))
MAP(rsqrt, double, rsqrt(x))
MAP(saturatef, float, __saturatef(x))
MAP(min_float, float, min(x, y))
MAP(max_float, float, max(x, y))
MAP(min_int, int, min(x, y))
MAP(max_uint, unsigned, max(x, y))
MAP(max_mixed, int, max(x, unsigned(y)))
MAP(float_as_int, float, __float_as_int(x))
MAP(uint_as_float, unsigned, __uint_as_float(x))
MAP(hiloint2double, double, __hiloint2double(__double2hiint(x), __double2loint(x)))

// ---- integers ----

MAP(popc, unsigned, __popc(x))
MAP(popcll, unsigned long long, __popcll(x))
MAP(clz, int, __clz(x))
MAP(clzll, long long, __clzll(x))
MAP(ffs, int, __ffs(x))
MAP(ffsll, long long, __ffsll(x))
MAP(brev, unsigned, __brev(x))
MAP(brevll, unsigned long long, __brevll(x))
MAP(byte_perm, unsigned, __byte_perm(x, y, z))
MAP(funnelshift_l, unsigned, __funnelshift_l(x, y, z))
MAP(funnelshift_r, unsigned, __funnelshift_r(x, y, z))
MAP(funnelshift_lc, unsigned, __funnelshift_lc(x, y, z))
MAP(funnelshift_rc, unsigned, __funnelshift_rc(x, y, z))
MAP(mulhi, int, __mulhi(x, y))
MAP(umulhi, unsigned, __umulhi(x, y))
MAP(mul64hi, long long, __mul64hi(x, y))
MAP(umul64hi, unsigned long long, __umul64hi(x, y))
MAP(mul24, int, __mul24(x, y))
MAP(umul24, unsigned, __umul24(x, y))
MAP(sad, int, __sad(x, y, unsigned(z)))
MAP(usad, unsigned, __usad(x, y, z))
MAP(dp4a, int, __dp4a(x, y, z))
MAP(udp4a, unsigned, __dp4a(x, y, z))

// ---- warps ----

// One warp; lane i has x[i] and y[i]. Lanes outside the mask leave out[i] alone.
template <typename Collective>
__global__ void warp_kernel(const uint64_t* x, const uint64_t* y, uint64_t* out, unsigned mask, int width) {
  const int lane = threadIdx.x;
  if (mask >> lane & 1) out[lane] = Collective::apply(x[lane], y[lane], mask, width);
}

const char* run_warp(void (*kernel)(const uint64_t*, const uint64_t*, uint64_t*, unsigned, int), const uint64_t* x,
                     const uint64_t* y, uint64_t* out, unsigned mask, int width) {
  return catch_error([&] {
    const DeviceArray<uint64_t> device_x(x, kWarpSize), device_y(y, kWarpSize), device_out(kWarpSize);
    launch(kernel, {dim3(1), dim3(kWarpSize)}, device_x.data(), device_y.data(), device_out.data(), mask, width);
    device_out.copy_to(out);
  });
}

// x is of type T, y an int.
#define WARP(name, T, expression)                                                                             \
  struct name##_op {                                                                                          \
    static PVK_DEVICE uint64_t apply(uint64_t x_bits, uint64_t y_bits, [[maybe_unused]] unsigned mask,        \
                                     [[maybe_unused]] int width) {                                            \
      [[maybe_unused]] const T x = from_bits<T>(x_bits);                                                      \
      [[maybe_unused]] const int y = from_bits<int>(y_bits);                                                  \
      return to_bits(expression);                                                                             \
    }                                                                                                         \
  };                                                                                                          \
  }                                                                                                           \
  SELFTEST intrinsics_##name(const uint64_t* x, const uint64_t* y, uint64_t* out, unsigned mask, int width) { \
    return run_warp(warp_kernel<name##_op>, x, y, out, mask, width);                                          \
  }                                                                                                           \
  namespace {
#define SHUFFLES(T, suffix)                                        \
  WARP(shfl_##suffix, T, __shfl_sync(mask, x, y, width))           \
  WARP(shfl_up_##suffix, T, __shfl_up_sync(mask, x, y, width))     \
  WARP(shfl_down_##suffix, T, __shfl_down_sync(mask, x, y, width)) \
  WARP(shfl_xor_##suffix, T, __shfl_xor_sync(mask, x, y, width))
SHUFFLES(int, int)
SHUFFLES(unsigned long long, ull)
SHUFFLES(double, double)
SHUFFLES(__half, half)
SHUFFLES(__nv_bfloat162, bfloat162)

PVK_DEVICE uint64_t match_all(unsigned mask, int value) {
  int all;
  const unsigned lanes = __match_all_sync(mask, value, &all);
  return uint64_t(all) << 32 | lanes;
}

WARP(ballot, int, __ballot_sync(mask, x))
WARP(any, int, __any_sync(mask, x))
WARP(all, int, __all_sync(mask, x))
WARP(match_any, int, __match_any_sync(mask, x))
WARP(match_any_ll, long long, __match_any_sync(mask, x))
WARP(match_all, int, match_all(mask, x))
WARP(reduce_add, int, __reduce_add_sync(mask, x))
WARP(reduce_min, int, __reduce_min_sync(mask, x))
WARP(reduce_max, int, __reduce_max_sync(mask, x))
WARP(reduce_umin, unsigned, __reduce_min_sync(mask, x))
WARP(reduce_umax, unsigned, __reduce_max_sync(mask, x))
WARP(reduce_and, unsigned, __reduce_and_sync(mask, x))
WARP(reduce_or, unsigned, __reduce_or_sync(mask, x))
WARP(reduce_xor, unsigned, __reduce_xor_sync(mask, x))

// ---- atomics ----

// Each thread applies one to *cell, and keeps what was there.
template <typename Atomic>
__global__ void atomic_kernel(const uint64_t* x, uint64_t* cell, uint64_t* old, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) old[i] = Atomic::apply(cell, x[i]);
}

const char* run_atomic(void (*kernel)(const uint64_t*, uint64_t*, uint64_t*, int), const uint64_t* x, uint64_t* cell,
                       uint64_t* old, int n) {
  return catch_error([&] {
    const DeviceArray<uint64_t> device_x(x, n), device_cell(cell, 1), device_old(n);
    launch(kernel, {dim3(unsigned(ceil_div(n, kThreads))), dim3(kThreads)}, device_x.data(), device_cell.data(),
           device_old.data(), n);
    device_cell.copy_to(cell);
    device_old.copy_to(old);
  });
}

#define ATOMIC(name, T, expression)                                                     \
  struct name##_op {                                                                    \
    static PVK_DEVICE uint64_t apply(uint64_t* cell_bits, uint64_t x_bits) {            \
      T* const cell = reinterpret_cast<T*>(cell_bits);                                  \
      const T x = from_bits<T>(x_bits);                                                 \
      return to_bits(expression);                                                       \
    }                                                                                   \
  };                                                                                    \
  }                                                                                     \
  SELFTEST intrinsics_##name(const uint64_t* x, uint64_t* cell, uint64_t* old, int n) { \
    return run_atomic(atomic_kernel<name##_op>, x, cell, old, n);                       \
  }                                                                                     \
  namespace {
#define ATOMICS(T, suffix)                           \
  ATOMIC(atomic_add_##suffix, T, atomicAdd(cell, x)) \
  ATOMIC(atomic_exch_##suffix, T, atomicExch(cell, x))
#define INTEGER_ATOMICS(T, suffix)                   \
  ATOMIC(atomic_min_##suffix, T, atomicMin(cell, x)) \
  ATOMIC(atomic_max_##suffix, T, atomicMax(cell, x)) \
  ATOMIC(atomic_and_##suffix, T, atomicAnd(cell, x)) \
  ATOMIC(atomic_or_##suffix, T, atomicOr(cell, x))   \
  ATOMIC(atomic_xor_##suffix, T, atomicXor(cell, x)) \
  ATOMIC(atomic_cas_##suffix, T, atomicCAS(cell, from_bits<T>(7), x))
ATOMICS(int, int)
ATOMICS(unsigned, uint)
ATOMICS(unsigned long long, ull)
ATOMICS(float, float)
INTEGER_ATOMICS(int, int)
INTEGER_ATOMICS(unsigned, uint)
INTEGER_ATOMICS(unsigned long long, ull)
ATOMIC(atomic_add_double, double, atomicAdd(cell, x))
ATOMIC(atomic_add_half, __half, atomicAdd(cell, x))
ATOMIC(atomic_add_half2, __half2, atomicAdd(cell, x))
ATOMIC(atomic_add_bfloat16, __nv_bfloat16, atomicAdd(cell, x))
ATOMIC(atomic_add_bfloat162, __nv_bfloat162, atomicAdd(cell, x))
ATOMIC(atomic_sub_int, int, atomicSub(cell, x))
ATOMIC(atomic_inc_uint, unsigned, atomicInc(cell, x))
ATOMIC(atomic_dec_uint, unsigned, atomicDec(cell, x))

}  // namespace
}  // namespace selftest
