// Rows into count-sketches and out of them.
#pragma once

#include "gradient.h"
#include "hash.h"

namespace {

constexpr int64_t AHEAD = 12;       // rows of a sketch to prefetch while others are inserted
constexpr int ROWS_PER_INSERT = 4;  // rows of a bucket that are inserted at once
constexpr int64_t PIECE = 512;      // floats of each of them
constexpr int64_t PREFETCH_DISTANCE = 6;  // such pieces to prefetch
constexpr int64_t GROUP = 128;      // rows whose buckets are computed together
constexpr int64_t FOUND = 1024;     // rows that are looked through together for those of a part of the buckets

inline float* bucket_row(const StepArgs& layer, const State& state, int level, int64_t bucket) {
    return (float*)state.data + (level * state.width + bucket) * layer.columns;
}

inline bool is_sketch(const State& state) { return state.kind == SKETCH; }

inline float sign_of(uint32_t code) {  // 1 or -1, without a branch: nobody could predict it
    uint32_t bits = 0x3f800000u | code << 31;
    float sign;
    std::memcpy(&sign, &bits, sizeof sign);
    return sign;
}

void hash_state(const StepArgs& layer, const State& state, int64_t begin, int64_t end) {
    uint32_t* codes = (uint32_t*)state.scratch;
    for (int level = 0; level < state.depth; level++, codes += layer.rows)
        for (int64_t i = begin; i < end; i++) {
            Bucket b = bucket_of(state, (uint64_t)(row_of(layer, i) + layer.row_offset), level);
            codes[i] = (uint32_t)b.index << 1 | (b.sign < 0.0f);
        }
}

// Buckets and signs of up to GROUP rows; both moments of a layer have the same ones if they have the same shape.
struct Hashes {
    int64_t bucket[MOST_DEPTH][GROUP];
    float sign[MOST_DEPTH][GROUP];

    void fill(const StepArgs& layer, const State& state, int64_t from, int64_t count, int first_level = 0,
              int last_level = MOST_DEPTH) {
        for (int level = first_level; level < least(last_level, state.depth); level++) {
            if (const uint32_t* codes = (const uint32_t*)state.scratch) {
                codes += level * layer.rows + from;
                for (int64_t k = 0; k < count; k++) {
                    bucket[level][k] = codes[k] >> 1;
                    sign[level][k] = sign_of(codes[k]);
                }
                continue;
            }
            for (int64_t k = 0; k < count; k++) {
                Bucket b = bucket_of(state, (uint64_t)(row_of(layer, from + k) + layer.row_offset), level);
                bucket[level][k] = b.index;
                sign[level][k] = b.sign;
            }
        }
    }

