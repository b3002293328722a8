// The C++ worker for Python: connection, prefill writer, decode session. Messages cross as
// serialized protobufs, arrays by the buffer protocol or DLPack without copies.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/error.h"
#include "proto/placement.h"
#include "worker/client.h"
#include "worker/decode_session.h"
#include "worker/engine_device.h"
#include "worker/prefill_writer.h"
#include "worker/python/native/binding.h"
#include "worker/shards.h"
#include "worker/window_writer.h"

namespace clusterkv::worker {
namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// Rows [tokens, kv_heads, head_dim] on a GPU, each dense, whatever lies between them.
using GpuArray = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cuda>;

absl::Span<const std::byte> Bytes(const Array& array) {
  return {static_cast<const std::byte*>(array.data()), array.nbytes()};
}

absl::Span<const float> Floats(const nb::ndarray<const float, nb::c_contig, nb::device::cpu>& a) {
  return {a.data(), a.size()};
}

// To one server, or to several as one.
class Connection {
 public:
  Connection(const std::string& target, const std::string& worker_name, double timeout_seconds,
             const std::string& tls_ca, const std::string& tls_cert, const std::string& tls_key,
             const std::string& tls_server_name, bool several) {
    ClientOptions options;
    options.tls = {.ca_file = tls_ca,
                   .certificate_file = tls_cert,
                   .key_file = tls_key,
                   .server_name = tls_server_name};
    options.worker_name = worker_name;
    options.call_timeout = absl::Seconds(timeout_seconds);
    if (several) {
      shards_ = ValueOrRaise(Released([&] { return Shards::Connect(target, options); }));
    } else {
      client_ = ValueOrRaise(Released([&] { return Client::Connect(target, options); }));
    }
  }

  nb::bytes Open(const nb::bytes& request) {
    auto message = Parsed<v1::OpenSequenceRequest>(request, "request");
    return Serialized(ValueOrRaise(Released([&]() -> absl::StatusOr<v1::Sequence> {
      if (shards_ == nullptr) {
        message.set_session_id(client_->session_id());
        return client_->OpenSequence(message);
      }
      absl::StatusOr<PlacedSequence> placed = shards_->OpenSequence(std::move(message));
      if (!placed.ok()) return placed.status();
      return std::move(placed->sequence);
    })));
  }

  void Release(const nb::bytes& handle) {
    const auto message = Parsed<v1::SequenceHandle>(handle, "handle");
    RaiseIfError(Released([&] {
      return shards_ == nullptr ? client_->ReleaseSequence(message)
                                : shards_->ReleaseSequence(message);
    }));
  }

  bool Reconnect(double timeout_seconds) {
    bool restarted = true;
    RaiseIfError(Released([&] {
      const absl::Duration timeout = absl::Seconds(timeout_seconds);
      if (shards_ == nullptr) return client_->Reconnect(timeout, &restarted);
      const absl::Time end = absl::Now() + timeout;
      absl::Status status = shards_->Refresh();
      while (!status.ok() && absl::Now() < end) {
        absl::SleepFor(absl::Milliseconds(50));
        status = shards_->Refresh();
      }
      return status;
    }));
    return restarted;
  }

  // How rows that lay on GPUs went.
  nb::dict IngestCounts() const { return CountsDict(windows_.counts()); }

  // For rows on GPU `gpu`. Call it without the GIL.
  WindowWriter* WindowFor(Client* client, int gpu) {
    return windows_.For(client, gpu, [gpu]() -> absl::StatusOr<std::unique_ptr<IngestRing>> {
      const auto device = MakeEngineDevice(absl::StrCat("cuda:", gpu), absl::Minutes(1));
      if (!device.ok()) return device.status();
      const IngestRingOptions options;
      return (*device)->MakeIngestRing(options.slots, options.slot_bytes);
    });
  }

  // Of the server that has the sequence. Call it without the GIL.
  absl::StatusOr<Client*> ClientOf(const v1::SequenceHandle& sequence) {
    if (shards_ == nullptr) return client_.get();
    absl::StatusOr<PlacedSequence> placed = shards_->FindSequence(sequence);
    if (!placed.ok()) return placed.status();
    return placed->client;
  }

 private:
  std::unique_ptr<Client> client_;  // or
  std::unique_ptr<Shards> shards_;
  WindowWriters windows_;  // last: they use the clients
};

class Writer {
 public:
  using QueryRms = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

  Writer(Connection& connection, const nb::bytes& sequence)
      : connection_(connection), sequence_(Parsed<v1::Sequence>(sequence, "sequence")) {
    client_ = ValueOrRaise(Released([&] { return connection.ClientOf(sequence_.handle()); }));
    writer_ = ValueOrRaise(PrefillWriter::Create(client_, sequence_));
  }
  ~Writer() {
    Released([this] { return AwaitWindows(); }).IgnoreError();
  }

  void Put(int64_t layer, int64_t first_token, int64_t tokens, const Array& keys,
           const Array& values, const QueryRms& query_rms) {
    RaiseIfError(Released([&] {
      if (window_ != nullptr) {
        window_->CountHostBytes(static_cast<int64_t>(keys.nbytes() + values.nbytes()));
      }
      return writer_->PutWhenRoom(layer, first_token, tokens, Bytes(keys), Bytes(values),
                                  Floats(query_rms));
    }));
  }

