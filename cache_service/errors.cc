#include "cache_service/errors.h"

#include "absl/strings/str_cat.h"

namespace clusterkv::cache_service {

absl::Status FieldError(v1::ErrorReason reason, std::string_view field, std::string_view expected,
                        std::string_view got) {
  const std::string field_name(field), expected_text(expected), got_text(got);
  return Error(reason, absl::StrCat(field_name, ": expected ", expected_text, ", got ", got_text),
               {{"field", field_name}, {"expected", expected_text}, {"got", got_text}});
}

absl::Status CheckRange(std::string_view field, uint64_t least, uint64_t most, uint64_t got) {
  if (got >= least && got <= most) return absl::OkStatus();
  return FieldError(v1::INVALID_FIELD, field, absl::StrCat(least, " to ", most), absl::StrCat(got));
}

absl::Status LimitError(std::string_view limit, int64_t allowed, int64_t needed) {
  const std::string name(limit);
  return Error(v1::LIMIT_EXCEEDED, absl::StrCat(name, ": at most ", allowed, ", needed ", needed),
               {{"limit", name},
                {"expected", absl::StrCat("at most ", allowed)},
                {"got", absl::StrCat(needed)}});
}

absl::Status LayerOutOfRange(int64_t layer, int64_t layers) {
  return FieldError(v1::LAYER_OUT_OF_RANGE, "layer", absl::StrCat("0 to ", layers - 1),
                    absl::StrCat(layer));
}

absl::Status SequenceReleased(std::string_view name, uint64_t generation) {
  const std::string text(name);
  return Error(v1::SEQUENCE_RELEASED,
               absl::StrCat("sequence ", text, " of generation ", generation,
                            " was released or evicted while the call was under way"),
               {{"sequence", text}, {"generation", absl::StrCat(generation)}});
}

absl::Status CopyOf(const absl::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return ErrorFromParts(status.code(), ReasonOf(status),
                        std::string_view(status.message().data(), status.message().size()),
                        MetadataOf(status));
}

absl::Status ChecksumMismatch(std::string_view field, int64_t layer, uint64_t expected,
                              uint64_t got) {
  return Error(v1::CHECKSUM_MISMATCH,
               absl::StrCat(std::string(field), ": expected ", absl::Hex(expected), ", got ",
                            absl::Hex(got)),
               {{"field", "checksum"}, {"layer", absl::StrCat(layer)}});
}

absl::Status DeviceLost() {
  return Error(v1::DEVICE_LOST,
               "the GPU failed that alone held rows of this layer: put the prompt again, as a new "
               "sequence");
}

absl::Status ServerEnding() {
  return Error(v1::CANCELLED_BY_CLIENT, "the server is ending; queued work is given up");
}

}  // namespace clusterkv::cache_service
