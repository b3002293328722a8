#include "kernels/hot_cache/hot_cache.h"

#include <xxhash.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace clusterkv::kernels {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 24;
constexpr int32_t kNone = -1;

int64_t TableSize(int64_t entries) {
  int64_t size = 8;
  while (size < 2 * entries) size *= 2;
  return size;
}

// Open addressing, linear probing, deletion by shifting back: key -> index of the key's owner. The
// keys themselves lie with the owner, so that a cell is 4 bytes.
class IndexTable {
 public:
  explicit IndexTable(int64_t entries) : cells_(TableSize(entries), kNone) {}

  template <typename KeyOf>
  int32_t Find(int32_t key, KeyOf key_of) const {
    for (size_t cell = Home(key);; cell = Next(cell)) {
      if (cells_[cell] == kNone || key_of(cells_[cell]) == key) return cells_[cell];
    }
  }
  // REQUIRES: key is not in the table.
  void Insert(int32_t key, int32_t index) {
    size_t cell = Home(key);
    while (cells_[cell] != kNone) cell = Next(cell);
    cells_[cell] = index;
  }
  // REQUIRES: key is in the table, and the keys of all owners can still be asked.
  template <typename KeyOf>
  void Erase(int32_t key, KeyOf key_of) {
    size_t hole = Home(key);
    while (key_of(cells_[hole]) != key) hole = Next(hole);
    for (size_t cell = Next(hole); cells_[cell] != kNone; cell = Next(cell)) {
      // The cell may fill the hole unless its home lies after the hole.
      const size_t mask = cells_.size() - 1;
      const size_t home = Home(key_of(cells_[cell]));
      if (((cell - home) & mask) >= ((cell - hole) & mask)) {
        cells_[hole] = cells_[cell];
        hole = cell;
      }
    }
    cells_[hole] = kNone;
  }
  void Clear() { std::fill(cells_.begin(), cells_.end(), kNone); }

 private:
  size_t Home(int32_t key) const {
    const uint64_t mixed = static_cast<uint32_t>(key) * uint64_t{0x9E3779B97F4A7C15};
    return (mixed >> 32) & (cells_.size() - 1);
  }
  size_t Next(size_t cell) const { return (cell + 1) & (cells_.size() - 1); }

  std::vector<int32_t> cells_;
};

// Doubly linked by index. A member's links lie with the member.
struct Links {
  int32_t prev = kNone, next = kNone;
};
struct List {
  int32_t head = kNone, tail = kNone;
};

template <typename Nodes>
void PushBack(List& list, Nodes& nodes, int32_t node) {
  nodes[node].links = {list.tail, kNone};
  (list.tail == kNone ? list.head : nodes[list.tail].links.next) = node;
  list.tail = node;
}

template <typename Nodes>
void Unlink(List& list, Nodes& nodes, int32_t node) {
  const Links links = nodes[node].links;
  (links.prev == kNone ? list.head : nodes[links.prev].links.next) = links.next;
  (links.next == kNone ? list.tail : nodes[links.next].links.prev) = links.prev;
}

// The token in slot i is entry i.
struct Entry {
  int32_t position = kNone;
  int32_t cluster = kNone;  // index into Impl::clusters; kClusterLru only
  Links links;              // in Impl::order, or in the cluster's members
  uint32_t last_step = 0;
  bool pinned = false;
};

struct ClusterNode {
  int32_t id = kNone;
  Links links;  // in Impl::order
  List members;
};

std::vector<int32_t> DescendingStack(int64_t size) {
  std::vector<int32_t> stack(size);
  for (int64_t i = 0; i < size; ++i) stack[i] = static_cast<int32_t>(size - 1 - i);
  return stack;
}

}  // namespace

struct HotCache::Impl {
  explicit Impl(const HotCacheParams& params)
      : params(params),
        entries(SlotCount(params)),
        by_position(SlotCount(params)),
        free_slots(DescendingStack(SlotCount(params))),
        clusters(ClusterCount(params)),
        by_cluster(ClusterCount(params)),
        free_clusters(DescendingStack(ClusterCount(params))),
        sorted(params.step_tokens) {
    departed.reserve(params.step_tokens);
  }

  static int64_t SlotCount(const HotCacheParams& params) {
    // Pinned capacity is min(capacity, step): pins fill at most the capacity, a step needs its own
    // slots.
    return std::max(params.capacity_tokens, params.step_tokens) +
           std::min(params.capacity_tokens, params.step_tokens);
  }
  static int64_t ClusterCount(const HotCacheParams& params) {
    return params.policy == HotCachePolicy::kClusterLru ? SlotCount(params) : 0;
  }

