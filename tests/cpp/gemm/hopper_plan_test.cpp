#include "gemm/hopper_plan.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

namespace fastgpt::gemm {
namespace {

// An H100: clusters of 4 and more leave some of its SMs idle.
constexpr int kMaxClusters[9] = {0, 132, 66, 39, 30, 22, 17, 15, 15};

HopperShape shape(std::int64_t rows, std::int64_t n, std::int64_t k, int bits = 16) {
  return {rows, n, k, 1, 0, bits, 132, kMaxClusters};
}

/// Walk the tiles as every CTA of the kernel does and count the stages summed up of each one.
std::map<int, int> stages_of_tiles(const HopperPlan& plan, int stages) {
  std::map<int, int> done;
  for (int cluster = 0; cluster < plan.num_clusters; ++cluster) {
    for (int rank = 0; rank < plan.cluster; ++rank) {
      for (int i = cluster;; i += plan.num_clusters) {
        const int index = i * plan.cluster + rank;
        if (index >= plan.whole_tiles) break;
        done[index] += stages;
      }
      for (int i = cluster; plan.whole_tiles + i < plan.num_tiles; i += plan.num_clusters) {
        done[plan.whole_tiles + i] +=
            stages * (rank + 1) / plan.cluster - stages * rank / plan.cluster;
      }
    }
  }
  return done;
}

TEST(HopperPlan, EveryStageOfEveryTileIsSummedOnce) {
  std::mt19937 random(1);
  const auto draw = [&](int most) { return std::int64_t(random() % unsigned(most)) + 1; };
  for (int i = 0; i < 100; ++i) {
    const HopperShape s = shape(draw(5000), draw(20000), draw(9000), i % 2 ? 16 : 4);
    const int stages = int((s.k + 63) / 64);
    for (const int rows : {64, 128, 256}) {
      for (const int cluster : {1, 2, 3, 4, 6, 8}) {
        const HopperPlan plan = hopper_plan(s, rows, cluster);
        ASSERT_GE(plan.num_clusters, 1);
        ASSERT_LE(plan.num_clusters, kMaxClusters[cluster]);
        // CTAs that share x meet at every stage: all of a cluster need as many whole tiles.
        ASSERT_EQ(plan.whole_tiles % plan.num_shares, 0);
        const std::map<int, int> done = stages_of_tiles(plan, stages);
        ASSERT_EQ(int(done.size()), plan.num_tiles);
        for (const auto& [tile, count] : done) ASSERT_EQ(count, stages) << "tile " << tile;
      }
    }
  }
}

TEST(HopperPlan, TilesCoverTheProduct) {
  for (const std::int64_t rows : {1, 64, 65, 257, 4096}) {
    for (const std::int64_t n : {1, 128, 129, 37888}) {
      const HopperPlan plan = best_hopper_plan(shape(rows, n, 1536));
      EXPECT_GE(std::int64_t(plan.row_tiles) * plan.rows, rows);
      EXPECT_GE(std::int64_t(plan.weight_tiles) * 128, n);
      EXPECT_EQ(plan.num_tiles, plan.row_tiles * plan.weight_tiles);
    }
  }
}

TEST(HopperPlan, ExpertsGetTilesForAnyRouting) {
  HopperShape s = shape(1000, 1408, 2048);
  s.num_experts = 64;
  const HopperPlan plan = best_hopper_plan(s);
  EXPECT_EQ(plan.cluster, 1);
  // The worst routing: one row each for all experts but one, which gets the rest.
  EXPECT_GE(plan.row_tiles, 63 + (1000 - 63 + plan.rows - 1) / plan.rows);
}

TEST(HopperPlan, FewTilesAreSplit) {
  const HopperPlan plan = best_hopper_plan(shape(64, 1536, 8960));
  EXPECT_GE(plan.num_clusters * plan.cluster, 64) << "most of the device stands idle";
}

}  // namespace
}  // namespace fastgpt::gemm
