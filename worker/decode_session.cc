#include "worker/decode_session.h"

#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/correction.h"
#include "kernels/base/host_id.h"
#include "kernels/base/status_macros.h"
#include "kernels/codec/record_codec.h"
#include "proto/error.h"
#include "proto/grpc_status.h"
#include "worker/layer_cache.h"
#include "worker/recall_stream.h"
#include "worker/record_window.h"
#include "worker/steady_rows.h"
#include "worker/transport_failure.h"

namespace clusterkv::worker {
namespace {

using Clock = std::chrono::steady_clock;
using kernels::ElementType;

constexpr absl::Duration kDetachTimeout = absl::Seconds(2);
// Meeting the service over a link; records that are under way.
constexpr absl::Duration kConnectTimeout = absl::Seconds(6), kRecordsTimeout = absl::Seconds(2);

ElementType ElementTypeOf(v1::ElementType type, ElementType otherwise) {
  return type == v1::ELEMENT_TYPE_UNSPECIFIED ? otherwise : static_cast<ElementType>(type);
}

double MicrosBetween(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::micro>(end - begin).count();
}

// XXH3-64 of everything added.
class RunningDigest {
 public:
  RunningDigest() : state_(XXH3_createState(), &XXH3_freeState) { XXH3_64bits_reset(state_.get()); }
  void Add(const void* data, size_t bytes) { XXH3_64bits_update(state_.get(), data, bytes); }
  uint64_t Finish() const { return XXH3_64bits_digest(state_.get()); }

 private:
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state_;
};

struct Layer {
  Layer(SteadyRows steady_rows, LayerCache layer_cache)
      : steady(std::move(steady_rows)), cache(std::move(layer_cache)) {}

  SteadyRows steady;
  LayerCache cache;
  uint64_t step = 0;
  bool reset = false;                      // the next request resets the residency
  std::string unsent_keys, unsent_values;  // [unsent, kv_heads, head_dim]: the window's last tokens
  int64_t unsent = 0;
  RunningDigest selection, state, correction, recalled;

  // The mirror is not known to be right any more.
  void Distrust() {
    cache.Clear();
    reset = true;
  }
};

}  // namespace

const char* LinkName(v1::Link link) {
  return link == v1::LINK_PEER ? "peer" : link == v1::LINK_NCCL ? "nccl" : "grpc";
}

struct DecodeSession::Impl {
  ~Impl();

  absl::Status CallAttach(const v1::SequenceHandle& handle);
  RecordWindow::Layout WindowLayout() const;
  // The caller's, for links that may be asked for.
  void MakeCallersWindow();
  // Sets up the link that Attach chose; without it records come by gRPC.
  void ConnectLink();
  absl::Status TryConnectLink();
  // Gives the link up, for `reason`.
  void DropLink(const std::string& reason);
  absl::Status TakeLinked(const Layer& layer, int64_t index);
  absl::Status CheckLayout();
  absl::Status MakeLayers();
  absl::Status FetchSteadyZone();

  absl::Status CheckLayer(int64_t layer) const;
  std::vector<v1::AppendKvRequest> MakeAppends() const;
  absl::Status CallAppend(const v1::AppendKvRequest& request);
  absl::Status Flush();
  absl::Status ReturnToServer();
  absl::Status Recover(const absl::Status& failure, Layer* layer);
  void Abandon(Layer* layer);

  // `output` may be empty: recalls only.
  absl::Status CheckQueries(int64_t index, absl::Span<const std::byte> queries) const;
  absl::Status Step(int64_t index, absl::Span<const std::byte> queries, absl::Span<float> output,
                    StepFigures* figures);
  absl::Status TryStep(int64_t index, absl::Span<const std::byte> queries, absl::Span<float> output,
                       StepFigures* figures);
  void MakeRequest(int64_t index, absl::Span<const std::byte> queries);
  absl::Status Exchange(Layer* layer, int64_t index, StepFigures* figures);
  absl::Status TakeSelection(Layer* layer, int64_t index, const v1::SelectResult& result);
  absl::Status TakeState(const v1::AttentionState& state);
  absl::Status TakeCorrection(const v1::ValueCorrection& answered);
  absl::Status Attend(const Layer& layer, absl::Span<const std::byte> queries,
                      absl::Span<float> output);
  void UpdateDigests(Layer* layer) const;

  Client* client = nullptr;
  DecodeOptions options;
  v1::AttachResponse attachment;
  ElementType type = ElementType::kBFloat16;
  int64_t kv_heads = 0, query_heads = 0, head_dim = 0;
  const kernels::RecordCodec* codec = nullptr;
  std::vector<Layer> layers;
  std::unique_ptr<RecordWindow> window;  // null: none; then link is GRPC
  absl::Status callers_window;           // why there is none
  v1::Link link = v1::LINK_GRPC;
  uint32_t link_generation = 0;
  std::string link_reason;
  std::unique_ptr<RecallStream> stream;  // null: none is open

