// Hashes of rows and columns; `kernels/reference.py` and `codecs/bfloat16.py` are their specification.
#pragma once

#include "fields.h"
#include "vec.h"

namespace {

// SplitMix64's finaliser (Steele et al., OOPSLA 2014) of x + seed.
inline uint64_t mix64(uint64_t x, uint64_t seed) {
    x += seed * 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

struct Bucket {
    int64_t index;
    float sign;
};

inline Bucket bucket_of(const State& state, uint64_t row_id, int level) {
    uint64_t bits = mix64(row_id, state.seed + level + 1);
    return {(int64_t)(((bits >> 32) * (uint64_t)state.width) >> 32), bits & 1 ? 1.0f : -1.0f};
}

// Noise for each of 16 elements, of the row's hash and the columns'. The upper bits are uniform.
INLINE U noise32(uint32_t row, U columns) {
    U x = (columns ^ row) * 2654435769u;
    return (x ^ (U)((I)x >> 15)) * 2246822507u;
}

INLINE U noise16(uint32_t row, U columns) { return noise32(row, columns) >> 16; }

// The upper halves, as words below 2^16: up with probability equal to the fraction cut off. Infinities stay, and so does
// NaN, as in `to_nearest`.
INLINE U round_stochastically(F x, U noise) {
    U bits = float_to_bits(x);
    return (bits + (noise & is_finite(bits))) >> 16;
}

}  // namespace
