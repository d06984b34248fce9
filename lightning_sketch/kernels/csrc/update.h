// The loop over elements: first and second state of each, and the update of the parameter.
#pragma once

#include "quantized.h"
#include "sketch.h"

namespace {

struct Buffers {
    alignas(64) float gradient[CHUNK];
    alignas(64) float second[CHUNK];
    alignas(64) float first[CHUNK];
    alignas(64) float momentum[CHUNK];
};

// What a loop over elements needs of the layer, by value: stores to the parameter cannot change it.
struct Numbers {
    F decay_factor, lr, eps, correction, bound;
    bool use_bound;

    explicit Numbers(const StepArgs& layer)
        : decay_factor(same(layer.decay_factor)), lr(same(layer.lr)), eps(same(layer.eps)), correction(same(layer.correction)),
          bound(same(layer.bound)), use_bound(layer.use_bound) {}
};

INLINE F clamp(F x, F limit) { return minimum(maximum(x, F{} - limit), limit); }

// What is known of 16 elements before their first state: the square root of v, 0 where v is.
struct Root {
    F root;

    INLINE F precondition(const Numbers& numbers, F m) const {
        if (numbers.use_bound) m = clamp(m, root * numbers.bound);
        return unless_zero(root, m / (root * numbers.correction + numbers.eps));
    }
};

struct Nothing {};

// The update of 16 elements from the first state m and the gradient g. One of these for each way to find v, which is
// looked at first.

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
    INLINE Nothing look(int64_t, F, int64_t) {
        return {};
    }
    INLINE F update(const Numbers&, Nothing, F, F m) {
        if (use_bound) m = clamp(m, limit);
        return masked(m / denominator, nonzero);
    }
};

struct BufferSecond {  // v was computed before
    const float* v;

    template <bool part>
    INLINE Root look(int64_t j, F, int64_t) {
        return {square_root(load(v + j))};
    }
    INLINE F update(const Numbers& numbers, const Root& found, F, F m) { return found.precondition(numbers, m); }
};

struct FactoredSecond {  // v = row * column over the columns' mean; the root of the product by those of both
    const float* columns;  // padded
    F row;

    template <bool part>
    INLINE Root look(int64_t j, F, int64_t) {
        return {load(columns + j) * row};
    }
    INLINE F update(const Numbers& numbers, const Root& found, F, F m) { return found.precondition(numbers, m); }
};

struct Sm3Second {  // v = min(row, column) + weight * g * g, and the largest v
    const float* column;  // padded, as largest_columns is
    float* largest_columns;
    F row, weight, largest_row;

    template <bool part>
    INLINE Root look(int64_t j, F g, int64_t some) {
        F v = minimum(row, load(column + j)) + g * g * weight;
        Root found{square_root(v)};
        if (part)  // beyond the row there are zeros in g, but not in v
            for (int64_t lane = some; lane < LANES; lane++) v.set(lane, 0.0f);
        largest_row = maximum(largest_row, v);
        store(largest_columns + j, maximum(load(largest_columns + j), v));
        return found;
    }
    INLINE F update(const Numbers& numbers, const Root& found, F, F m) { return found.precondition(numbers, m); }
};

struct NoSecond {  // SGD: the update is m, or with Nesterov's momentum g + nesterov * m
    float nesterov;

    template <bool part>
    INLINE Nothing look(int64_t, F, int64_t) {
        return {};
    }
    INLINE F update(const Numbers&, Nothing, F g, F m) { return nesterov != 0.0f ? g + m * nesterov : m; }
};

// A state of 16 elements shaped like the parameter: s <- decay * s + weight * x, returned.

struct NoState {
    template <bool part>
    INLINE F next(int64_t, F x, int64_t) const {
        return x;
    }
};

struct BufferState {
    const float* values;

    template <bool part>
    INLINE F next(int64_t j, F, int64_t) const {
        return load(values + j);
    }
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
};

struct HalfState {
    uint16_t* values;
    F decay, weight;

    template <bool part>
    INLINE F next(int64_t j, F x, int64_t some) const {
        U s = to_nearest(widen(get<part>(values + j, some)) * decay + x * weight);
        put<part>(values + j, to_halves(s), some);
        return widen(s);
    }
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
        U s = round_stochastically(exact, noise16(row, noise));
        put<part>(values + j, to_halves(s), some);
        return widen(s);
    }
};

// Where updates go: param <- decay_factor * param - lr * update, or a buffer.

struct ToFloat {
    float* param;

