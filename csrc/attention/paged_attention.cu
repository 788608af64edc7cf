// Decode attention over the paged cache: one query per request, the heads of a KV head sharing its reads.
//
// A block serves one request, one KV head and up to 16 of its query heads: the 16 rows of a tensor-core tile, so that
// a group of any size costs the same. Each of its four warps walks every fourth chunk of 16 tokens on its own: it copies
// K and V into its ring of shared memory (cp.async, 16 bytes a lane, STAGES chunks ahead), multiplies, and keeps an
// online softmax in registers. Only at the end do the warps meet and merge.
// v1 walks a whole sequence (PagedAttention, arXiv 2309.06180); v2 one partition of it, for `combine` to merge
// (flash-decoding: split along the keys, then rescale by the partitions' maxima).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "paged_attention.h"

namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int CHUNK = 16;  // tokens a warp takes at a time: the k of its second product
constexpr int ROWS = 16;   // query heads of a block
constexpr float LOG2E = 1.4426950408889634f;

using Args = PagedAttention;

template <typename T> struct Pair;
template <> struct Pair<__half> {
  using type = __half2;
  static __device__ __half2 of(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ __half2 fp8(__nv_fp8x2_storage_t bits) { return __half2(__nv_cvt_fp8x2_to_halfraw2(bits, __NV_E4M3)); }
};
template <> struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __nv_bfloat162 of(float a, float b) { return __floats2bfloat162_rn(a, b); }
  static __device__ __nv_bfloat162 fp8(__nv_fp8x2_storage_t bits) {
    return __float22bfloat162_rn(__half22float2(Pair<__half>::fp8(bits)));
  }
};

