// Choosing the next token on the device. The same logits, seed and position give the same token on
// every backend, whatever the batch and the number of threads: see "The draw" below.
#pragma once
#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::sampling {

/// Temperature first, then top-k, top-p and min-p on the remaining distribution, then one draw.
/// temperature 0 takes the largest logit, the lowest id among equals.
///
/// The draw. Float operations are IEEE single precision, one rounding each, contracted only where
/// fma is written; sums are integer sums, so their order does not matter.
///
///   A NaN logit counts as -inf. largest = the row's largest logit.
///   Greedy, the lowest id that holds `largest` (id 0 if that is -inf), when temperature is not
///   greater than 0 or `largest` is infinite. Otherwise:
///   c    = min(log2(e) / temperature, FLT_MAX), log2(e) = 1.44269504f
///   y_i  = (logit_i - largest) * c
///   w_i  = round(2^30 * exp2(y_i)), an integer in 0 .. 2^30, to nearest even, with the polynomial
///          of token_weight() in sampling/draw.h; 0 where y_i < -64. The largest has w = 2^30.
///   top-k (0 < top_k < vocab_size): keep logit_i >= the top_k-th largest logit, counted with
///          multiplicity: ties at the edge all stay.
///   top-p (top_p < 1): P = round(2^24 * top_p), S = sum of kept w, target = max(1, S * P >> 24).
///          Of the kept, keep logit_i >= t, where t is the largest kept logit with
///          (sum of kept w_j with logit_j >= t) >= target. Ties at the edge all stay.
///   min-p (min_p > 0): keep exp2(y_i) >= min_p, compared as floats before scaling to w.
///   S    = sum of kept w, at least 2^30.
///   r    = (x * S) >> 64 with x = 64 bits of Philox4x32-10 (Salmon et al., SC 2011), key = seed,
///          counter = (position, 0): low word first in each pair.
///   id   = the lowest id with (sum of kept w_j, j <= id) > r.
///
/// Tokens less likely than 2^-31 times the likeliest have weight 0 and are never drawn.
/// On the CPU a temperature that is negative or NaN, a top_k below 0, a top_p outside (0, 1] and a
/// min_p outside [0, 1] throw InvalidArgument. On CUDA, which cannot wait to tell, they read as
/// greedy, off, clamped to [0, 1] and clamped to [0, 1] (NaN as 0).
struct SampleParams {
  TensorView logits;       // float32 [num_rows, vocab_size]
  TensorView temperature;  // float32 [num_rows], >= 0
  TensorView top_k;        // int32 [num_rows], 0 = off
  TensorView top_p;        // float32 [num_rows], in (0, 1], 1 = off
  TensorView min_p;        // float32 [num_rows], in [0, 1], 0 = off
  TensorView seeds;        // int64 [num_rows]
  TensorView positions;    // int64 [num_rows]: position of the token being drawn
  TensorView ids;          // int64 [num_rows]
};
void sample(const SampleParams& params, const Stream& stream);

/// One word per slot and token: the low 31 bits count how often the token was generated, the top
/// bit says that it stands in the prompt. For each token seen anywhere, in this order:
///
///     logit = logit > 0 ? logit / repetition : logit * repetition
///     logit = fma(-frequency, count, logit)     if count > 0
///     logit = logit - presence                  if count > 0
///
/// A slot outside the history throws InvalidArgument on the CPU and is skipped on CUDA.
struct PenalizeParams {
  TensorView logits;      // float32 [num_rows, vocab_size], changed in place
  TensorView history;     // int32 [num_slots, vocab_size]
  TensorView slots;       // int64 [num_rows]; negative = skip the row
  TensorView repetition;  // float32 [num_rows], > 0, 1 = off
  TensorView presence;    // float32 [num_rows], 0 = off
  TensorView frequency;   // float32 [num_rows], 0 = off
};
void penalize(const PenalizeParams& params, const Stream& stream);

/// Enter tokens into the history. Equal (slot, id) pairs in one call are counted each; a count
/// stays below 2^31. A slot or id outside the history throws InvalidArgument on the CPU and is
/// skipped on CUDA.
struct RecordTokensParams {
  TensorView history;  // int32 [num_slots, vocab_size], changed in place
  TensorView slots;    // int64 [num_ids]; negative = skip
  TensorView ids;      // int64 [num_ids]
  bool is_prompt;
};
void record_tokens(const RecordTokensParams& params, const Stream& stream);

}  // namespace fastgpt::sampling
