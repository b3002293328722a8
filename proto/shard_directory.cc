#include "proto/shard_directory.h"

#include <google/protobuf/util/json_util.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <map>
#include <random>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "etcd/rpc.grpc.pb.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "proto/placement.h"

namespace clusterkv {
namespace {

constexpr char kScheme[] = "etcd://";
constexpr absl::Duration kCallTimeout = absl::Seconds(5), kLeaveTimeout = absl::Seconds(1);
// Between attempts, the second twice as long as the first. Shards that lost the same etcd come back
// at different times.
constexpr absl::Duration kFirstPause = absl::Milliseconds(50), kLongestPause = absl::Seconds(2);
// How long an endpoint may take to connect before it is called all the same, and how often the
// waiting thread looks whether it is to end.
constexpr absl::Duration kConnectWait = absl::Seconds(2), kStopLook = absl::Milliseconds(100);
constexpr absl::Duration kShortestTtl = absl::Seconds(2);
// A connection that died in silence is noticed within 15 s; etcd takes pings every 5 s.
constexpr int kKeepaliveMs = 10'000, kKeepaliveTimeoutMs = 5'000;
constexpr int kFirstReconnectMs = 100, kLongestReconnectMs = 1'000, kConnectTimeoutMs = 5'000;

absl::Status ToStatus(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

std::shared_ptr<grpc::Channel> MakeChannel(
    const std::string& endpoint, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    grpc::ChannelArguments arguments) {
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // a watch may be silent for days
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kFirstReconnectMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kLongestReconnectMs);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kConnectTimeoutMs);
  return grpc::CreateCustomChannel(endpoint, credentials, arguments);
}

// What a thread needs to call etcd: an endpoint, pauses between attempts, and an end from outside.
class EtcdCaller {
 public:
  explicit EtcdCaller(std::vector<std::shared_ptr<grpc::Channel>> channels)
      : channels_(std::move(channels)) {}

  // The thread's own.
  const std::shared_ptr<grpc::Channel>& channel() const { return channels_[endpoint_]; }
  // Waits until the endpoint is connected, or a while; the call that follows says which. gRPC
  // connects while somebody waits: calls that fail at once would not bring it on.
  void AwaitConnection() const ABSL_LOCKS_EXCLUDED(mutex_);
  // After an attempt that failed: the next endpoint after a pause. False when Stop was called.
  bool TryNext() ABSL_LOCKS_EXCLUDED(mutex_) {
    endpoint_ = (endpoint_ + 1) % channels_.size();
    const double share = std::uniform_real_distribution<double>(0.5, 1)(random_);
    const absl::Duration pause = std::exchange(pause_, std::min(2 * pause_, kLongestPause));
    absl::MutexLock lock(&mutex_);
    return !mutex_.AwaitWithTimeout(absl::Condition(&stopped_), share * pause);
  }
  void Succeeded() { pause_ = kFirstPause; }

  // Between the two the call can be ended; at most one at a time.
  void Begin(grpc::ClientContext* context) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    context_ = context;
    if (stopped_) context->TryCancel();
  }
  void End() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    context_ = nullptr;
  }

  // Any thread's: ends the call under way and all later ones.
  void Stop() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    stopped_ = true;
    if (context_ != nullptr) context_->TryCancel();
  }
  bool stopped() const ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    return stopped_;
  }

 private:
  const std::vector<std::shared_ptr<grpc::Channel>> channels_;
  size_t endpoint_ = 0;
  absl::Duration pause_ = kFirstPause;
  std::mt19937 random_{std::random_device()()};
  mutable absl::Mutex mutex_;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

void EtcdCaller::AwaitConnection() const {
  const absl::Time limit = absl::Now() + kConnectWait;
  grpc_connectivity_state before = channel()->GetState(/*try_to_connect=*/true);
  while (!stopped() && absl::Now() < limit) {
    const grpc_connectivity_state now = channel()->GetState(/*try_to_connect=*/true);
    if (now == GRPC_CHANNEL_READY) return;
    const bool failed =
        now == GRPC_CHANNEL_TRANSIENT_FAILURE && before != GRPC_CHANNEL_TRANSIENT_FAILURE;
    if (failed && channels_.size() > 1) return;
    before = now;
    channel()->WaitForStateChange(now, absl::ToChronoTime(absl::Now() + kStopLook));
  }
}

