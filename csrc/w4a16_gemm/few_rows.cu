// 4-bit weights by 16-bit inputs for a few tokens, on the layout that the Triton kernel multiplies from (`PackedCodes`):
// bytes [ceil(N / 64), blocks, 64, 64], byte j of a block of 128 inputs holding the codes of inputs j and j + 64.
//
// Bound by reading the weights, so every warp reads its own part of them once, 16 bytes a lane, and unpacks them into the
// left fragments of mma.m16n8k16. The order of inputs inside a block is any, as long as weights and tokens agree on it. A
// block has one scale for each output, which multiplies its float32 sum.
//
// Unpacking takes nearly as long as reading, so that nothing else may be computed beside it: inputs are first put into
// shared memory in the order and with the padding of the fragments, where they are few enough for that.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"
#include "unpack.cuh"

namespace {

using namespace nybble;

constexpr int kWarps = 8, kThreads = 32 * kWarps, kBlock = 128, kStrip = 64, kRows = 16;
constexpr int kStripBytes = kStrip * kBlock / 2;

// One matrix [n, k] as it is stored.
struct Matrix {
  uint8_t const* codes;
  void const* scales;   // [groups, n] of the type S
  int8_t const* zeros;  // [groups, n], or null: `zero`
  int n, k, blocks, inverse_group, zero;
};

struct Dense {
  Matrix w;
  void* out;
  void const* x;
  void const* bias;
  int m;
};

// Experts side by side: `code_bytes` and `table` = groups * n apart. up.codes is null where nothing is gated.
struct Experts {
  Matrix w, up;
  void* out;
  void const* x;
  int const* slots;  // [tiles, 8 or 16], -1 where a tile is padded
  int const* tiles;  // the expert of each, -1 for none
  int64_t code_bytes, table;
  int rows_per_slot, most;
};

template <typename T>
__device__ inline void mma(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(typename Type<T>::Pair) && Type<T>::kMagic == 0x64006400) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// A word's bytes 0 and 2 come first in the fragments, then 1 and 3: so do the inputs of every four.
__device__ inline uint4 in_order(uint4 v) {
  return {__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x5410),
          __byte_perm(v.z, v.w, 0x7632)};
}

// The tokens of a block of threads in shared memory: whole blocks of inputs, and as many bytes between tokens as put
// neighbours into other banks; behind the last one a block of zeros.
__host__ __device__ constexpr int staged_row(int blocks) { return blocks * kBlock + 8; }
__host__ __device__ constexpr int staged_bytes(int tokens, int blocks) {
  return 2 * (tokens * staged_row(blocks) + kBlock);
}

// What a lane holds of a block for one row: its codes, and the row's scale and zero point, 0 to 127.
template <typename S>
struct Row {
  uint4 codes;
  S scale;
  int8_t zero;
};

// The inputs of a lane's tokens: in shared memory, or where they came from.
template <typename T, int TOKEN_TILES>
struct Staged {
  T const* at[TOKEN_TILES];
  int step[TOKEN_TILES];  // 0 in the zeros, which a lane without a token reads

  // Copies tokens at x_of(0) .. x_of(tokens - 1), [k] each; null is a token of zeros.
  template <typename Of>
  __device__ Staged(T* shared, int tokens, int k, int blocks, Of x_of) {
    int const group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4, vectors = blocks * kBlock / 8;
    T* const zeros = shared + tokens * staged_row(blocks);
    for (int token = 0; token < tokens; ++token) {
      T const* const x = x_of(token);
      for (int i = threadIdx.x; i < vectors; i += kThreads) {
        uint4 const v = x != nullptr && 8 * i < k ? *reinterpret_cast<uint4 const*>(x + 8 * i) : uint4{0, 0, 0, 0};
        *reinterpret_cast<uint4*>(shared + token * staged_row(blocks) + 8 * i) = in_order(v);
      }
    }
    if (threadIdx.x < kBlock / 8) *reinterpret_cast<uint4*>(zeros + 8 * threadIdx.x) = uint4{0, 0, 0, 0};
    __syncthreads();
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
      bool const there = 8 * j + group < tokens;
      at[j] = (there ? shared + (8 * j + group) * staged_row(blocks) : zeros) + 16 * quad;
      step[j] = there ? kBlock : 0;
    }
  }
  __device__ uint4 read(int j, int block, int h) const {
    return *reinterpret_cast<uint4 const*>(at[j] + block * step[j] + 64 * (h / 2) + 8 * (h % 2));
  }
};

template <typename T, int TOKEN_TILES>
struct Direct {
  T const* at[TOKEN_TILES];
  int k;

