// 4-bit weights by 16-bit inputs for a few tokens, on the layout that the Triton kernel multiplies from (`PackedCodes`):
// bytes [ceil(N / 64), blocks, 64, 64], byte j of a block of 128 inputs holding the codes of inputs j and j + 64.
//
// Bound by reading the weights, so every warp reads its own part of them once, 16 bytes a lane, and unpacks them into the
// left fragments of mma.m16n8k16: a code under the exponent of 128 (bfloat16; 1024 in float16) is that number plus the
// code, and subtracting it plus the zero point is exact. The order of inputs inside a block is any, as long as weights
// and tokens agree on it. A block has one scale for each output, which multiplies its float32 sum.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"

namespace {

constexpr int kWarps = 8, kBlock = 128, kStrip = 64, kUnroll = 2;

// One matrix [n, k] as it is stored.
struct Matrix {
  uint8_t const* codes;
  void const* scales;   // [groups, n] of the type S
  int8_t const* zeros;  // [groups, n], or null: `zero`
  int n, k, blocks, blocks_per_group, zero;
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
  int const* slots;  // [tiles, 16], -1 where a tile is padded
  int const* tiles;  // the expert of each, -1 for none
  int64_t code_bytes, table;
  int rows_per_slot;
};

template <typename T>
struct Type;
template <>
struct Type<__half> {
  static constexpr uint32_t kMagic = 0x64006400;
  using Pair = __half2;
  static __device__ __half narrow(float v) { return __float2half_rn(v); }
  static __device__ float widen(__half v) { return __half2float(v); }
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr uint32_t kMagic = 0x43004300;
  using Pair = __nv_bfloat162;
  static __device__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
  static __device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
};

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

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

// Two codes of a word, at bits `shift` and `shift` + 16, less the zero point that `offset` holds twice under the magic.
template <typename T>
__device__ inline uint32_t unpack(uint32_t word, int shift, uint32_t offset) {
  using Pair = typename Type<T>::Pair;
  uint32_t const raised = ((word >> shift) & 0x000F000Fu) | Type<T>::kMagic;
  Pair const exact = __hsub2(*reinterpret_cast<Pair const*>(&raised), *reinterpret_cast<Pair const*>(&offset));
  return *reinterpret_cast<uint32_t const*>(&exact);
}

// What a lane holds of a block for one row: its codes, and the row's scale and zero point.
template <typename S>
struct Row {
  uint4 codes;
  S scale;
  int8_t zero;
};

// Adds this warp's part of 16 ROW_TILES outputs from `row0` on. x[j]: the inputs of the lane's token of tile j, or null.
// `start` runs after the first weights are on their way and before the first input is read.
template <typename T, typename S, int ROW_TILES, int TOKEN_TILES, typename Start>
__device__ inline void accumulate(Matrix const& w, int row0, T const* const (&x_of)[TOKEN_TILES],
                                  float (&total)[ROW_TILES][TOKEN_TILES][4], Start start) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  S const* scales = static_cast<S const*>(w.scales);
  // Where a row begins: a step from block to block is then one addition. Rows are padded to the strip, scales are not.
  uint8_t const* codes_of[2 * ROW_TILES];
  int scale_of[2 * ROW_TILES];
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; ++i) {
    int const row = row0 + 8 * i + group;
    codes_of[i] = w.codes + (int64_t(row / kStrip) * w.blocks * kStrip + row % kStrip) * (kBlock / 2) + 16 * quad;
    scale_of[i] = min(row, w.n - 1);
  }
  Row<S> ahead[kUnroll][2 * ROW_TILES];
  auto fetch = [&](int block) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int const b = min(block + u * kWarps, w.blocks - 1);  // one too many meets inputs of 0
      int const of_group = (w.blocks_per_group == 1 ? b : w.blocks_per_group > 0 ? b / w.blocks_per_group : 0) * w.n;
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; ++i) {
        Row<S>& r = ahead[u][i];
        r.codes = nybble::read_once(codes_of[i] + int64_t(b) * (kStrip * kBlock / 2));
        r.scale = scales[of_group + scale_of[i]];
        r.zero = w.zeros == nullptr ? int8_t(w.zero) : w.zeros[of_group + scale_of[i]];
      }
    }
  };

  fetch(warp);
  start();
  for (int block = warp; block < w.blocks; block += kUnroll * kWarps) {
    Row<S> now[kUnroll][2 * ROW_TILES];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; ++i) now[u][i] = ahead[u][i];
    if (block + kUnroll * kWarps < w.blocks) fetch(block + kUnroll * kWarps);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int const first = (block + u * kWarps) * kBlock + 16 * quad;
      // Inputs first .. + 15 under the low halves of the lane's bytes, first + 64 .. + 79 under the high ones.
      uint4 x[TOKEN_TILES][4];
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          int const at = first + 64 * (h / 2) + 8 * (h % 2);
          x[j][h] = x_of[j] != nullptr && at < w.k ? *reinterpret_cast<uint4 const*>(x_of[j] + at) : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) {
        Row<S> const &low = now[u][2 * i], &high = now[u][2 * i + 1];
        uint32_t const offsets[2] = {Type<T>::kMagic + uint32_t(low.zero) * 0x00010001u,
                                     Type<T>::kMagic + uint32_t(high.zero) * 0x00010001u};
        uint32_t const words[2][4] = {{low.codes.x, low.codes.y, low.codes.z, low.codes.w},
                                      {high.codes.x, high.codes.y, high.codes.z, high.codes.w}};
        float part[TOKEN_TILES][4] = {};
#pragma unroll
        for (int i4 = 0; i4 < 4; ++i4) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // the low codes of a byte, then the high ones
            uint32_t const a[4] = {unpack<T>(words[0][i4], 4 * half, offsets[0]),
                                   unpack<T>(words[1][i4], 4 * half, offsets[1]),
                                   unpack<T>(words[0][i4], 4 * half + 8, offsets[0]),
                                   unpack<T>(words[1][i4], 4 * half + 8, offsets[1])};
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; ++j) {
              uint4 const& held = x[j][2 * half + i4 / 2];
              uint32_t const one = i4 % 2 ? held.z : held.x, two = i4 % 2 ? held.w : held.y;
              // Bytes 0 and 2 of a word come first, then 1 and 3: so do the inputs.
              mma<T>(part[j], a, __byte_perm(one, two, 0x5410), __byte_perm(one, two, 0x7632));
            }
          }
        }
        float const s0 = widen(low.scale), s1 = widen(high.scale);
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j) {
          total[i][j][0] += part[j][0] * s0, total[i][j][1] += part[j][1] * s0;
          total[i][j][2] += part[j][2] * s1, total[i][j][3] += part[j][3] * s1;
        }
      }
    }
  }
}

