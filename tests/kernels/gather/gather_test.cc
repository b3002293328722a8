#include "kernels/gather/gather.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace clusterkv::kernels {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

// Records in shuffled pages of an arena whose bytes tell where they lie.
class Records {
 public:
  Records(int64_t size, int64_t record_bytes, int64_t page_bytes, uint32_t seed)
      : pages_(PagesFor(size, record_bytes, page_bytes)),
        arena_((pages_.size() + 2) * page_bytes),
        random_(seed) {
    std::iota(pages_.begin(), pages_.end(), 1);
    std::shuffle(pages_.begin(), pages_.end(), random_);
    for (std::byte& byte : arena_) byte = static_cast<std::byte>(random_());
    view_ = MakePagedView<const std::byte>(arena_.data(), pages_.data(), page_bytes, record_bytes,
                                           size);
  }
  const PagedView& view() const { return view_; }
  std::vector<int64_t> RandomIndices(int64_t count) {
    std::vector<int64_t> indices(count);
    for (int64_t& index : indices) index = static_cast<int64_t>(random_() % view_.size);
    return indices;
  }

 private:
  std::vector<uint32_t> pages_;
  std::vector<std::byte> arena_;
  std::mt19937 random_;
  PagedView view_;
};

using GatherFunction = absl::Status (*)(const PagedView&, absl::Span<const int64_t>,
                                        absl::Span<std::byte>);

// `packed` lies between guard bands, at an odd address.
std::vector<std::byte> Gather(GatherFunction gather, const PagedView& records,
                              const std::vector<int64_t>& indices) {
  constexpr size_t kGuard = 67;
  const size_t bytes = indices.size() * records.element_bytes;
  std::vector<std::byte> buffer(bytes + 2 * kGuard, std::byte{0xa5});
  EXPECT_TRUE(gather(records, indices, absl::MakeSpan(buffer).subspan(kGuard, bytes)).ok());
  EXPECT_THAT(absl::MakeSpan(buffer).first(kGuard), Each(std::byte{0xa5}));
  EXPECT_THAT(absl::MakeSpan(buffer).last(kGuard), Each(std::byte{0xa5}));
  return std::vector<std::byte>(buffer.begin() + kGuard, buffer.end() - kGuard);
}

void ExpectRecordsInOrder(const Records& records, const std::vector<int64_t>& indices) {
  const PagedView& view = records.view();
  const std::vector<std::byte> packed = Gather(GatherRecords, view, indices);
  ASSERT_EQ(packed, Gather(GatherRecordsReference, view, indices));
  for (size_t i = 0; i < indices.size(); ++i) {
    ASSERT_TRUE(std::equal(view.At(indices[i]), view.At(indices[i]) + view.element_bytes,
                           packed.begin() + i * view.element_bytes))
        << i;
  }
}

TEST(GatherTest, GivesRecordsBitForBitInTheOrderAsked) {
  for (int64_t record_bytes : {1, 7, 64, 198, 512, 1024}) {
    for (int64_t size : {1, 3, 7, 8, 9, 101, 1009}) {
      SCOPED_TRACE(testing::Message() << "record_bytes " << record_bytes << " size " << size);
      Records records(size, record_bytes, 4096, /*seed=*/static_cast<uint32_t>(size));
      for (int64_t count : {0, 1, 2, 3, 17, 257}) {
        ExpectRecordsInOrder(records, records.RandomIndices(count));
      }
      std::vector<int64_t> all(size);
      std::iota(all.begin(), all.end(), 0);
      ExpectRecordsInOrder(records, all);
      std::reverse(all.begin(), all.end());
      ExpectRecordsInOrder(records, all);
    }
  }
}

TEST(GatherTest, RunsOfNeighboursStopAtPages) {
  Records records(64, 512, 4096, /*seed=*/3);  // eight a page
  for (int64_t begin : {0, 1, 7, 8, 9, 55}) {
    for (int64_t length : {1, 7, 8, 9}) {
      std::vector<int64_t> indices(length);
      std::iota(indices.begin(), indices.end(), begin);
      indices.push_back(begin);  // and back
      ExpectRecordsInOrder(records, indices);
    }
  }
}

TEST(GatherTest, OutputsBeyondACoresCachesAreBitExact) {
  for (int64_t record_bytes : {509, 512}) {
    Records records(2000, record_bytes, 32768, /*seed=*/5);
    ExpectRecordsInOrder(records, records.RandomIndices(5003));  // 2.5 MB
  }
}

TEST(GatherTest, AnIndexOutsideIsNamedAndNothingIsWritten) {
  Records records(10, 64, 4096, /*seed=*/1);
  for (GatherFunction gather : {GatherRecords, GatherRecordsReference}) {
    for (int64_t bad : {int64_t{-1}, int64_t{10}, INT64_MAX, INT64_MIN}) {
      std::vector<std::byte> packed(3 * 64, std::byte{0x5a});
      const absl::Status status = gather(records.view(), {4, bad, 11}, absl::MakeSpan(packed));
      EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr("indices[1]: expected 0 to 9, got " + std::to_string(bad)));
      EXPECT_THAT(packed, Each(std::byte{0x5a}));
    }
  }
}

TEST(GatherTest, APackedBufferOfAnotherLengthIsRefusedAndNotWritten) {
  Records records(10, 64, 4096, /*seed=*/1);
  for (GatherFunction gather : {GatherRecords, GatherRecordsReference}) {
    for (size_t bytes : {0, 63, 64, 127, 129, 192}) {
      std::vector<std::byte> packed(bytes, std::byte{0x5a});
      const absl::Status status = gather(records.view(), {1, 2}, absl::MakeSpan(packed));
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bytes;
      EXPECT_THAT(packed, Each(std::byte{0x5a}));
    }
  }
}

}  // namespace
}  // namespace clusterkv::kernels