  // Waits for slots, not for the stream. Returns how many of the tokens it took, the first ones.
  int64_t PutFromGpu(int64_t layer, int64_t first_token, const GpuArray& keys,
                     const GpuArray& values, const QueryRms& query_rms, uintptr_t stream) {
    WindowWriter::Rows rows;
    rows.sequence = &sequence_.handle();
    rows.layer = layer;
    rows.first_token = first_token;
    rows.keys = ValueOrRaise(RowsOf(keys, "keys"));
    rows.values = ValueOrRaise(RowsOf(values, "values"));
    rows.query_rms.assign(query_rms.data(), query_rms.data() + query_rms.size());
    rows.otherwise = writer_.get();
    return ValueOrRaise(Released([&] {
      if (window_ == nullptr) window_ = connection_.WindowFor(client_, keys.device_id());
      return PutRows(&rows, reinterpret_cast<EngineStream>(stream));
    }));
  }

  nb::bytes Finish() {
    return Serialized(ValueOrRaise(Released([this]() -> absl::StatusOr<v1::Sequence> {
      if (absl::Status status = AwaitWindows(); !status.ok()) return status;
      return writer_->Finish();
    })));
  }

 private:
  absl::StatusOr<EngineRows> RowsOf(const GpuArray& array, const char* what) const {
    const v1::KvShape& shape = sequence_.shape();
    if (array.shape(1) != shape.kv_heads() || array.shape(2) != shape.head_dim() ||
        array.stride(2) != 1) {
      return Error(v1::SHAPE_MISMATCH, absl::StrCat(what, ": expected [tokens, ", shape.kv_heads(),
                                                    ", ", shape.head_dim(), "] with dense rows"));
    }
    const int64_t element_bytes = static_cast<int64_t>(array.itemsize());
    EngineRows rows;
    rows.data = array.data();
    rows.tokens = static_cast<int64_t>(array.shape(0));
    rows.heads = static_cast<int64_t>(array.shape(1));
    rows.row_bytes = static_cast<int64_t>(array.shape(2)) * element_bytes;
    rows.token_stride_bytes = array.stride(0) * element_bytes;
    rows.head_stride_bytes = array.stride(1) * element_bytes;
    return rows;
  }

  absl::StatusOr<int64_t> PutRows(WindowWriter::Rows* rows, EngineStream stream) {
    const int64_t all = rows->keys.tokens;
    while (rows->keys.tokens > 0) {
      Enter();
      const absl::StatusOr<int64_t> taken =
          window_->Put(*rows, stream, /*wait=*/true, [this](const absl::Status& s) { Leave(s); });
      if (!taken.ok() || *taken == 0) Leave(absl::OkStatus());
      if (!taken.ok()) return taken.status();
      if (*taken == 0) break;
      rows->Skip(*taken);
    }
    return all - rows->keys.tokens;
  }

  void Enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++in_windows_;
  }
  void Leave(const absl::Status& status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.ok()) failure_ = status;
    if (--in_windows_ == 0) idle_.notify_all();
  }
  // Waits until no rows are in slots; the first failure of any.
  absl::Status AwaitWindows() {
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return in_windows_ == 0; });
    return failure_;
  }

  Connection& connection_;
  const v1::Sequence sequence_;
  Client* client_ = nullptr;
  WindowWriter* window_ = nullptr;  // once rows of a GPU came
  std::unique_ptr<PrefillWriter> writer_;
  std::mutex mutex_;
  std::condition_variable idle_;
  int64_t in_windows_ = 0;
  absl::Status failure_;
};

class Decoder {
 public:
  Decoder(Connection& connection, const nb::bytes& handle, const nb::bytes& hot_cache,
          bool append_to_service, const nb::bytes& select) {
    DecodeOptions options;
    options.hot_cache = Parsed<v1::HotCacheConfig>(hot_cache, "hot_cache");
    options.select = Parsed<v1::SelectConfig>(select, "select");
    options.append_to_service = append_to_service;
    const auto sequence = Parsed<v1::SequenceHandle>(handle, "handle");
    session_ = ValueOrRaise(Released([&]() -> absl::StatusOr<std::unique_ptr<DecodeSession>> {
      const absl::StatusOr<Client*> client = connection.ClientOf(sequence);
      if (!client.ok()) return client.status();
      return DecodeSession::Attach(*client, sequence, options);
    }));
  }