template <int ROWS, int TOKENS>
using Sums = float[kWarps][ROWS][TOKENS + 1];

template <int ROW_TILES, int TOKEN_TILES>
__device__ inline void share(float const (&total)[ROW_TILES][TOKEN_TILES][4],
                             Sums<16 * ROW_TILES, 8 * TOKEN_TILES>& sums) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[warp][16 * i + group + 8 * (c / 2)][8 * j + 2 * quad + c % 2] = total[i][j][c];
}

template <int ROWS, int TOKENS>
__device__ inline float added(Sums<ROWS, TOKENS> const& sums, int row, int token) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += sums[i][row][token];
  return sum;
}

template <typename T, typename S, int ROW_TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(32 * kWarps) few_rows(Dense p) {
  constexpr int kRows = 16 * ROW_TILES, kTokens = 8 * TOKEN_TILES;
  __shared__ Sums<kRows, kTokens> sums;
  int const group = threadIdx.x % 32 / 4, row0 = blockIdx.x * kRows;
  T const* x_of[TOKEN_TILES];
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; ++j)
    x_of[j] = 8 * j + group < p.m ? static_cast<T const*>(p.x) + int64_t(8 * j + group) * p.w.k : nullptr;
  float total[ROW_TILES][TOKEN_TILES][4] = {};
  accumulate<T, S, ROW_TILES, TOKEN_TILES>(p.w, row0, x_of, total, nybble::wait_for_inputs);
  share<ROW_TILES, TOKEN_TILES>(total, sums);
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kTokens; at += 32 * kWarps) {
    int const token = at / kRows, r = at % kRows, row = row0 + r;
    if (token >= p.m || row >= p.w.n) continue;
    float sum = added<kRows, kTokens>(sums, r, token);
    if (p.bias != nullptr) sum += widen(static_cast<T const*>(p.bias)[row]);
    static_cast<T*>(p.out)[int64_t(token) * p.w.n + row] = Type<T>::narrow(sum);
  }
}

// Block (., t): 16 outputs of the slots of tile t; with `up`, silu of the product times the same with `up`.
template <typename T, typename S>
__global__ void __launch_bounds__(32 * kWarps) few_rows_of_experts(Experts p) {
  constexpr int kRows = 16, kTokens = 16, kTiles = kTokens / 8;
  __shared__ Sums<kRows, kTokens> sums, up_sums;
  int const group = threadIdx.x % 32 / 4, row0 = blockIdx.x * kRows;
  nybble::wait_for_inputs();  // the routing decides which weights are read
  int const expert = p.tiles[blockIdx.y];
  if (expert < 0) return;
  int const* slots = p.slots + int64_t(blockIdx.y) * kTokens;
  bool const gated = p.up.codes != nullptr;
  T const* x_of[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    int const slot = slots[8 * j + group];
    x_of[j] = slot >= 0 ? static_cast<T const*>(p.x) + int64_t(slot / p.rows_per_slot) * p.w.k : nullptr;
  }
  auto of_expert = [&](Matrix w) {
    w.codes += expert * p.code_bytes;
    w.scales = static_cast<S const*>(w.scales) + expert * p.table;
    if (w.zeros != nullptr) w.zeros += expert * p.table;
    return w;
  };
  auto product = [&](Matrix const& w, Sums<kRows, kTokens>& to) {
    float total[1][kTiles][4] = {};
    accumulate<T, S, 1, kTiles>(of_expert(w), row0, x_of, total, [] {});
    share<1, kTiles>(total, to);
  };
  product(p.w, sums);
  if (gated) product(p.up, up_sums);
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kTokens; at += 32 * kWarps) {
    int const token = at / kRows, r = at % kRows, row = row0 + r, slot = slots[token];
    if (slot < 0 || row >= p.w.n) continue;
    float value = added<kRows, kTokens>(sums, r, token);
    if (gated) value = value / (1.0f + __expf(-value)) * added<kRows, kTokens>(up_sums, r, token);
    static_cast<T*>(p.out)[int64_t(slot) * p.w.n + row] = Type<T>::narrow(value);
  }
}

