// Record codecs: how one token's K and V of one KV head lie in memory and travel to a decode
// worker.
//
// Arena, recall, hot cache and attention know a record by its codec alone: its size and how it is
// decoded. Selection and attention state never see a codec: they are built from the keys and values
// as they came. A new codec is a file of its own and one line in record_codec_registry.cc (see
// README.md).
//
// A codec whose records are coarse may have *remainders*: what a record's value lacks, coded again.
// They never travel. The service keeps them beside the records and answers, with every selection,
// what they would have added to the worker's attention (kernels/attention/correction.h).
//
// Codecs are stateless, immortal and thread-safe.
#ifndef CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_H_
#define CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_H_

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels/base/element_type.h"

namespace clusterkv::kernels {

class RecordCodec {
 public:
  virtual ~RecordCodec() = default;

  // The name in configuration, requests and figures: "raw", "k8v4".
  virtual std::string_view name() const = 0;

  // Bytes of one record; the same for every token. At most 4,096 for head_dim <= 512.
  virtual int64_t RecordBytes(ElementType type, int64_t head_dim) const = 0;

  // Encodes `count` tokens. Token i's key is at keys + i * key_stride_bytes, [head_dim] of `type`,
  // its value likewise; its record goes to records + i * RecordBytes(). Host memory. Inputs are
  // finite.
  virtual void Encode(const std::byte* keys, int64_t key_stride_bytes, const std::byte* values,
                      int64_t value_stride_bytes, ElementType type, int64_t head_dim, int64_t count,
                      std::byte* records) const = 0;

  // Decodes the record to key [head_dim] and value [head_dim] as float; either may be null: not
  // wanted. `type` is the element type that was encoded.
  virtual void Decode(const std::byte* record, ElementType type, int64_t head_dim, float* key,
                      float* value) const = 0;

  // True if equal records mean equal keys and values, bit for bit.
  virtual bool lossless() const { return false; }

  // Bytes of one token's remainder, the same for every token; 0: this codec has none, and the two
  // functions below are never called. At most 4,096 for head_dim <= 512.
  virtual int64_t RemainderBytes(ElementType, int64_t /*head_dim*/) const { return 0; }

  // Codes what the values lack: token i's value is at values + i * value_stride_bytes as in Encode,
  // its record at records + i * RecordBytes(), its remainder goes to remainders + i *
  // RemainderBytes().
  virtual void EncodeRemainders(const std::byte* /*values*/, int64_t /*value_stride_bytes*/,
                                ElementType, int64_t /*head_dim*/, int64_t /*count*/,
                                const std::byte* /*records*/, std::byte* /*remainders*/) const {}

  // remainder [head_dim] as float: about the token's value minus what Decode makes of its record.
  virtual void DecodeRemainder(const std::byte* /*record*/, const std::byte* /*remainder_code*/,
                               ElementType, int64_t /*head_dim*/, float* /*remainder*/) const {}
};

// The codec of that name, or null.
const RecordCodec* FindRecordCodec(std::string_view name);
// All codecs, "raw" first.
const std::vector<const RecordCodec*>& RecordCodecs();

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_H_