// A call's context, ended with the caller.
class CallerContext {
 public:
  // timeout: infinite for a stream that stays.
  CallerContext(EtcdCaller* caller, absl::Duration timeout) : caller_(caller) {
    if (timeout != absl::InfiniteDuration()) {
      context_.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    }
    caller_->Begin(&context_);
  }
  ~CallerContext() { caller_->End(); }
  CallerContext(const CallerContext&) = delete;
  CallerContext& operator=(const CallerContext&) = delete;
  grpc::ClientContext* operator->() { return &context_; }
  grpc::ClientContext* get() { return &context_; }

 private:
  EtcdCaller* const caller_;
  grpc::ClientContext context_;
};

}  // namespace

bool IsEtcdPrefix(std::string_view prefix) {
  for (const auto word : absl::StrSplit(absl::string_view(prefix.data(), prefix.size()), '/')) {
    const std::string_view text(word.data(), word.size());
    if (!IsShardName(text) || text.find(':') != std::string_view::npos) return false;
  }
  return true;
}

bool IsEtcdTarget(std::string_view target) { return target.rfind(kScheme, 0) == 0; }

absl::StatusOr<EtcdOptions> ParseEtcdTarget(std::string_view target) {
  const auto wrong = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat("expected etcd://HOST:PORT,…/PREFIX, got \"", std::string(target), "\""));
  };
  if (!IsEtcdTarget(target)) return wrong();
  const std::string rest(target.substr(sizeof(kScheme) - 1));
  const size_t slash = rest.find('/');
  EtcdOptions options;
  for (const auto endpoint : absl::StrSplit(rest.substr(0, slash), ',')) {
    options.endpoints.emplace_back(endpoint);
    if (!IsShardAddress(options.endpoints.back())) return wrong();
  }
  if (slash != std::string::npos && slash + 1 < rest.size()) {
    options.prefix = rest.substr(slash + 1);
    if (options.prefix.back() == '/') options.prefix.pop_back();
  }
  if (!IsEtcdPrefix(options.prefix)) return wrong();
  return options;
}

struct ShardDirectory::Impl {
  Impl(const EtcdOptions& options, const std::vector<std::shared_ptr<grpc::Channel>>& channels)
      : log(options.log),
        first_key(absl::StrCat("/", options.prefix, "/")),
        end_key(absl::StrCat("/", options.prefix, "0")),  // '0' comes after '/'
        reader(channels),
        writer(channels) {}

  // --- the reader's thread
  void Read();
  // List, then watch until that ends. Errors: why it did; Aborted for a compaction.
  absl::Status Follow();
  absl::StatusOr<int64_t> List();
  absl::Status Watch(int64_t from_revision);
  void Take(const mvccpb::Event& event) ABSL_LOCKS_EXCLUDED(mutex);
  // The shard of an entry. Errors: InvalidArgument.
  absl::StatusOr<v1::Shard> Parse(const mvccpb::KeyValue* entry) const;
  void NoteConnected() ABSL_LOCKS_EXCLUDED(mutex);
  void NoteAway(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex);
  // What etcd says of the own entry as of `revision`; entry: null where there is none.
  void NoteOwn(int64_t revision, const v1::Shard* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);

  // --- the writer's
  void Write();
  // Waits for something to do. False: nothing any more.
  bool AwaitWork() ABSL_LOCKS_EXCLUDED(mutex);
  // Does it: a lease, the entry, or a sign of life.
  absl::Status Beat();
  absl::Status Grant();
  absl::Status Put(const v1::Shard& shard, int64_t lease_id);
  absl::Status KeepAlive(int64_t lease_id);
  void NoteLeaseLost(int64_t lease_id) ABSL_LOCKS_EXCLUDED(mutex);

  std::vector<v1::Shard> CurrentLocked() const ABSL_SHARED_LOCKS_REQUIRED(mutex);
  void Tell(bool is_fault, const std::string& event) const {
    if (log != nullptr) log(is_fault, event);
  }

