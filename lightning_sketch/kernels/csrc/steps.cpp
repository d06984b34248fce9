// The steps, row by row. Compiled once for each instruction set, without contraction to fused multiply-adds: the bits
// are the same on all of them. No standard library templates here: the linker may take any copy of an inline function.
//
// A row is worked on in chunks that stay in the first-level cache.

#include "steps.h"

#include "hash.h"
#include "vec.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

namespace {

constexpr int64_t CHUNK = 1024;     // floats
constexpr int64_t PREFETCH = 1024;  // elements: the processor's own prefetching ends with each page
constexpr int64_t AHEAD = 12;       // rows of a sketch to prefetch while others are inserted
// Scattered rows are prefetched so many at once: look-ups of their pages overlap only if little else is between them.
constexpr int64_t BATCH = 16;
constexpr int64_t BATCH_BYTES = 1 << 14;  // at most, so that they stay in the first-level cache
constexpr int TOGETHER = 4;         // rows of a bucket that are inserted at once
constexpr int64_t PIECE = 512;      // floats of each of them
constexpr int64_t FAR = 6;          // such pieces to prefetch
// Of strips: rows to prefetch of gradient and parameter, from memory, and of the sketches, from a cache.
constexpr int64_t FAR_ROWS = 32;
constexpr int64_t NEAR_ROWS = 3;
constexpr int64_t GROUP = 128;      // rows whose buckets are computed together

struct Buffers {
    alignas(64) float gradient[CHUNK];
    alignas(64) float second[CHUNK];
    alignas(64) float first[CHUNK];
    alignas(64) float momentum[CHUNK];
};

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

inline float* bucket_row(const Layer& layer, const State& state, int level, int64_t bucket) {
    return (float*)state.data + (level * state.width + bucket) * layer.columns;
}

inline bool is_sketch(const State& state) { return state.kind == SKETCH; }

// Buckets and signs of up to GROUP rows; both moments of a layer have the same ones if they have the same shape.
struct Hashes {
    int64_t bucket[MOST_DEPTH][GROUP];
    float sign[MOST_DEPTH][GROUP];

    void fill(const Layer& layer, const State& state, int64_t from, int64_t count) {
        for (int level = 0; level < state.depth; level++)
            for (int64_t k = 0; k < count; k++) {
                Bucket b = bucket_of(state, (uint64_t)(row_of(layer, from + k) + layer.row_offset), level);
                bucket[level][k] = b.index;
                sign[level][k] = b.sign;
            }
    }

