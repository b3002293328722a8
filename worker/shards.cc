#include "worker/shards.h"

#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "proto/placement.h"
#include "proto/shard_directory.h"
#include "worker/transport_failure.h"

namespace clusterkv::worker {
namespace {

// How long a shard that does not answer is waited for before another is asked.
constexpr absl::Duration kConnectTimeout = absl::Seconds(2);
// How long one that did not is not asked again.
constexpr absl::Duration kAwayFor = absl::Seconds(5);

// One address to ask, and the name that its certificate has.
struct Seed {
  std::string name, target, host;
};

std::string AddressText(const addrinfo& address, const std::string& port) {
  char host[NI_MAXHOST] = {};
  if (getnameinfo(address.ai_addr, address.ai_addrlen, host, sizeof(host), nullptr, 0,
                  NI_NUMERICHOST) != 0) {
    return "";
  }
  const bool v6 = address.ai_family == AF_INET6;
  return v6 ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

// "host:port": each of the host's addresses. A name that does not resolve now is left out.
absl::StatusOr<std::vector<Seed>> Resolve(const std::string& text) {
  if (text.rfind("unix:", 0) == 0) return std::vector<Seed>{{text, text, ""}};
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == text.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("shards: expected HOST:PORT, comma-separated, got \"", text, "\""));
  }
  const std::string port = text.substr(colon + 1);
  std::string host = text.substr(0, colon);
  if (host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) return std::vector<Seed>{};
  std::set<std::string> addresses;
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    if (std::string address = AddressText(*one, port); !address.empty()) addresses.insert(address);
  }
  freeaddrinfo(found);
  // A name of one address stays as it was written: it is the shard's name where no other is known.
  if (addresses.size() == 1) return std::vector<Seed>{{text, text, ""}};
  std::vector<Seed> seeds;
  seeds.reserve(addresses.size());
  for (const std::string& address : addresses) seeds.push_back({address, address, host});
  return seeds;
}

absl::StatusOr<std::vector<Seed>> ResolveAll(const std::string& text) {
  std::vector<Seed> seeds;
  for (const auto part : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    CKV_ASSIGN_OR_RETURN(const std::vector<Seed> some, Resolve(std::string(part)));
    seeds.insert(seeds.end(), some.begin(), some.end());
  }
  return seeds;
}

// The shard cannot be used now; another may.
bool IsAway(const absl::Status& status) {
  return ReasonOf(status) == v1::DRAINING || IsTransportFailure(status);
}

bool Has(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string MetadataValue(const absl::Status& status, const char* key) {
  for (const auto& [name, value] : MetadataOf(status)) {
    if (name == key) return value;
  }
  return "";
}

}  // namespace

struct Shards::Impl {
  absl::StatusOr<std::vector<v1::Shard>> Ask(absl::Duration timeout) const;
  absl::StatusOr<v1::ServerInfo> AskOne(const Seed& seed, absl::Duration timeout) const;
  absl::StatusOr<Client*> ClientOf(const v1::Shard& shard);
  // The same, or one without session where the shard drains and takes none.
  absl::StatusOr<Client*> ReaderOf(const v1::Shard& shard);
  absl::StatusOr<Client*> ClientOf(const v1::Shard& shard, bool session,
                                   std::map<std::string, std::unique_ptr<Client>>* among);
  absl::StatusOr<v1::Sequence> OpenAt(const v1::Shard& shard, v1::OpenSequenceRequest* request,
                                      Client** client);
  absl::StatusOr<PlacedSequence> FindAmong(const std::vector<v1::Shard>& shards,
                                           const v1::SequenceHandle& handle);
  // The client of the process that gave the handle out; null: none is known.
  Client* GiverOf(const v1::SequenceHandle& handle) const;
  void MarkAway(const v1::Shard& shard) {
    std::lock_guard lock(mutex);
    away[shard.address()] = absl::Now() + kAwayFor;
  }
  std::vector<v1::Shard> Members() const {
    if (directory != nullptr) return directory->Current();
    std::lock_guard lock(mutex);
    return members;
  }

  absl::Status FollowEtcd();

  std::string seeds;
  ClientOptions options;
  std::unique_ptr<ShardDirectory> directory;  // null: the list is the shards' own
  mutable std::mutex mutex;
  std::vector<v1::Shard> members;                          // by name; guarded by mutex
  std::map<std::string, std::unique_ptr<Client>> clients;  // by address; guarded by mutex
  std::map<std::string, std::unique_ptr<Client>> readers;  // without session; guarded by mutex
  std::map<std::string, absl::Time> away;  // addresses not asked until then; guarded by mutex
};

