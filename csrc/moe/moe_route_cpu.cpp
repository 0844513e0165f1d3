#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "fastgpt/thread_pool.h"
#include "moe/kernels.h"

namespace fastgpt::moe {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Scratch {
  std::vector<float> score;   // what the weights are made of
  std::vector<float> choice;  // what the selection compares
  std::vector<float> group;
};

void score_experts(const float* logits, Scoring scoring, std::vector<float>& score) {
  const std::size_t num_experts = score.size();
  if (scoring == Scoring::kSigmoid) {
    for (std::size_t e = 0; e < num_experts; ++e) score[e] = 1.0F / (1.0F + std::exp(-logits[e]));
    return;
  }
  const float largest = *std::max_element(logits, logits + num_experts);
  float total = 0.0F;
  for (std::size_t e = 0; e < num_experts; ++e) total += score[e] = std::exp(logits[e] - largest);
  for (std::size_t e = 0; e < num_experts; ++e) score[e] /= total;
}

// Index of the largest value that is still available; the lowest among equals. NaN never wins,
// but when nothing else is left the lowest available index does.
std::size_t take_largest(std::vector<float>& values, std::vector<bool>& taken) {
  std::size_t best = values.size();
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!taken[i] && (best == values.size() || values[i] > values[best] ||
                      (std::isnan(values[best]) && !std::isnan(values[i])))) {
      best = i;
    }
  }
  taken[best] = true;
  return best;
}

void keep_best_groups(const MoeRouteParams& p, Scratch& s, std::vector<bool>& expert_taken) {
  const std::size_t width = s.choice.size() / std::size_t(p.num_groups);
  s.group.assign(std::size_t(p.num_groups), 0.0F);
  for (std::size_t g = 0; g < s.group.size(); ++g) {
    float best = kNever;
    float second = kNever;
    for (std::size_t e = g * width; e < (g + 1) * width; ++e) {
      if (s.choice[e] > best) {
        second = best;
        best = s.choice[e];
      } else {
        second = std::max(second, s.choice[e]);
      }
    }
    s.group[g] = p.correction_bias && width > 1 ? best + second : best;
  }
  std::vector<bool> kept(s.group.size(), false);
  for (int i = 0; i < p.topk_groups; ++i) take_largest(s.group, kept);
  for (std::size_t e = 0; e < s.choice.size(); ++e) expert_taken[e] = !kept[e / width];
}

void route_token(const MoeRouteParams& p, std::int64_t token, Scratch& s) {
  const float* logits = p.logits.as<float>() + token * p.logits.stride(0);
  score_experts(logits, p.scoring, s.score);
  s.choice = s.score;
  if (p.correction_bias) {
    const float* bias = p.correction_bias.as<float>();
    for (std::size_t e = 0; e < s.choice.size(); ++e) s.choice[e] += bias[e];
  }
  std::vector<bool> taken(s.choice.size(), false);
  if (p.topk_groups < p.num_groups) keep_best_groups(p, s, taken);
  std::int32_t* ids = p.expert_ids.as<std::int32_t>() + token * p.expert_ids.stride(0);
  float* weights = p.weights.as<float>() + token * p.weights.stride(0);
  float total = 0.0F;
  for (int j = 0; j < p.top_k; ++j) {
    const std::size_t expert = take_largest(s.choice, taken);
    ids[j] = std::int32_t(expert);
    weights[j] = s.score[expert];
    total += weights[j];
  }
  const float factor = p.renormalize ? p.scaling / (total + 1e-20F) : p.scaling;
  for (int j = 0; j < p.top_k; ++j) weights[j] *= factor;
}

}  // namespace

void moe_route_cpu(const MoeRouteParams& p) {
  const std::size_t num_experts = std::size_t(p.logits.size(1));
  parallel_for(0, p.logits.size(0), 1 + 4096 / p.logits.size(1),
               [&](std::int64_t a, std::int64_t b) {
                 Scratch scratch;
                 scratch.score.resize(num_experts);
                 for (std::int64_t i = a; i < b; ++i) route_token(p, i, scratch);
               });
}

}  // namespace fastgpt::moe
