#include "worker/window_writer.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/base/host_id.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "proto/grpc_status.h"
#include "worker/kv_chunks.h"
#include "worker/transport_failure.h"

namespace clusterkv::worker {
namespace {

constexpr char kNoSlot[] = "no free slot", kSmallSlots[] = "a token is larger than a slot";

// Whether the window failed, and not the chunk: then the chunk may go another way.
bool IsWindowFailure(const absl::Status& status) {
  return IsTransportFailure(status) || ReasonOf(status) == v1::WINDOW_NOT_FOUND ||
         absl::IsUnimplemented(status);
}

// The first `tokens` of the rows.
EngineRows First(EngineRows rows, int64_t tokens) {
  rows.tokens = tokens;
  return rows;
}

}  // namespace

void IngestCounts::Add(const IngestCounts& other) {
  window_bytes += other.window_bytes;
  host_bytes += other.host_bytes;
  for (const auto& [reason, count] : other.fallbacks) fallbacks[reason] += count;
}

void WindowWriter::Rows::Skip(int64_t tokens) {
  first_token += tokens;
  for (EngineRows* rows : {&keys, &values}) {
    rows->data = static_cast<const std::byte*>(rows->data) + tokens * rows->token_stride_bytes;
    rows->tokens -= tokens;
  }
}

struct WindowWriter::Impl {
  // A slot that is packed, or will be.
  struct Filled {
    int slot = 0;
    int64_t array_bytes = 0;  // of keys, and of values
    v1::PutWindowRequest request;
    std::vector<float> query_rms;
    PrefillWriter* otherwise = nullptr;
    Done done;
  };

  void Run();
  absl::Status Send(Filled& filled);
  absl::Status Tell(const v1::PutWindowRequest& request) const;
  absl::Status SendThroughHost(const Filled& filled);
  absl::StatusOr<uint64_t> Map();
  // The window is of no use until Connect is called again.
  void GiveUp(const std::string& reason) {
    const std::lock_guard<std::mutex> lock(mutex);
    window_id = 0;
    why_none = reason;
    changed.notify_all();
  }

  Client* client = nullptr;
  MakeRing make_ring;
  std::mutex connecting;             // one Connect at a time
  std::unique_ptr<IngestRing> ring;  // made once; guarded by `connecting`, then read by all

  mutable std::mutex mutex;
  std::condition_variable changed;
  uint64_t window_id = 0;  // 0: not mapped
  std::string why_none = "not connected";
  std::vector<int> free_slots;
  std::deque<Filled> filled;
  bool ending = false;
  IngestCounts counts;
  std::thread thread;  // last: it uses the others
};

WindowWriter::WindowWriter(Client* client, MakeRing make_ring) : impl_(std::make_unique<Impl>()) {
  impl_->client = client;
  impl_->make_ring = std::move(make_ring);
  impl_->thread = std::thread([impl = impl_.get()] { impl->Run(); });
}

WindowWriter::~WindowWriter() {
  {
    const std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->ending = true;
    impl_->changed.notify_all();
  }
  impl_->thread.join();
}

absl::StatusOr<uint64_t> WindowWriter::Impl::Map() {
  const v1::ServerInfo info = client->server_info();
  if (std::find(info.links().begin(), info.links().end(), v1::LINK_PEER) == info.links().end()) {
    return absl::UnavailableError("the server maps no memory of others");
  }
  std::unique_ptr<IngestRing> made;  // kept if it is of use
  if (ring == nullptr) {
    CKV_ASSIGN_OR_RETURN(made, make_ring());
  }
  const IngestRing& mapped = ring == nullptr ? *made : *ring;
  v1::ConnectIngestRequest request;
  request.set_session_id(client->session_id());
  CKV_ASSIGN_OR_RETURN(*request.mutable_handle(), mapped.Export());
  request.set_bytes(static_cast<uint64_t>(mapped.slots() * mapped.slot_bytes()));
  request.set_host(kernels::HostId());
  v1::ConnectIngestResponse response;
  const auto context = client->MakeContext();
  CKV_RETURN_IF_ERROR(
      FromGrpcStatus(client->cache().ConnectIngest(context.get(), request, &response)));
  if (response.window_id() == 0) return absl::UnavailableError(response.reason());
  if (made != nullptr) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (int slot = 0; slot < made->slots(); ++slot) free_slots.push_back(slot);
    ring = std::move(made);
  }
  return response.window_id();
}

void WindowWriter::Connect() {
  const std::lock_guard<std::mutex> connecting(impl_->connecting);
  {
    const std::lock_guard<std::mutex> lock(impl_->mutex);
    if (impl_->window_id != 0) return;
  }
  const absl::StatusOr<uint64_t> window_id = impl_->Map();
  if (!window_id.ok()) return impl_->GiveUp(std::string(window_id.status().message()));
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->window_id = *window_id;
}

