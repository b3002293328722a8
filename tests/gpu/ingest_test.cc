#include <cstring>
#include <iostream>
#include <random>
#include <utility>
#include <vector>

#include "kernels/ingest/ingest_cuda.h"
#include "kernels/ingest/rows_hash.h"
#include "tests/gpu/gpu_test.h"

namespace clusterkv::gpu_test {
namespace {

using kernels::ElementType;
using Bytes = std::vector<unsigned char>;

constexpr int64_t kPageBytes = 4096;

// Finite numbers of any type.
Bytes RandomRows(int64_t bytes, unsigned seed) {
  std::mt19937 generator(seed);
  Bytes rows(static_cast<size_t>(bytes));
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto byte = static_cast<unsigned char>(generator());
    rows[i] = i % 2 == 0 ? byte : byte & 0x3f;
  }
  return rows;
}

// Rows of each head apart, `gap` bytes between any two, as a layer of an engine may lie; out: as
// they are when packed.
Bytes Scattered(const Bytes& packed, int64_t tokens, int64_t heads, int64_t head_bytes, int64_t gap,
                kernels::StridedRows* view) {
  view->token_stride_bytes = head_bytes + gap;
  view->head_stride_bytes = tokens * view->token_stride_bytes;
  Bytes rows(static_cast<size_t>(heads * view->head_stride_bytes), 0xff);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      std::memcpy(&rows[h * view->head_stride_bytes + t * view->token_stride_bytes],
                  &packed[(t * heads + h) * head_bytes], static_cast<size_t>(head_bytes));
    }
  }
  return rows;
}

void PacksWhatLiesApart(int64_t tokens, int64_t heads, int64_t head_bytes, int64_t gap) {
  const int64_t bytes = tokens * heads * head_bytes;
  const Bytes keys = RandomRows(bytes, 1), values = RandomRows(bytes, 2);
  kernels::PackRows rows;
  const DeviceArray<unsigned char> from_keys(
      Scattered(keys, tokens, heads, head_bytes, gap, &rows.keys));
  const DeviceArray<unsigned char> from_values(
      Scattered(values, tokens, heads, head_bytes, gap + 16, &rows.values));
  const DeviceArray<unsigned char> slot_keys(keys.size()), slot_values(values.size());
  const DeviceArray<unsigned long long> hash(1);  // NOLINT(runtime/int): atomics' type
  rows.keys.data = from_keys.data();
  rows.values.data = from_values.data();
  rows.tokens = tokens;
  rows.heads = static_cast<int32_t>(heads);
  rows.head_bytes = static_cast<int32_t>(head_bytes);
  rows.slot_keys = slot_keys.data();
  rows.slot_values = slot_values.data();
  rows.hash = hash.data();
  GPU_OK(kernels::LaunchPackRows(rows, nullptr));
  GPU_CHECK(slot_keys.Host() == keys) << tokens << " " << heads << " " << head_bytes << "\n";
  GPU_CHECK(slot_values.Host() == values) << tokens << " " << heads << " " << head_bytes << "\n";
  GPU_CHECK(slot_keys.GuardsHold() && slot_values.GuardsHold()) << "wrote beside the slot\n";
  GPU_CHECK(hash.Host()[0] == kernels::RowsHash(keys.data(), values.data(), keys.size())) << "\n";
}

GPU_TEST(PacksRowsOfEveryWidth) {
  PacksWhatLiesApart(67, 2, 256, 0);
  PacksWhatLiesApart(31, 8, 256, 512);
  PacksWhatLiesApart(13, 3, 24, 8);
  PacksWhatLiesApart(5, 7, 12, 4);
  PacksWhatLiesApart(9, 1, 10, 2);
  PacksWhatLiesApart(1, 1, 2, 0);
  PacksWhatLiesApart(0, 2, 256, 0);
}

// A chunk in a slot, taken in two launches (sinks apart) into pages in reverse order.
class Chunk {
 public:
  Chunk(ElementType type, int64_t rows, int64_t row_bytes)
      : type_(type),
        rows_(rows),
        row_bytes_(row_bytes),
        keys_(RandomRows(rows * row_bytes, 3)),
        values_(RandomRows(rows * row_bytes, 4)) {}

  Bytes& keys() { return keys_; }
  Bytes& values() { return values_; }