    // Columns [begin, end), but not all of a wide row: it would push out what is in use.
    INLINE void prefetch_row(const Layer& layer, const State& state, int64_t k, int64_t begin, int64_t end,
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

void insert(const Layer& layer, int64_t begin, int64_t end, int first_level, int last_level) {
    float buffer[CHUNK];
    const State* states[2] = {&layer.second, &layer.first};
    Hashes hashes[2];
    for (int64_t from = 0; from < layer.rows; from += GROUP) {
        int64_t rows = least(GROUP, layer.rows - from);
        for (int s = 0; s < 2; s++)
            if (is_sketch(*states[s])) hashes[s].fill(layer, *states[s], from, rows);
        for (int64_t k = 0; k < rows; k++) {
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
    static_assert(TOGETHER == 4, "");
    void (*const by_rows[])(const State&, float*, const float* const*, const float*, int64_t) = {
        insert_rows<1, squares>, insert_rows<2, squares>, insert_rows<3, squares>, insert_rows<4, squares>};
    by_rows[rows - 1](state, table, g, sign, count);
}

void insert_buckets(const Layer& layer, int level, int64_t begin, int64_t end, const int32_t* starts,
                    const int32_t* order, bool into_second, bool into_first) {
    alignas(64) float buffer[TOGETHER][PIECE];
    const State* states[2] = {into_second ? &layer.second : nullptr, into_first ? &layer.first : nullptr};
    const State* with_signs = nullptr;
    for (const State* state : states)
        if (state && state->is_signed) with_signs = state;
    for (int64_t bucket = begin; bucket < end; bucket++)
        for (int64_t c = 0; c < layer.columns; c += PIECE) {
            int64_t count = least(PIECE, layer.columns - c);
            for (int32_t at = starts[bucket]; at < starts[bucket + 1];) {
                const float* g[TOGETHER];
                float sign[TOGETHER];
                int rows = 0;
                for (; rows < TOGETHER && at < starts[bucket + 1]; rows++, at++) {
                    int64_t i = layer.wave + order[at];
                    // The order array goes on with the next bucket.
                    if (at + FAR < starts[end]) prefetch_gradient(layer, layer.wave + order[at + FAR], c, count);
                    g[rows] = gradient_of(layer, i, c, count, buffer[rows]);
                    uint64_t id = (uint64_t)(row_of(layer, i) + layer.row_offset);
                    sign[rows] = with_signs ? bucket_of(*with_signs, id, level).sign : 1.0f;
                }
                for (const State* state : states) {
                    if (!state) continue;
                    float* table = bucket_row(layer, *state, level, bucket) + c;
                    (state->is_signed ? insert_rows<false> : insert_rows<true>)(*state, table, g, sign, count, rows);
                }
            }
        }
}

void insert_means(const Layer& layer, const State& state, int level, int64_t begin, int64_t end) {
    float* table = (float*)state.data + level * state.width;
    for (int64_t i = begin; i < end; i++) {
        Bucket b = bucket_of(state, (uint64_t)(row_of(layer, i) + layer.row_offset), level);
        table[b.index] += layer.sums[i] * state.weight;
    }
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

inline float sketched_row(const Layer& layer, const State& state, int64_t row) {
    float least_found = 0.0f;
    for (int level = 0; level < state.depth; level++) {
        Bucket b = bucket_of(state, (uint64_t)(row + layer.row_offset), level);
        float found = ((float*)state.data)[level * state.width + b.index];
        least_found = level == 0 || found < least_found ? found : least_found;
    }
    return least_found * state.scale;
}

// What a step touches of a row that comes soon.
INLINE void prefetch_row(const Layer& layer, int64_t row) {
    int64_t columns = layer.columns;
    prefetch(element(layer.param, layer.dtype, row * columns), columns * (layer.dtype == BFLOAT16 ? 2 : 4));
    const State* states[] = {&layer.second, &layer.first};
    for (const State* state : states) {
        if (state->kind == DENSE || state->kind == STOCHASTIC || state->kind == SCALED)
            prefetch(element(state->data, state->dtype, row * columns), columns * (state->dtype == BFLOAT16 ? 2 : 4));
        else if (state->kind == ROW || state->kind == SM3 || state->kind == FACTORED)
            __builtin_prefetch((const float*)state->data + row, 1, 3);
    }
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
void estimate_at(const Layer& layer, const State& state, const Hashes& hashes, int64_t k, int64_t c, int64_t count,
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
inline void estimate(const Layer& layer, const State& state, const Hashes& hashes, int64_t k, int64_t c, int64_t count,
                     float* to) {
    static_assert(MOST_DEPTH == 8, "");
    void (*const at[])(const Layer&, const State&, const Hashes&, int64_t, int64_t, int64_t, float*) = {
        estimate_at<1>, estimate_at<2>, estimate_at<3>, estimate_at<4>,
        estimate_at<5>, estimate_at<6>, estimate_at<7>, estimate_at<8>,
    };
    at[state.depth - 1](layer, state, hashes, k, c, count, to);
}

// What a loop over elements needs of the layer, by value: stores to the parameter cannot change it.
struct Numbers {
    F shrink, lr, eps, correction, bound;
    bool use_bound;

    explicit Numbers(const Layer& layer)
        : shrink(same(layer.shrink)), lr(same(layer.lr)), eps(same(layer.eps)), correction(same(layer.correction)),
          bound(same(layer.bound)), use_bound(layer.use_bound) {}
};

INLINE F clamp(F x, F limit) { return minimum(maximum(x, F{} - limit), limit); }

INLINE F preconditioned(const Numbers& numbers, F m, F v) {
    F root = square_root(v);
    if (numbers.use_bound) m = clamp(m, root * numbers.bound);
    return unless_zero(v, m / (root * numbers.correction + numbers.eps));
}

// The update of 16 elements from the first state m and the gradient g. One of these for each way to find v.

struct RowSecond {  // one v for the row
    F denominator, limit;
    I nonzero;
    bool use_bound;

    RowSecond(const Numbers& numbers, float v) {
        F root = same(__builtin_sqrtf(v));
        denominator = root * numbers.correction + numbers.eps;
        limit = root * numbers.bound;
        nonzero = I(v != 0.0f ? -1 : 0);
        use_bound = numbers.use_bound;
    }
    template <bool part>
    INLINE F update(const Numbers&, int64_t, F, F m, int64_t) {
        if (use_bound) m = clamp(m, limit);
        return masked(m / denominator, nonzero);
    }
};

struct BufferSecond {  // v was computed before
    const float* v;

    template <bool part>
    INLINE F update(const Numbers& numbers, int64_t j, F, F m, int64_t) {
        return preconditioned(numbers, m, load(v + j));
    }
};

struct FactoredSecond {  // v = row * shape of the columns
    const float* shape;  // padded
    F row;

    template <bool part>
    INLINE F update(const Numbers& numbers, int64_t j, F, F m, int64_t) {
        return preconditioned(numbers, m, load(shape + j) * row);
    }
};

struct Sm3Second {  // v = min(row, column) + weight * g * g, and the largest v
    const float* column;  // padded, as largest_columns is
    float* largest_columns;
    F row, weight, largest_row;

    template <bool part>
    INLINE F update(const Numbers& numbers, int64_t j, F g, F m, int64_t some) {
        F v = minimum(row, load(column + j)) + g * g * weight;
        F result = preconditioned(numbers, m, v);
        if (part)  // beyond the row there are zeros in g, but not in v
            for (int64_t lane = some; lane < LANES; lane++) v.set(lane, 0.0f);
        largest_row = maximum(largest_row, v);
        store(largest_columns + j, maximum(load(largest_columns + j), v));
        return result;
    }
};

struct NoSecond {  // SGD: the update is m, or with Nesterov's momentum g + nesterov * m
    float nesterov;

    template <bool part>
    INLINE F update(const Numbers&, int64_t, F g, F m, int64_t) {
        return nesterov != 0.0f ? g + m * nesterov : m;
    }
};

// A state of 16 elements shaped like the parameter: s <- decay * s + weight * x, returned.

struct NoState {
    template <bool part>
    INLINE F next(int64_t, F x, int64_t) const {
        return x;
    }
    INLINE void prefetch(int64_t, int64_t) const {}
};

struct BufferState {
    const float* values;

    template <bool part>
    INLINE F next(int64_t j, F, int64_t) const {
        return load(values + j);
    }
    INLINE void prefetch(int64_t, int64_t) const {}
};

struct FloatState {
    float* values;
    F decay, weight;

    template <bool part>
    INLINE F next(int64_t j, F x, int64_t some) const {
        F s = get<part>(values + j, some) * decay + x * weight;
        put<part>(values + j, s, some);
        return s;
    }
    INLINE void prefetch(int64_t j, int64_t ahead) const { __builtin_prefetch(values + j + ahead, 1, 3); }
};

struct ScaledState {
    float* values;
    F weight, scale;

    template <bool part>
    INLINE F next(int64_t j, F x, int64_t some) const {
        F s = get<part>(values + j, some) + x * weight;
        put<part>(values + j, s, some);
        return s * scale;
    }
    INLINE void prefetch(int64_t j, int64_t ahead) const { __builtin_prefetch(values + j + ahead, 1, 3); }
};

struct HalfState {
    uint16_t* values;
    F decay, weight;

    template <bool part>
    INLINE F next(int64_t j, F x, int64_t some) const {
        H s = narrow(widen(get<part>(values + j, some)) * decay + x * weight);
        put<part>(values + j, s, some);
        return widen(s);
    }
    INLINE void prefetch(int64_t j, int64_t ahead) const { __builtin_prefetch(values + j + ahead, 1, 3); }
};

struct StochasticState {
    uint16_t* values;
    const uint32_t* columns;  // their noise, padded
    uint32_t row;
    F decay, weight;

    template <bool part>
    INLINE F next(int64_t j, F x, int64_t some) const {
        U noise = U::load(columns + j);
        F exact = widen(get<part>(values + j, some)) * decay + x * weight;
        H s = round_stochastically(exact, noise16(row, noise));
        put<part>(values + j, s, some);
        return widen(s);
    }
    INLINE void prefetch(int64_t j, int64_t ahead) const { __builtin_prefetch(values + j + ahead, 1, 3); }
};

// Where updates go: param <- shrink * param - lr * update, or a buffer.

struct ToFloat {
    float* param;

    template <bool part>
    INLINE void take(const Numbers& numbers, int64_t j, F update, int64_t some) const {
        put<part>(param + j, get<part>(param + j, some) * numbers.shrink - update * numbers.lr, some);
    }
    INLINE void prefetch(int64_t j, int64_t ahead) const { __builtin_prefetch(param + j + ahead, 1, 3); }
};

struct ToHalf {
    uint16_t* param;

    template <bool part>
    INLINE void take(const Numbers& numbers, int64_t j, F update, int64_t some) const {
        put<part>(param + j, narrow(widen(get<part>(param + j, some)) * numbers.shrink - update * numbers.lr), some);
    }
    INLINE void prefetch(int64_t j, int64_t ahead) const { __builtin_prefetch(param + j + ahead, 1, 3); }
};

struct ToBuffer {
    float* values;

    template <bool part>
    INLINE void take(const Numbers&, int64_t j, F update, int64_t) const {
        store(values + j, update);
    }
    INLINE void prefetch(int64_t, int64_t) const {}
};

INLINE StochasticState stochastic_state(const Layer& layer, const State& state, int64_t row, int64_t c) {
    uint32_t noise = (uint32_t)mix64((uint64_t)(row + layer.row_offset), state.seed);
    return {(uint16_t*)state.data + row * layer.columns + c, (const uint32_t*)state.scratch + c, noise,
            same(state.decay), same(state.weight)};
}

// Calls work with the state's columns from c of a row.
template <class Work>
INLINE void with_state(const Layer& layer, const State& state, int64_t row, int64_t c, const Work& work) {
    int64_t at = row * layer.columns + c;
    F decay = same(state.decay), weight = same(state.weight);
    if (state.kind == STOCHASTIC) {
        work(stochastic_state(layer, state, row, c));
    } else if (state.kind == SCALED) {
        work(ScaledState{(float*)state.data + at, weight, same(state.scale)});
    } else if (state.dtype == BFLOAT16) {
        work(HalfState{(uint16_t*)state.data + at, decay, weight});
    } else {
        work(FloatState{(float*)state.data + at, decay, weight});
    }
}

// A state's new values of `count` elements into a buffer.
void fold(const Layer& layer, const State& state, int64_t row, int64_t c, int64_t count, const float* x, bool square,
          float* to) {
    int64_t ahead = layer.ids ? 0 : PREFETCH;
    with_state(layer, state, row, c, [&](const auto& values) {
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) {
            if (ahead) values.prefetch(j, ahead);
            F value = load(x + j);
            store(to + j, values.template next<false>(j, square ? value * value : value, LANES));
        }
        if (j < count) {
            F value = load(x + j);
            store(to + j, values.template next<true>(j, square ? value * value : value, count - j));
        }
    });
}

// The loop over `count` elements from row * columns + c.
template <class Second, class First, class Target>
void update_chunk(const Numbers& of_layer, int64_t count, int64_t ahead, const float* g, Second& of_row,
                  const First& first, const Target& target) {
    const Numbers numbers = of_layer;
    Second second = of_row;
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        if (ahead) {
            __builtin_prefetch(g + j + ahead, 0, 3);
            first.prefetch(j, ahead);
            target.prefetch(j, ahead);
        }
        F x = load(g + j);
        F m = first.template next<false>(j, x, LANES);
        target.template take<false>(numbers, j, second.template update<false>(numbers, j, x, m, LANES), LANES);
    }
    if (j < count) {
        F x = load(g + j);
        F m = first.template next<true>(j, x, count - j);
        target.template take<true>(numbers, j, second.template update<true>(numbers, j, x, m, count - j), count - j);
    }
    of_row = second;
}

// One chunk of a row: columns [c, c + count).
struct Place {
    int64_t row, c, count;
    const float* g;
};

template <class Second, class First>
INLINE void update_into(const Layer& layer, const Numbers& numbers, const Place& place, Second& second,
                        const First& first, float* buffer) {
    int64_t at = place.row * layer.columns + place.c;
    // Rows follow each other in memory unless there are ids; the processor's own prefetching ends with each page.
    int64_t ahead = layer.ids ? 0 : PREFETCH;
    if (layer.momentum.kind != NONE) {
        update_chunk(numbers, place.count, ahead, place.g, second, first, ToBuffer{buffer});
        fold(layer, layer.momentum, place.row, place.c, place.count, buffer, false, buffer);
        NoSecond none{0.0f};
        if (layer.dtype == BFLOAT16)
            update_chunk(numbers, place.count, 0, buffer, none, NoState{}, ToHalf{(uint16_t*)layer.param + at});
        else
            update_chunk(numbers, place.count, 0, buffer, none, NoState{}, ToFloat{(float*)layer.param + at});
    } else if (layer.dtype == BFLOAT16) {
        update_chunk(numbers, place.count, ahead, place.g, second, first, ToHalf{(uint16_t*)layer.param + at});
    } else {
        update_chunk(numbers, place.count, ahead, place.g, second, first, ToFloat{(float*)layer.param + at});
    }
}

// With the first state. Those that are seldom wanted go through a buffer: every combination here is compiled.
template <class Second>
INLINE void update(const Layer& layer, const Numbers& numbers, const Place& place, const Hashes& hashes, int64_t k,
                   Second& second, Buffers& buffers) {
    const State& first = layer.first;
    if (first.kind == NONE) {
        update_into(layer, numbers, place, second, NoState{}, buffers.momentum);
    } else if (first.kind == STOCHASTIC) {
        StochasticState state = stochastic_state(layer, first, place.row, place.c);
        update_into(layer, numbers, place, second, state, buffers.momentum);
    } else {
        if (is_sketch(first))
            estimate(layer, first, hashes, k, place.c, place.count, buffers.first);
        else
            fold(layer, first, place.row, place.c, place.count, place.g, false, buffers.first);
        update_into(layer, numbers, place, second, BufferState{buffers.first}, buffers.momentum);
    }
}

void apply(const Layer& layer, int64_t begin, int64_t end, float* largest_columns) {
    const State &second = layer.second, &first = layer.first;
    const Numbers numbers(layer);
    Buffers buffers;
    Hashes second_hashes, first_hashes;
    bool row_second = second.kind == ROW || second.kind == ROW_SKETCH;
    int64_t batch = most(1, least(BATCH, BATCH_BYTES / (layer.columns * 4))), fetched = begin;
    for (int64_t from = begin; from < end; from += GROUP) {
        int64_t rows = least(GROUP, end - from);
        if (is_sketch(second)) second_hashes.fill(layer, second, from, rows);
        if (is_sketch(first)) first_hashes.fill(layer, first, from, rows);
        for (int64_t k = 0; k < rows; k++) {
            int64_t i = from + k, row = row_of(layer, i);
            if (layer.ids && i + batch >= fetched)
                for (int64_t to = least(i + 2 * batch, end); fetched < to; fetched++)
                    prefetch_row(layer, row_of(layer, fetched));
            if (k % batch == 0)
                for (int64_t next = k ? k + batch : 0; next < least(k + 2 * batch, rows); next++) {
                    int64_t columns = layer.columns;
                    if (is_sketch(second)) second_hashes.prefetch_row(layer, second, next, 0, columns, 0, MOST_DEPTH);
                    if (is_sketch(first)) first_hashes.prefetch_row(layer, first, next, 0, columns, 0, MOST_DEPTH);
                }

            float row_v = 0.0f;
            F largest_row = {};
            if (second.kind == ROW || second.kind == FACTORED) {
                float* stored = (float*)second.data + row;
                *stored += (layer.sums ? layer.sums[i] : mean_square(layer, i, buffers.gradient)) * second.weight;
                row_v = *stored * second.scale;
            } else if (second.kind == ROW_SKETCH) {
                row_v = sketched_row(layer, second, row);
            } else if (second.kind == SM3) {
                row_v = ((float*)second.data)[row] * second.scale;
            }

            for (int64_t c = 0; c < layer.columns; c += CHUNK) {
                int64_t count = least(CHUNK, layer.columns - c);
                Place place{row, c, count, gradient_of(layer, i, c, count, buffers.gradient)};
                if (row_second) {
                    RowSecond of_row(numbers, row_v);
                    update(layer, numbers, place, first_hashes, k, of_row, buffers);
                } else if (second.kind == SM3) {
                    const float* columns = (const float*)second.scratch + c;
                    Sm3Second sm3{columns, largest_columns + c, same(row_v), same(second.weight), largest_row};
                    update(layer, numbers, place, first_hashes, k, sm3, buffers);
                    largest_row = sm3.largest_row;
                } else if (second.kind == FACTORED) {
                    FactoredSecond factored{(const float*)second.scratch + c, same(row_v)};
                    update(layer, numbers, place, first_hashes, k, factored, buffers);
                } else if (second.kind == NONE) {
                    NoSecond none{layer.nesterov};
                    update(layer, numbers, place, first_hashes, k, none, buffers);
                } else {
                    if (is_sketch(second))
                        estimate(layer, second, second_hashes, k, c, count, buffers.second);
                    else
                        fold(layer, second, row, c, count, place.g, true, buffers.second);
                    BufferSecond buffered{buffers.second};
                    update(layer, numbers, place, first_hashes, k, buffered, buffers);
                }
            }
            if (second.kind == SM3) ((float*)second.data)[row] = largest(largest_row) / second.scale;
        }
    }
}

// Strips: a few columns of the sketches, packed. They stay near the processor while all rows are inserted, and then
// while all are looked up. In place they would not: the same columns of many rows fall into few sets of a cache. A
// bucket has STRIP floats of `tables` for the second moment, then as many for the first if that is a sketch.

struct Strip {
    int64_t begin, count;  // columns
    const uint16_t* codes;
    float* tables;
};

inline float sign_of(uint32_t code) {  // 1 or -1, without a branch: nobody could predict it
    uint32_t bits = 0x3f800000u | code << 31;
    float sign;
    std::memcpy(&sign, &bits, sizeof sign);
    return sign;
}

void hash_rows(const Layer& layer, int64_t begin, int64_t end, uint16_t* codes) {
    const State& state = layer.second;
    for (int64_t i = begin; i < end; i++)
        for (int level = 0; level < state.depth; level++) {
            Bucket b = bucket_of(state, (uint64_t)(i + layer.row_offset), level);
            codes[i * state.depth + level] = (uint16_t)((level * state.width + b.index) << 1 | (b.sign < 0.0f));
        }
}

// From the layer's tables into the strip's, or back.
template <bool both, bool into_strip>
void copy_strip(const Layer& layer, const Strip& strip) {
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
    float* tables;
    static constexpr int64_t BUCKET = (both ? 2 : 1) * STRIP;  // floats

    StripRows(const Layer& layer, const Strip& strip)
        : rows(layer.rows), columns(layer.columns), begin(strip.begin), size(layer.dtype == BFLOAT16 ? 2 : 4),
          codes(strip.codes), tables(strip.tables) {}

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
void insert_strip(const Layer& layer, const Strip& strip) {
    alignas(64) float buffer[STRIP];
    const int64_t count = whole ? STRIP : strip.count;
    const F weight = same(layer.second.weight);
    const float first_weight = layer.first.weight;
    const bool in_place = whole && !layer.negate && layer.weight_decay == 0.0f && layer.dtype == FLOAT32;
    const StripRows<depth, both> rows(layer, strip);
    const float* gradient = (const float*)layer.grad + strip.begin;
    for (int64_t i = 0; i < rows.rows; i++) {
        rows.prefetch_elements(layer.grad, i);
        rows.prefetch_buckets(i);
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
void update_strip(const Layer& layer, const Strip& strip, Target target) {
    alignas(64) float buffer[STRIP];
    const int64_t count = whole ? STRIP : strip.count;
    const Numbers numbers(layer);
    const F scale = same(layer.second.scale), first_scale = same(layer.first.scale);
    const StripRows<depth, both> rows(layer, strip);
    auto* param = target.param + strip.begin;
    for (int64_t i = 0; i < rows.rows; i++, param += rows.columns) {
        rows.prefetch_elements(layer.param, i);
        rows.prefetch_buckets(i);
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
            target.template take<!whole>(numbers, j, preconditioned(numbers, m, v), least(count - j, LANES));
        }
    }
}

template <int depth, bool both, bool whole>
void step_strip(const Layer& layer, const Strip& strip) {
    copy_strip<both, true>(layer, strip);
    insert_strip<depth, both, whole>(layer, strip);
    copy_strip<both, false>(layer, strip);
    if (layer.dtype == BFLOAT16)
        update_strip<depth, both, whole>(layer, strip, ToHalf{(uint16_t*)layer.param});
    else
        update_strip<depth, both, whole>(layer, strip, ToFloat{(float*)layer.param});
}

template <int depth>
void step_strip(const Layer& layer, const Strip& strip) {
    bool whole = strip.count == STRIP;
    if (is_sketch(layer.first))
        whole ? step_strip<depth, true, true>(layer, strip) : step_strip<depth, true, false>(layer, strip);
    else
        whole ? step_strip<depth, false, true>(layer, strip) : step_strip<depth, false, false>(layer, strip);
}

void strip(const Layer& layer, int64_t begin, int64_t end, const uint16_t* codes, float* tables) {
    static_assert(STRIP_DEPTH == 3, "");
    void (*const by_depth[])(const Layer&, const Strip&) = {step_strip<1>, step_strip<2>, step_strip<3>};
    by_depth[layer.second.depth - 1](layer, {begin, end - begin, codes, tables});
}

void column_noise(const Layer& layer, const State& state, uint32_t* noise) {
    for (int64_t c = 0; c < layer.columns; c++)
        noise[c] = (uint32_t)mix64((uint64_t)(c + layer.column_offset), ~state.seed);
}

bool finite(const void* values, int64_t count, int32_t dtype) {
    // A value is finite if its exponent is not all ones: then adding one to it does not carry into the sign's bit. Summing
    // up instead would miss nothing either, but may overflow.
    uint32_t bad = 0;
    if (dtype == BFLOAT16) {
        const uint16_t* half = (const uint16_t*)values;
        H any = {};
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) any |= (load_half(half + i) & 0x7f80) + 0x80;
        for (; i < count; i++) bad |= (half[i] & 0x7f80u) + 0x80u;
        for (int lane = 0; lane < LANES; lane++) bad |= any[lane];
        return !(bad & 0x8000u);
    }
    const float* full = (const float*)values;
    U any[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int k = 0; k < 4; k++) any[k] |= (float_to_bits(load(full + i + k * LANES)) & 0x7f800000u) + 0x800000u;
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

}  // namespace

extern const Steps JOIN(steps_, ISA) = {reduce_rows, insert, insert_buckets, insert_means, hash_rows,
                                        strip,       apply,  column_noise,   finite};