  // Of the step under way; kept for their memory.
  v1::SelectAndRecallRequest request;
  v1::SelectAndRecallResponse response;
  v1::AttentionState state;                  // as received
  std::vector<float> state_output;           // [query_heads, head_dim], or empty
  std::vector<float> state_lse;              // [query_heads], or empty
  v1::ValueCorrection correction;            // as received
  std::vector<int8_t> correction_codes;      // [query_heads, head_dim], or empty
  std::vector<float> correction_log_scales;  // [query_heads], or empty
  std::vector<float> query_floats;
  std::vector<float> output_lse;  // [group]
  uint64_t request_id = 0;
  uint32_t response_link_generation = 0;
  // The service refused the step and said so in a whole exchange: residency, mirror and stream are
  // as before it.
  bool refused = false;
};

DecodeSession::Impl::~Impl() {
  stream.reset();
  if (attachment.attachment_id() == 0) return;
  const auto deadline = absl::ToChronoTime(absl::Now() + kDetachTimeout);
  for (const v1::AppendKvRequest& append : MakeAppends()) {
    grpc::ClientContext append_context;
    append_context.set_deadline(deadline);
    v1::AppendKvResponse appended;
    if (!client->cache().AppendKv(&append_context, append, &appended).ok()) break;
  }
  grpc::ClientContext context;
  context.set_deadline(deadline);
  v1::DetachRequest detach;
  detach.set_attachment_id(attachment.attachment_id());
  v1::DetachResponse answer;
  client->cache().Detach(&context, detach, &answer);  // else the session or the ttl ends it
}

absl::Status DecodeSession::Impl::CallAttach(const v1::SequenceHandle& handle) {
  v1::AttachRequest attach;
  *attach.mutable_sequence() = handle;
  attach.set_session_id(client->session_id());
  *attach.mutable_hot_cache() = options.hot_cache;
  *attach.mutable_select() = options.select;
  for (const v1::Link link : options.links) attach.add_links(link);
  if (attach.links().empty()) attach.add_links(v1::LINK_GRPC);
  attach.set_host(kernels::HostId());
  v1::AttachResponse answer;
  CKV_RETURN_IF_ERROR(
      FromGrpcStatus(client->cache().Attach(client->MakeContext().get(), attach, &answer)));
  attachment = std::move(answer);
  link = v1::LINK_GRPC;
  link_reason = attachment.link_reason();
  return absl::OkStatus();
}

RecordWindow::Layout DecodeSession::Impl::WindowLayout() const {
  RecordWindow::Layout layout;
  layout.layers = static_cast<int64_t>(layers.size());
  layout.kv_heads = kv_heads;
  layout.slots = layers[0].cache.slot_count();
  layout.record_bytes = codec->RecordBytes(type, head_dim);
  layout.max_records = kv_heads * std::max<int64_t>(1, attachment.max_exact_tokens());
  return layout;
}

void DecodeSession::Impl::MakeCallersWindow() {
  const auto brings_records = [](v1::Link wanted) { return wanted != v1::LINK_GRPC; };
  if (!options.make_window ||
      std::none_of(options.links.begin(), options.links.end(), brings_records)) {
    return;
  }
  absl::StatusOr<std::unique_ptr<RecordWindow>> made = options.make_window(WindowLayout());
  callers_window = made.status();
  if (made.ok()) window = *std::move(made);
}

void DecodeSession::Impl::ConnectLink() {
  if (attachment.link() == v1::LINK_GRPC) return;
  // Those asked for, from the one that the server chose on: the first that can be set up.
  const auto begin = std::find(options.links.begin(), options.links.end(), attachment.link());
  for (auto wanted = begin; wanted != options.links.end() && *wanted != v1::LINK_GRPC; ++wanted) {
    link = *wanted;
    const absl::Status connected = TryConnectLink();
    if (connected.ok()) return;
    absl::StrAppend(&link_reason, link_reason.empty() ? "" : "; ", LinkName(*wanted), ": ",
                    connected.message());
  }
  DropLink("");
}

absl::Status DecodeSession::Impl::TryConnectLink() {
  if (options.make_window) {
    CKV_RETURN_IF_ERROR(callers_window);
  } else if (std::string why = WhyNoWindow(options.device, link); !why.empty()) {
    return absl::UnavailableError(why);
  }
  if (window == nullptr) {
    CKV_ASSIGN_OR_RETURN(window, MakeRecordWindow(options.device, WindowLayout()));
  }
  v1::ConnectLinkRequest connect;
  connect.set_attachment_id(attachment.attachment_id());
  connect.set_link(link);
  if (link == v1::LINK_PEER) {
    CKV_ASSIGN_OR_RETURN(*connect.mutable_window(), window->Export());
  }
  v1::ConnectLinkResponse answer;
  CKV_RETURN_IF_ERROR(
      FromGrpcStatus(client->cache().ConnectLink(client->MakeContext().get(), connect, &answer)));
  if (answer.link() != link) return absl::UnavailableError(answer.link_reason());
  link_generation = answer.generation();
  if (link == v1::LINK_PEER) return absl::OkStatus();
  return window->ConnectNccl(answer.unique_id(), absl::Now() + kConnectTimeout);
}

void DecodeSession::Impl::DropLink(const std::string& reason) {
  link = v1::LINK_GRPC;
  if (!reason.empty()) link_reason = reason;
  if (window == nullptr) return;
  v1::ConnectLinkRequest connect;
  connect.set_attachment_id(attachment.attachment_id());
  connect.set_link(v1::LINK_GRPC);
  v1::ConnectLinkResponse answer;
  // Before the memory goes: after this the service writes into it no more. Best effort: where the
  // service does not answer, it does not write either.
  client->cache().ConnectLink(client->MakeContext().get(), connect, &answer);
  if (!options.make_window) window.reset();  // the caller's has what came before, in its slots
}

// The step's records that came over the link.
absl::Status DecodeSession::Impl::TakeLinked(const Layer& layer, int64_t index) {
  const std::vector<LinkedRecord>& linked = layer.cache.linked();
  if (linked.empty()) return absl::OkStatus();
  if (link == v1::LINK_GRPC || response_link_generation != link_generation) {
    return Error(v1::CHECKSUM_MISMATCH,
                 absl::StrCat("records: by link ", response_link_generation, ", expected ",
                              link == v1::LINK_GRPC ? 0 : link_generation));
  }
  const absl::Time deadline = absl::Now() + kRecordsTimeout;
  absl::Status taken = options.make_window ? window->Receive(link, index, linked, deadline)
                                           : window->Take(link, index, linked, deadline);
  if (taken.ok()) return taken;
  DropLink(std::string(taken.message()));
  // As records that never came: the step is asked for once more, from an empty hot cache.
  return Error(v1::CHECKSUM_MISMATCH, absl::StrCat("records: ", taken.message()));
}

absl::Status DecodeSession::Impl::CheckLayout() {
  const v1::Sequence& sequence = attachment.sequence();
  const v1::KvShape& shape = sequence.shape();
  type = ElementTypeOf(shape.element_type(), ElementType::kBFloat16);
  kv_heads = shape.kv_heads();
  query_heads = shape.query_heads();
  head_dim = shape.head_dim();
  if (kv_heads == 0 || query_heads == 0 || query_heads % kv_heads != 0 || head_dim == 0) {
    return Error(v1::INTERNAL_ERROR,
                 absl::StrCat("sequence: impossible shape ", shape.ShortDebugString()));
  }
  codec = kernels::FindRecordCodec(sequence.codec());
  if (codec == nullptr) {
    return Error(v1::UNSUPPORTED,
                 absl::StrCat("codec: this worker does not know ", sequence.codec()));
  }
  if (codec->RecordBytes(type, head_dim) != sequence.record_bytes()) {
    return Error(v1::UNSUPPORTED, absl::StrCat("codec ", sequence.codec(), ": expected records of ",
                                               codec->RecordBytes(type, head_dim), " bytes, got ",
                                               sequence.record_bytes()));
  }
  return absl::OkStatus();
}

absl::Status DecodeSession::Impl::MakeLayers() {
  CKV_ASSIGN_OR_RETURN(const v1::Sequence sequence,
                       client->GetSequence(attachment.sequence().handle()));
  if (sequence.layers_size() != static_cast<int>(sequence.shape().layers())) {
    return Error(v1::INTERNAL_ERROR, absl::StrCat("layers: expected ", sequence.shape().layers(),
                                                  ", got ", sequence.layers_size()));
  }
  kernels::HotCacheParams params;
  if (options.hot_cache.policy() != v1::HOT_CACHE_POLICY_UNSPECIFIED) {
    params.policy = static_cast<kernels::HotCachePolicy>(options.hot_cache.policy());
  }
  params.capacity_tokens = options.hot_cache.capacity_tokens();
  params.step_tokens = std::max<int64_t>(1, attachment.max_exact_tokens());
  params.steps = std::max<int>(1, static_cast<int>(options.hot_cache.steps()));
  const int64_t row_bytes = head_dim * kernels::ElementBytes(type);
  const int64_t sinks = std::min<int64_t>(sequence.index().sink_tokens(), sequence.prompt_tokens());
  for (const v1::LayerInfo& info : sequence.layers()) {
    if (info.layer() != layers.size()) {
      return Error(v1::INTERNAL_ERROR,
                   absl::StrCat("layers: expected layer ", layers.size(), ", got ", info.layer()));
    }
    if (info.window_begin() < sinks || info.tokens() < info.window_begin()) {
      return Error(v1::INTERNAL_ERROR,
                   absl::StrCat("layer ", info.layer(), ": window_begin: expected ", sinks, " to ",
                                info.tokens(), ", got ", info.window_begin()));
    }
    CKV_ASSIGN_OR_RETURN(LayerCache cache, LayerCache::Create(kv_heads, params, codec,
                                                              codec->RecordBytes(type, head_dim)));
    layers.emplace_back(SteadyRows(kv_heads, row_bytes, sinks, info.tokens(), info.window_begin()),
                        std::move(cache));
  }
  return absl::OkStatus();
}

absl::Status DecodeSession::Impl::FetchSteadyZone() {
  v1::RecallClustersRequest recall;
  *recall.mutable_sequence() = attachment.sequence().handle();
  recall.set_steady_zone(true);
  for (size_t l = 0; l < layers.size(); ++l) recall.add_layers(static_cast<uint32_t>(l));
  const std::unique_ptr<grpc::ClientContext> context = client->MakeContext();
  const auto reader = client->cache().RecallClusters(context.get(), recall);
  v1::RecordChunk chunk;
  absl::Status status;
  while (status.ok() && reader->Read(&chunk)) {
    status = CheckLayer(chunk.layer());
    if (status.ok()) status = layers[chunk.layer()].steady.Add(chunk);
  }
  if (!status.ok()) context->TryCancel();
  const absl::Status finished = FromGrpcStatus(reader->Finish());
  CKV_RETURN_IF_ERROR(status);
  CKV_RETURN_IF_ERROR(finished);
  for (const Layer& layer : layers) CKV_RETURN_IF_ERROR(layer.steady.CheckComplete());
  return absl::OkStatus();
}

absl::Status DecodeSession::Impl::CheckLayer(int64_t layer) const {
  if (layer >= 0 && layer < static_cast<int64_t>(layers.size())) return absl::OkStatus();
  return Error(v1::LAYER_OUT_OF_RANGE,
               absl::StrCat("layer: expected 0 to ", layers.size() - 1, ", got ", layer));
}

// One request for all layers that lack the same tokens: in step, that is one.
std::vector<v1::AppendKvRequest> DecodeSession::Impl::MakeAppends() const {
  std::vector<v1::AppendKvRequest> appends;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    if (layer.unsent == 0) continue;
    const auto first = static_cast<uint32_t>(layer.steady.tokens() - layer.unsent);
    const auto tokens = static_cast<uint32_t>(layer.unsent);
    auto append = std::find_if(appends.begin(), appends.end(), [&](const auto& other) {
      return other.first_token() == first && other.tokens() == tokens;
    });
    if (append == appends.end()) {
      append = appends.emplace(appends.end());
      *append->mutable_sequence() = attachment.sequence().handle();
      append->set_first_token(first);
      append->set_tokens(tokens);
    }
    v1::AppendKvRequest::Layer& rows = *append->add_layers();
    rows.set_layer(static_cast<uint32_t>(l));
    rows.set_keys(layer.unsent_keys);
    rows.set_values(layer.unsent_values);
  }
  return appends;
}