  auto PositionOf() const {
    return [this](int32_t slot) { return entries[slot].position; };
  }
  auto ClusterIdOf() const {
    return [this](int32_t node) { return clusters[node].id; };
  }
  int32_t Find(int32_t position) const { return by_position.Find(position, PositionOf()); }

  int32_t TakeSlot(int32_t position);
  void Forget(int32_t slot);
  void Leave(int32_t slot);
  void RecycleDeparted();

  absl::Status CheckStep(absl::Span<const int32_t> positions, absl::Span<const int32_t> cluster_ids,
                         size_t slots, size_t hits);
  void ResolveByToken(absl::Span<const int32_t> positions, absl::Span<int32_t> slots);
  void EvictTokens(int64_t coming);
  void ResolveByCluster(absl::Span<const int32_t> positions, absl::Span<const int32_t> cluster_ids,
                        absl::Span<int32_t> slots);
  void TouchCluster(int32_t slot, int32_t cluster_id);
  void EvictClusters();

  const HotCacheParams params;
  std::vector<Entry> entries;
  IndexTable by_position;
  std::vector<int32_t> free_slots;  // a stack; the lowest slots are on top at first
  // Slots of the last step's tokens that left at its end. Theirs until the next Resolve.
  std::vector<int32_t> departed;
  std::vector<ClusterNode> clusters;  // kClusterLru
  IndexTable by_cluster;
  std::vector<int32_t> free_clusters;
  List order;  // of entries or, under kClusterLru, of clusters; least recently used first
  std::vector<int32_t> sorted;  // scratch of CheckStep
  int64_t size = 0;
  int64_t pinned = 0;
  uint32_t step = 0;
};

int32_t HotCache::Impl::TakeSlot(int32_t position) {
  CKV_CHECK(!free_slots.empty()) << "hot cache out of slots";
  const int32_t slot = free_slots.back();
  free_slots.pop_back();
  entries[slot] = Entry();
  entries[slot].position = position;
  by_position.Insert(position, slot);
  ++size;
  return slot;
}

// The token is not resident any more; its slot is not yet free.
void HotCache::Impl::Forget(int32_t slot) {
  by_position.Erase(entries[slot].position, PositionOf());
  --size;
}

void HotCache::Impl::Leave(int32_t slot) {
  Forget(slot);
  (entries[slot].last_step == step ? departed : free_slots).push_back(slot);
}

void HotCache::Impl::RecycleDeparted() {
  free_slots.insert(free_slots.end(), departed.begin(), departed.end());
  departed.clear();
}

absl::Status HotCache::Impl::CheckStep(absl::Span<const int32_t> positions,
                                       absl::Span<const int32_t> cluster_ids, size_t slots,
                                       size_t hits) {
  const size_t n = positions.size();
  if (n > static_cast<size_t>(params.step_tokens)) {
    return absl::InvalidArgumentError(
        absl::StrCat("positions: at most step_tokens = ", params.step_tokens, ", got ", n));
  }
  const size_t cluster_count = params.policy == HotCachePolicy::kClusterLru ? n : 0;
  if (slots != n || hits != n || cluster_ids.size() != cluster_count) {
    return absl::InvalidArgumentError(absl::StrCat("slots, hits, clusters: expected ", n, ", ", n,
                                                   ", ", cluster_count, ", got ", slots, ", ", hits,
                                                   ", ", cluster_ids.size()));
  }
  if (n == 0) return absl::OkStatus();
  const int32_t* first = positions.data();
  if (std::adjacent_find(first, first + n, std::greater_equal<int32_t>()) != first + n) {
    std::copy_n(first, n, sorted.begin());
    std::sort(sorted.begin(), sorted.begin() + n);
    const auto twice = std::adjacent_find(sorted.begin(), sorted.begin() + n);
    if (twice != sorted.begin() + n) {
      return absl::InvalidArgumentError(absl::StrCat("positions: ", *twice, " is named twice"));
    }
    first = sorted.data();
  }
  if (*first < 0) {
    return absl::InvalidArgumentError(absl::StrCat("positions: at least 0, got ", *first));
  }
  const auto negative = std::find_if(cluster_ids.begin(), cluster_ids.end(),
                                     [](int32_t cluster) { return cluster < 0; });
  if (negative != cluster_ids.end()) {
    return absl::InvalidArgumentError(absl::StrCat("clusters: at least 0, got ", *negative));
  }
  return absl::OkStatus();
}

