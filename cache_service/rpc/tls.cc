#include "cache_service/rpc/tls.h"

#include <grpc/grpc_security.h>
#include <grpcpp/version_info.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "cache_service/telemetry/log.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

template <typename T, void (*kFree)(T*)>
struct Freer {
  void operator()(T* object) const { kFree(object); }
};
template <typename T, void (*kFree)(T*)>
using Owned = std::unique_ptr<T, Freer<T, kFree>>;
using Certificate = Owned<X509, X509_free>;
using Key = Owned<EVP_PKEY, EVP_PKEY_free>;

struct BioFreer {
  void operator()(BIO* bio) const { BIO_free(bio); }
};

absl::Status Bad(const std::string& file, const std::string& fault) {
  return absl::InvalidArgumentError(file + ": " + fault);
}

absl::StatusOr<std::string> ReadText(const std::string& file) {
  errno = 0;
  std::ifstream in(file, std::ios::binary);
  std::stringstream text;
  if (!in || !(text << in.rdbuf())) {
    return Bad(file, std::strerror(errno != 0 ? errno : EIO));
  }
  return text.str();
}

std::unique_ptr<BIO, BioFreer> Open(const std::string& text) {
  return std::unique_ptr<BIO, BioFreer>(
      BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// All certificates of a PEM text, in order.
absl::StatusOr<std::vector<Certificate>> ParseCertificates(const std::string& file,
                                                           const std::string& text) {
  std::vector<Certificate> certificates;
  const auto bio = Open(text);
  while (X509* one = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    certificates.emplace_back(one);
  }
  const unsigned long error = ERR_peek_last_error();
  ERR_clear_error();
  if (certificates.empty() || ERR_GET_REASON(error) != PEM_R_NO_START_LINE) {
    return Bad(file, "expected certificates in PEM");
  }
  return certificates;
}

absl::StatusOr<absl::Time> TimeOf(const ASN1_TIME* time) {
  tm parts = {};
  if (ASN1_TIME_to_tm(time, &parts) != 1) return absl::InvalidArgumentError("a time of wrong form");
  return absl::FromTM(parts, absl::UTCTimeZone());
}

// Without a passphrase: nobody is there to type one.
int NoPassphrase(char*, int, int, void*) { return -1; }

// Ready-made credentials of the core, whose certificates come from a callback at each handshake.
// The C++ library has no such credentials of its own; its wrapper is this.
class FetchingCredentials final : public grpc::ServerCredentials {
 public:
#if GRPC_CPP_VERSION_MAJOR == 1 && GRPC_CPP_VERSION_MINOR < 54
  explicit FetchingCredentials(std::shared_ptr<TlsFiles> files)
      : fetcher_(std::move(files)), credentials_(Create(&fetcher_)) {}
  ~FetchingCredentials() override { grpc_server_credentials_release(credentials_); }
#else
  explicit FetchingCredentials(std::shared_ptr<TlsFiles> files)
      : FetchingCredentials(new Fetcher(std::move(files))) {}
#endif
  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  struct Fetcher {
    explicit Fetcher(std::shared_ptr<TlsFiles> tls_files) : files(std::move(tls_files)) {}
    const std::shared_ptr<TlsFiles> files;
    absl::Mutex mutex;
    uint64_t version ABSL_GUARDED_BY(mutex) = 0;
  };

  static grpc_server_credentials* Create(Fetcher* fetcher) {
    const TlsOptions& options = fetcher->files->options();
    const auto request = options.client_ca_file.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                         : options.client_certificate_optional
                             ? GRPC_SSL_REQUEST_CLIENT_CERTIFICATE_AND_VERIFY
                             : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
    return grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(request, &Fetch, fetcher));
  }

  static grpc_ssl_certificate_config_reload_status Fetch(
      void* data, grpc_ssl_server_certificate_config** config) {
    auto* fetcher = static_cast<Fetcher*>(data);
    const std::shared_ptr<const TlsFiles::Material> material = fetcher->files->Current();
    absl::MutexLock lock(&fetcher->mutex);
    // A client that resumes a session by a ticket is let in without another look at its
    // certificate, hours after that has ended. The keys of tickets die with the configuration:
    // where clients show certificates each handshake gets one of its own, and nothing is resumed.
    if (material->version == fetcher->version && material->client_ca.empty()) {
      return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    }
    const grpc_ssl_pem_key_cert_pair pair = {material->key.c_str(), material->certificates.c_str()};
    // Roots are wanted even where clients are asked for nothing: any certificate does.
    const std::string& roots =
        material->client_ca.empty() ? material->certificates : material->client_ca;
    *config = grpc_ssl_server_certificate_config_create(roots.c_str(), &pair, 1);
    fetcher->version = material->version;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

#if GRPC_CPP_VERSION_MAJOR == 1 && GRPC_CPP_VERSION_MINOR < 54
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  Fetcher fetcher_;
  grpc_server_credentials* const credentials_;
#else
  explicit FetchingCredentials(Fetcher* fetcher)
      : grpc::ServerCredentials(Create(fetcher)), fetcher_(fetcher) {}

  const std::unique_ptr<Fetcher> fetcher_;
#endif
};

}  // namespace

absl::StatusOr<std::shared_ptr<TlsFiles>> TlsFiles::Load(const TlsOptions& options) {
  std::shared_ptr<TlsFiles> files(new TlsFiles(options));
  absl::MutexLock lock(&files->mutex_);
  files->stamp_ = files->Stamp();
  CKV_ASSIGN_OR_RETURN(Material material, files->Read());
  material.version = 1;
  files->material_ = std::make_shared<const Material>(std::move(material));
  return files;
}

std::shared_ptr<grpc::ServerCredentials> TlsFiles::Credentials() {
  return std::make_shared<FetchingCredentials>(shared_from_this());
}

std::string TlsFiles::Stamp() const {
  std::string stamp;
  for (const std::string* file :
       {&options_.certificate_file, &options_.key_file, &options_.client_ca_file}) {
    struct stat status = {};
    if (file->empty() || stat(file->c_str(), &status) != 0) continue;
    for (const int64_t number :
         {int64_t{status.st_mtim.tv_sec}, int64_t{status.st_mtim.tv_nsec},
          static_cast<int64_t>(status.st_ino), static_cast<int64_t>(status.st_size)}) {
      stamp += std::to_string(number) + " ";
    }
  }
  return stamp;
}

absl::StatusOr<TlsFiles::Material> TlsFiles::Read() const {
  Material material;
  CKV_ASSIGN_OR_RETURN(material.certificates, ReadText(options_.certificate_file));
  CKV_ASSIGN_OR_RETURN(material.key, ReadText(options_.key_file));
  CKV_ASSIGN_OR_RETURN(const std::vector<Certificate> chain,
                       ParseCertificates(options_.certificate_file, material.certificates));
  const Key key(PEM_read_bio_PrivateKey(Open(material.key).get(), nullptr, &NoPassphrase, nullptr));
  ERR_clear_error();
  if (key == nullptr) return Bad(options_.key_file, "expected a private key in PEM");
  const bool fits = X509_check_private_key(chain.front().get(), key.get()) == 1;
  ERR_clear_error();
  if (!fits) return Bad(options_.key_file, "is not the key of " + options_.certificate_file);
  CKV_ASSIGN_OR_RETURN(const absl::Time begin, TimeOf(X509_get0_notBefore(chain.front().get())));
  CKV_ASSIGN_OR_RETURN(material.expiry, TimeOf(X509_get0_notAfter(chain.front().get())));
  const absl::Time now = absl::Now();
  if (now < begin || now >= material.expiry) {
    return Bad(options_.certificate_file, "is good from " + absl::FormatTime(begin) + " to " +
                                              absl::FormatTime(material.expiry) + " only");
  }
  if (options_.client_ca_file.empty()) return material;
  CKV_ASSIGN_OR_RETURN(material.client_ca, ReadText(options_.client_ca_file));
  CKV_RETURN_IF_ERROR(ParseCertificates(options_.client_ca_file, material.client_ca).status());
  return material;
}

void TlsFiles::Refresh() {
  std::string stamp = Stamp();
  if (stamp == stamp_) return;
  absl::StatusOr<Material> material = Read();
  // Files that were replaced while they were read are read once more at the next handshake.
  stamp_ = Stamp() == stamp ? std::move(stamp) : std::string();
  if (!material.ok()) {
    ++failures_;
    Log(LogLevel::kError, "certificates not taken; the last good ones stay",
        {{"error", std::string(material.status().message())}});
    return;
  }
  material->version = material_->version + 1;
  material_ = std::make_shared<const Material>(*std::move(material));
  Log(LogLevel::kInfo, "certificates reloaded",
      {{"expiry", absl::FormatTime(material_->expiry, absl::UTCTimeZone())}});
}

std::shared_ptr<const TlsFiles::Material> TlsFiles::Current() {
  absl::MutexLock lock(&mutex_);
  Refresh();
  return material_;
}

TlsFiles::Counts TlsFiles::counts() {
  absl::MutexLock lock(&mutex_);
  Refresh();
  return {material_->version - 1, failures_, material_->expiry};
}

}  // namespace clusterkv::cache_service