absl::Status DecodeSession::Impl::Flush() {
  for (const v1::AppendKvRequest& append : MakeAppends()) {
    CKV_RETURN_IF_ERROR(CallAppend(append));
    for (const v1::AppendKvRequest::Layer& rows : append.layers()) {
      Layer& layer = layers[rows.layer()];
      layer.unsent_keys.clear();
      layer.unsent_values.clear();
      layer.unsent = 0;
    }
  }
  return absl::OkStatus();
}

absl::Status DecodeSession::Impl::CallAppend(const v1::AppendKvRequest& append) {
  const absl::StatusOr<v1::AppendKvResponse> answer = client->AppendKv(append);
  if (answer.ok() || !IsTransportFailure(answer.status())) return answer.status();
  // Idempotent: tokens that are there already are compared.
  CKV_RETURN_IF_ERROR(ReturnToServer());
  return client->AppendKv(append).status();
}

// After a failure of the connection: OK when the same server is there again.
absl::Status DecodeSession::Impl::ReturnToServer() {
  stream.reset();
  CKV_RETURN_IF_ERROR(client->Reconnect(client->call_timeout(), nullptr));
  const v1::SequenceHandle& handle = attachment.sequence().handle();
  const uint64_t boot_id = client->server_info().boot_id();
  if (boot_id == handle.boot_id()) return absl::OkStatus();
  return Error(v1::STALE_BOOT_ID, absl::StrCat("sequence ", handle.name(),
                                               ": the server was restarted: expected boot id ",
                                               handle.boot_id(), ", got ", boot_id));
}

