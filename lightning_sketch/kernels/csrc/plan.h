// How the steps of layers are cut into tasks, and where their temporaries lie. Work is cut by the layers' shapes alone, so
// that results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hash.h"
#include "steps.h"

namespace {

constexpr int64_t TASK_NUMEL = 1 << 16;       // elements of a task, at least: a few tens of microseconds
constexpr int64_t LONG_TASK = 1 << 18;        // and at most; the longer, the steadier memory is read
constexpr int64_t LONG_TASKS = 128;           // of a layer, before they get shorter
constexpr int64_t REDUCE_ROWS = 256;          // rows of a task that sums up columns, at least
constexpr int64_t REDUCE_TASKS = 64;          // such tasks of a layer, at most
constexpr int64_t STRIP_BYTES = 8 << 20;      // of a strip's sketches, at most: they are a thread's own
static_assert(STRIP_BYTES / (STRIP * 4) * 2 <= 1 << 16, "a bucket's place and a sign have 16 bits");
// Bytes before what one thread writes: others fetch ahead past the end of what they read, and would take it away.
constexpr int64_t GAP = 4096;
constexpr int64_t NARROW = 64;                // columns, below which sketches are cut by depth and not by columns
constexpr int64_t TILE = 128;                 // columns of a sketch inserted at once
constexpr int64_t HASH_ROWS = 1 << 12;        // rows of a task that only hashes
constexpr int64_t WAVE = 1 << 14;             // rows whose order by bucket is in memory at once
constexpr int64_t BUCKET_TASKS = 32;          // tasks of a depth that is inserted by bucket

struct Task {
    int layer;
    int64_t begin, end;  // rows or columns; a part and of how many
    int first_level = 0, last_level = 0;
    bool means = false;  // insert row means, not rows
};

int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

bool uses(const StepArgs& layer, Kind kind) { return layer.second.kind == kind || layer.first.kind == kind; }

bool rounds_by_noise(const State& state) { return state.kind == STOCHASTIC || state.kind == QUANTIZED; }

int64_t apply_rows(const StepArgs& layer) {
    int64_t numel = std::clamp(layer.rows * layer.columns / LONG_TASKS, TASK_NUMEL, LONG_TASK);
    return std::max<int64_t>(1, numel / std::max<int64_t>(1, layer.columns));
}

int64_t reduce_rows(const StepArgs& layer) { return std::max(REDUCE_ROWS, (layer.rows + REDUCE_TASKS - 1) / REDUCE_TASKS); }

int64_t reduce_tasks(const StepArgs& layer) { return (layer.rows + reduce_rows(layer) - 1) / reduce_rows(layer); }

// Floats of the sums of a gradient's squares that such a second state wants before the first update.
int64_t sums_floats(const StepArgs& layer) {
    return padded(layer.rows) + (layer.second.kind == FACTORED ? reduce_tasks(layer) * layer.columns : 0);
}

float* partial_columns(const StepArgs& layer, int64_t task) {
    return layer.second.kind == FACTORED ? layer.sums + padded(layer.rows) + task * layer.columns : nullptr;
}

bool makes_sums(const StepArgs& layer) {
    return layer.second.weight != 0.0f && (layer.second.kind == ROW_SKETCH || layer.second.kind == FACTORED);
}

// Whether rows that are to be left out must be found before the first update: nothing of them may be in what rows share.
bool finds_rows_first(const StepArgs& layer) { return layer.leave_out && (makes_sums(layer) || uses(layer, SKETCH)); }

// The tasks that make them.
void add_reductions(const StepArgs& layer, int index, std::vector<Task>& tasks) {
    if (layer.second.kind == FACTORED) std::fill(partial_columns(layer, 0), layer.sums + sums_floats(layer), 0.0f);
    for (int64_t at = 0; at < layer.rows; at += reduce_rows(layer))
        tasks.push_back({index, at, std::min(at + reduce_rows(layer), layer.rows)});
}

void reduce(const Steps& steps, const StepArgs& layer, const Task& task) {
    steps.reduce_rows(layer, task.begin, task.end, partial_columns(layer, task.begin / reduce_rows(layer)));
}

// Hands out pieces of one buffer; without a buffer it only counts.
struct Arena {
    char* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count, int64_t aligned = 64) {
        // Without a base as much is counted as any base that is aligned to 64 may need.
        int64_t at = used, shift = base ? -reinterpret_cast<intptr_t>(base + at) & (aligned - 1) : 0;
        used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 + aligned - 64;
        return base ? reinterpret_cast<T*>(base + at + shift) : nullptr;
    }
};

bool same_hashes(const State& a, const State& b) {
    return a.kind == b.kind && a.depth == b.depth && a.width == b.width && a.seed == b.seed;
}

int sketch_depth(const StepArgs& layer) {  // the larger one's
    int depth = 0;
    for (const State* state : {&layer.second, &layer.first})
        if (state->kind == SKETCH) depth = std::max(depth, state->depth);
    return depth;
}

const State& sketch_of(const StepArgs& layer) { return layer.second.kind == SKETCH ? layer.second : layer.first; }

int64_t strip_floats(const StepArgs& layer) {
    return layer.second.depth * layer.second.width * STRIP * (layer.first.kind == SKETCH ? 2 : 1);
}

// Columns up to the first boundary in memory of as many bytes as a strip has: processors fetch lines by twos and more.
int64_t first_strip(const StepArgs& layer) {
    int64_t size = layer.dtype == BFLOAT16 ? 2 : 4;
    return STRIP - static_cast<int64_t>(reinterpret_cast<uintptr_t>(layer.grad) / size % STRIP);
}

