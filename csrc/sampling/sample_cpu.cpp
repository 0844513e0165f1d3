#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "fastgpt/check.h"
#include "fastgpt/isa_table.h"
#include "fastgpt/thread_pool.h"
#include "sampling/draw.h"
#include "sampling/kernels.h"
#include "sampling/weigh.h"

namespace fastgpt::sampling {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Settings {
  float temperature;
  std::int64_t top_k;  // 0 = off
  float top_p;         // 1 = off
  float min_p;         // 0 = off
  std::uint64_t random;
};

// One row at work: runs of kRun logits with their largest value, and their weights once needed.
class Row {
 public:
  Row(const float* logits, std::int64_t vocab_size, const Runs& runs)
      : logits_(logits), vocab_size_(vocab_size), runs_(runs) {
    const std::size_t num_runs = std::size_t((vocab_size + kRun - 1) / kRun);
    run_largest_.resize(num_runs);
    run_weight_.assign(num_runs, 0);
    weights_.resize(num_runs * kRun);
    parallel_for(0, std::int64_t(num_runs), 512, [&](std::int64_t a, std::int64_t b) {
      for (std::int64_t i = a; i < b; ++i) {
        run_largest_[std::size_t(i)] = runs_.largest(logits_ + i * kRun, count(i));
      }
    });
    largest_ = *std::max_element(run_largest_.begin(), run_largest_.end());
  }

  std::int64_t draw(const Settings& s);

 private:
  std::int64_t count(std::int64_t run) const { return std::min(kRun, vocab_size_ - run * kRun); }
  std::int64_t greedy() const;
  float top_k_threshold(std::int64_t top_k) const;
  float top_p_threshold(float threshold, float top_p) const;
  std::uint64_t weigh(const Weighing& weighing);
  float nth_run_largest(std::size_t n) const;
  template <class Fn>
  void for_each_at_least(float threshold, Fn&& fn) const;

  const float* logits_;
  std::int64_t vocab_size_;
  const Runs& runs_;
  float largest_ = -kInfinity;
  std::vector<float> run_largest_;
  std::vector<std::uint64_t> run_weight_;
  std::vector<std::uint32_t> weights_;
};

std::int64_t Row::greedy() const {
  for (std::size_t run = 0; run < run_largest_.size(); ++run) {
    if (run_largest_[run] != largest_) continue;
    const float* first = logits_ + std::int64_t(run) * kRun;
    for (std::int64_t i = 0; i < count(std::int64_t(run)); ++i) {
      if (first[i] == largest_) return std::int64_t(run) * kRun + i;
    }
  }
  return 0;  // no logit is a number
}

// Call fn(id) for every logit >= threshold, skipping runs that cannot hold one.
template <class Fn>
void Row::for_each_at_least(float threshold, Fn&& fn) const {
  for (std::size_t run = 0; run < run_largest_.size(); ++run) {
    if (!(run_largest_[run] >= threshold)) continue;
    const std::int64_t first = std::int64_t(run) * kRun;
    for (std::int64_t i = first; i < first + count(std::int64_t(run)); ++i) {
      if (logits_[i] >= threshold) fn(i);
    }
  }
}

// The n-th largest of the runs' largest logits, from 1: at least n logits reach it.
float Row::nth_run_largest(std::size_t n) const {
  if (n > run_largest_.size()) return -kInfinity;
  std::vector<float> values(run_largest_);
  std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(n - 1), values.end(),
                   std::greater<>());
  return values[n - 1];
}

// The smallest logit that top-k keeps.
float Row::top_k_threshold(std::int64_t top_k) const {
  std::vector<float> values;
  for_each_at_least(nth_run_largest(std::size_t(top_k)),
                    [&](std::int64_t i) { values.push_back(logits_[i]); });
  if (std::int64_t(values.size()) < top_k) return -kInfinity;  // the rest is NaN
  std::nth_element(values.begin(), values.begin() + (top_k - 1), values.end(), std::greater<>());
  return values[std::size_t(top_k - 1)];
}

