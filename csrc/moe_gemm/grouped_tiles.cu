// FP8 products of a layer of experts by CUTLASS on Hopper: the tokens of every expert by its own weights, one
// launch. Compiled once for each MANY: the tile for many tokens an expert, else those for few.
#include <type_traits>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "grouped_problem.cuh"

namespace nybble::moe {

using namespace cute;
using Fp8 = cutlass::float_e4m3_t;
using Out = cutlass::bfloat16_t;

// Swapped: the weights' rows are the MMA's M, of which it wants 64, and the tokens its N, of which 8 are enough. Sums
// are promoted to float32 every 128 inputs (no FastAccum), as in fp8_gemm.
template <bool Swapped, class Tile, class Cluster, class Schedule, class EpilogueSchedule>
struct Grouped {
  using Shapes = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
  // Alignment 1: an expert's tokens begin anywhere.
  using PerM = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float*, float, Stride<_1, _0, _0>, 1>;
  using PerN = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float*, float, Stride<_0, _1, _0>, 1>;
  using TokenScale = std::conditional_t<Swapped, PerN, PerM>;
  using ChannelScale = std::conditional_t<Swapped, PerM, PerN>;

  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using ByToken = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>, TokenScale,
      cutlass::epilogue::fusion::Sm90AccFetch>;
  using Fusion = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, Out, float, kRound>, ChannelScale, ByToken>;

  using LayoutOut = std::conditional_t<Swapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignIn = 16, kAlignOut = 8;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, LayoutOut*, kAlignOut, Out, LayoutOut*,
      kAlignOut, EpilogueSchedule, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Fp8, cutlass::layout::RowMajor*, kAlignIn, Fp8,
      cutlass::layout::ColumnMajor*, kAlignIn, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shapes, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // The arrays hold shapes as three ints and strides as one int64: what is static in a stride takes no room.
  static_assert(sizeof(typename Shapes::UnderlyingProblemShape) == sizeof(GroupShape));
  static_assert(sizeof(typename Kernel::InternalStrideA) == sizeof(int64_t));
  static_assert(sizeof(typename Kernel::InternalStrideB) == sizeof(int64_t));
  static_assert(sizeof(typename Kernel::InternalStrideD) == sizeof(int64_t));

  static typename Kernel::Arguments arguments(Arrays const& g, int experts, int sm_count) {
    auto left = reinterpret_cast<Fp8 const**>(Swapped ? g.b : g.a);
    auto right = reinterpret_cast<Fp8 const**>(Swapped ? g.a : g.b);
    using D = typename Kernel::InternalStrideD;
    typename Fusion::Arguments fusion{
        {const_cast<float const* const*>(g.b_scale), 0.f, {}},
        {{const_cast<float const* const*>(g.a_scale), 0.f, {}}, {}, {}},
        {}};
    return {cutlass::gemm::GemmUniversalMode::kGrouped,
            {experts, reinterpret_cast<typename Shapes::UnderlyingProblemShape*>(g.shapes), nullptr},
            {left, reinterpret_cast<typename Kernel::InternalStrideA*>(g.stride_in), right,
             reinterpret_cast<typename Kernel::InternalStrideB*>(g.stride_in)},
            {fusion, nullptr, nullptr, reinterpret_cast<Out**>(g.out), reinterpret_cast<D*>(g.stride_out)},
            {0, sm_count, 0}};
  }

  static size_t workspace(int experts, int sm_count) {
    return Device::get_workspace_size(arguments(Arrays{}, experts, sm_count));
  }

  static int run(Arrays const& arrays, int experts, int sm_count, void* workspace, cudaStream_t stream) {
    auto args = arguments(arrays, experts, sm_count);
    if (Device::can_implement(args) != cutlass::Status::kSuccess) return kUnsupported;
    Device gemm;
    if (gemm.initialize(args, workspace, stream) != cutlass::Status::kSuccess ||
        gemm.run(stream) != cutlass::Status::kSuccess) {
      cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? cudaErrorLaunchFailure : error;
    }
    return kOk;
  }
};

using Pingpong = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
using Cooperative = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
using PingpongEpilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
using CooperativeEpilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
using One = Shape<_1, _1, _1>;
using Two = Shape<_2, _1, _1>;  // two tiles of tokens read the same weights: one copy serves both

template <int config>
using Of = std::conditional_t<
    config == k64x16, Grouped<true, Shape<_64, _16, _128>, One, Pingpong, PingpongEpilogue>,
    std::conditional_t<config == k64x64, Grouped<true, Shape<_64, _64, _128>, One, Pingpong, PingpongEpilogue>,
                       Grouped<false, Shape<_128, _128, _128>, Two, Cooperative, CooperativeEpilogue>>>;

template <int config>
int run(Arrays const& arrays, int experts, int sm_count, void* workspace, cudaStream_t stream) {
  return Of<config>::run(arrays, experts, sm_count, workspace, stream);
}

template <int config>
size_t workspace(int experts, int sm_count) {
  return Of<config>::workspace(experts, sm_count);
}

#if MANY
template int run<k128x128>(Arrays const&, int, int, void*, cudaStream_t);
template size_t workspace<k128x128>(int, int);
#else
template int run<k64x16>(Arrays const&, int, int, void*, cudaStream_t);
template int run<k64x64>(Arrays const&, int, int, void*, cudaStream_t);
template size_t workspace<k64x16>(int, int);
template size_t workspace<k64x64>(int, int);
#endif

}  // namespace nybble::moe
