// Codes of 8 or 4 bits, sixteen at a time: what they mean, and how numbers become codes. `codecs/quantized.py` is the
// specification.
#pragma once

#include "vec.h"

namespace {

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

constexpr int NOISE_BITS = 13;  // the upper ones of 32

// Codes with a sign or without. A block's values are multiples of its largest magnitude by `LARGEST` squared.
template <int bits, bool is_signed>
struct Code {
    static constexpr int SIGN = 1 << (bits - 1);
    static constexpr int LARGEST = is_signed ? SIGN - 1 : 1 << bits;
    static constexpr float SQUARE = (float)LARGEST * LARGEST;

    // A value beside the square of the smallest step, and its root. `inverse` is SQUARE over the largest magnitude of the
    // block, or 0, and then the code is 0.
    struct Scaled {
        F ratio, root;

        INLINE Scaled(F value, F inverse) {
            ratio = (is_signed ? F(I(value) & I(0x7fffffff)) : value) * inverse;
            if constexpr (!is_signed) ratio = maximum(ratio, same(1.0f));
            root = square_root(ratio);
        }
        // What is squared to decode: the magnitude of a code with a sign, one more than a code without.
        INLINE I round(U noise) const {
            I whole = truncated(root);
            F lower = to_floats(whole);
            // From c to c + 1 it is 2 c + 1: up if that, times the noise and a half, is less than what is beyond the square
            // of c. From 2**23 on floats are integers. All products are exact.
            constexpr float UNIT = 1.0f / (1 << NOISE_BITS), INTEGERS = 1 << 23;
            F steps = F((noise >> (32 - NOISE_BITS)) | U(same(INTEGERS))) - same(INTEGERS - 0.5f);
            F step = product_plus(lower, same(2.0f * UNIT), same(UNIT));
            F missing = product_minus(steps, step, minus_product(lower, lower, ratio));
            return whole - I(greater(I{}, I(missing)));
        }
    };

    // The code of what `round` returned for a value.
    static INLINE I finish(I rounded, F value) {
        if constexpr (is_signed)  // 0 has no sign
            return rounded | ((rounded + I(SIGN - 1)) & I(U(value) >> (32 - bits)) & I(SIGN));
        else
            return rounded - I(1);
    }

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
};

#if defined(__AVX2__) && !defined(__AVX512F__)

// The same as Code::decode in fewer instructions: bytes are put where they are the sign and the upper bits of an integer, or
// the upper half of a float's fraction. Scaled by powers of two products have the same bits.
template <int bits, bool is_signed>
INLINE F decoded(const uint8_t* from, F absmax) {
    __m128i bytes;
    if constexpr (bits == 8) {
        bytes = _mm_loadu_si128((const __m128i*)from);
    } else {  // a code in each byte; in its upper half if it has a sign
        __m128i both = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)from));
        __m128i low = _mm_and_si128(both, _mm_set1_epi16(0x0f)), high = _mm_and_si128(both, _mm_set1_epi16(0xf0));
        bytes = is_signed ? _mm_or_si128(_mm_slli_epi16(low, 4), _mm_slli_epi16(high, 8))
                          : _mm_or_si128(low, _mm_slli_epi16(high, 4));
    }
    const __m256i twice = _mm256_broadcastsi128_si256(bytes);
    F value;
    for (int i = 0; i < 2; i++) {
        // The k-th of eight bytes into the last (second) byte of a word, zeros into the others.
        constexpr int TO = is_signed ? 24 : 8;
        auto place = [i](int k) { return (int)((0x80808080u & ~(0xffu << TO)) | (8u * i + k) << TO); };
        __m256i words = _mm256_shuffle_epi8(twice, _mm256_setr_epi32(place(0), place(1), place(2), place(3), place(4),
                                                                     place(5), place(6), place(7)));
        __m256 c, most = (__m256)absmax.part[i];
        if constexpr (is_signed) {
            constexpr float UNIT = 1.0f / (1 << (32 - bits)), OF_LARGEST = 1.0f / Code<bits, true>::SQUARE * UNIT * UNIT;
            c = _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(0x7fffffff)));
            c = _mm256_mul_ps(_mm256_mul_ps(_mm256_mul_ps(c, c), _mm256_set1_ps(OF_LARGEST)), most);
            c = _mm256_or_ps(c, (__m256)_mm256_and_si256(words, _mm256_set1_epi32((int)0x80000000)));
        } else {
            constexpr float UNIT = 1.0f / (1 << bits), WHOLE = UNIT * (1 << 15);  // whose fraction's second byte counts UNITs
            c = (__m256)_mm256_or_si256(words, (__m256i)_mm256_set1_ps(WHOLE));
            c = _mm256_sub_ps(c, _mm256_set1_ps(WHOLE - UNIT));
            c = _mm256_mul_ps(_mm256_mul_ps(c, c), most);
        }
        value.part[i] = (F::Part)c;
    }
    return value;
}

// The codes of 32 values: `finish` and `store_codes` in fewer instructions, of bytes side by side.
template <int bits, bool is_signed>
INLINE void store_pair(uint8_t* to, const I (&rounded)[2], const F (&value)[2]) {
    __m256i words[4];
    for (int k = 0; k < 4; k++) {
        words[k] = (__m256i)rounded[k / 2].part[k % 2];
        if (is_signed) words[k] = _mm256_sign_epi32(words[k], (__m256i)value[k / 2].part[k % 2]);
    }
    __m256i halves[2], bytes;
    for (int k = 0; k < 2; k++) {
        halves[k] = _mm256_packs_epi32(words[2 * k], words[2 * k + 1]);
        if (!is_signed) halves[k] = _mm256_sub_epi16(halves[k], _mm256_set1_epi16(1));
    }
    bytes = is_signed ? _mm256_packs_epi16(halves[0], halves[1]) : _mm256_packus_epi16(halves[0], halves[1]);
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if (is_signed) {
        __m256i sign = _mm256_and_si256(bytes, _mm256_set1_epi8(-128));
        if (bits == 4) sign = _mm256_srli_epi16(sign, 4);
        bytes = _mm256_or_si256(_mm256_abs_epi8(bytes), sign);
    }
    if (bits == 8) {
        _mm256_storeu_si256((__m256i*)to, bytes);
    } else {
        __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));  // the first, and 16 times the second
        _mm_storeu_si128((__m128i*)to,
                         _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
    }
}

#else

template <int bits, bool is_signed>
INLINE F decoded(const uint8_t* from, F absmax) {
    return Code<bits, is_signed>::decode(load_codes<bits>(from, LANES), absmax);
}

template <int bits, bool is_signed>
INLINE void store_pair(uint8_t* to, const I (&rounded)[2], const F (&value)[2]) {
    for (int k = 0; k < 2; k++)
        store_codes<bits>(to + k * LANES * bits / 8, Code<bits, is_signed>::finish(rounded[k], value[k]), LANES);
}

#endif

}  // namespace