absl::StatusOr<v1::ServerInfo> Shards::Impl::AskOne(const Seed& seed,
                                                    absl::Duration timeout) const {
  ClientOptions one = options;
  one.session = false;
  one.call_timeout = timeout;
  if (one.tls.enabled() && one.tls.server_name.empty()) one.tls.server_name = seed.host;
  CKV_ASSIGN_OR_RETURN(const auto client, Client::Connect(seed.target, one));
  return client->server_info();
}

// The list of the first that knows one. Without any, those that the seeds name, answering or not:
// a shard that is away for a while still owns what it owns.
absl::StatusOr<std::vector<v1::Shard>> Shards::Impl::Ask(absl::Duration timeout) const {
  CKV_ASSIGN_OR_RETURN(const std::vector<Seed> all, ResolveAll(seeds));
  absl::Status last = absl::UnavailableError(absl::StrCat("no shard at ", seeds));
  std::vector<v1::Shard> named;
  std::set<uint64_t> boot_ids;
  for (const Seed& seed : all) {
    v1::Shard shard;
    shard.set_name(seed.name);
    shard.set_address(seed.target);
    const bool written = seed.host.empty();
    if (written) named.push_back(shard);
    if (written && !boot_ids.empty()) continue;
    const absl::StatusOr<v1::ServerInfo> info = AskOne(seed, std::min(timeout, kConnectTimeout));
    if (!info.ok()) {
      last = info.status();
      if (!IsAway(last)) return last;
      continue;
    }
    if (info->shards_size() > 0) {
      return std::vector<v1::Shard>(info->shards().begin(), info->shards().end());
    }
    // Several addresses of one name may be one server's.
    if (boot_ids.insert(info->boot_id()).second && !written) named.push_back(shard);
  }
  if (boot_ids.empty()) return last;
  std::sort(named.begin(), named.end(),
            [](const v1::Shard& a, const v1::Shard& b) { return a.name() < b.name(); });
  return named;
}

absl::StatusOr<Client*> Shards::Impl::ClientOf(const v1::Shard& shard) {
  return ClientOf(shard, options.session, &clients);
}

absl::StatusOr<Client*> Shards::Impl::ReaderOf(const v1::Shard& shard) {
  absl::StatusOr<Client*> client = ClientOf(shard);
  if (client.ok() || ReasonOf(client.status()) != v1::DRAINING) return client;
  return ClientOf(shard, /*session=*/false, &readers);
}

absl::StatusOr<Client*> Shards::Impl::ClientOf(
    const v1::Shard& shard, bool session, std::map<std::string, std::unique_ptr<Client>>* among) {
  {
    std::lock_guard lock(mutex);
    const auto found = among->find(shard.address());
    if (found != among->end()) return found->second.get();
    const auto silent = away.find(shard.address());
    if (silent != away.end() && absl::Now() < silent->second) {
      return absl::UnavailableError(absl::StrCat(shard.address(), " did not answer just now"));
    }
  }
  ClientOptions own = options;
  own.open_here = false;
  own.session = session;
  own.connect_timeout = std::min(options.call_timeout, kConnectTimeout);
  auto client = Client::Connect(shard.address(), own);
  if (!client.ok()) {
    if (IsTransportFailure(client.status())) MarkAway(shard);
    return client.status();
  }
  std::lock_guard lock(mutex);
  // Another thread may have been first: its client is in use already.
  return among->try_emplace(shard.address(), *std::move(client)).first->second.get();
}

// A client that lost its server gets one more chance: a restarted shard is a good one.
absl::StatusOr<v1::Sequence> Shards::Impl::OpenAt(const v1::Shard& shard,
                                                  v1::OpenSequenceRequest* request,
                                                  Client** client) {
  CKV_ASSIGN_OR_RETURN(*client, ClientOf(shard));
  if (options.session) request->set_session_id((*client)->session_id());
  absl::StatusOr<v1::Sequence> opened = (*client)->OpenSequence(*request);
  const bool lost = !opened.ok() && (IsTransportFailure(opened.status()) ||
                                     ReasonOf(opened.status()) == v1::SESSION_NOT_FOUND);
  if (!lost) return opened;
  {
    std::lock_guard lock(mutex);
    const auto silent = away.find(shard.address());
    if (silent != away.end() && absl::Now() < silent->second) return opened;
  }
  if (absl::Status status = (*client)->Reconnect(kConnectTimeout, nullptr); !status.ok()) {
    MarkAway(shard);
    return status;
  }
  if (options.session) request->set_session_id((*client)->session_id());
  return (*client)->OpenSequence(*request);
}

