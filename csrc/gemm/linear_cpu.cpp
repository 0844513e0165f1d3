// The CPU driver of every product: converts x once, cuts the work into tasks of a few column
// blocks, and lets the threads take tasks as they become free. Columns are split, never k, so the
// result does not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "fastgpt/cpu_isa.h"
#include "fastgpt/dispatch.h"
#include "fastgpt/thread_pool.h"
#include "gemm/cpu_layout.h"
#include "gemm/kernels.h"
#include "gemm/panel.h"

namespace fastgpt::gemm {
namespace {

constexpr std::int64_t kSegment = 512;  // k per partial sum where the format fixes none
constexpr std::int64_t kFp8Block = 128;
constexpr std::int64_t kTaskBytes = 96
                                    << 10;  // of weights; smaller tasks cost more than they balance

PanelKernels kernels() {
  switch (cpu_isa()) {
    case CpuIsa::kPortable:
      return panel_kernels_portable();
    case CpuIsa::kAVX2:
      return panel_kernels_avx2();
    case CpuIsa::kAVX512:
      return use_bf16_dot() ? panel_kernels_avx512bf16() : panel_kernels_avx512();
  }
  return panel_kernels_portable();
}

Storage storage_of(const WeightView& w, bool row_major) {
  if (row_major) return Storage::kRowMajor;
  if (w.format == WeightFormat::kFp8) return Storage::kFp8;
  if (w.format == WeightFormat::kInt8) return Storage::kInt8;
  if (w.format == WeightFormat::kInt4) return Storage::kInt4;
  if (w.packed.dtype == DType::kF32) return Storage::kF32;
  return w.packed.dtype == DType::kF16 ? Storage::kF16 : Storage::kBF16;
}

/// Rows of x in the kernel's type, padded with zeros to whole steps, int4 groups spread apart.
class Rows {
 public:
  /// Convert `count` rows to `compute`; row(i) points at row i of x, of `dtype`. The result lives
  /// until the next call.
  template <class RowFn>
  void convert(const KLayout& layout, DType compute, DType dtype, std::int64_t count, bool sums,
               RowFn&& row) {
    layout_ = layout;
    compute_ = compute;
    rows_.resize(std::size_t(count));
    const std::int64_t width = layout_.steps() * kStep;
    const std::int64_t row_bytes = (width * dtype_bytes(compute_) + 63) / 64 * 64;
    const bool borrow = dtype == compute_ && width == layout_.k;
    if (!borrow) buffer_.resize(std::size_t(count * row_bytes + 64));
    std::uint8_t* base = buffer_.data() + (64 - std::uintptr_t(buffer_.data()) % 64) % 64;
    for (std::int64_t i = 0; i < count; ++i) {
      rows_[std::size_t(i)] = borrow ? row(i) : base + i * row_bytes;
    }
    if (!borrow) {
      parallel_for(0, count, 1 + 32768 / std::max<std::int64_t>(width, 1),
                   [&](std::int64_t first, std::int64_t last) {
                     for (std::int64_t i = first; i < last; ++i) {
                       convert_row(dtype, row(i), base + i * row_bytes, width);
                     }
                   });
    }
    if (sums) add_sums(count);
  }

  const void* const* rows() const { return rows_.data(); }
  const float* const* sums() const { return sum_rows_.data(); }

 private:
  void convert_row(DType dtype, const void* from, void* to, std::int64_t width) const {
    std::memset(to, 0, std::size_t(width * dtype_bytes(compute_)));
    for (std::int64_t g = 0; g < layout_.k; g += layout_.group_size) {
      const std::int64_t count = std::min(layout_.group_size, layout_.k - g);
      const std::int64_t at = layout_.position(g);
      if (dtype == compute_) {
        const int bytes = dtype_bytes(dtype);
        std::memcpy(static_cast<std::uint8_t*>(to) + at * bytes,
                    static_cast<const std::uint8_t*>(from) + g * bytes, std::size_t(count * bytes));
        continue;
      }
      float* out = static_cast<float*>(to) + at;
      dispatch_float(dtype, [&](auto tag) {
        const auto* in = static_cast<const decltype(tag)*>(from) + g;
        for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
      });
    }
  }

  void add_sums(std::int64_t count) {
    const std::int64_t groups = layout_.num_groups();
    const std::int64_t group_values = layout_.group_steps() * kStep;
    const std::int64_t width = layout_.steps() * kStep;
    sums_.resize(std::size_t(count * groups));
    sum_rows_.resize(std::size_t(count));
    for (std::int64_t i = 0; i < count; ++i) {
      sum_rows_[std::size_t(i)] = sums_.data() + i * groups;
      for (std::int64_t g = 0; g < groups; ++g) {
        float sum = 0.0F;
        for (std::int64_t k = g * group_values; k < std::min(width, (g + 1) * group_values); ++k) {
          const void* row = rows_[std::size_t(i)];
          sum += compute_ == DType::kF32 ? static_cast<const float*>(row)[k]
                                         : to_float(static_cast<const BFloat16*>(row)[k]);
        }
        sums_[std::size_t(i * groups + g)] = sum;
      }
    }
  }

