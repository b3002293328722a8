#include "worker/prefill_writer.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/element_type.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "proto/grpc_status.h"
#include "worker/kv_chunks.h"
#include "worker/transport_failure.h"

namespace clusterkv::worker {
namespace {

// How long a stream may stand idle before its bytes are acknowledged.
constexpr std::chrono::milliseconds kIdle(200);

int64_t KvBytes(const v1::PutKvRequest& request) {
  return static_cast<int64_t>(request.chunk().keys().size() + request.chunk().values().size());
}

}  // namespace

struct PrefillWriter::Impl {
  Impl(Client* client, const v1::Sequence& sequence, const PrefillWriterOptions& options)
      : client(client), sequence(sequence), options(options) {}
  ~Impl();

  using Writer = grpc::ClientWriterInterface<v1::PutKvRequest>;

  // --- the engine's thread
  absl::Status CheckRows(const KvRows& rows) const;

  // --- the sender's thread
  void Run();
  bool WaitForWork(std::unique_lock<std::mutex>& lock);
  absl::Status OpenStream();
  absl::Status SendNext(std::unique_lock<std::mutex>& lock);
  absl::Status Acknowledge();
  absl::Status CloseStream();
  absl::Status Recover(const absl::Status& failure);
  bool Full() const { return unacknowledged_bytes >= options.max_in_flight_bytes / 4; }
  bool StreamIsOld() const {
    return stream != nullptr && absl::Now() - stream_opened > options.stream_timeout / 4;
  }

  Client* const client;
  const v1::Sequence sequence;
  const PrefillWriterOptions options;
  int64_t chunk_bytes = 0;
  int64_t row_bytes = 0;  // of one token's K, all KV heads

  mutable std::mutex mutex;
  std::condition_variable changed;
  std::deque<v1::PutKvRequest> queue;
  int64_t in_flight_bytes = 0;  // queued or not acknowledged
  bool room_wanted = false;     // a Put was refused, or somebody waits
  bool finishing = false;
  bool cancelled = false;
  bool done = false;  // the sender has ended
  absl::Status status;
  std::shared_ptr<grpc::ClientContext> context;  // of the open stream; for cancelling it
  std::atomic<int64_t> bytes_sent{0};

