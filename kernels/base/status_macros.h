// CKV_RETURN_IF_ERROR(expr); CKV_ASSIGN_OR_RETURN(auto x, expr): as Abseil's newer macros of the
// same names, for the Abseil that the distributions ship.
#ifndef CLUSTERKV_KERNELS_BASE_STATUS_MACROS_H_
#define CLUSTERKV_KERNELS_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define CKV_RETURN_IF_ERROR(expr)                             \
  do {                                                        \
    if (absl::Status ckv_status = (expr); !ckv_status.ok()) { \
      return ckv_status;                                      \
    }                                                         \
  } while (false)

#define CKV_STATUS_CONCAT_INNER(a, b) a##b
#define CKV_STATUS_CONCAT(a, b) CKV_STATUS_CONCAT_INNER(a, b)

#define CKV_ASSIGN_OR_RETURN(lhs, expr) \
  CKV_ASSIGN_OR_RETURN_IMPL(CKV_STATUS_CONCAT(ckv_statusor_, __LINE__), lhs, expr)
#define CKV_ASSIGN_OR_RETURN_IMPL(statusor, lhs, expr)     \
  auto statusor = (expr);                                  \
  if (!statusor.ok()) return std::move(statusor).status(); \
  lhs = std::move(*statusor)

#endif  // CLUSTERKV_KERNELS_BASE_STATUS_MACROS_H_
