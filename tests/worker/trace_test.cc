#include "worker/trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/element_type.h"

namespace clusterkv::worker {
namespace {

using kernels::ElementType;
using ::testing::HasSubstr;

TraceLayer MakeLayer(ElementType type, int64_t tokens, int64_t queries, bool query_rms) {
  TraceLayer layer;
  layer.shape = {2, 6, 16, type};
  layer.tokens = tokens;
  layer.queries = queries;
  const int64_t element_bytes = kernels::ElementBytes(type);
  std::mt19937 random(5);
  const auto fill = [&](std::vector<std::byte>& bytes, int64_t elements) {
    bytes.resize(elements * element_bytes);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  };
  fill(layer.keys, tokens * 2 * 16);
  fill(layer.values, tokens * 2 * 16);
  fill(layer.q, queries * 6 * 16);
  if (query_rms) {
    for (int i = 0; i < 32; ++i) layer.query_rms.push_back(0.25f * static_cast<float>(i));
  }
  return layer;
}

class TraceTest : public testing::Test {
 protected:
  TraceTest() {
    std::string name = (std::filesystem::temp_directory_path() / "clusterkv_trace_XXXXXX").string();
    directory_ = mkdtemp(name.data());
  }
  ~TraceTest() override { std::filesystem::remove_all(directory_); }

  std::string Path(const std::string& name) const { return (directory_ / name).string(); }
  std::string Slurp(const std::string& path) const {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }
  absl::Status ReadBytes(const std::string& bytes) const {
    const std::string path = Path("bytes.safetensors");
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<int64_t>(bytes.size()));
    return ReadTraceLayer(path).status();
  }
  // A file with this header and so many bytes of data.
  absl::Status ReadHeader(const std::string& header, size_t data_bytes) const {
    const uint64_t size = header.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &size, 8);
    return ReadBytes(bytes + header + std::string(data_bytes, '\0'));
  }

  std::filesystem::path directory_;
};

TEST_F(TraceTest, WhatIsWrittenIsReadBack) {
  for (const ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    for (const int64_t tokens : {1, 2, 97}) {
      for (const bool query_rms : {false, true}) {
        const TraceLayer written = MakeLayer(type, tokens, tokens / 2, query_rms);
        ASSERT_TRUE(WriteTraceLayer(written, Path("a")).ok());
        const auto read = ReadTraceLayer(Path("a"));
        ASSERT_TRUE(read.ok()) << read.status();
        EXPECT_EQ(read->shape, written.shape);
        EXPECT_EQ(read->tokens, written.tokens);
        EXPECT_EQ(read->queries, written.queries);
        EXPECT_EQ(read->keys, written.keys);
        EXPECT_EQ(read->values, written.values);
        EXPECT_EQ(read->q, written.q);
        EXPECT_EQ(read->query_rms, written.query_rms);
      }
    }
  }
}