// The exchange broke off somewhere: neither the layer's mirror nor the stream is to be trusted.
void DecodeSession::Impl::Abandon(Layer* layer) {
  if (refused) return;
  layer->Distrust();
  stream.reset();
}

// OK when the step is worth one more attempt.
absl::Status DecodeSession::Impl::Recover(const absl::Status& failure, Layer* layer) {
  Abandon(layer);
  if (IsStreamFailure(failure)) return ReturnToServer();
  switch (ReasonOf(failure)) {
    case v1::RESIDENCY_STALE:
      layer->Distrust();
      return absl::OkStatus();
    case v1::CHECKSUM_MISMATCH:
      // The service's own is final: its pages are not what was sealed.
      return refused ? failure : absl::OkStatus();
    case v1::ATTACHMENT_NOT_FOUND:
      CKV_RETURN_IF_ERROR(CallAttach(attachment.sequence().handle()));
      for (Layer& other : layers) other.Distrust();
      ConnectLink();
      return absl::OkStatus();
    default:
      return failure;
  }
}

void DecodeSession::Impl::MakeRequest(int64_t index, absl::Span<const std::byte> queries) {
  request.Clear();
  request.set_state_type(options.state_type);
  request.set_request_id(++request_id);
  v1::SelectAndRecallItem& item = *request.add_items();
  item.set_attachment_id(attachment.attachment_id());
  item.set_layer(static_cast<uint32_t>(index));
  item.mutable_queries()->set_type(static_cast<v1::ElementType>(type));
  item.mutable_queries()->set_data(queries.data(), queries.size());
  item.set_step(layers[index].step);
  item.set_reset_residency(layers[index].reset);
}

