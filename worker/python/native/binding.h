// What the parts of the native module share.
//
// Errors leave as (code, reason, message, metadata) through clusterkv.errors.make_error: this file
// is the one place where the worker's statuses become exceptions.
#ifndef CLUSTERKV_WORKER_PYTHON_NATIVE_BINDING_H_
#define CLUSTERKV_WORKER_PYTHON_NATIVE_BINDING_H_

#include <nanobind/nanobind.h>

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/error.h"
#include "worker/window_writer.h"

namespace clusterkv::worker {

namespace nb = nanobind;

inline void RaiseIfError(const absl::Status& status) {
  if (status.ok()) return;
  nb::dict metadata;
  for (const auto& [key, value] : MetadataOf(status)) {
    metadata[nb::str(key.c_str())] = nb::str(value.c_str());
  }
  const v1::ErrorReason reason = ReasonOf(status);
  const std::string name = status.GetPayload("type.googleapis.com/google.rpc.ErrorInfo").has_value()
                               ? v1::ErrorReason_Name(reason)
                               : std::string();
  nb::object error = nb::module_::import_("clusterkv.errors")
                         .attr("make_error")(static_cast<int>(status.code()), name,
                                             std::string(status.message()), metadata);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw nb::python_error();
}

template <typename T>
T ValueOrRaise(absl::StatusOr<T> value) {
  RaiseIfError(value.status());
  return *std::move(value);
}

template <typename Message>
nb::bytes Serialized(const Message& message) {
  const std::string bytes = message.SerializeAsString();
  return nb::bytes(bytes.data(), bytes.size());
}

template <typename Message>
Message Parsed(const nb::bytes& bytes, const char* what) {
  Message message;
  if (!message.ParseFromArray(bytes.c_str(), static_cast<int>(bytes.size()))) {
    RaiseIfError(Error(v1::INVALID_FIELD, std::string(what) + ": not a serialized message"));
  }
  return message;
}

// What the call returns, made without the GIL.
template <typename Call>
auto Released(Call call) {
  nb::gil_scoped_release release;
  return call();
}

inline nb::dict CountsDict(const IngestCounts& counts) {
  nb::dict fallbacks, dict;
  for (const auto& [reason, count] : counts.fallbacks) fallbacks[nb::str(reason.c_str())] = count;
  dict["window_bytes"] = counts.window_bytes;
  dict["host_bytes"] = counts.host_bytes;
  dict["fallbacks"] = fallbacks;
  return dict;
}

// engine.cc: _native.Engine and _native.EngineSequence.
void BindEngine(nb::module_& m);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_PYTHON_NATIVE_BINDING_H_