  const std::function<void(bool, const std::string&)> log;
  const std::string first_key, end_key;
  EtcdCaller reader, writer;
  std::thread reader_thread, writer_thread;

  mutable absl::Mutex mutex;
  std::map<std::string, v1::Shard> list ABSL_GUARDED_BY(mutex);  // by name
  bool listed ABSL_GUARDED_BY(mutex) = false;                    // at least once
  State state ABSL_GUARDED_BY(mutex);
  v1::Shard self ABSL_GUARDED_BY(mutex);  // without name: there is none
  absl::Duration lease_ttl ABSL_GUARDED_BY(mutex);
  int64_t lease ABSL_GUARDED_BY(mutex) = 0;  // 0: none
  absl::Time lease_end ABSL_GUARDED_BY(mutex), next_beat ABSL_GUARDED_BY(mutex);
  bool unwritten ABSL_GUARDED_BY(mutex) = false;  // the entry is not as self says
  bool displaced ABSL_GUARDED_BY(mutex) = false;  // a younger process has the name
  int64_t put_revision ABSL_GUARDED_BY(mutex) = 0;
  bool leaving ABSL_GUARDED_BY(mutex) = false;
};

void ShardDirectory::Impl::Read() {
  while (true) {
    const absl::Status end = Follow();
    if (reader.stopped()) return;
    if (end.code() != absl::StatusCode::kAborted) NoteAway(end);
    if (!reader.TryNext()) return;
  }
}

absl::Status ShardDirectory::Impl::Follow() {
  CKV_ASSIGN_OR_RETURN(const int64_t revision, List());
  return Watch(revision + 1);
}

absl::StatusOr<int64_t> ShardDirectory::Impl::List() {
  reader.AwaitConnection();
  etcdserverpb::RangeRequest request;
  request.set_key(first_key);
  request.set_range_end(end_key);
  etcdserverpb::RangeResponse response;
  CallerContext context(&reader, kCallTimeout);
  CKV_RETURN_IF_ERROR(ToStatus(
      etcdserverpb::KV::NewStub(reader.channel())->Range(context.get(), request, &response)));
  std::map<std::string, v1::Shard> fresh;
  for (const mvccpb::KeyValue& entry : response.kvs()) {
    absl::StatusOr<v1::Shard> shard = Parse(&entry);
    if (!shard.ok()) {
      Tell(/*is_fault=*/true, std::string(shard.status().message()));
      continue;
    }
    const std::string name = shard->name();
    fresh[name] = *std::move(shard);
  }
  absl::MutexLock lock(&mutex);
  list = std::move(fresh);
  listed = true;
  const auto own = list.find(self.name());
  NoteOwn(response.header().revision(), own == list.end() ? nullptr : &own->second);
  return response.header().revision();
}

absl::Status ShardDirectory::Impl::Watch(int64_t from_revision) {
  CallerContext context(&reader, absl::InfiniteDuration());
  context->AddMetadata("hasleader", "true");  // a member that lost its leader ends the watch
  const auto stub = etcdserverpb::Watch::NewStub(reader.channel());
  const auto stream = stub->Watch(context.get());
  etcdserverpb::WatchRequest request;
  request.mutable_create_request()->set_key(first_key);
  request.mutable_create_request()->set_range_end(end_key);
  request.mutable_create_request()->set_start_revision(from_revision);
  stream->Write(request);  // what fails here Finish tells
  etcdserverpb::WatchResponse response;
  absl::Status ended;
  while (ended.ok() && stream->Read(&response)) {
    if (response.canceled()) {
      ended = response.compact_revision() > 0
                  ? absl::AbortedError("compacted")
                  : absl::UnavailableError("watch ended: " + response.cancel_reason());
      context->TryCancel();
      continue;
    }
    if (response.created()) NoteConnected();
    for (const mvccpb::Event& event : response.events()) Take(event);
  }
  const absl::Status finished = ToStatus(stream->Finish());
  if (!ended.ok()) return ended;
  return finished.ok() ? absl::UnavailableError("etcd ended the watch") : finished;
}