  kernels::RowsFound Take(int64_t split) const {
    const int64_t per_page = kPageBytes / row_bytes_;
    const auto pages = static_cast<uint32_t>((kFirst + rows_ + per_page - 1) / per_page);
    std::vector<uint32_t> key_pages, value_pages;
    for (uint32_t p = pages; p > 0; --p) {
      key_pages.push_back(2 * p - 1);
      value_pages.push_back(2 * p - 2);
    }
    const DeviceArray<unsigned char> slot_keys(keys_), slot_values(values_);
    const DeviceArray<unsigned char> arena(static_cast<size_t>(2 * pages * kPageBytes));
    const DeviceArray<uint32_t> key_list(key_pages), value_list(value_pages);
    const DeviceArray<kernels::RowsFound> found(std::vector<kernels::RowsFound>(1));
    kernels::TakeRows take;
    take.slot_keys = slot_keys.data();
    take.slot_values = slot_values.data();
    take.rows = rows_;
    take.type = type_;
    take.keys = kernels::MakeDevicePagedView(arena.data(), key_list.data(), kPageBytes, row_bytes_);
    take.values =
        kernels::MakeDevicePagedView(arena.data(), value_list.data(), kPageBytes, row_bytes_);
    take.found = found.data();
    for (const auto& [begin, end] : {std::pair(int64_t{0}, split), std::pair(split, rows_)}) {
      take.begin = begin;
      take.end = end;
      take.first = static_cast<uint32_t>(kFirst + begin);
      GPU_OK(kernels::LaunchTakeRows(take, nullptr));
    }
    Bytes expected(arena.size(), 0xff);
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t page = (kFirst + i) / per_page, at = (kFirst + i) % per_page * row_bytes_;
      const auto bytes = static_cast<size_t>(row_bytes_);
      std::memcpy(&expected[key_pages[page] * kPageBytes + at], &keys_[i * row_bytes_], bytes);
      std::memcpy(&expected[value_pages[page] * kPageBytes + at], &values_[i * row_bytes_], bytes);
    }
    GPU_CHECK(arena.Host() == expected) << "pages of rows of " << row_bytes_ << " bytes\n";
    GPU_CHECK(arena.GuardsHold()) << "wrote beside the pages\n";
    return found.Host()[0];
  }

 private:
  static constexpr int64_t kFirst = 5;
  ElementType type_;
  int64_t rows_, row_bytes_;
  Bytes keys_, values_;
};

void TakesAndJudges(ElementType type, int64_t rows, int64_t row_bytes) {
  Chunk chunk(type, rows, row_bytes);
  for (const int64_t split : {int64_t{0}, std::min<int64_t>(16, rows), rows}) {
    const kernels::RowsFound found = chunk.Take(split);
    GPU_CHECK(found.hash ==
              kernels::RowsHash(chunk.keys().data(), chunk.values().data(), chunk.keys().size()))
        << split << "\n";
    GPU_CHECK(found.not_first_bad_key == 0 && found.not_first_bad_value == 0) << split << "\n";
  }
  const int64_t bytes = kernels::ElementBytes(type), elements = rows * row_bytes / bytes;
  const uint32_t infinity = type == ElementType::kFloat32   ? 0x7f800000u
                            : type == ElementType::kFloat16 ? 0xfc00u
                                                            : 0x7fc1u;
  for (const int64_t bad : {int64_t{0}, elements / 2, elements - 1}) {
    Chunk marred = chunk;
    for (const int64_t at : {bad, elements - 1}) {
      std::memcpy(&marred.keys()[at * bytes], &infinity, static_cast<size_t>(bytes));
    }
    std::memcpy(&marred.values()[(elements - 1 - bad) * bytes], &infinity,
                static_cast<size_t>(bytes));
    const kernels::RowsFound found = marred.Take(std::min<int64_t>(16, rows));
    GPU_CHECK(static_cast<int64_t>(~found.not_first_bad_key) == bad) << bad << "\n";
    GPU_CHECK(static_cast<int64_t>(~found.not_first_bad_value) == elements - 1 - bad)
        << bad << "\n";
  }
}

GPU_TEST(TakesRowsOfEveryTypeAndWidth) {
  TakesAndJudges(ElementType::kBFloat16, 67, 512);
  TakesAndJudges(ElementType::kFloat16, 131, 24);
  TakesAndJudges(ElementType::kFloat32, 19, 4);
  TakesAndJudges(ElementType::kFloat32, 17, 2048);
  TakesAndJudges(ElementType::kBFloat16, 23, 6);
  TakesAndJudges(ElementType::kFloat16, 1, 2);
}

GPU_TEST(RefusesOddBytes) {
  kernels::PackRows pack;
  pack.tokens = pack.heads = 1;
  pack.head_bytes = 3;
  const DeviceArray<unsigned long long> hash(1);  // NOLINT(runtime/int): atomics' type
  pack.hash = hash.data();
  GPU_CHECK(kernels::LaunchPackRows(pack, nullptr) == cudaErrorInvalidValue) << "\n";
  kernels::TakeRows take;
  take.rows = 1;
  take.end = 2;
  GPU_CHECK(kernels::LaunchTakeRows(take, nullptr) == cudaErrorInvalidValue) << "\n";
}

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