    // Columns [begin, end), but not all of a wide row: it would push out what is in use.
    INLINE void prefetch_row(const StepArgs& layer, const State& state, int64_t k, int64_t begin, int64_t end,
                             int first_level, int last_level) const {
        for (int level = first_level; level < least(last_level, state.depth); level++)
            prefetch(bucket_row(layer, state, level, bucket[level][k]) + begin, least((end - begin) * 4, 512));
    }
};

inline void insert_row(const State& state, float* table, const float* g, float sign, int64_t count) {
    F weight = same(state.is_signed ? state.weight * sign : state.weight);
    for (int64_t j = 0; j < count; j += LANES) {
        int64_t some = least(count - j, LANES);
        F x = load(g + j);
        if (!state.is_signed) x = x * x;
        store_part(table + j, load_part(table + j, some) + x * weight, some);
    }
}

void insert(const StepArgs& layer, int64_t begin, int64_t end, int first_level, int last_level) {
    float buffer[CHUNK];
    const State* states[2] = {&layer.second, &layer.first};
    Hashes hashes[2];
    for (int64_t from = 0; from < layer.rows; from += GROUP) {
        int64_t rows = least(GROUP, layer.rows - from);
        for (int s = 0; s < 2; s++)
            if (is_sketch(*states[s])) hashes[s].fill(layer, *states[s], from, rows, first_level, last_level);
        for (int64_t k = 0; k < rows; k++) {
            if (is_left(layer, from + k)) continue;
            for (int s = 0; s < 2; s++)
                if (is_sketch(*states[s]) && k + AHEAD < rows)
                    hashes[s].prefetch_row(layer, *states[s], k + AHEAD, begin, end, first_level, last_level);
            for (int64_t c = begin; c < end; c += CHUNK) {
                int64_t count = least(CHUNK, end - c);
                const float* g = gradient_of(layer, from + k, c, count, buffer);
                for (int s = 0; s < 2; s++) {
                    const State& state = *states[s];
                    if (!is_sketch(state)) continue;
                    for (int level = first_level; level < least(last_level, state.depth); level++) {
                        float* table = bucket_row(layer, state, level, hashes[s].bucket[level][k]) + c;
                        insert_row(state, table, g, hashes[s].sign[level][k], count);
                    }
                }
            }
        }
    }
}

struct Found {
    int32_t row;
    uint32_t code;
};

void insert_scattered(const StepArgs& layer, const State* const* states, int count, int level, int64_t part,
                      int64_t parts) {
    float buffer[CHUNK];
    Found found[FOUND];
    const State& hashed = *states[0];
    const uint32_t* codes = (const uint32_t*)hashed.scratch + level * layer.rows;
    const uint32_t first = hashed.width * part / parts, last = hashed.width * (part + 1) / parts;
    const int64_t bytes = least(layer.columns * 4, 512);  // of a wide row not all: it would push out what is in use
    for (int64_t from = 0; from < layer.rows; from += FOUND) {
        int64_t rows = least(FOUND, layer.rows - from), some = 0;
        for (int64_t k = 0; k < rows; k++) {  // without a branch: nobody could predict it
            uint32_t code = codes[from + k], bucket = code >> 1;
            found[some] = {(int32_t)k, code};
            some += bucket - first < last - first;
        }
        for (int64_t k = -AHEAD; k < some; k++) {
            if (k + AHEAD < some)
                for (int s = 0; s < count; s++)
                    prefetch(bucket_row(layer, *states[s], level, found[k + AHEAD].code >> 1), bytes);
            if (k < 0 || is_left(layer, from + found[k].row)) continue;
            for (int64_t c = 0; c < layer.columns; c += CHUNK) {
                int64_t columns = least(CHUNK, layer.columns - c);
                const float* g = gradient_of(layer, from + found[k].row, c, columns, buffer);
                for (int s = 0; s < count; s++) {
                    float* table = bucket_row(layer, *states[s], level, found[k].code >> 1) + c;
                    insert_row(*states[s], table, g, sign_of(found[k].code), columns);
                }
            }
        }
    }
}

void insert_scattered(const StepArgs& layer, int level, int64_t part, int64_t parts) {
    const State *states[] = {&layer.second, &layer.first}, *sketches[2];
    int count = 0;
    for (const State* state : states)
        if (is_sketch(*state) && level < state->depth) sketches[count++] = state;
    if (count == 2 && sketches[0]->scratch != sketches[1]->scratch) {
        insert_scattered(layer, sketches, 1, level, part, parts);
        insert_scattered(layer, sketches + 1, 1, level, part, parts);
    } else if (count) {
        insert_scattered(layer, sketches, count, level, part, parts);
    }
}

template <int rows, bool squares, bool part>
INLINE void insert_at(float* table, const float* const* g, const F* weight, int64_t j, int64_t some) {
    F total = get<part>(table + j, some);
    for (int r = 0; r < rows; r++) {
        F x = load(g[r] + j);
        total += (squares ? x * x : x) * weight[r];
    }
    put<part>(table + j, total, some);
}

// Adds rows of one bucket to it at once: an element of the sketch is loaded and stored once for all of them.
template <int rows, bool squares>
void insert_rows(const State& state, float* table, const float* const* g, const float* sign, int64_t count) {
    F weight[rows];
    for (int r = 0; r < rows; r++) weight[r] = same(squares ? state.weight : state.weight * sign[r]);
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) insert_at<rows, squares, false>(table, g, weight, j, LANES);
    if (j < count) insert_at<rows, squares, true>(table, g, weight, j, count - j);
}

template <bool squares>
void insert_rows(const State& state, float* table, const float* const* g, const float* sign, int64_t count, int rows) {
    static_assert(ROWS_PER_INSERT == 4, "");
    void (*const by_rows[])(const State&, float*, const float* const*, const float*, int64_t) = {
        insert_rows<1, squares>, insert_rows<2, squares>, insert_rows<3, squares>, insert_rows<4, squares>};
    by_rows[rows - 1](state, table, g, sign, count);
}

