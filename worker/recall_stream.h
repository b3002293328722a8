// One StreamSelectAndRecall, kept open: a request out, its responses in, each with a deadline.
//
// The calling thread does the waiting itself, on a completion queue of the stream's own; with
// `spin` it polls for so long before it sleeps. Not thread-safe.
#ifndef CLUSTERKV_WORKER_RECALL_STREAM_H_
#define CLUSTERKV_WORKER_RECALL_STREAM_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/client.h"

namespace clusterkv::worker {

class RecallStream {
 public:
  // `client` outlives the stream. Each operation may take client->call_timeout().
  static absl::StatusOr<std::unique_ptr<RecallStream>> Open(Client* client, absl::Duration spin);
  ~RecallStream();

  // Errors: the stream's; DeadlineExceeded. The stream is broken then: only its destructor may
  // follow.
  absl::Status Write(const v1::SelectAndRecallRequest& request);
  absl::Status Read(v1::SelectAndRecallResponse* response);

 private:
  using Stream = grpc::ClientAsyncReaderWriterInterface<v1::SelectAndRecallRequest,
                                                        v1::SelectAndRecallResponse>;
  RecallStream(absl::Duration timeout, absl::Duration spin) : timeout_(timeout), spin_(spin) {}

  // Waits for the one operation under way. False: it failed, or the deadline passed and the call
  // was cancelled; either way it is over.
  bool Wait();
  bool Next(absl::Time deadline, bool* ok);
  absl::Status Broken(const char* what);

  const absl::Duration timeout_, spin_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<Stream> stream_;
  bool timed_out_ = false;
  bool finished_ = false;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_RECALL_STREAM_H_
