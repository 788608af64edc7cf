// FP8 x FP8 -> 16 bits by CUTLASS on Hopper: out = (a b^T) * a_scale * b_scale + bias, scaled in the epilogue. Compiled
// once for each HALF (outputs are float16, else bfloat16) and MANY (the tiles for many tokens, else those for few).
#include <cstdint>

// The kernel is launched while the one before it still runs: who loads operands waits for it, and scales are read after
// the first of them have come.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "problem.cuh"

namespace nybble::fp8 {

using namespace cute;
using Fp8 = cutlass::float_e4m3_t;

// Swapped: the weights' rows are the MMA's M, of which it wants 64, and the tokens its N, of which 8 are enough. The
// sums are promoted to float32 every 128 inputs (no FastAccum): Hopper keeps 14 bits of an FP8 product's sum.
template <class Out, bool Swapped, class Tile, class Cluster, class Schedule, class EpilogueSchedule>
struct Gemm {
  // Scales by row or channel, or one for all: the stride says which, at run time.
  using PerM = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<bool, _0, int64_t>>;
  using PerN = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, bool, int64_t>>;
  using BiasM = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, Out, float, Stride<bool, _0, int64_t>>;
  using BiasN = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Out, float, Stride<_0, bool, int64_t>>;
  using AScale = std::conditional_t<Swapped, PerN, PerM>;
  using BScale = std::conditional_t<Swapped, PerM, PerN>;
  using Bias = std::conditional_t<Swapped, BiasM, BiasN>;

  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using ByToken = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>, AScale,
      cutlass::epilogue::fusion::Sm90AccFetch>;
  using Fusion = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Out, float, kRound>, BScale, ByToken,
      Bias>;

  using LayoutOut = std::conditional_t<Swapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignIn = 16, kAlignOut = 16 / sizeof(Out);

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, LayoutOut, kAlignOut, Out, LayoutOut,
      kAlignOut, EpilogueSchedule, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Fp8, cutlass::layout::RowMajor, kAlignIn, Fp8,
      cutlass::layout::ColumnMajor, kAlignIn, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static int run(Problem const& p) {
    int rows = Swapped ? p.n : p.m, columns = Swapped ? p.m : p.n;
    auto left = static_cast<Fp8 const*>(Swapped ? p.b : p.a), right = static_cast<Fp8 const*>(Swapped ? p.a : p.b);
    auto stride_left = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, make_shape(rows, p.k, 1));
    auto stride_right = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, make_shape(columns, p.k, 1));
    auto stride_out = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, make_shape(rows, columns, 1));

    typename Fusion::Arguments fusion{
        scale<BScale>(p.b_scale, p.b_per_channel),
        {scale<AScale>(p.a_scale, p.a_per_row), {}, {}},
        scale<Bias>(static_cast<Out const*>(p.bias), true),
        {}};
    typename Kernel::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {rows, columns, p.k, 1},
        {left, stride_left, right, stride_right},
        {fusion, nullptr, stride_out, static_cast<Out*>(p.out), stride_out},
        {0, p.sm_count, 0}};
    if (Device::can_implement(arguments) != cutlass::Status::kSuccess) return kUnsupported;
    if (Device::get_workspace_size(arguments) != 0) return kWorkspace;
    Device gemm;
    if (gemm.initialize(arguments, nullptr, p.stream) != cutlass::Status::kSuccess ||
        gemm.run(p.stream, nullptr, true) != cutlass::Status::kSuccess) {
      cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? cudaErrorLaunchFailure : error;
    }
    return kOk;
  }

 private:
  template <class Node, class Element>
  static typename Node::Arguments scale(Element const* values, bool vector) {
    if constexpr (std::is_same_v<Node, PerM> || std::is_same_v<Node, BiasM>) {
      return {values, Element(0), {vector, _0{}, 0}};
    } else {
      return {values, Element(0), {_0{}, vector, 0}};
    }
  }
};

using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using PingpongEpilogue = cutlass::epilogue::TmaWarpSpecialized;
using CooperativeEpilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
using One = Shape<_1, _1, _1>;
using Two = Shape<_2, _1, _1>;  // two tiles of tokens read the same weights: one copy serves both

template <bool half, int config>
int run(Problem const& p) {
  using Out = std::conditional_t<half, cutlass::half_t, cutlass::bfloat16_t>;
  if constexpr (config == k64x16) {
    return Gemm<Out, true, Shape<_64, _16, _128>, One, Pingpong, PingpongEpilogue>::run(p);
  } else if constexpr (config == k64x64) {
    return Gemm<Out, true, Shape<_64, _64, _128>, One, Pingpong, PingpongEpilogue>::run(p);
  } else if constexpr (config == k64x128) {
    return Gemm<Out, false, Shape<_64, _128, _128>, Two, Pingpong, PingpongEpilogue>::run(p);
  } else {
    static_assert(config == k128x128);
    return Gemm<Out, false, Shape<_128, _128, _128>, Two, Cooperative, CooperativeEpilogue>::run(p);
  }
}

#if MANY
template int run<HALF, k64x128>(Problem const&);
template int run<HALF, k128x128>(Problem const&);
#else
template int run<HALF, k64x16>(Problem const&);
template int run<HALF, k64x64>(Problem const&);
#endif

}  // namespace nybble::fp8