template <typename T, typename S>
cudaError_t dense(Dense const& args, cudaStream_t stream) {
  dim3 const grid((args.w.n + 15) / 16);
  if (args.m <= 8) return nybble::launch_early(few_rows<T, S, 1, 1>, args, grid, 32 * kWarps, stream);
  return nybble::launch_early(few_rows<T, S, 1, 2>, args, grid, 32 * kWarps, stream);
}

template <typename T>
cudaError_t dense(Dense const& args, int scale_type, cudaStream_t stream) {
  if (scale_type == 0) return dense<T, float>(args, stream);
  return scale_type == 1 ? dense<T, __half>(args, stream) : dense<T, __nv_bfloat16>(args, stream);
}

template <typename T>
cudaError_t experts(Experts const& args, dim3 grid, int scale_type, cudaStream_t stream) {
  auto run = [&](void (*kernel)(Experts)) { return nybble::launch_early(kernel, args, grid, 32 * kWarps, stream); };
  if (scale_type == 0) return run(few_rows_of_experts<T, float>);
  return run(scale_type == 1 ? few_rows_of_experts<T, __half> : few_rows_of_experts<T, __nv_bfloat16>);
}

bool built_for(int k, int blocks, void const* x, void const* codes) {
  auto at16 = [](void const* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return k > 0 && k % 16 == 0 && blocks == (k + kBlock - 1) / kBlock && at16(x) && at16(codes);
}

}  // namespace

// out [m, n] = x [m, k] W^T + bias [n or null] for up to 16 tokens, x and out float16 if `half`, else bfloat16. Codes and
// scales as above, `scale_type` 0 float32, 1 float16, 2 bfloat16; `blocks_per_group` 0: one group. k is a multiple of 16.
extern "C" int nybble_w4_few_rows(void* out, void const* x, void const* codes, void const* scales, void const* zeros,
                                  void const* bias, int m, int n, int k, int blocks, int blocks_per_group, int zero,
                                  int half, int scale_type, cudaStream_t stream) {
  if (m > 16 || !built_for(k, blocks, x, codes)) return -1;
  if (m == 0 || n == 0) return 0;
  Matrix w{static_cast<uint8_t const*>(codes), scales, static_cast<int8_t const*>(zeros), n, k, blocks, blocks_per_group,
           zero};
  Dense args{w, out, x, bias, m};
  return half ? dense<__half>(args, scale_type, stream) : dense<__nv_bfloat16>(args, scale_type, stream);
}

// out [slots, n] = x [., k] at row slot / rows_per_slot times the matrix of the slot's expert, for `tiles` tiles of 16
// slots each; with `up_codes`, silu of that times the same product with `up`. Experts' codes lie `code_bytes` apart, their
// scales and zeros `table` values.
extern "C" int nybble_w4_experts(void* out, void const* x, int const* slots, int const* tile_experts, void const* codes,
                                 void const* scales, void const* zeros, void const* up_codes, void const* up_scales,
                                 void const* up_zeros, int tiles, int rows_per_slot, int n, int k, int blocks,
                                 int blocks_per_group, int zero, int64_t code_bytes, int64_t table, int half,
                                 int scale_type, cudaStream_t stream) {
  if (!built_for(k, blocks, x, codes)) return -1;
  if (tiles == 0 || n == 0) return 0;
  Matrix w{static_cast<uint8_t const*>(codes), scales, static_cast<int8_t const*>(zeros), n, k, blocks, blocks_per_group,
           zero};
  Matrix up = w;
  up.codes = static_cast<uint8_t const*>(up_codes), up.scales = up_scales;
  up.zeros = static_cast<int8_t const*>(up_zeros);
  Experts args{w, up, out, x, slots, tile_experts, code_bytes, table, rows_per_slot};
  dim3 const grid((n + 15) / 16, tiles);
  return half ? experts<__half>(args, grid, scale_type, stream)
              : experts<__nv_bfloat16>(args, grid, scale_type, stream);
}
