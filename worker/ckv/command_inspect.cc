// ckv inspect: the clusters of one layer: how large they are, and where in the text their tokens
// lie.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "kernels/base/status_macros.h"
#include "proto/grpc_status.h"
#include "worker/ckv/command.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/exit_code.h"
#include "worker/ckv/svg.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

// The clusters of one KV head over all parts.
struct HeadClusters {
  std::vector<uint32_t> sizes;
  std::vector<std::vector<uint32_t>> positions;  // [clusters], ascending
};

absl::StatusOr<std::vector<HeadClusters>> FetchClusters(Client* client,
                                                        const v1::SequenceHandle& handle,
                                                        int64_t layer, int64_t kv_heads) {
  v1::GetIndexRequest request;
  *request.mutable_sequence() = handle;
  request.set_layer(layer);
  request.set_want_positions(true);
  const auto context = client->MakeContext();
  auto reader = client->cache().GetIndex(context.get(), request);
  std::vector<HeadClusters> heads(kv_heads);
  v1::IndexChunk chunk;
  bool sane = true;
  while (reader->Read(&chunk)) {
    const int64_t named = std::accumulate(chunk.sizes().begin(), chunk.sizes().end(), int64_t{0});
    sane = sane && chunk.kv_head() < heads.size() && named == chunk.positions_size();
    if (!sane) continue;  // read on, so that the stream ends by itself
    HeadClusters& head = heads[chunk.kv_head()];
    int at = 0;
    for (const uint32_t size : chunk.sizes()) {
      head.sizes.push_back(size);
      head.positions.emplace_back(chunk.positions().begin() + at,
                                  chunk.positions().begin() + at + static_cast<int>(size));
      at += static_cast<int>(size);
    }
  }
  if (const grpc::Status status = reader->Finish(); !status.ok()) return FromGrpcStatus(status);
  if (!sane) return absl::InternalError("the server's index names other tokens than it counts");
  return heads;
}

struct SizeSummary {
  int64_t clusters = 0, empty = 0, largest = 0, median = 0;
  double mean = 0;
  double median_span = 0;  // of the tokens between a cluster's first and last
};

SizeSummary Summarize(const HeadClusters& head) {
  SizeSummary summary;
  std::vector<uint32_t> sizes;
  std::vector<double> spans;
  for (size_t c = 0; c < head.sizes.size(); ++c) {
    if (head.sizes[c] == 0) continue;
    sizes.push_back(head.sizes[c]);
    spans.push_back(head.positions[c].back() - head.positions[c].front() + 1.0);
  }
  summary.clusters = static_cast<int64_t>(head.sizes.size());
  summary.empty = summary.clusters - static_cast<int64_t>(sizes.size());
  if (sizes.empty()) return summary;
  std::sort(sizes.begin(), sizes.end());
  std::sort(spans.begin(), spans.end());
  summary.largest = sizes.back();
  summary.median = sizes[sizes.size() / 2];
  summary.mean = std::accumulate(sizes.begin(), sizes.end(), 0.0) / sizes.size();
  summary.median_span = spans[spans.size() / 2];
  return summary;
}

// Clusters by size: bucket b holds sizes [2^b, 2^(b+1)).
std::vector<int64_t> SizeHistogram(const std::vector<HeadClusters>& heads) {
  std::vector<int64_t> counts;
  for (const HeadClusters& head : heads) {
    for (const uint32_t size : head.sizes) {
      if (size == 0) continue;
      const size_t bucket = static_cast<size_t>(std::log2(size));
      if (counts.size() <= bucket) counts.resize(bucket + 1);
      ++counts[bucket];
    }
  }
  return counts;
}

std::string BucketName(size_t bucket) {
  const int64_t low = int64_t{1} << bucket, high = 2 * low - 1;
  return low == high ? std::to_string(low) : std::to_string(low) + "–" + std::to_string(high);
}

constexpr double kLeft = 64, kWidth = 640, kMapTop = 250, kMapHeight = 320;

void DrawHistogram(const std::vector<int64_t>& counts, Svg* svg) {
  const int64_t most = counts.empty() ? 1 : *std::max_element(counts.begin(), counts.end());
  const double step = kWidth / std::max<size_t>(1, counts.size());
  constexpr double kBase = 196, kHeight = 130;
  for (size_t b = 0; b < counts.size(); ++b) {
    const double height = kHeight * counts[b] / most;
    const double x = kLeft + step * b;
    svg->Rectangle({x + 3, kBase - height}, step - 6, height, "c0",
                   HumanCount(counts[b]) + " clusters of " + BucketName(b) + " tokens");
    svg->Text({x + step / 2, kBase - height - 4}, HumanCount(counts[b]), Svg::Anchor::kMiddle, 11);
    svg->Text({x + step / 2, kBase + 15}, BucketName(b), Svg::Anchor::kMiddle, 11);
  }
  svg->Line({kLeft, kBase}, {kLeft + kWidth, kBase}, "ink");
  svg->Text({kLeft, 46}, "Clusters by their number of tokens, all KV heads", Svg::Anchor::kStart,
            13);
}

