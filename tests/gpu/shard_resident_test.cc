// Groups of a shard with a device: who may be one, what is said to the others, and when they end.
// What their kernels answer: resident_test.cc, engine_resident_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "cache_service/cuda_device.h"
#include "kernels/base/host_id.h"
#include "kernels/comm/peer_window.h"
#include "kernels/resident/layout_version.h"
#include "kernels/resident/resident_cuda.h"
#include "kernels/runtime/device.h"
#include "tests/cache_service/shard_harness.h"

namespace clusterkv::cache_service {
namespace {

constexpr int64_t kPrompt = 300, kWindow = 64;

v1::KvShape Shape(uint32_t head_dim = 128) {
  v1::KvShape shape = TestShape();
  shape.set_head_dim(head_dim);
  return shape;
}

class ShardResidentTest : public ::testing::Test {
 protected:
  void Make(bool with_device) {
    TestDevice() = nullptr;
    if (with_device) TestDevice() = [] { return CreateCudaDevice(0).value(); };
    shard_ = std::make_unique<ShardHarness>(TestOptions());
  }
  Shard& shard() { return **shard_; }

  // A sealed sequence, attached.
  uint64_t Attach(const std::string& name, const TestKv& kv, const char* codec = "raw",
                  uint32_t budget = 64) {
    v1::OpenSequenceRequest open = OpenRequest(name, kv, kPrompt);
    open.set_codec(codec);
    open.set_max_decode_tokens(200);
    open.mutable_index()->set_window_tokens(kWindow);
    shard_->Ready(open, kv);
    v1::AttachRequest attach;
    *attach.mutable_sequence() = Handle(name);
    attach.mutable_select()->set_budget_tokens(budget);
    return shard().Attach(attach).value().attachment_id();
  }

  // With a window of this process's, as the emulator has it.
  v1::ConnectResidentRequest Request(std::vector<uint64_t> attachments) {
    v1::ConnectResidentRequest request;
    request.mutable_attachment_ids()->Add(attachments.begin(), attachments.end());
    if (window_.bytes() == 0) {
      window_ = kernels::DeviceBuffer::Create(0, kernels::kExportedBytes).value();
    }
    request.mutable_window()->set_handle(kernels::ExportWindow(window_).value());
    request.mutable_window()->set_bytes(static_cast<uint64_t>(window_.bytes()));
    request.set_slots(64);
    request.set_max_exact_tokens(64);
    request.set_host(kernels::HostId());
    request.set_layout_version(kernels::kResidentLayoutVersion);
    return request;
  }
  uint32_t Resident() { return (*shard().GetStats().mutable_attachments_by_link())["resident"]; }

  void ExpectRefused(const v1::ConnectResidentRequest& request, const std::string& why) {
    const auto response = shard().ConnectResident(request);
    ASSERT_TRUE(response.ok()) << response.status();
    EXPECT_EQ(response->resident_id(), 0u);
    EXPECT_THAT(response->reason(), testing::HasSubstr(why));
  }
  void ExpectInvalid(const v1::ConnectResidentRequest& request, const std::string& field) {
    const absl::Status status = shard().ConnectResident(request).status();
    EXPECT_EQ(Reason(status), v1::INVALID_FIELD) << status;
    EXPECT_EQ(Metadata(status, "field"), field);
  }

