#include "gemm/hopper_plan.h"

#include <algorithm>

#include "gemm/layout.cuh"

namespace fastgpt::gemm {
namespace {

// What a stage of 64 columns costs each of `active` SMs, in cycles. These constants and those
// below fit an H100's times of 224 products in up to 24 plans each (benchmarks/NOTES.md).
double stage_cycles(const HopperShape& s, const HopperPlan& plan, int active, int sharing) {
  const double weight_bytes = 128.0 * 64 * s.bits / 8;
  const double x_bytes = plan.rows * 128.0;
  const double tensor = 5.6 * plan.rows;
  // Codes become operands, in a chain that few products hide.
  const double operands = s.bits == 16  ? 0.0
                          : s.bits == 8 ? 500.0 + 3.6 * plan.rows
                                        : 560.0 + 3.9 * plan.rows;
  const double arrival = (weight_bytes + x_bytes) / 41.0;
  const double l2 = (weight_bytes + x_bytes / sharing) * active / (s.num_sms * 38.0);
  const double memory = plan.row_tiles == 1 ? weight_bytes * active / (s.num_sms * 15.7) : 0.0;
  return std::max({tensor, operands, arrival, l2, memory});
}

}  // namespace

HopperPlan hopper_plan(const HopperShape& s, int rows, int cluster) {
  HopperPlan plan;
  plan.rows = rows;
  plan.cluster = cluster;
  const bool shares = (cluster == 2 || cluster == 4) && rows / cluster % 8 == 0;
  plan.num_shares = shares ? cluster : 1;
  plan.weight_tiles = int(ceil_div(ceil_div(s.n, 128), plan.num_shares) * plan.num_shares);
  plan.row_tiles = int(ceil_div(s.num_rows, rows));
  std::int64_t empty_tiles = 0;
  if (s.num_experts > 0) {  // row_tile's bound; a last tile of half its rows each is likely
    const std::int64_t experts = std::min(s.num_experts, s.num_rows);
    plan.row_tiles = int(experts + s.num_rows / rows);
    empty_tiles = experts / 2 * plan.weight_tiles;
  }
  plan.num_tiles = int(plan.weight_tiles * plan.row_tiles * s.num_batches);
  const int most = s.max_clusters[cluster];
  const int stages = int(ceil_div(s.k, 64));

  // Whole rounds of all CTAs; what is left is split where that takes less than one more round.
  const int used_tiles = int(plan.num_tiles - empty_tiles);
  const int whole_rounds = used_tiles / (most * cluster);
  const int left = used_tiles - whole_rounds * most * cluster;
  const int split_rounds = int(ceil_div(left, most));
  const bool split = left > 0 && cluster > 1 && split_rounds < cluster && stages >= 2 * cluster;
  plan.whole_tiles = split ? plan.num_tiles - left : plan.num_tiles;
  plan.num_clusters = std::min(most, std::max(plan.whole_tiles / cluster, split ? left : 0));
  if (!split) plan.num_clusters = std::min<int>(most, int(ceil_div(plan.num_tiles, cluster)));

  plan.cycles = cluster > 1 ? 2100.0 : 0.0;  // CTAs of a cluster meet
  const int rounds = whole_rounds + (left > 0 && !split ? 1 : 0);
  if (rounds > 0) {
    const int active = std::min(used_tiles, most * cluster);
    const double stage = stage_cycles(s, plan, active, plan.num_shares);
    plan.cycles += rounds * (stages * stage + 670.0 + 3.9 * rows);
  }
  if (split) {
    const int active = std::min(left, most) * cluster;
    const double stage = stage_cycles(s, plan, active, 1);
    const double sent = double(cluster - 1) / cluster;  // of the sums
    plan.cycles += split_rounds * (double(stages) / cluster * stage + 2300.0 + 23.0 * rows * sent +
                                   320.0 * cluster);
  }
  return plan;
}

HopperPlan best_hopper_plan(const HopperShape& s) {
  HopperPlan best;
  for (const int rows : {64, 128, 192, 256}) {
    if (rows == 192 && (s.bits < 16 || s.num_experts > 0)) continue;
    if (rows == 64 && s.num_experts > 0) continue;
    for (const int cluster : {1, 2, 3, 4, 6, 8}) {
      if (s.max_clusters[cluster] < 1) continue;
      if (s.num_experts > 0 && cluster > 1) continue;  // threads fetch x, each for its own CTA
      const HopperPlan plan = hopper_plan(s, rows, cluster);
      if (best.rows == 0 || plan.cycles < best.cycles) best = plan;
    }
  }
  return best;
}

}  // namespace fastgpt::gemm
