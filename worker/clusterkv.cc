#include "worker/clusterkv.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "worker/engine.h"

namespace {

using clusterkv::Error;
using clusterkv::worker::Engine;
using clusterkv::worker::EngineAppend;
using clusterkv::worker::EngineOptions;
using clusterkv::worker::EngineSequence;
using clusterkv::worker::EngineStep;
namespace v1 = clusterkv::v1;

struct LastError {
  std::string message, reason;
};
LastError& OfThisThread() {
  thread_local LastError last;
  return last;
}

int Told(const absl::Status& status) {
  if (status.ok()) return CKV_OK;
  LastError& last = OfThisThread();
  last.message = std::string(status.message());
  last.reason = v1::ErrorReason_Name(clusterkv::ReasonOf(status));
  return static_cast<int>(status.code());
}

absl::Status Missing(const char* what) {
  return Error(v1::INVALID_FIELD, absl::StrCat(what, ": expected one, got none"));
}

// The caller's struct as this library knows it: what an older caller's lacks is zero.
template <typename T>
absl::StatusOr<T> Read(const T* of, const char* what) {
  if (of == nullptr) return Missing(what);
  if (of->size < sizeof(size_t)) {
    return Error(v1::INVALID_FIELD,
                 absl::StrCat(what, ".size: expected the struct's, got ", of->size));
  }
  T known;
  std::memset(static_cast<void*>(&known), 0, sizeof(known));
  std::memcpy(static_cast<void*>(&known), of, std::min(of->size, sizeof(known)));
  const auto* bytes = reinterpret_cast<const unsigned char*>(of);
  for (size_t i = sizeof(known); i < of->size; ++i) {
    if (bytes[i] == 0) continue;
    return Error(v1::UNSUPPORTED, absl::StrCat(what, ": has fields that this library, version ",
                                               CKV_API_VERSION, ", does not know"));
  }
  return known;
}

std::string Text(const char* text) { return text == nullptr ? "" : text; }

absl::StatusOr<std::vector<v1::Link>> Links(const char* text) {
  std::vector<v1::Link> links;
  if (text == nullptr) return links;
  for (const auto& part : absl::StrSplit(text, ',')) {
    const std::string name(part);
    if (name != "peer" && name != "nccl" && name != "grpc") {
      return Error(v1::INVALID_FIELD,
                   absl::StrCat("links: expected peer, nccl or grpc, got ", name));
    }
    links.push_back(name == "peer"   ? v1::LINK_PEER
                    : name == "nccl" ? v1::LINK_NCCL
                                     : v1::LINK_GRPC);
  }
  return links;
}

absl::StatusOr<EngineOptions> Options(const ckv_options& o) {
  EngineOptions options;
  if (o.target == nullptr) return Missing("target");
  options.target = o.target;
  if (o.device != nullptr) options.device = o.device;
  options.client.worker_name = o.worker_name == nullptr ? "engine" : o.worker_name;
  options.client.tls = {Text(o.tls_ca), Text(o.tls_cert), Text(o.tls_key), Text(o.tls_server_name)};
  if (o.call_timeout_ms > 0) {
    options.client.call_timeout = absl::Milliseconds(o.call_timeout_ms);
  }
  options.output_type = static_cast<v1::ElementType>(o.output_type);
  options.decode.hot_cache.set_capacity_tokens(o.hot_cache_tokens > 0 ? o.hot_cache_tokens : 1024);
  if (o.budget_tokens > 0) options.decode.select.set_budget_tokens(o.budget_tokens);
  if (o.append_batch_tokens > 0) options.decode.append_batch_tokens = o.append_batch_tokens;
  CKV_ASSIGN_OR_RETURN(options.decode.links, Links(o.links));
  if (o.threads > 0) options.threads = static_cast<int>(o.threads);
  if (o.staging_bytes > 0) options.staging_bytes = static_cast<int64_t>(o.staging_bytes);
  return options;
}

v1::OpenSequenceRequest Request(const ckv_sequence_options& o) {
  v1::OpenSequenceRequest request;
  request.set_name(Text(o.name));
  v1::KvShape& shape = *request.mutable_shape();
  shape.set_layers(o.layers);
  shape.set_kv_heads(o.kv_heads);
  shape.set_query_heads(o.query_heads);
  shape.set_head_dim(o.head_dim);
  shape.set_element_type(static_cast<v1::ElementType>(o.element_type));
  request.set_prompt_tokens(o.prompt_tokens);
  request.set_max_decode_tokens(o.max_decode_tokens);
  request.set_preset(Text(o.preset));
  request.set_codec(Text(o.codec));
  return request;
}

// What the caller's pointers are.
EngineSequence* Of(ckv_sequence* sequence) { return reinterpret_cast<EngineSequence*>(sequence); }
Engine* Of(ckv_engine* engine) { return reinterpret_cast<Engine*>(engine); }

absl::Status Have(const void* engine, const void* sequence) {
  if (engine == nullptr) return Missing("engine");
  return sequence == nullptr ? Missing("sequence") : absl::OkStatus();
}

// A call on one sequence.
template <typename... Args>
int Call(ckv_engine* engine, ckv_sequence* sequence,
         absl::Status (Engine::*method)(EngineSequence*, Args...), Args... args) {
  const absl::Status have = Have(engine, sequence);
  return Told(have.ok() ? (Of(engine)->*method)(Of(sequence), args...) : have);
}

absl::Status Open(const ckv_options* given, ckv_engine** engine) {
  if (engine == nullptr) return Missing("engine");
  CKV_ASSIGN_OR_RETURN(const ckv_options known, Read(given, "options"));
  CKV_ASSIGN_OR_RETURN(const EngineOptions options, Options(known));
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<Engine> opened, Engine::Open(options));
  *engine = reinterpret_cast<ckv_engine*>(opened.release());
  return absl::OkStatus();
}