template <typename P> __device__ uint32_t bits_of(P pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <typename T> __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Copies 16 bytes, or writes zeros and reads nothing where !read.
__device__ void copy16(uint32_t shared, const void* global, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(read ? 16 : 0) : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Shared memory of one warp: STAGES x {K, V} as they are in the cache, and for FP8 one {K, V} widened to q's dtype.
template <int D, bool FP8> struct Layout {
  static constexpr int WIDE = (D + 8) * 2;                // bytes of a row; its 16-byte units are odd: no bank conflicts
  static constexpr int RAW = FP8 ? D : WIDE;
  static constexpr int TILE = CHUNK * RAW;                // K or V of one chunk, as copied
  static constexpr int STAGES = (D <= 96 ? 4 : D <= 128 ? 3 : 2) + FP8;
  static constexpr int WIDENED = FP8 ? 2 * CHUNK * WIDE : 0;
  static constexpr int WARP = STAGES * 2 * TILE + WIDENED;
  static constexpr int Q = ROWS * WIDE;
  static constexpr int MERGE = WARPS * ROWS * D * 4;      // reuses the rings
  static constexpr int RINGS = WARPS * WARP > MERGE ? WARPS * WARP : MERGE;
  static constexpr int BYTES = Q + RINGS + 2 * WARPS * ROWS * 4;
};

template <typename T, int D, bool FP8>
__device__ void copy_chunk(const Args& a, uint32_t ring, int64_t row_bytes, const uint8_t* head, const int* table,
                           int first, int start, int end) {
  using L = Layout<D, FP8>;
  constexpr int PIECES = D * (FP8 ? 1 : 2) / 16;          // of one token's row
  const int lane = threadIdx.x % 32, block_bits = 31 - __clz(a.block_size);
  // one lane looks a token's block up for all that copy it
  const int mine = first + lane % CHUNK;
  const bool seen = mine >= start && mine < end;
  const int block = seen ? table[mine >> block_bits] : 0;
#pragma unroll
  for (int base = 0; base < CHUNK * PIECES; base += 32) {
    const int i = base + lane, row = i / PIECES, piece = i % PIECES, token = first + row;
    const int64_t found = __shfl_sync(~0u, block, row);   // by all lanes, those past the last piece too
    const bool read = token >= start && token < end;
    const int64_t slot = (found << block_bits) + (token & (a.block_size - 1));
    const uint8_t* from = head + (read ? slot * row_bytes + piece * 16 : 0);
    const uint32_t to = ring + row * L::RAW + piece * 16;
    if (i < CHUNK * PIECES) {
      copy16(to, from, read);
      copy16(to + L::TILE, from + (read ? a.plane_bytes : 0), read);
    }
  }
}

// FP8 bytes of {K, V} -> q's dtype, exactly; the scales are folded into the softmax and the output.
template <typename T, int D> __device__ void widen(const uint8_t* raw, uint8_t* wide) {
  using L = Layout<D, true>;
  for (int i = threadIdx.x % 32; i < 2 * CHUNK * D / 16; i += 32) {
    const uint4 packed = *reinterpret_cast<const uint4*>(raw + i * 16);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    uint32_t pairs[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      pairs[j] = bits_of(Pair<T>::fp8(static_cast<__nv_fp8x2_storage_t>(words[j / 2] >> (j % 2 * 16))));
    uint4* to = reinterpret_cast<uint4*>(wide + i / (D / 16) * L::WIDE + i % (D / 16) * 32);
    to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
  }
}

template <typename T, int D, bool FP8>
__global__ void __launch_bounds__(THREADS) attend(const Args a) {
  using L = Layout<D, FP8>;
  extern __shared__ __align__(16) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool split = a.partial != nullptr;
  const int request = blockIdx.x, part = blockIdx.z;
  const int group = a.heads / a.kv_heads, slices = (group + ROWS - 1) / ROWS;
  const int kv_head = blockIdx.y / slices, row0 = blockIdx.y % slices * ROWS;
  const int rows = min(ROWS, group - row0), head0 = kv_head * group + row0;

  const int length = a.seq_lens[request];
  const int oldest = a.window > 0 ? max(0, length - a.window) : 0;
  const int start = split ? max(oldest, part * a.part_tokens) : oldest;
  const int end = split ? min(length, (part + 1) * a.part_tokens) : length;
  if (start >= end) {  // padding, or a partition out of sight, which `combine` does not read
    if (!split)
      for (int i = threadIdx.x; i < rows * D; i += THREADS)
        static_cast<T*>(a.out)[(int64_t(request) * a.heads + head0) * D + i] = T(0.f);
    return;
  }

  uint8_t* q_tile = shared;
  uint8_t* ring = shared + L::Q + warp * L::WARP;
  const uint8_t* wide = ring + L::STAGES * 2 * L::TILE;
  float* maxima = reinterpret_cast<float*>(shared + L::Q + L::RINGS);
  float* sums = maxima + WARPS * ROWS;

  const T* q = static_cast<const T*>(a.q) + request * a.q_stride + int64_t(head0) * D;
  for (int i = threadIdx.x; i < ROWS * D / 8; i += THREADS) {
    const int row = i / (D / 8), piece = i % (D / 8);
    const uint4 value = row < rows ? *reinterpret_cast<const uint4*>(q + row * D + piece * 8) : make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(q_tile + row * L::WIDE + piece * 16) = value;
  }

  const float scale = a.scale * LOG2E;
  const int element = FP8 ? 1 : 2;
  const int64_t row_bytes = int64_t(a.kv_heads) * D * element;
  const uint8_t* head = static_cast<const uint8_t*>(a.cache) + int64_t(kv_head) * D * element;
  const int* table = a.block_table + int64_t(request) * a.max_blocks;
  const int first_chunk = start / CHUNK + warp, last_chunk = (end + CHUNK - 1) / CHUNK;
  const uint32_t ring_address = shared_address(ring);
  auto copy = [&](int chunk, int stage) {
    if (chunk < last_chunk)
      copy_chunk<T, D, FP8>(a, ring_address + stage * 2 * L::TILE, row_bytes, head, table, chunk * CHUNK, start, end);
    commit();  // an empty group too: `wait` counts groups
  };
#pragma unroll
  for (int stage = 0; stage < L::STAGES - 1; ++stage) copy(first_chunk + stage * WARPS, stage);
  __syncthreads();

  // of each 8x8 matrix that ldmatrix reads, this lane names one row
  const int matrix = lane / 8, line = lane % 8;
  const uint32_t q_rows = shared_address(q_tile) + (matrix % 2 * 8 + line) * L::WIDE + matrix / 2 * 16;
  const uint32_t k_rows = (matrix / 2 * 8 + line) * L::WIDE + matrix % 2 * 16;
  const uint32_t v_rows = (matrix % 2 * 8 + line) * L::WIDE + matrix / 2 * 16;

  float acc[D / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // of rows lane / 4 and lane / 4 + 8
  int stage = 0;
  for (int chunk = first_chunk; chunk < last_chunk; chunk += WARPS) {
    copy(chunk + (L::STAGES - 1) * WARPS, (stage + L::STAGES - 1) % L::STAGES);
    wait<L::STAGES - 1>();
    __syncwarp();
    uint32_t k_tile = ring_address + stage * 2 * L::TILE, v_tile = k_tile + L::TILE;
    if constexpr (FP8) {
      widen<T, D>(ring + stage * 2 * L::TILE, const_cast<uint8_t*>(wide));
      __syncwarp();
      k_tile = shared_address(wide), v_tile = k_tile + CHUNK * L::WIDE;
    }

    float s[2][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t qf[4], kf[4];
      ldmatrix(qf, q_rows + k * 32);
      ldmatrix(kf, k_tile + k_rows + k * 32);
      mma<T>(s[0], qf, kf[0], kf[1]);
      mma<T>(s[1], qf, kf[2], kf[3]);
    }

    // scores of tokens out of sight; every chunk has one in sight, so no maximum stays at -inf
    float high[2] = {top[0], top[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = chunk * CHUNK + i / 4 * 8 + lane % 4 * 2 + i % 2;
      float& score = s[i / 4][i % 4];
      score = token >= start && token < end ? score * scale : -INFINITY;
      high[i % 4 / 2] = fmaxf(high[i % 4 / 2], score);
    }
    bool higher = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], 1));
      high[r] = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], 2));
      higher |= high[r] > top[r];
    }
    if (__any_sync(~0u, higher)) {
      const float shrink[2] = {exp2f(top[0] - high[0]), exp2f(top[1] - high[1])};
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[r] *= shrink[r], top[r] = high[r];
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][i] *= shrink[i / 2];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& p = s[i / 4][i % 4];
      p = exp2f(p - top[i % 4 / 2]);
      sum[i % 4 / 2] += p;
    }

    const uint32_t pf[4] = {bits_of(Pair<T>::of(s[0][0], s[0][1])), bits_of(Pair<T>::of(s[0][2], s[0][3])),
                            bits_of(Pair<T>::of(s[1][0], s[1][1])), bits_of(Pair<T>::of(s[1][2], s[1][3]))};
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t vf[4];
      ldmatrix_transposed(vf, v_tile + v_rows + n * 32);
      mma<T>(acc[2 * n], pf, vf[0], vf[1]);
      mma<T>(acc[2 * n + 1], pf, vf[2], vf[3]);
    }
    __syncwarp();  // all have read before the next copy overwrites
    stage = (stage + 1) % L::STAGES;
  }
  wait<0>();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
  }
  __syncthreads();  // the rings become the place to merge

  float* parts = reinterpret_cast<float*>(shared + L::Q);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + r * 8;
    if (lane % 4 == 0) maxima[warp * ROWS + row] = top[r], sums[warp * ROWS + row] = sum[r];
    if (row < rows)
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(parts + (warp * ROWS + row) * D + n * 8 + lane % 4 * 2) =
            make_float2(acc[n][r * 2], acc[n][r * 2 + 1]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * D; i += THREADS) {
    const int row = i / D, d = i % D;
    float high = maxima[row];
    for (int w = 1; w < WARPS; ++w) high = fmaxf(high, maxima[w * ROWS + row]);
    float total = 0.f, value = 0.f;
    for (int w = 0; w < WARPS; ++w) {  // a warp without chunks weighs exp2(-inf) = 0
      const float weight = exp2f(maxima[w * ROWS + row] - high);
      total += weight * sums[w * ROWS + row];
      value += weight * parts[(w * ROWS + row) * D + d];
    }
    const int64_t place = int64_t(request) * a.heads + head0 + row;
    if (split) {
      a.partial[(place * a.parts + part) * D + d] = value / total;
      if (d == 0) a.maxima[place * a.parts + part] = high, a.sums[place * a.parts + part] = total;
    } else {
      static_cast<T*>(a.out)[place * D + d] = T(value / total * a.v_scale);
    }
  }
}

