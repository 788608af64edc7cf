// 4-bit weights by 16-bit inputs for some to some hundred tokens, on Hopper, on the layout that the Triton kernel multiplies
// from (`PackedCodes`): bytes [ceil(N / 64), blocks, 64, 64], byte j of a block of 128 inputs holding the codes of inputs j
// and j + 64.
//
// Bound by memory first and by the tensor cores later, if nothing waits: one warp has codes and tokens copied some blocks
// ahead, groups of four warps unpack 64 outputs' codes of a block into the left operand of wgmma, whose right one, the
// tokens, lies in shared memory. Outputs are wgmma's rows, so that codes go from registers to the tensor cores. Codes less
// their zero points are exact; a block has one scale for each output, which multiplies its float32 sum.
//
// More outputs share a copy of the tokens than one group has: the second-level cache gives tokens no faster than memory
// gives codes. Where outputs are few, the blocks of a cluster share them, each with a part of the inputs, and add up from
// each other's shared memory.
#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.cuh"
#include "../wgmma.cuh"
#include "unpack.cuh"

namespace {

using namespace nybble;

constexpr int kBlock = 128, kStrip = 64, kStripBytes = kStrip * kBlock / 2;
constexpr int kSharedBytes = 220 * 1024, kMostStages = 8;

struct Args {
  CUtensorMap codes, x;  // of codes a strip's block, of x [m, k] a tile's tokens, 64 inputs wide
  void* out;             // [m, n]
  void const* scales;    // [groups, n] of the type S
  int8_t const* zeros;   // [groups, n], or null: `zero`
  void const* bias;      // [n], or null
  int m, n, blocks, blocks_each, inverse_group, zero, token_tiles, splits;
};

// TOKENS by 64 GROUPS outputs of a block of threads: of the last group one thread copies, the others multiply.
template <int TOKENS, int GROUPS>
struct Tile {
  static constexpr int kStageBytes = GROUPS * kStripBytes + TOKENS * kBlock * 2;
  static constexpr int kStages = kSharedBytes / kStageBytes < kMostStages ? kSharedBytes / kStageBytes : kMostStages;
  static constexpr int kThreads = 128 * (GROUPS + 1), kCopies = 24, kMultiplies = GROUPS == 2 ? 240 : 112;  // registers
  // Blocks whose scales are on their way: a block takes less time than they do.
  static constexpr int kTablesAhead = TOKENS == 32 ? 3 : TOKENS == 64 ? 1 : 2;
  static_assert(registers_suffice(kThreads, 128 * (kCopies + GROUPS * kMultiplies)));

  struct alignas(1024) Stages {
    uint8_t x[kStages][2 * TOKENS * 128];  // two panels of rows of 64 inputs
    uint8_t codes[kStages][GROUPS][kStripBytes];
  };
  struct Shared {
    union {
      Stages in;
      float sums[TOKENS][64 * GROUPS + 4];  // padded, so that a warp's values lie in different banks
    };
    uint64_t full[kStages], empty[kStages];
  };
};

// Which tile and which of its blocks a block of threads has.
struct Place {
  int strip, token, first, last;

  __device__ Place(Args const& a, int tokens, int groups)
      : strip(blockIdx.x / a.splits / a.token_tiles * groups), token(blockIdx.x / a.splits % a.token_tiles * tokens),
        first(blockIdx.x % a.splits * a.blocks_each), last(min(first + a.blocks_each, a.blocks)) {}
};

template <int TOKENS, int GROUPS>
__device__ void produce(Args const& a, typename Tile<TOKENS, GROUPS>::Shared& s, Place const& p) {
  using Of = Tile<TOKENS, GROUPS>;
  auto codes = [&](int block, int stage) {
    expect_bytes(&s.full[stage], Of::kStageBytes);
    for (int g = 0; g < GROUPS; ++g)
      copy_box(s.in.codes[stage][g], &a.codes, 0, 0, ((p.strip + g) * a.blocks + block) * kStrip, &s.full[stage]);
  };
  auto tokens = [&](int block, int stage) {
    for (int panel = 0; panel < 2; ++panel)
      copy_box(s.in.x[stage] + panel * TOKENS * 128, &a.x, block * kBlock + panel * 64, 0, p.token, &s.full[stage]);
  };
  // Weights are there before the kernel that makes the tokens has ended.
  int const ahead = min(p.last - p.first, Of::kStages);
  for (int i = 0; i < ahead; ++i) codes(p.first + i, i);
  wait_for_inputs();
  for (int i = 0; i < ahead; ++i) tokens(p.first + i, i);
  for (int i = ahead; i < p.last - p.first; ++i) {
    int const stage = i % Of::kStages;
    wait(&s.empty[stage], i / Of::kStages & 1 ^ 1);
    codes(p.first + i, stage);
    tokens(p.first + i, stage);
  }
}

// A scale and a zero point for each of a thread's two rows.
template <typename S>
struct Table {
  S scale[2];
  int8_t zero[2];

