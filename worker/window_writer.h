// Puts a prompt's rows that lie on a GPU into a service on the same host, past the host's memory.
//
// Put packs rows into free slots of a ring (ingest_ring.h) by a kernel on the caller's stream; a
// thread of the writer waits for it, tells the service (PutWindow), and has the slot back with the
// answer. What cannot go this way goes through a PrefillWriter, counted by its reason: rows for
// which there is no slot are left to the caller; a slot that the service could not be told of is
// copied to the host by the writer's thread.
//
// One writer serves all sequences of a client. Thread-safe.
#ifndef CLUSTERKV_WORKER_WINDOW_WRITER_H_
#define CLUSTERKV_WORKER_WINDOW_WRITER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/client.h"
#include "worker/ingest_ring.h"
#include "worker/prefill_writer.h"

namespace clusterkv::worker {

struct IngestRingOptions {
  int slots = 4;
  int64_t slot_bytes = 32 << 20;  // K and V together; 0: no ring, rows go through host memory
};

// K and V that were put, by the way they went.
struct IngestCounts {
  int64_t window_bytes = 0;                  // from slots, by the service's device
  int64_t host_bytes = 0;                    // through host memory
  std::map<std::string, int64_t> fallbacks;  // why, and how often
  void Add(const IngestCounts& other);
};

class WindowWriter {
 public:
  using MakeRing = std::function<absl::StatusOr<std::unique_ptr<IngestRing>>()>;
  using Done = std::function<void(const absl::Status& status)>;

  // `client` outlives the writer.
  WindowWriter(Client* client, MakeRing make_ring);
  // Waits for what is under way.
  ~WindowWriter();

  // Makes the ring and has it mapped, unless it is. Waits for the service. A service that cannot
  // map it is no error: then Put takes nothing.
  void Connect();

  struct Rows {
    const v1::SequenceHandle* sequence = nullptr;
    int64_t layer = 0, first_token = 0;
    EngineRows keys, values;
    std::vector<float> query_rms;        // or empty
    PrefillWriter* otherwise = nullptr;  // outlives `done`; of the same sequence
    // Leaves the first `tokens` out.
    void Skip(int64_t tokens);
  };
  // Takes the first of the rows, as many as a slot holds, and answers how many tokens: 0 when there
  // is no slot (wait: none that will be free). `done` is called once, on the writer's thread, when
  // they are with the service or why they are not; not if 0 or an error is answered. Errors: what
  // could not be launched.
  absl::StatusOr<int64_t> Put(const Rows& rows, EngineStream stream, bool wait, Done done);
  // Rows that the caller put through host memory because Put did not take them.
  void CountHostBytes(int64_t bytes);
  IngestCounts counts() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The window writers of some clients, one per GPU that rows lie on. Thread-safe.
class WindowWriters {
 public:
  // Made when it is first asked for; connected, or tried to. Waits for the service.
  WindowWriter* For(Client* client, int gpu, const WindowWriter::MakeRing& make_ring);
  IngestCounts counts() const;

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<Client*, int>, std::unique_ptr<WindowWriter>> writers_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_WINDOW_WRITER_H_
