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
INLINE void prefetch_row(const StepArgs& layer, int64_t row) {
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

inline bool is_elementwise(const State& state) { return state.kind <= SCALED; }

inline uint32_t get_bits(const void* base, int32_t dtype, int64_t at) {
    uint32_t bits = 0;
    std::memcpy(&bits, element(base, dtype, at), dtype == BFLOAT16 ? 2 : 4);
    return bits;
}

// Elements of a chunk that are left out, and what parameter and states hold there: they are stepped with the others, and
// put back. All states are element-wise.
struct LeftElements {
    int64_t count = 0;
    int16_t at[CHUNK];
    uint32_t bits[3][CHUNK];

    // Finds them, and returns the chunk's gradient with zeros there, in the buffer.
    const float* take(const StepArgs& layer, int64_t i, int64_t c, int64_t columns, const float* g, float* buffer) {
        if (g != buffer) std::memcpy(buffer, g, columns * sizeof(float));
        for (int64_t j = 0; j < columns; j++) {
            if (finite(element(layer.grad, layer.dtype, i * layer.columns + c + j), 1, layer.dtype)) continue;
            buffer[j] = 0.0f;
            at[count++] = (int16_t)j;
        }
        copy<false>(layer, row_of(layer, i) * layer.columns + c);
        return buffer;
    }
    void put_back(const StepArgs& layer, int64_t row, int64_t c) {
        copy<true>(layer, row * layer.columns + c);
        count = 0;
    }

  private:
    template <bool back>
    void copy(const StepArgs& layer, int64_t from) {
        struct {
            void* data;
            int32_t dtype;
        } tensors[] = {{layer.param, layer.dtype},
                       {layer.second.data, layer.second.dtype},
                       {layer.first.data, layer.first.dtype}};
        for (int t = 0; t < 3; t++)
            for (int64_t k = 0; tensors[t].data && k < count; k++) {
                auto [data, dtype] = tensors[t];
                if (back)
                    std::memcpy((char*)data + (from + at[k]) * (dtype == BFLOAT16 ? 2 : 4), &bits[t][k],
                                dtype == BFLOAT16 ? 2 : 4);
                else
                    bits[t][k] = get_bits(data, dtype, from + at[k]);
            }
    }
};

void apply(const StepArgs& layer, int64_t begin, int64_t end, float* largest_columns) {
    const State &second = layer.second, &first = layer.first;
    const Numbers numbers(layer);
    Buffers buffers;
    // What is left out is found here unless it was found before. In rows whose means are made here, by these.
    const bool by_element = layer.leave_out && is_elementwise(second) && is_elementwise(first);
    const bool adds_means = (second.kind == ROW || second.kind == FACTORED) && second.weight != 0.0f;
    const bool by_row = layer.leave_out && !by_element && !(second.kind == ROW && adds_means);
    const int64_t ahead = ahead_in_first(layer);
    LeftElements left;
    int64_t left_out = 0;
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

            if (is_left(layer, i)) continue;
            if (by_row && !finite_row(layer, i, ahead)) {
                left_out++;
                continue;
            }
            float row_v = 0.0f;
            F largest_row = {};
            if (adds_means) {
                float mean = layer.sums ? layer.sums[i] : mean_square(layer, i, buffers.gradient, ahead);
                if (layer.leave_out && !finite_by_mean(layer, i, mean)) {
                    left_out++;
                    continue;
                }
                float* stored = (float*)second.data + row;
                *stored += mean * second.weight;
                row_v = (*stored + second.floor) * second.scale;
            } else if (second.kind == ROW || second.kind == FACTORED) {
                row_v = (((float*)second.data)[row] + second.floor) * second.scale;
            } else if (second.kind == ROW_SKETCH) {
                row_v = sketched_row(layer, second, row);
            } else if (second.kind == SM3) {
                row_v = ((float*)second.data)[row] * second.scale;
            }

            for (int64_t c = 0; c < layer.columns; c += CHUNK) {
                int64_t count = least(CHUNK, layer.columns - c);
                const float* g = gradient_of(layer, i, c, count, buffers.gradient);
                if (by_element && !finite(element(layer.grad, layer.dtype, i * layer.columns + c), count, layer.dtype)) {
                    g = left.take(layer, i, c, count, g, buffers.gradient);
                    left_out += left.count;
                }
                Place place{row, c, count, g};
                if (row_second) {
                    RowSecond of_row(numbers, row_v);
                    update(layer, numbers, place, first_hashes, k, of_row, buffers);
                } else if (second.kind == SM3) {
                    const float* columns = (const float*)second.scratch + c;
                    Sm3Second sm3{columns, largest_columns + c, same(row_v), same(second.weight), largest_row};
                    update(layer, numbers, place, first_hashes, k, sm3, buffers);
                    largest_row = sm3.largest_row;
                } else if (second.kind == FACTORED) {
                    FactoredSecond factored{(const float*)second.scratch + c, same(__builtin_sqrtf(row_v))};
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
                if (left.count) left.put_back(layer, row, c);
            }
            if (second.kind == SM3) ((float*)second.data)[row] = largest(largest_row) / second.scale;
        }
    }
    count_left_out(layer, left_out);
}

void column_noise(const StepArgs& layer, const State& state, uint32_t* noise) {
    for (int64_t c = 0; c < layer.columns; c++)
        noise[c] = (uint32_t)mix64((uint64_t)(c + layer.column_offset), ~state.seed);
}

}  // namespace

extern const Steps JOIN(steps_, ISA) = {reduce_rows,      check_rows,     insert,
                                        insert_scattered, insert_buckets, insert_means,
                                        hash_state,       hash_rows,      strip,
                                        apply,            column_noise};
