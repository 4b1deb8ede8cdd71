// Attention over whole rows of its map, and the sums of the map's columns, which are read while a block of rows lies in
// the cache of a core: the map is made once.
//
// Tensors are float32, the last dimension contiguous; `strides` has the first three of query, key, value and out.
// `received` is [batch, heads, groups, keys]: a thread works on one of `groups` parts of a head's queries at a time.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kBlock = 1 << 18; // numbers of the map alive at a time: a megabyte
constexpr int64_t kRows = 128; // at most, of a block
constexpr int64_t kFewest = 16; // fewer make the products slow
constexpr int64_t kWide = Vec::size();
constexpr int64_t kSums = 4; // vectors of sums that stay in registers

// A row of logits becomes exp(x - max); returns what makes it a row of the map.
float exponentials(float* row, int64_t keys) {
  const int64_t whole = keys - keys % kWide;
  Vec highest(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < whole; j += kWide)
    highest = at::vec::maximum(highest, Vec::loadu(row + j));
  float top = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, highest);
  for (int64_t j = whole; j < keys; ++j)
    top = std::max(top, row[j]);
  Vec totals(0.f);
  for (int64_t j = 0; j < whole; j += kWide) {
    const Vec made = (Vec::loadu(row + j) - Vec(top)).exp_u20();
    made.store(row + j);
    totals = totals + made;
  }
  float total = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, totals);
  for (int64_t j = whole; j < keys; ++j)
    total += row[j] = std::exp(row[j] - top);
  return 1.f / total;
}

// Adds every `stride`-th of some rows, each times its factor.
void add_rows(float* sums, const float* rows, const float* factors, int64_t count, int64_t stride, int64_t keys) {
  int64_t j = 0;
  for (; j + kSums * kWide <= keys; j += kSums * kWide) {
    Vec found[kSums];
    for (int64_t n = 0; n < kSums; ++n)
      found[n] = Vec::loadu(sums + j + n * kWide);
    for (int64_t i = 0; i < count; i += stride)
      for (int64_t n = 0; n < kSums; ++n)
        found[n] = at::vec::fmadd(Vec(factors[i]), Vec::loadu(rows + i * keys + j + n * kWide), found[n]);
    for (int64_t n = 0; n < kSums; ++n)
      found[n].store(sums + j + n * kWide);
  }
  for (int64_t i = 0; i < count; i += stride)
    for (int64_t rest = j; rest < keys; ++rest)
      sums[rest] += factors[i] * rows[i * keys + rest];
}

} // namespace

extern "C" void attention(
    const float* query,
    const float* key,
    const float* value,
    float* out,
    float* received,
    const int64_t* sizes,
    const int64_t* strides,
    double scale,
    int64_t stride,
    int64_t threads) {
  const int64_t batch = sizes[0], heads = sizes[1], queries = sizes[2], keys = sizes[3];
  const int64_t size = sizes[4], size_of_value = sizes[5], groups = sizes[6];
  const int64_t block = std::clamp(kBlock / keys, kFewest, kRows);
  const int64_t part = (queries + groups - 1) / groups;
#pragma omp parallel num_threads(threads)
  {
    const c10::InferenceMode guard;
    const at::Tensor room = at::empty({block, keys}, at::kFloat);
    std::vector<float> factors(block);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * heads * groups; ++task) {
      const int64_t sample = task / (heads * groups), head = task / groups % heads, group = task % groups;
      // Some rows of one head of query, key, value or out.
      const auto rows_of = [&](const float* x, int64_t which, int64_t first, int64_t rows, int64_t columns) {
        const int64_t* by = strides + 3 * which;
        float* start = const_cast<float*>(x) + sample * by[0] + head * by[1] + first * by[2];
        return at::from_blob(start, {rows, columns}, {by[2], 1});
      };
      const at::Tensor keys_of_head = rows_of(key, 1, 0, keys, size).t().mul(scale).contiguous();
      const at::Tensor values_of_head = rows_of(value, 2, 0, keys, size_of_value).contiguous();
      float* const sums = received + task * keys;
      std::fill_n(sums, keys, 0.f);
      const int64_t end = std::min(queries, (group + 1) * part);
      for (int64_t first = group * part; first < end; first += block) {
        const int64_t rows = std::min(block, end - first);
        at::Tensor map = room.narrow(0, 0, rows);
        at::cpu::mm_out(map, rows_of(query, 0, first, rows, size), keys_of_head);
        float* const first_row = map.data_ptr<float>();
        for (int64_t i = 0; i < rows; ++i)
          factors[i] = exponentials(first_row + i * keys, keys);
        const int64_t skipped = (stride - first % stride) % stride;
        add_rows(sums, first_row + skipped * keys, factors.data() + skipped, rows - skipped, stride, keys);
        at::Tensor rows_of_out = rows_of(out, 3, first, rows, size_of_value);
        at::cpu::mm_out(rows_of_out, map, values_of_head);
        float* row_of_out = rows_of_out.data_ptr<float>();
        for (int64_t i = 0; i < rows; ++i, row_of_out += strides[11])
          for (int64_t j = 0; j < size_of_value; ++j)
            row_of_out[j] *= factors[i];
      }
    }
  }
}
