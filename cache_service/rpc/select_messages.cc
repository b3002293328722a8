#include "cache_service/rpc/select_messages.h"

#define XXH_STATIC_LINKING_ONLY  // the streaming state on the stack
#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "cache_service/rpc/vectors.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "proto/grpc_status.h"

namespace clusterkv::cache_service {
namespace {

using kernels::ElementType;

absl::Status CheckBatch(const RpcContext& rpc, int64_t items) {
  if (items > 0 && items <= rpc.max_batch_items) return absl::OkStatus();
  const std::string expected = "1 to " + std::to_string(rpc.max_batch_items);
  const std::string got = std::to_string(items);
  ErrorMetadata metadata = {{"field", "items"}, {"expected", expected}, {"got", got}};
  if (items == 0) {
    return Error(v1::INVALID_FIELD, "items: expected " + expected + ", got 0", metadata);
  }
  metadata.emplace_back("limit", "max_batch_items");
  return Error(v1::LIMIT_EXCEEDED, "items: expected " + expected + " (max_batch_items), got " + got,
               metadata);
}

std::string ItemField(int index, const char* field) {
  return "items[" + std::to_string(index) + "]." + field;
}

uint32_t Count(size_t count) { return static_cast<uint32_t>(count); }

template <typename From>
void CopyNumbers(const std::vector<From>& from, google::protobuf::RepeatedField<uint32_t>* to) {
  to->Reserve(static_cast<int>(from.size()));
  for (const From number : from) to->AddAlreadyReserved(static_cast<uint32_t>(number));
}

void EncodeState(const SelectAnswer& answer, ElementType type, v1::AttentionState* state) {
  state->set_type(static_cast<v1::ElementType>(type));
  std::string piece;
  std::string* output = state->mutable_output();
  std::string* lse = state->mutable_log_sum_exp();
  for (const kernels::HeadSelection& head : answer.heads) {
    PackNumbers(head.state_output, type, &piece);
    output->append(piece);
    PackNumbers(head.state_lse, ElementType::kFloat32, &piece);
    lse->append(piece);
  }
}

void EncodeCorrection(const SelectAnswer& answer, v1::ValueCorrection* correction) {
  std::string piece;
  for (const kernels::Correction& head : answer.corrections) {
    correction->mutable_codes()->append(reinterpret_cast<const char*>(head.codes.data()),
                                        head.codes.size());
    PackNumbers(head.log_scales, ElementType::kFloat32, &piece);
    correction->mutable_log_scale()->append(piece);
  }
}

void EncodeHead(const kernels::HeadSelection& head, int64_t estimated_tokens, bool want_clusters,
                bool want_zones, v1::HeadSelection* out) {
  CopyNumbers(head.positions, out->mutable_exact_positions());
  CopyNumbers(head.head_masks, out->mutable_head_masks());
  if (want_clusters) CopyNumbers(head.clusters, out->mutable_exact_clusters());
  if (want_zones) {
    CopyNumbers(head.scored_clusters, out->mutable_scored_clusters());
    CopyNumbers(head.estimated_clusters, out->mutable_estimated_clusters());
  }
  out->set_coded_tokens(static_cast<uint32_t>(head.coded_tokens));
  out->set_estimated_tokens(static_cast<uint32_t>(estimated_tokens));
}

void EncodeResult(const SelectAnswer& answer, const SelectEncoding& encoding,
                  v1::SelectResult* result) {
  result->set_generation(answer.generation);
  result->set_layer(static_cast<uint32_t>(answer.layer));
  result->set_window_begin(static_cast<uint32_t>(answer.window_begin));
  const bool want_clusters = encoding.want_zones || answer.cluster_granular;
  for (size_t h = 0; h < answer.heads.size(); ++h) {
    EncodeHead(answer.heads[h], answer.estimated_tokens[h], want_clusters, encoding.want_zones,
               result->add_heads());
  }
  if (encoding.want_state) {
    if (answer.answers()) EncodeState(answer, encoding.state_type, result->mutable_state());
    if (!answer.corrections.empty()) EncodeCorrection(answer, result->mutable_correction());
  }
  result->set_selection_digest(SelectionDigest(answer.heads));
}

}  // namespace

absl::Status ParseSelect(const RpcContext& rpc, const v1::SelectClustersRequest& request,
                         ParsedSelect* parsed) {
  parsed->statuses.clear();
  parsed->calls.clear();
  parsed->shorthand = request.items().empty() && !request.sequence().empty();
  CKV_RETURN_IF_ERROR(CheckBatch(rpc, parsed->shorthand ? 1 : request.items_size()));
  CKV_ASSIGN_OR_RETURN(parsed->encoding.state_type,
                       ParseElementType(request.state_type(), ElementType::kFloat16, "state_type"));
  parsed->encoding.want_state = request.want_state();
  parsed->encoding.want_zones = request.want_zones();
  if (parsed->shorthand) {
    SelectCall call;
    call.sequence.set_name(request.sequence());
    call.layer = request.layer();
    if (request.has_budget_tokens()) call.select.set_budget_tokens(request.budget_tokens());
    parsed->statuses.push_back(
        ParseVector(request.queries(), "queries", v1::NON_FINITE_QUERY, &call.queries));
    if (parsed->statuses.back().ok()) parsed->calls.push_back(std::move(call));
    return absl::OkStatus();
  }
  for (int i = 0; i < request.items_size(); ++i) {
    const v1::SelectItem& item = request.items(i);
    SelectCall call;
    absl::Status status =
        ParseVector(item.queries(), ItemField(i, "queries"), v1::NON_FINITE_QUERY, &call.queries);
    if (status.ok()) {
      call.sequence = item.sequence();
      call.layer = item.layer();
      call.select = item.select();
      parsed->calls.push_back(std::move(call));
    }
    parsed->statuses.push_back(std::move(status));
  }
  return absl::OkStatus();
}

absl::Status ParseSelect(const RpcContext& rpc, const v1::SelectAndRecallRequest& request,
                         ParsedSelect* parsed) {
  parsed->statuses.clear();
  parsed->calls.clear();
  parsed->shorthand = false;
  CKV_RETURN_IF_ERROR(CheckBatch(rpc, request.items_size()));
  CKV_ASSIGN_OR_RETURN(parsed->encoding.state_type,
                       ParseElementType(request.state_type(), ElementType::kFloat16, "state_type"));
  parsed->encoding.want_state = true;
  for (int i = 0; i < request.items_size(); ++i) {
    const v1::SelectAndRecallItem& item = request.items(i);
    SelectCall call;
    absl::Status status =
        ParseVector(item.queries(), ItemField(i, "queries"), v1::NON_FINITE_QUERY, &call.queries);
    if (status.ok() && item.attachment_id() == 0) {
      status = Error(v1::INVALID_FIELD,
                     ItemField(i, "attachment_id") + ": expected what Attach answered, got 0",
                     {{"field", ItemField(i, "attachment_id")}, {"got", "0"}});
    }
    if (status.ok()) {
      call.attachment_id = item.attachment_id();
      call.layer = item.layer();
      call.recall = true;
      call.step = item.step();
      call.reset_residency = item.reset_residency();
      parsed->calls.push_back(std::move(call));
    }
    parsed->statuses.push_back(std::move(status));
  }
  return absl::OkStatus();
}

void EncodeSelection(const RpcContext& rpc, Method method, const ParsedSelect& parsed,
                     const SelectBatchAnswer& answer, v1::SelectClustersResponse* response) {
  size_t call = 0;
  int64_t state_bytes = 0;
  for (const absl::Status& parse_status : parsed.statuses) {
    v1::SelectResult* result = response->add_results();
    const SelectAnswer* item = parse_status.ok() ? &answer.items[call++] : nullptr;
    const absl::Status status = rpc.Placed(item == nullptr ? parse_status : item->status);
    if (!status.ok()) {
      *result->mutable_error() = ToRpcStatus(status);
      rpc.CountError(method, status);
      continue;
    }
    EncodeResult(*item, parsed.encoding, result);
    state_bytes += static_cast<int64_t>(
        result->state().output().size() + result->state().log_sum_exp().size() +
        result->correction().codes().size() + result->correction().log_scale().size());
  }
  if (state_bytes > 0) rpc.metrics->AddStateBytes(state_bytes);
  response->set_queue_us(static_cast<uint32_t>(absl::ToInt64Microseconds(answer.queued)));
  response->set_select_us(static_cast<uint32_t>(absl::ToInt64Microseconds(answer.worked)));
  rpc.metrics->RecordStage(Stage::kQueue, answer.queued);
  rpc.metrics->RecordStage(Stage::kSelect, answer.worked);
  if (answer.refined > absl::ZeroDuration()) {
    rpc.metrics->RecordStage(Stage::kRefine, answer.refined);
  }
}

int64_t RecordPacker::Next(int64_t max_bytes, v1::RecordChunk* chunk) {
  const Run& run = runs_[run_];
  const size_t left = run.positions->size() - next_;
  const size_t fit = static_cast<size_t>(std::max<int64_t>(1, max_bytes / run.record_bytes));
  const size_t count = run.by_link ? left : std::min(left, fit);
  chunk->set_item(run.item);
  chunk->set_layer(run.layer);
  chunk->set_kv_head(run.kv_head);
  auto* positions = chunk->mutable_positions();
  positions->Reserve(static_cast<int>(count));
  for (size_t i = next_; i < next_ + count; ++i) {
    positions->AddAlreadyReserved(static_cast<uint32_t>((*run.positions)[i]));
  }
  std::string* records = chunk->mutable_records();
  if (run.by_link) {
    chunk->set_by_link(true);
  } else {
    records->reserve(count * static_cast<size_t>(run.record_bytes));
    for (size_t i = next_; i < next_ + count; ++i) {
      records->append(reinterpret_cast<const char*>((*run.records)[i]),
                      static_cast<size_t>(run.record_bytes));
    }
    chunk->set_checksum(RecordsChecksum(*records));
  }
  next_ += count;
  if (next_ == run.positions->size()) {
    ++run_;
    next_ = 0;
  }
  return static_cast<int64_t>(records->size());
}

void AddRecalls(const ParsedSelect& parsed, const SelectBatchAnswer& answer, RecordPacker* packer) {
  size_t call = 0;
  for (size_t i = 0; i < parsed.statuses.size(); ++i) {
    if (!parsed.statuses[i].ok()) continue;
    const SelectAnswer& item = answer.items[call++];
    if (!item.status.ok()) continue;
    for (size_t h = 0; h < item.recalls.size(); ++h) {
      packer->Add({Count(i), static_cast<uint32_t>(item.layer), Count(h),
                   &item.recalls[h].positions, &item.recalls[h].records, item.record_bytes,
                   item.by_link});
    }
  }
}

uint64_t RecordsChecksum(const std::string& records) {
  return XXH3_64bits(records.data(), records.size());
}

uint64_t SelectionDigest(const std::vector<kernels::HeadSelection>& heads) {
  XXH3_state_t state;
  XXH3_INITSTATE(&state);
  XXH3_64bits_reset(&state);
  for (const kernels::HeadSelection& head : heads) {
    XXH3_64bits_update(&state, head.positions.data(), head.positions.size() * sizeof(int32_t));
    XXH3_64bits_update(&state, head.head_masks.data(), head.head_masks.size() * sizeof(uint32_t));
  }
  return XXH3_64bits_digest(&state);
}

void SplitIndexChunk(v1::IndexChunk chunk, int64_t max_bytes, std::vector<v1::IndexChunk>* out) {
  const int clusters = chunk.sizes_size();
  const auto size = static_cast<int64_t>(chunk.ByteSizeLong());
  if (size <= max_bytes || clusters <= 1) {
    out->push_back(std::move(chunk));
    return;
  }
  const int pieces =
      static_cast<int>(std::min<int64_t>(clusters, (size + max_bytes - 1) / max_bytes));
  int64_t first_position = 0;
  for (int piece = 0; piece < pieces; ++piece) {
    const int begin = static_cast<int>(int64_t{clusters} * piece / pieces);
    const int end = static_cast<int>(int64_t{clusters} * (piece + 1) / pieces);
    v1::IndexChunk part;
    part.set_kv_head(chunk.kv_head());
    part.set_part(chunk.part());
    part.set_first_cluster(chunk.first_cluster() + static_cast<uint32_t>(begin));
    int64_t tokens = 0;
    for (int c = begin; c < end; ++c) {
      part.add_sizes(chunk.sizes(c));
      tokens += chunk.sizes(c);
    }
    const auto copy_rows = [&](const v1::Vector& from, v1::Vector* to) {
      const size_t row = from.data().size() / static_cast<size_t>(clusters);
      to->set_type(from.type());
      to->set_data(from.data().substr(row * static_cast<size_t>(begin),
                                      row * static_cast<size_t>(end - begin)));
    };
    if (chunk.has_centroids()) copy_rows(chunk.centroids(), part.mutable_centroids());
    if (chunk.has_value_means()) copy_rows(chunk.value_means(), part.mutable_value_means());
    if (chunk.positions_size() > 0) {
      const auto* from = chunk.positions().data() + first_position;
      part.mutable_positions()->Add(from, from + tokens);
    }
    first_position += tokens;
    if (piece == 0 && chunk.has_metric_weights()) {
      *part.mutable_metric_weights() = chunk.metric_weights();
    }
    out->push_back(std::move(part));
  }
}

}  // namespace clusterkv::cache_service
