// Sixteen floats at a time, whatever the instruction set: the same operations in the same order, so the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

INLINE F load(const float* from) {
    F x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float* to, F x) { std::memcpy(to, &x, sizeof x); }

// The first `count` of sixteen, the others zero.
INLINE F load_part(const float* from, int64_t count) {
    if (count == LANES) return load(from);
    F x = {};
    std::memcpy(&x, from, count * sizeof(float));
    return x;
}

INLINE void store_part(float* to, F x, int64_t count) {
    if (count == LANES)
        store(to, x);
    else
        std::memcpy(to, &x, count * sizeof(float));
}

INLINE F same(float x) { return F{} + x; }

INLINE F bits_to_float(U bits) {
    F x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE U float_to_bits(F x) {
    U bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }

// `a` if it is less (greater), else `b`: what the instructions do.
INLINE F minimum(F a, F b) {
#if defined(__AVX512F__)
    return (F)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

INLINE F maximum(F a, F b) {
#if defined(__AVX512F__)
    return (F)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

INLINE F square_root(F x) {
#if defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    __m256 half[2];
    std::memcpy(half, &x, sizeof x);
    half[0] = _mm256_sqrt_ps(half[0]);
    half[1] = _mm256_sqrt_ps(half[1]);
    std::memcpy(&x, half, sizeof x);
    return x;
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// In a fixed order.
inline float sum(F x) {
    float lane[LANES];
    std::memcpy(lane, &x, sizeof x);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

inline float largest(F x) {
    float lane[LANES];
    std::memcpy(lane, &x, sizeof x);
    float most = lane[0];
    for (int i = 1; i < LANES; i++) most = lane[i] > most ? lane[i] : most;
    return most;
}

INLINE F widen(H x) { return bits_to_float(__builtin_convertvector(x, U) << 16); }

// To the nearest, ties to even; NaN stays NaN.
INLINE H narrow(F x) {
    U bits = float_to_bits(x);
    U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    U quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector((x != x) ? quiet : rounded, H);
}

INLINE H load_half(const uint16_t* from) {
    H x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

INLINE H load_half_part(const uint16_t* from, int64_t count) {
    if (count == LANES) return load_half(from);
    H x = {};
    std::memcpy(&x, from, count * sizeof(uint16_t));
    return x;
}

INLINE void store_half_part(uint16_t* to, H x, int64_t count) {
    if (count == LANES)
        std::memcpy(to, &x, sizeof x);
    else
        std::memcpy(to, &x, count * sizeof(uint16_t));
}

// All sixteen, or if `part` only the first of them.
template <bool part>
INLINE F get(const float* from, int64_t count) {
    return part ? load_part(from, count) : load(from);
}

template <bool part>
INLINE H get(const uint16_t* from, int64_t count) {
    return part ? load_half_part(from, count) : load_half(from);
}

template <bool part>
INLINE void put(float* to, F x, int64_t count) {
    part ? store_part(to, x, count) : store(to, x);
}

template <bool part>
INLINE void put(uint16_t* to, H x, int64_t count) {
    if (part)
        store_half_part(to, x, count);
    else
        std::memcpy(to, &x, sizeof x);
}

}  // namespace
