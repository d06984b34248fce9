// The gradient's rows as floats, and sums of their squares.
#pragma once

#include "steps.h"
#include "vec.h"

namespace {

constexpr int64_t CHUNK = 1024;     // floats of a row that are worked on together: they stay in the first-level cache
constexpr int64_t PREFETCH = 1024;  // elements ahead
constexpr float MOST_MEAN = 0x1p90f;  // of squares, see schema.py

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Processors prefetch what is read from end to end, and are slowed down by half if it is prefetched for them. Not so where gradient,
// states and parameter are read in turn, a row or a chunk of one while the others wait.
inline bool reads_in_turn(const StepArgs& layer) {
    const State& second = layer.second;
    bool row_first = second.kind == ROW && second.weight != 0.0f && layer.first.kind == NONE;
    return !layer.ids && (row_first || second.kind == QUANTIZED);
}
// Rows up to here, in elements, are prefetched by the step of the row before.
constexpr int64_t PREFETCHED_ROW = 1 << 15;
// How many elements ahead to prefetch the gradient where a row is looked at and then stepped: in the first pass over it, and in
// the second.
inline int64_t ahead_in_first(const StepArgs& layer) {
    return layer.ids || (reads_in_turn(layer) && layer.columns > PREFETCHED_ROW) ? PREFETCH : 0;
}
inline int64_t ahead_in_second(const StepArgs& layer) {
    return !reads_in_turn(layer) ? 0 : layer.columns > PREFETCHED_ROW ? PREFETCH : most(PREFETCH, layer.columns);
}

inline int64_t row_of(const StepArgs& layer, int64_t i) { return layer.ids ? layer.ids[i] : i; }

inline const void* element(const void* base, int32_t dtype, int64_t at) {
    return (const char*)base + at * (dtype == BFLOAT16 ? 2 : 4);
}

// Functions that prefetch must be inlined: GCC takes them for pure and drops calls whose result it does not need.
INLINE void prefetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)from + at, 1, 3);
}

// `count` values as float, then zeros up to a multiple of LANES.
inline void widen_to(float* to, const void* from, int32_t dtype, int64_t count) {
    int64_t whole = count / LANES * LANES;
    if (dtype == BFLOAT16) {
        const uint16_t* half = (const uint16_t*)from;
        for (int64_t i = 0; i < whole; i += LANES) store(to + i, widen(load_half(half + i)));
        if (whole < count) store(to + whole, widen(load_half_part(half + whole, count - whole)));
    } else {
        const float* full = (const float*)from;
        for (int64_t i = 0; i < whole; i += LANES) store(to + i, load(full + i));
        if (whole < count) store(to + whole, load_part(full + whole, count - whole));
    }
}

// Whether all values are finite: if the exponent of one is not all ones, adding one to it does not carry into the sign's bit.
inline bool finite(const void* values, int64_t count, int32_t dtype, int64_t ahead = 0) {
    uint32_t bad = 0;
    if (dtype == BFLOAT16) {
        const uint16_t* half = (const uint16_t*)values;
        H any = {};
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            if (ahead) __builtin_prefetch(half + i + ahead, 0, 3);
            any |= (load_half(half + i) & 0x7f80) + 0x80;
        }
        for (; i < count; i++) bad |= (half[i] & 0x7f80u) + 0x80u;
        for (int lane = 0; lane < LANES; lane++) bad |= any[lane];
        return !(bad & 0x8000u);
    }
    const float* full = (const float*)values;
    U any[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            if (ahead) __builtin_prefetch(full + i + k * LANES + ahead, 0, 3);
            any[k] |= (float_to_bits(load(full + i + k * LANES)) & 0x7f800000u) + 0x800000u;
        }
    for (; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, full + i, sizeof bits);
        bad |= (bits & 0x7f800000u) + 0x800000u;
    }
    U all = (any[0] | any[1]) | (any[2] | any[3]);
    uint32_t words[LANES];
    all.store(words);
    for (uint32_t word : words) bad |= word;
    return !(bad & 0x80000000u);
}

// Whether the i-th row of the gradient, as it was given, is finite.
inline bool finite_row(const StepArgs& layer, int64_t i, int64_t ahead) {
    return finite(element(layer.grad, layer.dtype, i * layer.columns), layer.columns, layer.dtype, ahead);
}

// The same of a row whose mean of squares is known: where that is finite, so is the row; finite squares may overflow, but not
// where all rows share their sums.
inline bool finite_by_mean(const StepArgs& layer, int64_t i, float mean) {
    if (layer.second.kind == FACTORED) return mean < MOST_MEAN;
    return mean - mean == 0.0f || finite_row(layer, i, 0);  // it was read just now
}

inline bool is_left(const StepArgs& layer, int64_t i) { return layer.left && layer.left[i]; }

inline void count_left_out(const StepArgs& layer, int64_t count) {
    if (count) __atomic_fetch_add(layer.left_out, count, __ATOMIC_RELAXED);
}

