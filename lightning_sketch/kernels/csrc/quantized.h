// States in 8 or 4 bits, block by block; `codecs/quantized.py` is their specification.
#pragma once

#include "codes.h"
#include "gradient.h"
#include "hash.h"

namespace {

constexpr uint32_t TINY_BITS = (127u - 100u) << 23;  // of 2**-100
constexpr uint32_t INFINITE_BITS = 0x7f800000;
constexpr int64_t MOST_BLOCKS = CHUNK / LANES;  // of a chunk

INLINE U larger(U a, U b) {
    return U::of(a, b, [](const U::Part& x, const U::Part& y) INLINE_LAMBDA { return x > y ? x : y; });
}

INLINE uint32_t largest(U x) {
    typedef uint32_t U4 __attribute__((vector_size(16)));
    U4 four[LANES / 4];
    std::memcpy(four, &x, sizeof four);
    for (const U4& other : four) four[0] = other > four[0] ? other : four[0];
    uint32_t most = four[0][0];
    for (int i = 1; i < 4; i++) most = four[0][i] > most ? four[0][i] : most;
    return most;
}

// What a chunk of a row is coded with, block by block.
struct Blocks {
    uint8_t* codes;
    float* absmax;
    const uint32_t* columns;  // their noise, padded
    uint32_t row;             // its noise
    int64_t width;
    float inverse[MOST_BLOCKS];  // as of Code::Scaled

