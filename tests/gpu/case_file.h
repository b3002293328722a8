// Test cases in files: named arrays, written by make_cases.cc from the references and read by the
// GPU tests, which run where neither Abseil nor the references can be built.
//
// A file: "CKVCASE1", then per array: name length (u32), name, bytes (u64), contents, padded to 8
// bytes.
#ifndef CLUSTERKV_TESTS_GPU_CASE_FILE_H_
#define CLUSTERKV_TESTS_GPU_CASE_FILE_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>

namespace clusterkv::gpu_test {

class CaseFile {
 public:
  template <typename T>
  void Put(const std::string& name, const T* data, size_t count) {
    const char* bytes = reinterpret_cast<const char*>(data);
    arrays_[name].assign(bytes, bytes + count * sizeof(T));
  }
  template <typename T>
  void Put(const std::string& name, const std::vector<T>& data) {
    Put(name, data.data(), data.size());
  }
  template <typename T>
  void PutValue(const std::string& name, T value) {
    Put(name, &value, 1);
  }

  bool Has(const std::string& name) const { return arrays_.count(name) > 0; }
  template <typename T>
  std::vector<T> Get(const std::string& name) const {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) {
      std::cerr << "the case has no array " << name << "\n";
      std::abort();
    }
    std::vector<T> data(found->second.size() / sizeof(T));
    if (!data.empty()) std::memcpy(data.data(), found->second.data(), data.size() * sizeof(T));
    return data;
  }
  template <typename T>
  T Value(const std::string& name) const {
    return Get<T>(name).at(0);
  }

  bool Write(const std::string& path) const {
    std::ofstream file(path, std::ios::binary);
    file.write("CKVCASE1", 8);
    for (const auto& [name, bytes] : arrays_) {
      const uint32_t length = static_cast<uint32_t>(name.size());
      const uint64_t size = bytes.size();
      const char padding[8] = {};
      file.write(reinterpret_cast<const char*>(&length), 4);
      file.write(name.data(), length);
      file.write(reinterpret_cast<const char*>(&size), 8);
      file.write(bytes.data(), static_cast<std::streamsize>(size));
      file.write(padding, static_cast<std::streamsize>((8 - size % 8) % 8));
    }
    return file.good();
  }
  static CaseFile Read(const std::string& path) {
    CaseFile out;
    std::ifstream file(path, std::ios::binary);
    char magic[8];
    if (!file.read(magic, 8) || std::memcmp(magic, "CKVCASE1", 8) != 0) {
      std::cerr << path << " is not a case file\n";
      std::abort();
    }
    uint32_t length;
    while (file.read(reinterpret_cast<char*>(&length), 4)) {
      std::string name(length, '\0');
      uint64_t size = 0;
      file.read(name.data(), length);
      file.read(reinterpret_cast<char*>(&size), 8);
      std::vector<char>& bytes = out.arrays_[name];
      bytes.resize(size);
      file.read(bytes.data(), static_cast<std::streamsize>(size));
      file.ignore(static_cast<std::streamsize>((8 - size % 8) % 8));
    }
    return out;
  }

 private:
  std::map<std::string, std::vector<char>> arrays_;
};

}  // namespace clusterkv::gpu_test

#endif  // CLUSTERKV_TESTS_GPU_CASE_FILE_H_
