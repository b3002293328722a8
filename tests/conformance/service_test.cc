// The contract over every transport: the same answers in process, over TCP and over a Unix socket.
#define XXH_STATIC_LINKING_ONLY
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <atomic>
#include <map>
#include <set>
#include <thread>

#include "absl/time/clock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"
#include "tests/conformance/service_harness.h"

namespace clusterkv::cache_service::testing {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

class ServiceTest : public ::testing::TestWithParam<Transport> {
 protected:
  ServiceTest() : harness_(GetParam()) {}
  ~ServiceTest() override { EXPECT_EQ(harness_.LedgerProblems(), ""); }

  v1::SelectClustersRequest SelectRequest(const TestSequence& sequence, uint32_t layer,
                                          uint32_t step) {
    v1::SelectClustersRequest request;
    v1::SelectItem* item = request.add_items();
    item->mutable_sequence()->set_name(sequence.name);
    item->set_layer(layer);
    *item->mutable_queries() = sequence.QueryVector(step);
    request.set_want_state(true);
    request.set_request_id(step);
    return request;
  }

  v1::AttachResponse AttachTo(const v1::Sequence& sequence, uint32_t capacity_tokens) {
    v1::AttachRequest request;
    *request.mutable_sequence() = sequence.handle();
    request.mutable_hot_cache()->set_capacity_tokens(capacity_tokens);
    const auto attached = harness_.Attach(request);
    EXPECT_TRUE(attached.ok()) << attached.status();
    return attached.ok() ? *attached : v1::AttachResponse();
  }

  v1::SelectAndRecallRequest StepRequest(const TestSequence& sequence, uint64_t attachment,
                                         uint32_t step) {
    v1::SelectAndRecallRequest request;
    v1::SelectAndRecallItem* item = request.add_items();
    item->set_attachment_id(attachment);
    item->set_layer(0);
    *item->mutable_queries() = sequence.QueryVector(step);
    item->set_step(step);
    request.set_request_id(step);
    return request;
  }

  void Detach(uint64_t attachment) {
    v1::DetachRequest request;
    request.set_attachment_id(attachment);
    v1::DetachResponse response;
    EXPECT_TRUE(harness_.cache().Detach(MakeContext().get(), request, &response).ok());
  }

  v1::Stats Stats() {
    v1::Stats stats;
    EXPECT_TRUE(harness_.admin().GetStats(MakeContext().get(), {}, &stats).ok());
    return stats;
  }

  ServiceHarness harness_;
};

INSTANTIATE_TEST_SUITE_P(Transports, ServiceTest,
                         ::testing::Values(Transport::kInProcess, Transport::kTcp, Transport::kUnix,
                                           Transport::kTenant),
                         [](const auto& info) { return TransportName(info.param); });

// position -> record, of one head.
using Records = std::map<uint32_t, std::string>;

template <typename Chunks>
std::map<uint32_t, Records> ByHead(const Chunks& chunks) {
  std::map<uint32_t, Records> heads;
  for (const v1::RecordChunk& chunk : chunks) {
    EXPECT_EQ(chunk.checksum(), XXH3_64bits(chunk.records().data(), chunk.records().size()));
    EXPECT_LE(chunk.records().size(), 1u << 20);
    if (chunk.positions().empty()) continue;
    const size_t record_bytes = chunk.records().size() / chunk.positions().size();
    for (int i = 0; i < chunk.positions_size(); ++i) {
      heads[chunk.kv_head()][chunk.positions(i)] =
          chunk.records().substr(record_bytes * static_cast<size_t>(i), record_bytes);
    }
  }
  return heads;
}

TEST_P(ServiceTest, ASequenceLivesFromOpenToRelease) {
  const TestSequence sequence;
  const auto opened = harness_.Open(sequence.OpenRequest());
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_NE(opened->handle().generation(), 0u);
  EXPECT_NE(opened->handle().boot_id(), 0u);

  std::vector<v1::PutKvRequest> messages;
  for (uint32_t layer = 0; layer < sequence.layers; ++layer) {
    for (uint32_t token = 0; token < sequence.tokens; token += 60) {
      messages.push_back(sequence.Chunk(layer, token, 60));
    }
  }
  messages.push_back(messages[3]);  // a duplicate is fine
  const auto put = harness_.Put(messages);
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_EQ(put->chunks(), messages.size());
  EXPECT_THAT(put->complete_layers(), ElementsAre(0, 1));

  const auto sealed = harness_.Seal(opened->handle());
  ASSERT_TRUE(sealed.ok()) << sealed.status();
  EXPECT_EQ(sealed->state(), v1::SEQUENCE_STATE_READY);
  ASSERT_THAT(sealed->layers(), SizeIs(2));
  EXPECT_NE(sealed->layers(0).index_digest(), 0u);

  const auto selected = harness_.Select(SelectRequest(sequence, 1, 5));
  ASSERT_TRUE(selected.ok()) << selected.status();
  ASSERT_THAT(selected->results(), SizeIs(1));
  const v1::SelectResult& result = selected->results(0);
  EXPECT_FALSE(result.has_error()) << result.error().message();
  EXPECT_EQ(selected->request_id(), 5u);
  EXPECT_EQ(result.layer(), 1u);
  ASSERT_THAT(result.heads(), SizeIs(2));
  EXPECT_THAT(result.heads(0).exact_positions(), SizeIs(64 - 16));
  EXPECT_EQ(result.state().output().size(), 4 * 32 * 2u);
  EXPECT_EQ(result.state().log_sum_exp().size(), 4 * 4u);

  v1::AppendKvRequest append;
  *append.mutable_sequence() = opened->handle();
  append.set_first_token(sequence.tokens);
  append.set_tokens(3);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    v1::AppendKvRequest::Layer* rows = append.add_layers();
    rows->set_layer(layer);
    rows->set_keys(sequence.Keys(layer, sequence.tokens, 3));
    rows->set_values(sequence.Values(layer, sequence.tokens, 3));
  }
  const auto appended = harness_.Append(append);
  ASSERT_TRUE(appended.ok()) << appended.status();
  EXPECT_EQ(appended->layers(0).tokens(), sequence.tokens + 3);

