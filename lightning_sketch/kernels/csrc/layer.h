// What Python hands over: one step of one layer. Mirrored field by field in `kernels/cpu.py`.
#pragma once

#include <cstdint>

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

enum Kind : int32_t {
    NONE = 0,
    DENSE = 1,       // data: [param rows, columns] of `dtype`
    STOCHASTIC = 2,  // the same in bfloat16, rounded stochastically
    SCALED = 3,      // data: float [param rows, columns], true value / scale
    ROW = 4,         // data: float [param rows], true value / scale
    ROW_SKETCH = 5,  // data: float [depth, width] of row means, true value / scale
    SM3 = 6,         // data: float [param rows], true value / scale; columns: float [columns] or null
    FACTORED = 7,    // data: float [param rows], columns: float [columns], both true value / scale
    SKETCH = 8,      // data: float [depth, width, columns], true value / scale
    // data: [param rows, bytes] of codes of `depth` bits in blocks of `width`, rounded stochastically; columns: float
    // [param rows, blocks], the largest magnitude of each block
    QUANTIZED = 9,
};

// s <- decay * s + weight * x. Where values are stored divided by `scale`, decay is in the scale and weight is
// divided by it already. ROW, ROW_SKETCH and FACTORED with a weight of 0 hold this step already, so no sums are made.
struct State {
    int32_t kind;
    int32_t dtype;
    int32_t is_signed;
    int32_t depth;
    int64_t width;
    uint64_t seed;  // of the row hashes (sketches) or of the rounding noise (STOCHASTIC, QUANTIZED)
    float decay;
    float weight;
    float column_weight;  // FACTORED
    float scale;
    void* data;
    float* columns;
    void* scratch;  // set by the driver
};

struct StepArgs {
    int64_t rows;     // of the gradient
    int64_t columns;  // numel of a row
    int64_t row_offset, column_offset;  // of this shard in the whole parameter, for hashes
    const int64_t* ids;                 // [rows], local row ids; null: all rows in order
    void* param;
    const void* grad;
    int64_t* left_out;   // what is left out of the step is counted there: rows, or elements if all states are element-wise
    int32_t dtype;       // of param and grad
    int32_t all_rows;    // whether every row of the parameter is in the gradient
    int32_t maximize;      // maximize
    int32_t use_bound;   // whether a sketched first moment is clamped to bound * sqrt(v)
    float weight_decay;  // coupled
    float decay_factor;        // 1 - lr * decoupled weight decay
    float lr;
    float eps;
    float correction;  // update = m / (sqrt(v) * correction + eps)
    float bound;
    float nesterov;  // 0, or the momentum factor
    int32_t leave_out;  // whether rows that are not finite are to be left out, and have yet to be found
    // Set by the driver:
    float* sums;    // of the gradient's squares: the means of all rows, padded, then of a FACTORED state partial column sums
    uint8_t* left;  // [rows] 1 where a row was found that is to be left out; null if there is none
    int64_t wave;   // first of the rows whose order by bucket is in memory
    State second, first, momentum;  // momentum: SM3's EMA of the preconditioned gradient
};
