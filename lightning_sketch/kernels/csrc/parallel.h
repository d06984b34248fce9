// Run tasks on torch's own threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// libgomp's entry point for a parallel region, as torch has loaded it. Its threads spin for a while after each of torch's
// own parallel regions; threads of ours beside them would have to share the cores with the spinning.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// task(index, thread) for every index in [0, count), in any order.
template <class Task>
void parallel_for(Parallel parallel, int threads, int64_t count, const Task& task) {
    struct Shared {
        const Task& task;
        int64_t count;
        std::atomic<int64_t> next{0};
        std::atomic<int> thread{0};

        static void run(void* data) {
            Shared& self = *static_cast<Shared*>(data);
            int thread = self.thread++;
            for (int64_t i = self.next++; i < self.count; i = self.next++) self.task(i, thread);
        }
    } shared{task, count};

    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) task(i, 0);
    } else if (parallel) {
        parallel(Shared::run, &shared, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; i++) others.emplace_back(Shared::run, &shared);
        Shared::run(&shared);
        for (std::thread& other : others) other.join();
    }
}