  v1::ForkSequenceRequest fork;
  *fork.mutable_source() = opened->handle();
  fork.set_name("fork");
  fork.set_max_decode_tokens(8);
  v1::Sequence forked;
  ASSERT_TRUE(harness_.cache().ForkSequence(MakeContext().get(), fork, &forked).ok());
  EXPECT_TRUE(harness_.Release(opened->handle()).ok());
  TestSequence of_fork = sequence;
  of_fork.name = "fork";
  const auto from_fork = harness_.Select(SelectRequest(of_fork, 1, 5));
  ASSERT_TRUE(from_fork.ok()) << from_fork.status();
  EXPECT_EQ(from_fork->results(0).selection_digest(), result.selection_digest());
  EXPECT_EQ(from_fork->results(0).state().output(), result.state().output());
  EXPECT_TRUE(harness_.Release(forked.handle()).ok());
  EXPECT_TRUE(harness_.Release(forked.handle()).ok()) << "releasing twice is fine";
  EXPECT_EQ(Stats().sequences(), 0u);
}

TEST_P(ServiceTest, CorrectionsComeWithTheStateUnderCodecsThatHaveThem) {
  TestSequence sequence;
  harness_.MakeReady(sequence);
  EXPECT_FALSE(harness_.Select(SelectRequest(sequence, 0, 1))->results(0).has_correction());

  sequence.name = "coarse";
  sequence.codec = "k8v4";
  harness_.MakeReady(sequence);
  v1::SelectClustersRequest request = SelectRequest(sequence, 0, 1);
  const auto with = harness_.Select(request);
  ASSERT_TRUE(with.ok()) << with.status();
  EXPECT_EQ(with->results(0).correction().codes().size(), 4 * 32u);
  EXPECT_EQ(with->results(0).correction().log_scale().size(), 4 * 4u);
  EXPECT_GE(Stats().state_bytes(), 4u * (32u + 4u));
  request.set_want_state(false);
  EXPECT_FALSE(harness_.Select(request)->results(0).has_correction());
}

TEST_P(ServiceTest, TheShorthandSelectsLikeAnItemAndTellsErrorsAsItsOwn) {
  const TestSequence sequence;
  harness_.MakeReady(sequence);
  v1::SelectClustersRequest shorthand;
  shorthand.set_sequence(sequence.name);
  shorthand.set_layer(1);
  for (const float number : sequence.Queries(7)) shorthand.mutable_queries()->add_values(number);
  shorthand.set_want_state(true);
  const auto by_shorthand = harness_.Select(shorthand);
  const auto by_item = harness_.Select(SelectRequest(sequence, 1, 7));
  ASSERT_TRUE(by_shorthand.ok()) << by_shorthand.status();
  ASSERT_TRUE(by_item.ok()) << by_item.status();
  EXPECT_EQ(by_shorthand->results(0).SerializeAsString(), by_item->results(0).SerializeAsString());

  shorthand.set_layer(9);
  const auto wrong = harness_.Select(shorthand);
  EXPECT_EQ(ReasonOf(wrong.status()), v1::LAYER_OUT_OF_RANGE) << wrong.status();
}

