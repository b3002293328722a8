// Walks the table of bad inputs in proto/README.md over the wire: every row has a case here that
// provokes it, and every case here has a row there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <sstream>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "tests/conformance/service_harness.h"

namespace clusterkv::cache_service::testing {
namespace {

using ::testing::HasSubstr;

struct Row {
  std::string name, call, code, reason;
  std::vector<std::string> words;
};

std::vector<std::string> Cells(const std::string& line) {
  std::vector<std::string> cells;
  std::stringstream in(line.substr(1));
  std::string cell;
  while (std::getline(in, cell, '|')) {
    const size_t begin = cell.find_first_not_of(' ');
    const size_t end = cell.find_last_not_of(' ');
    cells.push_back(begin == std::string::npos ? "" : cell.substr(begin, end - begin + 1));
  }
  return cells;
}

std::vector<std::string> Quoted(const std::string& cell) {
  std::vector<std::string> words;
  for (size_t at = cell.find('`'); at != std::string::npos; at = cell.find('`', at + 1)) {
    const size_t end = cell.find('`', at + 1);
    words.push_back(cell.substr(at + 1, end - at - 1));
    at = end;
  }
  return words;
}

// The table that begins with "| case |".
std::vector<Row> ReadTable() {
  std::ifstream in(CLUSTERKV_SOURCE_DIR "/proto/README.md");
  std::vector<Row> rows;
  bool inside = false;
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("| case |", 0) == 0) {
      inside = true;
    } else if (inside && line.rfind("|---", 0) != 0) {
      if (line.empty() || line[0] != '|') break;
      const std::vector<std::string> cells = Cells(line);
      rows.push_back({cells.at(0), cells.at(2), cells.at(3), cells.at(4), Quoted(cells.at(5))});
    }
  }
  return rows;
}

const std::map<std::string, grpc::StatusCode>& Codes() {
  static const auto& codes = *new std::map<std::string, grpc::StatusCode>{
      {"INVALID_ARGUMENT", grpc::StatusCode::INVALID_ARGUMENT},
      {"UNIMPLEMENTED", grpc::StatusCode::UNIMPLEMENTED},
      {"NOT_FOUND", grpc::StatusCode::NOT_FOUND},
      {"FAILED_PRECONDITION", grpc::StatusCode::FAILED_PRECONDITION},
      {"ALREADY_EXISTS", grpc::StatusCode::ALREADY_EXISTS},
      {"ABORTED", grpc::StatusCode::ABORTED},
      {"RESOURCE_EXHAUSTED", grpc::StatusCode::RESOURCE_EXHAUSTED},
      {"UNAVAILABLE", grpc::StatusCode::UNAVAILABLE},
      {"DEADLINE_EXCEEDED", grpc::StatusCode::DEADLINE_EXCEEDED},
      {"DATA_LOSS", grpc::StatusCode::DATA_LOSS},
  };
  return codes;
}

// An item's error as the status of a call that has it.
grpc::Status AsCall(const google::rpc::Status& item) {
  return grpc::Status(static_cast<grpc::StatusCode>(item.code()), item.message(),
                      item.SerializeAsString());
}

// A server with a READY sequence "ready" and one, "filling", of which ten tokens of layer 0 are in.
// All cases run on it, one after the other: an error changes nothing.
class BadInput {
 public:
  using Case = std::function<grpc::Status()>;

  BadInput() {
    ready_.name = "ready";
    filling_.name = "filling";
    ready_handle_ = harness_.MakeReady(ready_).handle();
    EXPECT_TRUE(harness_.Open(filling_.OpenRequest()).ok());
    EXPECT_TRUE(harness_.Put({filling_.Chunk(0, 0, 10)}).ok());
    v1::AttachRequest attach;
    *attach.mutable_sequence() = ready_handle_;
    attach.mutable_hot_cache()->set_capacity_tokens(256);
    const auto attached = harness_.Attach(attach);
    EXPECT_TRUE(attached.ok()) << attached.status();
    if (attached.ok()) attachment_ = attached->attachment_id();
    AddOpenCases();
    AddPutCases();
    AddWindowCases();
    AddSequenceCases();
    AddAttachCases();
    AddSelectCases();
    AddRecallCases();
    AddAppendCases();
    AddSessionAndAdminCases();
  }

  const std::map<std::string, Case>& cases() const { return cases_; }
  std::string LedgerProblems() { return harness_.LedgerProblems(); }

