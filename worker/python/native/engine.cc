// The engine (worker/engine.h) for Python: pointers, strides and streams as numbers, which
// clusterkv.engine takes from NumPy arrays and PyTorch tensors.
#include "worker/engine.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <vector>

#include "worker/python/native/binding.h"

namespace clusterkv::worker {
namespace {

class PyEngine;

// A pointer until the sequence is closed.
struct PySequence {
  PyEngine* engine;
  EngineSequence* sequence;

  EngineSequence& Get() const;
  nb::bytes Info() const { return Serialized(Engine::sequence(Get())); }
  std::string Link() const { return Engine::link(Get()); }
  std::string LinkReason() const { return Engine::link_reason(Get()); }
};
using Sequences = std::vector<PySequence*>;

EngineStream StreamOf(uintptr_t stream) { return reinterpret_cast<EngineStream>(stream); }
// What lies `i` strides behind `first`.
void* At(uintptr_t first, int64_t stride = 0, size_t i = 0) {
  return reinterpret_cast<void*>(first + static_cast<uintptr_t>(stride) * i);
}

class PyEngine {
 public:
  PyEngine(const std::string& target, const std::string& device, int output_type,
           const std::vector<int>& links, const nb::bytes& hot_cache, const nb::bytes& select,
           int append_batch_tokens, const std::string& worker_name, double timeout_seconds,
           const std::string& tls_ca, const std::string& tls_cert, const std::string& tls_key,
           const std::string& tls_server_name) {
    EngineOptions options;
    options.target = target;
    options.device = device;
    options.output_type = static_cast<v1::ElementType>(output_type);
    options.client.worker_name = worker_name;
    options.client.call_timeout = absl::Seconds(timeout_seconds);
    options.client.tls = {.ca_file = tls_ca,
                          .certificate_file = tls_cert,
                          .key_file = tls_key,
                          .server_name = tls_server_name};
    options.decode.hot_cache = Parsed<v1::HotCacheConfig>(hot_cache, "hot_cache");
    options.decode.select = Parsed<v1::SelectConfig>(select, "select");
    options.decode.append_batch_tokens = append_batch_tokens;
    for (const int link : links) options.decode.links.push_back(static_cast<v1::Link>(link));
    engine_ = ValueOrRaise(Released([&] { return Engine::Open(options); }));
  }
  ~PyEngine() { Close(); }

  // Its sequences are closed with it.
  void Close() {
    nb::gil_scoped_release release;
    engine_ = nullptr;
  }

  PySequence Create(const nb::bytes& request) {
    const auto message = Parsed<v1::OpenSequenceRequest>(request, "request");
    return {this, ValueOrRaise(Released([&] { return Get().Create(message); }))};
  }
  PySequence AttachHandle(const nb::bytes& handle) {
    const auto message = Parsed<v1::SequenceHandle>(handle, "handle");
    return {this, ValueOrRaise(Released([&] { return Get().Attach(message); }))};
  }

  void Ingest(PySequence& sequence, int64_t layer, int64_t first_token, int64_t tokens,
              uintptr_t keys, uintptr_t values, int64_t token_stride, int64_t head_stride,
              const std::vector<float>& query_rms, uintptr_t stream) {
    Call([&] {
      return Get().Ingest(&sequence.Get(), layer, first_token, tokens,
                          {At(keys), At(values), token_stride, head_stride}, query_rms,
                          StreamOf(stream));
    });
  }
  void Seal(PySequence& sequence) {
    Call([&] { return Get().Seal(&sequence.Get()); });
  }
  void Attach(PySequence& sequence) {
    Call([&] { return Get().Attach(&sequence.Get()); });
  }

  // Rows of sequence i are `stride` bytes after those of sequence i - 1.
  void Append(int64_t layer, const Sequences& sequences, uintptr_t keys, uintptr_t values,
              int64_t stride, int64_t head_stride, uintptr_t stream) {
    std::vector<EngineAppend> batch;
    for (size_t i = 0; i < sequences.size(); ++i) {
      const EngineKv kv = {At(keys, stride, i), At(values, stride, i), 0, head_stride};
      batch.push_back({&sequences[i]->Get(), kv});
    }
    Call([&] { return Get().Append(layer, batch, StreamOf(stream)); });
  }
  void Step(int64_t layer, const Sequences& sequences, uintptr_t queries, int64_t query_stride,
            uintptr_t output, int64_t output_stride, uintptr_t stream) {
    std::vector<EngineStep> batch;
    for (size_t i = 0; i < sequences.size(); ++i) {
      batch.push_back(
          {&sequences[i]->Get(), At(queries, query_stride, i), At(output, output_stride, i)});
    }
    Call([&] { return Get().Step(layer, batch, StreamOf(stream)); });
  }
  void Wait(PySequence& sequence) {
    Call([&] { return Get().Wait(&sequence.Get()); });
  }

