// torch.ops.nybble.*: the ops of the CUTLASS library, on torch's stable ABI. Outputs and workspaces are arguments.
#include "bind.h"

extern "C" {
int nybble_fp8_gemm(void* out, const void* a, const void* b, const float* a_scale, const float* b_scale,
                    const void* bias, int m, int n, int k, int a_per_row, int b_per_channel, int half, int config,
                    int sm_count, cudaStream_t);
int64_t nybble_grouped_fp8_workspace(int experts, int sm_count);
int nybble_grouped_fp8_gemm(void* out, const void* a, const void* b, const int* offsets, const float* a_scale,
                            const float* b_scale, void* workspace, int64_t workspace_bytes, int rows, int experts,
                            int n, int k, int config, int sm_count, cudaStream_t);
}

namespace {

using namespace nybble;

void fp8_gemm(Tensor out, Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, std::optional<Tensor> bias,
              int64_t config, int64_t sm_count) {
  check_product(out, a, b, bias);
  int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  int64_t a_count = a_scale.numel() == 1 ? 1 : m, b_count = b_scale.numel() == 1 ? 1 : n;
  check(nybble_fp8_gemm(out.mutable_data_ptr(), a.const_data_ptr(), b.const_data_ptr(),
                        floats(a_scale, a_count, "a_scale"), floats(b_scale, b_count, "b_scale"),
                        bias ? bias->const_data_ptr() : nullptr, static_cast<int>(m), static_cast<int>(n),
                        static_cast<int>(k), a_count != 1, b_count != 1,
                        out.scalar_type() == ScalarType::Half, static_cast<int>(config),
                        static_cast<int>(sm_count), stream_of(out)),
        "fp8_gemm");
}

int64_t grouped_fp8_workspace(int64_t experts, int64_t sm_count) {
  return nybble_grouped_fp8_workspace(static_cast<int>(experts), static_cast<int>(sm_count));
}

void grouped_fp8_gemm(Tensor out, Tensor a, Tensor b, Tensor offsets, Tensor a_scale, Tensor b_scale, Tensor workspace,
                      int64_t config, int64_t sm_count) {
  check_codes(a, 2, "a"), check_codes(b, 3, "b");
  int64_t rows = a.size(0), experts = b.size(0), n = b.size(1), k = b.size(2);
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::BFloat16 && out.is_contiguous() && out.dim() == 2, "out: bfloat16");
  STD_TORCH_CHECK(a.size(1) == k && out.size(0) == rows && out.size(1) == n,
                  "out [rows, N], a [rows, K] and b [E, N, K] do not fit each other");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.numel() == experts + 1, "offsets: int32 [E + 1]");
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte, "workspace: uint8");
  check(nybble_grouped_fp8_gemm(out.mutable_data_ptr(), a.const_data_ptr(), b.const_data_ptr(),
                                static_cast<const int*>(offsets.const_data_ptr()), floats(a_scale, rows, "a_scale"),
                                floats(b_scale, experts * n, "b_scale"), workspace.mutable_data_ptr(),
                                workspace.numel(), static_cast<int>(rows), static_cast<int>(experts),
                                static_cast<int>(n), static_cast<int>(k), static_cast<int>(config),
                                static_cast<int>(sm_count), stream_of(out)),
        "grouped_fp8_gemm");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nybble, m) {
  m.def("fp8_gemm(Tensor(a!) out, Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, int config, "
        "int sm_count) -> ()");
  m.def("grouped_fp8_gemm(Tensor(a!) out, Tensor a, Tensor b, Tensor offsets, Tensor a_scale, Tensor b_scale, "
        "Tensor(b!) workspace, int config, int sm_count) -> ()");
  m.def("grouped_fp8_workspace(int experts, int sm_count) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(nybble, CUDA, m) {
  m.impl("fp8_gemm", TORCH_BOX(&fp8_gemm));
  m.impl("grouped_fp8_gemm", TORCH_BOX(&grouped_fp8_gemm));
}

STABLE_TORCH_LIBRARY_IMPL(nybble, CompositeExplicitAutograd, m) {
  m.impl("grouped_fp8_workspace", TORCH_BOX(&grouped_fp8_workspace));
}
