// gRPC server reflection, v1 and v1alpha, over the callback API.
//
// Own rather than the library's plugin: that one knows v1alpha only in the gRPC that distributions
// ship, and being synchronous it keeps threads that take network events away from those that
// answer.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_REFLECTION_RPC_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_REFLECTION_RPC_H_

#include <grpcpp/impl/service_type.h>

#include <memory>
#include <string>
#include <vector>

namespace clusterkv::cache_service {

// The services to register with a server, which lists `services` (full names). Descriptors come
// from the generated pool.
std::vector<std::unique_ptr<grpc::Service>> MakeReflectionServices(
    const std::vector<std::string>& services);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_REFLECTION_RPC_H_