Client* Shards::Impl::GiverOf(const v1::SequenceHandle& handle) const {
  if (handle.boot_id() == 0) return nullptr;
  std::lock_guard lock(mutex);
  for (const auto* among : {&clients, &readers}) {
    for (const auto& [address, client] : *among) {
      if (client->server_info().boot_id() == handle.boot_id()) return client.get();
    }
  }
  return nullptr;
}

absl::StatusOr<PlacedSequence> Shards::Impl::FindAmong(const std::vector<v1::Shard>& shards,
                                                       const v1::SequenceHandle& handle) {
  absl::Status answer =
      Error(v1::SEQUENCE_NOT_FOUND, absl::StrCat("no shard has a sequence named ", handle.name()),
            {{"sequence", handle.name()}});
  for (const v1::Shard& shard : RankShards(handle.name(), shards)) {
    const absl::StatusOr<Client*> client = ReaderOf(shard);
    absl::Status status = client.status();
    if (client.ok()) {
      absl::StatusOr<v1::Sequence> sequence = (*client)->GetSequence(handle);
      if (sequence.ok()) return PlacedSequence{*client, *std::move(sequence)};
      status = sequence.status();
    }
    const v1::ErrorReason reason = ReasonOf(status);
    if (reason == v1::SEQUENCE_NOT_FOUND || reason == v1::NOT_OWNER) continue;
    if (IsAway(status)) {
      answer = absl::UnavailableError(absl::StrCat("shard ", shard.name(), " at ", shard.address(),
                                                   " does not answer: ", status.message()));
    } else if (reason != v1::STALE_BOOT_ID && reason != v1::STALE_GENERATION) {
      return status;
    } else if (answer.code() != absl::StatusCode::kUnavailable) {
      answer = status;
    }
  }
  return answer;
}

absl::Status Shards::Impl::FollowEtcd() {
  const absl::Time deadline = absl::Now() + options.call_timeout;
  CKV_ASSIGN_OR_RETURN(EtcdOptions etcd, ParseEtcdTarget(seeds));
  etcd.tls = options.etcd_tls;
  CKV_ASSIGN_OR_RETURN(directory, ShardDirectory::Open(etcd, options.call_timeout));
  const auto any = [](const std::vector<v1::Shard>& shards) { return !shards.empty(); };
  if (directory->Await(any, deadline - absl::Now())) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("no shard is entered at ", seeds));
}

