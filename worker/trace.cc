#include "worker/trace.h"

#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "worker/safetensors.h"

namespace clusterkv::worker {
namespace {

using kernels::ElementType;

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

constexpr std::pair<const char*, ElementType> kDtypes[] = {{"F32", ElementType::kFloat32},
                                                           {"F16", ElementType::kFloat16},
                                                           {"BF16", ElementType::kBFloat16}};

const char* DtypeOf(ElementType type) {
  for (const auto& [name, element_type] : kDtypes) {
    if (element_type == type) return name;
  }
  return "unknown";
}

std::string Describe(const TensorInfo& info) {
  return absl::StrCat(info.dtype, " [", absl::StrJoin(info.shape, ", "), "]");
}

absl::StatusOr<TensorInfo> FindMatrixStack(const SafetensorsFile& file, const std::string& name) {
  const auto found = file.tensors().find(name);
  if (found == file.tensors().end()) return Invalid("tensor ", name, ": missing");
  if (found->second.shape.size() != 3) {
    return Invalid("tensor ", name, ": expected 3 dimensions, got ", Describe(found->second));
  }
  return found->second;
}

absl::Status CheckShape(const TraceLayer& layer) {
  const kernels::KvShape& shape = layer.shape;
  if (layer.tokens < 1 || layer.tokens > INT32_MAX) {
    return Invalid("tensor k: expected 1 to 2^31 - 1 tokens, got ", layer.tokens);
  }
  if (shape.kv_heads < 1 || shape.kv_heads > 256) {
    return Invalid("tensor k: expected 1 to 256 KV heads, got ", shape.kv_heads);
  }
  if (shape.head_dim < 16 || shape.head_dim > 512 || shape.head_dim % 16 != 0) {
    return Invalid("tensor k: expected head_dim a multiple of 16 in [16, 512], got ",
                   shape.head_dim);
  }
  if (shape.query_heads < 1 || shape.query_heads % shape.kv_heads != 0 || shape.group() > 32) {
    return Invalid("tensor q: expected query heads a multiple of ", shape.kv_heads,
                   ", at most 32 per KV head, got ", shape.query_heads);
  }
  if (layer.queries < 0 || layer.queries >= layer.tokens) {
    return Invalid("tensor q: expected fewer queries than the ", layer.tokens, " tokens, got ",
                   layer.queries);
  }
  return absl::OkStatus();
}

// Shape and element type from k, v and q. On success their sizes multiply without overflow: the
// file holds them.
absl::Status DescribeLayer(const TensorInfo& k, const TensorInfo& v, const TensorInfo& q,
                           TraceLayer* layer) {
  bool known = false;
  for (const auto& [name, type] : kDtypes) {
    if (k.dtype == name) layer->shape.element_type = type, known = true;
  }
  if (!known) return Invalid("tensor k: expected F32, F16 or BF16, got ", Describe(k));
  if (v.dtype != k.dtype || v.shape != k.shape) {
    return Invalid("tensor v: expected ", Describe(k), " as k, got ", Describe(v));
  }
  if (q.dtype != k.dtype || q.shape[2] != k.shape[2]) {
    return Invalid("tensor q: expected ", k.dtype, " [queries, query_heads, ", k.shape[2],
                   "], got ", Describe(q));
  }
  layer->tokens = k.shape[0];
  layer->queries = q.shape[0];
  layer->shape.kv_heads = k.shape[1];
  layer->shape.head_dim = k.shape[2];
  layer->shape.query_heads = q.shape[1];
  return CheckShape(*layer);
}

absl::Status ReadTensor(const SafetensorsFile& file, const TensorInfo& info,
                        std::vector<std::byte>* to) {
  to->resize(static_cast<size_t>(info.end - info.begin));
  return file.Read(info, absl::MakeSpan(*to));
}

absl::Status ReadQueryRms(const SafetensorsFile& file, TraceLayer* layer) {
  const auto found = file.tensors().find("q_rms");
  if (found == file.tensors().end()) return absl::OkStatus();
  const TensorInfo& info = found->second;
  const std::vector<int64_t> expected = {layer->shape.kv_heads, layer->shape.head_dim};
  if (info.dtype != "F32" || info.shape != expected) {
    return Invalid("tensor q_rms: expected F32 [", absl::StrJoin(expected, ", "), "], got ",
                   Describe(info));
  }
  layer->query_rms.resize(static_cast<size_t>(expected[0] * expected[1]));
  return file.Read(info, absl::MakeSpan(reinterpret_cast<std::byte*>(layer->query_rms.data()),
                                        layer->query_rms.size() * sizeof(float)));
}

absl::Status ReadTensors(const SafetensorsFile& file, TraceLayer* layer) {
  CKV_ASSIGN_OR_RETURN(const TensorInfo k, FindMatrixStack(file, "k"));
  CKV_ASSIGN_OR_RETURN(const TensorInfo v, FindMatrixStack(file, "v"));
  CKV_ASSIGN_OR_RETURN(const TensorInfo q, FindMatrixStack(file, "q"));
  CKV_RETURN_IF_ERROR(DescribeLayer(k, v, q, layer));
  CKV_RETURN_IF_ERROR(ReadTensor(file, k, &layer->keys));
  CKV_RETURN_IF_ERROR(ReadTensor(file, v, &layer->values));
  CKV_RETURN_IF_ERROR(ReadTensor(file, q, &layer->q));
  return ReadQueryRms(file, layer);
}

}  // namespace

absl::StatusOr<TraceLayer> ReadTraceLayer(const std::string& path) {
  CKV_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(path));
  TraceLayer layer;
  const absl::Status status = ReadTensors(file, &layer);
  if (status.ok()) return layer;
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

absl::Status WriteTraceLayer(const TraceLayer& layer, const std::string& path) {
  CKV_RETURN_IF_ERROR(CheckShape(layer));
  const kernels::KvShape& shape = layer.shape;
  const int64_t element_bytes = ElementBytes(shape.element_type);
  const std::vector<int64_t> kv_shape = {layer.tokens, shape.kv_heads, shape.head_dim};
  const char* dtype = DtypeOf(shape.element_type);
  std::vector<TensorToWrite> tensors = {
      {"k", dtype, kv_shape, layer.keys},
      {"v", dtype, kv_shape, layer.values},
      {"q", dtype, {layer.queries, shape.query_heads, shape.head_dim}, layer.q}};
  for (const TensorToWrite& tensor : tensors) {
    const int64_t bytes = tensor.shape[0] * tensor.shape[1] * tensor.shape[2] * element_bytes;
    if (static_cast<int64_t>(tensor.bytes.size()) != bytes) {
      return Invalid("tensor ", tensor.name, ": expected ", bytes, " bytes, got ",
                     tensor.bytes.size());
    }
  }
  if (!layer.query_rms.empty()) {
    const int64_t expected = shape.kv_heads * shape.head_dim;
    if (static_cast<int64_t>(layer.query_rms.size()) != expected) {
      return Invalid("tensor q_rms: expected ", expected, " numbers, got ", layer.query_rms.size());
    }
    // First, so that every tensor is aligned to its element.
    tensors.insert(tensors.begin(), {"q_rms",
                                     "F32",
                                     {shape.kv_heads, shape.head_dim},
                                     {reinterpret_cast<const std::byte*>(layer.query_rms.data()),
                                      layer.query_rms.size() * sizeof(float)}});
  }
  return WriteSafetensors(path, tensors);
}

}  // namespace clusterkv::worker