absl::Status DecodeSession::Impl::TakeSelection(Layer* layer, int64_t index,
                                                const v1::SelectResult& result) {
  if (result.has_error()) return FromRpcStatus(result.error());
  if (result.layer() != index ||
      result.generation() != attachment.sequence().handle().generation()) {
    return Error(v1::INTERNAL_ERROR,
                 absl::StrCat("selection: expected layer ", index, " of generation ",
                              attachment.sequence().handle().generation(), ", got ", result.layer(),
                              " of ", result.generation()));
  }
  CKV_RETURN_IF_ERROR(layer->steady.MoveWindow(result.window_begin()));
  CKV_RETURN_IF_ERROR(
      layer->cache.Begin(result, layer->steady.sinks(), layer->steady.window_begin()));
  CKV_RETURN_IF_ERROR(TakeState(result.state()));
  return TakeCorrection(result.correction());
}

absl::Status DecodeSession::Impl::TakeState(const v1::AttentionState& answered) {
  state = answered;
  const ElementType state_type = ElementTypeOf(state.type(), ElementType::kFloat16);
  const int64_t elements = query_heads * head_dim;
  const bool present = !state.output().empty() || !state.log_sum_exp().empty();
  state_output.resize(present ? elements : 0);
  state_lse.resize(present ? query_heads : 0);
  if (!present) return absl::OkStatus();
  if (state.output().size() != static_cast<size_t>(elements * kernels::ElementBytes(state_type)) ||
      state.log_sum_exp().size() != query_heads * sizeof(float)) {
    return Error(v1::INTERNAL_ERROR,
                 absl::StrCat("state: expected ", elements, " outputs and ", query_heads,
                              " log-sum-exps, got ", state.output().size(), " and ",
                              state.log_sum_exp().size(), " bytes"));
  }
  kernels::ToFloat(reinterpret_cast<const std::byte*>(state.output().data()), state_type, elements,
                   state_output.data());
  kernels::ToFloat(reinterpret_cast<const std::byte*>(state.log_sum_exp().data()),
                   ElementType::kFloat32, query_heads, state_lse.data());
  const auto finite = [](float number) { return std::isfinite(number); };
  const auto below_infinity = [](float number) {
    return number < std::numeric_limits<float>::infinity();  // false for NaN
  };
  if (!std::all_of(state_output.begin(), state_output.end(), finite) ||
      !std::all_of(state_lse.begin(), state_lse.end(), below_infinity)) {
    return Error(v1::INTERNAL_ERROR, "state: not finite");
  }
  return absl::OkStatus();
}