absl::StatusOr<v1::Shard> ShardDirectory::Impl::Parse(const mvccpb::KeyValue* entry) const {
  google::protobuf::util::JsonParseOptions newer;
  newer.ignore_unknown_fields = true;
  v1::Shard shard;
  const std::string& text = entry->value();
  const bool is_json = google::protobuf::util::JsonStringToMessage(text, &shard, newer).ok();
  if (!is_json || !IsShardName(shard.name()) || !IsShardAddress(shard.address()) ||
      entry->key() != first_key + shard.name()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "etcd: ", entry->key(), ": expected {\"name\": …, \"address\": \"host:port\"}, got ",
        text.substr(0, 200), "; not taken"));
  }
  return shard;
}

void ShardDirectory::Impl::Take(const mvccpb::Event& event) {
  const mvccpb::KeyValue& entry = event.kv();
  const std::string name = entry.key().substr(std::min(entry.key().size(), first_key.size()));
  absl::StatusOr<v1::Shard> shard = absl::NotFoundError("deleted");
  if (event.type() == mvccpb::Event::PUT) {
    shard = Parse(&entry);
    if (!shard.ok()) Tell(/*is_fault=*/true, std::string(shard.status().message()));
  }
  absl::MutexLock lock(&mutex);
  if (shard.ok()) {
    list[name] = *shard;
  } else {
    list.erase(name);
  }
  if (name == self.name()) NoteOwn(entry.mod_revision(), shard.ok() ? &*shard : nullptr);
}

void ShardDirectory::Impl::NoteConnected() {
  bool news = false;
  {
    absl::MutexLock lock(&mutex);
    news = !state.connected && state.reconnects > 0;
    state.connected = true;
    state.error.clear();
  }
  reader.Succeeded();
  if (news) Tell(/*is_fault=*/false, "etcd answers again");
}

void ShardDirectory::Impl::NoteAway(const absl::Status& why) {
  bool news = false;
  {
    absl::MutexLock lock(&mutex);
    news = state.connected;
    if (news) {
      state.away_since = absl::Now();
      ++state.reconnects;
    }
    state.connected = false;
    state.error = std::string(why.message());
  }
  if (news) {
    Tell(/*is_fault=*/true,
         absl::StrCat("etcd is away, the last list of shards stays: ", why.message()));
  }
}

void ShardDirectory::Impl::NoteOwn(int64_t revision, const v1::Shard* entry) {
  if (self.name().empty() || put_revision == 0 || leaving) return;
  if (entry == nullptr) {
    // An older answer than the put knows nothing of it.
    if (revision < put_revision) return;
    unwritten = true;
    displaced = false;
  } else if (entry->boot_id() == self.boot_id()) {
    displaced = false;
  } else if (revision > put_revision) {
    displaced = true;
  }
}

void ShardDirectory::Impl::Write() {
  bool told = false;
  while (AwaitWork()) {
    const absl::Status done = Beat();
    if (done.ok()) {
      writer.Succeeded();
      told = false;
      continue;
    }
    if (writer.stopped()) return;
    if (!std::exchange(told, true)) {
      Tell(/*is_fault=*/true,
           absl::StrCat("this shard's entry in etcd could not be kept: ", done.message()));
    }
    if (!writer.TryNext()) return;
  }
}

bool ShardDirectory::Impl::AwaitWork() {
  absl::MutexLock lock(&mutex);
  const auto work = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex) {
    return leaving || lease == 0 || (unwritten && !displaced);
  };
  mutex.AwaitWithDeadline(absl::Condition(&work), next_beat);
  return !leaving;
}

absl::Status ShardDirectory::Impl::Beat() {
  writer.AwaitConnection();
  bool without_lease = false;
  {
    absl::MutexLock lock(&mutex);
    without_lease = lease == 0;
  }
  if (without_lease) CKV_RETURN_IF_ERROR(Grant());
  v1::Shard shard;
  int64_t lease_id = 0;
  bool put = false;
  {
    absl::MutexLock lock(&mutex);
    shard = self;
    lease_id = lease;
    // Before the call: what changes meanwhile is written by the next one.
    put = !displaced && std::exchange(unwritten, false);
  }
  if (!put) return KeepAlive(lease_id);
  absl::Status status = Put(shard, lease_id);
  if (!status.ok()) {
    absl::MutexLock lock(&mutex);
    unwritten = true;
  }
  if (absl::IsNotFound(status)) NoteLeaseLost(lease_id);
  return status;
}