  KLayout layout_{};
  DType compute_ = DType::kF32;
  std::vector<std::uint8_t> buffer_;
  std::vector<const void*> rows_;
  std::vector<float> sums_;
  std::vector<const float*> sum_rows_;
};

struct Plan {
  PanelTask task{};  // of weight 0 of a stack
  std::int64_t blocks = 0;
  std::int64_t weight_bytes = 0;  // of one weight of a stack
  std::int64_t channel_scales = 0;
  std::int64_t block_scales = 0;
  std::int64_t group_scales = 0;
  KLayout layout{};
  DType compute = DType::kF32;
};

Plan make_plan(const WeightView& w, std::int64_t n, std::int64_t k, bool stacked, DType x_dtype,
               DType out_dtype) {
  Plan plan;
  PanelTask& t = plan.task;
  const bool row_major = w.format == WeightFormat::kDense && w.packed.ndim == (stacked ? 3 : 2);
  plan.layout = k_layout(w.format, k, w.group_size);
  plan.blocks = ceil_div(n, kBlockColumns);
  t.storage = storage_of(w, row_major);
  t.weight = w.packed.as<std::uint8_t>();
  t.row_dtype = w.packed.dtype;
  t.n = n;
  t.k = k;
  t.steps = plan.layout.steps();
  t.segment_steps = kSegment / kStep;
  t.out_dtype = out_dtype;
  const int bytes = dtype_bytes(w.packed.dtype);
  t.row_bytes = row_major ? w.packed.stride(-2) * bytes : 0;
  if (stacked) plan.weight_bytes = w.packed.stride(0) * bytes;
  if (w.format == WeightFormat::kFp8 || w.format == WeightFormat::kInt8) {
    if (w.scale.ndim == (stacked ? 3 : 2)) {
      t.block_scale = w.scale.as<float>();
      t.segment_steps = kFp8Block / kStep;
      plan.block_scales = ceil_div(n, kFp8Block) * ceil_div(k, kFp8Block);
    } else {
      t.channel_scale = w.scale.as<float>();
      plan.channel_scales = n;
    }
  } else if (w.format == WeightFormat::kInt4) {
    t.group_scale = w.scale.as<std::uint16_t>();
    t.zero_point = w.zero_point.as<std::uint8_t>();
    t.segment_steps = plan.layout.group_steps();
    plan.group_scales = plan.blocks * plan.layout.num_groups() * kBlockColumns;
  }
  const bool bf16_weight = w.packed.dtype == DType::kBF16 || w.format != WeightFormat::kDense;
  if (x_dtype == DType::kBF16 && bf16_weight && kernels().bf16) plan.compute = DType::kBF16;
  return plan;
}

PanelTask task_of(const Plan& plan, std::int64_t index) {
  PanelTask t = plan.task;
  t.weight += index * plan.weight_bytes;
  if (t.channel_scale) t.channel_scale += index * plan.channel_scales;
  if (t.block_scale) t.block_scale += index * plan.block_scales;
  if (t.group_scale) t.group_scale += index * plan.group_scales;
  if (t.zero_point) t.zero_point += index * plan.group_scales;
  return t;
}

/// Run every task of every product; `products` share the plan's shape.
void run_products(const Plan& plan, const std::vector<PanelTask>& products) {
  const std::int64_t threads = num_threads();
  const std::int64_t num_products = std::int64_t(products.size());
  const std::int64_t block_bytes =
      std::max<std::int64_t>(1, plan.task.steps * kStep * kBlockColumns / 2);
  // A task is an even number of blocks, about kTaskBytes, but at least two tasks a thread if so.
  std::int64_t chunk = std::clamp<std::int64_t>(kTaskBytes / block_bytes, 2, 16);
  const std::int64_t fair = plan.blocks * num_products / (2 * threads);
  chunk = std::max<std::int64_t>(2, std::min(chunk, fair) / 2 * 2);
  const std::int64_t chunks = ceil_div(plan.blocks, chunk);
  const std::int64_t num_tasks = chunks * num_products;
  const auto kernel = plan.compute == DType::kBF16 ? kernels().bf16 : kernels().f32;
  std::atomic<std::int64_t> next{0};
  parallel_for(0, std::min(threads, num_tasks), 1, [&](std::int64_t, std::int64_t) {
    for (;;) {
      const std::int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= num_tasks) return;
      PanelTask task = products[std::size_t(i / chunks)];
      task.block_begin = i % chunks * chunk;
      task.block_end = std::min(plan.blocks, task.block_begin + chunk);
      kernel(task);
    }
  });
}

const std::uint8_t* row_of(const TensorView& view, std::int64_t i, std::int64_t j = 0) {
  const std::int64_t at = i * view.stride(0) + (view.ndim == 3 ? j * view.stride(1) : 0);
  return view.as<std::uint8_t>() + at * dtype_bytes(view.dtype);
}

void* out_row(const TensorView& view, std::int64_t i, std::int64_t j = 0) {
  return const_cast<std::uint8_t*>(row_of(view, i, j));
}

std::vector<float> floats(const TensorView& view) {
  std::vector<float> values;
  if (!view) return values;
  values.resize(std::size_t(view.numel()));
  dispatch_float(view.dtype, [&](auto tag) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = to_float(view.as<decltype(tag)>()[i]);
    }
  });
  return values;
}

}  // namespace

