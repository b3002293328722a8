#include "cache_service/shard_list.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

#include "cache_service/telemetry/log.h"
#include "kernels/base/status_macros.h"
#include "proto/placement.h"

namespace clusterkv::cache_service {
namespace {

constexpr size_t kMaxNameBytes = 253;

bool IsShardName(const std::string& name) {
  const bool letters = std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::strchr(".-_:", c) != nullptr;
  });
  return letters && !name.empty() && name.size() <= kMaxNameBytes;
}

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "";
}

}  // namespace

absl::StatusOr<std::unique_ptr<ShardList>> ShardList::Load(const std::string& file,
                                                           const std::string& own_name) {
  std::unique_ptr<ShardList> list(new ShardList(file, own_name.empty() ? HostName() : own_name));
  if (!IsShardName(list->own_name_)) {
    return absl::InvalidArgumentError(
        "shard_name: expected 1 to 253 of a-z, A-Z, 0-9 and .-_:, "
        "got \"" +
        list->own_name_ + "\"");
  }
  absl::MutexLock lock(&list->mutex_);
  list->stamp_ = list->Stamp();
  CKV_ASSIGN_OR_RETURN(list->shards_, list->Read());
  return list;
}

std::string ShardList::Stamp() const {
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

absl::StatusOr<std::vector<v1::Shard>> ShardList::Read() const {
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
    const size_t colon = shard.address().rfind(':');
    if (!whole || twice || !IsShardName(shard.name()) || colon == std::string::npos || colon == 0) {
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

std::vector<v1::Shard> ShardList::Current() {
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

std::optional<v1::Shard> ShardList::OtherOwner(std::string_view sequence,
                                               const std::vector<std::string>& without) {
  for (v1::Shard& shard : RankShards(sequence, Current())) {
    if (std::find(without.begin(), without.end(), shard.name()) != without.end()) continue;
    if (shard.name() == own_name_) return std::nullopt;
    return std::move(shard);
  }
  return std::nullopt;
}

}  // namespace clusterkv::cache_service
