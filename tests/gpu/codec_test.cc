#include <algorithm>
#include <string>
#include <vector>

#include "kernels/codec/record_codec_cuda.h"
#include "tests/gpu/case_file.h"
#include "tests/gpu/gpu_test.h"

namespace clusterkv::gpu_test {
namespace {

using kernels::DeviceRows;
using kernels::RecordCodecCudaParams;
using kernels::RecordFormat;

void RunCase(const std::string& name) {
  const CaseFile file = CaseFile::Read(Registry::Get().cases + "/codec_" + name + ".case");
  const auto numbers = file.Get<int64_t>("numbers");  // head_dim, type, k8v4, count, stride
  RecordCodecCudaParams params;
  params.head_dim = static_cast<int32_t>(numbers[0]);
  params.element_type = static_cast<kernels::ElementType>(numbers[1]);
  params.format = numbers[2] ? RecordFormat::kK8V4 : RecordFormat::kRaw;
  const int64_t count = numbers[3], stride = numbers[4];
  DeviceArray<unsigned char> keys(file.Get<unsigned char>("keys"));
  DeviceArray<unsigned char> values(file.Get<unsigned char>("values"));
  const auto want = file.Get<unsigned char>("records");
  DeviceArray<unsigned char> records(want.size());
  GPU_OK(kernels::LaunchEncodeRecords(params, {keys.data(), stride}, {values.data(), stride}, count,
                                      records.data(), nullptr));
  GPU_CHECK(records.Host() == want) << name << ": records differ\n";
  GPU_CHECK(records.GuardsHold()) << name;

  const auto slots = file.Get<int32_t>("slots");
  const auto want_keys = file.Get<float>("decoded_keys");
  const auto want_values = file.Get<float>("decoded_values");
  DeviceArray<int32_t> device_slots(slots);
  for (const bool scattered : {false, true}) {
    DeviceArray<float> key(want_keys.size()), value(want_keys.size());
    GPU_OK(kernels::LaunchDecodeRecords(params, records.data(),
                                        scattered ? device_slots.data() : nullptr, count,
                                        key.data(), value.data(), nullptr));
    const auto got_keys = key.Host(), got_values = value.Host();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = (scattered ? slots[i] : i) * params.head_dim;
      const int64_t to = i * params.head_dim;
      GPU_CHECK(std::equal(&got_keys[to], &got_keys[to] + params.head_dim, &want_keys[from]) &&
                std::equal(&got_values[to], &got_values[to] + params.head_dim, &want_values[from]))
          << name << ": token " << i << " decodes otherwise\n";
    }
    GPU_CHECK(key.GuardsHold() && value.GuardsHold()) << name;
  }
}

GPU_TEST(CodecRawBFloat16) { RunCase("raw_bf16"); }
GPU_TEST(CodecRawFloat32) { RunCase("raw_fp32"); }
GPU_TEST(CodecK8V4BFloat16) { RunCase("k8v4_bf16"); }
GPU_TEST(CodecK8V4Float16OfThreeBlocks) { RunCase("k8v4_fp16"); }
GPU_TEST(CodecK8V4Float32OfFiveBlocks) { RunCase("k8v4_fp32"); }
GPU_TEST(CodecK8V4Of512Channels) { RunCase("k8v4_wide"); }
GPU_TEST(CodecK8V4OfOneTokenOfOneBlock) { RunCase("k8v4_one"); }

GPU_TEST(CodecOfNothing) {
  RecordCodecCudaParams params;
  params.head_dim = 64;
  const DeviceRows none;
  GPU_OK(kernels::LaunchEncodeRecords(params, none, none, 0, nullptr, nullptr));
  GPU_OK(kernels::LaunchDecodeRecords(params, nullptr, nullptr, 0, nullptr, nullptr, nullptr));
}

GPU_TEST(CodecRefusesOddHeads) {
  RecordCodecCudaParams params;
  const DeviceRows none;
  for (const int dim : {0, 8, 24, 528}) {
    params.head_dim = dim;
    GPU_CHECK(kernels::LaunchEncodeRecords(params, none, none, 1, nullptr, nullptr) ==
              cudaErrorInvalidValue)
        << dim;
  }
}

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
