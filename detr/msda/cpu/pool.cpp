#include "pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace detr_msda {
namespace {

class Pool {
 public:
    bool owned_by_this_process() const { return process_ == getpid(); }
    bool try_begin() { return !busy_.exchange(true, std::memory_order_acquire); }

    void run(long long count, int threads, void (*task)(void *, long long, int), void *context) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                for (; size_ < threads - 1; ++size_) {
                    std::thread([this, number = size_ + 1] { work(number); }).detach();
                }
            } catch (const std::system_error &) {
                // The system gives no more threads; those there are, this one at least, will do.
            }
            task_ = task;
            context_ = context;
            count_ = count;
            wanted_ = std::min(threads - 1, size_);
            running_ = wanted_;
            next_.store(0, std::memory_order_relaxed);
            ++round_;
        }
        wake_.notify_all();
        drain(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        busy_.store(false, std::memory_order_release);
    }

 private:
    void drain(int worker) {
        for (long long index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
            task_(context_, index, worker);
        }
    }

    void work(int number) {
        long long seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (number > wanted_) continue;
            lock.unlock();
            drain(number);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic<long long> next_{0};
    std::atomic<bool> busy_{false};
    void (*task_)(void *, long long, int) = nullptr;
    void *context_ = nullptr;
    long long count_ = 0, round_ = 0;
    int size_ = 0, wanted_ = 0, running_ = 0;
    const pid_t process_ = getpid();
};

// A forked child has the pool's memory but not its threads, so it starts its own. Pools are never
// freed: their threads sleep on them until the process ends.
Pool &pool() {
    static std::mutex mutex;
    static Pool *current = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    if (current == nullptr || !current->owned_by_this_process()) current = new Pool;
    return *current;
}

}  // namespace

void parallel(long long count, int threads, void (*task)(void *, long long, int), void *context) {
    const int useful = count < threads ? static_cast<int>(count) : threads;
    if (useful > 1) {
        Pool &workers = pool();
        if (workers.try_begin()) {
            workers.run(count, useful, task, context);
            return;
        }
    }
    for (long long index = 0; index < count; ++index) task(context, index, 0);
}

}  // namespace detr_msda