// Merges the partitions of one request and head: each weighs its sum, brought to the highest maximum.
template <typename T> __global__ void combine(const Args a) {
  const int request = blockIdx.x, length = a.seq_lens[request];
  const int64_t place = int64_t(request) * a.heads + blockIdx.y;
  const float *maxima = a.maxima + place * a.parts, *sums = a.sums + place * a.parts;
  const int first = a.window > 0 ? max(0, length - a.window) / a.part_tokens : 0;
  const int last = (length + a.part_tokens - 1) / a.part_tokens;
  float high = -INFINITY, total = 0.f;
  for (int p = first; p < last; ++p) high = fmaxf(high, maxima[p]);
  for (int p = first; p < last; ++p) total += exp2f(maxima[p] - high) * sums[p];
  for (int d = threadIdx.x; d < a.dim; d += blockDim.x) {
    float value = 0.f;
    for (int p = first; p < last; ++p)
      value += exp2f(maxima[p] - high) * sums[p] * a.partial[(place * a.parts + p) * a.dim + d];
    static_cast<T*>(a.out)[place * a.dim + d] = T(first < last ? value / total * a.v_scale : 0.f);
  }
}

template <typename T> int merge(const Args& a, cudaStream_t stream) {
  combine<T><<<dim3(a.requests, a.heads), 128, 0, stream>>>(a);
  return cudaGetLastError();
}