absl::Status ShardDirectory::Impl::Grant() {
  etcdserverpb::LeaseGrantRequest request;
  {
    absl::MutexLock lock(&mutex);
    request.set_ttl(absl::ToInt64Seconds(absl::Ceil(lease_ttl, absl::Seconds(1))));
  }
  etcdserverpb::LeaseGrantResponse response;
  const absl::Time begin = absl::Now();
  CallerContext context(&writer, kCallTimeout);
  CKV_RETURN_IF_ERROR(ToStatus(etcdserverpb::Lease::NewStub(writer.channel())
                                   ->LeaseGrant(context.get(), request, &response)));
  if (!response.error().empty()) return absl::InternalError(response.error());
  absl::MutexLock lock(&mutex);
  lease = response.id();
  lease_ttl = absl::Seconds(response.ttl());
  lease_end = begin + lease_ttl;
  next_beat = begin + lease_ttl / 3;
  unwritten = true;
  return absl::OkStatus();
}

absl::Status ShardDirectory::Impl::Put(const v1::Shard& shard, int64_t lease_id) {
  etcdserverpb::PutRequest request;
  request.set_key(first_key + shard.name());
  request.set_lease(lease_id);
  CKV_CHECK(google::protobuf::util::MessageToJsonString(shard, request.mutable_value()).ok());
  etcdserverpb::PutResponse response;
  CallerContext context(&writer, kCallTimeout);
  CKV_RETURN_IF_ERROR(ToStatus(
      etcdserverpb::KV::NewStub(writer.channel())->Put(context.get(), request, &response)));
  absl::MutexLock lock(&mutex);
  put_revision = response.header().revision();
  return absl::OkStatus();
}

// A stream of one message each time: it ends with its deadline, whatever etcd does.
absl::Status ShardDirectory::Impl::KeepAlive(int64_t lease_id) {
  etcdserverpb::LeaseKeepAliveRequest request;
  request.set_id(lease_id);
  etcdserverpb::LeaseKeepAliveResponse response;
  const absl::Time begin = absl::Now();
  {
    CallerContext context(&writer, kCallTimeout);
    const auto stub = etcdserverpb::Lease::NewStub(writer.channel());
    const auto stream = stub->LeaseKeepAlive(context.get());
    stream->Write(request);
    stream->WritesDone();
    const bool answered = stream->Read(&response);
    const absl::Status finished = ToStatus(stream->Finish());
    if (!answered) {
      return finished.ok() ? absl::UnavailableError("etcd ended the call") : finished;
    }
  }
  if (response.ttl() <= 0) {
    NoteLeaseLost(lease_id);
    return absl::OkStatus();
  }
  absl::MutexLock lock(&mutex);
  lease_end = begin + absl::Seconds(response.ttl());
  next_beat = begin + absl::Seconds(response.ttl()) / 3;
  return absl::OkStatus();
}

void ShardDirectory::Impl::NoteLeaseLost(int64_t lease_id) {
  {
    absl::MutexLock lock(&mutex);
    if (lease != lease_id) return;
    lease = 0;
    unwritten = true;
    ++state.lost_leases;
  }
  Tell(/*is_fault=*/true, "this shard's lease in etcd ended; taking a new one");
}

std::vector<v1::Shard> ShardDirectory::Impl::CurrentLocked() const {
  std::map<std::string, v1::Shard> shards = list;
  if (!self.name().empty() && !leaving) {
    v1::Shard& own = shards[self.name()];
    if (!displaced) own = self;
  }
  std::vector<v1::Shard> sorted;
  sorted.reserve(shards.size());
  for (auto& [name, shard] : shards) sorted.push_back(std::move(shard));
  return sorted;
}

