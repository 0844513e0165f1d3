// Writing keys and values of new tokens into the paged KV cache.
#pragma once
#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::kv_cache {

/// Store token i's key and value at slot_mapping[i] = block_id * block_size + offset.
/// A negative slot is skipped (padding rows of a captured batch). A cache of codes (kv_format.h) is
/// written quantized, every row by its own scale.
struct WriteKvParams {
  TensorView k;             // [num_tokens, num_kv_heads, head_dim_qk]
  TensorView v;             // [num_tokens, num_kv_heads, head_dim_v]
  TensorView slot_mapping;  // int64 [num_tokens]
  TensorView kv_cache;      // [num_blocks, 2, block_size, num_kv_heads, max(head_dim)], strided
  TensorView kv_scale;      // of codes: float32 [num_blocks, 2, num_kv_heads, block_size], strided
};
void write_kv(const WriteKvParams& params, const Stream& stream);

/// norm::rotary of q and k, then write_kv of k and v: one launch instead of two on CUDA.
struct RotaryWriteKvParams {
  TensorView positions;     // int64 [num_tokens], each in 0 .. max_position - 1
  TensorView cos_sin;       // float32 [max_position, rot_dim]: rot_dim / 2 cosines, then sines
  TensorView q;             // [num_tokens, num_heads, >= rot_dim], rotated in place
  TensorView k;             // [num_tokens, num_kv_heads, head_dim_qk >= rot_dim], rotated in place
  TensorView v;             // [num_tokens, num_kv_heads, head_dim_v]
  TensorView slot_mapping;  // int64 [num_tokens]
  TensorView kv_cache;      // as in WriteKvParams
  TensorView kv_scale;      // as in WriteKvParams
  bool interleaved;
};
void rotary_write_kv(const RotaryWriteKvParams& params, const Stream& stream);

/// write_kv for multi-head latent attention: one row kv_latent | k_pe per token. Latent codes have
/// k_pe in a cache of its own, unquantized.
struct WriteMlaParams {
  TensorView kv_latent;     // [num_tokens, 512]
  TensorView k_pe;          // [num_tokens, 64]
  TensorView slot_mapping;  // int64 [num_tokens]
  TensorView kv_cache;      // [num_blocks, block_size, 576], strided; codes: 512 columns
  TensorView kv_scale;      // of codes: float32 [num_blocks, block_size, 4], strided
  TensorView pe_cache;      // beside codes: [num_blocks, block_size, 64], floating, strided
};
void write_mla(const WriteMlaParams& params, const Stream& stream);

}  // namespace fastgpt::kv_cache
