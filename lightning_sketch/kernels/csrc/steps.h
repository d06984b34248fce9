// What is compiled once for each instruction set. Nothing here allocates or locks.
#pragma once

#include "fields.h"

constexpr int MOST_DEPTH = 8;
constexpr int STRIP_DEPTH = 3;  // of sketches that are stepped in strips, at most
constexpr int64_t STRIP = 64;   // columns of a strip, at most

struct Steps {
    // Means of the squares of rows [begin, end) into the layer's sums, and sums of the columns' squares, if asked for, into
    // partial_columns[columns], which are zeros; finds the rows that are to be left out, if the layer has a place for them.
    void (*reduce_rows)(const StepArgs&, int64_t begin, int64_t end, float* partial_columns);
    // Finds those of the rows [begin, end) that are to be left out.
    void (*check_rows)(const StepArgs&, int64_t begin, int64_t end);
    // Insert columns [begin, end) of all rows into the sketches, at the depths [first_level, last_level).
    void (*insert)(const StepArgs&, int64_t begin, int64_t end, int first_level, int last_level);
    // Insert all rows whose buckets at one depth lie in the given one of so many equal parts of the sketches; they were hashed.
    void (*insert_scattered)(const StepArgs&, int level, int64_t part, int64_t parts);
    // Insert the rows of buckets [begin, end) at one depth: of the layer's wave, rows
    // order[starts[b]..starts[b + 1]) lie in bucket b.
    void (*insert_buckets)(const StepArgs&, int level, int64_t begin, int64_t end, const int32_t* starts,
                           const int32_t* order, bool into_second, bool into_first);
    // Insert the means of rows [begin, end) into one depth of a sketch.
    void (*insert_means)(const StepArgs&, const State&, int level, int64_t begin, int64_t end);
    // Where rows [begin, end) lie in a sketch, into its scratch: codes[level * rows + row] is the bucket, times two, plus one if
    // the sign is negative.
    void (*hash_state)(const StepArgs&, const State&, int64_t begin, int64_t end);
    // The same for strips: codes[row * depth + level] has the place among a table's
    // depth * width rows in place of the bucket.
    void (*hash_rows)(const StepArgs&, int64_t begin, int64_t end, uint16_t* codes);
    // The whole step of columns [begin, end), at most STRIP of them, of all rows: insertion, then update. `tables` has
    // depth * width * STRIP floats for every sketch.
    void (*strip)(const StepArgs&, int64_t begin, int64_t end, const uint16_t* codes, float* tables);
    // Update parameter and states of the rows [begin, end), but of what is left out; largest_columns[columns] for SM3.
    void (*apply)(const StepArgs&, int64_t begin, int64_t end, float* largest_columns);
    void (*column_noise)(const StepArgs&, const State&, uint32_t* noise);
};

extern const Steps steps_generic;
#if defined(__x86_64__)
extern const Steps steps_avx2;
extern const Steps steps_avx512;
#endif