TEST_P(ServiceTest, AWrongItemDoesNotHarmTheOthersOfItsBatch) {
  const TestSequence sequence;
  harness_.MakeReady(sequence);
  v1::SelectClustersRequest request = SelectRequest(sequence, 0, 1);
  request.mutable_items()->Add()->CopyFrom(request.items(0));
  request.mutable_items()->Add()->CopyFrom(request.items(0));
  request.mutable_items(1)->mutable_queries()->set_data("abc");
  request.mutable_items(2)->mutable_sequence()->set_name("nobody");
  request.mutable_items()->Add()->CopyFrom(request.items(0));
  const auto response = harness_.Select(request);
  ASSERT_TRUE(response.ok()) << response.status();
  ASSERT_THAT(response->results(), SizeIs(4));
  EXPECT_FALSE(response->results(0).has_error());
  EXPECT_EQ(ReasonOf(FromRpcStatus(response->results(1).error())), v1::SHAPE_MISMATCH);
  EXPECT_THAT(response->results(1).error().message(), HasSubstr("items[1].queries"));
  EXPECT_EQ(ReasonOf(FromRpcStatus(response->results(2).error())), v1::SEQUENCE_NOT_FOUND);
  EXPECT_EQ(response->results(3).SerializeAsString(), response->results(0).SerializeAsString());
}

TEST_P(ServiceTest, AStreamAnswersPipelinedSelectsInOrderAndAsUnaryCallsDo) {
  const TestSequence sequence;
  harness_.MakeReady(sequence);
  constexpr uint32_t kRequests = 200;  // more than may be outstanding
  const auto context = MakeContext();
  const auto stream = harness_.cache().StreamSelect(context.get());
  std::thread writer([&] {
    for (uint32_t step = 0; step < kRequests; ++step) {
      ASSERT_TRUE(stream->Write(SelectRequest(sequence, step % 2, step)));
    }
    stream->WritesDone();
  });
  std::vector<v1::SelectClustersResponse> answers;
  v1::SelectClustersResponse response;
  while (stream->Read(&response)) answers.push_back(response);
  writer.join();
  EXPECT_TRUE(stream->Finish().ok());
  ASSERT_THAT(answers, SizeIs(kRequests));
  for (uint32_t step = 0; step < kRequests; ++step) {
    EXPECT_EQ(answers[step].request_id(), step);
    if (step % 20 != 0) continue;
    const auto unary = harness_.Select(SelectRequest(sequence, step % 2, step));
    EXPECT_EQ(answers[step].results(0).SerializeAsString(), unary->results(0).SerializeAsString());
  }
}

TEST_P(ServiceTest, AWrongRequestEndsTheStreamAfterTheAnswersBeforeIt) {
  const TestSequence sequence;
  harness_.MakeReady(sequence);
  const auto context = MakeContext();
  const auto stream = harness_.cache().StreamSelect(context.get());
  ASSERT_TRUE(stream->Write(SelectRequest(sequence, 0, 1)));
  ASSERT_TRUE(stream->Write(SelectRequest(sequence, 1, 2)));
  stream->Write({});
  stream->WritesDone();
  v1::SelectClustersResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.request_id(), 1u);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.request_id(), 2u);
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(ReasonOf(FromGrpcStatus(stream->Finish())), v1::INVALID_FIELD);
}

