// What the dispatch files of this family call.
#pragma once
#include "fastgpt/gemm.h"

namespace fastgpt::gemm {

void linear_cpu(const LinearParams& params);
void grouped_linear_cpu(const GroupedLinearParams& params);
void batched_linear_cpu(const BatchedLinearParams& params);
void arrange_weight_cpu(const ArrangeParams& params);
ArrangedShape arranged_shape_cpu(WeightFormat format, std::int64_t n, std::int64_t k,
                                 int group_size);

void linear_cuda(const LinearParams& params, const Stream& stream);
void grouped_linear_cuda(const GroupedLinearParams& params, const Stream& stream);
void batched_linear_cuda(const BatchedLinearParams& params, const Stream& stream);
void arrange_weight_cuda(const ArrangeParams& params, const Stream& stream);
ArrangedShape arranged_shape_cuda(WeightFormat format, std::int64_t n, std::int64_t k,
                                  int group_size);

/// Checks shared by the dispatch files: dtypes, shapes and strides of one weight (a stack when
/// `stacked`) for out_features n and in_features k on the given device.
void check_weight(const WeightView& weight, std::int64_t n, std::int64_t k, std::int64_t stacked,
                  DeviceType device_type);
void check_rows(const TensorView& x, const TensorView& out);

}  // namespace fastgpt::gemm
