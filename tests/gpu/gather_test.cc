#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/gather/gather_cuda.h"
#include "tests/gpu/gpu_test.h"

namespace clusterkv::gpu_test {
namespace {

using kernels::DevicePagedView;
using kernels::RecordMove;

std::mt19937_64 generator(7);

// Records of `record_bytes` over scattered pages, each byte random.
struct Records {
  Records(int64_t record_bytes, int64_t page_bytes, int64_t count)
      : record_bytes(record_bytes),
        page_bytes(page_bytes),
        per_page(page_bytes / record_bytes),
        host((count + per_page - 1) / per_page * page_bytes + page_bytes),
        pages((count + per_page - 1) / per_page) {
    for (unsigned char& byte : host) byte = static_cast<unsigned char>(generator());
    std::iota(pages.begin(), pages.end(), 1);
    std::shuffle(pages.begin(), pages.end(), generator);
    device = std::make_unique<DeviceArray<unsigned char>>(host);
    device_pages = std::make_unique<DeviceArray<uint32_t>>(pages);
  }
  DevicePagedView View() const {
    return kernels::MakeDevicePagedView(device->data(), device_pages->data(), page_bytes,
                                        record_bytes);
  }
  const unsigned char* At(int64_t i) const {
    return host.data() + pages[i / per_page] * page_bytes + i % per_page * record_bytes;
  }
  int64_t record_bytes, page_bytes, per_page;
  std::vector<unsigned char> host;
  std::vector<uint32_t> pages;
  std::unique_ptr<DeviceArray<unsigned char>> device;
  std::unique_ptr<DeviceArray<uint32_t>> device_pages;
};

GPU_TEST(GatherIsBitExactAtEveryRecordSize) {
  for (int64_t record_bytes : {4, 12, 72, 96, 200, 512, 1024, 4096}) {
    for (int64_t count : {0, 1, 31, 257, 1031}) {
      const Records records(record_bytes, 4096, 777);
      std::vector<int32_t> indices(count);
      for (int32_t& index : indices) index = static_cast<int32_t>(generator() % 777);
      DeviceArray<int32_t> device_indices(indices);
      DeviceArray<unsigned char> packed(count * record_bytes);
      GPU_OK(kernels::LaunchGatherRecords(records.View(), device_indices.data(), count,
                                          packed.data(), nullptr));
      const auto got = packed.Host();
      bool equal = packed.GuardsHold();
      for (int64_t i = 0; i < count; ++i) {
        equal &= std::memcmp(&got[i * record_bytes], records.At(indices[i]), record_bytes) == 0;
      }
      GPU_CHECK(equal) << record_bytes << " bytes, " << count << " records\n";
    }
  }
}

GPU_TEST(MoveRecordsFillsExactlyItsSlots) {
  for (int64_t record_bytes : {200, 512}) {
    const Records a(record_bytes, 4096, 500), b(record_bytes, 65536, 900);
    const std::vector<DevicePagedView> host_views = {a.View(), b.View()};
    DeviceArray<DevicePagedView> views(host_views);
    constexpr int kSlots = 600, kMoves = 311;
    std::vector<int32_t> slots(kSlots);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), generator);
    std::vector<RecordMove> host_moves(kMoves);
    for (int i = 0; i < kMoves; ++i) {
      const uint32_t view = generator() % 2;
      host_moves[i] = {view, static_cast<uint32_t>(generator() % (view == 0 ? 500 : 900)),
                       slots[i] * record_bytes};
    }
    DeviceArray<RecordMove> moves(host_moves);
    for (int count : {kMoves, 100, 0}) {
      DeviceArray<int32_t> device_count(std::vector<int32_t>{count});
      DeviceArray<unsigned char> memory(kSlots * record_bytes);
      GPU_OK(kernels::LaunchMoveRecords(views.data(), moves.data(), device_count.data(), kMoves,
                                        static_cast<int32_t>(record_bytes), memory.data(),
                                        nullptr));
      std::vector<unsigned char> want(kSlots * record_bytes, 0xff);
      for (int i = 0; i < count; ++i) {
        const RecordMove& move = host_moves[i];
        std::memcpy(&want[move.destination], (move.view == 0 ? a : b).At(move.element),
                    record_bytes);
      }
      GPU_CHECK(memory.Host() == want) << count << " of " << record_bytes << " bytes\n";
      GPU_CHECK(memory.GuardsHold());
    }
  }
}

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
