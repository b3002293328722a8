// How many calls are under way that may hold pages which no sequence owns: between an allocation
// and its owner, or between an owner's end and the last reader. Who recounts the ledger asks.
#ifndef CLUSTERKV_CACHE_SERVICE_CALL_COUNTER_H_
#define CLUSTERKV_CACHE_SERVICE_CALL_COUNTER_H_

#include <atomic>
#include <cstdint>
#include <optional>

namespace clusterkv::cache_service {

// Thread-safe.
class CallCounter {
 public:
  // One call, from its construction to its end.
  class Scope {
   public:
    explicit Scope(CallCounter* counter) : counter_(counter) { counter_->started_.fetch_add(1); }
    ~Scope() { counter_->ended_.fetch_add(1); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    CallCounter* const counter_;
  };

  // A mark, if no call is under way. Equal marks: none was between them.
  std::optional<uint64_t> QuietMark() const {
    const uint64_t ended = ended_.load();  // first: a call that ends in between is seen as running
    const uint64_t started = started_.load();
    if (started != ended) return std::nullopt;
    return started;
  }

 private:
  std::atomic<uint64_t> started_{0}, ended_{0};
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_CALL_COUNTER_H_