void linear_cpu(const LinearParams& p) {
  const std::int64_t num_rows = p.x.size(0);
  const Plan plan = make_plan(p.weight, p.out.size(1), p.x.size(1), false, p.x.dtype, p.out.dtype);
  thread_local Rows rows;
  rows.convert(plan.layout, plan.compute, p.x.dtype, num_rows, plan.task.zero_point != nullptr,
               [&](std::int64_t i) { return row_of(p.x, i); });
  std::vector<void*> out;
  for (std::int64_t i = 0; i < num_rows; ++i) out.push_back(out_row(p.out, i));
  const std::vector<float> bias = floats(p.bias);
  PanelTask task = plan.task;
  task.bias = p.bias ? bias.data() : nullptr;
  task.num_rows = num_rows;
  task.x = rows.rows();
  task.x_sums = rows.sums();
  task.out = out.data();
  run_products(plan, {task});
}

void batched_linear_cpu(const BatchedLinearParams& p) {
  const std::int64_t num_rows = p.x.size(0);
  const std::int64_t num_heads = p.x.size(1);
  const WeightView weight{WeightFormat::kDense, p.weight, {}, {}, 0};
  const Plan plan = make_plan(weight, p.out.size(2), p.x.size(2), true, p.x.dtype, p.out.dtype);
  thread_local Rows rows;
  rows.convert(plan.layout, plan.compute, p.x.dtype, num_heads * num_rows, false,
               [&](std::int64_t i) { return row_of(p.x, i % num_rows, i / num_rows); });
  std::vector<void*> out;
  for (std::int64_t i = 0; i < num_heads * num_rows; ++i) {
    out.push_back(out_row(p.out, i % num_rows, i / num_rows));
  }
  std::vector<PanelTask> products;
  for (std::int64_t h = 0; h < num_heads; ++h) {
    PanelTask task = task_of(plan, h);
    task.num_rows = num_rows;
    task.x = rows.rows() + h * num_rows;
    task.out = out.data() + h * num_rows;
    products.push_back(task);
  }
  run_products(plan, products);
}

void grouped_linear_cpu(const GroupedLinearParams& p) {
  const std::int64_t num_experts = p.offsets.size(0) - 1;
  const std::int64_t num_rows = p.out.size(0);
  const std::int32_t* offsets = p.offsets.as<std::int32_t>();
  const std::int32_t* sorted = p.sorted_rows.as<std::int32_t>();
  FASTGPT_CHECK(offsets[0] == 0 && offsets[num_experts] == num_rows, "offsets run from ",
                offsets[0], " to ", offsets[num_experts], "; expected 0 to ", num_rows);
  for (std::int64_t e = 0; e < num_experts; ++e) {
    FASTGPT_CHECK(offsets[e] <= offsets[e + 1], "offsets decrease at expert ", e);
  }
  const Plan plan = make_plan(p.weight, p.out.size(1), p.x.size(1), true, p.x.dtype, p.out.dtype);
  thread_local Rows rows;
  rows.convert(plan.layout, plan.compute, p.x.dtype, p.x.size(0), plan.task.zero_point != nullptr,
               [&](std::int64_t i) { return row_of(p.x, i); });
  std::vector<const void*> x;
  std::vector<const float*> sums;
  std::vector<void*> out;
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const std::int64_t row = sorted[i];
    FASTGPT_CHECK(row >= 0 && row < num_rows, "sorted_rows[", i, "] is ", row, "; expected 0 .. ",
                  num_rows - 1);
    x.push_back(rows.rows()[row / p.rows_per_token]);
    if (plan.task.zero_point) sums.push_back(rows.sums()[row / p.rows_per_token]);
    out.push_back(out_row(p.out, row));
  }
  std::vector<PanelTask> products;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (offsets[e] == offsets[e + 1]) continue;
    PanelTask task = task_of(plan, e);
    task.num_rows = offsets[e + 1] - offsets[e];
    task.x = x.data() + offsets[e];
    task.x_sums = sums.data() + (plan.task.zero_point ? offsets[e] : 0);
    task.out = out.data() + offsets[e];
    products.push_back(task);
  }
  run_products(plan, products);
}

}  // namespace fastgpt::gemm