  __device__ void read(Args const& a, int const (&row)[2], int block, int last) {
    if (block >= last) return;
    int const group = (block * a.inverse_group >> kInverseBits) * a.n;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = static_cast<S const*>(a.scales)[uint32_t(group + row[i])];
      zero[i] = a.zeros == nullptr ? int8_t(a.zero) : a.zeros[uint32_t(group + row[i])];
    }
  }
};

// The codes of a block for the rows `row` and row + 8 of a strip: a chunk of 16 bytes has those of two steps of 16 inputs,
// and the four lanes that read it take two bytes of each eight, as bytes 0 and 2 of a word.
__device__ inline void read_codes(uint32_t codes, int row, uint32_t (&words)[16]) {
  uint32_t const lane = threadIdx.x % 4, chosen = 2 * lane | (2 * lane + 1) << 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      uint4 const held = read_shared(codes + (row + 8 * i) * 64 + ((chunk ^ row / 2) % 4) * 16);
      words[4 * chunk + i] = __byte_perm(held.x, held.y, chosen);
      words[4 * chunk + 2 + i] = __byte_perm(held.z, held.w, chosen);
    }
  }
}

// Leaves this block's sums where the cluster finds them.
template <int TOKENS, int GROUPS>
__device__ void share(typename Tile<TOKENS, GROUPS>::Shared& s, int row, float const (&sums)[TOKENS / 2]) {
  sync_at(1, 128 * GROUPS);  // all have read what lies there
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i)
    s.sums[i / 4 * 8 + 2 * (threadIdx.x % 4) + i % 2][row + i / 2 % 2 * 8] = sums[i];
}

// Adds up what the cluster's blocks have and writes every splits-th run of it.
template <typename T, int TOKENS, int GROUPS>
__device__ void store(Args const& a, typename Tile<TOKENS, GROUPS>::Shared& s, Place const& p) {
  constexpr int kOutputs = 64 * GROUPS, kThreads = Tile<TOKENS, GROUPS>::kThreads;
  auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  for (int at = cluster.block_rank() * kThreads + threadIdx.x; at < TOKENS * kOutputs; at += a.splits * kThreads) {
    int const token = p.token + at / kOutputs, output = p.strip * kStrip + at % kOutputs;
    if (token >= a.m || output >= a.n) continue;
    float sum = a.bias == nullptr ? 0.0f : widen(static_cast<T const*>(a.bias)[output]);
    float const* const mine = &s.sums[at / kOutputs][at % kOutputs];
#pragma unroll 8
    for (int split = 0; split < a.splits; ++split) sum += *cluster.map_shared_rank(mine, split);
    static_cast<T*>(a.out)[int64_t(token) * a.n + output] = Type<T>::narrow(sum);
  }
  cluster.sync();  // nobody's shared memory goes while another block reads it
}

template <typename T, typename S, int TOKENS, int GROUPS>
__device__ void consume(Args const& a, typename Tile<TOKENS, GROUPS>::Shared& s, Place const& p) {
  using Of = Tile<TOKENS, GROUPS>;
  constexpr int kValues = TOKENS / 2, kAhead = Of::kTablesAhead;
  int const group = threadIdx.x / 128, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  int const output = (p.strip + group) * kStrip + row;
  int const known[2] = {min(output, a.n - 1), min(output + 8, a.n - 1)};  // rows are padded to strips, scales are not
  float sums[kValues], part[kValues];
  uint32_t weights[32];
  Table<S> held[kAhead];
#pragma unroll
  for (float& sum : sums) sum = 0;
#pragma unroll
  for (int u = 0; u < kAhead; ++u) held[u].read(a, known, p.first + u, p.last);
  int stage = 0, round = 0;
  for (int first = p.first; first < p.last; first += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      int const block = first + u;
      if (block >= p.last) break;
      uint32_t const offsets[2] = {Type<T>::kMagic + uint32_t(held[u].zero[0]) * 0x00010001u,
                                   Type<T>::kMagic + uint32_t(held[u].zero[1]) * 0x00010001u};
      float const scale[2] = {widen(held[u].scale[0]), widen(held[u].scale[1])};
      held[u].read(a, known, block + kAhead, p.last);
      wait(&s.full[stage], round);
      uint32_t words[16];
      read_codes(shared_address(s.in.codes[stage][group]), row, words);
      uint32_t const x = shared_address(s.in.x[stage]);
#pragma unroll
      for (int i = 0; i < 32; ++i) weights[i] = unpack<T>(words[i % 16], i / 16 * 4, offsets[i % 2]);
      begin_products();
#pragma unroll
      for (int i = 0; i < 8; ++i)  // the low codes are of other inputs than the high ones
        multiply_rows<T, false>(part, &weights[4 * i], panel(x + i / 4 * TOKENS * 128 + i % 4 * 32), i > 0);
      end_products();
      wait_products<0>(part, weights);
      if (threadIdx.x % 32 == 0) arrive(&s.empty[stage]);
      if (++stage == Of::kStages) stage = 0, round ^= 1;
#pragma unroll
      for (int i = 0; i < kValues; ++i) sums[i] += part[i] * scale[i / 2 % 2];
    }
  }
  share<TOKENS, GROUPS>(s, group * 64 + row, sums);
}