  void Join(const Sequences& sequences) {
    std::vector<EngineSequence*> batch;
    for (const PySequence* sequence : sequences) batch.push_back(&sequence->Get());
    Call([&] { return Get().Join(batch); });
  }
  void Settle(PySequence& sequence, uintptr_t stream) {
    Call([&] { return Get().Settle(&sequence.Get(), StreamOf(stream)); });
  }
  void Leave(PySequence& sequence, uintptr_t stream) {
    Call([&] { return Get().Leave(&sequence.Get(), StreamOf(stream)); });
  }

  void CloseSequence(PySequence& sequence) { End(sequence, &Engine::Close); }
  void ReleaseSequence(PySequence& sequence) { End(sequence, &Engine::Release); }

  nb::dict IngestCounts() const { return CountsDict(Get().ingest_counts()); }

  Engine& Get() const {
    if (engine_ == nullptr) throw nb::value_error("engine: it is closed");
    return *engine_;
  }

 private:
  template <typename F>
  void Call(const F& call) {
    RaiseIfError(Released(call));
  }
  void End(PySequence& sequence, absl::Status (Engine::*how)(EngineSequence*)) {
    EngineSequence* const ended = &sequence.Get();
    sequence.sequence = nullptr;
    Call([&] { return (Get().*how)(ended); });
  }

  std::unique_ptr<Engine> engine_;
};

EngineSequence& PySequence::Get() const {
  engine->Get();
  if (sequence == nullptr) throw nb::value_error("sequence: it is closed");
  return *sequence;
}

}  // namespace

void BindEngine(nb::module_& m) {
  nb::class_<PySequence>(m, "EngineSequence")
      .def_prop_ro("info", &PySequence::Info)
      .def_prop_ro("link", &PySequence::Link)
      .def_prop_ro("link_reason", &PySequence::LinkReason);
  nb::class_<PyEngine>(m, "Engine")
      .def(nb::init<const std::string&, const std::string&, int, const std::vector<int>&,
                    const nb::bytes&, const nb::bytes&, int, const std::string&, double,
                    const std::string&, const std::string&, const std::string&,
                    const std::string&>(),
           nb::arg("target"), nb::arg("device"), nb::arg("output_type"), nb::arg("links"),
           nb::arg("hot_cache"), nb::arg("select"), nb::arg("append_batch_tokens"),
           nb::arg("worker_name"), nb::arg("timeout"), nb::arg("tls_ca"), nb::arg("tls_cert"),
           nb::arg("tls_key"), nb::arg("tls_server_name"))
      .def("close", &PyEngine::Close)
      .def("create", &PyEngine::Create, nb::keep_alive<0, 1>(), nb::arg("request"))
      .def("attach_handle", &PyEngine::AttachHandle, nb::keep_alive<0, 1>(), nb::arg("handle"))
      .def("ingest", &PyEngine::Ingest, nb::arg("sequence"), nb::arg("layer"),
           nb::arg("first_token"), nb::arg("tokens"), nb::arg("keys"), nb::arg("values"),
           nb::arg("token_stride"), nb::arg("head_stride"), nb::arg("query_rms"), nb::arg("stream"))
      .def("seal", &PyEngine::Seal, nb::arg("sequence"))
      .def("attach", &PyEngine::Attach, nb::arg("sequence"))
      .def("append", &PyEngine::Append, nb::arg("layer"), nb::arg("sequences"), nb::arg("keys"),
           nb::arg("values"), nb::arg("stride"), nb::arg("head_stride"), nb::arg("stream"))
      .def("step", &PyEngine::Step, nb::arg("layer"), nb::arg("sequences"), nb::arg("queries"),
           nb::arg("query_stride"), nb::arg("output"), nb::arg("output_stride"), nb::arg("stream"))
      .def("wait", &PyEngine::Wait, nb::arg("sequence"))
      .def("join", &PyEngine::Join, nb::arg("sequences"))
      .def("settle", &PyEngine::Settle, nb::arg("sequence"), nb::arg("stream"))
      .def("leave", &PyEngine::Leave, nb::arg("sequence"), nb::arg("stream"))
      .def("close_sequence", &PyEngine::CloseSequence, nb::arg("sequence"))
      .def("release_sequence", &PyEngine::ReleaseSequence, nb::arg("sequence"))
      .def("ingest_counts", &PyEngine::IngestCounts);
}

}  // namespace clusterkv::worker
