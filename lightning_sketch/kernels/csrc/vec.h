// Sixteen floats at a time, whatever the instruction set: the same operations in the same order, so the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

// The statement for every part; not a loop, after which GCC would keep the parts in memory.
#define FOR_PARTS(statement)                    \
    do {                                        \
        { constexpr int i = 0; statement; }     \
        if constexpr (PARTS > 1) {              \
            constexpr int i = 1;                \
            statement;                          \
        }                                       \
        if constexpr (PARTS > 2) {              \
            { constexpr int i = 2; statement; } \
            { constexpr int i = 3; statement; } \
        }                                       \
    } while (0)

// Of vectors longer than a register GCC takes comparisons and conversions apart into single numbers, so sixteen are
// as many vectors as it takes.
template <class Number>
struct Vector {
    typedef Number Part __attribute__((vector_size(REGISTER)));
    static constexpr int PARTS = LANES * sizeof(Number) / REGISTER;
    static constexpr int WIDTH = LANES / PARTS;
    Part part[PARTS];

    INLINE Vector() { FOR_PARTS(part[i] = Part{}); }
    INLINE Vector(Number x) { FOR_PARTS(part[i] = x - Part{}); }
    // The same bits.
    template <class Other>
    INLINE explicit Vector(const Vector<Other>& other) {
        FOR_PARTS(part[i] = (Part)other.part[i]);
    }
    template <class Work>
    static INLINE Vector of(const Vector& a, const Vector& b, const Work& work) {
        Vector c;
        FOR_PARTS(c.part[i] = work(a.part[i], b.part[i]));
        return c;
    }
#define OPERATOR(op)                                                                        \
    friend INLINE Vector operator op(const Vector& a, const Vector& b) {                    \
        return of(a, b, [](const Part& x, const Part& y) INLINE_LAMBDA { return x op y; }); \
    }                                                                                       \
    INLINE Vector& operator op##=(const Vector& b) { return *this = *this op b; }
    OPERATOR(+)
    OPERATOR(-)
    OPERATOR(*)
    OPERATOR(/)
    OPERATOR(&)
    OPERATOR(|)
    OPERATOR(^)
#undef OPERATOR
    friend INLINE Vector operator<<(const Vector& a, int by) {
        return of(a, a, [by](const Part& x, const Part&) INLINE_LAMBDA { return x << by; });
    }
    friend INLINE Vector operator>>(const Vector& a, int by) {
        return of(a, a, [by](const Part& x, const Part&) INLINE_LAMBDA { return x >> by; });
    }
    friend INLINE Vector operator~(const Vector& a) {
        return of(a, a, [](const Part& x, const Part&) INLINE_LAMBDA { return ~x; });
    }
    static INLINE Vector load(const Number* from) {
        Vector x;
        FOR_PARTS(std::memcpy(&x.part[i], from + i * WIDTH, REGISTER));
        return x;
    }
    INLINE void store(Number* to) const { FOR_PARTS(std::memcpy(to + i * WIDTH, &part[i], REGISTER)); }
    INLINE void set(int64_t lane, Number x) {
        Number lanes[LANES];
        store(lanes);
        lanes[lane] = x;
        *this = load(lanes);
    }
};

typedef Vector<float> F;
typedef Vector<int32_t> I;
typedef Vector<uint32_t> U;
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

INLINE F load(const float* from) { return F::load(from); }

INLINE void store(float* to, F x) { x.store(to); }

// The first `count` of sixteen, the others zero.
INLINE F load_part(const float* from, int64_t count) {
    if (count == LANES) return load(from);
#if defined(__AVX512F__)
    F x;
    x.part[0] = (F::Part)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
    return x;
#else
    float some[LANES] = {};
    std::memcpy(some, from, count * sizeof(float));
    return F::load(some);
#endif
}

INLINE void store_part(float* to, F x, int64_t count) {
    if (count == LANES)
        store(to, x);
    else
#if defined(__AVX512F__)
        _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)x.part[0]);
#else
    {
        float some[LANES];
        x.store(some);
        std::memcpy(to, some, count * sizeof(float));
    }
#endif
}

INLINE F same(float x) { return F(x); }

INLINE F bits_to_float(U bits) { return F(bits); }

INLINE U float_to_bits(F x) { return U(x); }

INLINE F masked(F x, I mask) { return F(I(x) & mask); }

// `a` if it is less (greater), else `b`: what the instructions do.
INLINE F minimum(F a, F b) {
#if defined(__AVX512F__)
    a.part[0] = (F::Part)_mm512_min_ps((__m512)a.part[0], (__m512)b.part[0]);
    return a;
#elif defined(__AVX2__)
    for (int i = 0; i < F::PARTS; i++) a.part[i] = (F::Part)_mm256_min_ps((__m256)a.part[i], (__m256)b.part[i]);
    return a;
#else
    return F::of(a, b, [](const F::Part& x, const F::Part& y) INLINE_LAMBDA { return x < y ? x : y; });
#endif
}

INLINE F maximum(F a, F b) {
#if defined(__AVX512F__)
    a.part[0] = (F::Part)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0]);
    return a;
#elif defined(__AVX2__)
    for (int i = 0; i < F::PARTS; i++) a.part[i] = (F::Part)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i]);
    return a;
#else
    return F::of(a, b, [](const F::Part& x, const F::Part& y) INLINE_LAMBDA { return x > y ? x : y; });
#endif
}

