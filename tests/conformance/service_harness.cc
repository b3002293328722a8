#include "tests/conformance/service_harness.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "absl/time/clock.h"
#include "kernels/base/element_type.h"

namespace clusterkv::cache_service::testing {
namespace {

// splitmix64 to (-1, 1): the same on every machine.
float Noise(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return static_cast<float>(static_cast<double>(x >> 11) * 0x1p-52 - 1.0);
}

std::string UnixPath() {
  static int counter = 0;
  return ::testing::TempDir() + "ckv_" + std::to_string(getpid()) + "_" + std::to_string(++counter);
}

template <typename Response>
absl::StatusOr<Response> Answer(const grpc::Status& status, Response response) {
  if (!status.ok()) return FromGrpcStatus(status);
  return response;
}

template <typename Response>
absl::StatusOr<std::vector<Response>> ReadAll(grpc::ClientReader<Response>& reader) {
  std::vector<Response> all;
  Response response;
  while (reader.Read(&response)) all.push_back(response);
  return Answer(reader.Finish(), std::move(all));
}

}  // namespace

const char* TransportName(Transport transport) {
  switch (transport) {
    case Transport::kInProcess:
      return "InProcess";
    case Transport::kTcp:
      return "Tcp";
    case Transport::kTenant:
      return "Tenant";
    case Transport::kUnix:
      break;
  }
  return "Unix";
}

v1::OpenSequenceRequest TestSequence::OpenRequest() const {
  v1::OpenSequenceRequest request;
  request.set_name(name);
  request.mutable_shape()->set_layers(layers);
  request.mutable_shape()->set_kv_heads(kv_heads);
  request.mutable_shape()->set_query_heads(query_heads);
  request.mutable_shape()->set_head_dim(head_dim);
  request.mutable_shape()->set_element_type(element_type);
  request.set_prompt_tokens(tokens);
  request.set_max_decode_tokens(max_decode_tokens);
  request.set_codec(codec);
  request.mutable_select()->set_budget_tokens(64);
  request.mutable_select()->set_coded_tokens(128);
  if (tokens_per_cluster != 0) {
    request.mutable_index()->set_tokens_per_cluster(tokens_per_cluster);
  }
  return request;
}

int64_t TestSequence::row_bytes() const {
  const auto type = static_cast<kernels::ElementType>(element_type);
  return int64_t{kv_heads} * head_dim * kernels::ElementBytes(type);
}

std::string TestSequence::Rows(uint64_t salt, uint32_t layer, uint32_t first,
                               uint32_t count) const {
  const int64_t row = int64_t{kv_heads} * head_dim;
  std::vector<float> numbers(static_cast<size_t>(row * count));
  for (uint32_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < row; ++i) {
      const uint64_t position = (uint64_t{layer} << 40) + (uint64_t{first + t} << 16);
      numbers[static_cast<size_t>(t * row + i)] =
          Noise(seed * 1000003 + salt + position + static_cast<uint64_t>(i));
    }
  }
  std::string bytes(static_cast<size_t>(row_bytes() * count), '\0');
  kernels::FromFloat(numbers.data(), static_cast<kernels::ElementType>(element_type),
                     static_cast<int64_t>(numbers.size()),
                     reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

std::string TestSequence::Keys(uint32_t layer, uint32_t first, uint32_t count) const {
  return Rows(0, layer, first, count);
}

std::string TestSequence::Values(uint32_t layer, uint32_t first, uint32_t count) const {
  return Rows(uint64_t{1} << 60, layer, first, count);
}

v1::PutKvRequest TestSequence::Chunk(uint32_t layer, uint32_t first, uint32_t count) const {
  v1::PutKvRequest request;
  request.mutable_sequence()->set_name(name);
  v1::KvChunk* chunk = request.mutable_chunk();
  chunk->set_layer(layer);
  chunk->set_first_token(first);
  chunk->set_tokens(count);
  chunk->set_keys(Keys(layer, first, count));
  chunk->set_values(Values(layer, first, count));
  return request;
}

std::vector<float> TestSequence::Queries(uint32_t step) const {
  std::vector<float> queries(size_t{query_heads} * head_dim);
  for (size_t i = 0; i < queries.size(); ++i) {
    queries[i] = 3 * Noise(seed + (uint64_t{1} << 61) + (uint64_t{step} << 20) + i);
  }
  return queries;
}

v1::Vector TestSequence::QueryVector(uint32_t step) const {
  const std::vector<float> queries = Queries(step);
  v1::Vector vector;
  vector.set_type(v1::ELEMENT_TYPE_FLOAT32);
  vector.set_data(queries.data(), queries.size() * sizeof(float));
  return vector;
}

ServiceHarness::ServiceHarness(Transport transport, const std::function<void(Config*)>& change)
    : transport_(transport) {
  v1::ServerConfig message;
  message.set_listen("127.0.0.1:0");
  message.set_admin_listen("127.0.0.1:0");
  message.set_arena_bytes("64MiB");
  message.set_build_threads(1);
  message.set_select_threads(1);
  message.set_log_level("error");
  if (transport == Transport::kUnix) {
    unix_path_ = UnixPath();
    message.set_listen("unix:" + unix_path_);
    message.set_admin_listen("unix:" + unix_path_ + ".admin");
  }
  config_ = ResolveConfig(message).value();
  if (transport == Transport::kTenant) {
    config_.tenants.resize(2);
    config_.tenants[0].name = "other";
    config_.tenants[1].name = kDefaultTenant;
  }
  if (change) change(&config_);
  ConfigureLog(config_.log_level, config_.log_format);
  server_ = Server::Start(config_).value();
  Connect();
}

void ServiceHarness::Restart() {
  server_.reset();
  server_ = Server::Start(config_).value();
  Connect();
}

void ServiceHarness::Connect() {
  if (transport_ == Transport::kInProcess || transport_ == Transport::kTenant) {
    channel_ = server_->InProcessChannel();
    admin_channel_ = server_->InProcessAdminChannel();
  } else {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
    // Windows that stay as they begin: gRPC's estimate of the path grows without a bound where
    // threads wait for processors, and then nothing holds back who sends.
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    channel_ = grpc::CreateCustomChannel(server_->address(), grpc::InsecureChannelCredentials(),
                                         arguments);
    admin_channel_ = grpc::CreateCustomChannel(server_->admin_address(),
                                               grpc::InsecureChannelCredentials(), arguments);
  }
  cache_ = v1::CacheService::NewStub(channel_);
  session_ = v1::SessionService::NewStub(channel_);
  admin_ = v1::AdminService::NewStub(admin_channel_);
}

ServiceHarness::~ServiceHarness() {
  if (unix_path_.empty()) return;
  unlink(unix_path_.c_str());
  unlink((unix_path_ + ".admin").c_str());
}

std::unique_ptr<grpc::ClientContext> MakeContext(absl::Duration timeout) {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  return context;
}

absl::StatusOr<v1::Sequence> ServiceHarness::Open(const v1::OpenSequenceRequest& request) {
  v1::Sequence response;
  const grpc::Status status = cache_->OpenSequence(MakeContext().get(), request, &response);
  return Answer(status, std::move(response));
}

absl::StatusOr<v1::PutKvResponse> ServiceHarness::Put(
    const std::vector<v1::PutKvRequest>& messages) {
  v1::PutKvResponse response;
  const auto context = MakeContext();
  const auto writer = cache_->PutKv(context.get(), &response);
  for (const v1::PutKvRequest& message : messages) {
    if (!writer->Write(message)) break;
  }
  writer->WritesDone();
  const grpc::Status status = writer->Finish();
  return Answer(status, std::move(response));
}

absl::StatusOr<v1::Sequence> ServiceHarness::Seal(const v1::SequenceHandle& sequence) {
  v1::SealSequenceRequest request;
  *request.mutable_sequence() = sequence;
  v1::Sequence response;
  const grpc::Status status = cache_->SealSequence(MakeContext().get(), request, &response);
  return Answer(status, std::move(response));
}

absl::StatusOr<v1::SelectClustersResponse> ServiceHarness::Select(
    const v1::SelectClustersRequest& request) {
  v1::SelectClustersResponse response;
  const grpc::Status status = cache_->SelectClusters(MakeContext().get(), request, &response);
  return Answer(status, std::move(response));
}

absl::StatusOr<v1::AttachResponse> ServiceHarness::Attach(const v1::AttachRequest& request) {
  v1::AttachResponse response;
  const grpc::Status status = cache_->Attach(MakeContext().get(), request, &response);
  return Answer(status, std::move(response));
}

absl::StatusOr<v1::AppendKvResponse> ServiceHarness::Append(const v1::AppendKvRequest& request) {
  v1::AppendKvResponse response;
  const grpc::Status status = cache_->AppendKv(MakeContext().get(), request, &response);
  return Answer(status, std::move(response));
}

absl::StatusOr<std::vector<v1::RecordChunk>> ServiceHarness::Recall(
    const v1::RecallClustersRequest& request) {
  const auto context = MakeContext();
  return ReadAll(*cache_->RecallClusters(context.get(), request));
}

absl::StatusOr<std::vector<v1::SelectAndRecallResponse>> ServiceHarness::SelectAndRecall(
    const v1::SelectAndRecallRequest& request) {
  const auto context = MakeContext();
  return ReadAll(*cache_->SelectAndRecall(context.get(), request));
}

absl::StatusOr<std::vector<v1::IndexChunk>> ServiceHarness::Index(
    const v1::GetIndexRequest& request) {
  const auto context = MakeContext();
  return ReadAll(*cache_->GetIndex(context.get(), request));
}

absl::Status ServiceHarness::Release(const v1::SequenceHandle& sequence) {
  v1::ReleaseSequenceRequest request;
  *request.mutable_sequence() = sequence;
  v1::ReleaseSequenceResponse response;
  return FromGrpcStatus(cache_->ReleaseSequence(MakeContext().get(), request, &response));
}

v1::Sequence ServiceHarness::MakeReady(const TestSequence& sequence) {
  const absl::StatusOr<v1::Sequence> opened = Open(sequence.OpenRequest());
  EXPECT_TRUE(opened.ok()) << opened.status();
  if (!opened.ok()) return {};
  std::vector<v1::PutKvRequest> messages;
  for (uint32_t layer = 0; layer < sequence.layers; ++layer) {
    for (uint32_t token = 0; token < sequence.tokens; token += 100) {
      messages.push_back(
          sequence.Chunk(layer, token, std::min<uint32_t>(100, sequence.tokens - token)));
    }
  }
  const absl::StatusOr<v1::PutKvResponse> put = Put(messages);
  EXPECT_TRUE(put.ok()) << put.status();
  const absl::StatusOr<v1::Sequence> sealed = Seal(opened->handle());
  EXPECT_TRUE(sealed.ok()) << sealed.status();
  return sealed.ok() ? *sealed : v1::Sequence();
}

std::string ServiceHarness::LedgerProblems() {
  v1::VerifyLedgerRequest request;
  request.set_checksums(true);
  v1::VerifyLedgerResponse response;
  const grpc::Status status = admin_->VerifyLedger(MakeContext().get(), request, &response);
  if (!status.ok()) return "VerifyLedger: " + status.error_message();
  std::string problems = response.balanced() ? "" : "not balanced: ";
  for (const std::string& problem : response.problems()) problems += problem + "; ";
  return problems;
}

}  // namespace clusterkv::cache_service::testing
