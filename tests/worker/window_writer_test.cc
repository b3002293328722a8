// WindowWriter over a ring in host memory, against a service that reads it as a server's GPU would.
#include "worker/window_writer.h"

#include <gmock/gmock.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/ingest/rows_hash.h"
#include "proto/error.h"
#include "proto/grpc_status.h"

namespace clusterkv::worker {
namespace {

constexpr int64_t kHeads = 2, kRow = 8, kToken = kHeads * kRow, kTokens = 50;
constexpr size_t kStatistics = kToken / 2;  // a number per channel, which has 2 bytes
constexpr int64_t kSlotBytes = 512;         // 16 tokens

class HostRing : public IngestRing {
 public:
  explicit HostRing(int slots) : memory_(static_cast<size_t>(slots * kSlotBytes)), hashes_(slots) {}

  int slots() const override { return static_cast<int>(hashes_.size()); }
  int64_t slot_bytes() const override { return kSlotBytes; }
  // What the service below makes of it.
  absl::StatusOr<std::string> Export() const override {
    const std::byte* const at = memory_.data();
    return std::string(reinterpret_cast<const char*>(&at), sizeof(at));
  }
  absl::Status Pack(int slot, const EngineRows& keys, const EngineRows& values,
                    EngineStream) override {
    for (const auto& [rows, half] : {std::pair(&keys, 0), std::pair(&values, 1)}) {
      std::byte* to = At(slot) + half * kSlotBytes / 2;
      for (int64_t t = 0; t < rows->tokens; ++t) {
        for (int64_t h = 0; h < rows->heads; ++h, to += rows->row_bytes) {
          std::memcpy(to,
                      static_cast<const std::byte*>(rows->data) + t * rows->token_stride_bytes +
                          h * rows->head_stride_bytes,
                      static_cast<size_t>(rows->row_bytes));
        }
      }
    }
    const auto bytes = static_cast<size_t>(keys.tokens * keys.heads * keys.row_bytes);
    hashes_[slot] = kernels::RowsHash(At(slot), At(slot) + kSlotBytes / 2, bytes);
    return absl::OkStatus();
  }
  absl::StatusOr<uint64_t> AwaitPacked(int slot) override { return hashes_[slot]; }
  absl::Status Read(int slot, int64_t bytes, std::byte* keys, std::byte* values) override {
    std::memcpy(keys, At(slot), static_cast<size_t>(bytes));
    std::memcpy(values, At(slot) + kSlotBytes / 2, static_cast<size_t>(bytes));
    return absl::OkStatus();
  }

 private:
  std::byte* At(int slot) { return memory_.data() + slot * kSlotBytes; }
  std::vector<std::byte> memory_;
  std::vector<uint64_t> hashes_;
};

// Keeps the rows that it was given, by token, and refuses what it is told to refuse.
class FakeService : public v1::CacheService::Service {
 public:
  FakeService() {
    grpc::ServerBuilder builder;
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeService() override { server_->Shutdown(); }

  std::unique_ptr<Client> Connect() {
    ClientOptions options;
    options.session = false;
    return Client::Connect(server_->InProcessChannel({}), options).value();
  }
  // Before anything is asked of it.
  bool maps = true;
  // The next PutWindow answers these, in order; then OK.
  void Refuse(std::vector<absl::Status> with) {
    const std::lock_guard<std::mutex> lock(mutex_);
    refusals_ = std::move(with);
  }
  // No PutWindow is answered while they are held.
  void Hold(bool held) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_ = held;
    changed_.notify_all();
  }
  // K and V of a token, as they came.
  std::map<int64_t, std::string> by_window() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return by_window_;
  }
  std::map<int64_t, std::string> by_chunks() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return by_chunks_;
  }

