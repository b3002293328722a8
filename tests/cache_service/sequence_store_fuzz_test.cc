// A million operations on a store that is far too small for them, each compared with a model that
// is easy to believe: maps, bitsets and counters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bitset>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include "absl/time/clock.h"
#include "cache_service/sequence_store.h"
#include "tests/cache_service/shard_harness.h"
#include "tests/test_seed.h"

namespace clusterkv::cache_service {
namespace {

using Notice = v1::SessionResponse::Notice;

constexpr int64_t kMaxTokens = 64, kWindow = 8, kSinks = 4;
constexpr uint64_t kBootId = 77;

v1::KvShape TinyShape() {
  v1::KvShape shape;
  shape.set_layers(1);
  shape.set_kv_heads(1);
  shape.set_query_heads(1);
  shape.set_head_dim(16);
  shape.set_element_type(v1::ELEMENT_TYPE_BFLOAT16);
  return shape;
}

// What the store should hold under one name.
struct ModelSequence {
  uint64_t generation = 0;
  uint64_t session_id = 0;
  int64_t prompt = 0, limit = 0, end = 0;
  std::bitset<kMaxTokens> received;
  bool sealed = false;
  uint64_t last_use = 0;
  std::vector<SequenceRef> references;

  bool all_in() const { return static_cast<int64_t>(received.count()) == prompt; }
  bool ready() const { return all_in() && sealed; }
  bool evictable() const { return ready() && references.empty(); }
};

class StoreModel {
 public:
  explicit StoreModel(uint64_t seed) : random_(seed) {
    ShardOptions options;
    options.max_sequences = 6;
    options.max_sequence_tokens = 60;
    arena_ = Arena::Create(90 * 4096, 4096).value();
    executors_ = Executors::Create(1, 1, 1 << 20).value();
    store_ = std::make_unique<SequenceStore>(
        options, kBootId, arena_.get(), executors_.get(), /*device=*/nullptr, &counters_, &calls_,
        [this](const std::shared_ptr<Sequence>& sequence, Notice::Kind kind) {
          gone_.emplace_back(sequence->identity(), kind);
        });
  }
  ~StoreModel() {
    WaitIdle();
    executors_->Stop();
    model_.clear();
    store_->Clear(absl::CancelledError("the test is over"));
    executors_.reset();
    EXPECT_EQ(arena_->ledger().free, arena_->ledger().total);
    EXPECT_EQ(arena_->ledger().reserved, 0);
  }

  void Step() {
    const int64_t draw = Draw(400);
    if (draw < 100) return Find();
    if (draw < 170) return Put();
    if (draw < 260) return Append();
    if (draw < 296) return TakeOrDropReference();
    if (draw < 324) return Open();
    if (draw < 356) return Seal();
    if (draw < 376) return Fork();
    if (draw < 380) return Release();
    if (draw < 383) return Evict();
    if (draw < 399) return List();
    return EndSession();
  }

  void Check() {
    WaitIdle();
    ASSERT_THAT(arena_->Audit(), ::testing::IsEmpty());
    ASSERT_EQ(store_->size(), static_cast<int64_t>(model_.size()));
    int64_t pages = 0, reserved = 0;
    std::map<const void*, int64_t> blocks;  // forks share
    for (const auto& sequence : store_->All()) {
      reserved += sequence->reserved_pages();
      for (const auto& part : sequence->holdings().parts) {
        blocks[part.get()] = static_cast<int64_t>(part->block().pages().size());
      }
      for (const auto& rows : sequence->holdings().rows) blocks[rows.get()] = rows->page_count();
    }
    for (const auto& [block, size] : blocks) pages += size;
    const PageLedger ledger = arena_->ledger();
    ASSERT_EQ(ledger.total - ledger.free, pages);
    ASSERT_EQ(ledger.reserved, reserved);
  }

  int64_t evictions() const { return evictions_; }
  int64_t appended() const { return appended_; }
  int64_t forks() const { return forks_; }