template <typename T, typename S, int TOKENS, int GROUPS>
__global__ void __launch_bounds__(Tile<TOKENS, GROUPS>::kThreads, 1) mid_rows(Args const __grid_constant__ a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Of = Tile<TOKENS, GROUPS>;
  extern __shared__ uint8_t dynamic[];
  auto& s = *reinterpret_cast<typename Of::Shared*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) / 1024 * 1024);
  Place const place(a, TOKENS, GROUPS);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Of::kStages; ++i) start_barrier(&s.full[i], 1), start_barrier(&s.empty[i], 4 * GROUPS);
    fence_async();
  }
  __syncthreads();
  if (threadIdx.x < 128 * GROUPS) {
    grow_registers<Of::kMultiplies>();
    consume<T, S, TOKENS, GROUPS>(a, s, place);
  } else {
    shrink_registers<Of::kCopies>();
    if (threadIdx.x == 128 * GROUPS) produce<TOKENS, GROUPS>(a, s, place);
  }
  wait_for_inputs();  // nobody reads any more what is written
  store<T, TOKENS, GROUPS>(a, s, place);
#else
  __trap();  // other devices have other tensor cores; the library is built for them all the same
#endif
}

template <typename T, typename S, int TOKENS, int GROUPS>
cudaError_t launch(Args& args, void const* codes, void const* x, int k, cudaStream_t stream) {
  using Of = Tile<TOKENS, GROUPS>;
  int const bytes = sizeof(typename Of::Shared) + 1024, strips = (args.n + kStrip - 1) / kStrip;
  auto kernel = mid_rows<T, S, TOKENS, GROUPS>;
  args.token_tiles = (args.m + TOKENS - 1) / TOKENS;
  int64_t const rows = int64_t(strips) * args.blocks * kStrip;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = describe(&args.codes, codes, {32, 1, rows}, {32, 32}, {32, 1, kStrip});
  if (error == cudaSuccess) error = describe(&args.x, x, {k, 1, args.m}, {k, k}, {64, 1, TOKENS});
  if (error != cudaSuccess) return error;
  dim3 const grid((strips + GROUPS - 1) / GROUPS * args.token_tiles * args.splits);
  return launch_early(kernel, args, grid, Of::kThreads, stream, bytes, args.splits);
}

template <typename T, typename S>
cudaError_t launch(Args& args, void const* codes, void const* x, int k, cudaStream_t stream) {
  if (args.m <= 32) return launch<T, S, 32, 4>(args, codes, x, k, stream);
  if (args.m <= 64) return launch<T, S, 64, 4>(args, codes, x, k, stream);
  return launch<T, S, 128, 2>(args, codes, x, k, stream);
}

}  // namespace

// out [m, n] = x [m, k] W^T + bias [n or null], x and out float16 if `half`, else bfloat16. Codes and scales as above,
// `scale_type` 0 float32, 1 float16, 2 bfloat16; `blocks_per_group` 0: one group. k is a multiple of 16, 131072 at most, and
// comes in up to 8 splits, none of them empty. For compute capability 9.0.
extern "C" int nybble_w4_mid_rows(void* out, void const* x, void const* codes, void const* scales, void const* zeros,
                                  void const* bias, int m, int n, int k, int blocks, int blocks_per_group, int zero,
                                  int splits, int half, int scale_type, cudaStream_t stream) {
  auto at16 = [](void const* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  int const each = blocks_per_group > 0 ? blocks_per_group : blocks;
  if (k <= 0 || k % 16 || blocks != (k + kBlock - 1) / kBlock || blocks > 1024 || !at16(x) || !at16(codes) ||
      splits < 1 || splits > 8 || (splits - 1) * ((blocks + splits - 1) / splits) >= blocks)
    return -1;
  if (m == 0 || n == 0) return 0;
  Args args{};
  args.out = out, args.splits = splits;
  args.scales = scales, args.zeros = static_cast<int8_t const*>(zeros), args.bias = bias;
  args.m = m, args.n = n, args.blocks = blocks, args.zero = zero;
  args.blocks_each = (blocks + splits - 1) / splits;
  args.inverse_group = ((1 << kInverseBits) + each - 1) / each;
  auto run = [&](auto t) {
    using T = decltype(t);
    if (scale_type == 0) return launch<T, float>(args, codes, x, k, stream);
    return scale_type == 1 ? launch<T, __half>(args, codes, x, k, stream)
                           : launch<T, __nv_bfloat16>(args, codes, x, k, stream);
  };
  return half ? run(__half{}) : run(__nv_bfloat16{});
}
