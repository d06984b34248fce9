// The steps, row by row. Compiled once for each instruction set, without contraction to fused multiply-adds: the bits
// are the same on all of them. No standard library templates here and in what it includes: the linker may take any copy of
// an inline function.

#include "steps.h"

#include "strips.h"
#include "update.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

namespace {

// Scattered rows are prefetched so many at once: look-ups of their pages overlap only if little else is between them.
constexpr int64_t BATCH = 16;
constexpr int64_t BATCH_BYTES = 1 << 14;  // at most, so that they stay in the first-level cache

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
        else if (state->kind == QUANTIZED)
            prefetch_quantized(layer, *state, row);
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

extern const Steps JOIN(steps_, ISA) = {reduce_rows,    insert,       insert_scattered,
                                        insert_buckets, insert_means, hash_state,
                                        hash_rows,      strip,        apply,
                                        column_noise,   finite};