// The gradient of `count` elements from column c of the i-th row, after maximize and coupled weight decay; in place if
// nothing is to be done.
inline const float* gradient_of(const StepArgs& layer, int64_t i, int64_t c, int64_t count, float* buffer) {
    const void* from = element(layer.grad, layer.dtype, i * layer.columns + c);
    bool plain = !layer.maximize && layer.weight_decay == 0.0f;
    if (plain && layer.dtype == FLOAT32 && count % LANES == 0) return (const float*)from;
    widen_to(buffer, from, layer.dtype, count);
    if (plain) return buffer;
    const void* param = element(layer.param, layer.dtype, row_of(layer, i) * layer.columns + c);
    F sign = same(layer.maximize ? -1.0f : 1.0f), decay = same(layer.weight_decay);
    for (int64_t j = 0; j < count; j += LANES) {
        int64_t some = least(count - j, LANES);
        F p = layer.dtype == BFLOAT16 ? widen(load_half_part((const uint16_t*)param + j, some))
                                      : load_part((const float*)param + j, some);
        store(buffer + j, load(buffer + j) * sign + p * decay);
    }
    return buffer;
}

// Sum of the squares of a row; four sums in turn, so that an addition need not wait for the one before.
struct Squares {
    F total[4] = {};

    INLINE void add(F x) {
        F next = total[0] + x * x;
        total[0] = total[1], total[1] = total[2], total[2] = total[3], total[3] = next;
    }
    INLINE float mean(int64_t columns) const {
        return sum((total[0] + total[1]) + (total[2] + total[3])) / (float)columns;
    }
};

inline float mean_square(const StepArgs& layer, int64_t i, float* buffer, int64_t ahead) {
    Squares squares;
    for (int64_t c = 0; c < layer.columns; c += CHUNK) {
        int64_t count = least(CHUNK, layer.columns - c);
        const float* g = gradient_of(layer, i, c, count, buffer);
        int64_t j = 0;
        for (; j + 4 * LANES <= count; j += 4 * LANES)
            for (int k = 0; k < 4; k++) {
                if (ahead) __builtin_prefetch(g + j + k * LANES + ahead, 0, 3);
                F x = load(g + j + k * LANES);
                squares.total[k] += x * x;
            }
        for (; j < count; j += LANES) squares.add(load(g + j));
    }
    return squares.mean(layer.columns);
}

INLINE void prefetch_gradient(const StepArgs& layer, int64_t i, int64_t c, int64_t count) {
    int64_t size = layer.dtype == BFLOAT16 ? 2 : 4;
    const char* from = (const char*)layer.grad + (i * layer.columns + c) * size;
    for (int64_t at = 0; at < count * size; at += 64) __builtin_prefetch(from + at, 0, 3);
}

// A row's mean of squares, and its squares added to the columns' sums.
inline float add_squares(const StepArgs& layer, int64_t i, float* buffer, float* columns) {
    Squares squares;
    for (int64_t c = 0; c < layer.columns; c += CHUNK) {
        int64_t count = least(CHUNK, layer.columns - c), j = 0;
        const float* g = gradient_of(layer, i, c, count, buffer);
        float* partial = columns + c;
        for (; j + 4 * LANES <= count; j += 4 * LANES)
            for (int k = 0; k < 4; k++) {
                F x = load(g + j + k * LANES), square = x * x;
                squares.total[k] += square;
                store(partial + j + k * LANES, load(partial + j + k * LANES) + square);
            }
        for (; j < count; j += LANES) {
            F x = load(g + j);
            int64_t some = least(count - j, LANES);
            squares.add(x);
            store_part(partial + j, load_part(partial + j, some) + x * x, some);
        }
    }
    return squares.mean(layer.columns);
}

// Rows that are to be left out are those that are not good.
template <typename Good>
inline void leave_out_rows(const StepArgs& layer, int64_t begin, int64_t end, Good good) {
    int64_t left_out = 0;
    for (int64_t i = begin; i < end; i++) left_out += layer.left[i] = !good(i);
    count_left_out(layer, left_out);
}

void check_rows(const StepArgs& layer, int64_t begin, int64_t end) {
    leave_out_rows(layer, begin, end, [&](int64_t i) { return finite_row(layer, i, layer.ids ? PREFETCH : 0); });
}

void reduce_rows(const StepArgs& layer, int64_t begin, int64_t end, float* partial_columns) {
    alignas(64) float buffer[CHUNK];
    auto add = [&](int64_t i) {
        return layer.sums[i] = partial_columns ? add_squares(layer, i, buffer, partial_columns) : mean_square(layer, i, buffer, 0);
    };
    bool clean = true;
    for (int64_t i = begin; i < end && clean; i++) {
        float mean = add(i);
        if (layer.left) {
            layer.left[i] = 0;
            clean = finite_by_mean(layer, i, mean);
        }
    }
    if (clean) return;
    // The columns have taken in a row that they must not. Once more: the sums of the others are the same then.
    if (partial_columns) {
        std::memset(partial_columns, 0, layer.columns * sizeof(float));
        leave_out_rows(layer, begin, end,
                       [&](int64_t i) { return finite_by_mean(layer, i, mean_square(layer, i, buffer, 0)); });
    } else {
        check_rows(layer, begin, end);
    }
    for (int64_t i = begin; i < end; i++)
        if (!layer.left[i]) add(i);
}

}  // namespace