absl::Status Create(ckv_engine* engine, const ckv_sequence_options* given,
                    ckv_sequence** sequence) {
  CKV_RETURN_IF_ERROR(Have(engine, sequence));
  CKV_ASSIGN_OR_RETURN(const ckv_sequence_options known, Read(given, "options"));
  CKV_ASSIGN_OR_RETURN(EngineSequence* const created, Of(engine)->Create(Request(known)));
  *sequence = reinterpret_cast<ckv_sequence*>(created);
  return absl::OkStatus();
}

absl::Status Ingest(ckv_engine* engine, ckv_sequence* sequence, uint32_t layer,
                    const ckv_rows* given, ckv_stream stream) {
  CKV_RETURN_IF_ERROR(Have(engine, sequence));
  CKV_ASSIGN_OR_RETURN(const ckv_rows rows, Read(given, "rows"));
  if (rows.keys == nullptr || rows.values == nullptr) return Missing("rows.keys, values");
  absl::Span<const float> rms;
  if (rows.query_rms != nullptr) {
    const v1::KvShape& shape = Engine::sequence(*Of(sequence)).shape();
    rms = absl::MakeConstSpan(rows.query_rms, size_t{shape.kv_heads()} * shape.head_dim());
  }
  return Of(engine)->Ingest(Of(sequence), layer, rows.first_token, rows.tokens,
                            {rows.keys, rows.values, rows.token_stride, rows.head_stride}, rms,
                            stream);
}

absl::Status AttachByName(ckv_engine* engine, const char* name, ckv_sequence** sequence) {
  CKV_RETURN_IF_ERROR(Have(engine, sequence));
  v1::SequenceHandle handle;
  handle.set_name(Text(name));
  CKV_ASSIGN_OR_RETURN(EngineSequence* const attached, Of(engine)->Attach(handle));
  *sequence = reinterpret_cast<ckv_sequence*>(attached);
  return absl::OkStatus();
}

absl::Status Append(ckv_engine* engine, uint32_t layer, const ckv_append_entry* entries,
                    size_t count, ckv_stream stream) {
  std::vector<EngineAppend> batch(count);
  for (size_t i = 0; i < count; ++i) {
    const ckv_append_entry& entry = entries[i];
    CKV_RETURN_IF_ERROR(Have(engine, entry.sequence));
    if (entry.key == nullptr || entry.value == nullptr) return Missing("key, value");
    batch[i] = {Of(entry.sequence), {entry.key, entry.value, 0, entry.head_stride}};
  }
  return Of(engine)->Append(layer, batch, stream);
}

