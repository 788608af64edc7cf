// Attention of prompts over the paged cache, for Hopper, by the plan of FlashAttention-3 (arXiv 2407.08608): four
// warps copy pages into shared memory, two groups of four multiply. While a group's tensor cores work on the next
// scores and the last values, its other units take the exponentials, and the two groups take turns at that.
//
// A job is 128 rows of one request and KV head, rows being (query, head of the group) pairs, over all keys that they
// see. Blocks stay and draw jobs, longest first, so that all end together, and the pages of one are on their way while
// the one before it ends.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "../launch.cuh"
#include "../wgmma.cuh"
#include "prompt_attention.h"

namespace {

using namespace nybble;

constexpr int kGroups = 2, kRows = 64 * kGroups, kKeys = 128, kStages = 3;
constexpr int kDrawn = 2;  // jobs that were drawn and are not taken up by all
constexpr int kThreads = 128 * (1 + kGroups), kWarps = 4 * kGroups;  // that multiply
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(registers_suffice(kThreads, 128 * (kProducerRegisters + kGroups * kConsumerRegisters)));
constexpr float kNothing = -INFINITY;
// Named barriers: of the threads that multiply, and of each group's turn.
constexpr int kAll = 1, kTurn = 2;

struct Args {
  // 64 values wide: of q [T, heads, D] the rows of a job, of K and V [slots, kv_heads, D] one page of one head.
  CUtensorMap q, k, v;
  PromptAttention p;
  int group, block_q, tiles, jobs;
};

// Of one request's queries those from `first_query` on, and of its heads those of a KV head.
struct Job {
  int request, kv_head, begin, queries, first_query, length;  // no queries: there is no more to do