// Rows: clusters of one KV head in order of their mean position, in bands; columns: the sequence's
// positions in bands. A cell is the darker the more of its band of clusters' tokens lie there.
void DrawHeatMap(const HeadClusters& head, int64_t kv_head, int64_t tokens, Svg* svg) {
  constexpr int kRows = 40, kColumns = 80;
  std::vector<std::pair<double, size_t>> order;
  for (size_t c = 0; c < head.sizes.size(); ++c) {
    if (head.sizes[c] == 0) continue;
    const auto& at = head.positions[c];
    order.emplace_back(std::accumulate(at.begin(), at.end(), 0.0) / at.size(), c);
  }
  std::sort(order.begin(), order.end());
  std::vector<double> cells(kRows * kColumns), rows(kRows);
  for (size_t rank = 0; rank < order.size(); ++rank) {
    const size_t row = rank * kRows / order.size();
    for (const uint32_t position : head.positions[order[rank].second]) {
      const size_t column =
          std::min<size_t>(kColumns - 1, static_cast<size_t>(position) * kColumns / tokens);
      ++cells[row * kColumns + column];
      ++rows[row];
    }
  }
  const double width = kWidth / kColumns, height = kMapHeight / kRows;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      const double share = rows[row] == 0 ? 0 : cells[row * kColumns + column] / rows[row];
      if (share == 0) continue;
      svg->Cell({kLeft + column * width, kMapTop + row * height}, width, height, "c0",
                std::min(1.0, 0.08 + 1.4 * std::sqrt(share)));
    }
  }
  svg->Line({kLeft, kMapTop + kMapHeight}, {kLeft + kWidth, kMapTop + kMapHeight}, "ink");
  svg->Line({kLeft, kMapTop}, {kLeft, kMapTop + kMapHeight}, "ink");
  svg->Text({kLeft, kMapTop - 12},
            "Where the tokens of KV head " + std::to_string(kv_head) + "'s clusters lie",
            Svg::Anchor::kStart, 13);
  svg->Text({kLeft, kMapTop + kMapHeight + 18}, "0", Svg::Anchor::kStart, 12);
  svg->Text({kLeft + kWidth / 2, kMapTop + kMapHeight + 18}, "position in the sequence",
            Svg::Anchor::kMiddle, 12);
  svg->Text({kLeft + kWidth, kMapTop + kMapHeight + 18}, HumanCount(tokens), Svg::Anchor::kEnd, 12);
  svg->Text({40, kMapTop + kMapHeight / 2}, "clusters, by mean position", Svg::Anchor::kMiddle, 12,
            "ink", -90);
}

class InspectCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    server_.Register(flags);
    flags.String("sequence", "NAME", &sequence_, "which one").required = true;
    flags.Int("layer", "N", &layer_, 0, 1023, "which layer");
    flags.Int("kv_head", "N", &kv_head_, 0, 255, "whose positions the picture maps");
    flags.String("svg", "FILE", &svg_, "write a picture of sizes and positions");
  }

  absl::Status Run() override {
    CKV_ASSIGN_OR_RETURN(auto client, ConnectClient(server_, /*session=*/false));
    v1::SequenceHandle handle;
    handle.set_name(sequence_);
    CKV_ASSIGN_OR_RETURN(const v1::Sequence sequence, client->GetSequence(handle));
    const int64_t kv_heads = sequence.shape().kv_heads();
    if (kv_head_ >= kv_heads) {
      return UsageError("--kv_head: expected 0 to " + std::to_string(kv_heads - 1) + ", got " +
                        std::to_string(kv_head_));
    }
    CKV_ASSIGN_OR_RETURN(const auto heads,
                         FetchClusters(client.get(), sequence.handle(), layer_, kv_heads));
    Print(sequence, heads);
    if (svg_.empty()) return absl::OkStatus();
    Svg svg(768, 604, "Clusters of " + sequence_ + ", layer " + std::to_string(layer_));
    svg.Text({kLeft, 26}, sequence_ + ", layer " + std::to_string(layer_), Svg::Anchor::kStart, 15);
    DrawHistogram(SizeHistogram(heads), &svg);
    DrawHeatMap(heads[kv_head_], kv_head_, std::max<int64_t>(1, sequence.tokens()), &svg);
    return WriteFile(svg_, svg.Finish());
  }

 private:
  void Print(const v1::Sequence& sequence, const std::vector<HeadClusters>& heads) const {
    std::printf("%s  %s, %s tokens, %u layers, preset %s, codec %s\n\n",
                Colored(sequence_ + ", layer " + std::to_string(layer_), Color::kBold).c_str(),
                StateName(sequence.state()).c_str(), HumanCount(sequence.tokens()).c_str(),
                sequence.shape().layers(), sequence.preset().c_str(), sequence.codec().c_str());
    Table table({"KV head", "clusters", "empty", "mean size", "median", "largest", "median span"});
    for (size_t h = 0; h < heads.size(); ++h) {
      const SizeSummary summary = Summarize(heads[h]);
      table.AddRow({std::to_string(h), HumanCount(summary.clusters), HumanCount(summary.empty),
                    Significant(summary.mean, 3), HumanCount(summary.median),
                    HumanCount(summary.largest), Significant(summary.median_span, 3)});
    }
    std::printf("%s\nclusters by size\n", table.Text().c_str());
    const std::vector<int64_t> counts = SizeHistogram(heads);
    const int64_t most = counts.empty() ? 1 : *std::max_element(counts.begin(), counts.end());
    for (size_t b = 0; b < counts.size(); ++b) {
      std::printf("%11s  %s %s\n", BucketName(b).c_str(),
                  Bar(static_cast<double>(counts[b]) / most, 32).c_str(),
                  HumanCount(counts[b]).c_str());
    }
  }

  ServerFlags server_;
  std::string sequence_, svg_;
  int64_t layer_ = 0, kv_head_ = 0;
};

}  // namespace

std::unique_ptr<Command> MakeInspectCommand() { return std::make_unique<InspectCommand>(); }

}  // namespace clusterkv::worker::ckv