// The smallest logit that top-p keeps of those at or above `threshold`, whose weights are known.
float Row::top_p_threshold(float threshold, float top_p) const {
  std::uint64_t sum = 0;
  for (const std::uint64_t weight : run_weight_) sum += weight;
  const std::uint64_t target = top_p_target(sum, top_p);
  using Kept = std::pair<float, std::uint32_t>;
  std::vector<Kept> kept;
  const auto descending = [](const Kept& a, const Kept& b) { return a.first > b.first; };
  // Usually few tokens carry top_p of the weight: look at ever more of the largest.
  for (std::size_t num_runs = 32;; num_runs *= 16) {
    const float bound = std::max(threshold, nth_run_largest(num_runs));
    std::uint64_t found = 0;
    kept.clear();
    for_each_at_least(bound, [&](std::int64_t i) {
      const std::uint32_t weight = weights_[std::size_t(i)];
      if (weight == 0) return;
      kept.emplace_back(logits_[i], weight);
      found += weight;
    });
    if (found >= target || bound == threshold) break;
  }
  // Bisect by weight: the answer lies in [first, last), and `reached` weighs what stands before.
  auto first = kept.begin();
  auto last = kept.end();
  std::uint64_t reached = 0;
  while (last - first > 64) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, descending);
    std::uint64_t upper = 0;
    for (auto it = first; it != middle; ++it) upper += it->second;
    if (reached + upper >= target) {
      last = middle;
    } else {
      reached += upper;
      first = middle;
    }
  }
  std::sort(first, last, descending);
  for (auto it = first; it != last; ++it) {
    reached += it->second;
    if (reached >= target) return it->first;
  }
  return threshold;
}

// Weigh every token and return the sum.
std::uint64_t Row::weigh(const Weighing& weighing) {
  parallel_for(0, std::int64_t(run_largest_.size()), 256, [&](std::int64_t a, std::int64_t b) {
    for (std::int64_t run = a; run < b; ++run) {
      const std::size_t i = std::size_t(run);
      run_weight_[i] = run_largest_[i] >= weighing.threshold
                           ? runs_.weigh(logits_ + run * kRun, count(run), weighing,
                                         weights_.data() + run * kRun)
                           : 0;
    }
  });
  std::uint64_t sum = 0;
  for (const std::uint64_t weight : run_weight_) sum += weight;
  return sum;
}

std::int64_t Row::draw(const Settings& s) {
  if (!(s.temperature > 0.0F) || std::isinf(largest_)) return greedy();
  Weighing weighing{largest_, exponent_factor(s.temperature), -kInfinity, 0.0F};
  if (s.top_k > 0 && s.top_k < vocab_size_) weighing.threshold = top_k_threshold(s.top_k);
  if (s.top_p < 1.0F) {
    weigh(weighing);
    weighing.threshold = top_p_threshold(weighing.threshold, s.top_p);
  }
  weighing.min_p = s.min_p;
  const std::uint64_t target = multiply_high(s.random, weigh(weighing));
  std::uint64_t reached = 0;
  for (std::size_t run = 0; run < run_weight_.size(); ++run) {
    if (reached + run_weight_[run] <= target) {
      reached += run_weight_[run];
      continue;
    }
    for (std::size_t i = run * kRun;; ++i) {
      reached += weights_[i];
      if (reached > target) return std::int64_t(i);
    }
  }
  return greedy();
}

Settings settings_of(const SampleParams& p, std::int64_t row) {
  const Settings s{
      p.temperature.as<float>()[row], p.top_k.as<std::int32_t>()[row], p.top_p.as<float>()[row],
      p.min_p.as<float>()[row],
      random_bits(p.seeds.as<std::uint64_t>()[row], p.positions.as<std::uint64_t>()[row])};
  FASTGPT_CHECK(s.temperature >= 0.0F, "temperature[", row, "] is ", s.temperature,
                "; expected 0 (greedy) or more");
  FASTGPT_CHECK(s.top_k >= 0, "top_k[", row, "] is ", s.top_k, "; expected 0 (off) or more");
  FASTGPT_CHECK(s.top_p > 0.0F && s.top_p <= 1.0F, "top_p[", row, "] is ", s.top_p,
                "; expected more than 0, at most 1 (off)");
  FASTGPT_CHECK(s.min_p >= 0.0F && s.min_p <= 1.0F, "min_p[", row, "] is ", s.min_p,
                "; expected 0 (off) to 1");
  return s;
}

}  // namespace

void sample_cpu(const SampleParams& p) {
  for (std::int64_t i = 0; i < p.logits.size(0); ++i) settings_of(p, i);
  const Runs& runs = *table_of_isa(&kRunsPortable, &kRunsAvx2, &kRunsAvx512);
  parallel_for(0, p.logits.size(0), 1, [&](std::int64_t a, std::int64_t b) {
    for (std::int64_t i = a; i < b; ++i) {
      Row row(p.logits.as<float>() + i * p.logits.stride(0), p.logits.size(1), runs);
      p.ids.as<std::int64_t>()[i] = row.draw(settings_of(p, i));
    }
  });
}

}  // namespace fastgpt::sampling
