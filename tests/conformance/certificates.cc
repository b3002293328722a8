#include "tests/conformance/certificates.h"

#include <openssl/ec.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "kernels/base/check.h"

namespace clusterkv::cache_service::testing {
namespace {

using OwnedKey = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using OwnedCertificate = std::unique_ptr<X509, decltype(&X509_free)>;

std::string Text(BIO* bio) {
  char* data = nullptr;
  const auto size = static_cast<size_t>(BIO_get_mem_data(bio, &data));
  std::string text(data, size);
  BIO_free(bio);
  return text;
}

std::string CertificatePem(X509* certificate) {
  BIO* bio = BIO_new(BIO_s_mem());
  PEM_write_bio_X509(bio, certificate);
  return Text(bio);
}

std::string KeyPem(EVP_PKEY* key) {
  BIO* bio = BIO_new(BIO_s_mem());
  PEM_write_bio_PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr);
  return Text(bio);
}

void Extend(X509* certificate, int nid, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, certificate, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str());
  CKV_CHECK(extension != nullptr) << value;
  X509_add_ext(certificate, extension, -1);
  X509_EXTENSION_free(extension);
}

void SetName(X509_NAME* name, const std::string& common_name) {
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(common_name.c_str()), -1, -1,
                             0);
}

OwnedCertificate Unsigned(const CertificateSpec& spec, EVP_PKEY* key) {
  static long serial = 1;
  OwnedCertificate certificate(X509_new(), X509_free);
  X509_set_version(certificate.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate.get()), ++serial);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), absl::ToInt64Seconds(spec.begin));
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), absl::ToInt64Seconds(spec.end));
  X509_set_pubkey(certificate.get(), key);
  SetName(X509_get_subject_name(certificate.get()), spec.common_name);
  if (!spec.alternative_names.empty()) {
    Extend(certificate.get(), NID_subject_alt_name, spec.alternative_names);
  }
  return certificate;
}

void Replace(const std::string& path, const std::string& text) {
  std::ofstream(path + ".new", std::ios::binary) << text;
  CKV_CHECK(std::rename((path + ".new").c_str(), path.c_str()) == 0) << path;
}

}  // namespace

TestAuthority::TestAuthority(const std::string& common_name)
    : key_(EVP_EC_gen("P-256"), EVP_PKEY_free), certificate_(nullptr, X509_free) {
  certificate_ = Unsigned({.common_name = common_name, .alternative_names = ""}, key_.get());
  SetName(X509_get_issuer_name(certificate_.get()), common_name);
  Extend(certificate_.get(), NID_basic_constraints, "critical,CA:TRUE");
  CKV_CHECK(X509_sign(certificate_.get(), key_.get(), EVP_sha256()) != 0) << "cannot sign";
  pem_ = CertificatePem(certificate_.get());
}

IssuedCertificate TestAuthority::Issue(const CertificateSpec& spec) const {
  const OwnedKey key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const OwnedCertificate certificate = Unsigned(spec, key.get());
  X509_set_issuer_name(certificate.get(), X509_get_subject_name(certificate_.get()));
  CKV_CHECK(X509_sign(certificate.get(), key_.get(), EVP_sha256()) != 0) << "cannot sign";
  return {CertificatePem(certificate.get()), KeyPem(key.get())};
}

IssuedCertificate TestAuthority::IssueServer(const std::string& common_name) const {
  return Issue({.common_name = common_name, .alternative_names = "DNS:localhost,IP:127.0.0.1"});
}

CertificateFolder::CertificateFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "ckv-tls-XXXXXX").string();
  path_ = mkdtemp(name.data());
}

CertificateFolder::~CertificateFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void CertificateFolder::Write(const IssuedCertificate& issued) const {
  Replace(certificate(), issued.certificate);
  Replace(key(), issued.key);
}

void CertificateFolder::WriteCa(const std::string& pem) const { Replace(ca(), pem); }

}  // namespace clusterkv::cache_service::testing