  __device__ int before() const { return length - queries + first_query; }  // keys before the first query's own
  __device__ int key_tiles(int block_q) const {
    return (max(0, min(length, before() + block_q)) + kKeys - 1) / kKeys;
  }
};

template <int D>
struct alignas(1024) Shared {
  // Each as D / 64 panels of rows of 64 values, which swizzled copies and products want.
  uint8_t q[kRows * D * 2], k[kStages][kKeys * D * 2], v[kStages][kKeys * D * 2];
  Job drawn[kDrawn];
  uint64_t full_q, full_k[kStages], full_v[kStages], full_drawn[kDrawn];
  uint64_t empty_q, empty_k[kStages], empty_v[kStages], empty_drawn[kDrawn];
};

// The tiles of request r are numbered from query_start[r] / block_q + r on; there may be none of a number. The last of a
// prompt see most keys: they come first. All of a head come before the next: its keys stay in the second-level cache.
__device__ inline bool find_job(Args const& a, int id, Job& job) {
  int const tile = a.tiles - 1 - id % a.tiles;
  int left = 0, right = a.p.requests;
  while (left < right) {
    int const middle = (left + right) / 2;
    if (a.p.query_start[middle] / a.block_q + middle <= tile) left = middle + 1;
    else right = middle;
  }
  job.request = left - 1;
  job.kv_head = id / a.tiles;
  job.begin = a.p.query_start[job.request];
  job.queries = a.p.query_start[left] - job.begin;
  job.first_query = (tile - job.begin / a.block_q - job.request) * a.block_q;
  job.length = a.p.seq_lens[job.request];
  return job.first_query < job.queries;
}

// The next job that there is.
__device__ inline Job draw_job(Args const& a, bool first) {
  for (int id = blockIdx.x;; first = false) {
    if (!first) id = gridDim.x + atomicAdd(a.p.counter, 1);
    Job job{};
    if (id >= a.jobs || find_job(a, id, job)) return job;
  }
}

// A job that was drawn; every warp takes every one.
template <int D>
__device__ inline Job take_job(Shared<D>& s, int draw) {
  int const place = draw % kDrawn;
  wait(&s.full_drawn[place], draw / kDrawn & 1);
  Job const job = s.drawn[place];
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(&s.empty_drawn[place]);
  return job;
}

// A warp that copies: one panel of queries and keys, or of values, a page a lane. The first one draws the jobs. A page
// without keys is asked for outside the cache, and comes as zeros.
template <int D>
__device__ void produce(Args const& a, Shared<D>& s, int warp) {
  int const lane = threadIdx.x % 32, panel = warp / 2, page = lane * a.p.block_size;
  int const outside = a.p.blocks * a.p.block_size;
  bool const keys = warp % 2 == 0;
  int count = 0, jobs = 0;
  for (int draw = 0;; ++draw) {
    if (warp == 0 && lane == 0) {
      int const place = draw % kDrawn;
      wait(&s.empty_drawn[place], draw / kDrawn & 1 ^ 1);
      s.drawn[place] = draw_job(a, draw == 0);
      arrive(&s.full_drawn[place]);
    }
    Job const job = take_job(s, draw);
    if (job.queries == 0) return;
    int const* table = a.p.block_table + int64_t(job.request) * a.p.max_blocks;
    int const tiles = job.key_tiles(a.block_q);
    for (int tile = tiles - 1; tile >= 0; --tile, ++count) {
      int const stage = count % kStages, key = tile * kKeys + page;
      int const slot = page < kKeys && key < job.length ? table[key / a.p.block_size] * a.p.block_size : outside;
      uint64_t* const full = keys ? &s.full_k[stage] : &s.full_v[stage];
      wait(keys ? &s.empty_k[stage] : &s.empty_v[stage], count / kStages & 1 ^ 1);
      if (lane == 0) expect_bytes(full, kKeys * 128);
      __syncwarp();
      if (page < kKeys)
        copy_box((keys ? s.k[stage] : s.v[stage]) + (panel * kKeys + page) * 128, keys ? &a.k : &a.v, 64 * panel,
                 job.kv_head, slot, full);
      if (keys && tile == tiles - 1) {
        wait(&s.empty_q, jobs++ & 1 ^ 1);
        if (lane == 0) {
          expect_bytes(&s.full_q, a.block_q * a.group * 128);
          copy_box(s.q + panel * kRows * 128, &a.q, 64 * panel, job.kv_head * a.group, job.begin + job.first_query,
                   &s.full_q);
        }
      }
    }
  }
}

// One of the groups that multiply: its 64 rows of every job. A thread holds two rows' values: rows 16 warp + lane / 4 and
// eight more, columns 8 i + 2 (lane % 4) and the next.
template <typename T, int D>
struct Consumer {
  Args const& a;
  Shared<D>& s;
  int const group, thread, row, column;
  int count = 0, jobs = 0;  // tiles of keys, and jobs with any, so far
  float scores[kKeys / 2], sums[D / 2];
  uint32_t weights[kKeys / 4];
  float top[2], total[2], decay[2];
  int position[2];

  __device__ Consumer(Args const& args, Shared<D>& shared)
      : a(args), s(shared), group(threadIdx.x / 128 - 1), thread(threadIdx.x % 128),
        row(64 * group + thread / 32 * 16 + thread % 32 / 4), column(2 * (thread % 4)) {}

  __device__ void run() {
    if (group == kGroups - 1) arrive_at(kTurn, kThreads - 128);  // the first turn is the first group's
    for (int draw = 0;; ++draw) {
      Job const job = take_job(s, draw);
      if (job.queries == 0) return;
      attend(job);
      store(job);
    }
  }

