// Attention over whole rows of its map, and the sums of the map's columns, which are read while a block of rows lies in
// the cache of a core: the map is made once.
//
// Tensors are float32, the last dimension contiguous; `strides` has the first three of query, key, value and out.
// `received` is [batch, heads, groups, keys]: a thread works on one of `groups` parts of a head's queries at a time.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_softmax_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kBlock = 1 << 18; // numbers of the map alive at a time: a megabyte
constexpr int64_t kRows = 128; // at most, of a block
constexpr int64_t kFewest = 16; // fewer make the products slow

// Adds every `stride`-th of `rows` rows, four at a time, so that the sums are read and written a quarter as often.
void add_rows(float* sums, const float* row, int64_t rows, int64_t stride, int64_t keys) {
  const int64_t next = stride * keys;
  int64_t left = (rows + stride - 1) / stride;
  for (; left >= 4; left -= 4, row += 4 * next) {
#pragma omp simd
    for (int64_t j = 0; j < keys; ++j)
      sums[j] += (row[j] + row[j + next]) + (row[j + 2 * next] + row[j + 3 * next]);
  }
  for (; left > 0; --left, row += next) {
#pragma omp simd
    for (int64_t j = 0; j < keys; ++j)
      sums[j] += row[j];
  }
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
        at::cpu::_softmax_out(map, map, 1, false);
        const int64_t skipped = (stride - first % stride) % stride;
        add_rows(sums, map.const_data_ptr<float>() + skipped * keys, rows - skipped, stride, keys);
        at::Tensor rows_of_out = rows_of(out, 3, first, rows, size_of_value);
        at::cpu::mm_out(rows_of_out, map, values_of_head);
      }
    }
  }
}
