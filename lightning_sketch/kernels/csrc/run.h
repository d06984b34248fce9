// One step of many layers, pass by pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "parallel.h"
#include "plan.h"

namespace {

class Run {
  public:
    Run(const Steps& steps, Parallel parallel, StepArgs* layers, int64_t count, int threads, char* memory)
        : steps_(steps), parallel_(parallel), layers_(layers), count_(count), threads_(threads), arena_{memory},
          scratch_(layers, count, threads, arena_), locks_(new std::mutex[count]) {}

    void run() {
        prepare();
        observe();
        int64_t most = 0;
        for (int64_t i = 0; i < count_; i++) most = std::max(most, layers_[i].rows);
        for (int64_t wave = 0; wave < most; wave += WAVE) insert(wave);
        apply();
        commit();
    }

    void observe_only() {
        observe();
        for (int64_t i = 0; i < count_; i++) {
            const StepArgs& layer = layers_[i];
            float* means = static_cast<float*>(layer.second.data);
            std::copy_n(layer.sums, layer.rows, means);
            for (int64_t row = 0; layer.left && row < layer.rows; row++)
                if (layer.left[row]) means[row] = NAN;
        }
    }

  private:
    void each(const std::vector<Task>& tasks, void (Run::*work)(const Task&, int)) {
        parallel_for(parallel_, threads_, static_cast<int64_t>(tasks.size()),
                     [&](int64_t i, int thread) { (this->*work)(tasks[i], thread); });
    }

    void prepare() {
        for (int64_t i = 0; i < count_; i++) {
            StepArgs& layer = layers_[i];
            for (State* state : {&layer.second, &layer.first})
                if (rounds_by_noise(*state)) {
                    uint32_t* noise = static_cast<uint32_t*>(state->scratch);
                    std::fill(noise + layer.columns, noise + padded(layer.columns), 0u);
                    steps_.column_noise(layer, *state, noise);
                }
            if (float* most = scratch_.largest[i]) {
                // A vector has no columns to be bounded by.
                float* before = static_cast<float*>(layer.second.scratch);
                std::fill(before, before + padded(layer.columns), INFINITY);
                for (int64_t c = 0; layer.second.columns && c < layer.columns; c++)
                    before[c] = layer.second.columns[c] * layer.second.column_weight;
                // With every row present the maximum is assigned; absent rows are bounded by the old value.
                std::fill(most, most + layer.columns, 0.0f);
                if (!layer.all_rows) std::copy_n(before, layer.columns, most);
            }
        }
    }

    // What must be known of all rows before the first update: sums of squares, and which rows are to be left out.
    void observe() {
        std::vector<Task> tasks;
        for (int i = 0; i < count_; i++) {
            const StepArgs& layer = layers_[i];
            if (makes_sums(layer))
                add_reductions(layer, i, tasks);
            else if (layer.left)
                for (int64_t at = 0; at < layer.rows; at += apply_rows(layer))
                    tasks.push_back({i, at, std::min(at + apply_rows(layer), layer.rows)});
        }
        each(tasks, &Run::observe_task);
        for (int64_t i = 0; i < count_; i++) {
            StepArgs& layer = layers_[i];
            if (layer.left) layer.leave_out = 0;  // they are found
            if (layer.left && !*layer.left_out) layer.left = nullptr;
            if (layer.second.kind == FACTORED) finish_columns(layer);
        }
    }

    void observe_task(const Task& task, int) {
        const StepArgs& layer = layers_[task.layer];
        if (makes_sums(layer))
            reduce(steps_, layer, task);
        else
            steps_.check_rows(layer, task.begin, task.end);
    }

    static void finish_columns(StepArgs& layer) {
        State& state = layer.second;
        float* roots = static_cast<float*>(state.scratch);  // of the columns over their mean
        double total = 0.0;
        for (int64_t c = 0; c < layer.columns; c++) {
            float sum = 0.0f;
            for (int64_t task = 0; layer.sums && task < reduce_tasks(layer); task++) sum += partial_columns(layer, task)[c];
            if (layer.sums) state.columns[c] += sum * state.column_weight;
            total += state.columns[c];
        }
        float mean = static_cast<float>(total / static_cast<double>(layer.columns));
        std::fill(roots, roots + padded(layer.columns), 0.0f);
        for (int64_t c = 0; c < layer.columns; c++) {
            float ratio = state.columns[c] / mean;
            roots[c] = std::sqrt(ratio == ratio ? ratio : 0.0f);  // 0/0 := 0 before the first gradient
        }
        state.floor *= mean;  // what is added to every row
    }