    int64_t count(int64_t elements) const { return (elements + width - 1) / width; }
};

// A state's new values into a buffer, and the largest magnitude of every block, lane by lane.
template <int bits, bool is_signed>
INLINE void fold_values(const State& state, const Blocks& blocks, int64_t count, const float* x, bool square,
                        bool ahead, float* to, uint32_t* most) {
    const F weight = same(state.weight);
    for (int64_t begin = 0; begin < count; begin += blocks.width) {
        const int64_t end = least(begin + blocks.width, count);
        const uint8_t* codes = blocks.codes + begin * bits / 8;
        if (ahead) prefetch(codes + PREFETCH * bits / 8, blocks.width * bits / 8);
        const F decayed = same(blocks.absmax[begin / blocks.width] * state.decay);
        U magnitude = {};  // these order as integers, what is not finite last, with or without a sign
        auto fold = [&](int64_t j, F before) INLINE_LAMBDA {
            F value = load(x + j);
            if (square) value = value * value;
            return before + value * weight;
        };
        auto take = [&](int64_t j, F value) INLINE_LAMBDA {
            store(to + j, value);
            magnitude = larger(magnitude, is_signed ? U(value) & U(0x7fffffff) : U(value));
        };
        int64_t j = begin;
        for (; j + LANES <= end; j += LANES, codes += LANES * bits / 8) {
            if (ahead) __builtin_prefetch(x + j + PREFETCH, 0, 3);
            take(j, fold(j, decoded<bits, is_signed>(codes, decayed)));
        }
        if (j < end) {
            F value = fold(j, Code<bits, is_signed>::decode(load_codes<bits>(codes, end - j), decayed));
            for (int64_t lane = end - j; lane < LANES; lane++) value.set(lane, 0.0f);
            take(j, value);
        }
        magnitude.store(most);
        most += LANES;
    }
}

// Stores the largest magnitudes, and returns whether all are finite. All blocks together: one waits for no other.
template <int bits, bool is_signed>
INLINE bool scale(Blocks& blocks, int64_t count, const uint32_t* most) {
    bool all_finite = true;
    for (int64_t b = 0; b < blocks.count(count); b++) {
        uint32_t magnitude = largest(U::load(most + b * LANES));
        bool finite = magnitude < INFINITE_BITS, usable = finite && magnitude >= TINY_BITS;
        uint32_t kept = usable ? magnitude : finite ? 0 : INFINITE_BITS | 0x400000;
        std::memcpy(blocks.absmax + b, &kept, sizeof kept);
        blocks.inverse[b] = usable ? 1.0f / blocks.absmax[b] * Code<bits, is_signed>::SQUARE : 0.0f;
        all_finite &= finite;
    }
    return all_finite;
}

// Stores the codes of values that `scale` was called for.
template <int bits, bool is_signed>
INLINE void encode(const Blocks& blocks, int64_t count, const float* values) {
    typedef Code<bits, is_signed> Coding;
    typedef typename Coding::Scaled Scaled;
    const int shift = __builtin_ctzll((uint64_t)blocks.width);
    auto scaled_at = [&](int64_t j) INLINE_LAMBDA { return Scaled(load(values + j), same(blocks.inverse[j >> shift])); };
    auto noise_at = [&](int64_t j) INLINE_LAMBDA { return noise32(blocks.row, U::load(blocks.columns + j)); };
    constexpr int64_t PAIR = 2 * LANES;
    int64_t j = 0;
    if (PAIR <= count) {
        Scaled scaled[2] = {scaled_at(0), scaled_at(LANES)};
        for (; j + PAIR <= count; j += PAIR) {
            // Roots are found one pair ahead, so that nothing waits for them.
            const int64_t next = least(j + PAIR, count - PAIR);
            const Scaled after[2] = {scaled_at(next), scaled_at(next + LANES)};
            const F value[2] = {load(values + j), load(values + j + LANES)};
            const I rounded[2] = {scaled[0].round(noise_at(j)), scaled[1].round(noise_at(j + LANES))};
            store_pair<bits, is_signed>(blocks.codes + j * bits / 8, rounded, value);
            scaled[0] = after[0], scaled[1] = after[1];
        }
    }
    for (; j < count; j += LANES) {
        I code = Coding::finish(scaled_at(j).round(noise_at(j)), load(values + j));
        store_codes<bits>(blocks.codes + j * bits / 8, code, least(count - j, LANES));
    }
}

template <int bits, bool is_signed>
void fold_blocks(const StepArgs& layer, const State& state, int64_t row, int64_t c, int64_t count, const float* x,
                 bool square, float* to) {
    int64_t bytes = (layer.columns * bits + 7) / 8, per_row = (layer.columns + state.width - 1) / state.width;
    Blocks blocks;
    blocks.codes = (uint8_t*)state.data + row * bytes + c * bits / 8;
    blocks.absmax = state.columns + row * per_row + c / state.width;
    blocks.columns = (const uint32_t*)state.scratch + c;
    blocks.row = (uint32_t)mix64((uint64_t)(row + layer.row_offset), state.seed);
    blocks.width = state.width;
    uint32_t most[MOST_BLOCKS * LANES];
    fold_values<bits, is_signed>(state, blocks, count, x, square, reads_in_turn(layer), to, most);
    bool finite = scale<bits, is_signed>(blocks, count, most);
    encode<bits, is_signed>(blocks, count, to);
    // Of a block that is not finite there are zeros beside the NaN, as in the reference.
    for (int64_t b = 0; !finite && b < blocks.count(count); b++)
        if (blocks.absmax[b] != blocks.absmax[b]) {
            int64_t some = least(blocks.width, count - b * blocks.width);
            std::memset(blocks.codes + b * blocks.width * bits / 8, 0, (some * bits + 7) / 8);
        }
}

// A state's new values of `count` elements from column c of a row into a buffer; what is stored is rounded.
inline void fold_quantized(const StepArgs& layer, const State& state, int64_t row, int64_t c, int64_t count,
                           const float* x, bool square, float* to) {
    auto fold = state.depth == 8 ? (state.is_signed ? fold_blocks<8, true> : fold_blocks<8, false>)
                                 : (state.is_signed ? fold_blocks<4, true> : fold_blocks<4, false>);
    fold(layer, state, row, c, count, x, square, to);
}

// What is touched of a row that comes soon.
INLINE void prefetch_quantized(const StepArgs& layer, const State& state, int64_t row) {
    int64_t bytes = (layer.columns * state.depth + 7) / 8, blocks = (layer.columns + state.width - 1) / state.width;
    prefetch((const uint8_t*)state.data + row * bytes, bytes);
    prefetch(state.columns + row * blocks, blocks * 4);
}

}  // namespace
