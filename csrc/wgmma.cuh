// Hopper's tensor cores and bulk copies: one warp group's asynchronous products (wgmma) of panels in shared memory, and
// the barriers and fences between them and the copies. Operands are described as PTX's manual has it, section "Asynchronous
// Warpgroup Level Matrix Instructions".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

namespace nybble {

__device__ inline uint32_t shared_address(void const* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline uint4 read_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// Barriers in shared memory, which count arrivals and bytes that copies bring.
__device__ inline void start_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Until the barrier's round of this parity is over.
__device__ inline void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{ .reg .pred over; again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1; @!over bra again; }" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Named barriers, of so many threads that wait or only arrive.
__device__ inline void sync_at(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void arrive_at(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What threads wrote is there for copies and products.
__device__ inline void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ inline void copy_box(void* to, CUtensorMap const* map, int x, int y, int z, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
      : "memory");
}

// Whether a block of as many threads as one multiprocessor has room for starts with so many registers: groups that ask for
// more wait for them forever.
constexpr bool registers_suffice(int threads, int wanted) { return wanted <= 65536 / threads / 8 * 8 * threads; }

// Registers of each thread of a warp group, from those the others give up.
template <int N>
__device__ inline void shrink_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ inline void grow_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

__device__ inline float exp2_fast(float v) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

template <typename T>
__device__ inline uint32_t narrow_pair(float low, float high);
template <>
__device__ inline uint32_t narrow_pair<__half>(float low, float high) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
template <>
__device__ inline uint32_t narrow_pair<__nv_bfloat16>(float low, float high) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// A matrix of rows of 64 values of 16 bits, 128 bytes whose 16-byte chunks are swizzled by row, eight rows a kilobyte.
// `next` is the distance of the next 64 columns, where an operand's rows are those that are summed over.
__device__ inline uint64_t panel(uint32_t address, int next = 16) {
  return uint64_t(address & 0x3FFFF) >> 4 | uint64_t(next >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16_AT(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F16(d) F16_AT(d, 0)
#define F32(d) F16_AT(d, 0), F16_AT(d, 16)
#define F64(d) F32(d), F16_AT(d, 32), F16_AT(d, 48)
#define U4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define U32(d) U4(d, 0), U4(d, 4), U4(d, 8), U4(d, 12), U4(d, 16), U4(d, 20), U4(d, 24), U4(d, 28)

// Until all but the last N groups of products are done; what they read and write cannot be touched before.
template <int N>
__device__ inline void wait_products(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : F64(d) : "n"(N) : "memory");
}
template <int N>
__device__ inline void wait_products(float (&d)[64], uint32_t (&a)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %96;" : F64(d), U32(a) : "n"(N) : "memory");
}
template <int N>
__device__ inline void wait_products(float (&d)[32], uint32_t (&a)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : F32(d), U32(a) : "n"(N) : "memory");
}
template <int N>
__device__ inline void wait_products(float (&d)[16], uint32_t (&a)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %48;" : F16(d), U32(a) : "n"(N) : "memory");
}

// Goes on when v, which is never negative, is known. The compiler does not move what comes after to before: it would
// wait for products first, and then do all the work that was to be done meanwhile.
__device__ inline void once_known(float v) {
  asm volatile("{ .reg .pred never; setp.lt.f32 never, %0, 0f00000000; @never trap; }" ::"f"(v) : "memory");
}

// d [64, 128] = a [64, 16] b [128, 16]^T, and d before if `add`.
template <typename T>
__device__ inline void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add);
// d [64, N] = a [64, 16], in registers, times b [N, 16]^T, or [16, N] if TRANSPOSED, and d before if `add`.
template <typename T, bool TRANSPOSED>
__device__ inline void multiply_rows(float (&d)[16], uint32_t const* a, uint64_t b, bool add);
template <typename T, bool TRANSPOSED>
__device__ inline void multiply_rows(float (&d)[32], uint32_t const* a, uint64_t b, bool add);
template <typename T, bool TRANSPOSED>
__device__ inline void multiply_rows(float (&d)[64], uint32_t const* a, uint64_t b, bool add);

#define DEFINE_PRODUCT(T, NAME)                                                                                     \
template <>                                                                                                         \
__device__ inline void multiply<T>(float (&d)[64], uint64_t a, uint64_t b, bool add) {                              \
  asm volatile(                                                                                                     \
      "{ .reg .pred add; setp.ne.b32 add, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {"  \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                            \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                              \
      "}, %64, %65, add, 1, 1, 0, 0; }"                                                                             \
      : F64(d)                                                                                                      \
      : "l"(a), "l"(b), "r"(int(add)));                                                                             \
}
#define DEFINE_PRODUCTS_OF_ROWS(T, NAME, TRANSPOSED)                                                                \
template <>                                                                                                         \
__device__ inline void multiply_rows<T, TRANSPOSED>(float (&d)[16], uint32_t const* a, uint64_t b, bool add) {      \
  asm volatile(                                                                                                     \
      "{ .reg .pred add; setp.ne.b32 add, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." NAME "." NAME " {"   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                        \
      "}, {%16, %17, %18, %19}, %20, add, 1, 1, %22; }"                                                             \
      : F16(d)                                                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(TRANSPOSED)));                   \
}                                                                                                                   \
template <>                                                                                                         \
__device__ inline void multiply_rows<T, TRANSPOSED>(float (&d)[32], uint32_t const* a, uint64_t b, bool add) {      \
  asm volatile(                                                                                                     \
      "{ .reg .pred add; setp.ne.b32 add, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {"   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                              \
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38; }"                                                             \
      : F32(d)                                                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(TRANSPOSED)));                   \
}                                                                                                                   \
template <>                                                                                                         \
__device__ inline void multiply_rows<T, TRANSPOSED>(float (&d)[64], uint32_t const* a, uint64_t b, bool add) {      \
  asm volatile(                                                                                                     \
      "{ .reg .pred add; setp.ne.b32 add, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {"  \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                            \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                              \
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70; }"                                                             \
      : F64(d)                                                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(TRANSPOSED)));                   \
}

DEFINE_PRODUCT(__nv_bfloat16, "bf16")
DEFINE_PRODUCT(__half, "f16")
DEFINE_PRODUCTS_OF_ROWS(__nv_bfloat16, "bf16", false)
DEFINE_PRODUCTS_OF_ROWS(__nv_bfloat16, "bf16", true)
DEFINE_PRODUCTS_OF_ROWS(__half, "f16", false)
DEFINE_PRODUCTS_OF_ROWS(__half, "f16", true)

#undef DEFINE_PRODUCT
#undef DEFINE_PRODUCTS_OF_ROWS
#undef F4
#undef F16_AT
#undef F16
#undef F32
#undef F64
#undef U4
#undef U32

// The driver's function that describes tensors to copies; null where it has none.
inline void* find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  auto const error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  auto const error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
}

// A tensor of 16-bit values, its sizes, the last two's strides and a box of it given from the innermost dimension out, for
// copies that swizzle rows of 64 values, or of 32; what a box has outside comes as zeros.
inline cudaError_t describe(CUtensorMap* map, void const* base, std::array<int64_t, 3> sizes,
                            std::array<int64_t, 2> strides, std::array<int, 3> box) {
  static void* const encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t const whole[] = {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]), cuuint64_t(sizes[2])};
  cuuint64_t const bytes[] = {2 * cuuint64_t(strides[0]), 2 * cuuint64_t(strides[1])};
  cuuint32_t const part[] = {cuuint32_t(box[0]), cuuint32_t(box[1]), cuuint32_t(box[2])}, steps[] = {1, 1, 1};
  CUresult const done = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(base), whole, bytes, part, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return done == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace nybble
