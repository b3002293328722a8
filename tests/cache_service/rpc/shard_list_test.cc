#include "cache_service/shard_list.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "proto/placement.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::HasSubstr;

class ShardListTest : public ::testing::Test {
 protected:
  ShardListTest()
      : file_((std::filesystem::temp_directory_path() / ("shards-list-" + std::to_string(getpid())))
                  .string()) {}
  ~ShardListTest() override { std::filesystem::remove(file_); }

  // Replaced as a ConfigMap is: by another file.
  void Write(const std::string& text) const {
    std::ofstream(file_ + ".new") << text;
    std::filesystem::rename(file_ + ".new", file_);
  }
  std::string FaultOf(const std::string& text) const {
    Write(text);
    const auto list = ShardList::Load(file_, "a");
    return list.ok() ? "none" : std::string(list.status().message());
  }

  const std::string file_;
};

TEST_F(ShardListTest, ReadsNamesAndAddresses) {
  Write("# all of them\nb  host-b:7400\n\na\t[::1]:7401 # this one\n");
  const auto list = ShardList::Load(file_, "a").value();
  EXPECT_EQ(list->own_name(), "a");
  const auto shards = list->Current();
  ASSERT_EQ(shards.size(), 2u);
  EXPECT_EQ(shards[0].name(), "a");
  EXPECT_EQ(shards[0].address(), "[::1]:7401");
  EXPECT_EQ(shards[1].name(), "b");
  EXPECT_EQ(shards[1].address(), "host-b:7400");
}

TEST_F(ShardListTest, FaultsNameFileAndLine) {
  EXPECT_EQ(FaultOf("a h:1\n"), "none");
  EXPECT_THAT(FaultOf(""), HasSubstr("expected a line"));
  for (const char* bad : {"a", "a h", "a :1", "a h:1 more", "a/b h:1", "a h:1\na h:2"}) {
    EXPECT_THAT(FaultOf(std::string("z h:0\n") + bad + "\n"), HasSubstr(file_ + ":")) << bad;
  }
  std::filesystem::remove(file_);
  EXPECT_THAT(std::string(ShardList::Load(file_, "a").status().message()), HasSubstr("No such"));
  Write("a h:1\n");
  EXPECT_THAT(std::string(ShardList::Load(file_, "a b").status().message()),
              HasSubstr("shard_name"));
  EXPECT_FALSE(ShardList::Load(file_, "").value()->own_name().empty()) << "the host's name";
}

TEST_F(ShardListTest, AChangedFileIsTakenAndABadOneIsNot) {
  Write("a h:1\n");
  const auto list = ShardList::Load(file_, "a").value();
  EXPECT_EQ(list->Current().size(), 1u);
  Write("a h:1\nb h:2\n");
  EXPECT_EQ(list->Current().size(), 2u);
  Write("a h:1\nb\n");
  EXPECT_EQ(list->Current().size(), 2u);
  std::filesystem::remove(file_);
  EXPECT_EQ(list->Current().size(), 2u);
  Write("a h:1\nb h:2\nc h:3\n");
  EXPECT_EQ(list->Current().size(), 3u);
}

TEST_F(ShardListTest, NamesTheOwnerUnlessItIsThisShard) {
  Write("a h:1\nb h:2\nc h:3\n");
  const auto list = ShardList::Load(file_, "b").value();
  int own = 0;
  for (int i = 0; i < 300; ++i) {
    const std::string sequence = "sequence" + std::to_string(i);
    const auto ranked = RankShards(sequence, list->Current());
    const auto owner = list->OtherOwner(sequence);
    EXPECT_EQ(owner.has_value() ? owner->name() : "b", ranked[0].name());
    own += !owner.has_value();
    // Without the first, the second takes it; without all, whoever is asked.
    const auto next = list->OtherTaker(sequence, {ranked[0].name()});
    EXPECT_EQ(next.has_value() ? next->name() : "b", ranked[1].name());
    EXPECT_FALSE(list->OtherTaker(sequence, {"a", "b", "c"}).has_value());
  }
  EXPECT_NEAR(own, 100, 50);
}

TEST_F(ShardListTest, AShardThatIsNotListedOwnsNothing) {
  Write("a h:1\nb h:2\n");
  const auto list = ShardList::Load(file_, "gone").value();
  for (int i = 0; i < 20; ++i) EXPECT_TRUE(list->OtherOwner(std::to_string(i)).has_value());
}

}  // namespace
}  // namespace clusterkv::cache_service