// What follows from the codec alone: without remainders there is none.
absl::Status DecodeSession::Impl::TakeCorrection(const v1::ValueCorrection& answered) {
  correction = answered;
  const bool expected = codec->RemainderBytes(type, head_dim) > 0;
  const size_t codes = expected ? query_heads * head_dim : 0;
  const size_t scales = expected ? query_heads : 0;
  if (correction.codes().size() != codes ||
      correction.log_scale().size() != scales * sizeof(float)) {
    return Error(
        v1::INTERNAL_ERROR,
        absl::StrCat("correction: expected ", codes, " codes and ", scales, " scales, got ",
                     correction.codes().size(), " and ", correction.log_scale().size(), " bytes"));
  }
  const auto* bytes = reinterpret_cast<const int8_t*>(correction.codes().data());
  correction_codes.assign(bytes, bytes + codes);
  correction_log_scales.resize(scales);
  kernels::ToFloat(reinterpret_cast<const std::byte*>(correction.log_scale().data()),
                   ElementType::kFloat32, static_cast<int64_t>(scales),
                   correction_log_scales.data());
  const auto below_infinity = [](float number) {
    return number < std::numeric_limits<float>::infinity();  // false for NaN
  };
  if (!std::all_of(correction_log_scales.begin(), correction_log_scales.end(), below_infinity)) {
    return Error(v1::INTERNAL_ERROR, "correction: not finite");
  }
  return absl::OkStatus();
}

// One request, its answers. On an error the layer's mirror and the stream are not to be trusted.
absl::Status DecodeSession::Impl::Exchange(Layer* layer, int64_t index, StepFigures* figures) {
  refused = false;
  if (stream == nullptr) {
    CKV_ASSIGN_OR_RETURN(stream, RecallStream::Open(client, options.spin));
  }
  const Clock::time_point sent = Clock::now();
  CKV_RETURN_IF_ERROR(stream->Write(request));
  CKV_RETURN_IF_ERROR(stream->Read(&response));
  const Clock::time_point selected = Clock::now();
  if (response.request_id() != request_id || response.selection().results_size() != 1) {
    return Error(v1::INTERNAL_ERROR,
                 absl::StrCat("StreamSelectAndRecall: expected one result for ", "request ",
                              request_id, ", got ", response.selection().results_size(), " for ",
                              response.request_id()));
  }
  const bool has_error = response.selection().results(0).has_error();
  absl::Status received = TakeSelection(layer, index, response.selection().results(0));
  response_link_generation = response.link_generation();
  // An exchange is read to its end whatever is in it, so that the stream can go on.
  while (true) {
    for (const v1::RecordChunk& chunk : response.records()) {
      if (received.ok() && chunk.layer() != index) {
        received = Error(v1::CHECKSUM_MISMATCH,
                         absl::StrCat("records: expected layer ", index, ", got ", chunk.layer()));
      }
      if (received.ok()) received = layer->cache.Receive(chunk);
    }
    if (response.last()) break;
    CKV_RETURN_IF_ERROR(stream->Read(&response));
  }
  refused = has_error;
  CKV_RETURN_IF_ERROR(received);
  CKV_RETURN_IF_ERROR(TakeLinked(*layer, index));
  const Clock::time_point recalled = Clock::now();
  CKV_RETURN_IF_ERROR(layer->cache.Complete());
  figures->select_us = MicrosBetween(sent, selected);
  figures->recall_us = MicrosBetween(selected, recalled);
  return absl::OkStatus();
}

absl::Status DecodeSession::Impl::Attend(const Layer& layer, absl::Span<const std::byte> queries,
                                         absl::Span<float> output) {
  query_floats.resize(query_heads * head_dim);
  kernels::ToFloat(queries.data(), type, query_heads * head_dim, query_floats.data());
  const int64_t group = query_heads / kv_heads;
  output_lse.resize(group);
  const kernels::AttentionParams params = {group, head_dim, type,
                                           1.0f / std::sqrt(static_cast<float>(head_dim))};
  for (int64_t h = 0; h < kv_heads; ++h) {
    const int64_t first = h * group * head_dim;
    kernels::AttentionState head_state;
    if (!state_lse.empty()) {
      head_state.output = absl::MakeConstSpan(state_output).subspan(first, group * head_dim);
      head_state.lse = absl::MakeConstSpan(state_lse).subspan(h * group, group);
    }
    const absl::Status status = kernels::SparseAttention(
        params, absl::MakeConstSpan(query_floats).subspan(first, group * head_dim),
        layer.steady.Runs(h), layer.cache.Run(h), head_state,
        output.subspan(first, group * head_dim), absl::MakeSpan(output_lse));
    if (!status.ok()) {
      return Error(v1::INTERNAL_ERROR, absl::StrCat("attention: ", status.message()));
    }
    if (correction_log_scales.empty()) continue;
    kernels::AddCorrection(group, head_dim,
                           absl::MakeConstSpan(correction_codes).subspan(first, group * head_dim),
                           absl::MakeConstSpan(correction_log_scales).subspan(h * group, group),
                           output_lse, output.subspan(first, group * head_dim));
  }
  return absl::OkStatus();
}