absl::StatusOr<int64_t> WindowWriter::Put(const Rows& rows, EngineStream stream, bool wait,
                                          Done done) {
  Impl::Filled filled;
  const int64_t token_bytes = rows.keys.heads * rows.keys.row_bytes;
  int64_t tokens = 0;
  {
    std::unique_lock<std::mutex> lock(impl_->mutex);
    const auto ready = [this] { return impl_->window_id == 0 || !impl_->free_slots.empty(); };
    if (wait) impl_->changed.wait(lock, ready);
    const bool mapped = impl_->window_id != 0;
    if (mapped) tokens = std::min(rows.keys.tokens, impl_->ring->slot_bytes() / 2 / token_bytes);
    if (tokens == 0 || impl_->free_slots.empty()) {
      ++impl_->counts.fallbacks[!mapped ? impl_->why_none : tokens == 0 ? kSmallSlots : kNoSlot];
      return 0;
    }
    filled.slot = impl_->free_slots.back();
    impl_->free_slots.pop_back();
    filled.request.set_window_id(impl_->window_id);
  }
  const IngestRing& ring = *impl_->ring;
  const absl::Status packed =
      impl_->ring->Pack(filled.slot, First(rows.keys, tokens), First(rows.values, tokens), stream);
  if (!packed.ok()) {
    const std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->free_slots.push_back(filled.slot);
    return packed;
  }
  filled.array_bytes = tokens * token_bytes;
  *filled.request.mutable_sequence() = *rows.sequence;
  filled.request.set_layer(static_cast<uint32_t>(rows.layer));
  filled.request.set_first_token(static_cast<uint32_t>(rows.first_token));
  filled.request.set_tokens(static_cast<uint32_t>(tokens));
  filled.request.set_keys_offset(static_cast<uint64_t>(filled.slot * ring.slot_bytes()));
  filled.request.set_values_offset(filled.request.keys_offset() +
                                   static_cast<uint64_t>(ring.slot_bytes() / 2));
  if (!rows.query_rms.empty()) {
    SetStatistics(rows.layer, rows.query_rms, filled.request.mutable_statistics());
  }
  filled.query_rms = rows.query_rms;
  filled.otherwise = rows.otherwise;
  filled.done = std::move(done);
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->filled.push_back(std::move(filled));
  impl_->changed.notify_all();
  return tokens;
}

void WindowWriter::Impl::Run() {
  std::unique_lock<std::mutex> lock(mutex);
  while (true) {
    changed.wait(lock, [this] { return ending || !filled.empty(); });
    if (filled.empty()) return;  // ending
    Filled next = std::move(filled.front());
    filled.pop_front();
    lock.unlock();
    const absl::Status status = Send(next);
    lock.lock();
    free_slots.push_back(next.slot);
    changed.notify_all();
    lock.unlock();
    next.done(status);
    lock.lock();
  }
}

absl::Status WindowWriter::Impl::Send(Filled& filled) {
  CKV_ASSIGN_OR_RETURN(const uint64_t hash, ring->AwaitPacked(filled.slot));
  filled.request.set_checksum(hash);
  absl::Status told = Tell(filled.request);
  if (IsTransportFailure(told)) {
    // Idempotent, and the window stands if the session does.
    CKV_RETURN_IF_ERROR(client->Reconnect(client->call_timeout(), nullptr));
    told = Tell(filled.request);
  }
  if (told.ok()) {
    const std::lock_guard<std::mutex> lock(mutex);
    counts.window_bytes += 2 * filled.array_bytes;
    return told;
  }
  if (!IsWindowFailure(told)) return told;
  GiveUp(std::string(told.message()));
  return SendThroughHost(filled);
}

absl::Status WindowWriter::Impl::Tell(const v1::PutWindowRequest& request) const {
  v1::PutWindowResponse response;
  const auto context = client->MakeContext();
  return FromGrpcStatus(client->cache().PutWindow(context.get(), request, &response));
}

absl::Status WindowWriter::Impl::SendThroughHost(const Filled& filled) {
  const auto bytes = static_cast<size_t>(filled.array_bytes);
  std::vector<std::byte> rows(2 * bytes);
  CKV_RETURN_IF_ERROR(
      ring->Read(filled.slot, filled.array_bytes, rows.data(), rows.data() + bytes));
  {
    const std::lock_guard<std::mutex> lock(mutex);
    counts.host_bytes += 2 * filled.array_bytes;
    ++counts.fallbacks[why_none];
  }
  const v1::PutWindowRequest& request = filled.request;
  return filled.otherwise->PutWhenRoom(request.layer(), request.first_token(), request.tokens(),
                                       absl::MakeConstSpan(rows.data(), bytes),
                                       absl::MakeConstSpan(rows.data() + bytes, bytes),
                                       filled.query_rms);
}

void WindowWriter::CountHostBytes(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->counts.host_bytes += bytes;
}

IngestCounts WindowWriter::counts() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->counts;
}

WindowWriter* WindowWriters::For(Client* client, int gpu, const WindowWriter::MakeRing& make_ring) {
  WindowWriter* writer = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<WindowWriter>& of = writers_[{client, gpu}];
    if (of == nullptr) of = std::make_unique<WindowWriter>(client, make_ring);
    writer = of.get();
  }
  writer->Connect();
  return writer;
}

IngestCounts WindowWriters::counts() const {
  IngestCounts sum;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [of, writer] : writers_) sum.Add(writer->counts());
  return sum;
}

}  // namespace clusterkv::worker
