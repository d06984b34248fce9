// The C interface: one call steps many layers.

#include <algorithm>
#include <cstring>
#include <vector>

#include "export.h"
#include "run.h"

namespace {

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

// Of this interface: Python refuses a library that was compiled for another.
EXPORT int lightning_sketch_version() { return 4; }

// To be compared with what Python believes.
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