    template <bool part>
    INLINE void take(const Numbers& numbers, int64_t j, F update, int64_t some) const {
        put<part>(param + j, get<part>(param + j, some) * numbers.decay_factor - update * numbers.lr, some);
    }
    INLINE void prefetch(int64_t j, int64_t ahead) const { __builtin_prefetch(param + j + ahead, 1, 3); }
};

struct ToHalf {
    uint16_t* param;

    template <bool part>
    INLINE void take(const Numbers& numbers, int64_t j, F update, int64_t some) const {
        put<part>(param + j, narrow(widen(get<part>(param + j, some)) * numbers.decay_factor - update * numbers.lr), some);
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

INLINE StochasticState stochastic_state(const StepArgs& layer, const State& state, int64_t row, int64_t c) {
    uint32_t noise = (uint32_t)mix64((uint64_t)(row + layer.row_offset), state.seed);
    return {(uint16_t*)state.data + row * layer.columns + c, (const uint32_t*)state.scratch + c, noise,
            same(state.decay), same(state.weight)};
}

// Calls work with the state's columns from c of a row.
template <class Work>
INLINE void with_state(const StepArgs& layer, const State& state, int64_t row, int64_t c, const Work& work) {
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
void fold(const StepArgs& layer, const State& state, int64_t row, int64_t c, int64_t count, const float* x, bool square,
          float* to) {
    if (state.kind == QUANTIZED) return fold_quantized(layer, state, row, c, count, x, square, to);
    with_state(layer, state, row, c, [&](const auto& values) {
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) {
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
void update_chunk(const Numbers& of_layer, int64_t count, int64_t ahead, int64_t ahead_g, const float* g, Second& of_row,
                  const First& first, const Target& target) {
    const Numbers numbers = of_layer;
    Second second = of_row;
    int64_t j = 0;
    if (LANES <= count) {
        F x = load(g), m = first.template next<false>(0, x, LANES);
        auto found = second.template look<false>(0, x, LANES);
        // States are found one vector ahead of the update: while a processor waits for the division of one, it has the
        // square root of the next to do.
        for (; j + 2 * LANES <= count; j += LANES) {
            if (ahead) {
                __builtin_prefetch(g + j + ahead_g, 0, 3);
                target.prefetch(j, ahead);
            }
            F x_after = load(g + j + LANES), m_after = first.template next<false>(j + LANES, x_after, LANES);
            auto found_after = second.template look<false>(j + LANES, x_after, LANES);
            target.template take<false>(numbers, j, second.update(numbers, found, x, m), LANES);
            x = x_after, m = m_after, found = found_after;
        }
        target.template take<false>(numbers, j, second.update(numbers, found, x, m), LANES);
        j += LANES;
    }
    if (j < count) {
        F x = load(g + j);
        F m = first.template next<true>(j, x, count - j);
        auto found = second.template look<true>(j, x, count - j);
        target.template take<true>(numbers, j, second.update(numbers, found, x, m), count - j);
    }
    of_row = second;
}

// One chunk of a row: columns [c, c + count).
struct Place {
    int64_t row, c, count;
    const float* g;
};

template <class Second, class First>
INLINE void update_into(const StepArgs& layer, const Numbers& numbers, const Place& place, Second& second,
                        const First& first, float* buffer) {
    int64_t at = place.row * layer.columns + place.c;
    int64_t ahead = reads_in_turn(layer) ? PREFETCH : 0, ahead_g = ahead_in_second(layer);
    if (layer.momentum.kind != NONE) {
        update_chunk(numbers, place.count, ahead, ahead_g, place.g, second, first, ToBuffer{buffer});
        fold(layer, layer.momentum, place.row, place.c, place.count, buffer, false, buffer);
        NoSecond none{0.0f};
        if (layer.dtype == BFLOAT16)
            update_chunk(numbers, place.count, 0, 0, buffer, none, NoState{}, ToHalf{(uint16_t*)layer.param + at});
        else
            update_chunk(numbers, place.count, 0, 0, buffer, none, NoState{}, ToFloat{(float*)layer.param + at});
    } else if (layer.dtype == BFLOAT16) {
        update_chunk(numbers, place.count, ahead, ahead_g, place.g, second, first, ToHalf{(uint16_t*)layer.param + at});
    } else {
        update_chunk(numbers, place.count, ahead, ahead_g, place.g, second, first, ToFloat{(float*)layer.param + at});
    }
}

// With the first state. Those that are seldom wanted go through a buffer: every combination here is compiled.
template <class Second>
INLINE void update(const StepArgs& layer, const Numbers& numbers, const Place& place, const Hashes& hashes, int64_t k,
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

}  // namespace