  __device__ void attend(Job const& job) {
    int const tiles = job.key_tiles(a.block_q), first = job.before();
#pragma unroll
    for (int i = 0; i < 2; ++i) top[i] = kNothing, total[i] = 0, position[i] = first + (row + 8 * i) / a.group;
#pragma unroll
    for (float& sum : sums) sum = 0;
    if (tiles == 0) return;
    if (tiles * kKeys > job.length) clear_values(job.length - (tiles - 1) * kKeys);

    wait(&s.full_q, jobs & 1);
    wait(&s.full_k[count % kStages], count / kStages & 1);
    multiply_keys(count);
    wait_products<0>(scores);
    release(&s.empty_k[count % kStages]);
    soften<true>((tiles - 1) * kKeys);
    pack();
    int tile = tiles - 2;
    for (; tile >= 0 && tile * kKeys + kKeys - 1 > first; --tile) step<true>(tile);
    for (; tile >= 0; --tile) step<false>(tile);
    release(&s.empty_q);
    ++jobs;
    wait(&s.full_v[count % kStages], count / kStages & 1);
    multiply_values(count);
    wait_products<0>(sums, weights);
    release(&s.empty_v[count % kStages]);
    ++count;
  }

  // The scores of one tile more, beside the sums over the tile before it.
  template <bool MASKED>
  __device__ void step(int tile) {
    int const now = count++, next = count;
    wait(&s.full_k[next % kStages], next / kStages & 1);
    wait(&s.full_v[now % kStages], now / kStages & 1);
    sync_at(kTurn + group, kThreads - 128);
    multiply_keys(next);
    multiply_values(now);
    arrive_at(kTurn + (group + 1) % kGroups, kThreads - 128);
    wait_products<1>(scores);
    release(&s.empty_k[next % kStages]);
    soften<MASKED>(tile * kKeys);
    once_known(total[0] + total[1]);
    wait_products<0>(sums, weights);
    release(&s.empty_v[now % kStages]);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sums[i] *= decay[i / 2 % 2];
    pack();
  }

  __device__ void release(uint64_t* empty) {
    if (thread % 32 == 0) arrive(empty);
  }

  __device__ void multiply_keys(int tile) {
    uint32_t const q = shared_address(s.q) + 64 * group * 128, k = shared_address(s.k[tile % kStages]);
    begin_products();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      int const at = i % 4 * 32;
      multiply<T>(scores, panel(q + i / 4 * kRows * 128 + at), panel(k + i / 4 * kKeys * 128 + at), i > 0);
    }
    end_products();
  }

  __device__ void multiply_values(int tile) {
    uint32_t const v = shared_address(s.v[tile % kStages]);
    begin_products();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      multiply_rows<T, true>(sums, &weights[4 * i], panel(v + i * 16 * 128, kKeys * 128), true);
    end_products();
  }

  // One step of the online softmax (arXiv 1805.02867), in base 2, over the scores of keys from `first` on.
  template <bool MASKED>
  __device__ void soften(int first) {
    float const scale = a.p.scale;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = top[half];
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        if (i / 2 % 2 == half) {
          if (MASKED && first + i / 4 * 8 + column + i % 2 > position[half]) scores[i] = kNothing;
          most = fmaxf(most, scores[i]);
        }
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
      // nothing seen yet: keeps -inf - -inf out
      float const shift = MASKED && most == kNothing ? 0.0f : most * scale;
      decay[half] = exp2_fast(top[half] * scale - shift);
      top[half] = most;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        if (i / 2 % 2 == half) {
          scores[i] = exp2_fast(fmaf(scores[i], scale, -shift));
          sum += scores[i];
        }
      total[half] = total[half] * decay[half] + sum;
    }
  }

  // A product's result lies in registers as its left operand does.
  __device__ void pack() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = narrow_pair<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // What lies behind the last key was written by nobody, or for somebody else: its weight is 0, but 0 x NaN is not.
  __device__ void clear_values(int keys) {
    wait(&s.full_v[count % kStages], count / kStages & 1);
    for (int at = 128 * group + thread; at < (kKeys - keys) * 8 * (D / 64); at += 128 * kGroups) {
      int const panel = at / (8 * (kKeys - keys)), rest = at % (8 * (kKeys - keys));
      reinterpret_cast<uint4*>(s.v[count % kStages] + (panel * kKeys + keys) * 128)[rest] = {};
    }
    fence_async();
    sync_at(kAll, kThreads - 128);
  }

  __device__ void store(Job const& job) {
    auto* out = static_cast<T*>(a.p.out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = total[half];
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
      float const factor = a.p.v_scale / (sum == 0.0f ? 1.0f : sum);
      int const m = row + 8 * half, query = job.first_query + m / a.group;
      if (m >= a.block_q * a.group || query >= job.queries) continue;
      int64_t const at = (int64_t(job.begin + query) * a.p.heads + job.kv_head * a.group + m % a.group) * D;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        *reinterpret_cast<uint32_t*>(out + at + 8 * i + column) =
            narrow_pair<T>(sums[4 * i + 2 * half] * factor, sums[4 * i + 2 * half + 1] * factor);
    }
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1) prompt_attention(Args const __grid_constant__ a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t dynamic[];
  auto& s = *reinterpret_cast<Shared<D>*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    constexpr int kPanels = D / 64;
    start_barrier(&s.full_q, kPanels), start_barrier(&s.empty_q, kWarps);
    for (int i = 0; i < kDrawn; ++i) {
      start_barrier(&s.full_drawn[i], 1);
      start_barrier(&s.empty_drawn[i], kWarps + 2 * kPanels);
    }
    for (int i = 0; i < kStages; ++i) {
      start_barrier(&s.full_k[i], kPanels), start_barrier(&s.full_v[i], kPanels);
      start_barrier(&s.empty_k[i], kWarps), start_barrier(&s.empty_v[i], kWarps);
    }
    fence_async();
  }
  __syncthreads();
  wait_for_inputs();
  if (threadIdx.x < 128) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x < 32 * 2 * (D / 64)) produce<D>(a, s, threadIdx.x / 32);
  } else {
    grow_registers<kConsumerRegisters>();
    Consumer<T, D>(a, s).run();
  }