TEST_P(ServiceTest, SelectAndRecallSendsOnlyWhatTheHotCacheLacks) {
  const TestSequence sequence;
  const v1::Sequence ready = harness_.MakeReady(sequence);
  const v1::AttachResponse attached = AttachTo(ready, 256);
  EXPECT_EQ(attached.link(), v1::LINK_GRPC);
  EXPECT_EQ(attached.link_reason(), "");
  const auto first = harness_.SelectAndRecall(StepRequest(sequence, attached.attachment_id(), 0));
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_THAT(*first, SizeIs(1));
  EXPECT_TRUE((*first)[0].last());
  const v1::SelectResult& result = (*first)[0].selection().results(0);
  ASSERT_FALSE(result.has_error()) << result.error().message();
  const auto sent = ByHead((*first)[0].records());

  v1::RecallClustersRequest recall;
  *recall.mutable_sequence() = ready.handle();
  for (uint32_t head = 0; head < 2; ++head) {
    v1::RecallClustersRequest::Head* wanted = recall.add_heads();
    wanted->set_kv_head(head);
    *wanted->mutable_positions() = result.heads(static_cast<int>(head)).exact_positions();
  }
  const auto by_name = harness_.Recall(recall);
  ASSERT_TRUE(by_name.ok()) << by_name.status();
  EXPECT_EQ(ByHead(*by_name), sent);
  for (const auto& [position, record] : sent.at(1)) {  // raw: the bytes as they came
    const size_t head_bytes = 32 * 4;
    EXPECT_EQ(record, sequence.Keys(0, position, 1).substr(head_bytes, head_bytes) +
                          sequence.Values(0, position, 1).substr(head_bytes, head_bytes));
  }

  v1::SelectAndRecallRequest again = StepRequest(sequence, attached.attachment_id(), 0);
  again.mutable_items(0)->set_step(1);
  const auto second = harness_.SelectAndRecall(again);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_THAT((*second)[0].records(), IsEmpty()) << "the same tokens are there already";
  EXPECT_EQ((*second)[0].selection().results(0).selection_digest(), result.selection_digest());
  Detach(attached.attachment_id());
}

TEST_P(ServiceTest, RecordsBeyondOneMessageFollowInTheNextOnes) {
  TestSequence sequence;
  sequence.tokens = 5000;
  sequence.layers = 1;
  sequence.head_dim = 64;
  const v1::Sequence ready = harness_.MakeReady(sequence);
  v1::AttachRequest request;
  *request.mutable_sequence() = ready.handle();
  request.mutable_select()->set_budget_tokens(5000);  // everything is exact
  const auto attached = harness_.Attach(request);
  ASSERT_TRUE(attached.ok()) << attached.status();
  const auto messages =
      harness_.SelectAndRecall(StepRequest(sequence, attached->attachment_id(), 0));
  ASSERT_TRUE(messages.ok()) << messages.status();
  // 2 heads * 4984 tokens * 512 bytes.
  EXPECT_GE(messages->size(), 5u);
  std::map<uint32_t, Records> all;
  for (size_t i = 0; i < messages->size(); ++i) {
    EXPECT_EQ((*messages)[i].last(), i + 1 == messages->size());
    EXPECT_EQ((*messages)[i].has_selection(), i == 0);
    for (auto& [head, records] : ByHead((*messages)[i].records())) {
      all[head].insert(records.begin(), records.end());
    }
  }
  EXPECT_THAT(all[0], SizeIs(5000 - 16));
  EXPECT_THAT(all[1], SizeIs(5000 - 16));

  const auto context = MakeContext();
  const auto stream = harness_.cache().StreamSelectAndRecall(context.get());
  v1::SelectAndRecallRequest step = StepRequest(sequence, attached->attachment_id(), 1);
  step.mutable_items(0)->set_reset_residency(true);
  ASSERT_TRUE(stream->Write(step));
  std::map<uint32_t, Records> streamed;
  v1::SelectAndRecallResponse response;
  do {
    ASSERT_TRUE(stream->Read(&response));
    EXPECT_EQ(response.request_id(), 1u);
    for (auto& [head, records] : ByHead(response.records())) {
      streamed[head].insert(records.begin(), records.end());
    }
  } while (!response.last());
  stream->WritesDone();
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(streamed, all);
  Detach(attached->attachment_id());
}

TEST_P(ServiceTest, TheSteadyZoneIsSinksAndWindowAsTheyCame) {
  const TestSequence sequence;
  const v1::Sequence ready = harness_.MakeReady(sequence);
  v1::AppendKvRequest append;
  *append.mutable_sequence() = ready.handle();
  append.set_first_token(sequence.tokens);
  append.set_tokens(2);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    v1::AppendKvRequest::Layer* rows = append.add_layers();
    rows->set_layer(layer);
    rows->set_keys(sequence.Keys(layer, sequence.tokens, 2));
    rows->set_values(sequence.Values(layer, sequence.tokens, 2));
  }
  ASSERT_TRUE(harness_.Append(append).ok());
  v1::RecallClustersRequest request;
  *request.mutable_sequence() = ready.handle();
  request.set_steady_zone(true);
  request.add_layers(0);
  request.add_layers(1);
  const auto chunks = harness_.Recall(request);
  ASSERT_TRUE(chunks.ok()) << chunks.status();
  int heads = 0;
  for (const v1::RecordChunk& chunk : *chunks) {
    ++heads;
    const auto zone = ByHead(std::vector<v1::RecordChunk>{chunk});
    const Records& records = zone.begin()->second;
    ASSERT_THAT(records, SizeIs(16 + 2));
    const size_t head_bytes = 32 * 4, offset = chunk.kv_head() * head_bytes;
    for (const auto& [position, record] : records) {
      EXPECT_EQ(record, sequence.Keys(chunk.layer(), position, 1).substr(offset, head_bytes) +
                            sequence.Values(chunk.layer(), position, 1).substr(offset, head_bytes));
    }
  }
  EXPECT_EQ(heads, 4);
}

