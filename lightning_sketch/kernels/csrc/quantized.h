// States in 8 or 4 bits, block by block; `codecs/quantized.py` is their specification.
#pragma once

#include "hash.h"
#include "gradient.h"

namespace {

constexpr uint32_t TINY_BITS = 0x00800000;  // of the smallest normal float
constexpr uint32_t INFINITE_BITS = 0x7f800000;
constexpr int NOISE_BITS = 13;

INLINE F to_floats(I x) {
    F y;
    for (int i = 0; i < F::PARTS; i++) y.part[i] = __builtin_convertvector(x.part[i], F::Part);
    return y;
}

INLINE I truncated(F x) {
    I y;
    for (int i = 0; i < I::PARTS; i++) y.part[i] = __builtin_convertvector(x.part[i], I::Part);
    return y;
}

INLINE I larger(I a, I b) {
    return I::of(a, b, [](const I::Part& x, const I::Part& y) INLINE_LAMBDA { return x > y ? x : y; });
}

inline uint32_t largest(I x) {
    int32_t lanes[LANES];
    x.store(lanes);
    int32_t most = lanes[0];
    for (int i = 1; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return (uint32_t)most;
}

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

INLINE I to_words(Bytes x) {
#if defined(__AVX512F__)
    I words;
    words.part[0] = (I::Part)_mm512_cvtepu8_epi32((__m128i)x);
    return words;
#elif defined(__AVX2__)
    I words;
    words.part[0] = (I::Part)_mm256_cvtepu8_epi32((__m128i)x);
    words.part[1] = (I::Part)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)x, 8));
    return words;
#else
    int32_t words[LANES];
    for (int i = 0; i < LANES; i++) words[i] = x[i];
    return I::load(words);
#endif
}

// Of words below 2^8.
INLINE Bytes to_bytes(I x) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)x.part[0]);
#elif defined(__AVX2__)
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x.part[0], (__m256i)x.part[1]), 0xd8);
    return (Bytes)_mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
#else
    int32_t words[LANES];
    x.store(words);
    Bytes bytes;
    for (int i = 0; i < LANES; i++) bytes[i] = (uint8_t)words[i];
    return bytes;
#endif
}

