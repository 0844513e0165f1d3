#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "fastgpt/isa_table.h"
#include "fastgpt/thread_pool.h"
#include "moe/kernels.h"
#include "moe/route.h"

namespace fastgpt::moe {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

/// Values to choose from, largest first. NaN never wins, but when nothing else is left the lowest
/// index does.
class Choices {
 public:
  void reset(std::size_t size) {
    values_.resize(size);
    taken_.assign(size, 0);
  }
  void set(std::size_t i, float value) { values_[i] = std::isnan(value) ? kNever : value; }
  void drop(std::size_t i) {
    values_[i] = kNever;
    taken_[i] = 1;
  }
  bool is_taken(std::size_t i) const { return taken_[i] != 0; }
  std::size_t size() const { return values_.size(); }
  float operator[](std::size_t i) const { return values_[i]; }

  /// Take the largest value that is left, the lowest index among equals.
  std::size_t take(const RouteLoops& loops) {
    auto best = std::size_t(loops.first_largest(values_.data(), std::int64_t(values_.size())));
    if (values_[best] == kNever) best = lowest_left();
    drop(best);
    return best;
  }

 private:
  // Only what was never a number, or minus infinity, is left.
  std::size_t lowest_left() const {
    return std::size_t(std::find(taken_.begin(), taken_.end(), 0) - taken_.begin());
  }

  std::vector<float> values_;
  std::vector<std::uint8_t> taken_;
};

struct Scratch {
  std::vector<float> score;  // what the weights are made of
  Choices experts;
  Choices groups;
};

void drop_lesser_groups(const MoeRouteParams& p, const RouteLoops& loops, Scratch& s) {
  const std::size_t num_groups = std::size_t(p.num_groups);
  const std::size_t width = s.experts.size() / num_groups;
  s.groups.reset(num_groups);
  for (std::size_t g = 0; g < num_groups; ++g) {
    float best = kNever;
    float second = kNever;
    for (std::size_t e = g * width; e < (g + 1) * width; ++e) {
      second = std::max(second, std::min(best, s.experts[e]));
      best = std::max(best, s.experts[e]);
    }
    s.groups.set(g, p.correction_bias && width > 1 ? best + second : best);
  }
  for (int i = 0; i < p.topk_groups; ++i) s.groups.take(loops);
  for (std::size_t g = 0; g < num_groups; ++g) {
    if (s.groups.is_taken(g)) continue;
    for (std::size_t e = g * width; e < (g + 1) * width; ++e) s.experts.drop(e);
  }
}

void route_token(const MoeRouteParams& p, const RouteLoops& loops, std::int64_t token, Scratch& s) {
  const std::size_t num_experts = s.score.size();
  loops.score(p.logits.as<float>() + token * p.logits.stride(0), std::int64_t(num_experts),
              p.scoring == Scoring::kSigmoid, s.score.data());
  const float* bias = p.correction_bias ? p.correction_bias.as<float>() : nullptr;
  s.experts.reset(num_experts);
  for (std::size_t e = 0; e < num_experts; ++e) {
    s.experts.set(e, bias == nullptr ? s.score[e] : s.score[e] + bias[e]);
  }
  if (p.topk_groups < p.num_groups) drop_lesser_groups(p, loops, s);
  std::int32_t* ids = p.expert_ids.as<std::int32_t>() + token * p.expert_ids.stride(0);
  float* weights = p.weights.as<float>() + token * p.weights.stride(0);
  float total = 0.0F;
  for (int j = 0; j < p.top_k; ++j) {
    const std::size_t expert = s.experts.take(loops);
    ids[j] = std::int32_t(expert);
    weights[j] = s.score[expert];
    total += weights[j];
  }
  const float factor = p.renormalize ? p.scaling / (total + 1e-20F) : p.scaling;
  for (int j = 0; j < p.top_k; ++j) weights[j] *= factor;
}

}  // namespace

void moe_route_cpu(const MoeRouteParams& p) {
  const RouteLoops& loops =
      *table_of_isa(&kRouteLoopsPortable, &kRouteLoopsAvx2, &kRouteLoopsAvx512);
  parallel_for(0, p.logits.size(0), 1 + 4096 / p.logits.size(1),
               [&](std::int64_t a, std::int64_t b) {
                 Scratch scratch;
                 scratch.score.resize(std::size_t(p.logits.size(1)));
                 for (std::int64_t i = a; i < b; ++i) route_token(p, loops, i, scratch);
               });
}

}  // namespace fastgpt::moe
