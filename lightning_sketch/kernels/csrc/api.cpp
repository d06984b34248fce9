// The C interface: one call steps many layers.

#include <algorithm>
#include <cstring>

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

// No state is taken for another one.
bool known(const StepArgs& layer) {
    auto in = [](const State& state, uint32_t kinds) { return state.kind >= 0 && state.kind < 32 && kinds >> state.kind & 1; };
    return in(layer.second, SECOND_KINDS) && in(layer.first, FIRST_KINDS) && in(layer.momentum, MOMENTUM_KINDS);
}

template <class Work>
int with_run(StepArgs* layers, int64_t count, int threads, int isa, void* memory, void* parallel, const Work& work) {
    const Steps* steps = steps_for(isa);
    if (!steps) return 1;
    for (int64_t i = 0; i < count; i++)
        if (!known(layers[i])) return 2;
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    Run run(*steps, reinterpret_cast<Parallel>(parallel), layers, count, threads, aligned);
    work(run);
    return 0;
}

}  // namespace

// 0 generic, 1 AVX2, 2 AVX-512: the best that this processor has.
EXPORT int lightning_sketch_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

// Of this interface: Python refuses a library that was compiled for another.
EXPORT int lightning_sketch_version() { return VERSION; }

// A copy of the layers with addresses in place of positions (from 1; 0 for none) in the lists of tensors, and in left_out.
EXPORT void lightning_sketch_resolve(const StepArgs* packed, int64_t count, StepArgs* layers, void* const* params,
                                     void* const* grads, void* const* ids, void* const* states, int64_t* left_out) {
    auto at = [](void* const* list, const void* position) {
        uintptr_t index = reinterpret_cast<uintptr_t>(position);
        return index ? list[index - 1] : nullptr;
    };
    std::copy(packed, packed + count, layers);
    for (int64_t i = 0; i < count; i++) {
        StepArgs& layer = layers[i];
        layer.param = at(params, layer.param);
        layer.grad = at(grads, layer.grad);
        layer.left_out = left_out + reinterpret_cast<uintptr_t>(layer.left_out) - 1;
        layer.ids = static_cast<const int64_t*>(at(ids, layer.ids));
        for (State* state : {&layer.second, &layer.first, &layer.momentum}) {
            state->data = at(states, state->data);
            state->columns = static_cast<float*>(at(states, state->columns));
        }
    }
}

// Bytes of temporary memory that lightning_sketch_step wants.
EXPORT int64_t lightning_sketch_scratch(StepArgs* layers, int64_t count, int threads) {
    Arena arena{nullptr};
    Scratch scratch(layers, count, threads, arena);
    return arena.used + 64;
}

// Only the sums that a step of FACTORED or ROW_SKETCH seconds begins with: means of the squares of rows are written to
// `data`, NaN for a row that is left out, and sums of columns (FACTORED) added to `columns`. `memory` and `parallel` as below.
EXPORT int lightning_sketch_observe(StepArgs* layers, int64_t count, int threads, int isa, void* memory, void* parallel) {
    return with_run(layers, count, threads, isa, memory, parallel, [](Run& run) { run.observe_only(); });
}

// One step of all layers. `memory` has lightning_sketch_scratch bytes; `parallel` is GOMP_parallel or null.
EXPORT int lightning_sketch_step(StepArgs* layers, int64_t count, int threads, int isa, void* memory, void* parallel) {
    return with_run(layers, count, threads, isa, memory, parallel, [](Run& run) { run.run(); });
}
