#include "proto/client_credentials.h"

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <grpcpp/support/channel_arguments.h>

#include <cerrno>
#include <cstring>
#include <fstream>

namespace clusterkv {
namespace {

constexpr unsigned kRereadSeconds = 5;

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(
    const ClientTls& options, grpc::ChannelArguments* arguments) {
  using grpc::experimental::FileWatcherCertificateProvider;
  if (options.certificate_file.empty() != options.key_file.empty()) {
    return absl::InvalidArgumentError(
        "TLS: expected a certificate and its key, got one of the two");
  }
  if (!options.enabled()) {
    if (options.certificate_file.empty()) return grpc::InsecureChannelCredentials();
    return absl::InvalidArgumentError(
        "TLS: expected the file of who signed the server's certificate, got none");
  }
  // A channel with a file that is not there would wait for it in silence.
  for (const std::string* file : {&options.ca_file, &options.certificate_file, &options.key_file}) {
    errno = 0;
    if (!file->empty() && !std::ifstream(*file).good()) {
      return absl::InvalidArgumentError("TLS: cannot read " + *file + ": " + std::strerror(errno));
    }
  }
  grpc::experimental::TlsChannelCredentialsOptions tls;
  if (options.certificate_file.empty()) {
    tls.set_certificate_provider(
        std::make_shared<FileWatcherCertificateProvider>(options.ca_file, kRereadSeconds));
  } else {
    tls.set_certificate_provider(std::make_shared<FileWatcherCertificateProvider>(
        options.key_file, options.certificate_file, options.ca_file, kRereadSeconds));
    tls.watch_identity_key_cert_pairs();
  }
  tls.watch_root_certs();
  if (!options.server_name.empty()) arguments->SetSslTargetNameOverride(options.server_name);
  return grpc::experimental::TlsCredentials(tls);
}

}  // namespace clusterkv
