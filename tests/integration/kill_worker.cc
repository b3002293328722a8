// A worker to be killed: kill_worker prefill|decode TARGET NAME. Tells on standard output what it
// did, and a failure's reason; exits with 0, or 3 after a failure.
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "tests/integration/kill_job.h"
#include "tests/worker/worker_harness.h"

namespace clusterkv::integration {
namespace {

void Tell(const std::string& line) {
  std::puts(line.c_str());
  std::fflush(stdout);
}

absl::Status Prefill(const std::string& target, const std::string& name) {
  CKV_ASSIGN_OR_RETURN(const auto client, worker::Client::Connect(target));
  v1::OpenSequenceRequest request = JobRequest(name);
  // One that was READY when its worker was killed stays for so long.
  request.set_ttl_ms(500);
  const absl::Time deadline = absl::Now() + absl::Seconds(60);
  while (true) {
    request.set_session_id(client->session_id());
    const auto sequence =
        worker::Prefill(client.get(), request, JobLayers(), {.chunk_bytes = 4096});
    if (sequence.ok()) {
      Tell(absl::StrCat("ready ", JobDigest(*sequence)));
      return absl::OkStatus();
    }
    // A predecessor that was killed still has the name, until its session ends.
    if (ReasonOf(sequence.status()) != v1::SEQUENCE_EXISTS || absl::Now() > deadline) {
      return sequence.status();
    }
    Tell("typed SEQUENCE_EXISTS");
    absl::SleepFor(absl::Milliseconds(50));
  }
}

absl::Status Decode(const std::string& target, const std::string& name) {
  CKV_ASSIGN_OR_RETURN(const auto client, worker::Client::Connect(target));
  v1::SequenceHandle handle;
  handle.set_name(name);
  CKV_ASSIGN_OR_RETURN(const v1::Sequence sequence, client->GetSequence(handle));
  CKV_ASSIGN_OR_RETURN(const int64_t first, NextStep(client.get(), sequence.handle()));
  return DecodeJob(client.get(), sequence.handle(), first,
                   [](int64_t step, int64_t layer, uint64_t digest) {
                     Tell(absl::StrCat(step, " ", layer, " ", absl::Hex(digest)));
                   });
}

int Main(const std::string& mode, const std::string& target, const std::string& name) {
  const absl::Status status = mode == "prefill" ? Prefill(target, name) : Decode(target, name);
  if (status.ok()) return 0;
  Tell(absl::StrCat("failed ", v1::ErrorReason_Name(ReasonOf(status)), " ", status.ToString()));
  return 3;
}

}  // namespace
}  // namespace clusterkv::integration

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  return clusterkv::integration::Main(argv[1], argv[2], argv[3]);
}
