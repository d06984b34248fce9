// Sparse gradients as nn.Embedding makes them: row ids in no order, some of them more than once. Sorted, and rows of
// the same id summed in the order in which they came, in float32: the same bits with any number of threads. torch's
// coalesce sums in the order that its sort leaves, which is not stable, and rounds bfloat16 at every addition.

#include <algorithm>
#include <cstring>

#include "export.h"
#include "fields.h"
#include "parallel.h"
#include "vec.h"

namespace {

constexpr int MOST_BITS = 11;              // of a digit: its counts stay in the first-level cache
constexpr int64_t TASK_NUMEL = 1 << 15;    // elements of a task
constexpr int64_t PIECE = 1024;            // columns summed at once
constexpr int64_t AHEAD = 16;              // rows to prefetch
constexpr int64_t MOST_BYTES = 1024;       // of each of them
constexpr int64_t LINE = 64;               // bytes of a cache line

// Sorts by bits [32, 32 + bits), stable; the result is where it says.
uint64_t* radix_sort(uint64_t* keys, uint64_t* other, int64_t count, int bits) {
    int passes = (bits + MOST_BITS - 1) / MOST_BITS;
    for (int pass = 0; pass < passes; pass++) {
        int from = pass * bits / passes, to = (pass + 1) * bits / passes;
        uint64_t mask = (uint64_t{1} << (to - from)) - 1;
        int64_t starts[(1 << MOST_BITS) + 1] = {};
        for (int64_t i = 0; i < count; i++) starts[(keys[i] >> (32 + from) & mask) + 1]++;
        for (uint64_t digit = 0; digit < mask; digit++) starts[digit + 1] += starts[digit];
        for (int64_t i = 0; i < count; i++) other[starts[keys[i] >> (32 + from) & mask]++] = keys[i];
        std::swap(keys, other);
    }
    return keys;
}

INLINE F load_some(const float* from, int64_t count) { return load_part(from, count); }
INLINE F load_some(const uint16_t* from, int64_t count) { return widen(load_half_part(from, count)); }
INLINE void store_some(float* to, F x, int64_t count) { store_part(to, x, count); }
INLINE void store_some(uint16_t* to, F x, int64_t count) { store_half_part(to, narrow(x), count); }

// Sum of `count` elements of several rows, in float32.
template <class T>
void sum_piece(const T* values, int64_t columns, const int32_t* rows, const int32_t* end, int64_t count, T* to) {
    alignas(64) float total[PIECE];
    for (int64_t j = 0; j < count; j += LANES) store(total + j, F{});
    for (; rows < end; rows++)
        for (int64_t j = 0; j < count; j += LANES) {
            F x = load_some(values + *rows * columns + j, std::min<int64_t>(count - j, LANES));
            store(total + j, load(total + j) + x);
        }
    for (int64_t j = 0; j < count; j += LANES) store_some(to + j, load(total + j), std::min<int64_t>(count - j, LANES));
}

// Rows [begin, end) of the result.
template <class T>
void sum_rows(const T* values, int64_t columns, const int32_t* order, const int32_t* starts, int64_t begin, int64_t end,
              T* to) {
    int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
    for (int64_t row = begin; row < end; row++) {
        for (int32_t at = starts[row]; at < starts[row + 1] && at + AHEAD < starts[end]; at++)
            for (int64_t byte = 0; byte < std::min(bytes, MOST_BYTES); byte += LINE)
                __builtin_prefetch(reinterpret_cast<const char*>(values + order[at + AHEAD] * columns) + byte, 0, 3);
        T* sum = to + row * columns;
        if (starts[row + 1] - starts[row] == 1)
            std::memcpy(sum, values + order[starts[row]] * columns, bytes);
        else
            for (int64_t c = 0; c < columns; c += PIECE)
                sum_piece(values + c, columns, order + starts[row], order + starts[row + 1],
                          std::min(PIECE, columns - c), sum + c);
    }
}

}  // namespace

// Sorts ids[count], which are not negative and below 2^32; count is below 2^31. Into rows[] go the distinct ids,
// ascending; the id rows[r] is found at order[starts[r]] to order[starts[r + 1]], ascending. rows and order are of
// length count, starts of count + 1, scratch of 2 * count. Returns the number of distinct ids, or -1 where an id or
// count is not as said.
EXPORT int64_t lightning_sketch_sort_ids(const int64_t* ids, int64_t count, int64_t* rows, int32_t* order,
                                         int32_t* starts, uint64_t* scratch) {
    uint64_t all = 0;
    for (int64_t i = 0; i < count; i++) all |= static_cast<uint64_t>(ids[i]);
    if (all >> 32 || count >> 31) return -1;
    for (int64_t i = 0; i < count; i++) scratch[i] = static_cast<uint64_t>(ids[i]) << 32 | static_cast<uint64_t>(i);
    int bits = all ? 64 - __builtin_clzll(all) : 0;
    const uint64_t* sorted = radix_sort(scratch, scratch + count, count, bits);
    int64_t distinct = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t id = static_cast<int64_t>(sorted[i] >> 32);
        order[i] = static_cast<int32_t>(sorted[i]);
        if (i == 0 || id != rows[distinct - 1]) {
            rows[distinct] = id;
            starts[distinct++] = static_cast<int32_t>(i);
        }
    }
    starts[distinct] = static_cast<int32_t>(count);
    return distinct;
}

// sums[r] = values[order[starts[r]]] + ... + values[order[starts[r + 1] - 1]] for r in [0, distinct): rows of `columns`
// elements of the dtype, summed in float32. `parallel` is GOMP_parallel or null.
EXPORT void lightning_sketch_sum_rows(const void* values, int64_t columns, int32_t dtype, const int32_t* order,
                                      const int32_t* starts, int64_t distinct, void* sums, int threads,
                                      void* parallel) {
    if (columns == 0) return;
    int64_t rows = std::max<int64_t>(1, TASK_NUMEL / columns);
    parallel_for(reinterpret_cast<Parallel>(parallel), threads, (distinct + rows - 1) / rows, [&](int64_t task, int) {
        int64_t begin = task * rows, end = std::min(begin + rows, distinct);
        if (dtype == BFLOAT16)
            sum_rows(static_cast<const uint16_t*>(values), columns, order, starts, begin, end,
                     static_cast<uint16_t*>(sums));
        else
            sum_rows(static_cast<const float*>(values), columns, order, starts, begin, end, static_cast<float*>(sums));
    });
}