  template <typename Of>
  __device__ Direct(T*, int tokens, int k, int, Of x_of) : k(k) {
    int const group = threadIdx.x % 32 / 4;
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) at[j] = 8 * j + group < tokens ? x_of(8 * j + group) : nullptr;
  }
  __device__ uint4 read(int j, int block, int h) const {
    int const first = block * kBlock + 16 * int(threadIdx.x % 4) + 64 * (h / 2) + 8 * (h % 2);
    return at[j] != nullptr && first < k ? in_order(*reinterpret_cast<uint4 const*>(at[j] + first)) : uint4{0, 0, 0, 0};
  }
};

// Adds this warp's part of 16 outputs from `row0` on. `start` runs after the first weights are on their way and gives the
// inputs. kAhead blocks of a warp are always on their way, as many as registers allow: what is used is asked for anew at
// once.
template <typename T, typename S, int TOKEN_TILES, typename Start>
__device__ inline void accumulate(Matrix const& w, int row0, float (&total)[TOKEN_TILES][4], Start start) {
  constexpr int kAhead = TOKEN_TILES == 1 ? 4 : 2;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  // Rows are padded to the strip, scales are not. The second of a lane's rows lies 8 further, in the same strip.
  int const row = row0 + group;
  uint8_t const* const codes = w.codes + int64_t(row / kStrip) * w.blocks * kStripBytes + row % kStrip * (kBlock / 2) +
                               16 * quad;
  int const scale_of[2] = {min(row, w.n - 1), min(row + 8, w.n - 1)};
  Row<S> held[kAhead][2];
  auto fetch = [&](int u, int block) {
    if (block >= w.blocks) return;
    int const table = (block * w.inverse_group >> kInverseBits) * w.n;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Row<S>& r = held[u][i];
      r.codes = nybble::read_once(codes + block * kStripBytes + i * (8 * kBlock / 2));
      r.scale = static_cast<S const*>(w.scales)[table + scale_of[i]];
      r.zero = w.zeros == nullptr ? int8_t(w.zero) : w.zeros[table + scale_of[i]];
    }
  };

#pragma unroll
  for (int u = 0; u < kAhead; ++u) fetch(u, warp + u * kWarps);
  auto const inputs = start();
  for (int first = warp; first < w.blocks; first += kAhead * kWarps) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      int const block = first + u * kWarps;
      if (block >= w.blocks) break;  // all of a warp
      Row<S> const &low = held[u][0], &high = held[u][1];
      uint32_t const offsets[2] = {Type<T>::kMagic + uint32_t(low.zero) * 0x00010001u,
                                   Type<T>::kMagic + uint32_t(high.zero) * 0x00010001u};
      uint32_t const words[2][4] = {{low.codes.x, low.codes.y, low.codes.z, low.codes.w},
                                    {high.codes.x, high.codes.y, high.codes.z, high.codes.w}};
      float part[TOKEN_TILES][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // the low codes of a byte are of other inputs than the high ones
#pragma unroll
        for (int two = 0; two < 2; ++two) {
          uint4 x[TOKEN_TILES];
#pragma unroll
          for (int j = 0; j < TOKEN_TILES; ++j) x[j] = inputs.read(j, block, 2 * half + two);
#pragma unroll
          for (int i4 = 2 * two; i4 < 2 * two + 2; ++i4) {
            uint32_t const a[4] = {unpack<T>(words[0][i4], 4 * half, offsets[0]),
                                   unpack<T>(words[1][i4], 4 * half, offsets[1]),
                                   unpack<T>(words[0][i4], 4 * half + 8, offsets[0]),
                                   unpack<T>(words[1][i4], 4 * half + 8, offsets[1])};
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; ++j)
              mma<T>(part[j], a, i4 % 2 ? x[j].z : x[j].x, i4 % 2 ? x[j].w : x[j].y);
          }
        }
      }
      float const s0 = widen(low.scale), s1 = widen(high.scale);
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
        total[j][0] += part[j][0] * s0, total[j][1] += part[j][1] * s0;
        total[j][2] += part[j][2] * s1, total[j][3] += part[j][3] * s1;
      }
      fetch(u, block + kAhead * kWarps);
    }
  }
}

template <int TOKENS>
using Sums = float[kWarps][kRows][TOKENS + 1];

template <int TOKEN_TILES>
__device__ inline void share(float const (&total)[TOKEN_TILES][4], Sums<8 * TOKEN_TILES>& sums) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[warp][group + 8 * (c / 2)][8 * j + 2 * quad + c % 2] = total[j][c];
}

template <int TOKENS>
__device__ inline float added(Sums<TOKENS> const& sums, int row, int token) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += sums[i][row][token];
  return sum;
}

