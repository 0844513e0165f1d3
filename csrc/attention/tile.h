// What one thread computes at a time, and the kernel that computes it, one per instruction set.
#pragma once
#include <cstdint>

#include "fastgpt/tensor_view.h"

namespace fastgpt::attention {

/// Keys that are scored, weighted and summed together. Key blocks start at multiples of this
/// position whatever the tile, so a query row meets its keys in the same order in any batch.
constexpr std::int64_t kKeyBlock = 64;
constexpr std::int64_t kMaxRows = 32;

/// Query rows of one request that share one key/value head, numbered token * group + head.
struct Tile {
  const void* q;  // row (token, head) at token * q_token_stride + head * q_head_stride
  void* out;
  DType dtype;  // of q and out
  std::int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  std::int64_t group;       // heads per key/value head
  std::int64_t first_row;   // rows first_row .. first_row + num_rows - 1
  std::int64_t num_rows;    // <= kMaxRows
  std::int64_t first_keys;  // keys that token 0 sees; token t sees t more
  const void* keys;         // position p at table[p / block_size] * block_stride
  DType kv_dtype;           //               + p % block_size * token_stride
  const std::int32_t* table;
  std::int64_t block_size, block_stride, token_stride;
  std::int64_t value_offset;  // from a key row to its value row, in elements
  std::int64_t head_dim_qk, head_dim_v;
  float scale;

  // Beside codes (kv_format.h), in elements of their own; strides as those of keys.
  const float* kv_scale = nullptr;
  std::int64_t scale_block_stride = 0, scale_token_stride = 0, scale_value_offset = 0;
  const void* pe = nullptr;  // columns latent .. head_dim_qk - 1 of a latent key
  DType pe_dtype = DType::kF32;
  std::int64_t pe_block_stride = 0, pe_token_stride = 0;
  std::int64_t latent = 0;  // columns of latent codes; 0: keys and values per head
};

/// Floats of scratch that a tile needs; codes are expanded there.
std::int64_t tile_scratch(std::int64_t head_dim_qk, std::int64_t head_dim_v, bool has_codes);

using AttendTile = void (*)(const Tile& tile, float* scratch);
void attend_tile_portable(const Tile& tile, float* scratch);
void attend_tile_avx2(const Tile& tile, float* scratch);
void attend_tile_avx512(const Tile& tile, float* scratch);

}  // namespace fastgpt::attention