  // Of the sender's thread alone.
  std::unique_ptr<Writer> stream;
  v1::PutKvResponse response;
  std::deque<v1::PutKvRequest> unacknowledged;
  int64_t unacknowledged_bytes = 0;
  absl::Time stream_opened;
  bool resending = false;  // nothing was acknowledged since the last failure
  bool name_sequence = false;
  std::thread thread;
};

PrefillWriter::Impl::~Impl() {
  {
    std::lock_guard lock(mutex);
    cancelled = true;
    if (context != nullptr) context->TryCancel();
  }
  changed.notify_all();
  if (thread.joinable()) thread.join();
}

absl::Status PrefillWriter::Impl::CheckRows(const KvRows& rows) const {
  const v1::KvShape& shape = sequence.shape();
  if (rows.layer < 0 || rows.layer >= shape.layers()) {
    return Error(v1::LAYER_OUT_OF_RANGE,
                 absl::StrCat("layer: expected 0 to ", shape.layers() - 1, ", got ", rows.layer));
  }
  if (rows.first_token < 0 || rows.tokens < 1 || rows.first_token > sequence.prompt_tokens() ||
      rows.tokens > sequence.prompt_tokens() - rows.first_token) {
    return Error(v1::TOKENS_OUT_OF_RANGE,
                 absl::StrCat("tokens: expected a part of [0, ", sequence.prompt_tokens(),
                              "), got ", rows.tokens, " from ", rows.first_token));
  }
  const size_t expected = static_cast<size_t>(rows.tokens * row_bytes);
  if (rows.keys.size() != expected || rows.values.size() != expected) {
    return Error(v1::SHAPE_MISMATCH,
                 absl::StrCat("keys, values: expected ", expected, " bytes each, got ",
                              rows.keys.size(), " and ", rows.values.size()));
  }
  const size_t rms = size_t{shape.kv_heads()} * shape.head_dim();
  if (!rows.query_rms.empty() && rows.query_rms.size() != rms) {
    return Error(v1::SHAPE_MISMATCH, absl::StrCat("query_rms: expected ", rms, " numbers, got ",
                                                  rows.query_rms.size()));
  }
  return absl::OkStatus();
}

void PrefillWriter::Impl::Run() {
  std::unique_lock lock(mutex);
  while (WaitForWork(lock)) {
    absl::Status result;
    if (!queue.empty() && !Full() && !StreamIsOld()) {
      result = SendNext(lock);
    } else {
      lock.unlock();
      result = Acknowledge();
      lock.lock();
    }
    if (!result.ok() && !cancelled) {
      lock.unlock();
      result = Recover(result);
      lock.lock();
    }
    if (!result.ok()) {
      status = result;
      break;
    }
  }
  if (status.ok() && cancelled) status = absl::CancelledError("the writer was ended");
  lock.unlock();
  if (stream != nullptr) {
    context->TryCancel();
    CloseStream().IgnoreError();
  }
  lock.lock();
  done = true;
  changed.notify_all();
}

// False when the thread shall end: cancelled, or all is acknowledged.
bool PrefillWriter::Impl::WaitForWork(std::unique_lock<std::mutex>& lock) {
  const auto work = [&] {
    return cancelled || finishing || !queue.empty() || (room_wanted && !unacknowledged.empty());
  };
  if (unacknowledged.empty()) {
    changed.wait(lock, work);
  } else {
    changed.wait_for(lock, kIdle, work);  // and then acknowledge
  }
  return !cancelled && !(finishing && queue.empty() && unacknowledged.empty());
}

absl::Status PrefillWriter::Impl::OpenStream() {
  auto fresh = std::make_shared<grpc::ClientContext>();
  fresh->set_deadline(absl::ToChronoTime(absl::Now() + options.stream_timeout));
  {
    std::lock_guard lock(mutex);
    if (cancelled) return absl::CancelledError("the writer was ended");
    context = fresh;
  }
  response.Clear();
  stream = client->cache().PutKv(fresh.get(), &response);
  stream_opened = absl::Now();
  name_sequence = true;
  return absl::OkStatus();
}

// Moves the queue's first request to the unacknowledged ones and sends it.
absl::Status PrefillWriter::Impl::SendNext(std::unique_lock<std::mutex>& lock) {
  unacknowledged.push_back(std::move(queue.front()));
  queue.pop_front();
  lock.unlock();
  v1::PutKvRequest& request = unacknowledged.back();
  unacknowledged_bytes += KvBytes(request);
  if (request.has_chunk() && request.chunk().checksum() == 0) {
    request.mutable_chunk()->set_checksum(ChunkChecksum(request.chunk()));
  }
  absl::Status result = stream == nullptr ? OpenStream() : absl::OkStatus();
  if (result.ok()) {
    if (name_sequence) {
      *request.mutable_sequence() = sequence.handle();
    } else {
      request.clear_sequence();
    }
    name_sequence = false;
    bytes_sent += KvBytes(request);
    if (!stream->Write(request)) {
      result = CloseStream();
      if (result.ok()) result = absl::UnavailableError("PutKv: the stream ended early");
    }
  }
  lock.lock();
  return result;
}

// Ends the stream; its bytes are the server's then.
absl::Status PrefillWriter::Impl::Acknowledge() {
  if (stream == nullptr) return absl::OkStatus();
  stream->WritesDone();
  CKV_RETURN_IF_ERROR(CloseStream());
  resending = false;
  std::lock_guard lock(mutex);
  unacknowledged.clear();
  in_flight_bytes -= unacknowledged_bytes;
  unacknowledged_bytes = 0;
  room_wanted = false;
  changed.notify_all();
  return absl::OkStatus();
}

absl::Status PrefillWriter::Impl::CloseStream() {
  const grpc::Status finished = stream->Finish();
  stream.reset();
  return FromGrpcStatus(finished);
}

// After a failed stream: what was not acknowledged goes back to the front of the queue, once.
absl::Status PrefillWriter::Impl::Recover(const absl::Status& failure) {
  if (!IsStreamFailure(failure) || resending) return failure;
  resending = true;
  stream.reset();
  CKV_RETURN_IF_ERROR(client->Reconnect(client->call_timeout(), nullptr));
  const uint64_t boot_id = client->server_info().boot_id();
  if (boot_id != sequence.handle().boot_id()) {
    return Error(v1::STALE_BOOT_ID,
                 absl::StrCat("sequence ", sequence.handle().name(), ": the server was restarted: ",
                              "expected boot id ", sequence.handle().boot_id(), ", got ", boot_id));
  }
  std::lock_guard lock(mutex);
  while (!unacknowledged.empty()) {
    queue.push_front(std::move(unacknowledged.back()));
    unacknowledged.pop_back();
  }
  unacknowledged_bytes = 0;
  return absl::OkStatus();
}

PrefillWriter::PrefillWriter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PrefillWriter::~PrefillWriter() = default;

absl::StatusOr<std::unique_ptr<PrefillWriter>> PrefillWriter::Create(
    Client* client, const v1::Sequence& sequence, const PrefillWriterOptions& options) {
  const v1::KvShape& shape = sequence.shape();
  if (options.chunk_bytes < 1 || options.max_in_flight_bytes < 1) {
    return Error(v1::INVALID_FIELD,
                 absl::StrCat("chunk_bytes, max_in_flight_bytes: expected at least 1, got ",
                              options.chunk_bytes, ", ", options.max_in_flight_bytes));
  }
  if (shape.kv_heads() == 0 || shape.head_dim() == 0 || sequence.handle().name().empty()) {
    return Error(v1::INVALID_FIELD, "sequence: expected one that OpenSequence answered");
  }
  const auto type = shape.element_type() == v1::ELEMENT_TYPE_UNSPECIFIED
                        ? kernels::ElementType::kBFloat16
                        : static_cast<kernels::ElementType>(shape.element_type());
  auto impl = std::make_unique<Impl>(client, sequence, options);
  impl->row_bytes = int64_t{shape.kv_heads()} * shape.head_dim() * kernels::ElementBytes(type);
  const int64_t limit = client->server_info().max_chunk_bytes();
  impl->chunk_bytes = limit > 0 ? std::min(options.chunk_bytes, limit) : options.chunk_bytes;
  impl->thread = std::thread([raw = impl.get()] { raw->Run(); });
  return std::unique_ptr<PrefillWriter>(new PrefillWriter(std::move(impl)));
}

absl::Status PrefillWriter::Put(int64_t layer, int64_t first_token, int64_t tokens,
                                absl::Span<const std::byte> keys,
                                absl::Span<const std::byte> values,
                                absl::Span<const float> query_rms) {
  const KvRows rows = {layer, first_token, tokens, keys, values, query_rms};
  CKV_RETURN_IF_ERROR(impl_->CheckRows(rows));
  const int64_t bytes = static_cast<int64_t>(keys.size() + values.size());
  const int64_t bound = impl_->options.max_in_flight_bytes;
  if (bytes > bound) {
    return Error(v1::INVALID_FIELD, absl::StrCat("max_in_flight_bytes: ", bound,
                                                 " can never hold the ", bytes, " bytes of a Put"));
  }
  {
    std::lock_guard lock(impl_->mutex);
    CKV_RETURN_IF_ERROR(impl_->status);
    if (impl_->finishing) return absl::FailedPreconditionError("Put after Finish");
    if (impl_->in_flight_bytes + bytes > bound) {
      impl_->room_wanted = true;
      impl_->changed.notify_all();
      return Error(v1::LIMIT_EXCEEDED,
                   absl::StrCat("max_in_flight_bytes: ", impl_->in_flight_bytes, " of ", bound,
                                " are in flight, no room for ", bytes));
    }
    impl_->in_flight_bytes += bytes;
  }
  std::vector<v1::PutKvRequest> requests = CutIntoChunks(rows, impl_->chunk_bytes);
  std::lock_guard lock(impl_->mutex);
  std::move(requests.begin(), requests.end(), std::back_inserter(impl_->queue));
  impl_->changed.notify_all();
  return absl::OkStatus();
}

absl::Status PrefillWriter::PutWhenRoom(int64_t layer, int64_t first_token, int64_t tokens,
                                        absl::Span<const std::byte> keys,
                                        absl::Span<const std::byte> values,
                                        absl::Span<const float> query_rms) {
  while (true) {
    CKV_RETURN_IF_ERROR(WaitForRoom(static_cast<int64_t>(keys.size() + values.size())));
    absl::Status put = Put(layer, first_token, tokens, keys, values, query_rms);
    // Another thread may have been faster.
    if (ReasonOf(put) != v1::LIMIT_EXCEEDED) return put;
  }
}

absl::Status PrefillWriter::WaitForRoom(int64_t bytes) {
  if (bytes > impl_->options.max_in_flight_bytes) {
    return Error(v1::INVALID_FIELD,
                 absl::StrCat("max_in_flight_bytes: ", impl_->options.max_in_flight_bytes,
                              " can never hold ", bytes, " bytes"));
  }
  std::unique_lock lock(impl_->mutex);
  while (impl_->status.ok() && !impl_->done &&
         impl_->in_flight_bytes + bytes > impl_->options.max_in_flight_bytes) {
    impl_->room_wanted = true;
    impl_->changed.notify_all();
    impl_->changed.wait(lock);
  }
  return impl_->status;
}

absl::StatusOr<v1::Sequence> PrefillWriter::Finish() {
  {
    std::unique_lock lock(impl_->mutex);
    impl_->finishing = true;
    impl_->changed.notify_all();
    impl_->changed.wait(lock, [&] { return impl_->done; });
    CKV_RETURN_IF_ERROR(impl_->status);
  }
  const v1::SequenceHandle& handle = impl_->sequence.handle();
  auto sealed = impl_->client->SealSequence(handle, impl_->options.seal_timeout);
  if (sealed.ok() || !IsTransportFailure(sealed.status())) return sealed;
  // Idempotent: a restarted server refuses the handle's boot id.
  CKV_RETURN_IF_ERROR(impl_->client->Reconnect(impl_->client->call_timeout(), nullptr));
  return impl_->client->SealSequence(handle, impl_->options.seal_timeout);
}

absl::Status PrefillWriter::status() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->status;
}

int64_t PrefillWriter::bytes_sent() const { return impl_->bytes_sent; }

}  // namespace clusterkv::worker