template <typename T, typename S, int TOKEN_TILES, template <typename, int> typename Inputs>
__global__ void __launch_bounds__(kThreads, 2) few_rows(Dense p) {
  constexpr int kTokens = 8 * TOKEN_TILES;
  extern __shared__ uint4 shared[];
  __shared__ Sums<kTokens> sums;
  int const row0 = blockIdx.x * kRows;
  float total[TOKEN_TILES][4] = {};
  accumulate<T, S, TOKEN_TILES>(p.w, row0, total, [&] {
    nybble::wait_for_inputs();
    return Inputs<T, TOKEN_TILES>(reinterpret_cast<T*>(shared), p.m, p.w.k, p.w.blocks, [&](int token) {
      return static_cast<T const*>(p.x) + int64_t(token) * p.w.k;
    });
  });
  share<TOKEN_TILES>(total, sums);
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kTokens; at += kThreads) {
    int const token = at / kRows, r = at % kRows, row = row0 + r;
    if (token >= p.m || row >= p.w.n) continue;
    float sum = added<kTokens>(sums, r, token);
    if (p.bias != nullptr) sum += widen(static_cast<T const*>(p.bias)[row]);
    static_cast<T*>(p.out)[int64_t(token) * p.w.n + row] = Type<T>::narrow(sum);
  }
}

// Block (., t): 16 outputs of the slots of tile t; with `up`, silu of the product times the same with `up`.
template <typename T, typename S, int TOKEN_TILES, template <typename, int> typename Inputs>
__global__ void __launch_bounds__(kThreads, 2) few_rows_of_experts(Experts p) {
  constexpr int kTokens = 8 * TOKEN_TILES;
  extern __shared__ uint4 shared[];
  __shared__ Sums<kTokens> sums, up_sums;
  int const row0 = blockIdx.x * kRows;
  nybble::wait_for_inputs();  // the routing decides which weights are read
  int const expert = p.tiles[blockIdx.y];
  if (expert < 0) return;
  int const* slots = p.slots + int64_t(blockIdx.y) * kTokens;
  bool const gated = p.up.codes != nullptr;
  auto inputs = [&] {
    return Inputs<T, TOKEN_TILES>(reinterpret_cast<T*>(shared), p.most, p.w.k, p.w.blocks, [&](int token) {
      int const slot = slots[token];
      return slot >= 0 ? static_cast<T const*>(p.x) + int64_t(slot / p.rows_per_slot) * p.w.k : nullptr;
    });
  };
  auto of_expert = [&](Matrix w) {
    w.codes += expert * p.code_bytes;
    w.scales = static_cast<S const*>(w.scales) + expert * p.table;
    if (w.zeros != nullptr) w.zeros += expert * p.table;
    return w;
  };
  float total[TOKEN_TILES][4] = {};
  auto const x = inputs();
  accumulate<T, S, TOKEN_TILES>(of_expert(p.w), row0, total, [&] { return x; });
  share<TOKEN_TILES>(total, sums);
  if (gated) {
    float up_total[TOKEN_TILES][4] = {};
    accumulate<T, S, TOKEN_TILES>(of_expert(p.up), row0, up_total, [&] { return x; });
    share<TOKEN_TILES>(up_total, up_sums);
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kTokens; at += kThreads) {
    int const token = at / kRows, r = at % kRows, row = row0 + r, slot = slots[token];
    if (slot < 0 || row >= p.w.n) continue;
    float value = added<kTokens>(sums, r, token);
    if (gated) value = value / (1.0f + __expf(-value)) * added<kTokens>(up_sums, r, token);
    static_cast<T*>(p.out)[int64_t(slot) * p.w.n + row] = Type<T>::narrow(value);
  }
}

// Tokens up to which inputs go through shared memory: every block of threads puts all of them there. On an H100, 28672
// outputs of 4096 inputs: one token 26.5 us, read where it is 33.6; two 27.5 and 32.7; eight 56 and 33. And their bytes:
// with the sums beside them less than the 99 KiB that a block has on the smallest of devices.
constexpr int kStagedTokens = 2, kStagedBytes = 80 * 1024;
static_assert(kStagedBytes + 2 * sizeof(Sums<8>) <= 99 * 1024);

// The launch with inputs in shared memory where that is better, else the one that reads them where they are.
template <typename Args>
cudaError_t launch(void (*staged)(Args), void (*direct)(Args), Args const& args, dim3 grid, int tokens, int blocks,
                   cudaStream_t stream) {
  int const bytes = staged_bytes(tokens, blocks);
  if (tokens > kStagedTokens || bytes > kStagedBytes)
    return nybble::launch_early(direct, args, grid, kThreads, stream);
  cudaError_t const error = cudaFuncSetAttribute(staged, cudaFuncAttributeMaxDynamicSharedMemorySize, kStagedBytes);
  return error == cudaSuccess ? nybble::launch_early(staged, args, grid, kThreads, stream, bytes) : error;
}