TEST_F(TraceTest, RefusesToWriteWhatDoesNotFitItsShape) {
  TraceLayer layer = MakeLayer(ElementType::kBFloat16, 5, 2, true);
  layer.values.pop_back();
  EXPECT_THAT(std::string(WriteTraceLayer(layer, Path("a")).message()), HasSubstr("tensor v"));
  layer = MakeLayer(ElementType::kBFloat16, 5, 2, true);
  layer.query_rms.pop_back();
  EXPECT_THAT(std::string(WriteTraceLayer(layer, Path("a")).message()), HasSubstr("q_rms"));
  layer.query_rms.clear();
  layer.shape.head_dim = 17;
  EXPECT_EQ(WriteTraceLayer(layer, Path("a")).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
}

TEST_F(TraceTest, MissingFileIsNotFound) {
  EXPECT_EQ(ReadTraceLayer(Path("none")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(
      WriteTraceLayer(MakeLayer(ElementType::kBFloat16, 1, 0, false), Path("no/where")).code(),
      absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadTraceLayer(directory_.string()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(TraceTest, EveryTruncationIsRefused) {
  ASSERT_TRUE(WriteTraceLayer(MakeLayer(ElementType::kFloat16, 2, 1, true), Path("a")).ok());
  const std::string whole = Slurp(Path("a"));
  ASSERT_TRUE(ReadBytes(whole).ok());
  for (size_t size = 0; size < whole.size(); ++size) {
    ASSERT_EQ(ReadBytes(whole.substr(0, size)).code(), absl::StatusCode::kInvalidArgument) << size;
  }
  EXPECT_EQ(ReadBytes(whole + "x").code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(TraceTest, CorruptedHeadersNeverBreakTheReader) {
  const uint64_t seed = 11;
  std::cout << "seed " << seed << "\n";
  std::mt19937_64 random(seed);
  ASSERT_TRUE(WriteTraceLayer(MakeLayer(ElementType::kBFloat16, 3, 1, true), Path("a")).ok());
  const std::string whole = Slurp(Path("a"));
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, whole.data(), 8);
  int refused = 0;
  for (int i = 0; i < 5000; ++i) {
    std::string bytes = whole;
    for (uint64_t flips = 1 + random() % 3; flips > 0; --flips) {
      const size_t at = random() % (8 + header_bytes);
      bytes[at] =
          random() % 2 == 0 ? static_cast<char>(random()) : "0123456789[]{},\":-"[random() % 18];
    }
    const absl::Status status = ReadBytes(bytes);
    refused += !status.ok();
    if (!status.ok()) {
      ASSERT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    }
  }
  EXPECT_GT(refused, 2500);
}

std::string Tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return absl::StrCat("\"", name, "\":{\"dtype\":\"", dtype, "\",\"shape\":[", shape,
                      "],\"data_offsets\":[", offsets, "]}");
}

TEST_F(TraceTest, HostileHeadersNameTheTensor) {
  const std::string k = Tensor("k", "BF16", "2,1,16", "0,64");
  const std::string v = Tensor("v", "BF16", "2,1,16", "64,128");
  const std::string q = Tensor("q", "BF16", "1,2,16", "128,192");
  const auto header = [](const std::vector<std::string>& tensors) {
    std::string text = "{";
    for (const std::string& tensor : tensors)
      absl::StrAppend(&text, text == "{" ? "" : ",", tensor);
    return text + "}";
  };
  ASSERT_TRUE(ReadHeader(header({k, v, q}), 192).ok());
  ASSERT_TRUE(ReadHeader(header({"\"__metadata__\":{\"a\":\"b\"}", k, v, q}), 192).ok());
  const struct {
    std::string header;
    size_t data_bytes;
    std::string message;
  } cases[] = {
      {header({k, v}), 128, "tensor q"},
      {header({k, v, k, q}), 192, "named twice"},
      {header({k, v, Tensor("q", "BF16", "1,2,16", "64,128")}), 128, "overlaps"},
      {header({k, v, Tensor("q", "BF16", "1,2,16", "127,191")}), 191, "align"},
      {header({k, v, Tensor("q", "BF16", "1,2,16", "130,194")}), 194, "hole"},
      {header({k, v, q}), 200, "bytes as its header says"},
      {header({k, v, Tensor("q", "BF16", "1,2,16", "128,1000000")}), 192, "outside"},
      {header({k, v, Tensor("q", "BF16", "1,2,16", "192,128")}), 192, "outside"},
      {header({k, v, Tensor("q", "BF16", "1,2,16", "-128,192")}), 192, "data_offsets"},
      {header({k, v, Tensor("q", "BF16", "1,2,16", "128,192,192")}), 192, "data_offsets"},
      {header({k, v, Tensor("q", "BF16", "1,2,15", "128,192")}), 192, "takes 60 bytes"},
      {header({k, v, Tensor("q", "BF16", "4611686018427387904,4,16", "128,192")}), 192,
       "overflows"},
      {header({k, v, Tensor("q", "BF16", "18446744073709551616,4,16", "128,192")}), 192, "shape"},
      {header({k, v, Tensor("q", "BF16", "1.5,4,16", "128,192")}), 192, "shape"},
      {header({k, v, Tensor("q", "BF16", "32", "128,192")}), 192, "3 dimensions"},
      {header({k, v, Tensor("q", "F16", "1,2,16", "128,192")}), 192, "tensor q"},
      {header({k, v, Tensor("q", "X99", "1,2,16", "128,192")}), 192, "unknown dtype"},
      {header({k, v, Tensor("q", "BF16", "2,1,16", "128,192")}), 192, "fewer queries"},
      {header({k, Tensor("v", "BF16", "1,2,16", "64,128"), q}), 192, "tensor v"},
      {header({k, v, q, Tensor("q_rms", "BF16", "1,16", "192,224")}), 224, "tensor q_rms"},
      {header({k, v, q, Tensor("q_rms", "F32", "2,16", "192,320")}), 320, "tensor q_rms"},
      {header({k, v, q, "\"x\":7"}), 192, "tensor x"},
      {"[]", 0, "JSON object"},
      {"", 0, "JSON object"},
      {header({k, v, q}) + "x", 192, "JSON object"},
      {"{\"k\":", 192, "JSON object"},
      {std::string(100'000, '['), 0, "JSON object"},
  };
  for (const auto& bad : cases) {
    const absl::Status status = ReadHeader(bad.header, bad.data_bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.header.substr(0, 300);
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.message));
  }
}

TEST_F(TraceTest, HeaderLongerThanTheFileIsRefused) {
  std::string bytes(64, '\xff');
  EXPECT_EQ(ReadBytes(bytes).code(), absl::StatusCode::kInvalidArgument);
  const uint64_t size = 57;
  std::memcpy(bytes.data(), &size, 8);
  EXPECT_EQ(ReadBytes(bytes).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(TraceTest, RealTracesAreRead) {
  const char* shared = std::getenv("CLUSTERKV_SHARED");
  const std::filesystem::path traces =
      (shared != nullptr ? std::filesystem::path(shared)
                         : std::filesystem::path(CLUSTERKV_SOURCE_DIR) / ".." / "shared") /
      "traces";
  const std::filesystem::path path = traces / "moby_dick_8k.layer3.safetensors";
  if (!std::filesystem::exists(path)) {
    GTEST_SKIP() << "no traces at " << traces << "; set CLUSTERKV_SHARED to test on real KV";
  }
  const auto layer = ReadTraceLayer(path.string());
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_EQ(layer->shape, (kernels::KvShape{2, 8, 128, ElementType::kBFloat16}));
  EXPECT_EQ(layer->tokens, 8192);
  EXPECT_EQ(layer->queries, 384);
  EXPECT_EQ(layer->query_rms.size(), 256u);
  int64_t bad = -1;
  EXPECT_TRUE(
      kernels::AllFinite(layer->keys.data(), layer->shape.element_type, 8192 * 2 * 128, &bad));
  ASSERT_TRUE(WriteTraceLayer(*layer, Path("copy")).ok());
  const auto copy = ReadTraceLayer(Path("copy"));
  ASSERT_TRUE(copy.ok()) << copy.status();
  EXPECT_EQ(copy->keys, layer->keys);
  EXPECT_EQ(copy->query_rms, layer->query_rms);
}

}  // namespace
}  // namespace clusterkv::worker