// Where several rows fall into every bucket, a bucket gathers its rows: it stays in the first-level cache meanwhile.
bool inserts_by_bucket(const StepArgs& layer) {
    if (!uses(layer, SKETCH)) return false;
    if (layer.second.kind == SKETCH && layer.first.kind == SKETCH && !same_hashes(layer.second, layer.first)) return false;
    return std::min(layer.rows, WAVE) >= 2 * sketch_of(layer).width;
}

// Whether a layer's step is done in strips of columns: of sketches that all rows fall into, if there are strips for all
// threads. The bits are the same as without.
bool in_strips(const StepArgs& layer, int threads) {
    const State &second = layer.second, &first = layer.first;
    if (second.kind != SKETCH || second.is_signed || second.depth > STRIP_DEPTH) return false;
    bool both = first.kind == SKETCH;
    if (both ? !first.is_signed || !same_hashes(second, first) : first.kind != NONE) return false;
    if (layer.ids || layer.momentum.kind != NONE || layer.rows < 2 * second.width) return false;
    if (layer.rows > second.width * layer.columns / 2) return false;  // codes of all rows beside a small sketch
    int64_t strips = (layer.columns + STRIP - 1) / STRIP;
    return strips >= 2 * threads && strip_floats(layer) * 4 <= STRIP_BYTES;
}

// Whether the buckets of all rows are found before the first is inserted: tasks of every depth would find them again.
bool hashes_first(const StepArgs& layer) {
    if (!layer.ids || !uses(layer, SKETCH) || inserts_by_bucket(layer)) return false;
    return std::max(layer.second.width, layer.first.width) < int64_t{1} << 31;  // a bucket and a sign have 32 bits
}

// At every depth of a sketch, the rows of a wave by bucket: rows[starts[b]] to rows[starts[b + 1]] lie in bucket b, ascending.
struct Order {
    std::vector<int32_t*> starts, rows;
};

void sort_rows(const StepArgs& layer, const State& state, int level, int64_t begin, int64_t end, int32_t* starts,
               int32_t* rows) {
    auto bucket = [&](int64_t i) {
        int64_t row = layer.ids ? layer.ids[i] : i;
        return bucket_of(state, static_cast<uint64_t>(row + layer.row_offset), level).index;
    };
    std::fill(starts, starts + state.width + 1, 0);
    for (int64_t i = begin; i < end; i++) starts[bucket(i) + 1]++;
    for (int64_t b = 0; b < state.width; b++) starts[b + 1] += starts[b];
    // Counts up to the start of the next bucket, and so shifts by one.
    for (int64_t i = begin; i < end; i++) rows[starts[bucket(i)]++] = static_cast<int32_t>(i - begin);
    for (int64_t b = state.width; b > 0; b--) starts[b] = starts[b - 1];
    starts[0] = 0;
}

// Where the temporaries of every layer lie.
struct Scratch {
    std::vector<float*> largest;          // SM3: [columns], shared
    std::vector<Order> orders;            // SKETCH
    std::vector<uint16_t*> codes;         // SKETCH in strips: [rows, depth]
    std::vector<float*> own_largest;      // by thread: [widest SM3]
    std::vector<float*> own_tables;       // by thread: sketches of a strip

    Scratch(StepArgs* layers, int64_t count, int threads, Arena& arena) {
        int64_t widest = 0, tables = 0;
        for (int64_t i = 0; i < count; i++) {
            StepArgs& layer = layers[i];
            State& second = layer.second;
            float* most = nullptr;
            layer.sums = makes_sums(layer) ? arena.take<float>(sums_floats(layer)) : nullptr;
            layer.left = finds_rows_first(layer) ? arena.take<uint8_t>(layer.rows) : nullptr;
            if (second.kind == FACTORED) second.scratch = arena.take<float>(padded(layer.columns));
            if (second.kind == SM3) {
                second.scratch = arena.take<float>(padded(layer.columns));
                most = arena.take<float>(padded(layer.columns));
                widest = std::max(widest, layer.columns);
            }
            Order order;
            bool strips = in_strips(layer, threads);
            codes.push_back(strips ? arena.take<uint16_t>(layer.rows * second.depth) : nullptr);
            if (strips) {
                tables = std::max(tables, strip_floats(layer));
            } else if (inserts_by_bucket(layer)) {
                const State& state = sketch_of(layer);
                for (int level = 0; level < state.depth; level++) {
                    order.starts.push_back(arena.take<int32_t>(state.width + 1));
                    order.rows.push_back(arena.take<int32_t>(std::min(layer.rows, WAVE)));
                }
            }
            if (!strips) place_codes(layer, arena);
            orders.push_back(order);
            for (State* state : {&layer.second, &layer.first})
                if (rounds_by_noise(*state)) state->scratch = arena.take<uint32_t>(padded(layer.columns));
            largest.push_back(most);
        }
        for (int i = 0; i < threads; i++) {
            if (widest) arena.take<char>(GAP);
            own_largest.push_back(arena.take<float>(padded(widest)));
            if (tables) arena.take<char>(GAP);
            own_tables.push_back(arena.take<float>(tables, STRIP * 4));
        }
    }

    static void place_codes(StepArgs& layer, Arena& arena) {
        State &second = layer.second, &first = layer.first;
        bool wanted = hashes_first(layer);
        if (second.kind == SKETCH) second.scratch = wanted ? arena.take<uint32_t>(layer.rows * second.depth) : nullptr;
        if (first.kind != SKETCH) return;
        bool shared = wanted && same_hashes(second, first);
        first.scratch = shared ? second.scratch : wanted ? arena.take<uint32_t>(layer.rows * first.depth) : nullptr;
    }
};

}  // namespace