  grpc::Status GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                             v1::ServerInfo* info) override {
    info->set_boot_id(1);
    if (maps) info->add_links(v1::LINK_PEER);
    return grpc::Status::OK;
  }
  grpc::Status ConnectIngest(grpc::ServerContext*, const v1::ConnectIngestRequest* request,
                             v1::ConnectIngestResponse* response) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::memcpy(&window_, request->handle().data(), sizeof(window_));
    response->set_window_id(++window_id_);
    return grpc::Status::OK;
  }
  grpc::Status PutWindow(grpc::ServerContext*, const v1::PutWindowRequest* request,
                         v1::PutWindowResponse*) override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !held_; });
    if (!refusals_.empty()) {
      const absl::Status status = refusals_.front();
      refusals_.erase(refusals_.begin());
      return ToGrpcStatus(status);
    }
    const char* const keys = window_ + request->keys_offset();
    const char* const values = window_ + request->values_offset();
    EXPECT_EQ(request->window_id(), window_id_);
    EXPECT_EQ(request->checksum(),
              kernels::RowsHash(keys, values, request->tokens() * static_cast<size_t>(kToken)));
    EXPECT_EQ(request->statistics().query_rms().data().size(), kStatistics * sizeof(float));
    for (int64_t t = 0; t < int64_t{request->tokens()}; ++t) {
      by_window_[request->first_token() + t] =
          std::string(keys + t * kToken, kToken) + std::string(values + t * kToken, kToken);
    }
    return grpc::Status::OK;
  }
  grpc::Status PutKv(grpc::ServerContext*, grpc::ServerReader<v1::PutKvRequest>* reader,
                     v1::PutKvResponse*) override {
    v1::PutKvRequest request;
    while (reader->Read(&request)) {
      const v1::KvChunk& chunk = request.chunk();
      const std::lock_guard<std::mutex> lock(mutex_);
      for (int64_t t = 0; t < int64_t{chunk.tokens()}; ++t) {
        by_chunks_[chunk.first_token() + t] =
            chunk.keys().substr(static_cast<size_t>(t * kToken), kToken) +
            chunk.values().substr(static_cast<size_t>(t * kToken), kToken);
      }
    }
    return grpc::Status::OK;
  }
  grpc::Status SealSequence(grpc::ServerContext*, const v1::SealSequenceRequest*,
                            v1::Sequence*) override {
    return grpc::Status::OK;
  }

 private:
  std::unique_ptr<grpc::Server> server_;
  std::mutex mutex_;
  std::condition_variable changed_;
  const char* window_ = nullptr;
  uint64_t window_id_ = 0;
  bool held_ = false;
  std::vector<absl::Status> refusals_;
  std::map<int64_t, std::string> by_window_, by_chunks_;
};

class WindowWriterTest : public testing::Test {
 protected:
  WindowWriterTest() {
    sequence_.mutable_handle()->set_name("a");
    sequence_.mutable_handle()->set_boot_id(1);
    sequence_.mutable_shape()->set_layers(1);
    sequence_.mutable_shape()->set_kv_heads(kHeads);
    sequence_.mutable_shape()->set_head_dim(kRow / 2);
    sequence_.mutable_shape()->set_element_type(v1::ELEMENT_TYPE_BFLOAT16);
    sequence_.set_prompt_tokens(kTokens);
    for (int64_t i = 0; i < 2 * kTokens * kToken; ++i) rows_.push_back(static_cast<char>(i * 7));
  }

  void Open(int slots) {
    client_ = service_.Connect();
    otherwise_ = PrefillWriter::Create(client_.get(), sequence_).value();
    writer_ = std::make_unique<WindowWriter>(client_.get(),
                                             [slots] { return std::make_unique<HostRing>(slots); });
    writer_->Connect();
  }

  // K and V of each head apart, as they lie in rows_.
  WindowWriter::Rows AllRows() {
    WindowWriter::Rows rows;
    rows.sequence = &sequence_.handle();
    rows.keys = {rows_.data(), kTokens, kHeads, kRow, 2 * kRow, 2 * kTokens * kRow};
    rows.values = {rows_.data() + kRow, kTokens, kHeads, kRow, 2 * kRow, 2 * kTokens * kRow};
    rows.query_rms.assign(kStatistics, 1.0f);
    rows.otherwise = otherwise_.get();
    return rows;
  }
  std::string Token(int64_t token) const {
    std::string keys, values;
    for (int64_t h = 0; h < kHeads; ++h) {
      const auto at = static_cast<size_t>((h * kTokens + token) * 2 * kRow);
      keys += rows_.substr(at, kRow);
      values += rows_.substr(at + kRow, kRow);
    }
    return keys + values;
  }

