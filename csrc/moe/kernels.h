// What the dispatch files of this family call.
#pragma once
#include "fastgpt/moe.h"

namespace fastgpt::moe {

void moe_route_cpu(const MoeRouteParams& params);
void moe_route_cuda(const MoeRouteParams& params, const Stream& stream);

void moe_sort_cpu(const MoeSortParams& params);
void moe_sort_cuda(const MoeSortParams& params, const Stream& stream);

void moe_combine_cpu(const MoeCombineParams& params);
void moe_combine_cuda(const MoeCombineParams& params, const Stream& stream);

}  // namespace fastgpt::moe