#else
  __trap();  // other devices have other tensor cores; the library is built for them all the same
#endif
}

template <typename T, int D>
cudaError_t dispatch(Args& args, int blocks, cudaStream_t stream) {
  PromptAttention const& p = args.p;
  int const bytes = sizeof(Shared<D>) + 1024;
  auto kernel = prompt_attention<T, D>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  auto const* cache = static_cast<uint8_t const*>(p.cache);
  int64_t const slots = int64_t(p.blocks) * p.block_size, kv_row = int64_t(p.kv_heads) * D;
  if (error == cudaSuccess)
    error = describe(&args.q, p.q, {D, p.heads, p.tokens}, {p.q_head, p.q_token}, {64, args.group, args.block_q});
  for (auto [map, plane] : {std::pair{&args.k, cache}, std::pair{&args.v, cache + p.plane_bytes}})
    if (error == cudaSuccess) error = describe(map, plane, {D, p.kv_heads, slots}, {D, kv_row}, {64, 1, p.block_size});
  return error != cudaSuccess ? error : launch_early(kernel, args, dim3(blocks), kThreads, stream, bytes);
}

}  // namespace

// out = causal attention of q's requests over the cache, on which their own keys and values are. D is 64 or 128, a block
// 8 to 128 tokens and a power of two; q's rows are 16-byte aligned. For compute capability 9.0.
extern "C" int nybble_prompt_attention(PromptAttention const* p, cudaStream_t stream) {
  int device = 0, processors = 0;
  if (p->tokens == 0 || p->requests == 0) return 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  Args args{};
  args.p = *p;
  args.p.scale = p->scale * 1.44269504f;  // exponentials are of base 2
  args.group = p->heads / p->kv_heads;
  args.block_q = kRows / args.group;
  args.tiles = p->tokens / args.block_q + p->requests;
  args.jobs = args.tiles * p->kv_heads;
  int const blocks = args.jobs < processors ? args.jobs : processors;
  if (p->dim == 128)
    return p->bf16 ? dispatch<__nv_bfloat16, 128>(args, blocks, stream) : dispatch<__half, 128>(args, blocks, stream);
  return p->bf16 ? dispatch<__nv_bfloat16, 64>(args, blocks, stream) : dispatch<__half, 64>(args, blocks, stream);
}