// Makes room before the misses take slots, so that max(capacity, step) slots are enough without
// pins: what the step does not touch leaves first anyway, as it is older than everything the step
// touches.
void HotCache::Impl::EvictTokens(int64_t coming) {
  const bool by_age = params.policy == HotCachePolicy::kLastSteps;
  for (int32_t slot = order.head; slot != kNone;) {
    const Entry& entry = entries[slot];
    const int32_t next = entry.links.next;
    const bool too_old = by_age && step - entry.last_step >= static_cast<uint32_t>(params.steps);
    if (!too_old && size + coming <= params.capacity_tokens) break;
    if (!entry.pinned && (entry.last_step != step || coming == 0)) {
      Unlink(order, entries, slot);
      Leave(slot);
    }
    slot = next;
  }
}

void HotCache::Impl::ResolveByToken(absl::Span<const int32_t> positions,
                                    absl::Span<int32_t> slots) {
  int64_t misses = 0;
  for (const int32_t slot : slots) {
    if (slot != kNone) {
      entries[slot].last_step = step;
    } else {
      ++misses;
    }
  }
  if (misses > 0) EvictTokens(misses);
  for (size_t i = 0; i < positions.size(); ++i) {
    if (slots[i] == kNone) {
      slots[i] = TakeSlot(positions[i]);
      entries[slots[i]].last_step = step;
    } else {
      Unlink(order, entries, slots[i]);
    }
    PushBack(order, entries, slots[i]);
  }
  EvictTokens(0);
}

// Makes the token's cluster the most recently used. A new token joins `cluster_id`; one that is
// resident stays where it is.
void HotCache::Impl::TouchCluster(int32_t slot, int32_t cluster_id) {
  int32_t node = entries[slot].cluster;
  const bool joins = node == kNone;
  if (joins) node = by_cluster.Find(cluster_id, ClusterIdOf());
  if (node == kNone) {
    CKV_CHECK(!free_clusters.empty()) << "hot cache out of clusters";
    node = free_clusters.back();
    free_clusters.pop_back();
    clusters[node] = ClusterNode();
    clusters[node].id = cluster_id;
    by_cluster.Insert(cluster_id, node);
  } else {
    Unlink(order, clusters, node);
  }
  PushBack(order, clusters, node);
  if (joins) {
    entries[slot].cluster = node;
    PushBack(clusters[node].members, entries, slot);
  }
}

void HotCache::Impl::EvictClusters() {
  for (int32_t node = order.head; node != kNone && size > params.capacity_tokens;) {
    ClusterNode& cluster = clusters[node];
    const int32_t next_cluster = cluster.links.next;
    for (int32_t slot = cluster.members.head; slot != kNone;) {
      const int32_t next = entries[slot].links.next;
      if (!entries[slot].pinned) {
        Unlink(cluster.members, entries, slot);
        Leave(slot);
      }
      slot = next;
    }
    if (cluster.members.head == kNone) {
      Unlink(order, clusters, node);
      by_cluster.Erase(cluster.id, ClusterIdOf());
      free_clusters.push_back(node);
    }
    node = next_cluster;
  }
}

void HotCache::Impl::ResolveByCluster(absl::Span<const int32_t> positions,
                                      absl::Span<const int32_t> cluster_ids,
                                      absl::Span<int32_t> slots) {
  for (size_t i = 0; i < positions.size(); ++i) {
    if (slots[i] == kNone) slots[i] = TakeSlot(positions[i]);
    entries[slots[i]].last_step = step;
    TouchCluster(slots[i], cluster_ids[i]);
  }
  EvictClusters();
}

absl::StatusOr<HotCache> HotCache::Create(const HotCacheParams& params) {
  if (params.capacity_tokens < 0 || params.capacity_tokens >= kMaxTokens) {
    return absl::InvalidArgumentError(absl::StrCat("capacity_tokens: expected [0, ", kMaxTokens,
                                                   "), got ", params.capacity_tokens));
  }
  if (params.step_tokens < 1 || params.step_tokens >= kMaxTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("step_tokens: expected [1, ", kMaxTokens, "), got ", params.step_tokens));
  }
  if (params.steps < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("steps: expected at least 1, got ", params.steps));
  }
  if (params.policy < HotCachePolicy::kTokenLru || params.policy > HotCachePolicy::kLastSteps) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy: unknown value ", static_cast<int>(params.policy)));
  }
  return HotCache(std::make_unique<Impl>(params));
}

HotCache::HotCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HotCache::HotCache(HotCache&&) noexcept = default;
HotCache& HotCache::operator=(HotCache&&) noexcept = default;
HotCache::~HotCache() = default;