ShardDirectory::ShardDirectory(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

ShardDirectory::~ShardDirectory() {
  Leave();
  impl_->reader.Stop();
  impl_->reader_thread.join();
}

absl::StatusOr<std::unique_ptr<ShardDirectory>> ShardDirectory::Open(const EtcdOptions& options,
                                                                     absl::Duration timeout) {
  if (options.endpoints.empty() || !IsEtcdPrefix(options.prefix)) {
    return absl::InvalidArgumentError("etcd: expected endpoints and a prefix such as clusterkv/a");
  }
  grpc::ChannelArguments arguments;
  CKV_ASSIGN_OR_RETURN(const auto credentials, MakeCredentials(options.tls, &arguments));
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (const std::string& endpoint : options.endpoints) {
    channels.push_back(MakeChannel(endpoint, credentials, arguments));
  }
  std::unique_ptr<ShardDirectory> directory(
      new ShardDirectory(std::make_unique<Impl>(options, channels)));
  Impl* const impl = directory->impl_.get();
  {
    absl::MutexLock lock(&impl->mutex);
    impl->state.away_since = absl::Now();
  }
  impl->reader_thread = std::thread([impl] { impl->Read(); });
  absl::MutexLock lock(&impl->mutex);
  if (impl->mutex.AwaitWithTimeout(absl::Condition(&impl->listed), timeout)) return directory;
  return absl::UnavailableError(absl::StrCat(
      "etcd at ", options.endpoints.front(), " gave no list of shards within ",
      absl::FormatDuration(timeout), impl->state.error.empty() ? "" : ": ", impl->state.error));
}

std::vector<v1::Shard> ShardDirectory::Current() const {
  absl::MutexLock lock(&impl_->mutex);
  return impl_->CurrentLocked();
}

bool ShardDirectory::Await(const std::function<bool(const std::vector<v1::Shard>&)>& wanted,
                           absl::Duration timeout) const {
  Impl& impl = *impl_;
  absl::MutexLock lock(&impl.mutex);
  const auto holds = [&]() ABSL_SHARED_LOCKS_REQUIRED(impl.mutex) {
    return wanted(impl.CurrentLocked());
  };
  return impl.mutex.AwaitWithTimeout(absl::Condition(&holds), timeout);
}

void ShardDirectory::Register(const v1::Shard& self, absl::Duration lease_ttl) {
  CKV_CHECK(IsShardName(self.name())) << self.name();
  {
    absl::MutexLock lock(&impl_->mutex);
    CKV_CHECK(impl_->self.name().empty()) << "registered twice";
    impl_->self = self;
    impl_->lease_ttl = std::max(lease_ttl, kShortestTtl);
    impl_->next_beat = absl::InfiniteFuture();
  }
  impl_->writer_thread = std::thread([impl = impl_.get()] { impl->Write(); });
}

void ShardDirectory::SetDraining() {
  absl::MutexLock lock(&impl_->mutex);
  if (impl_->self.name().empty() || impl_->self.draining()) return;
  impl_->self.set_draining(true);
  impl_->unwritten = true;
}

void ShardDirectory::Leave() {
  int64_t lease = 0;
  {
    absl::MutexLock lock(&impl_->mutex);
    if (impl_->self.name().empty() || std::exchange(impl_->leaving, true)) return;
  }
  impl_->writer.Stop();
  impl_->writer_thread.join();
  {
    absl::MutexLock lock(&impl_->mutex);
    lease = impl_->lease;
    impl_->lease = 0;
  }
  if (lease == 0) return;
  // The writer's own endpoint answered last.
  etcdserverpb::LeaseRevokeRequest request;
  request.set_id(lease);
  etcdserverpb::LeaseRevokeResponse response;
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + kLeaveTimeout));
  const absl::Status left = ToStatus(etcdserverpb::Lease::NewStub(impl_->writer.channel())
                                         ->LeaseRevoke(&context, request, &response));
  if (!left.ok() && !absl::IsNotFound(left)) {
    impl_->Tell(/*is_fault=*/true,
                absl::StrCat("this shard's entry in etcd ends with its lease: ", left.message()));
  }
}

ShardDirectory::State ShardDirectory::state() const {
  absl::MutexLock lock(&impl_->mutex);
  State state = impl_->state;
  state.registered = impl_->lease != 0 && impl_->put_revision != 0 && !impl_->displaced &&
                     !impl_->leaving && absl::Now() < impl_->lease_end;
  return state;
}

}  // namespace clusterkv
