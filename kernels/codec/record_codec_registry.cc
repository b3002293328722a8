#include "kernels/codec/record_codec.h"

// One line per codec: the name of the function, in its own file, that returns it. "raw" first.
#define CLUSTERKV_RECORD_CODECS(CODEC) \
  CODEC(RawCodec)                      \
  CODEC(K8V4Codec)                     \
  /* end */

namespace clusterkv::kernels {

#define CLUSTERKV_DECLARE_CODEC(Codec) const RecordCodec* Codec();
CLUSTERKV_RECORD_CODECS(CLUSTERKV_DECLARE_CODEC)
#undef CLUSTERKV_DECLARE_CODEC

const std::vector<const RecordCodec*>& RecordCodecs() {
#define CLUSTERKV_LIST_CODEC(Codec) Codec(),
  static const auto& codecs =
      *new std::vector<const RecordCodec*>{CLUSTERKV_RECORD_CODECS(CLUSTERKV_LIST_CODEC)};
#undef CLUSTERKV_LIST_CODEC
  return codecs;
}

const RecordCodec* FindRecordCodec(std::string_view name) {
  for (const RecordCodec* codec : RecordCodecs()) {
    if (codec->name() == name) return codec;
  }
  return nullptr;
}

}  // namespace clusterkv::kernels
