// Row-wise operations: normalization, rotary embedding, gated activation, embedding lookup.
// Every output row depends on its own input row alone and is computed in float32.
#pragma once
#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::norm {

/// out[.., :] = x / sqrt(mean(x^2) + eps) * weight, rounded once to out's dtype.
/// Source: RMSNorm, arXiv:1910.07467.
struct RmsNormParams {
  TensorView x;       // [num_rows, hidden] or [num_tokens, num_heads, head_dim], any row strides
  TensorView weight;  // [hidden], any float dtype; absent = 1
  TensorView out;     // shape and dtype of x
  float eps;          // >= 0
};
void rms_norm(const RmsNormParams& params, const Stream& stream);

/// residual += x, rounded to residual's dtype; out = rms_norm(residual).
struct AddRmsNormParams {
  TensorView x;         // [num_rows, hidden]
  TensorView residual;  // [num_rows, hidden], updated in place
  TensorView weight;    // [hidden]; absent = 1
  TensorView out;       // [num_rows, hidden]
  float eps;
};
void add_rms_norm(const AddRmsNormParams& params, const Stream& stream);

/// Rotate the first rot_dim columns of every head in place by its token's position.
/// Pairs are (i, i + rot_dim / 2), or (2i, 2i + 1) when interleaved.
/// Source: RoPE, arXiv:2104.09864.
struct RotaryParams {
  TensorView positions;  // int64 [num_tokens], each in 0 .. max_position - 1
  TensorView cos_sin;    // float32 [max_position, rot_dim]: rot_dim / 2 cosines, then sines
  TensorView q;          // [num_tokens, num_heads, >= rot_dim]
  TensorView k;          // [num_tokens, num_kv_heads, >= rot_dim]; absent = q alone
  bool interleaved;
};
void rotary(const RotaryParams& params, const Stream& stream);

/// @throws InvalidArgument if shapes, dtypes or strides do not fit.
void check_rotary(const RotaryParams& params);

/// out = silu(gate) * up where x = gate | up. Source: SwiGLU, arXiv:2002.05202.
struct SiluMulParams {
  TensorView x;    // [num_rows, 2 * width]
  TensorView out;  // [num_rows, width]
};
void silu_mul(const SiluMulParams& params, const Stream& stream);

/// out[i] = weight[ids[i]].
struct EmbeddingParams {
  TensorView ids;     // int64 [num_tokens]
  TensorView weight;  // [vocab_size, hidden] float32, float16 or bfloat16
  TensorView out;     // [num_tokens, hidden], its own float dtype
};
void embedding(const EmbeddingParams& params, const Stream& stream);

}  // namespace fastgpt::norm