  // What the READY sequence answers, and how much of the other one is in.
  std::string Fingerprint() {
    const auto selected = harness_.Select(SelectRequest(nullptr));
    v1::GetSequenceRequest request;
    request.mutable_sequence()->set_name("filling");
    v1::Sequence filling;
    EXPECT_TRUE(harness_.cache().GetSequence(MakeContext().get(), request, &filling).ok());
    EXPECT_TRUE(selected.ok()) << selected.status();
    return (selected.ok() ? selected->results(0).SerializeAsString() : "") +
           filling.SerializeAsString();
  }

 private:
  // --- calls, bare

  grpc::Status Open(const std::function<void(v1::OpenSequenceRequest*)>& change) {
    return Open(harness_, change);
  }
  static grpc::Status Open(ServiceHarness& harness,
                           const std::function<void(v1::OpenSequenceRequest*)>& change) {
    TestSequence sequence;
    sequence.name = "new";
    v1::OpenSequenceRequest request = sequence.OpenRequest();
    change(&request);
    v1::Sequence response;
    return harness.cache().OpenSequence(MakeContext().get(), request, &response);
  }

  grpc::Status Put(const std::vector<v1::PutKvRequest>& messages) {
    v1::PutKvResponse response;
    const auto context = MakeContext();
    const auto writer = harness_.cache().PutKv(context.get(), &response);
    for (const v1::PutKvRequest& message : messages) {
      if (!writer->Write(message)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  }
  // Ten tokens of layer 0 from token 20, changed.
  grpc::Status PutChunk(const std::function<void(v1::PutKvRequest*)>& change) {
    v1::PutKvRequest request = filling_.Chunk(0, 20, 10);
    change(&request);
    return Put({request});
  }

  v1::SelectClustersRequest SelectRequest(const std::function<void(v1::SelectItem*)>& change) {
    v1::SelectClustersRequest request;
    v1::SelectItem* item = request.add_items();
    item->mutable_sequence()->set_name("ready");
    *item->mutable_queries() = ready_.QueryVector(1);
    if (change) change(item);
    return request;
  }
  grpc::Status Select(const v1::SelectClustersRequest& request) {
    v1::SelectClustersResponse response;
    const grpc::Status status =
        harness_.cache().SelectClusters(MakeContext().get(), request, &response);
    if (!status.ok() || !response.results(0).has_error()) return status;
    return AsCall(response.results(0).error());
  }
  grpc::Status SelectItem(const std::function<void(v1::SelectItem*)>& change) {
    return Select(SelectRequest(change));
  }
  grpc::Status Queries(const std::function<void(v1::Vector*)>& change) {
    return SelectItem([&](v1::SelectItem* item) { change(item->mutable_queries()); });
  }

  grpc::Status Recall(const std::function<void(v1::RecallClustersRequest*)>& change) {
    v1::RecallClustersRequest request;
    request.mutable_sequence()->set_name("ready");
    v1::RecallClustersRequest::Head* head = request.add_heads();
    head->add_positions(100);
    change(&request);
    const auto context = MakeContext();
    const auto reader = harness_.cache().RecallClusters(context.get(), request);
    v1::RecordChunk chunk;
    while (reader->Read(&chunk)) {
    }
    return reader->Finish();
  }

  grpc::Status Step(const std::function<void(v1::SelectAndRecallItem*)>& change) {
    v1::SelectAndRecallRequest request;
    v1::SelectAndRecallItem* item = request.add_items();
    item->set_attachment_id(attachment_);
    *item->mutable_queries() = ready_.QueryVector(1);
    change(item);
    const auto context = MakeContext();
    const auto reader = harness_.cache().SelectAndRecall(context.get(), request);
    v1::SelectAndRecallResponse response;
    grpc::Status item_status;
    while (reader->Read(&response)) {
      if (response.selection().results_size() == 0) continue;
      if (response.selection().results(0).has_error()) {
        item_status = AsCall(response.selection().results(0).error());
      }
    }
    const grpc::Status status = reader->Finish();
    return status.ok() ? item_status : status;
  }

  grpc::Status Append(const std::function<void(v1::AppendKvRequest*)>& change) {
    v1::AppendKvRequest request;
    request.mutable_sequence()->set_name("ready");
    request.set_first_token(300);
    request.set_tokens(1);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      v1::AppendKvRequest::Layer* rows = request.add_layers();
      rows->set_layer(layer);
      rows->set_keys(ready_.Keys(layer, 300, 1));
      rows->set_values(ready_.Values(layer, 300, 1));
    }
    change(&request);
    v1::AppendKvResponse response;
    return harness_.cache().AppendKv(MakeContext().get(), request, &response);
  }

  grpc::Status Attach(const std::function<void(v1::AttachRequest*)>& change) {
    v1::AttachRequest request;
    request.mutable_sequence()->set_name("ready");
    change(&request);
    v1::AttachResponse response;
    return harness_.cache().Attach(MakeContext().get(), request, &response);
  }

  grpc::Status Seal(const std::string& name) {
    v1::SealSequenceRequest request;
    request.mutable_sequence()->set_name(name);
    v1::Sequence response;
    return harness_.cache().SealSequence(MakeContext().get(), request, &response);
  }

  grpc::Status Fork(const std::string& source, const std::string& name) {
    v1::ForkSequenceRequest request;
    request.mutable_source()->set_name(source);
    request.set_name(name);
    v1::Sequence response;
    return harness_.cache().ForkSequence(MakeContext().get(), request, &response);
  }

  grpc::Status Index(const std::string& name) {
    v1::GetIndexRequest request;
    request.mutable_sequence()->set_name(name);
    request.set_want_positions(true);
    const auto context = MakeContext();
    const auto reader = harness_.cache().GetIndex(context.get(), request);
    v1::IndexChunk chunk;
    while (reader->Read(&chunk)) {
    }
    return reader->Finish();
  }

  static grpc::Status Session(ServiceHarness& harness,
                              const std::vector<v1::SessionRequest>& messages) {
    const auto context = MakeContext();
    const auto stream = harness.session().Session(context.get());
    for (const v1::SessionRequest& message : messages) stream->Write(message);
    v1::SessionResponse response;
    while (stream->Read(&response)) {
    }
    return stream->Finish();
  }

  // --- cases

  void AddOpenCases();
  void AddPutCases();
  void AddWindowCases();
  void AddSequenceCases();
  void AddAttachCases();
  void AddSelectCases();
  void AddRecallCases();
  void AddAppendCases();
  void AddSessionAndAdminCases();

  ServiceHarness harness_{Transport::kTcp};
  TestSequence ready_, filling_;
  v1::SequenceHandle ready_handle_;
  uint64_t attachment_ = 0;
  std::map<std::string, Case> cases_;
};

void BadInput::AddOpenCases() {
  const auto add = [this](const char* name, std::function<void(v1::OpenSequenceRequest*)> change) {
    cases_[name] = [this, change = std::move(change)] { return Open(change); };
  };
  add("open-no-name", [](auto* r) { r->clear_name(); });
  add("open-kv-heads", [](auto* r) { r->mutable_shape()->set_kv_heads(0); });
  add("open-query-heads", [](auto* r) { r->mutable_shape()->set_query_heads(3); });
  add("open-head-dim", [](auto* r) { r->mutable_shape()->set_head_dim(20); });
  add("open-element-type",
      [](auto* r) { r->mutable_shape()->set_element_type(static_cast<v1::ElementType>(9)); });
  add("open-no-tokens", [](auto* r) { r->set_prompt_tokens(0); });
  add("open-preset", [](auto* r) { r->set_preset("best"); });
  add("open-codec", [](auto* r) { r->set_codec("zip"); });
  add("open-codes", [](auto* r) { r->mutable_index()->mutable_codes()->set_bits(5); });
  add("open-budget-zero", [](auto* r) { r->mutable_select()->set_budget_tokens(0); });
  add("open-fraction", [](auto* r) {
    r->mutable_select()->set_estimated_fraction(std::numeric_limits<float>::quiet_NaN());
  });
  add("open-exists", [](auto* r) { r->set_name("ready"); });
  add("open-too-long", [](auto* r) { r->set_prompt_tokens(5'000'000); });
  add("open-arena-full", [](auto* r) { r->set_prompt_tokens(1'000'000); });
  add("open-session", [](auto* r) { r->set_session_id(17); });
  cases_["open-draining"] = [] {
    ServiceHarness draining;
    draining.server().BeginDrain();
    return Open(draining, [](auto*) {});
  };
}

void BadInput::AddPutCases() {
  const auto add = [this](const char* name, std::function<void(v1::PutKvRequest*)> change) {
    cases_[name] = [this, change = std::move(change)] { return PutChunk(change); };
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  add("put-no-sequence", [](auto* r) { r->clear_sequence(); });
  cases_["put-nothing"] = [this] { return Put({}); };
  cases_["put-other-sequence"] = [this] {
    v1::PutKvRequest other;
    other.mutable_sequence()->set_name("ready");
    return Put({filling_.Chunk(0, 0, 10), other});
  };
  add("put-unknown", [](auto* r) { r->mutable_sequence()->set_name("nobody"); });
  add("put-stale-generation", [](auto* r) { r->mutable_sequence()->set_generation(999999); });
  add("put-stale-boot-id",
      [this](auto* r) { r->mutable_sequence()->set_boot_id(ready_handle_.boot_id() + 1); });
  add("put-too-large", [](auto* r) {
    r->mutable_chunk()->set_keys(std::string(1 << 20, '\0'));
    r->mutable_chunk()->set_values(std::string(1 << 20, '\0'));
  });
  add("put-message-too-large",
      [](auto* r) { r->mutable_chunk()->set_keys(std::string(9 << 20, '\0')); });
  add("put-keys", [](auto* r) { r->mutable_chunk()->mutable_keys()->pop_back(); });
  add("put-values", [](auto* r) { r->mutable_chunk()->clear_values(); });
  add("put-layer", [](auto* r) { r->mutable_chunk()->set_layer(2); });
  add("put-tokens", [](auto* r) { r->mutable_chunk()->set_first_token(295); });
  add("put-tokens-wrap", [](auto* r) { r->mutable_chunk()->set_first_token(0xfffffffb); });
  add("put-no-tokens", [](auto* r) { r->mutable_chunk()->set_tokens(0); });
  // Rows of [2 heads, 32 channels]: token 3, head 1, channel 5 of a chunk of ten from token 0.
  cases_["put-nan-key"] = [this, kNan] {
    v1::PutKvRequest request = filling_.Chunk(1, 0, 10);
    request.mutable_chunk()->mutable_keys()->replace((3 * 64 + 32 + 5) * 4, 4,
                                                     reinterpret_cast<const char*>(&kNan), 4);
    return Put({request});
  };
  cases_["put-inf-value"] = [this, kInf] {
    v1::PutKvRequest request = filling_.Chunk(1, 0, 10);
    request.mutable_chunk()->mutable_values()->replace((3 * 64 + 32 + 5) * 4, 4,
                                                       reinterpret_cast<const char*>(&kInf), 4);
    return Put({request});
  };
  cases_["put-conflict"] = [this] {
    v1::PutKvRequest request = filling_.Chunk(0, 0, 10);
    char& byte = (*request.mutable_chunk()->mutable_keys())[5 * 256 + 40];
    byte = static_cast<char>(byte ^ 1);
    return Put({request});
  };
  add("put-checksum", [](auto* r) { r->mutable_chunk()->set_checksum(12345); });
  const auto statistics = [this](const char* name, std::function<void(v1::Vector*)> change) {
    cases_[name] = [this, change = std::move(change)] {
      v1::PutKvRequest request;
      request.mutable_sequence()->set_name("filling");
      change(request.mutable_statistics()->mutable_query_rms());
      return Put({request});
    };
  };
  statistics("put-statistics-shape", [](auto* v) { v->add_values(1); });
  statistics("put-statistics-type", [](auto* v) {
    v->set_type(static_cast<v1::ElementType>(7));
    v->set_data("1234");
  });
  statistics("put-statistics-nan", [kNan](auto* v) {
    v->add_values(1);
    v->add_values(kNan);
  });
}

void BadInput::AddWindowCases() {
  cases_["ingest-session"] = [this] {
    v1::ConnectIngestRequest request;
    request.set_session_id(17);
    request.set_bytes(1);
    v1::ConnectIngestResponse response;
    return harness_.cache().ConnectIngest(MakeContext().get(), request, &response);
  };
  cases_["window-unknown"] = [this] {
    v1::PutWindowRequest request;
    request.mutable_sequence()->set_name("filling");
    request.set_window_id(17);
    v1::PutWindowResponse response;
    return harness_.cache().PutWindow(MakeContext().get(), request, &response);
  };
}

void BadInput::AddSequenceCases() {
  cases_["seal-missing"] = [this] { return Seal("filling"); };
  cases_["seal-unknown"] = [this] { return Seal("nobody"); };
  cases_["seal-deadline"] = [] {
    ServiceHarness hasty(Transport::kTcp, [](Config* c) {
      c->default_deadline = absl::Milliseconds(1);
      c->shard.arena_bytes = 256 << 20;
    });
    TestSequence sequence;
    sequence.tokens = 8000;
    sequence.head_dim = 128;
    std::vector<v1::PutKvRequest> messages;
    for (uint32_t layer = 0; layer < 2; ++layer) {
      for (uint32_t token = 0; token < 8000; token += 400) {
        messages.push_back(sequence.Chunk(layer, token, 400));
      }
    }
    grpc::Status status;
    for (int i = 0; i < 20 && status.ok(); ++i) {  // one that was READY before it was asked: again
      EXPECT_TRUE(hasty.Open(sequence.OpenRequest()).ok());
      EXPECT_TRUE(hasty.Put(messages).ok());
      grpc::ClientContext context;  // without a deadline
      v1::SealSequenceRequest request;
      request.mutable_sequence()->set_name(sequence.name);
      v1::Sequence response;
      status = hasty.cache().SealSequence(&context, request, &response);
      EXPECT_TRUE(hasty.Release(request.sequence()).ok());
    }
    return status;
  };
  cases_["get-no-name"] = [this] {
    v1::Sequence response;
    return harness_.cache().GetSequence(MakeContext().get(), {}, &response);
  };
  const auto list = [this](const std::function<void(v1::ListSequencesRequest*)>& change) {
    v1::ListSequencesRequest request;
    change(&request);
    v1::ListSequencesResponse response;
    return harness_.cache().ListSequences(MakeContext().get(), request, &response);
  };
  cases_["list-page-size"] = [list] { return list([](auto* r) { r->set_page_size(1001); }); };
  cases_["list-page-token"] = [list] { return list([](auto* r) { r->set_page_token("17"); }); };
  cases_["fork-not-ready"] = [this] { return Fork("filling", "fork"); };
  cases_["fork-exists"] = [this] { return Fork("ready", "filling"); };
  cases_["index-unknown"] = [this] { return Index("nobody"); };
  cases_["index-not-ready"] = [this] { return Index("filling"); };
}

void BadInput::AddAttachCases() {
  const auto add = [this](const char* name, std::function<void(v1::AttachRequest*)> change) {
    cases_[name] = [this, change = std::move(change)] { return Attach(change); };
  };
  const v1::KvShape shape = ready_.OpenRequest().shape();
  add("attach-not-ready", [](auto* r) { r->mutable_sequence()->set_name("filling"); });
  add("attach-shape", [shape](auto* r) {
    *r->mutable_shape() = shape;
    r->mutable_shape()->set_kv_heads(4);
  });
  add("attach-type", [shape](auto* r) {
    *r->mutable_shape() = shape;
    r->mutable_shape()->set_element_type(v1::ELEMENT_TYPE_FLOAT16);
  });
  add("attach-codec", [](auto* r) { r->set_codec("k8v4"); });
  add("attach-policy",
      [](auto* r) { r->mutable_hot_cache()->set_policy(static_cast<v1::HotCachePolicy>(9)); });
  cases_["detach-unknown"] = [this] {
    v1::DetachRequest request;
    request.set_attachment_id(17);
    v1::DetachResponse response;
    return harness_.cache().Detach(MakeContext().get(), request, &response);
  };
  const auto group = [this](const char* name,
                            std::function<void(v1::ConnectResidentRequest*)> change) {
    cases_[name] = [this, change = std::move(change)] {
      v1::ConnectResidentRequest request;
      request.add_attachment_ids(attachment_);
      request.set_slots(64);
      request.set_max_exact_tokens(64);
      change(&request);
      v1::ConnectResidentResponse response;
      return harness_.cache().ConnectResident(MakeContext().get(), request, &response);
    };
  };
  group("group-empty", [](auto* r) { r->clear_attachment_ids(); });
  group("group-twice", [](auto* r) { r->add_attachment_ids(r->attachment_ids(0)); });
  group("group-attachment", [](auto* r) { r->set_attachment_ids(0, 17); });
  group("group-slots", [](auto* r) { r->set_slots(48); });
  group("group-exact", [](auto* r) { r->set_max_exact_tokens(65); });
  cases_["group-unknown"] = [this] {
    v1::RenewResidentRequest request;
    request.set_resident_id(17);
    v1::RenewResidentResponse response;
    return harness_.cache().RenewResident(MakeContext().get(), request, &response);
  };
}

void BadInput::AddSelectCases() {
  const auto item = [this](const char* name, std::function<void(v1::SelectItem*)> change) {
    cases_[name] = [this, change = std::move(change)] { return SelectItem(change); };
  };
  const auto queries = [this](const char* name, std::function<void(v1::Vector*)> change) {
    cases_[name] = [this, change = std::move(change)] { return Queries(change); };
  };
  const auto number = [](v1::Vector* v, size_t index, float value) {
    v->mutable_data()->replace(index * 4, 4, reinterpret_cast<const char*>(&value), 4);
  };
  cases_["select-no-items"] = [this] { return Select({}); };
  cases_["select-many-items"] = [this] {
    v1::SelectClustersRequest request = SelectRequest(nullptr);
    for (int i = 0; i < 256; ++i) *request.add_items() = request.items(0);
    return Select(request);
  };
  cases_["select-state-type"] = [this] {
    v1::SelectClustersRequest request = SelectRequest(nullptr);
    request.set_state_type(static_cast<v1::ElementType>(8));
    return Select(request);
  };
  queries("select-no-queries", [](auto* v) { v->Clear(); });
  queries("select-queries", [](auto* v) { v->mutable_data()->resize(64 * 4); });
  queries("select-bytes", [](auto* v) { v->mutable_data()->resize(510); });
  queries("select-both", [](auto* v) { v->add_values(1); });
  queries("select-type", [](auto* v) { v->set_type(static_cast<v1::ElementType>(4)); });
  queries("select-nan",
          [number](auto* v) { number(v, 7, std::numeric_limits<float>::quiet_NaN()); });
  queries("select-inf",
          [number](auto* v) { number(v, 0, -std::numeric_limits<float>::infinity()); });
  queries("select-overflow", [number](auto* v) {
    for (size_t i = 0; i < 128; ++i) number(v, i, 3e38f);
  });
  item("select-layer", [](auto* i) { i->set_layer(2); });
  item("select-budget-zero", [](auto* i) { i->mutable_select()->set_budget_tokens(0); });
  item("select-unknown", [](auto* i) { i->mutable_sequence()->set_name("nobody"); });
  item("select-stale-generation", [](auto* i) { i->mutable_sequence()->set_generation(999999); });
  item("select-stale-boot-id",
       [this](auto* i) { i->mutable_sequence()->set_boot_id(ready_handle_.boot_id() + 1); });
  item("select-not-ready", [](auto* i) { i->mutable_sequence()->set_name("filling"); });
}

void BadInput::AddRecallCases() {
  const auto recall = [this](const char* name,
                             std::function<void(v1::RecallClustersRequest*)> change) {
    cases_[name] = [this, change = std::move(change)] { return Recall(change); };
  };
  recall("recall-kv-head", [](auto* r) { r->mutable_heads(0)->set_kv_head(2); });
  recall("recall-position", [](auto* r) { r->mutable_heads(0)->add_positions(3); });
  recall("recall-cluster", [](auto* r) { r->mutable_heads(0)->add_clusters(100000); });
  recall("recall-layer", [](auto* r) { r->set_layer(2); });
  recall("recall-unknown", [](auto* r) { r->mutable_sequence()->set_name("nobody"); });
  const auto step = [this](const char* name, std::function<void(v1::SelectAndRecallItem*)> change) {
    cases_[name] = [this, change = std::move(change)] { return Step(change); };
  };
  step("step-no-attachment", [](auto* i) { i->clear_attachment_id(); });
  step("step-unknown", [](auto* i) { i->set_attachment_id(17); });
  step("step-stale", [](auto* i) { i->set_step(5); });
  step("step-queries", [](auto* i) { i->mutable_queries()->mutable_data()->resize(64 * 4); });
}

void BadInput::AddAppendCases() {
  const auto add = [this](const char* name, std::function<void(v1::AppendKvRequest*)> change) {
    cases_[name] = [this, change = std::move(change)] { return Append(change); };
  };
  add("append-not-ready", [](auto* r) { r->mutable_sequence()->set_name("filling"); });
  add("append-gap", [](auto* r) { r->set_first_token(301); });
  add("append-keys", [](auto* r) { r->mutable_layers(0)->set_keys("0123456789"); });
  add("append-nan", [](auto* r) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    r->mutable_layers(1)->mutable_values()->replace(0, 4, reinterpret_cast<const char*>(&nan), 4);
  });
  add("append-twice", [](auto* r) { r->mutable_layers(1)->set_layer(0); });
  add("append-too-many", [this](auto* r) {
    r->set_tokens(65);
    for (auto& layer : *r->mutable_layers()) {
      layer.set_keys(ready_.Keys(layer.layer(), 300, 65));
      layer.set_values(ready_.Values(layer.layer(), 300, 65));
    }
  });
  cases_["append-conflict"] = [this] {
    EXPECT_TRUE(Append([](auto*) {}).ok());
    return Append([](auto* r) {
      char& byte = (*r->mutable_layers(0)->mutable_keys())[8];
      byte = static_cast<char>(byte ^ 1);
    });
  };
}

void BadInput::AddSessionAndAdminCases() {
  v1::SessionRequest hello, heartbeat;
  hello.mutable_hello()->set_worker("test");
  heartbeat.mutable_heartbeat();
  const auto session = [this](const char* name, std::vector<v1::SessionRequest> messages) {
    cases_[name] = [this, messages = std::move(messages)] { return Session(harness_, messages); };
  };
  session("session-no-hello", {heartbeat});
  session("session-two-hellos", {hello, hello});
  session("session-empty", {v1::SessionRequest()});
  cases_["session-expired"] = [hello] {
    ServiceHarness hasty(Transport::kTcp,
                         [](Config* c) { c->shard.session_ttl = absl::Milliseconds(100); });
    return Session(hasty, {hello});
  };
  const auto evict = [this](const std::string& name) {
    v1::EvictSequenceRequest request;
    request.mutable_sequence()->set_name(name);
    v1::EvictSequenceResponse response;
    return harness_.admin().EvictSequence(MakeContext().get(), request, &response);
  };
  cases_["evict-unknown"] = [evict] { return evict("nobody"); };
  cases_["evict-attached"] = [evict] { return evict("ready"); };
  cases_["force-unknown"] = [this] {
    v1::ForceReleaseWorkerRequest request;
    request.set_session_id(17);
    v1::ForceReleaseWorkerResponse response;
    return harness_.admin().ForceReleaseWorker(MakeContext().get(), request, &response);
  };
}

// Exactly one ErrorInfo, of our domain, whose metadata values all stand in the message.
void CheckDetails(const grpc::Status& status, const std::string& reason) {
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), static_cast<int>(status.error_code()));
  EXPECT_EQ(details.message(), status.error_message());
  ASSERT_EQ(details.details_size(), 1);
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(details.details(0).UnpackTo(&info));
  EXPECT_EQ(info.reason(), reason);
  EXPECT_EQ(info.domain(), "clusterkv");
}

