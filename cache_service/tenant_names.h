// How a tenant's names are told from another's inside one store: a prefix that no name of the
// contract's can have, as tenants' views put it before all of theirs.
#ifndef CLUSTERKV_CACHE_SERVICE_TENANT_NAMES_H_
#define CLUSTERKV_CACHE_SERVICE_TENANT_NAMES_H_

#include <cstddef>
#include <string>
#include <string_view>

namespace clusterkv::cache_service {

constexpr size_t kMaxNameBytes = 256;  // of a sequence's name in the contract
constexpr size_t kScopeBytes = 4;

// index: 0 to 262143.
inline std::string TenantScope(int index) {
  std::string scope = "\x01";
  for (int shift = 12; shift >= 0; shift -= 6) {
    scope.push_back(static_cast<char>('0' + ((index >> shift) & 63)));
  }
  return scope;
}

// The bytes of the name as the tenant gave it.
inline size_t OwnNameBytes(std::string_view name) {
  const bool scoped = name.size() > kScopeBytes && name.front() == '\x01';
  return name.size() - (scoped ? kScopeBytes : 0);
}

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TENANT_NAMES_H_