void DecodeSession::Impl::UpdateDigests(Layer* layer) const {
  for (int64_t h = 0; h < kv_heads; ++h) {
    const std::vector<int32_t>& positions = layer->cache.positions()[h];
    const std::vector<uint32_t>& masks = layer->cache.head_masks()[h];
    const uint32_t count = static_cast<uint32_t>(positions.size());
    layer->selection.Add(&count, sizeof(count));
    layer->selection.Add(positions.data(), positions.size() * sizeof(int32_t));
    layer->selection.Add(masks.data(), masks.size() * sizeof(uint32_t));
  }
  layer->state.Add(state.output().data(), state.output().size());
  layer->state.Add(state.log_sum_exp().data(), state.log_sum_exp().size());
  layer->correction.Add(correction.codes().data(), correction.codes().size());
  layer->correction.Add(correction.log_scale().data(), correction.log_scale().size());
  const size_t record_bytes = static_cast<size_t>(codec->RecordBytes(type, head_dim));
  layer->cache.ForEachMiss(
      [&](const std::byte* record) { layer->recalled.Add(record, record_bytes); });
}

absl::Status DecodeSession::Impl::TryStep(int64_t index, absl::Span<const std::byte> queries,
                                          absl::Span<float> output, StepFigures* figures) {
  Layer& layer = layers[index];
  MakeRequest(index, queries);
  CKV_RETURN_IF_ERROR(Exchange(&layer, index, figures));
  if (!output.empty()) CKV_RETURN_IF_ERROR(Attend(layer, queries, output));
  ++layer.step;
  layer.reset = false;
  figures->exact_tokens = layer.cache.exact_tokens();
  figures->recalled_tokens = layer.cache.misses();
  figures->recalled_bytes = layer.cache.misses() * codec->RecordBytes(type, head_dim);
  figures->correction_bytes =
      static_cast<int64_t>(correction.codes().size() + correction.log_scale().size());
  figures->state_bytes = static_cast<int64_t>(state.output().size() + state.log_sum_exp().size()) +
                         figures->correction_bytes;
  figures->hits = layer.cache.hits();
  if (options.digests) UpdateDigests(&layer);
  return absl::OkStatus();
}

