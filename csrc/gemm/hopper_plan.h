// Which tile and cluster a Hopper product uses (hopper.cuh).
#pragma once
#include <cstdint>

namespace fastgpt::gemm {

/// What the choice depends on.
struct HopperShape {
  std::int64_t num_rows;
  std::int64_t n;
  std::int64_t k;
  std::int64_t num_batches;
  std::int64_t num_experts;  // whose rows lie apart (grouped); else 0
  int bits;                  // of a weight
  int num_sms;
  const int* max_clusters;  // [size]: clusters of 1 .. 8 CTAs that run at once
};

struct HopperPlan {
  int rows = 0;        // of x in a tile: 64, 128, 192 or 256
  int cluster = 1;     // CTAs
  int num_shares = 1;  // CTAs that share x in whole rounds
  int weight_tiles = 0;
  int row_tiles = 0;
  int num_tiles = 0;
  int whole_tiles = 0;
  int num_clusters = 0;
  double cycles = 0;  // estimate
};

/// The plan for tiles of `rows` and clusters of `cluster` CTAs, with its estimate: rounds of whole
/// tiles and of split ones, each bound by tensor cores, L2 or memory.
HopperPlan hopper_plan(const HopperShape& shape, int rows, int cluster);

/// The plan that the estimate likes best, among those that are compiled.
HopperPlan best_hopper_plan(const HopperShape& shape);

}  // namespace fastgpt::gemm