// 16 codes of 4 bits, the first of two in the lower half of a byte.
INLINE Bytes unpacked(uint64_t packed) {
    uint64_t low = packed & 0x0f0f0f0f0f0f0f0full, high = (packed >> 4) & 0x0f0f0f0f0f0f0f0full;
    Bytes a = {}, b = {};
    std::memcpy(&a, &low, sizeof low);
    std::memcpy(&b, &high, sizeof high);
    return __builtin_shuffle(a, b, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}

INLINE uint64_t packed(Bytes codes) {
    Bytes even = __builtin_shuffle(codes, Bytes{0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14});
    Bytes odd = __builtin_shuffle(codes, Bytes{1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15});
    uint64_t low, high;
    std::memcpy(&low, &even, sizeof low);
    std::memcpy(&high, &odd, sizeof high);
    return low | high << 4;
}

template <int bits>
INLINE I load_codes(const uint8_t* from, int64_t count) {
    if constexpr (bits == 8) {
        Bytes codes = {};
        if (count == LANES)
            std::memcpy(&codes, from, LANES);
        else
            std::memcpy(&codes, from, count);
        return to_words(codes);
    } else {
        uint64_t both = 0;
        if (count == LANES)
            std::memcpy(&both, from, sizeof both);
        else
            std::memcpy(&both, from, (count + 1) / 2);
        return to_words(unpacked(both));
    }
}

template <int bits>
INLINE void store_codes(uint8_t* to, I words, int64_t count) {
    Bytes codes = to_bytes(words);
    if (count < LANES)
        for (int64_t lane = count; lane < LANES; lane++) codes[lane] = 0;
    if constexpr (bits == 8) {
        if (count == LANES)
            std::memcpy(to, &codes, LANES);
        else
            std::memcpy(to, &codes, count);
    } else {
        uint64_t both = packed(codes);
        if (count == LANES)
            std::memcpy(to, &both, sizeof both);
        else
            std::memcpy(to, &both, (count + 1) / 2);
    }
}

// Codes of 8 or 4 bits, with a sign or without, as in `Quantized`.
template <int bits, bool is_signed>
struct Code {
    static constexpr int SIGN = 1 << (bits - 1);
    static constexpr int LARGEST = is_signed ? SIGN - 1 : 1 << bits;
    static constexpr float SQUARE = (float)LARGEST * LARGEST;

    static INLINE F decode(I codes, F absmax) {
        if constexpr (is_signed) {
            F c = to_floats(codes & I(SIGN - 1));
            F value = c * c * same(1.0f / SQUARE) * absmax;
            return F(I(value) | ((codes & I(SIGN)) << (32 - bits)));
        } else {
            F c = to_floats(codes) + same(1.0f);
            return c * c * same(1.0f / SQUARE) * absmax;
        }
    }

    // Of values whose block has a usable largest magnitude; `inverse` is one over that.
    static INLINE I encode(F value, F inverse, U noise) {
        F ratio = F(I(value) & I(0x7fffffff)) * inverse * same(SQUARE);
        if constexpr (!is_signed) ratio = maximum(ratio, same(1.0f));
        I whole = truncated(square_root(ratio));
        F lower = to_floats(whole);
        // From c the next code is 2 c + 1 away.
        F chance = (to_floats(I(noise >> (16 - NOISE_BITS))) + same(0.5f)) * same(1.0f / (1 << NOISE_BITS));
        F beyond = chance * (lower * same(2.0f) + same(1.0f)) - (ratio - lower * lower);
        I code = whole + I(U(beyond) >> 31);  // up if that is negative
        if constexpr (!is_signed) return code - I(1);
        return code | ((code + I(SIGN - 1)) & I(U(value) >> (32 - bits)) & I(SIGN));
    }
};

template <int bits, bool is_signed>
void fold_blocks(const StepArgs& layer, const State& state, int64_t row, int64_t c, int64_t count, const float* x,
                 bool square, float* to) {
    typedef Code<bits, is_signed> Coding;
    int64_t bytes = (layer.columns * bits + 7) / 8, blocks = (layer.columns + state.width - 1) / state.width;
    uint8_t* codes = (uint8_t*)state.data + row * bytes + c * bits / 8;
    float* absmax = state.columns + row * blocks + c / state.width;
    const uint32_t* columns = (const uint32_t*)state.scratch + c;
    uint32_t row_noise = (uint32_t)mix64((uint64_t)(row + layer.row_offset), state.seed);
    F decay = same(state.decay), weight = same(state.weight);
    for (int64_t begin = 0; begin < count; begin += state.width, absmax++) {
        int64_t end = least(begin + state.width, count);
        if (!layer.ids) prefetch(codes + (begin + PREFETCH) * bits / 8, state.width * bits / 8);
        F before = same(*absmax);
        I most = {};
        for (int64_t j = begin; j < end; j += LANES) {
            int64_t some = least(end - j, LANES);
            F value = load(x + j);
            __builtin_prefetch(x + j + PREFETCH, 0, 3);
            if (square) value = value * value;
            value = Coding::decode(load_codes<bits>(codes + j * bits / 8, some), before) * decay + value * weight;
            if (some < LANES)
                for (int64_t lane = some; lane < LANES; lane++) value.set(lane, 0.0f);
            store(to + j, value);
            most = larger(most, I(value) & I(0x7fffffff));
        }
        uint32_t magnitude = largest(most);
        bool finite = magnitude < INFINITE_BITS, usable = finite && magnitude >= TINY_BITS;
        uint32_t kept = usable ? magnitude : finite ? 0 : INFINITE_BITS | 0x400000;
        std::memcpy(absmax, &kept, sizeof kept);
        F inverse = same(1.0f / *absmax);
        for (int64_t j = begin; j < end; j += LANES) {
            U noise = noise16(row_noise, U::load(columns + j));
            I coded = usable ? Coding::encode(load(to + j), inverse, noise) : I{};
            store_codes<bits>(codes + j * bits / 8, coded, least(end - j, LANES));
        }
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