absl::Status Step(ckv_engine* engine, uint32_t layer, ckv_step_entry* entries, size_t count,
                  ckv_stream stream) {
  std::vector<EngineStep> batch(count);
  std::vector<absl::Status> statuses(count);
  for (size_t i = 0; i < count; ++i) {
    const ckv_step_entry& entry = entries[i];
    CKV_RETURN_IF_ERROR(Have(engine, entry.sequence));
    if (entry.queries == nullptr || entry.output == nullptr) return Missing("queries, output");
    batch[i] = {Of(entry.sequence), entry.queries, entry.output, &statuses[i]};
  }
  absl::Status first = Of(engine)->Step(layer, batch, stream);
  for (size_t i = 0; i < count; ++i) entries[i].error = static_cast<int>(statuses[i].code());
  return first;
}

absl::Status Join(ckv_engine* engine, ckv_sequence* const* sequences, size_t count) {
  std::vector<EngineSequence*> batch(count);
  for (size_t i = 0; i < count; ++i) {
    CKV_RETURN_IF_ERROR(Have(engine, sequences[i]));
    batch[i] = Of(sequences[i]);
  }
  return engine == nullptr ? Missing("engine") : Of(engine)->Join(batch);
}

}  // namespace

void ckv_init(void* of, size_t size) {
  std::memset(of, 0, size);
  std::memcpy(of, &size, sizeof(size));
}

int ckv_api_version(void) { return CKV_API_VERSION; }
const char* ckv_error_message(void) { return OfThisThread().message.c_str(); }
const char* ckv_error_reason(void) { return OfThisThread().reason.c_str(); }

int ckv_open(const ckv_options* options, ckv_engine** engine) {
  return Told(Open(options, engine));
}

void ckv_shutdown(ckv_engine* engine) { delete Of(engine); }

int ckv_create(ckv_engine* engine, const ckv_sequence_options* options, ckv_sequence** sequence) {
  return Told(Create(engine, options, sequence));
}

int ckv_ingest(ckv_engine* engine, ckv_sequence* sequence, uint32_t layer, const ckv_rows* rows,
               ckv_stream stream) {
  return Told(Ingest(engine, sequence, layer, rows, stream));
}

int ckv_seal(ckv_engine* engine, ckv_sequence* sequence) {
  return Call(engine, sequence, &Engine::Seal);
}

int ckv_attach(ckv_engine* engine, ckv_sequence* sequence) {
  return Call(engine, sequence, &Engine::Attach);
}

int ckv_attach_by_name(ckv_engine* engine, const char* name, ckv_sequence** sequence) {
  return Told(AttachByName(engine, name, sequence));
}

int ckv_append(ckv_engine* engine, uint32_t layer, const ckv_append_entry* entries, size_t count,
               ckv_stream stream) {
  return Told(Append(engine, layer, entries, count, stream));
}

int ckv_step(ckv_engine* engine, uint32_t layer, ckv_step_entry* entries, size_t count,
             ckv_stream stream) {
  return Told(Step(engine, layer, entries, count, stream));
}

int ckv_wait(ckv_engine* engine, ckv_sequence* sequence) {
  return Call(engine, sequence, &Engine::Wait);
}

int ckv_join(ckv_engine* engine, ckv_sequence* const* sequences, size_t count) {
  return Told(Join(engine, sequences, count));
}

int ckv_settle(ckv_engine* engine, ckv_sequence* sequence, ckv_stream stream) {
  return Call(engine, sequence, &Engine::Settle, stream);
}

int ckv_leave(ckv_engine* engine, ckv_sequence* sequence, ckv_stream stream) {
  return Call(engine, sequence, &Engine::Leave, stream);
}

int ckv_close(ckv_engine* engine, ckv_sequence* sequence) {
  return Call(engine, sequence, &Engine::Close);
}

int ckv_release(ckv_engine* engine, ckv_sequence* sequence) {
  return Call(engine, sequence, &Engine::Release);
}