Shards::Shards(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Shards::~Shards() = default;

absl::StatusOr<std::unique_ptr<Shards>> Shards::Connect(const std::string& seeds,
                                                        const ClientOptions& options) {
  auto impl = std::make_unique<Impl>();
  impl->seeds = seeds;
  impl->options = options;
  if (IsEtcdTarget(seeds)) {
    CKV_RETURN_IF_ERROR(impl->FollowEtcd());
    return std::unique_ptr<Shards>(new Shards(std::move(impl)));
  }
  const absl::Time deadline = absl::Now() + options.call_timeout;
  while (true) {
    absl::StatusOr<std::vector<v1::Shard>> members = impl->Ask(deadline - absl::Now());
    if (members.ok()) {
      impl->members = *std::move(members);
      return std::unique_ptr<Shards>(new Shards(std::move(impl)));
    }
    constexpr absl::Duration kPause = absl::Milliseconds(50);
    if (!IsAway(members.status()) || absl::Now() + kPause >= deadline) return members.status();
    absl::SleepFor(kPause);
  }
}

std::vector<v1::Shard> Shards::members() const { return impl_->Members(); }

absl::Status Shards::Refresh() {
  if (impl_->directory != nullptr) return absl::OkStatus();
  CKV_ASSIGN_OR_RETURN(std::vector<v1::Shard> members, impl_->Ask(kConnectTimeout));
  std::lock_guard lock(impl_->mutex);
  impl_->members = std::move(members);
  return absl::OkStatus();
}

absl::StatusOr<PlacedSequence> Shards::OpenSequence(v1::OpenSequenceRequest request) {
  constexpr size_t kRedirects = 16;  // more than a list is ever behind
  std::vector<v1::Shard> known = members();
  std::vector<std::string> without;
  absl::Status last = absl::UnavailableError("no shard takes new sequences");
  v1::Shard redirected;  // to whom the last one sent us; without name: nobody did
  for (size_t attempts = 0; attempts < 2 * known.size() + kRedirects; ++attempts) {
    v1::Shard next = std::exchange(redirected, {});
    if (Has(without, next.name())) next.Clear();
    if (next.name().empty()) {
      for (v1::Shard& shard : RankShards(request.name(), known)) {
        if (Has(without, shard.name()) || shard.draining()) continue;
        next = std::move(shard);
        break;
      }
    }
    if (next.name().empty()) break;
    // A server may not have heard yet of one that drains.
    *request.mutable_without_shards() = {without.begin(), without.end()};
    for (const v1::Shard& shard : known) {
      if (shard.draining() && shard.name() != next.name())
        *request.add_without_shards() = shard.name();
    }
    Client* client = nullptr;
    absl::StatusOr<v1::Sequence> opened = impl_->OpenAt(next, &request, &client);
    if (opened.ok()) return PlacedSequence{client, *std::move(opened)};
    last = opened.status();
    if (ReasonOf(last) == v1::NOT_OWNER) {
      redirected.set_name(MetadataValue(last, "ownerShard"));
      redirected.set_address(MetadataValue(last, "ownerAddress"));
      // Our list or the shard's is old: the next call begins with a new one.
      if (Refresh().ok()) known = members();
    } else if (IsAway(last)) {
      without.push_back(next.name());
    } else {
      return last;
    }
  }
  return absl::UnavailableError(
      absl::StrCat("no shard takes sequence ", request.name(), ": ", last.message()));
}

absl::StatusOr<PlacedSequence> Shards::FindSequence(const v1::SequenceHandle& handle) {
  // Also where the shard is on its way out and in no list any more.
  if (Client* const giver = impl_->GiverOf(handle); giver != nullptr) {
    absl::StatusOr<v1::Sequence> sequence = giver->GetSequence(handle);
    if (sequence.ok()) return PlacedSequence{giver, *std::move(sequence)};
    if (ReasonOf(sequence.status()) != v1::STALE_BOOT_ID && !IsAway(sequence.status())) {
      return sequence.status();
    }
  }
  const std::vector<v1::Shard> known = members();
  absl::StatusOr<PlacedSequence> found = impl_->FindAmong(known, handle);
  if (found.ok() || !Refresh().ok()) return found;
  // Shards that were not known before; those that are no longer listed were asked.
  std::vector<v1::Shard> added = members();
  added.erase(std::remove_if(added.begin(), added.end(),
                             [&](const v1::Shard& shard) {
                               return std::any_of(known.begin(), known.end(), [&](const auto& old) {
                                 return old.name() == shard.name();
                               });
                             }),
              added.end());
  if (added.empty()) return found;
  absl::StatusOr<PlacedSequence> later = impl_->FindAmong(added, handle);
  return later.ok() ? later : found;
}

absl::Status Shards::ReleaseSequence(const v1::SequenceHandle& handle) {
  const absl::StatusOr<PlacedSequence> found = FindSequence(handle);
  if (found.ok()) return found->client->ReleaseSequence(found->sequence.handle());
  return ReasonOf(found.status()) == v1::SEQUENCE_NOT_FOUND ||
                 found.status().code() == absl::StatusCode::kFailedPrecondition
             ? absl::OkStatus()
             : found.status();
}

absl::StatusOr<std::vector<v1::Sequence>> Shards::ListSequences(const std::string& prefix) {
  std::vector<v1::Sequence> all;
  for (const v1::Shard& shard : members()) {
    CKV_ASSIGN_OR_RETURN(Client* const client, impl_->ReaderOf(shard));
    CKV_ASSIGN_OR_RETURN(std::vector<v1::Sequence> some, client->ListSequences(prefix));
    all.insert(all.end(), std::make_move_iterator(some.begin()),
               std::make_move_iterator(some.end()));
  }
  std::sort(all.begin(), all.end(), [](const v1::Sequence& a, const v1::Sequence& b) {
    return a.handle().name() < b.handle().name();
  });
  return all;
}

}  // namespace clusterkv::worker