DecodeSession::DecodeSession(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DecodeSession::~DecodeSession() = default;

absl::StatusOr<std::unique_ptr<DecodeSession>> DecodeSession::Attach(
    Client* client, const v1::SequenceHandle& sequence, const DecodeOptions& options) {
  auto impl = std::make_unique<Impl>();
  impl->client = client;
  impl->options = options;
  CKV_RETURN_IF_ERROR(impl->CallAttach(sequence));
  CKV_RETURN_IF_ERROR(impl->CheckLayout());
  CKV_RETURN_IF_ERROR(impl->MakeLayers());
  CKV_RETURN_IF_ERROR(impl->FetchSteadyZone());
  impl->MakeCallersWindow();
  impl->ConnectLink();
  return std::unique_ptr<DecodeSession>(new DecodeSession(std::move(impl)));
}

const v1::Sequence& DecodeSession::sequence() const { return impl_->attachment.sequence(); }
v1::Link DecodeSession::link() const { return impl_->link; }
const std::string& DecodeSession::link_reason() const { return impl_->link_reason; }

absl::Status DecodeSession::Append(int64_t layer, absl::Span<const std::byte> key,
                                   absl::Span<const std::byte> value) {
  CKV_RETURN_IF_ERROR(impl_->CheckLayer(layer));
  const size_t expected =
      static_cast<size_t>(impl_->kv_heads * impl_->head_dim * kernels::ElementBytes(impl_->type));
  if (key.size() != expected || value.size() != expected) {
    return Error(v1::SHAPE_MISMATCH,
                 absl::StrCat("key, value: expected ", expected, " bytes each, got ", key.size(),
                              " and ", value.size()));
  }
  Layer& of = impl_->layers[layer];
  if (impl_->options.append_to_service) {
    if (of.unsent >= impl_->options.append_batch_tokens) CKV_RETURN_IF_ERROR(impl_->Flush());
    of.unsent_keys.append(reinterpret_cast<const char*>(key.data()), key.size());
    of.unsent_values.append(reinterpret_cast<const char*>(value.data()), value.size());
    ++of.unsent;
  }
  of.steady.Append(key, value);
  return absl::OkStatus();
}

absl::Status DecodeSession::Flush() { return impl_->Flush(); }

absl::Status DecodeSession::Impl::CheckQueries(int64_t index,
                                               absl::Span<const std::byte> queries) const {
  CKV_RETURN_IF_ERROR(CheckLayer(index));
  const int64_t query_bytes = query_heads * head_dim * kernels::ElementBytes(type);
  if (static_cast<int64_t>(queries.size()) == query_bytes) return absl::OkStatus();
  return Error(v1::SHAPE_MISMATCH,
               absl::StrCat("queries: expected ", query_bytes, " bytes, got ", queries.size()));
}

absl::Status DecodeSession::Impl::Step(int64_t index, absl::Span<const std::byte> queries,
                                       absl::Span<float> output, StepFigures* figures) {
  StepFigures unwanted;
  StepFigures* const told = figures != nullptr ? figures : &unwanted;
  absl::Status first = TryStep(index, queries, output, told);
  if (first.ok()) return first;
  CKV_RETURN_IF_ERROR(Recover(first, &layers[index]));
  absl::Status second = TryStep(index, queries, output, told);
  if (!second.ok()) Abandon(&layers[index]);
  return second;
}

absl::Status DecodeSession::Step(int64_t layer, absl::Span<const std::byte> queries,
                                 absl::Span<float> output, StepFigures* figures) {
  CKV_RETURN_IF_ERROR(impl_->CheckQueries(layer, queries));
  const int64_t elements = impl_->query_heads * impl_->head_dim;
  if (static_cast<int64_t>(output.size()) != elements) {
    return Error(v1::SHAPE_MISMATCH,
                 absl::StrCat("output: expected ", elements, " numbers, got ", output.size()));
  }
  return impl_->Step(layer, queries, output, figures);
}

absl::Status DecodeSession::Recall(int64_t layer, absl::Span<const std::byte> queries,
                                   StepFigures* figures) {
  CKV_RETURN_IF_ERROR(impl_->CheckQueries(layer, queries));
  return impl_->Step(layer, queries, {}, figures);
}

absl::Status DecodeSession::Attend(int64_t layer, absl::Span<const std::byte> queries,
                                   absl::Span<float> output) {
  CKV_RETURN_IF_ERROR(impl_->CheckQueries(layer, queries));
  return impl_->Attend(impl_->layers[layer], queries, output);
}

DecodeSession::Recalled DecodeSession::recalled(int64_t layer) const {
  const Layer& of = impl_->layers[layer];
  return {&of.steady,
          &of.cache,
          impl_->state_output,
          impl_->state_lse,
          impl_->correction_codes,
          impl_->correction_log_scales};
}

const RecordWindow* DecodeSession::window() const { return impl_->window.get(); }

absl::Status DecodeSession::MoveWindow(int64_t layer, int64_t window_begin) {
  CKV_RETURN_IF_ERROR(impl_->CheckLayer(layer));
  return impl_->layers[layer].steady.MoveWindow(window_begin);
}

void DecodeSession::ForgetRecords() {
  for (Layer& layer : impl_->layers) layer.Distrust();
}

uint64_t DecodeSession::attachment_id() const { return impl_->attachment.attachment_id(); }
Client* DecodeSession::client() const { return impl_->client; }

int64_t DecodeSession::max_exact_tokens() const {
  return std::max<int64_t>(1, impl_->attachment.max_exact_tokens());
}

const std::vector<std::vector<int32_t>>& DecodeSession::last_positions(int64_t layer) const {
  return impl_->layers[layer].cache.positions();
}

const std::vector<std::vector<uint32_t>>& DecodeSession::last_head_masks(int64_t layer) const {
  return impl_->layers[layer].cache.head_masks();
}

int64_t DecodeSession::window_begin(int64_t layer) const {
  return impl_->layers[layer].steady.window_begin();
}

LayerDigests DecodeSession::digests(int64_t layer) const {
  const Layer& of = impl_->layers[layer];
  return {of.selection.Finish(), of.state.Finish(), of.correction.Finish(), of.recalled.Finish()};
}

int64_t DecodeSession::held_bytes() const {
  int64_t bytes = 0;
  for (const Layer& layer : impl_->layers) {
    bytes += layer.steady.held_bytes() + layer.cache.held_bytes();
  }
  return bytes;
}

}  // namespace clusterkv::worker
