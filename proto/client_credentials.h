// How a client knows its server, and the server its client: TLS from files.
//
// Files are read again every few seconds, so that certificates are renewed by replacing them: new
// connections use what is there then, open ones live on. Thread-safe.
#ifndef CLUSTERKV_PROTO_CLIENT_CREDENTIALS_H_
#define CLUSTERKV_PROTO_CLIENT_CREDENTIALS_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace grpc {
class ChannelArguments;
class ChannelCredentials;
}  // namespace grpc

namespace clusterkv {

struct ClientTls {
  std::string ca_file;                     // PEM, who signed the server's; empty: no TLS
  std::string certificate_file, key_file;  // PEM, the client's own; empty: it shows none
  std::string server_name;                 // in the server's certificate; empty: the target's host
  bool enabled() const { return !ca_file.empty(); }
};

// Credentials for a channel; arguments gets what belongs to them. Without TLS: those of plain text.
// Errors: InvalidArgument when a file cannot be read, or of certificate and key one is missing.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(
    const ClientTls& options, grpc::ChannelArguments* arguments);

}  // namespace clusterkv

#endif  // CLUSTERKV_PROTO_CLIENT_CREDENTIALS_H_
