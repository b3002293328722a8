// CKV_CHECK(condition) << "message": ends the process when a programmer's promise is broken, in
// every build. Bad input from outside is never a CHECK; it is an absl::Status.
#ifndef CLUSTERKV_KERNELS_BASE_CHECK_H_
#define CLUSTERKV_KERNELS_BASE_CHECK_H_

#include <cstdlib>
#include <iostream>
#include <sstream>

namespace clusterkv::internal {

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition) {
    message_ << file << ":" << line << " CHECK failed: " << condition << " ";
  }
  [[noreturn]] ~CheckFailure() {
    std::cerr << message_.str() << std::endl;
    std::abort();
  }
  std::ostream& stream() { return message_; }

 private:
  std::ostringstream message_;
};

struct CheckVoidify {
  void operator&(std::ostream&) {}
};

}  // namespace clusterkv::internal

#define CKV_CHECK(condition)                            \
  (condition) ? (void)0                                 \
              : ::clusterkv::internal::CheckVoidify() & \
                    ::clusterkv::internal::CheckFailure(__FILE__, __LINE__, #condition).stream()

#endif  // CLUSTERKV_KERNELS_BASE_CHECK_H_