 private:
  int64_t Draw(int64_t end) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(end)); }
  std::string AnyName() { return "n" + std::to_string(Draw(8)); }
  ModelSequence* Live(const std::string& name) {
    const auto it = model_.find(name);
    return it == model_.end() ? nullptr : &it->second;
  }
  void Touch(ModelSequence& sequence) { sequence.last_use = ++clock_; }
  void WaitIdle() {
    while (!executors_->Idle()) std::this_thread::yield();
  }

  // A live sequence through its handle, as a call would find it.
  std::optional<SequenceRef> Get(const std::string& name) {
    ModelSequence* model = Live(name);
    if (model == nullptr) return std::nullopt;
    Touch(*model);
    return store_->Find(Handle(name)).value();
  }

  // What left on the way to making room: READY, unreferenced, and the least recently used of such.
  void AcceptEvictions() {
    for (const auto& [identity, kind] : std::exchange(gone_, {})) {
      ASSERT_EQ(kind, Notice::SEQUENCE_EVICTED);
      ModelSequence* gone = Live(identity.name);
      ASSERT_NE(gone, nullptr);
      ASSERT_EQ(gone->generation, identity.generation);
      ASSERT_TRUE(gone->evictable()) << identity.name;
      for (const auto& [name, other] : model_) {
        if (!other.evictable()) continue;
        ASSERT_GE(other.last_use, gone->last_use) << name;
      }
      model_.erase(identity.name);
      ++evictions_;
    }
  }
  void ExpectGone(const std::string& name, Notice::Kind kind) {
    ASSERT_EQ(gone_.size(), 1u);
    ASSERT_EQ(gone_[0].first.name, name);
    ASSERT_EQ(gone_[0].second, kind);
    gone_.clear();
  }

  void Find() {
    v1::SequenceHandle handle = Handle(AnyName());
    const ModelSequence* model = Live(handle.name());
    const uint64_t live = model != nullptr ? model->generation : 0;
    const uint64_t generations[] = {0, live, live == 0 ? 1 : live - 1, live + 1};
    const uint64_t boot_ids[] = {0, kBootId, kBootId, kBootId + 1};
    handle.set_generation(generations[Draw(4)]);
    handle.set_boot_id(boot_ids[Draw(4)]);
    const absl::Status status = store_->Find(handle).status();
    if (handle.boot_id() > kBootId) {
      ASSERT_EQ(Reason(status), v1::STALE_BOOT_ID);
    } else if (model == nullptr) {
      ASSERT_EQ(Reason(status), v1::SEQUENCE_NOT_FOUND);
    } else if (handle.generation() != 0 && handle.generation() != live) {
      ASSERT_EQ(Reason(status), v1::STALE_GENERATION);
    } else {
      ASSERT_TRUE(status.ok()) << status;
      Touch(*Live(handle.name()));
    }
  }

  void Open() {
    const std::string name = AnyName();
    v1::OpenSequenceRequest request;
    request.set_name(name);
    *request.mutable_shape() = TinyShape();
    request.set_prompt_tokens(static_cast<uint32_t>(1 + Draw(40)));
    request.set_max_decode_tokens(static_cast<uint32_t>(Draw(21)));
    request.mutable_index()->set_sink_tokens(kSinks);
    request.mutable_index()->set_window_tokens(Draw(3) == 0 ? 0 : kWindow);
    request.set_session_id(static_cast<uint64_t>(std::max<int64_t>(Draw(8) - 4, 0)));
    const auto opened = store_->Open(request);
    ASSERT_NO_FATAL_FAILURE(AcceptEvictions());
    if (Live(name) != nullptr) {
      ASSERT_EQ(Reason(opened.status()), v1::SEQUENCE_EXISTS);
      return;
    }
    if (!opened.ok()) {
      // Refused only when even all that may leave is not enough.
      if (Reason(opened.status()) == v1::LIMIT_EXCEEDED) {
        ASSERT_GE(model_.size(), 6u);
      } else {
        ASSERT_EQ(Reason(opened.status()), v1::ARENA_FULL) << opened.status();
      }
      return;
    }
    ModelSequence model;
    model.generation = (*opened)->identity().generation;
    ASSERT_GT(model.generation, newest_generation_);
    newest_generation_ = model.generation;
    model.session_id = request.session_id();
    model.prompt = request.prompt_tokens();
    model.limit = model.prompt + request.max_decode_tokens();
    Touch(model);
    model_[name] = std::move(model);
  }

