#include "cache_service/recall.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "kernels/base/element_type.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

using kernels::IndexPartView;

// The part that holds `position`, or -1.
int32_t PartOf(const LayerSnapshot& snapshot, int64_t position) {
  const auto& parts = snapshot.parts;
  const auto after =
      std::upper_bound(parts.begin(), parts.end(), position,
                       [](int64_t token, const auto& part) { return token < part->first_token(); });
  if (after == parts.begin()) return -1;
  const auto part = std::prev(after);
  return position < (*part)->end_token() ? static_cast<int32_t>(part - parts.begin()) : -1;
}

// One cluster of one head: where its tokens lie.
struct ClusterPlace {
  int32_t part = 0;
  int64_t begin = 0, end = 0;  // slots, with the head's offset
};

ClusterPlace PlaceOf(const LayerSnapshot& snapshot, int64_t kv_head, int64_t cluster) {
  const auto& first = snapshot.first_cluster;
  const auto part = std::upper_bound(first.begin(), first.end(), cluster) - first.begin() - 1;
  const IndexPartView& view = snapshot.views[static_cast<size_t>(part)];
  const int64_t at = kv_head * (view.clusters + 1) + cluster - first[static_cast<size_t>(part)];
  const int64_t offset = kv_head * view.tokens;
  return {static_cast<int32_t>(part), offset + *view.cluster_begin.As<int32_t>(at),
          offset + *view.cluster_begin.As<int32_t>(at + 1)};
}

absl::Status CheckHead(const LayerSnapshot& snapshot, const kernels::KvShape& shape,
                       const v1::RecallClustersRequest::Head& head, int64_t* records) {
  if (head.kv_head() >= shape.kv_heads) {
    return FieldError(v1::INVALID_FIELD, "heads.kv_head", absl::StrCat("0 to ", shape.kv_heads - 1),
                      absl::StrCat(head.kv_head()));
  }
  for (uint32_t position : head.positions()) {
    if (PartOf(snapshot, position) >= 0) continue;
    return FieldError(
        v1::TOKENS_OUT_OF_RANGE, "heads.positions",
        absl::StrCat("clustered tokens, ", snapshot.sink_tokens, " to ", snapshot.window_begin - 1),
        absl::StrCat(position));
  }
  *records += head.positions_size();
  for (uint32_t cluster : head.clusters()) {
    if (cluster >= snapshot.first_cluster.back()) {
      return FieldError(v1::INVALID_FIELD, "heads.clusters",
                        absl::StrCat("less than ", snapshot.first_cluster.back()),
                        absl::StrCat(cluster));
    }
    const ClusterPlace place = PlaceOf(snapshot, head.kv_head(), cluster);
    *records += place.end - place.begin;
  }
  return absl::OkStatus();
}

// Rows of halves as floats.
void PackHalves(const kernels::PagedView& view, int64_t first, int64_t count, v1::Vector* vector) {
  vector->set_type(v1::ELEMENT_TYPE_FLOAT32);
  const int64_t row = view.element_bytes / static_cast<int64_t>(sizeof(uint16_t));
  std::vector<float> floats(static_cast<size_t>(count * row));
  kernels::ForEachRun(view, first, first + count,
                      [&](const std::byte* run, int64_t index, int64_t n) {
                        kernels::HalvesToFloat(reinterpret_cast<const uint16_t*>(run), n * row,
                                               &floats[static_cast<size_t>((index - first) * row)]);
                      });
  vector->set_data(floats.data(), floats.size() * sizeof(float));
}

}  // namespace

RecordPins::RecordPins(SequenceRef sequence, std::shared_ptr<const LayerSnapshot> snapshot,
                       bool verify_checksums)
    : scope_(sequence->calls()),
      sequence_(std::move(sequence)),
      snapshot_(std::move(snapshot)),
      verify_checksums_(verify_checksums),
      pins_(snapshot_->parts.size()),
      pinned_(snapshot_->parts.size(), false) {}

absl::StatusOr<const std::byte*> RecordPins::Take(int32_t part_index, int64_t index) {
  const size_t i = static_cast<size_t>(part_index);
  const IndexPart& part = *snapshot_->parts[i];
  if (!pinned_[i]) {
    pins_[i] = part.block().MakePin();
    pinned_[i] = true;
  }
  if (verify_checksums_) {
    const int64_t page = part.RecordPage(index);
    if (verified_.emplace(part_index, page).second) {
      CKV_RETURN_IF_ERROR(part.block().VerifyPage(page));
    }
  }
  return part.view().records.At(index);
}