int64_t HotCache::MemoryBytes(const HotCacheParams& params) {
  const int64_t slots = Impl::SlotCount(params);
  const int64_t clusters = Impl::ClusterCount(params);
  return sizeof(Impl) + slots * (sizeof(Entry) + sizeof(int32_t)) +
         clusters * (sizeof(ClusterNode) + sizeof(int32_t)) +
         (TableSize(slots) + TableSize(clusters) + 2 * params.step_tokens) * sizeof(int32_t);
}

int64_t HotCache::slot_count() const { return static_cast<int64_t>(impl_->entries.size()); }

absl::Status HotCache::Resolve(absl::Span<const int32_t> positions,
                               absl::Span<const int32_t> clusters, absl::Span<int32_t> slots,
                               absl::Span<uint8_t> hits) {
  Impl& impl = *impl_;
  if (absl::Status status = impl.CheckStep(positions, clusters, slots.size(), hits.size());
      !status.ok()) {
    return status;
  }
  impl.RecycleDeparted();
  ++impl.step;
  for (size_t i = 0; i < positions.size(); ++i) {
    slots[i] = impl.Find(positions[i]);
    hits[i] = slots[i] != kNone;
  }
  if (impl.params.policy == HotCachePolicy::kClusterLru) {
    impl.ResolveByCluster(positions, clusters, slots);
  } else {
    impl.ResolveByToken(positions, slots);
  }
  return absl::OkStatus();
}

absl::Status HotCache::Pin(int32_t position) {
  const int32_t slot = impl_->Find(position);
  if (slot == kNone) {
    return absl::NotFoundError(absl::StrCat("position ", position, " is not resident"));
  }
  Entry& entry = impl_->entries[slot];
  if (entry.pinned) return absl::OkStatus();
  if (impl_->pinned >= impl_->params.capacity_tokens) {
    return absl::ResourceExhaustedError(
        absl::StrCat("capacity_tokens = ", impl_->params.capacity_tokens, " tokens are pinned"));
  }
  entry.pinned = true;
  ++impl_->pinned;
  return absl::OkStatus();
}

absl::Status HotCache::Unpin(int32_t position) {
  const int32_t slot = impl_->Find(position);
  if (slot == kNone || !impl_->entries[slot].pinned) {
    return absl::NotFoundError(absl::StrCat("position ", position, " is not pinned"));
  }
  impl_->entries[slot].pinned = false;
  --impl_->pinned;
  return absl::OkStatus();
}

bool HotCache::Contains(int32_t position) const { return impl_->Find(position) != kNone; }

int64_t HotCache::size() const { return impl_->size; }

void HotCache::Clear() {
  // A fresh state, slots too, so that a mirror that is reset agrees with one that is new.
  Impl& impl = *impl_;
  impl.by_position.Clear();
  impl.by_cluster.Clear();
  impl.departed.clear();
  const auto refill = [](std::vector<int32_t>& stack, size_t count) {
    stack.resize(count);
    for (size_t i = 0; i < count; ++i) stack[i] = static_cast<int32_t>(count - 1 - i);
  };
  refill(impl.free_slots, impl.entries.size());
  refill(impl.free_clusters, impl.clusters.size());
  impl.order = List();
  impl.size = impl.pinned = 0;
  impl.step = 0;
}

uint64_t HotCache::Digest() const {
  const Impl& impl = *impl_;
  uint64_t digest = static_cast<uint64_t>(impl.size);
  const auto add = [&](int32_t slot) {
    const Entry& entry = impl.entries[slot];
    // Ages count where they decide who leaves; elsewhere the order says all.
    const uint32_t age =
        impl.params.policy == HotCachePolicy::kLastSteps ? impl.step - entry.last_step : 0;
    const uint32_t item[4] = {static_cast<uint32_t>(entry.position), static_cast<uint32_t>(slot),
                              age, entry.pinned};
    digest = XXH3_64bits_withSeed(item, sizeof(item), digest);
    return entry.links.next;
  };
  if (impl.params.policy != HotCachePolicy::kClusterLru) {
    for (int32_t slot = impl.order.head; slot != kNone;) slot = add(slot);
    return digest;
  }
  for (int32_t node = impl.order.head; node != kNone; node = impl.clusters[node].links.next) {
    digest = XXH3_64bits_withSeed(&impl.clusters[node].id, sizeof(int32_t), digest);
    for (int32_t slot = impl.clusters[node].members.head; slot != kNone;) slot = add(slot);
  }
  return digest;
}

}  // namespace clusterkv::kernels