  // Puts as much as the writer takes; returns what is left.
  int64_t PutAll(bool wait) {
    WindowWriter::Rows rows = AllRows();
    while (rows.keys.tokens > 0) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++pending_;
      }
      const auto taken =
          writer_->Put(rows, nullptr, wait, [this](const absl::Status& status) { Done(status); });
      EXPECT_TRUE(taken.ok()) << taken.status();
      if (!taken.ok() || *taken == 0) {
        Done(absl::OkStatus());
        break;
      }
      rows.Skip(*taken);
    }
    return rows.keys.tokens;
  }
  // How the pieces ended: the first failure.
  absl::Status Await() {
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return pending_ == 0; });
    return failure_;
  }

  FakeService service_;
  v1::Sequence sequence_;
  std::string rows_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<PrefillWriter> otherwise_;
  std::unique_ptr<WindowWriter> writer_;

 private:
  void Done(const absl::Status& status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_.Update(status);
    if (--pending_ == 0) idle_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable idle_;
  int64_t pending_ = 0;
  absl::Status failure_;
};

TEST_F(WindowWriterTest, RowsGoThroughSlotsThatAreUsedAgain) {
  Open(2);
  EXPECT_EQ(PutAll(/*wait=*/true), 0);
  EXPECT_TRUE(Await().ok());
  const auto got = service_.by_window();
  ASSERT_EQ(got.size(), kTokens);
  for (int64_t t = 0; t < kTokens; ++t) EXPECT_EQ(got.at(t), Token(t)) << t;
  EXPECT_EQ(writer_->counts().window_bytes, 2 * kTokens * kToken);
  EXPECT_EQ(writer_->counts().host_bytes, 0);
  EXPECT_TRUE(writer_->counts().fallbacks.empty());
}

TEST_F(WindowWriterTest, WithoutAFreeSlotRowsAreLeftToTheCaller) {
  Open(2);
  service_.Hold(true);
  EXPECT_EQ(PutAll(/*wait=*/false), kTokens - 2 * 16);
  service_.Hold(false);
  EXPECT_TRUE(Await().ok());
  EXPECT_EQ(service_.by_window().size(), 2u * 16);
  EXPECT_THAT(writer_->counts().fallbacks, testing::ElementsAre(testing::Pair("no free slot", 1)));
}

TEST_F(WindowWriterTest, ASlotThatCouldNotBeToldOfGoesThroughTheHost) {
  Open(1);
  service_.Refuse({Error(v1::WINDOW_NOT_FOUND, "gone")});
  EXPECT_EQ(PutAll(/*wait=*/true), kTokens - 16);  // the window is given up
  EXPECT_TRUE(Await().ok());
  EXPECT_TRUE(otherwise_->Finish().ok());
  const auto got = service_.by_chunks();
  ASSERT_EQ(got.size(), 16u);
  for (int64_t t = 0; t < 16; ++t) EXPECT_EQ(got.at(t), Token(t)) << t;
  EXPECT_EQ(writer_->counts().host_bytes, 2 * 16 * kToken);
  EXPECT_EQ(writer_->counts().fallbacks.at("gone"), 2);
  // Connected anew, it takes rows again.
  writer_->Connect();
  EXPECT_EQ(PutAll(/*wait=*/true), 0);
  EXPECT_TRUE(Await().ok());
  EXPECT_EQ(service_.by_window().size(), kTokens);
}

TEST_F(WindowWriterTest, ALostAnswerIsAskedForAgain) {
  Open(1);
  service_.Refuse({absl::UnavailableError("the connection broke")});
  EXPECT_EQ(PutAll(/*wait=*/true), 0);
  EXPECT_TRUE(Await().ok());
  EXPECT_EQ(service_.by_window().size(), kTokens);
  EXPECT_EQ(writer_->counts().host_bytes, 0);
}

TEST_F(WindowWriterTest, WhatIsWrongWithTheRowsIsToldAndNotSentOtherwise) {
  Open(4);
  service_.Refuse({Error(v1::NON_FINITE_KEY, "keys: token 3")});
  EXPECT_EQ(PutAll(/*wait=*/true), 0);
  EXPECT_EQ(ReasonOf(Await()), v1::NON_FINITE_KEY);
  EXPECT_TRUE(otherwise_->Finish().ok());
  EXPECT_TRUE(service_.by_chunks().empty());
}

TEST_F(WindowWriterTest, AServerThatMapsNothingIsNoError) {
  service_.maps = false;
  Open(2);
  EXPECT_EQ(PutAll(/*wait=*/true), kTokens);
  EXPECT_TRUE(Await().ok());
  EXPECT_EQ(writer_->counts().fallbacks.size(), 1u);
}

}  // namespace
}  // namespace clusterkv::worker