TEST(BadInputTest, EveryRowOfTheTableIsAsItSays) {
  const std::vector<Row> rows = ReadTable();
  ASSERT_GT(rows.size(), 50u);
  BadInput bad_input;
  std::map<std::string, BadInput::Case> left = bad_input.cases();
  const std::string before = bad_input.Fingerprint();
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    const auto found = left.find(row.name);
    if (found == left.end()) {
      ADD_FAILURE() << "no case for this row, or a row twice";
      continue;
    }
    const grpc::Status status = found->second();
    left.erase(found);
    ASSERT_TRUE(Codes().contains(row.code)) << row.code;
    EXPECT_EQ(status.error_code(), Codes().at(row.code)) << status.error_message();
    for (const std::string& word : row.words) EXPECT_THAT(status.error_message(), HasSubstr(word));
    if (row.reason != "–") CheckDetails(status, row.reason);
    EXPECT_EQ(bad_input.LedgerProblems(), "");
  }
  for (const auto& [name, unused] : left) ADD_FAILURE() << "no row for the case " << name;
  EXPECT_EQ(bad_input.Fingerprint(), before) << "an error changed something";
}

TEST(BadInputTest, TheReasonsCodeIsTheTables) {
  for (const Row& row : ReadTable()) {
    if (row.reason == "–") continue;
    v1::ErrorReason reason;
    ASSERT_TRUE(v1::ErrorReason_Parse(row.reason, &reason)) << row.reason;
    EXPECT_EQ(static_cast<int>(CodeOf(reason)), static_cast<int>(Codes().at(row.code))) << row.name;
  }
}

}  // namespace
}  // namespace clusterkv::cache_service::testing