  // keys, values [tokens, kv_heads, head_dim], queries [tokens, query_heads, head_dim] of the
  // sequence's element type, output [tokens, query_heads, head_dim] float32: each token in turn is
  // appended and answered. Returns the figures' sums.
  nb::dict Steps(int64_t layer, const Array& keys, const Array& values, const Array& queries,
                 nb::ndarray<float, nb::c_contig, nb::device::cpu> output) {
    const int64_t tokens = static_cast<int64_t>(keys.shape(0));
    StepFigures sum;
    absl::Status status;
    {
      nb::gil_scoped_release release;
      const auto row = [tokens](absl::Span<const std::byte> all, int64_t i) {
        const size_t bytes = all.size() / tokens;
        return all.subspan(i * bytes, bytes);
      };
      const size_t out_row = output.size() / tokens;
      for (int64_t i = 0; i < tokens && status.ok(); ++i) {
        StepFigures figures;
        status = session_->Append(layer, row(Bytes(keys), i), row(Bytes(values), i));
        if (!status.ok()) break;
        status = session_->Step(layer, row(Bytes(queries), i),
                                absl::MakeSpan(output.data() + i * out_row, out_row), &figures);
        sum.exact_tokens += figures.exact_tokens;
        sum.recalled_tokens += figures.recalled_tokens;
        sum.recalled_bytes += figures.recalled_bytes;
        sum.state_bytes += figures.state_bytes;
        sum.correction_bytes += figures.correction_bytes;
        sum.hits += figures.hits;
        sum.select_us += figures.select_us;
        sum.recall_us += figures.recall_us;
      }
    }
    RaiseIfError(status);
    nb::dict dict;
    dict["exact_tokens"] = sum.exact_tokens;
    dict["recalled_tokens"] = sum.recalled_tokens;
    dict["recalled_bytes"] = sum.recalled_bytes;
    dict["state_bytes"] = sum.state_bytes;
    dict["correction_bytes"] = sum.correction_bytes;
    dict["hits"] = sum.hits;
    dict["select_us"] = sum.select_us;
    dict["recall_us"] = sum.recall_us;
    return dict;
  }

  std::vector<std::vector<int32_t>> LastPositions(int64_t layer) const {
    return session_->last_positions(layer);
  }
  std::vector<std::vector<uint32_t>> LastHeadMasks(int64_t layer) const {
    return session_->last_head_masks(layer);
  }
  int64_t HeldBytes() const { return session_->held_bytes(); }
  nb::bytes Sequence() const { return Serialized(session_->sequence()); }

 private:
  std::unique_ptr<DecodeSession> session_;
};

// The names of shards in the order in which they are asked for the sequence.
std::vector<std::string> RankNames(const std::string& sequence,
                                   const std::vector<std::string>& names) {
  std::vector<v1::Shard> shards(names.size());
  for (size_t i = 0; i < names.size(); ++i) shards[i].set_name(names[i]);
  std::vector<std::string> ranked;
  ranked.reserve(names.size());
  for (const v1::Shard& shard : RankShards(sequence, std::move(shards))) {
    ranked.push_back(shard.name());
  }
  return ranked;
}

}  // namespace

NB_MODULE(_native, m) {
  BindEngine(m);
  m.def("rank_shards", &RankNames, nb::arg("sequence"), nb::arg("names"));
  nb::class_<Connection>(m, "Connection")
      .def(nb::init<const std::string&, const std::string&, double, const std::string&,
                    const std::string&, const std::string&, const std::string&, bool>(),
           nb::arg("target"), nb::arg("worker_name") = "python", nb::arg("timeout") = 30.0,
           nb::kw_only(), nb::arg("tls_ca") = "", nb::arg("tls_cert") = "", nb::arg("tls_key") = "",
           nb::arg("tls_server_name") = "", nb::arg("several") = false)
      .def("open", &Connection::Open, nb::arg("request"))
      .def("release", &Connection::Release, nb::arg("handle"))
      .def("reconnect", &Connection::Reconnect, nb::arg("timeout"))
      .def("ingest_counts", &Connection::IngestCounts);
  nb::class_<Writer>(m, "PrefillWriter")
      .def(nb::init<Connection&, const nb::bytes&>(), nb::keep_alive<1, 2>())
      .def("put", &Writer::Put, nb::arg("layer"), nb::arg("first_token"), nb::arg("tokens"),
           nb::arg("keys"), nb::arg("values"), nb::arg("query_rms"))
      .def("put_from_gpu", &Writer::PutFromGpu, nb::arg("layer"), nb::arg("first_token"),
           nb::arg("keys"), nb::arg("values"), nb::arg("query_rms"), nb::arg("stream"))
      .def("finish", &Writer::Finish);
  nb::class_<Decoder>(m, "DecodeSession")
      .def(nb::init<Connection&, const nb::bytes&, const nb::bytes&, bool, const nb::bytes&>(),
           nb::keep_alive<1, 2>(), nb::arg("connection"), nb::arg("handle"), nb::arg("hot_cache"),
           nb::arg("append_to_service") = true, nb::arg("select") = nb::bytes("", 0))
      .def("steps", &Decoder::Steps, nb::arg("layer"), nb::arg("keys"), nb::arg("values"),
           nb::arg("queries"), nb::arg("output"))
      .def("last_positions", &Decoder::LastPositions, nb::arg("layer"))
      .def("last_head_masks", &Decoder::LastHeadMasks, nb::arg("layer"))
      .def_prop_ro("held_bytes", &Decoder::HeldBytes)
      .def_prop_ro("sequence", &Decoder::Sequence);
}

}  // namespace clusterkv::worker
