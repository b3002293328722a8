#include "cache_service/shard_list.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/time/clock.h"
#include "cache_service/telemetry/log.h"
#include "kernels/base/status_macros.h"
#include "proto/placement.h"

namespace clusterkv::cache_service {
namespace {

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "";
}

// The name that was given, or the host's.
absl::StatusOr<std::string> OwnName(const std::string& given) {
  std::string name = given.empty() ? HostName() : given;
  if (IsShardName(name)) return name;
  return absl::InvalidArgumentError(
      "shard_name: expected 1 to 253 of a-z, A-Z, 0-9 and .-_:, got \"" + name + "\"");
}

class ShardFile : public ShardList {
 public:
  ShardFile(std::string file, std::string own_name)
      : ShardList(std::move(own_name)), file_(std::move(file)) {}

  absl::Status ReadFirst() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    stamp_ = Stamp();
    CKV_ASSIGN_OR_RETURN(shards_, Read());
    return absl::OkStatus();
  }
  std::vector<v1::Shard> Current() override ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  // Changes when the file is replaced or written.
  std::string Stamp() const;
  absl::StatusOr<std::vector<v1::Shard>> Read() const;

  const std::string file_;
  absl::Mutex mutex_;
  std::string stamp_ ABSL_GUARDED_BY(mutex_);
  std::vector<v1::Shard> shards_ ABSL_GUARDED_BY(mutex_);
};

std::string ShardFile::Stamp() const {
  struct stat status = {};
  if (stat(file_.c_str(), &status) != 0) return "";
  std::string stamp;
  for (const int64_t number :
       {int64_t{status.st_mtim.tv_sec}, int64_t{status.st_mtim.tv_nsec},
        static_cast<int64_t>(status.st_ino), static_cast<int64_t>(status.st_size)}) {
    stamp += std::to_string(number) + " ";
  }
  return stamp;
}

absl::StatusOr<std::vector<v1::Shard>> ShardFile::Read() const {
  errno = 0;
  std::ifstream in(file_);
  if (!in) {
    return absl::InvalidArgumentError("shards_file " + file_ + ": " +
                                      std::strerror(errno != 0 ? errno : EIO));
  }
  std::vector<v1::Shard> shards;
  int line_number = 0;
  for (std::string line; std::getline(in, line);) {
    ++line_number;
    std::istringstream words(line.substr(0, line.find('#')));
    v1::Shard shard;
    std::string rest;
    if (!(words >> *shard.mutable_name())) continue;
    const bool whole = static_cast<bool>(words >> *shard.mutable_address()) && !(words >> rest);
    const bool twice = std::any_of(shards.begin(), shards.end(), [&](const v1::Shard& other) {
      return other.name() == shard.name();
    });
    if (!whole || twice || !IsShardName(shard.name()) || !IsShardAddress(shard.address())) {
      return absl::InvalidArgumentError("shards_file " + file_ + ":" + std::to_string(line_number) +
                                        ": expected NAME HOST:PORT, each name once, got \"" + line +
                                        "\"");
    }
    shards.push_back(std::move(shard));
  }
  if (shards.empty()) {
    return absl::InvalidArgumentError("shards_file " + file_ + ": expected a line NAME HOST:PORT");
  }
  std::sort(shards.begin(), shards.end(),
            [](const v1::Shard& a, const v1::Shard& b) { return a.name() < b.name(); });
  return shards;
}

std::vector<v1::Shard> ShardFile::Current() {
  absl::MutexLock lock(&mutex_);
  std::string stamp = Stamp();
  if (stamp == stamp_) return shards_;
  absl::StatusOr<std::vector<v1::Shard>> shards = Read();
  // A file that was replaced while it was read is read once more the next time.
  stamp_ = Stamp() == stamp ? std::move(stamp) : std::string();
  if (!shards.ok()) {
    Log(LogLevel::kError, "shards not taken; the last good ones stay",
        {{"error", std::string(shards.status().message())}});
    return shards_;
  }
  shards_ = *std::move(shards);
  Log(LogLevel::kInfo, "shards", {{"count", static_cast<int64_t>(shards_.size())}});
  return shards_;
}

class EtcdShards : public ShardList {
 public:
  EtcdShards(std::string own_name, absl::Duration lease_ttl,
             std::unique_ptr<ShardDirectory> directory)
      : ShardList(std::move(own_name)), lease_ttl_(lease_ttl), directory_(std::move(directory)) {}

  std::vector<v1::Shard> Current() override { return directory_->Current(); }
  void Enter(const std::string& address, uint64_t boot_id) override {
    v1::Shard self;
    self.set_name(own_name());
    self.set_address(address);
    self.set_boot_id(boot_id);
    directory_->Register(self, lease_ttl_);
  }
  void SetDraining() override { directory_->SetDraining(); }
  void Leave() override { directory_->Leave(); }
  void AddTo(v1::Stats* stats) override {
    ShardList::AddTo(stats);
    const ShardDirectory::State state = directory_->state();
    v1::EtcdStats& etcd = *stats->mutable_etcd();
    etcd.set_connected(state.connected);
    etcd.set_registered(state.registered);
    etcd.set_reconnects(state.reconnects);
    etcd.set_lost_leases(state.lost_leases);
    if (state.connected) return;
    etcd.set_away_ms(
        static_cast<uint64_t>(absl::ToInt64Milliseconds(absl::Now() - state.away_since)));
    etcd.set_error(state.error);
  }

 private:
  const absl::Duration lease_ttl_;
  const std::unique_ptr<ShardDirectory> directory_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ShardList>> ShardList::Load(const std::string& file,
                                                           const std::string& own_name) {
  CKV_ASSIGN_OR_RETURN(std::string name, OwnName(own_name));
  auto list = std::make_unique<ShardFile>(file, std::move(name));
  CKV_RETURN_IF_ERROR(list->ReadFirst());
  return std::unique_ptr<ShardList>(std::move(list));
}

absl::StatusOr<std::unique_ptr<ShardList>> ShardList::Follow(EtcdOptions options,
                                                             const std::string& own_name,
                                                             absl::Duration lease_ttl,
                                                             absl::Duration timeout) {
  CKV_ASSIGN_OR_RETURN(std::string name, OwnName(own_name));
  options.log = [](bool is_fault, const std::string& event) {
    Log(is_fault ? LogLevel::kWarning : LogLevel::kInfo, event);
  };
  CKV_ASSIGN_OR_RETURN(auto directory, ShardDirectory::Open(options, timeout));
  return std::make_unique<EtcdShards>(std::move(name), lease_ttl, std::move(directory));
}

void ShardList::Enter(const std::string&, uint64_t) {}

void ShardList::AddTo(v1::Stats* stats) {
  stats->set_shards(static_cast<uint32_t>(Current().size()));
}

std::optional<v1::Shard> ShardList::OtherOwner(std::string_view sequence) {
  for (v1::Shard& shard : RankShards(sequence, Current())) {
    if (shard.name() == own_name_) return std::nullopt;
    return std::move(shard);
  }
  return std::nullopt;
}

std::optional<v1::Shard> ShardList::OtherTaker(std::string_view sequence,
                                               const std::vector<std::string>& without) {
  for (v1::Shard& shard : RankShards(sequence, Current())) {
    if (std::find(without.begin(), without.end(), shard.name()) != without.end()) continue;
    // What drains here the shard itself says, better than whom it names instead.
    if (shard.name() == own_name_) return std::nullopt;
    if (!shard.draining()) return std::move(shard);
  }
  return std::nullopt;
}

}  // namespace clusterkv::cache_service