    void insert(int64_t wave) {
        std::vector<Task> sorts, tasks;
        for (int i = 0; i < count_; i++) {
            StepArgs& layer = layers_[i];
            if (wave >= layer.rows) continue;
            layer.wave = wave;
            int64_t end = std::min(wave + WAVE, layer.rows);
            if (layer.second.kind == ROW_SKETCH && layer.sums && wave == 0)
                for (int level = 0; level < layer.second.depth; level++)
                    tasks.push_back({i, 0, layer.rows, level, level + 1, true});
            if (scratch_.codes[i]) sorts.push_back({i, wave, end});
            if (hashes_first(layer) && wave == 0)
                for (int64_t at = 0; at < layer.rows; at += HASH_ROWS)
                    sorts.push_back({i, at, std::min(at + HASH_ROWS, layer.rows)});
            if (!uses(layer, SKETCH) || scratch_.codes[i]) continue;
            int depth = sketch_depth(layer);
            if (inserts_by_bucket(layer)) {
                const State& state = sketch_of(layer);
                int64_t buckets = (state.width + BUCKET_TASKS - 1) / BUCKET_TASKS;
                for (int level = 0; level < state.depth; level++) {
                    sorts.push_back({i, wave, end, level, level + 1});
                    for (int64_t at = 0; at < state.width; at += buckets)
                        tasks.push_back({i, at, std::min(at + buckets, state.width), level, level + 1});
                }
            } else if (wave == 0 && hashes_first(layer)) {
                // A bucket's rows are all in one task, so that in how many parts they are done changes nothing.
                int64_t parts = threads_ == 1 ? 1 : (2 * threads_ + depth - 1) / depth;
                for (int level = 0; level < depth; level++)
                    for (int64_t part = 0; part < parts; part++) tasks.push_back({i, part, parts, level, level + 1});
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
        const StepArgs& layer = layers_[task.layer];
        const Order& order = scratch_.orders[task.layer];
        int level = task.first_level;
        if (hashes_first(layer)) return hash_task(layer, task);
        if (uint16_t* codes = scratch_.codes[task.layer]) return steps_.hash_rows(layer, task.begin, task.end, codes);
        sort_rows(layer, sketch_of(layer), level, task.begin, task.end, order.starts[level], order.rows[level]);
    }

    void hash_task(const StepArgs& layer, const Task& task) {
        const State &second = layer.second, &first = layer.first;
        if (second.kind == SKETCH) steps_.hash_state(layer, second, task.begin, task.end);
        if (first.kind == SKETCH && first.scratch != second.scratch) steps_.hash_state(layer, first, task.begin, task.end);
    }

    void insert_task(const Task& task, int) {
        const StepArgs& layer = layers_[task.layer];
        const Order& order = scratch_.orders[task.layer];
        int level = task.first_level;
        if (task.means)
            steps_.insert_means(layer, layer.second, level, task.begin, task.end);
        else if (hashes_first(layer))
            steps_.insert_scattered(layer, level, task.begin, task.end);
        else if (!order.rows.empty())
            steps_.insert_buckets(layer, level, task.begin, task.end, order.starts[level], order.rows[level],
                                  layer.second.kind == SKETCH, layer.first.kind == SKETCH);
        else
            steps_.insert(layer, task.begin, task.end, level, task.last_level);
    }

    void apply() {
        std::vector<Task> tasks;
        for (int i = 0; i < count_; i++) {
            const StepArgs& layer = layers_[i];
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
        const StepArgs& layer = layers_[task.layer];
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
        for (int64_t i = 0; i < count_; i++) {
            const StepArgs& layer = layers_[i];
            float* columns = layer.second.columns;
            const float* most = scratch_.largest[i];
            if (!most || !columns) continue;
            const float* before = static_cast<const float*>(layer.second.scratch);
            bool bounded = *layer.left_out;  // as with absent rows; they were not known when the maxima began
            for (int64_t c = 0; c < layer.columns; c++) columns[c] = bounded ? std::max(before[c], most[c]) : most[c];
        }
    }

    const Steps& steps_;
    Parallel parallel_;
    StepArgs* layers_;
    int64_t count_;
    int threads_;
    Arena arena_;
    Scratch scratch_;
    std::unique_ptr<std::mutex[]> locks_;
};

}  // namespace
