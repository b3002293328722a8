// A worker's liveness session with one server, kept on a thread of its own.
//
// The thread opens the stream, beats at a third of the ttl, and resumes the session when the stream
// breaks or falls silent for a ttl, with growing pauses, until the object dies. Thread-safe.
#ifndef CLUSTERKV_WORKER_SESSION_STREAM_H_
#define CLUSTERKV_WORKER_SESSION_STREAM_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "clusterkv/v1/session_service.grpc.pb.h"

namespace clusterkv::worker {

class SessionStream {
 public:
  using NoticeHandler = std::function<void(const v1::SessionResponse::Notice&)>;

  // `on_notice` may be null; it is called on the stream's reading thread.
  SessionStream(const std::shared_ptr<grpc::Channel>& channel, std::string worker_name,
                NoticeHandler on_notice);
  ~SessionStream();  // ends the session at once, best effort

  // Waits until a session stands with the server of that boot id (0: any).
  // Errors: the server's refusal, if that was its last word; Unavailable when the timeout passes.
  absl::Status WaitUntilOpen(uint64_t boot_id, absl::Duration timeout);
  uint64_t session_id() const;  // 0: none stands just now

 private:
  struct Attempt;  // one stream: its context, its reading thread

  void Run();
  // Opens a stream and keeps it until it breaks or the object dies. True if it ever stood.
  bool RunOnce();
  void Read(Attempt* attempt);
  void Welcome(Attempt* attempt, const v1::SessionResponse::Welcome& welcome);
  void Beat(Attempt* attempt, std::unique_lock<std::mutex>& lock);

  const std::unique_ptr<v1::SessionService::StubInterface> stub_;
  const std::string worker_name_;
  const NoticeHandler on_notice_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  bool open_ = false;
  uint64_t resume_id_ = 0;
  uint64_t boot_id_ = 0;
  absl::Duration ttl_;
  absl::Status last_error_;
  std::thread thread_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_SESSION_STREAM_H_