TEST_P(ServiceTest, TheIndexHoldsEveryClusteredTokenOnce) {
  TestSequence sequence;
  sequence.tokens = 6000;  // more than one message of centroids
  sequence.layers = 1;
  const v1::Sequence ready = harness_.MakeReady(sequence);
  v1::GetIndexRequest request;
  *request.mutable_sequence() = ready.handle();
  request.set_want_centroids(true);
  request.set_want_value_means(true);
  request.set_want_positions(true);
  const auto chunks = harness_.Index(request);
  ASSERT_TRUE(chunks.ok()) << chunks.status();
  std::map<uint32_t, std::set<uint32_t>> positions;
  std::map<uint32_t, uint32_t> clusters;
  for (const v1::IndexChunk& chunk : *chunks) {
    EXPECT_EQ(chunk.first_cluster(), clusters[chunk.kv_head()]);
    clusters[chunk.kv_head()] += static_cast<uint32_t>(chunk.sizes_size());
    uint32_t tokens = 0;
    for (const uint32_t size : chunk.sizes()) tokens += size;
    EXPECT_EQ(static_cast<uint32_t>(chunk.positions_size()), tokens);
    EXPECT_EQ(chunk.centroids().data().size(), size_t{32} * 4 * chunk.sizes().size());
    for (const uint32_t position : chunk.positions()) {
      EXPECT_TRUE(positions[chunk.kv_head()].insert(position).second);
    }
  }
  EXPECT_THAT(positions[0], SizeIs(6000 - 16));
  EXPECT_THAT(positions[1], SizeIs(6000 - 16));
}