template <typename T, int D, bool FP8> int launch(const Args& a, cudaStream_t stream) {
  constexpr int bytes = Layout<D, FP8>::BYTES;
  const cudaError_t set =
      cudaFuncSetAttribute(attend<T, D, FP8>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return set;
  const int slices = (a.heads / a.kv_heads + ROWS - 1) / ROWS;
  attend<T, D, FP8><<<dim3(a.requests, a.kv_heads * slices, a.parts), THREADS, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <typename T, bool FP8> int by_width(const Args& a, cudaStream_t stream) {
  switch (a.dim) {
    case 64: return launch<T, 64, FP8>(a, stream);
    case 80: return launch<T, 80, FP8>(a, stream);
    case 96: return launch<T, 96, FP8>(a, stream);
    case 112: return launch<T, 112, FP8>(a, stream);
    case 128: return launch<T, 128, FP8>(a, stream);
    case 192: return launch<T, 192, FP8>(a, stream);
    case 256: return launch<T, 256, FP8>(a, stream);
    default: return -1;
  }
}

int by_dtype(const Args& a, cudaStream_t stream) {
  if (a.bf16)
    return a.fp8 ? by_width<__nv_bfloat16, true>(a, stream) : by_width<__nv_bfloat16, false>(a, stream);
  return a.fp8 ? by_width<__half, true>(a, stream) : by_width<__half, false>(a, stream);
}

}  // namespace

extern "C" int nybble_paged_attention_v1(const PagedAttention* args, cudaStream_t stream) {
  return args->requests == 0 ? 0 : by_dtype(*args, stream);
}

extern "C" int nybble_paged_attention_v2(const PagedAttention* args, cudaStream_t stream) {
  if (args->requests == 0) return 0;
  if (args->parts > 0)  // without any there are no keys, and zeros are all that remains to be written
    if (const int code = by_dtype(*args, stream); code != 0) return code;
  return args->bf16 ? merge<__nv_bfloat16>(*args, stream) : merge<__half>(*args, stream);
}
