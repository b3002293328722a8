// Certificates for tests: an authority made on the spot, and what it signs.
#ifndef CLUSTERKV_TESTS_CONFORMANCE_CERTIFICATES_H_
#define CLUSTERKV_TESTS_CONFORMANCE_CERTIFICATES_H_

#include <openssl/evp.h>
#include <openssl/x509.h>

#include <memory>
#include <string>

#include "absl/time/time.h"

namespace clusterkv::cache_service::testing {

struct CertificateSpec {
  std::string common_name = "someone";
  std::string alternative_names = "";  // as openssl writes them: "DNS:localhost,URI:spiffe://a/b"
  absl::Duration begin = -absl::Minutes(5), end = absl::Hours(1);  // from now
};

struct IssuedCertificate {
  std::string certificate, key;  // PEM
};

class TestAuthority {
 public:
  explicit TestAuthority(const std::string& common_name);
  IssuedCertificate Issue(const CertificateSpec& spec) const;
  // For the server of a test on 127.0.0.1.
  IssuedCertificate IssueServer(const std::string& common_name = "server") const;
  const std::string& pem() const { return pem_; }

 private:
  std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key_;
  std::unique_ptr<X509, decltype(&X509_free)> certificate_;
  std::string pem_;
};

// A folder with the files of one party. A file is replaced whole, as a mounted secret's are.
class CertificateFolder {
 public:
  CertificateFolder();
  ~CertificateFolder();
  void Write(const IssuedCertificate& issued) const;
  void WriteCa(const std::string& pem) const;
  std::string certificate() const { return path_ + "/tls.crt"; }
  std::string key() const { return path_ + "/tls.key"; }
  std::string ca() const { return path_ + "/ca.crt"; }

 private:
  std::string path_;
};

}  // namespace clusterkv::cache_service::testing

#endif  // CLUSTERKV_TESTS_CONFORMANCE_CERTIFICATES_H_