TEST_P(ServiceTest, ListingGoesPageByPageInOrderOfNames) {
  TestSequence sequence;
  sequence.tokens = 20;
  for (const char* name : {"b", "a", "c", "other"}) {
    sequence.name = name;
    ASSERT_TRUE(harness_.Open(sequence.OpenRequest()).ok());
  }
  std::vector<std::string> names;
  v1::ListSequencesRequest request;
  request.set_page_size(2);
  do {
    v1::ListSequencesResponse page;
    ASSERT_TRUE(harness_.cache().ListSequences(MakeContext().get(), request, &page).ok());
    EXPECT_LE(page.sequences_size(), 2);
    for (const v1::Sequence& listed : page.sequences()) names.push_back(listed.handle().name());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  EXPECT_THAT(names, ElementsAre("a", "b", "c", "other"));
}

TEST_P(ServiceTest, AttachSaysWhyItIsNotABetterLink) {
  const v1::Sequence ready = harness_.MakeReady(TestSequence());
  v1::AttachRequest request;
  *request.mutable_sequence() = ready.handle();
  request.add_links(v1::LINK_NCCL);
  request.add_links(v1::LINK_PEER);
  request.add_links(v1::LINK_GRPC);
  const auto attached = harness_.Attach(request);
  ASSERT_TRUE(attached.ok()) << attached.status();
  EXPECT_EQ(attached->link(), v1::LINK_GRPC);
  EXPECT_THAT(attached->link_reason(), HasSubstr("nccl: this server has no GPU device"));
  EXPECT_THAT(attached->link_reason(), HasSubstr("peer: this server has no GPU device"));
  uint64_t fallbacks = 0;
  const v1::Stats stats = Stats();
  for (const auto& [reason, count] : stats.link_fallbacks()) fallbacks += count;
  EXPECT_EQ(fallbacks, 2u);
  Detach(attached->attachment_id());
}

TEST_P(ServiceTest, ServerInfoTellsLimitsAndNames) {
  v1::ServerInfo info;
  ASSERT_TRUE(harness_.cache().GetServerInfo(MakeContext().get(), {}, &info).ok());
  EXPECT_THAT(info.codecs(), Contains("raw"));
  EXPECT_THAT(info.codecs(), Contains("k8v4"));
  EXPECT_THAT(info.presets(), ElementsAre("clusterkv", "recall", "default"));
  EXPECT_EQ(info.device(), "cpu");
  EXPECT_EQ(info.max_batch_items(), 256u);
  EXPECT_EQ(info.arena_bytes(), 64u << 20);
  EXPECT_THAT(info.links(), ElementsAre(v1::LINK_GRPC));
}

// --- sessions

class SessionClient {
 public:
  SessionClient(ServiceHarness& harness, uint64_t resume) {
    stream_ = harness.session().Session(&context_);
    v1::SessionRequest request;
    request.mutable_hello()->set_worker("test");
    request.mutable_hello()->set_session_id(resume);
    EXPECT_TRUE(stream_->Write(request));
    v1::SessionResponse response;
    EXPECT_TRUE(stream_->Read(&response));
    welcome_ = response.welcome();
  }
  ~SessionClient() {
    if (stream_ == nullptr) return;
    context_.TryCancel();
    (void)stream_->Finish();
  }
  const v1::SessionResponse::Welcome& welcome() const { return welcome_; }
  void Heartbeat() {
    v1::SessionRequest request;
    request.mutable_heartbeat();
    ASSERT_TRUE(stream_->Write(request));
  }
  absl::StatusOr<v1::SessionResponse> Read() {
    v1::SessionResponse response;
    if (stream_->Read(&response)) return response;
    return FromGrpcStatus(std::exchange(stream_, nullptr)->Finish());
  }
  absl::Status Close() {
    stream_->WritesDone();
    return FromGrpcStatus(std::exchange(stream_, nullptr)->Finish());
  }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::SessionRequest, v1::SessionResponse>> stream_;
  v1::SessionResponse::Welcome welcome_;
};

TEST_P(ServiceTest, ABrokenSessionIsResumedAndAClosedOneIsOver) {
  uint64_t id = 0;
  {
    SessionClient client(harness_, 0);
    id = client.welcome().session_id();
    EXPECT_NE(id, 0u);
    EXPECT_FALSE(client.welcome().resumed());
    client.Heartbeat();
    const auto answer = client.Read();
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_TRUE(answer->has_ack());
  }  // cancelled: it broke
  {
    SessionClient client(harness_, id);
    EXPECT_EQ(client.welcome().session_id(), id);
    EXPECT_TRUE(client.welcome().resumed());
    EXPECT_TRUE(client.Close().ok());
  }
  const absl::Time limit = absl::Now() + absl::Seconds(10);
  while (Stats().sessions() != 0 && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_EQ(Stats().sessions(), 0u);
  SessionClient client(harness_, id);
  EXPECT_NE(client.welcome().session_id(), id);
  EXPECT_FALSE(client.welcome().resumed());
}

TEST_P(ServiceTest, ForceReleaseEndsAWorkersSessionAndItsAttachments) {
  const v1::Sequence ready = harness_.MakeReady(TestSequence());
  SessionClient client(harness_, 0);
  v1::AttachRequest attach;
  *attach.mutable_sequence() = ready.handle();
  attach.set_session_id(client.welcome().session_id());
  ASSERT_TRUE(harness_.Attach(attach).ok());
  EXPECT_EQ(Stats().attachments(), 1u);
  v1::ForceReleaseWorkerRequest request;
  request.set_session_id(client.welcome().session_id());
  v1::ForceReleaseWorkerResponse response;
  EXPECT_TRUE(harness_.admin().ForceReleaseWorker(MakeContext().get(), request, &response).ok());
  EXPECT_EQ(Stats().attachments(), 0u);
  EXPECT_EQ(Stats().sessions(), 0u);
}

// --- operation

TEST_P(ServiceTest, DrainTellsSessionsRefusesNewWorkAndGoesOnToServe) {
  const TestSequence sequence;
  harness_.MakeReady(sequence);
  SessionClient client(harness_, 0);
  v1::DrainResponse drained;
  ASSERT_TRUE(harness_.admin().Drain(MakeContext().get(), {}, &drained).ok());
  EXPECT_EQ(drained.sequences(), 1u);
  const auto notice = client.Read();
  ASSERT_TRUE(notice.ok()) << notice.status();
  EXPECT_EQ(notice->notice().kind(), v1::SessionResponse::Notice::DRAINING);
  TestSequence other;
  other.name = "other";
  EXPECT_EQ(ReasonOf(harness_.Open(other.OpenRequest()).status()), v1::DRAINING);
  EXPECT_TRUE(harness_.Select(SelectRequest(sequence, 0, 0)).ok());
}

TEST_P(ServiceTest, ShutdownEndsOpenStreamsWithTheReason) {
  const TestSequence sequence;
  harness_.MakeReady(sequence);
  const auto context = MakeContext();
  const auto stream = harness_.cache().StreamSelect(context.get());
  ASSERT_TRUE(stream->Write(SelectRequest(sequence, 0, 1)));
  v1::SelectClustersResponse response;
  ASSERT_TRUE(stream->Read(&response));
  SessionClient client(harness_, 0);
  EXPECT_EQ(harness_.LedgerProblems(), "");
  // gRPC's in-process transport drops a status that the client has not asked for by the time the
  // server closes it, and the client asks only after its read has failed: there, any error will do.
  const bool told = GetParam() == Transport::kTcp || GetParam() == Transport::kUnix;
  std::thread stream_reader([&] {
    EXPECT_FALSE(stream->Read(&response));
    const absl::Status end = FromGrpcStatus(stream->Finish());
    EXPECT_FALSE(end.ok());
    if (told) {
      EXPECT_EQ(ReasonOf(end), v1::DRAINING) << end;
    }
  });
  std::thread session_reader([&] {
    const absl::Status end = client.Read().status();
    EXPECT_FALSE(end.ok());
    if (told) {
      EXPECT_EQ(ReasonOf(end), v1::DRAINING) << end;
    }
  });
  harness_.server().Shutdown();
  stream_reader.join();
  session_reader.join();
  harness_.Restart();
}

grpc::health::v1::HealthCheckResponse::ServingStatus Health(
    const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  grpc::health::v1::HealthCheckResponse response;
  const auto stub = grpc::health::v1::Health::NewStub(channel);
  const grpc::Status status = stub->Check(MakeContext().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.status();
}

TEST_P(ServiceTest, HealthIsServingUntilDrainedAndLivenessAlways) {
  using grpc::health::v1::HealthCheckResponse;
  for (const auto& channel : {harness_.channel(), harness_.admin_channel()}) {
    for (const char* service : {"", "liveness", "readiness"}) {
      EXPECT_EQ(Health(channel, service), HealthCheckResponse::SERVING) << service;
    }
  }
  harness_.server().BeginDrain();
  for (const auto& channel : {harness_.channel(), harness_.admin_channel()}) {
    EXPECT_EQ(Health(channel, ""), HealthCheckResponse::NOT_SERVING);
    EXPECT_EQ(Health(channel, "readiness"), HealthCheckResponse::NOT_SERVING);
    EXPECT_EQ(Health(channel, "liveness"), HealthCheckResponse::SERVING);
  }
}

// Asks one question of a reflection service of either version.
template <typename Service, typename Request, typename Response>
Response Reflect(const std::shared_ptr<grpc::Channel>& channel, const Request& request) {
  const auto stub = Service::NewStub(channel);
  const auto context = MakeContext();
  const auto stream = stub->ServerReflectionInfo(context.get());
  EXPECT_TRUE(stream->Write(request));
  Response response;
  EXPECT_TRUE(stream->Read(&response));
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
  return response;
}

TEST_P(ServiceTest, ReflectionListsServicesAndTheirFilesInBothVersions) {
  grpc::reflection::v1::ServerReflectionRequest list;
  list.set_list_services("");
  const auto listed =
      Reflect<grpc::reflection::v1::ServerReflection, grpc::reflection::v1::ServerReflectionRequest,
              grpc::reflection::v1::ServerReflectionResponse>(harness_.channel(), list);
  std::vector<std::string> names;
  for (const auto& service : listed.list_services_response().service()) {
    names.push_back(service.name());
  }
  EXPECT_THAT(names, Contains("clusterkv.v1.CacheService"));
  EXPECT_THAT(names, Contains("clusterkv.v1.SessionService"));
  EXPECT_THAT(names, Contains("grpc.health.v1.Health"));
  EXPECT_THAT(names, Not(Contains("clusterkv.v1.AdminService")));

  grpc::reflection::v1alpha::ServerReflectionRequest symbol;
  symbol.set_file_containing_symbol("clusterkv.v1.AdminService.Drain");
  const auto file = Reflect<grpc::reflection::v1alpha::ServerReflection,
                            grpc::reflection::v1alpha::ServerReflectionRequest,
                            grpc::reflection::v1alpha::ServerReflectionResponse>(
      harness_.admin_channel(), symbol);
  EXPECT_GE(file.file_descriptor_response().file_descriptor_proto_size(), 2) << "with imports";
  symbol.set_file_containing_symbol("no.such.Thing");
  const auto missing =
      Reflect<grpc::reflection::v1alpha::ServerReflection,
              grpc::reflection::v1alpha::ServerReflectionRequest,
              grpc::reflection::v1alpha::ServerReflectionResponse>(harness_.channel(), symbol);
  EXPECT_EQ(missing.error_response().error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_P(ServiceTest, TheAdminServiceIsNotOnTheDataPort) {
  const auto stub = v1::AdminService::NewStub(harness_.channel());
  v1::Stats stats;
  EXPECT_EQ(stub->GetStats(MakeContext().get(), {}, &stats).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

// --- clients that go away

TEST_P(ServiceTest, CancelledCallsLeaveNothingBehind) {
  TestSequence sequence;
  sequence.tokens = 5000;
  sequence.layers = 1;
  const v1::Sequence ready = harness_.MakeReady(sequence);
  v1::AttachRequest request;
  *request.mutable_sequence() = ready.handle();
  request.mutable_select()->set_budget_tokens(5000);
  const auto attached = harness_.Attach(request);
  ASSERT_TRUE(attached.ok()) << attached.status();
  for (int i = 0; i < 30; ++i) {
    grpc::ClientContext context;
    v1::SelectAndRecallRequest step = StepRequest(sequence, attached->attachment_id(), 0);
    step.mutable_items(0)->set_reset_residency(true);
    const auto reader = harness_.cache().SelectAndRecall(&context, step);
    v1::SelectAndRecallResponse response;
    if (i % 3 != 0) reader->Read(&response);
    context.TryCancel();
    (void)reader->Finish();
  }
  for (int i = 0; i < 30; ++i) {
    grpc::ClientContext context;
    const auto stream = harness_.cache().StreamSelect(&context);
    for (int j = 0; j < i; ++j) stream->Write(SelectRequest(sequence, 0, 1));
    context.TryCancel();
    (void)stream->Finish();
  }
  Detach(attached->attachment_id());
  ASSERT_TRUE(harness_.Release(ready.handle()).ok());
  const absl::Time limit = absl::Now() + absl::Seconds(10);
  while (Stats().pages().free() != Stats().pages().total() && absl::Now() < limit) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  EXPECT_EQ(Stats().pages().free(), Stats().pages().total());
}

TEST_P(ServiceTest, AReaderThatStopsIsCutAtTheDefaultDeadline) {
  ServiceHarness slow(GetParam(), [](Config* config) {
    config->default_deadline = absl::Seconds(2);
    config->shard.arena_bytes = 256 << 20;
  });
  TestSequence sequence;
  sequence.tokens = 20'000;  // more records than flow control lets go
  sequence.layers = 1;
  sequence.kv_heads = 1;
  sequence.query_heads = 1;
  sequence.head_dim = 128;
  sequence.tokens_per_cluster = 1024;  // soon clustered, under a sanitizer too
  slow.MakeReady(sequence);
  v1::RecallClustersRequest request;
  request.mutable_sequence()->set_name(sequence.name);
  v1::RecallClustersRequest::Head* head = request.add_heads();
  for (uint32_t position = 16; position < sequence.tokens; ++position) {
    head->add_positions(position);
  }
  grpc::ClientContext context;  // no deadline of its own
  const auto reader = slow.cache().RecallClusters(&context, request);
  v1::RecordChunk chunk;
  ASSERT_TRUE(reader->Read(&chunk));
  absl::SleepFor(absl::Milliseconds(2100));
  const absl::Time limit = absl::Now() + absl::Seconds(10);
  v1::Stats stats;
  do {
    ASSERT_TRUE(slow.admin().GetStats(MakeContext().get(), {}, &stats).ok());
  } while (stats.pages().recalling() != 0 && absl::Now() < limit);
  EXPECT_EQ(stats.pages().recalling(), 0u) << "the pins are gone though nobody reads";
  while (reader->Read(&chunk)) {
  }
  EXPECT_FALSE(reader->Finish().ok());
  EXPECT_EQ(slow.LedgerProblems(), "");
}

}  // namespace
}  // namespace clusterkv::cache_service::testing
