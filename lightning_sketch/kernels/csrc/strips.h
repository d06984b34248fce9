// Strips: a few columns of the sketches, packed. They stay near the processor while all rows are inserted, and then
// while all are looked up. In place they would not: the same columns of many rows fall into few sets of a cache. A
// bucket has STRIP floats of `tables` for the second moment, then as many for the first if that is a sketch.
#pragma once

#include "update.h"

namespace {

// Rows to prefetch: of gradient and parameter, from memory, and of the sketches, from a cache.
constexpr int64_t FAR_ROWS = 32;
constexpr int64_t NEAR_ROWS = 3;

struct Strip {
    int64_t begin, count;  // columns
    const uint16_t* codes;
    float* tables;
};

void hash_rows(const StepArgs& layer, int64_t begin, int64_t end, uint16_t* codes) {
    const State& state = layer.second;
    for (int64_t i = begin; i < end; i++)
        for (int level = 0; level < state.depth; level++) {
            Bucket b = bucket_of(state, (uint64_t)(i + layer.row_offset), level);
            codes[i * state.depth + level] = (uint16_t)((level * state.width + b.index) << 1 | (b.sign < 0.0f));
        }
}

// From the layer's tables into the strip's, or back.
template <bool both, bool into_strip>
void copy_strip(const StepArgs& layer, const Strip& strip) {
    const State* states[] = {&layer.second, &layer.first};
    for (int moment = 0; moment < (both ? 2 : 1); moment++)
        for (int64_t b = 0; b < layer.second.depth * layer.second.width; b++) {
            float* table = (float*)states[moment]->data + b * layer.columns + strip.begin;
            float* packed = strip.tables + (b * (both ? 2 : 1) + moment) * STRIP;
            for (int64_t j = 0; j < strip.count; j += LANES) {
                int64_t some = least(strip.count - j, LANES);
                __builtin_prefetch(table + j + NEAR_ROWS * layer.columns, 1, 3);
                if (into_strip)
                    store(packed + j, load_part(table + j, some));
                else
                    store_part(table + j, load(packed + j), some);
            }
        }
}

// What the passes over a strip's rows need, by value: stores to the tables cannot change it.
template <int depth, bool both>
struct StripRows {
    const int64_t rows, columns, begin, size;  // of the layer; of the strip; bytes of an element
    const uint16_t* codes;
    const uint8_t* left;
    float* tables;
    static constexpr int64_t BUCKET = (both ? 2 : 1) * STRIP;  // floats

    StripRows(const StepArgs& layer, const Strip& strip)
        : rows(layer.rows), columns(layer.columns), begin(strip.begin), size(layer.dtype == BFLOAT16 ? 2 : 4),
          codes(strip.codes), left(layer.left), tables(strip.tables) {}

    INLINE float* bucket(uint32_t code) const { return tables + (int64_t)(code >> 1) * BUCKET; }

    // What comes soon of gradient or parameter, past the caches that hold the tables: it is used once.
    INLINE void prefetch_elements(const void* tensor, int64_t i) const {
        const char* from = (const char*)tensor + ((i + FAR_ROWS) * columns + begin) * size;
        for (int64_t at = 0; at < STRIP * 4; at += 64)
            if (at < STRIP * size) __builtin_prefetch(from + at, 0, 0);
    }