  void Put() {
    const std::string name = AnyName();
    const std::optional<SequenceRef> sequence = Get(name);
    if (!sequence.has_value()) return;
    ModelSequence& model = *Live(name);
    const int64_t first = Draw(2) == 0 ? 0 : Draw(model.prompt);
    const int64_t tokens = Draw(2) == 0 ? model.prompt - first : 1 + Draw(model.prompt - first);
    bool overlaps = false;
    for (int64_t t = first; t < first + tokens; ++t) overlaps |= model.received[t];
    // Other bytes only where something is there to conflict with.
    const bool conflicts = overlaps && Draw(4) == 0;
    const TestKv& kv = conflicts ? other_ : kv_;
    const absl::Status status = (*sequence)->PutChunk(kv.Chunk(0, first, tokens));
    if (conflicts) {
      ASSERT_EQ(Reason(status), v1::CHUNK_CONFLICT) << status;
      return;
    }
    if (!status.ok()) {  // staging is promised: what a sequence was opened for, it can do
      FAIL() << status;
    }
    const bool was_all_in = model.all_in();
    for (int64_t t = first; t < first + tokens; ++t) model.received.set(static_cast<size_t>(t));
    if (!was_all_in && model.all_in()) {
      model.end = model.prompt;
      WaitIdle();
    }
    ASSERT_NO_FATAL_FAILURE(AcceptEvictions());
  }

  void Seal() {
    const std::string name = AnyName();
    const std::optional<SequenceRef> sequence = Get(name);
    if (!sequence.has_value()) return;
    ModelSequence& model = *Live(name);
    int answers = 0;
    absl::Status status;
    (*sequence)->Seal(CallContext(), [&](absl::StatusOr<v1::Sequence> answer) {
      ++answers;
      status = answer.status();
    });
    ASSERT_EQ(answers, 1) << "all that came is clustered: nothing to wait for";
    if (model.all_in()) {
      ASSERT_TRUE(status.ok()) << status;
      model.sealed = true;
    } else {
      ASSERT_EQ(Reason(status), v1::CHUNKS_MISSING);
    }
  }

  void Append() {
    const std::string name = AnyName();
    const std::optional<SequenceRef> sequence = Get(name);
    if (!sequence.has_value()) return;
    ModelSequence& model = *Live(name);
    const int64_t around = std::max<int64_t>(model.end, model.prompt);
    const int64_t first = std::clamp<int64_t>(around - 3 + Draw(5), 0, kMaxTokens - 1);
    const int64_t tokens = std::min(1 + Draw(kWindow), kMaxTokens - first);
    const bool overlaps = first < model.end;
    const bool conflicts = overlaps && Draw(6) == 0;
    const v1::AppendKvRequest request =
        AppendRequest(name, conflicts ? other_ : kv_, first, tokens);
    const auto answer = (*sequence)->Append(request);
    ASSERT_NO_FATAL_FAILURE(AcceptEvictions());
    if (first + tokens > model.limit) {
      ASSERT_EQ(Reason(answer.status()), v1::TOKENS_OUT_OF_RANGE) << answer.status();
    } else if (!model.ready()) {
      ASSERT_EQ(Reason(answer.status()), v1::SEQUENCE_NOT_READY) << answer.status();
    } else if (first > model.end) {
      ASSERT_EQ(Reason(answer.status()), v1::APPEND_OUT_OF_ORDER) << answer.status();
    } else if (conflicts) {
      ASSERT_EQ(Reason(answer.status()), v1::CHUNK_CONFLICT) << answer.status();
    } else {
      ASSERT_TRUE(answer.ok()) << answer.status();
      appended_ += std::max<int64_t>(0, first + tokens - model.end);
      model.end = std::max(model.end, first + tokens);
      ASSERT_EQ(answer->layers(0).tokens(), model.end);
      WaitIdle();
    }
  }