absl::StatusOr<Shard::RecallAnswer> RecallRecords(const SequenceRef& sequence,
                                                  std::shared_ptr<const LayerSnapshot> snapshot,
                                                  const v1::RecallClustersRequest& request,
                                                  bool verify_checksums) {
  const SequenceParams& params = sequence->params();
  const LayerSnapshot& layer = *snapshot;
  int64_t records = 0;
  const int64_t most = params.shape.kv_heads * (layer.window_begin - layer.sink_tokens);
  for (const auto& head : request.heads()) {
    CKV_RETURN_IF_ERROR(CheckHead(layer, params.shape, head, &records));
    if (records > most) return LimitError("records of one recall", most, records);
  }
  Shard::RecallAnswer answer;
  answer.record_bytes = params.codec->RecordBytes(params.shape.element_type, params.shape.head_dim);
  auto pins = std::make_shared<RecordPins>(sequence, std::move(snapshot), verify_checksums);
  for (const auto& head : request.heads()) {
    Shard::Recalled& recalled = answer.heads.emplace_back();
    recalled.kv_head = head.kv_head();
    const auto take = [&](int32_t part, int64_t index, int32_t position) -> absl::Status {
      CKV_ASSIGN_OR_RETURN(const std::byte* record, pins->Take(part, index));
      recalled.positions.push_back(position);
      recalled.records.push_back(record);
      return absl::OkStatus();
    };
    for (uint32_t position : head.positions()) {
      const int32_t part = PartOf(layer, position);
      const int64_t index =
          layer.parts[static_cast<size_t>(part)]->RecordIndex(head.kv_head(), position);
      CKV_RETURN_IF_ERROR(take(part, index, static_cast<int32_t>(position)));
    }
    for (uint32_t cluster : head.clusters()) {
      const ClusterPlace place = PlaceOf(layer, head.kv_head(), cluster);
      const IndexPartView& view = layer.views[static_cast<size_t>(place.part)];
      for (int64_t index = place.begin; index < place.end; ++index) {
        CKV_RETURN_IF_ERROR(take(place.part, index, *view.positions.As<int32_t>(index)));
      }
    }
  }
  answer.pins = std::move(pins);
  return answer;
}

std::vector<v1::IndexChunk> DescribeIndex(const SequenceParams& params,
                                          const LayerSnapshot& snapshot,
                                          const v1::GetIndexRequest& request) {
  std::vector<v1::IndexChunk> chunks;
  for (int64_t head = 0; head < params.shape.kv_heads; ++head) {
    for (size_t part = 0; part < snapshot.views.size(); ++part) {
      const IndexPartView& view = snapshot.views[part];
      v1::IndexChunk& chunk = chunks.emplace_back();
      chunk.set_kv_head(static_cast<uint32_t>(head));
      chunk.set_part(static_cast<uint32_t>(part));
      chunk.set_first_cluster(static_cast<uint32_t>(snapshot.first_cluster[part]));
      for (int64_t c = 0; c < view.clusters; ++c) {
        const int64_t at = head * (view.clusters + 1) + c;
        chunk.add_sizes(static_cast<uint32_t>(*view.cluster_begin.As<int32_t>(at + 1) -
                                              *view.cluster_begin.As<int32_t>(at)));
      }
      if (request.want_centroids()) {
        PackHalves(view.centroids, head * view.clusters, view.clusters, chunk.mutable_centroids());
        // The first of a head's three rows of channels is the metric's weight.
        v1::Vector* weights = chunk.mutable_metric_weights();
        weights->set_type(v1::ELEMENT_TYPE_FLOAT32);
        weights->set_data(view.channels.At(head),
                          static_cast<size_t>(params.shape.head_dim) * sizeof(float));
      }
      if (request.want_value_means()) {
        PackHalves(view.value_means, head * view.clusters, view.clusters,
                   chunk.mutable_value_means());
      }
      if (!request.want_positions()) continue;
      for (int64_t slot = 0; slot < view.tokens; ++slot) {
        chunk.add_positions(
            static_cast<uint32_t>(*view.positions.As<int32_t>(head * view.tokens + slot)));
      }
    }
  }
  return chunks;
}

}  // namespace clusterkv::cache_service
