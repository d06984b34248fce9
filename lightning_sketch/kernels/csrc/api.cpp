// The C interface: one call steps many layers. Work is cut by the layers' shapes alone, so that results do not depend on
// the number of threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "export.h"
#include "hash.h"
#include "layer.h"
#include "parallel.h"
#include "steps.h"

namespace {

constexpr int64_t TASK_NUMEL = 1 << 16;       // elements of a task, at least: a few tens of microseconds
constexpr int64_t LONG_TASK = 1 << 18;        // and at most; the longer, the steadier memory is read
constexpr int64_t LONG_TASKS = 128;           // of a layer, before they get shorter
constexpr int64_t REDUCE_ROWS = 256;          // rows of a task that sums up columns, at least
constexpr int64_t REDUCE_TASKS = 64;          // such tasks of a layer, at most
constexpr int64_t FINITE_NUMEL = 1 << 18;
constexpr int64_t STRIP_BYTES = 8 << 20;      // of a strip's sketches, at most: they are a thread's own
static_assert(STRIP_BYTES / (STRIP * 4) * 2 <= 1 << 16, "a bucket's place and a sign have 16 bits");
// Bytes before what one thread writes: others fetch ahead past the end of what they read, and would take it away.
constexpr int64_t GAP = 4096;
constexpr int64_t NARROW = 64;                // columns, below which sketches are cut by depth and not by columns
constexpr int64_t TILE = 128;                 // columns of a sketch inserted at once
constexpr int64_t WAVE = 1 << 14;             // rows whose order by bucket is in memory at once
constexpr int64_t BUCKET_TASKS = 32;          // tasks of a depth that is inserted by bucket

struct Task {
    int layer;
    int64_t begin, end;  // rows or columns
    int first_level = 0, last_level = 0;
    bool means = false;  // insert row means, not rows
};

int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

bool uses(const Layer& layer, Kind kind) { return layer.second.kind == kind || layer.first.kind == kind; }

int64_t apply_rows(const Layer& layer) {
    int64_t numel = std::clamp(layer.rows * layer.columns / LONG_TASKS, TASK_NUMEL, LONG_TASK);
    return std::max<int64_t>(1, numel / std::max<int64_t>(1, layer.columns));
}

int64_t reduce_rows(const Layer& layer) { return std::max(REDUCE_ROWS, (layer.rows + REDUCE_TASKS - 1) / REDUCE_TASKS); }

int64_t reduce_tasks(const Layer& layer) { return (layer.rows + reduce_rows(layer) - 1) / reduce_rows(layer); }

// Floats of the sums of a gradient's squares that such a second state wants before the first update.
int64_t sums_floats(const Layer& layer) {
    return padded(layer.rows) + (layer.second.kind == FACTORED ? reduce_tasks(layer) * layer.columns : 0);
}

float* partial_columns(const Layer& layer, int64_t task) {
    return layer.second.kind == FACTORED ? layer.sums + padded(layer.rows) + task * layer.columns : nullptr;
}

// The tasks that make them.
void add_reductions(const Layer& layer, int index, std::vector<Task>& tasks) {
    if (layer.second.kind == FACTORED) std::fill(partial_columns(layer, 0), layer.sums + sums_floats(layer), 0.0f);
    for (int64_t at = 0; at < layer.rows; at += reduce_rows(layer))
        tasks.push_back({index, at, std::min(at + reduce_rows(layer), layer.rows)});
}

bool reduce(const Steps& steps, const Layer& layer, const Task& task) {
    return steps.reduce_rows(layer, task.begin, task.end, partial_columns(layer, task.begin / reduce_rows(layer)));
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

const State& sketch_of(const Layer& layer) { return layer.second.kind == SKETCH ? layer.second : layer.first; }

int64_t strip_floats(const Layer& layer) {
    return layer.second.depth * layer.second.width * STRIP * (layer.first.kind == SKETCH ? 2 : 1);
}

// Columns up to the first boundary in memory of as many bytes as a strip has: processors fetch lines by twos and more.
int64_t first_strip(const Layer& layer) {
    int64_t size = layer.dtype == BFLOAT16 ? 2 : 4;
    return STRIP - static_cast<int64_t>(reinterpret_cast<uintptr_t>(layer.grad) / size % STRIP);
}

// Where several rows fall into every bucket, a bucket gathers its rows: it stays in the first-level cache meanwhile.
bool inserts_by_bucket(const Layer& layer) {
    if (!uses(layer, SKETCH)) return false;
    if (layer.second.kind == SKETCH && layer.first.kind == SKETCH && !same_hashes(layer.second, layer.first)) return false;
    return std::min(layer.rows, WAVE) >= 2 * sketch_of(layer).width;
}

// Whether a layer's step is done in strips of columns: of sketches that all rows fall into, if there are strips for all
// threads. The bits are the same as without.
bool in_strips(const Layer& layer, int threads) {
    const State &second = layer.second, &first = layer.first;
    if (second.kind != SKETCH || second.is_signed || second.depth > STRIP_DEPTH) return false;
    bool both = first.kind == SKETCH;
    if (both ? !first.is_signed || !same_hashes(second, first) : first.kind != NONE) return false;
    if (layer.ids || layer.momentum.kind != NONE || layer.rows < 2 * second.width) return false;
    if (layer.rows > second.width * layer.columns / 2) return false;  // codes of all rows beside a small sketch
    int64_t strips = (layer.columns + STRIP - 1) / STRIP;
    return strips >= 2 * threads && strip_floats(layer) * 4 <= STRIP_BYTES;
}

// At every depth of a sketch, the rows of a wave by bucket: rows[starts[b]] to rows[starts[b + 1]] lie in bucket b, ascending.
struct Order {
    std::vector<int32_t*> starts, rows;
};

void sort_rows(const Layer& layer, const State& state, int level, int64_t begin, int64_t end, int32_t* starts,
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
    std::vector<bool> reduces;            // whether the sums of squares are to be made, which lie here then
    std::vector<float*> largest;          // SM3: [columns], shared
    std::vector<Order> orders;            // SKETCH
    std::vector<uint16_t*> codes;         // SKETCH in strips: [rows, depth]
    std::vector<float*> own_largest;      // by thread: [widest SM3]
    std::vector<float*> own_tables;       // by thread: sketches of a strip

    Scratch(Layer* layers, int64_t count, int threads, Arena& arena) {
        int64_t widest = 0, tables = 0;
        for (int64_t i = 0; i < count; i++) {
            Layer& layer = layers[i];
            State& second = layer.second;
            float* most = nullptr;
            reduces.push_back(!layer.sums && (second.kind == ROW_SKETCH || second.kind == FACTORED));
            if (reduces.back()) layer.sums = arena.take<float>(sums_floats(layer));
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
            orders.push_back(order);
            for (State* state : {&layer.second, &layer.first})
                if (state->kind == STOCHASTIC) state->scratch = arena.take<uint32_t>(padded(layer.columns));
            largest.push_back(most);
        }
        for (int i = 0; i < threads; i++) {
            if (widest) arena.take<char>(GAP);
            own_largest.push_back(arena.take<float>(padded(widest)));
            if (tables) arena.take<char>(GAP);
            own_tables.push_back(arena.take<float>(tables, STRIP * 4));
        }
    }
};

class Run {
  public:
    Run(const Steps& steps, Parallel parallel, Layer* layers, int64_t count, int threads, char* memory)
        : steps_(steps), parallel_(parallel), layers_(layers), count_(count), threads_(threads), arena_{memory},
          scratch_(layers, count, threads, arena_), locks_(new std::mutex[count]) {}

    void run() {
        prepare();
        reduce_all();
        int64_t most = 0;
        for (int64_t i = 0; i < count_; i++) most = std::max(most, layers_[i].rows);
        for (int64_t wave = 0; wave < most; wave += WAVE) insert(wave);
        apply();
        commit();
    }

  private:
    void each(const std::vector<Task>& tasks, void (Run::*work)(const Task&, int)) {
        parallel_for(parallel_, threads_, static_cast<int64_t>(tasks.size()),
                     [&](int64_t i, int thread) { (this->*work)(tasks[i], thread); });
    }

    void prepare() {
        for (int64_t i = 0; i < count_; i++) {
            Layer& layer = layers_[i];
            for (State* state : {&layer.second, &layer.first})
                if (state->kind == STOCHASTIC) {
                    uint32_t* noise = static_cast<uint32_t*>(state->scratch);
                    std::fill(noise + layer.columns, noise + padded(layer.columns), 0u);
                    steps_.column_noise(layer, *state, noise);
                }
            if (float* most = scratch_.largest[i]) {
                // A vector has no columns to be bounded by.
                float* before = static_cast<float*>(layer.second.scratch);
                std::fill(before, before + padded(layer.columns), INFINITY);
                if (layer.second.columns) std::copy_n(layer.second.columns, layer.columns, before);
                // With every row present the maximum is assigned; absent rows are bounded by the old value.
                std::fill(most, most + layer.columns, 0.0f);
                if (!layer.all_rows) std::copy_n(before, layer.columns, most);
            }
        }
    }

    void reduce_all() {
        std::vector<Task> tasks;
        for (int i = 0; i < count_; i++)
            if (scratch_.reduces[i]) add_reductions(layers_[i], i, tasks);
        each(tasks, &Run::reduce_task);
        for (int64_t i = 0; i < count_; i++)
            if (layers_[i].second.kind == FACTORED) finish_columns(layers_[i]);
    }

    void reduce_task(const Task& task, int) { reduce(steps_, layers_[task.layer], task); }

    static void finish_columns(const Layer& layer) {
        const State& state = layer.second;
        float* shape = static_cast<float*>(state.scratch);
        double total = 0.0;
        for (int64_t c = 0; c < layer.columns; c++) {
            float sum = 0.0f;
            for (int64_t task = 0; task < reduce_tasks(layer); task++) sum += partial_columns(layer, task)[c];
            state.columns[c] += sum * state.column_weight;
            total += state.columns[c];
        }
        float mean = static_cast<float>(total / static_cast<double>(layer.columns));
        std::fill(shape, shape + padded(layer.columns), 0.0f);
        for (int64_t c = 0; c < layer.columns; c++) {
            float ratio = state.columns[c] / mean;
            shape[c] = ratio == ratio ? ratio : 0.0f;  // 0/0 := 0 before the first gradient
        }
    }

    void insert(int64_t wave) {
        std::vector<Task> sorts, tasks;
        for (int i = 0; i < count_; i++) {
            Layer& layer = layers_[i];
            if (wave >= layer.rows) continue;
            layer.wave = wave;
            int64_t end = std::min(wave + WAVE, layer.rows);
            if (layer.second.kind == ROW_SKETCH && wave == 0)
                for (int level = 0; level < layer.second.depth; level++)
                    tasks.push_back({i, 0, layer.rows, level, level + 1, true});
            if (scratch_.codes[i]) sorts.push_back({i, wave, end});
            if (!uses(layer, SKETCH) || scratch_.codes[i]) continue;
            int depth = std::max(layer.second.depth, layer.first.depth);
            if (inserts_by_bucket(layer)) {
                const State& state = sketch_of(layer);
                int64_t buckets = (state.width + BUCKET_TASKS - 1) / BUCKET_TASKS;
                for (int level = 0; level < state.depth; level++) {
                    sorts.push_back({i, wave, end, level, level + 1});
                    for (int64_t at = 0; at < state.width; at += buckets)
                        tasks.push_back({i, at, std::min(at + buckets, state.width), level, level + 1});
                }
            } else if (wave == 0 && layer.columns <= NARROW) {
                for (int level = 0; level < depth; level++) tasks.push_back({i, 0, layer.columns, level, level + 1});
            } else if (wave == 0) {
                for (int64_t at = 0; at < layer.columns; at += TILE)
                    tasks.push_back({i, at, std::min(at + TILE, layer.columns), 0, depth});
            }
        }
        each(sorts, &Run::sort_task);
        each(tasks, &Run::insert_task);
    }

    void sort_task(const Task& task, int) {
        const Layer& layer = layers_[task.layer];
        const Order& order = scratch_.orders[task.layer];
        int level = task.first_level;
        if (uint16_t* codes = scratch_.codes[task.layer]) return steps_.hash_rows(layer, task.begin, task.end, codes);
        sort_rows(layer, sketch_of(layer), level, task.begin, task.end, order.starts[level], order.rows[level]);
    }

    void insert_task(const Task& task, int) {
        const Layer& layer = layers_[task.layer];
        const Order& order = scratch_.orders[task.layer];
        int level = task.first_level;
        if (task.means)
            steps_.insert_means(layer, layer.second, level, task.begin, task.end);
        else if (!order.rows.empty())
            steps_.insert_buckets(layer, level, task.begin, task.end, order.starts[level], order.rows[level],
                                  layer.second.kind == SKETCH, layer.first.kind == SKETCH);
        else
            steps_.insert(layer, task.begin, task.end, level, task.last_level);
    }

    void apply() {
        std::vector<Task> tasks;
        for (int i = 0; i < count_; i++) {
            const Layer& layer = layers_[i];
            if (scratch_.codes[i]) {
                for (int64_t at = 0, next = first_strip(layer); at < layer.columns; at = next, next += STRIP)
                    tasks.push_back({i, at, std::min(next, layer.columns)});
                continue;
            }
            for (int64_t at = 0; at < layer.rows; at += apply_rows(layer))
                tasks.push_back({i, at, std::min(at + apply_rows(layer), layer.rows)});
        }
        each(tasks, &Run::apply_task);
    }

    void apply_task(const Task& task, int thread) {
        const Layer& layer = layers_[task.layer];
        if (const uint16_t* codes = scratch_.codes[task.layer])
            return steps_.strip(layer, task.begin, task.end, codes, scratch_.own_tables[thread]);
        float *most = scratch_.largest[task.layer], *own = scratch_.own_largest[thread];
        if (most) std::fill(own, own + padded(layer.columns), 0.0f);
        steps_.apply(layer, task.begin, task.end, own);
        if (!most) return;
        std::lock_guard<std::mutex> lock(locks_[task.layer]);
        for (int64_t c = 0; c < layer.columns; c++) most[c] = std::max(most[c], own[c]);
    }

    void commit() {
        for (int64_t i = 0; i < count_; i++)
            if (const float* most = scratch_.largest[i]; most && layers_[i].second.columns)
                std::copy_n(most, layers_[i].columns, layers_[i].second.columns);
    }

    const Steps& steps_;
    Parallel parallel_;
    Layer* layers_;
    int64_t count_;
    int threads_;
    Arena arena_;
    Scratch scratch_;
    std::unique_ptr<std::mutex[]> locks_;
};

const Steps* steps_for(int isa) {
#if defined(__x86_64__)
    if (isa == 2) return &steps_avx512;
    if (isa == 1) return &steps_avx2;
#endif
    return isa == 0 ? &steps_generic : nullptr;
}

}  // namespace

// 0 generic, 1 AVX2, 2 AVX-512: the best that this processor has.
EXPORT int lightning_sketch_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

// To be compared with what Python believes.
// Of this interface: Python refuses a library that was compiled for another.
EXPORT int lightning_sketch_version() { return 3; }

EXPORT int64_t lightning_sketch_layer_bytes() { return sizeof(Layer); }

// A copy of the layers with addresses in place of positions (from 1; 0 for none) in the lists of tensors.
EXPORT void lightning_sketch_resolve(const Layer* packed, int64_t count, Layer* layers, void* const* params,
                                     void* const* grads, void* const* sums, void* const* ids, void* const* states) {
    auto at = [](void* const* list, const void* position) {
        uintptr_t index = reinterpret_cast<uintptr_t>(position);
        return index ? list[index - 1] : nullptr;
    };
    std::copy(packed, packed + count, layers);
    for (int64_t i = 0; i < count; i++) {
        Layer& layer = layers[i];
        layer.param = at(params, layer.param);
        layer.grad = at(grads, layer.grad);
        layer.sums = static_cast<float*>(at(sums, layer.sums));
        layer.ids = static_cast<const int64_t*>(at(ids, layer.ids));
        for (State* state : {&layer.second, &layer.first, &layer.momentum}) {
            state->data = at(states, state->data);
            state->columns = static_cast<float*>(at(states, state->columns));
        }
    }
}

// Bytes of temporary memory that lightning_sketch_step wants.
EXPORT int64_t lightning_sketch_scratch(Layer* layers, int64_t count, int threads) {
    Arena arena{nullptr};
    Scratch scratch(layers, count, threads, arena);
    return arena.used + 64;
}

// One step of all layers. `memory` has lightning_sketch_scratch bytes; `parallel` is GOMP_parallel or null.
EXPORT int lightning_sketch_step(Layer* layers, int64_t count, int threads, int isa, void* memory, void* parallel) {
    const Steps* steps = steps_for(isa);
    if (!steps) return 1;
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    Run(*steps, reinterpret_cast<Parallel>(parallel), layers, count, threads, aligned).run();
    return 0;
}

// Floats of the sums of squares that a second state of a kind wants of a gradient; the layout is `Layer::sums`'.
EXPORT int64_t lightning_sketch_sums(int64_t rows, int64_t columns, int32_t kind) {
    Layer layer{};
    layer.rows = rows, layer.columns = columns, layer.second.kind = kind;
    return sums_floats(layer);
}

// Whether every value of each tensor is finite: found[i] is 0 or 1. Of tensors of rows[i] rows that sums[i] is not null for,
// the same pass makes the sums of squares that a second state of kinds[i] wants.
EXPORT int lightning_sketch_finite(const void** tensors, const int64_t* numels, const int32_t* dtypes, int64_t count,
                                   float* const* sums, const int64_t* rows, const int32_t* kinds, uint8_t* found,
                                   int threads, int isa, void* parallel) {
    const Steps* steps = steps_for(isa);
    if (!steps) return 1;
    std::vector<Layer> layers(static_cast<size_t>(count), Layer{});
    std::vector<std::atomic<uint8_t>> bad(static_cast<size_t>(count));
    std::vector<Task> looks, reductions;
    auto look = [&](int i) {
        for (int64_t at = 0; at < numels[i]; at += FINITE_NUMEL)
            looks.push_back({i, at, std::min(at + FINITE_NUMEL, numels[i])});
    };
    auto look_through = [&](int64_t at, int) {
        const Task& task = looks[at];
        if (bad[task.layer]) return;
        const char* from = static_cast<const char*>(tensors[task.layer]);
        from += task.begin * (dtypes[task.layer] == BFLOAT16 ? 2 : 4);
        if (!steps->finite(from, task.end - task.begin, dtypes[task.layer])) bad[task.layer] = 1;
    };
    for (int i = 0; i < count; i++) {
        Layer& layer = layers[i];
        layer.grad = tensors[i], layer.dtype = dtypes[i], layer.sums = sums[i], layer.second.kind = kinds[i];
        if (sums[i] && numels[i]) {
            layer.rows = rows[i], layer.columns = numels[i] / rows[i];
            add_reductions(layer, i, reductions);
        } else {
            look(i);
        }
    }
    auto go = reinterpret_cast<Parallel>(parallel);
    int64_t first = static_cast<int64_t>(looks.size()), others = static_cast<int64_t>(reductions.size());
    parallel_for(go, threads, first + others, [&](int64_t at, int thread) {
        if (at < first) return look_through(at, thread);
        const Task& task = reductions[at - first];
        if (!reduce(*steps, layers[task.layer], task)) bad[task.layer] = 1;
    });
    // Squares of finite values may have overflowed.
    looks.clear();
    for (int i = 0; i < count; i++)
        if (sums[i] && bad[i]) {
            bad[i] = 0;
            look(i);
        }
    parallel_for(go, threads, static_cast<int64_t>(looks.size()), look_through);
    for (int64_t i = 0; i < count; i++) found[i] = !bad[i];
    return 0;
}
