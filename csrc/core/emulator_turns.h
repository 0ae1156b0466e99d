// How the warps of an emulated team run beside each other. They take turns in one thread of the host: a warp runs until
// it has to wait, and which of those that can go on is next is drawn anew each round, so that what lacks an order meets
// all of them. With SEQKERNELS_THREADS, for ThreadSanitizer, each is a thread of its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifndef SEQKERNELS_THREADS
#include <ucontext.h>
#endif

namespace seqkernels::persistent {
namespace {

[[noreturn]] inline void fail_emulation(const std::string& what) { throw std::logic_error("emulation: " + what); }

#ifdef SEQKERNELS_THREADS

constexpr std::chrono::seconds kPatience{60};

using Mutex = std::mutex;

// Waits until ready(), which somebody else changes without a word; false: it would be for ever.
template <class Ready>
bool wait_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!ready()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

class Condition {
 public:
  void notify_all() { changed_.notify_all(); }
  template <class Ready>
  bool wait(std::unique_lock<Mutex>& lock, const Ready& ready) {
    return changed_.wait_for(lock, kPatience, ready);
  }

 private:
  std::condition_variable changed_;
};

// body(i) for all i < count, beside each other. body throws nothing.
inline void take_turns(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

#else

// Those who take turns, each on a stack of its own.
class Turns {
 public:
  Turns(int count, const std::function<void(int)>& body) : body_(body) {
    for (int i = 0; i < count; ++i) {
      all_.push_back(std::make_unique<One>());
      prepare(all_.back()->context, stack(i), &caller_);
      order_.push_back(i);
    }
  }

  void run() {
    Turns* const before = std::exchange(current_, this);
    while (!order_.empty()) {
      for (std::size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[draw(i)]);
      bool moved = false;
      for (const int i : order_) moved = turn(i) || moved;
      if (!moved) {
        // Nobody is left who could change what they wait for.
        stuck_ = true;
        turn(order_.front());
        stuck_ = false;
      }
      std::erase_if(order_, [&](int i) { return all_[static_cast<std::size_t>(i)]->done; });
    }
    current_ = before;
  }

  template <class Ready>
  static bool wait(const Ready& ready) {
    if (ready()) return true;
    One& one = *current_->all_[static_cast<std::size_t>(current_->running_)];
    one.ready = [](const void* of) { return (*static_cast<const Ready*>(of))(); };
    one.waits_for = &ready;
    swapcontext(&one.context, &current_->caller_);
    one.ready = nullptr;
    return ready();
  }

 private:
  static constexpr std::size_t kStack = std::size_t{1} << 20;

  struct One {
    ucontext_t context;
    bool (*ready)(const void*) = nullptr;
    const void* waits_for = nullptr;
    bool done = false;
  };

  static void prepare(ucontext_t& context, char* stack, ucontext_t* next) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = next;
    makecontext(&context, &Turns::begin, 0);
  }
  static void begin() {
    Turns& turns = *current_;
    const int i = turns.running_;
    turns.body_(i);
    turns.all_[static_cast<std::size_t>(i)]->done = true;
  }

  // Stacks are kept: a team comes after the other.
  static char* stack(int i) {
    static thread_local std::vector<std::unique_ptr<char[]> > stacks;
    while (static_cast<int>(stacks.size()) <= i) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
    return stacks[static_cast<std::size_t>(i)].get();
  }

  // Whether there was something to do for it.
  bool turn(int i) {
    One& one = *all_[static_cast<std::size_t>(i)];
    if (one.ready != nullptr && !stuck_ && !one.ready(one.waits_for)) return false;
    running_ = i;
    swapcontext(&caller_, &one.context);
    return true;
  }

  std::size_t draw(std::size_t below) {
    drawn_ = drawn_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::size_t>(drawn_ >> 33) % below;
  }

  static inline thread_local Turns* current_ = nullptr;
  const std::function<void(int)>& body_;
  std::vector<std::unique_ptr<One> > all_;
  std::vector<int> order_;
  ucontext_t caller_;
  int running_ = 0;
  bool stuck_ = false;
  std::uint64_t drawn_ = 0;
};

// Nobody runs at the same time.
struct Mutex {
  void lock() {}
  void unlock() {}
};

template <class Ready>
bool wait_until(const Ready& ready) {
  return Turns::wait(ready);
}

class Condition {
 public:
  void notify_all() {}
  template <class Ready>
  bool wait(std::unique_lock<Mutex>&, const Ready& ready) {
    return Turns::wait(ready);
  }
};

inline void take_turns(int count, const std::function<void(int)>& body) { Turns(count, body).run(); }

#endif

// Where a number of warps meet, again and again.
class Meeting {
 public:
  explicit Meeting(int count) : count_(count), missing_(count) {}

  void arrive_and_wait() {
    std::unique_lock lock(mutex_);
    const long phase = phase_;
    arrive();
    if (!ended_.wait(lock, [&] { return phase_ != phase; })) fail_emulation("warps wait for others for ever");
  }
  // From now on the others meet without the caller.
  void leave() {
    const std::lock_guard lock(mutex_);
    --count_;
    arrive();
  }

 private:
  void arrive() {
    if (--missing_ > 0) return;
    missing_ = count_;
    ++phase_;
    ended_.notify_all();
  }

  Mutex mutex_;
  Condition ended_;
  int count_, missing_;
  long phase_ = 0;
};

}  // namespace
}  // namespace seqkernels::persistent