// `x`, and 0 where v is 0.
INLINE F unless_zero(F v, F x) {
    return F::of(x, v, [](const F::Part& some, const F::Part& other) INLINE_LAMBDA {
        return other == F::Part{} ? F::Part{} : some;
    });
}

INLINE F square_root(F x) {
#if defined(__AVX512F__)
    x.part[0] = (F::Part)_mm512_sqrt_ps((__m512)x.part[0]);
#elif defined(__AVX2__)
    x.part[0] = (F::Part)_mm256_sqrt_ps((__m256)x.part[0]);
    x.part[1] = (F::Part)_mm256_sqrt_ps((__m256)x.part[1]);
#else
    float lanes[LANES];
    x.store(lanes);
    for (float& lane : lanes) lane = __builtin_sqrtf(lane);
    x = F::load(lanes);
#endif
    return x;
}

// Sums with a product that is exact: fused or not, the bits are the same.
#if defined(__AVX512F__)
#define FUSED(name, instruction, plain)                                                                         \
    INLINE F name(F a, F b, F c) {                                                                              \
        a.part[0] = (F::Part)_mm512_##instruction##_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]); \
        return a;                                                                                               \
    }
#elif defined(__FMA__)
#define FUSED(name, instruction, plain)                                                                             \
    INLINE F name(F a, F b, F c) {                                                                                  \
        for (int i = 0; i < F::PARTS; i++)                                                                          \
            a.part[i] = (F::Part)_mm256_##instruction##_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]); \
        return a;                                                                                                   \
    }
#else
#define FUSED(name, instruction, plain) \
    INLINE F name(F a, F b, F c) { return plain; }
#endif
FUSED(product_plus, fmadd, a * b + c)
FUSED(product_minus, fmsub, a * b - c)
FUSED(minus_product, fnmadd, c - a * b)
#undef FUSED

typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));

// The halves are added until one number is left.
INLINE float sum(F x) {
    float lane[LANES];
    store(lane, x);
    F8 eight[2];
    std::memcpy(eight, lane, sizeof lane);
    F8 half = eight[0] + eight[1];
    F4 four[2];
    std::memcpy(four, &half, sizeof half);
    F4 last = four[0] + four[1];
    return (last[0] + last[2]) + (last[1] + last[3]);
}

inline float largest(F x) {
    float lane[LANES];
    store(lane, x);
    float most = lane[0];
    for (int i = 1; i < LANES; i++) most = lane[i] > most ? lane[i] : most;
    return most;
}

INLINE U to_words(H x) {
#if defined(__AVX512F__)
    U words;
    words.part[0] = __builtin_convertvector(x, U::Part);
    return words;
#elif defined(__AVX2__)
    __m128i half[2];
    std::memcpy(half, &x, sizeof x);
    U words;
    words.part[0] = (U::Part)_mm256_cvtepu16_epi32(half[0]);
    words.part[1] = (U::Part)_mm256_cvtepu16_epi32(half[1]);
    return words;
#else
    uint16_t halves[LANES];
    uint32_t words[LANES];
    std::memcpy(halves, &x, sizeof x);
    for (int i = 0; i < LANES; i++) words[i] = halves[i];
    return U::load(words);
#endif
}

// Of words below 2^16.
INLINE H to_halves(U x) {
#if defined(__AVX512F__)
    return __builtin_convertvector(x.part[0], H);
#elif defined(__AVX2__)
    __m256i packed = _mm256_packus_epi32((__m256i)x.part[0], (__m256i)x.part[1]);
    return (H)_mm256_permute4x64_epi64(packed, 0xd8);
#else
    uint32_t words[LANES];
    uint16_t halves[LANES];
    x.store(words);
    for (int i = 0; i < LANES; i++) halves[i] = (uint16_t)words[i];
    H all;
    std::memcpy(&all, halves, sizeof all);
    return all;
#endif
}

INLINE F widen(U upper) { return bits_to_float(upper << 16); }

INLINE F widen(H x) { return widen(to_words(x)); }

// All ones where a is greater.
INLINE U greater(I a, I b) {
    return U(I::of(a, b, [](const I::Part& x, const I::Part& y) INLINE_LAMBDA { return (I::Part)(x > y); }));
}

// All ones where the bits are those of a NaN; where they are those of a finite number.
INLINE U is_nan(U bits) { return greater(I(bits & 0x7fffffffu), I(0x7f800000)); }

INLINE U is_finite(U bits) { return greater(I(0x7f800000), I(bits & 0x7fffffffu)); }

// The upper halves of floats, as words below 2^16, to the nearest, ties to even. NaN stays NaN: arithmetic makes quiet
// ones only, whose bit is in the upper half, and what was widened has nothing in the lower.
INLINE U to_nearest(F x) {
    U bits = float_to_bits(x);
    return (bits + ((((bits >> 16) & 1u) + 0x7fffu) & ~is_nan(bits))) >> 16;
}

INLINE H narrow(F x) { return to_halves(to_nearest(x)); }

INLINE H load_half(const uint16_t* from) {
    H x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

INLINE H load_half_part(const uint16_t* from, int64_t count) {
    if (count == LANES) return load_half(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return (H)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from);
#endif
    H x = {};
    std::memcpy(&x, from, count * sizeof(uint16_t));
    return x;
}

INLINE void store_half_part(uint16_t* to, H x, int64_t count) {
    if (count == LANES)
        std::memcpy(to, &x, sizeof x);
    else
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1), (__m256i)x);
#else
        std::memcpy(to, &x, count * sizeof(uint16_t));
#endif
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