  void Fork() {
    v1::ForkSequenceRequest request;
    request.mutable_source()->set_name(AnyName());
    request.set_name(AnyName());
    request.set_max_decode_tokens(static_cast<uint32_t>(Draw(10)));
    ModelSequence* source = Live(request.source().name());
    if (source != nullptr) Touch(*source);
    const auto fork = store_->Fork(request);
    if (source == nullptr) {
      ASSERT_EQ(Reason(fork.status()), v1::SEQUENCE_NOT_FOUND);
      return;
    }
    // While it was forked the source was in use: it did not leave.
    const ModelSequence copy = [&] {
      ModelSequence fields;
      fields.prompt = source->prompt;
      fields.end = source->end;
      fields.received = source->received;
      fields.sealed = source->sealed;
      return fields;
    }();
    const bool ready = source->ready();
    ASSERT_NO_FATAL_FAILURE(AcceptEvictions());
    ASSERT_NE(Live(request.source().name()), nullptr);
    if (!ready) {
      ASSERT_EQ(Reason(fork.status()), v1::SEQUENCE_NOT_READY) << fork.status();
      return;
    }
    if (copy.end + request.max_decode_tokens() > 60) {
      ASSERT_EQ(Reason(fork.status()), v1::LIMIT_EXCEEDED) << fork.status();
      return;
    }
    if (Live(request.name()) != nullptr) {
      ASSERT_EQ(Reason(fork.status()), v1::SEQUENCE_EXISTS) << fork.status();
      return;
    }
    if (!fork.ok()) {
      ASSERT_TRUE(Reason(fork.status()) == v1::ARENA_FULL ||
                  Reason(fork.status()) == v1::LIMIT_EXCEEDED)
          << fork.status();
      return;
    }
    ModelSequence model = copy;
    model.generation = (*fork)->identity().generation;
    ASSERT_GT(model.generation, newest_generation_);
    newest_generation_ = model.generation;
    model.limit = copy.end + request.max_decode_tokens();
    Touch(model);
    model_[request.name()] = std::move(model);
    ++forks_;
  }

  void Release() {
    const std::string name = AnyName();
    v1::SequenceHandle handle = Handle(name);
    ModelSequence* model = Live(name);
    const bool stale = Draw(3) == 0;
    if (stale) handle.set_generation(newest_generation_ + 1);
    ASSERT_TRUE(store_->Release(handle).ok());
    if (model == nullptr || stale) {
      ASSERT_TRUE(gone_.empty());
      return;
    }
    // Its references stay valid and answer RELEASED.
    for (const SequenceRef& reference : model->references) {
      ASSERT_EQ(reference->state(), v1::SEQUENCE_STATE_RELEASED);
      ASSERT_EQ(Reason(reference->PutChunk(kv_.Chunk(0, 0, 1))), v1::SEQUENCE_RELEASED);
    }
    model_.erase(name);
    ExpectGone(name, Notice::SEQUENCE_RELEASED);
  }

  void Evict() {
    const std::string name = AnyName();
    ModelSequence* model = Live(name);
    const bool force = Draw(2) == 0;
    if (model != nullptr) Touch(*model);
    const absl::Status status = store_->Evict(Handle(name), force);
    if (model == nullptr) {
      ASSERT_EQ(Reason(status), v1::SEQUENCE_NOT_FOUND);
    } else if (!force && !model->references.empty()) {
      ASSERT_EQ(Reason(status), v1::SEQUENCE_NOT_READY);
    } else {
      ASSERT_TRUE(status.ok()) << status;
      model_.erase(name);
      ExpectGone(name, Notice::SEQUENCE_EVICTED);
    }
  }