  kernels::DeviceBuffer window_;  // outlives the shard
  std::unique_ptr<ShardHarness> shard_;
};

TEST_F(ShardResidentTest, AGroupTakesOverWhatWasClusteredAndEndsWithItsFirstAttachment) {
  Make(true);
  const TestKv kv = MakeKv(Shape(), kPrompt + 100, 1);
  const uint64_t a = Attach("a", kv), b = Attach("b", kv);
  const auto group = shard().ConnectResident(Request({a, b}));
  ASSERT_TRUE(group.ok()) << group.status();
  ASSERT_NE(group->resident_id(), 0u) << group->reason();
  EXPECT_GT(group->requests().bytes(), 0u);
  EXPECT_THAT(group->window_begin(), testing::ElementsAre(kPrompt, kPrompt, kPrompt, kPrompt));
  EXPECT_EQ(Resident(), 2u);

  v1::RenewResidentRequest renew;
  renew.set_resident_id(group->resident_id());
  ASSERT_TRUE(shard().Append(AppendRequest("b", kv, kPrompt, kWindow)).ok());
  shard_->WaitIdle();
  const auto renewed = shard().RenewResident(renew);
  ASSERT_TRUE(renewed.ok()) << renewed.status();
  const int64_t moved = kPrompt + kWindow;
  EXPECT_THAT(renewed->window_begin(), testing::ElementsAre(kPrompt, moved, kPrompt, moved));

  ASSERT_TRUE(shard().Release(Handle("a")).ok());
  EXPECT_EQ(Resident(), 0u);
  EXPECT_EQ(Reason(shard().RenewResident(renew).status()), v1::ATTACHMENT_NOT_FOUND);
  shard().DisconnectResident(group->resident_id());
}

TEST_F(ShardResidentTest, WhatAGroupTookOfTheDevicesMemoryComesBack) {
  Make(true);
  const TestKv kv = MakeKv(Shape(), kPrompt, 1);
  const uint64_t attachment = Attach("a", kv);
  const v1::ConnectResidentRequest request = Request({attachment});
  const uint64_t before = shard().GetStats().device_memory_bytes();
  for (int i = 0; i < 2; ++i) {
    const auto group = shard().ConnectResident(request);
    ASSERT_TRUE(group.ok() && group->resident_id() != 0);
    EXPECT_GT(shard().GetStats().device_memory_bytes(), before);
    shard().DisconnectResident(group->resident_id());
  }
  ASSERT_TRUE(shard().Release(Handle("a")).ok());
  EXPECT_EQ(shard().GetStats().device_memory_bytes(), before);
}

TEST_F(ShardResidentTest, RoundsThatWereNotAnsweredEndTheGroup) {
  Make(true);
  const TestKv kv = MakeKv(Shape(), kPrompt + 100, 1);
  const auto group = shard().ConnectResident(Request({Attach("a", kv)}));
  ASSERT_TRUE(group.ok()) << group.status();
  ASSERT_TRUE(shard().Append(AppendRequest("a", kv, kPrompt, kWindow)).ok());
  shard_->WaitIdle();
  v1::RenewResidentRequest renew;
  renew.set_resident_id(group->resident_id());
  renew.set_rounds(3);
  EXPECT_EQ(Metadata(shard().RenewResident(renew).status(), "field"), "rounds");
  EXPECT_EQ(Resident(), 0u);
}

TEST_F(ShardResidentTest, AnAttachmentIsInOneGroup) {
  Make(true);
  const TestKv kv = MakeKv(Shape(), kPrompt, 1);
  const uint64_t a = Attach("a", kv), b = Attach("b", kv);
  const auto first = shard().ConnectResident(Request({a, b}));
  ASSERT_TRUE(first.ok() && first->resident_id() != 0);
  const auto second = shard().ConnectResident(Request({b}));
  ASSERT_TRUE(second.ok() && second->resident_id() != 0);
  EXPECT_EQ(Resident(), 1u);
  shard().DisconnectResident(first->resident_id());
  EXPECT_EQ(Resident(), 1u);
  shard().DisconnectResident(second->resident_id());
  EXPECT_EQ(Resident(), 0u);
}

TEST_F(ShardResidentTest, WhatItDoesNotTakeIsRefusedByName) {
  Make(true);
  const TestKv kv = MakeKv(Shape(), kPrompt, 1), narrow = MakeKv(Shape(32), kPrompt, 1);
  const uint64_t a = Attach("a", kv);
  ExpectRefused(Request({a, Attach("budget", kv, "raw", 32)}), "one shape, codes and selection");
  ExpectRefused(Request({Attach("codec", kv, "k8v4")}), "codec raw, got k8v4");
  ExpectRefused(Request({Attach("narrow", narrow)}), "128 channels");
  ExpectRefused(Request({Attach("large", kv, "raw", 100)}), "max_exact_tokens");
  v1::ConnectResidentRequest request = Request({a});
  request.set_host("elsewhere");
  ExpectRefused(request, "another host");
  request = Request({a});
  request.set_layout_version(2);
  ExpectRefused(request, "layout_version");
}

TEST_F(ShardResidentTest, WithoutADeviceThereIsNone) {
  Make(false);
  ExpectRefused(Request({Attach("a", MakeKv(Shape(), kPrompt, 1))}), "no GPU device");
}

TEST_F(ShardResidentTest, BadRequestsNameTheField) {
  Make(true);
  const uint64_t a = Attach("a", MakeKv(Shape(), kPrompt, 1));
  ExpectInvalid(Request({}), "attachment_ids");
  ExpectInvalid(Request({a, a}), "attachment_ids");
  v1::ConnectResidentRequest request = Request({a});
  request.set_slots(48);
  ExpectInvalid(request, "slots");
  request = Request({a});
  request.set_max_exact_tokens(65);
  ExpectInvalid(request, "max_exact_tokens");
  request = Request({a});
  request.mutable_window()->set_bytes(1000);
  ExpectInvalid(request, "window.bytes");
  EXPECT_EQ(Reason(shard().ConnectResident(Request({17})).status()), v1::ATTACHMENT_NOT_FOUND);
  EXPECT_EQ(Reason(shard().RenewResident({}).status()), v1::ATTACHMENT_NOT_FOUND);
}

}  // namespace
}  // namespace clusterkv::cache_service
