// The gradient's rows as floats, and sums of their squares.
#pragma once

#include "steps.h"
#include "vec.h"

namespace {

constexpr int64_t CHUNK = 1024;     // floats of a row that are worked on together: they stay in the first-level cache
constexpr int64_t PREFETCH = 1024;  // elements: the processor's own prefetching ends with each page

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t row_of(const Layer& layer, int64_t i) { return layer.ids ? layer.ids[i] : i; }

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
        for (int64_t i = 0; i < whole; i += LANES) {
            __builtin_prefetch(half + i + PREFETCH, 0, 3);
            store(to + i, widen(load_half(half + i)));
        }
        if (whole < count) store(to + whole, widen(load_half_part(half + whole, count - whole)));
    } else {
        const float* full = (const float*)from;
        for (int64_t i = 0; i < whole; i += LANES) {
            __builtin_prefetch(full + i + PREFETCH, 0, 3);
            store(to + i, load(full + i));
        }
        if (whole < count) store(to + whole, load_part(full + whole, count - whole));
    }
}

// The gradient of `count` elements from column c of the i-th row, after maximize and coupled weight decay; in place if
// nothing is to be done.
inline const float* gradient_of(const Layer& layer, int64_t i, int64_t c, int64_t count, float* buffer) {
    const void* from = element(layer.grad, layer.dtype, i * layer.columns + c);
    bool plain = !layer.negate && layer.weight_decay == 0.0f;
    if (plain && layer.dtype == FLOAT32 && count % LANES == 0) return (const float*)from;
    widen_to(buffer, from, layer.dtype, count);
    if (plain) return buffer;
    const void* param = element(layer.param, layer.dtype, row_of(layer, i) * layer.columns + c);
    F sign = same(layer.negate ? -1.0f : 1.0f), decay = same(layer.weight_decay);
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

inline float mean_square(const Layer& layer, int64_t i, float* buffer) {
    Squares squares;
    for (int64_t c = 0; c < layer.columns; c += CHUNK) {
        int64_t count = least(CHUNK, layer.columns - c);
        const float* g = gradient_of(layer, i, c, count, buffer);
        int64_t j = 0;
        for (; j + 4 * LANES <= count; j += 4 * LANES)
            for (int k = 0; k < 4; k++) {
                __builtin_prefetch(g + j + k * LANES + PREFETCH, 0, 3);
                F x = load(g + j + k * LANES);
                squares.total[k] += x * x;
            }
        for (; j < count; j += LANES) squares.add(load(g + j));
    }
    return squares.mean(layer.columns);
}

INLINE void prefetch_gradient(const Layer& layer, int64_t i, int64_t c, int64_t count) {
    int64_t size = layer.dtype == BFLOAT16 ? 2 : 4;
    const char* from = (const char*)layer.grad + (i * layer.columns + c) * size;
    for (int64_t at = 0; at < count * size; at += 64) __builtin_prefetch(from + at, 0, 3);
}

// A row's mean of squares, and its squares added to the columns' sums.
inline float add_squares(const Layer& layer, int64_t i, float* buffer, float* columns) {
    Squares squares;
    for (int64_t c = 0; c < layer.columns; c += CHUNK) {
        int64_t count = least(CHUNK, layer.columns - c), j = 0;
        const float* g = gradient_of(layer, i, c, count, buffer);
        float* partial = columns + c;
        for (; j + 4 * LANES <= count; j += 4 * LANES)
            for (int k = 0; k < 4; k++) {
                __builtin_prefetch(g + j + k * LANES + PREFETCH, 0, 3);
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

bool reduce_rows(const Layer& layer, int64_t begin, int64_t end, float* partial_columns) {
    alignas(64) float buffer[CHUNK];
    bool all_finite = true;
    for (int64_t i = begin; i < end; i++) {
        float mean = partial_columns ? add_squares(layer, i, buffer, partial_columns) : mean_square(layer, i, buffer);
        layer.sums[i] = mean;
        all_finite &= mean - mean == 0.0f;
    }
    return all_finite;
}

}  // namespace