  void TakeOrDropReference() {
    const std::string name = AnyName();
    ModelSequence* model = Live(name);
    if (model == nullptr) return;
    if (Draw(3) == 0 && model->references.size() < 3) {
      model->references.push_back(*Get(name));
    } else if (!model->references.empty()) {
      model->references.pop_back();
    }
  }

  void List() {
    const std::string after = Draw(2) == 0 ? "" : AnyName();
    const int64_t limit = 1 + Draw(8);
    std::vector<std::string> expected, listed;
    for (const auto& [name, model] : model_) {
      if (name > after && static_cast<int64_t>(expected.size()) < limit) expected.push_back(name);
    }
    for (const auto& sequence : store_->List("n", after, limit)) {
      listed.push_back(sequence->identity().name);
      const ModelSequence& model = model_[listed.back()];
      ASSERT_EQ(sequence->state(), model.received.none() ? v1::SEQUENCE_STATE_OPEN
                                   : !model.all_in()     ? v1::SEQUENCE_STATE_FILLING
                                   : !model.sealed       ? v1::SEQUENCE_STATE_CLUSTERING
                                                         : v1::SEQUENCE_STATE_READY);
      ASSERT_EQ(sequence->tokens(),
                std::max(model.end, static_cast<int64_t>(model.received.count())));
    }
    ASSERT_EQ(listed, expected);
  }

  void EndSession() {
    const uint64_t session = static_cast<uint64_t>(1 + Draw(3));
    store_->EndSession(session);
    for (const auto& [identity, kind] : std::exchange(gone_, {})) {
      ASSERT_EQ(kind, Notice::SEQUENCE_RELEASED);
      const ModelSequence* gone = Live(identity.name);
      ASSERT_TRUE(gone != nullptr && gone->session_id == session && !gone->ready());
      model_.erase(identity.name);
    }
    // In the order of names, as the store goes through them: their leases begin.
    for (auto& [name, model] : model_) {
      if (model.session_id != session) continue;
      ASSERT_TRUE(model.ready()) << name;
      model.session_id = 0;
      Touch(model);
    }
  }

  std::mt19937_64 random_;
  const TestKv kv_ = MakeKv(TinyShape(), kMaxTokens, 1);
  const TestKv other_ = MakeKv(TinyShape(), kMaxTokens, 2);
  ShardCounters counters_;
  CallCounter calls_;
  std::unique_ptr<Arena> arena_;
  std::unique_ptr<Executors> executors_;
  std::vector<std::pair<SequenceIdentity, Notice::Kind>> gone_;
  std::unique_ptr<SequenceStore> store_;
  std::map<std::string, ModelSequence> model_;
  uint64_t clock_ = 0, newest_generation_ = 0;
  int64_t evictions_ = 0, appended_ = 0, forks_ = 0;
};

TEST(SequenceStoreFuzzTest, AMillionOperationsAgreeWithTheModel) {
  const uint64_t seed = TestSeed(20240607);
  StoreModel model(seed);
  for (int64_t i = 0; i < kFuzzOperations; ++i) {
    model.Step();
    if (i % 499 == 0) model.Check();
    if (::testing::Test::HasFatalFailure()) FAIL() << "operation " << i << ", seed " << seed;
  }
  model.Check();
  // The store was neither empty nor stuck.
  EXPECT_GT(model.evictions(), kFuzzOperations / 1000);
  EXPECT_GT(model.appended(), kFuzzOperations / 100);
  EXPECT_GT(model.forks(), kFuzzOperations / 1000);
  std::cout << model.evictions() << " evictions, " << model.appended() << " tokens appended, "
            << model.forks() << " forks\n";
}

}  // namespace
}  // namespace clusterkv::cache_service