void insert_buckets(const StepArgs& layer, int level, int64_t begin, int64_t end, const int32_t* starts,
                    const int32_t* order, bool into_second, bool into_first) {
    alignas(64) float buffer[ROWS_PER_INSERT][PIECE];
    const State* states[2] = {into_second ? &layer.second : nullptr, into_first ? &layer.first : nullptr};
    const State* with_signs = nullptr;
    for (const State* state : states)
        if (state && state->is_signed) with_signs = state;
    for (int64_t bucket = begin; bucket < end; bucket++)
        for (int64_t c = 0; c < layer.columns; c += PIECE) {
            int64_t count = least(PIECE, layer.columns - c);
            for (int32_t at = starts[bucket]; at < starts[bucket + 1];) {
                const float* g[ROWS_PER_INSERT];
                float sign[ROWS_PER_INSERT];
                int rows = 0;
                for (; rows < ROWS_PER_INSERT && at < starts[bucket + 1]; at++) {
                    int64_t i = layer.wave + order[at];
                    // The order array goes on with the next bucket.
                    if (at + PREFETCH_DISTANCE < starts[end]) prefetch_gradient(layer, layer.wave + order[at + PREFETCH_DISTANCE], c, count);
                    if (is_left(layer, i)) continue;
                    g[rows] = gradient_of(layer, i, c, count, buffer[rows]);
                    uint64_t id = (uint64_t)(row_of(layer, i) + layer.row_offset);
                    sign[rows++] = with_signs ? bucket_of(*with_signs, id, level).sign : 1.0f;
                }
                if (!rows) break;  // all that were left of the bucket are left out
                for (const State* state : states) {
                    if (!state) continue;
                    float* table = bucket_row(layer, *state, level, bucket) + c;
                    (state->is_signed ? insert_rows<false> : insert_rows<true>)(*state, table, g, sign, count, rows);
                }
            }
        }
}

void insert_means(const StepArgs& layer, const State& state, int level, int64_t begin, int64_t end) {
    float* table = (float*)state.data + level * state.width;
    for (int64_t i = begin; i < end; i++) {
        if (is_left(layer, i)) continue;
        Bucket b = bucket_of(state, (uint64_t)(row_of(layer, i) + layer.row_offset), level);
        table[b.index] += layer.sums[i] * state.weight;
    }
}

inline float sketched_row(const StepArgs& layer, const State& state, int64_t row) {
    float least_found = 0.0f;
    for (int level = 0; level < state.depth; level++) {
        Bucket b = bucket_of(state, (uint64_t)(row + layer.row_offset), level);
        float found = ((float*)state.data)[level * state.width + b.index];
        least_found = level == 0 || found < least_found ? found : least_found;
    }
    return least_found * state.scale;
}

// The elementwise median of a row's buckets; the mean of the middle two if they are even.
template <int depth>
INLINE F median(F* rows) {
    if (depth == 1) return rows[0];
    if (depth == 3) return maximum(minimum(rows[0], rows[1]), minimum(maximum(rows[0], rows[1]), rows[2]));
    constexpr int middle = depth / 2;
    for (int done = 0; done <= middle; done++)
        for (int i = depth - 1; i > done; i--) {
            F low = minimum(rows[i - 1], rows[i]);
            rows[i] = maximum(rows[i - 1], rows[i]);
            rows[i - 1] = low;
        }
    return depth % 2 ? rows[middle] : (rows[middle > 0 ? middle - 1 : 0] + rows[middle]) / 2.0f;
}

template <int depth, bool part>
INLINE F combined(bool is_signed, const float* const* from, const float* sign, int64_t j, int64_t some) {
    F rows[depth];
#pragma GCC unroll 8
    for (int level = 0; level < depth; level++) rows[level] = get<part>(from[level] + j, some);
    if (is_signed) {
#pragma GCC unroll 8
        for (int level = 0; level < depth; level++) rows[level] = rows[level] * sign[level];
        return median<depth>(rows);
    }
    F found = rows[0];
#pragma GCC unroll 8
    for (int level = 1; level < depth; level++) found = minimum(found, rows[level]);
    return found;
}

template <int depth>
void estimate_at(const StepArgs& layer, const State& state, const Hashes& hashes, int64_t k, int64_t c, int64_t count,
                 float* to) {
    const float* from[depth];
    float sign[depth];
    for (int level = 0; level < depth; level++) {
        from[level] = bucket_row(layer, state, level, hashes.bucket[level][k]) + c;
        sign[level] = hashes.sign[level][k];
    }
    F scale = same(state.scale);
    int64_t j = 0;
    bool is_signed = state.is_signed;
    for (; j + LANES <= count; j += LANES)
        store(to + j, combined<depth, false>(is_signed, from, sign, j, LANES) * scale);
    if (j < count) store(to + j, combined<depth, true>(is_signed, from, sign, j, count - j) * scale);
}

// A sketch's estimate of `count` elements of a row, into a buffer.
inline void estimate(const StepArgs& layer, const State& state, const Hashes& hashes, int64_t k, int64_t c, int64_t count,
                     float* to) {
    static_assert(MOST_DEPTH == 8, "");
    void (*const at[])(const StepArgs&, const State&, const Hashes&, int64_t, int64_t, int64_t, float*) = {
        estimate_at<1>, estimate_at<2>, estimate_at<3>, estimate_at<4>,
        estimate_at<5>, estimate_at<6>, estimate_at<7>, estimate_at<8>,
    };
    at[state.depth - 1](layer, state, hashes, k, c, count, to);
}

}  // namespace