template <typename T, typename S>
cudaError_t dense(Dense const& args, cudaStream_t stream) {
  dim3 const grid((args.w.n + kRows - 1) / kRows);
  if (args.m <= 8)
    return launch(few_rows<T, S, 1, Staged>, few_rows<T, S, 1, Direct>, args, grid, args.m, args.w.blocks, stream);
  return nybble::launch_early(few_rows<T, S, 2, Direct>, args, grid, kThreads, stream);
}

template <typename T>
cudaError_t dense(Dense const& args, int scale_type, cudaStream_t stream) {
  if (scale_type == 0) return dense<T, float>(args, stream);
  return scale_type == 1 ? dense<T, __half>(args, stream) : dense<T, __nv_bfloat16>(args, stream);
}

template <typename T, typename S>
cudaError_t experts(Experts const& args, dim3 grid, int tile_slots, cudaStream_t stream) {
  if (tile_slots == 8)
    return launch(few_rows_of_experts<T, S, 1, Staged>, few_rows_of_experts<T, S, 1, Direct>, args, grid, args.most,
                  args.w.blocks, stream);
  return nybble::launch_early(few_rows_of_experts<T, S, 2, Direct>, args, grid, kThreads, stream);
}

template <typename T>
cudaError_t experts(Experts const& args, dim3 grid, int tile_slots, int scale_type, cudaStream_t stream) {
  if (scale_type == 0) return experts<T, float>(args, grid, tile_slots, stream);
  return scale_type == 1 ? experts<T, __half>(args, grid, tile_slots, stream)
                         : experts<T, __nv_bfloat16>(args, grid, tile_slots, stream);
}

// The matrix; a block of inputs has the scales of group block * inverse >> kInverseBits.
Matrix matrix(void const* codes, void const* scales, void const* zeros, int n, int k, int blocks, int blocks_per_group,
              int zero) {
  int const each = blocks_per_group > 0 ? blocks_per_group : blocks;
  return {static_cast<uint8_t const*>(codes), scales, static_cast<int8_t const*>(zeros), n, k, blocks,
          ((1 << kInverseBits) + each - 1) / each, zero};
}

// Inverses are exact for up to 1024 blocks.
bool built_for(int k, int blocks, void const* x, void const* codes) {
  auto at16 = [](void const* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return k > 0 && k % 16 == 0 && blocks == (k + kBlock - 1) / kBlock && blocks <= 1024 && at16(x) && at16(codes);
}

}  // namespace

// out [m, n] = x [m, k] W^T + bias [n or null] for up to 16 tokens, x and out float16 if `half`, else bfloat16. Codes and
// scales as above, `scale_type` 0 float32, 1 float16, 2 bfloat16; `blocks_per_group` 0: one group. k is a multiple of 16,
// 131072 at most.
extern "C" int nybble_w4_few_rows(void* out, void const* x, void const* codes, void const* scales, void const* zeros,
                                  void const* bias, int m, int n, int k, int blocks, int blocks_per_group, int zero,
                                  int half, int scale_type, cudaStream_t stream) {
  if (m > 16 || !built_for(k, blocks, x, codes)) return -1;
  if (m == 0 || n == 0) return 0;
  Dense args{matrix(codes, scales, zeros, n, k, blocks, blocks_per_group, zero), out, x, bias, m};
  return half ? dense<__half>(args, scale_type, stream) : dense<__nv_bfloat16>(args, scale_type, stream);
}

// out [slots, n] = x [., k] at row slot / rows_per_slot times the matrix of the slot's expert, for `tiles` tiles of
// `tile_slots` slots each, 8 or 16, of which the first `most` at most are not padding; with `up_codes`, silu of that times
// the same product with `up`. Experts' codes lie `code_bytes` apart, their scales and zeros `table` values.
extern "C" int nybble_w4_experts(void* out, void const* x, int const* slots, int const* tile_experts, void const* codes,
                                 void const* scales, void const* zeros, void const* up_codes, void const* up_scales,
                                 void const* up_zeros, int tiles, int tile_slots, int most, int rows_per_slot, int n,
                                 int k, int blocks, int blocks_per_group, int zero, int64_t code_bytes, int64_t table,
                                 int half, int scale_type, cudaStream_t stream) {
  if (!built_for(k, blocks, x, codes) || (tile_slots != 8 && tile_slots != 16) || most > tile_slots) return -1;
  if (tiles == 0 || n == 0) return 0;
  Matrix const w = matrix(codes, scales, zeros, n, k, blocks, blocks_per_group, zero);
  Matrix const up = matrix(up_codes, up_scales, up_zeros, n, k, blocks, blocks_per_group, zero);
  Experts args{w, up, out, x, slots, tile_experts, code_bytes, table, rows_per_slot, most};
  dim3 const grid((n + kRows - 1) / kRows, tiles);
  return half ? experts<__half>(args, grid, tile_slots, scale_type, stream)
              : experts<__nv_bfloat16>(args, grid, tile_slots, scale_type, stream);
}