    INLINE void prefetch_buckets(int64_t i) const {
        const uint16_t* soon = codes + least(i + NEAR_ROWS, rows - 1) * depth;
        for (int level = 0; level < depth; level++) {
            const float* from = bucket(soon[level]);
            for (int64_t j = 0; j < BUCKET; j += LANES) __builtin_prefetch(from + j, 1, 3);
        }
    }
};

template <int depth, bool both, bool whole>
void insert_strip(const StepArgs& layer, const Strip& strip) {
    alignas(64) float buffer[STRIP];
    const int64_t count = whole ? STRIP : strip.count;
    const F weight = same(layer.second.weight);
    const float first_weight = layer.first.weight;
    const bool in_place = whole && !layer.maximize && layer.weight_decay == 0.0f && layer.dtype == FLOAT32;
    const StripRows<depth, both> rows(layer, strip);
    const float* gradient = (const float*)layer.grad + strip.begin;
    for (int64_t i = 0; i < rows.rows; i++) {
        rows.prefetch_elements(layer.grad, i);
        rows.prefetch_buckets(i);
        if (rows.left && rows.left[i]) continue;
        const float* g = in_place ? gradient + i * rows.columns : gradient_of(layer, i, strip.begin, count, buffer);
        const uint16_t* codes = rows.codes + i * depth;
#pragma GCC unroll 8
        for (int level = 0; level < depth; level++) {
            float* second = rows.bucket(codes[level]);
            float* first = second + STRIP;
            const F signed_weight = same(first_weight * sign_of(codes[level]));
#pragma GCC unroll 8
            for (int64_t j = 0; j < count; j += LANES) {
                F x = load(g + j);
                store(second + j, load(second + j) + x * x * weight);
                if (both) store(first + j, load(first + j) + x * signed_weight);
            }
        }
    }
}

template <int depth, bool both, bool whole, class Target>
void update_strip(const StepArgs& layer, const Strip& strip, Target target) {
    alignas(64) float buffer[STRIP];
    const int64_t count = whole ? STRIP : strip.count;
    const Numbers numbers(layer);
    const F scale = same(layer.second.scale), first_scale = same(layer.first.scale);
    const StripRows<depth, both> rows(layer, strip);
    auto* param = target.param + strip.begin;
    for (int64_t i = 0; i < rows.rows; i++, param += rows.columns) {
        rows.prefetch_elements(layer.param, i);
        rows.prefetch_buckets(i);
        if (rows.left && rows.left[i]) continue;
        const float *second[depth], *first[depth], *g = nullptr;
        float sign[depth];
#pragma GCC unroll 8
        for (int level = 0; level < depth; level++) {
            uint32_t code = rows.codes[i * depth + level];
            second[level] = rows.bucket(code);
            first[level] = second[level] + STRIP;
            sign[level] = sign_of(code);
        }
        if (!both) {
            rows.prefetch_elements(layer.grad, i);
            g = gradient_of(layer, i, strip.begin, count, buffer);
        }
        target.param = param;
#pragma GCC unroll 8
        for (int64_t j = 0; j < count; j += LANES) {
            F v = combined<depth, false>(false, second, sign, j, LANES) * scale;
            F m = both ? combined<depth, false>(true, first, sign, j, LANES) * first_scale : load(g + j);
            target.template take<!whole>(numbers, j, Root{square_root(v)}.precondition(numbers, m), least(count - j, LANES));
        }
    }
}

template <int depth, bool both, bool whole>
void step_strip(const StepArgs& layer, const Strip& strip) {
    copy_strip<both, true>(layer, strip);
    insert_strip<depth, both, whole>(layer, strip);
    copy_strip<both, false>(layer, strip);
    if (layer.dtype == BFLOAT16)
        update_strip<depth, both, whole>(layer, strip, ToHalf{(uint16_t*)layer.param});
    else
        update_strip<depth, both, whole>(layer, strip, ToFloat{(float*)layer.param});
}

template <int depth>
void step_strip(const StepArgs& layer, const Strip& strip) {
    bool whole = strip.count == STRIP;
    if (is_sketch(layer.first))
        whole ? step_strip<depth, true, true>(layer, strip) : step_strip<depth, true, false>(layer, strip);
    else
        whole ? step_strip<depth, false, true>(layer, strip) : step_strip<depth, false, false>(layer, strip);
}

void strip(const StepArgs& layer, int64_t begin, int64_t end, const uint16_t* codes, float* tables) {
    static_assert(STRIP_DEPTH == 3, "");
    void (*const by_depth[])(const StepArgs&, const Strip&) = {step_strip<1>, step_strip<2>, step_strip<3>};
    by_depth[layer.second.depth - 1](layer, {begin, end - begin, codes, tables});
}

}  // namespace
