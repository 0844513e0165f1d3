// What the dispatch files of this family call.
#pragma once
#include "fastgpt/kv_cache.h"

namespace fastgpt::kv_cache {

void write_kv_cpu(const WriteKvParams& params);
void write_kv_cuda(const WriteKvParams& params, const Stream& stream);

void rotary_write_kv_cpu(const RotaryWriteKvParams& params);
void rotary_write_kv_cuda(const RotaryWriteKvParams& params, const Stream& stream);

void write_mla_cpu(const WriteMlaParams& params);
void write_mla_cuda(const WriteMlaParams& params, const Stream& stream);

/// The same where the cache holds codes (kv_format.h): a row's scale needs the whole row.
void write_codes_cuda(const WriteKvParams& params, const Stream& stream);
void rotary_write_codes_cuda(const RotaryWriteKvParams& params, const Stream& stream);
void write_latent_codes_cuda(const WriteMlaParams& params, const Stream& stream);

}  // namespace fastgpt::kv_cache
