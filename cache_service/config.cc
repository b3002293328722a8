#include "cache_service/config.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include "google/protobuf/descriptor.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "proto/placement.h"

namespace clusterkv::cache_service {
namespace {

using google::protobuf::FieldDescriptor;

constexpr int64_t kMaxDurationMs = int64_t{24} * 3600 * 1000;

// The first complaint of the text parser, with its place. Old and new protobuf name the hook
// differently; both are here, and each library calls its own.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  explicit FirstError(std::string file) : file_(std::move(file)) {}
#if GOOGLE_PROTOBUF_VERSION >= 4022000
  void RecordError(int line, int column, absl::string_view message) override {
    Note(line, column, std::string(message));
  }
#else
  void AddError(int line, int column, const std::string& message) override {
    Note(line, column, message);
  }
#endif
  const std::string& text() const { return text_; }

 private:
  void Note(int line, int column, const std::string& message) {
    if (!text_.empty()) return;
    text_ =
        file_ + ":" + std::to_string(line + 1) + ":" + std::to_string(column + 1) + ": " + message;
  }
  std::string file_, text_;
};

// Fields of the file alone are no flags.
const FieldDescriptor* FindField(const std::string& name) {
  const FieldDescriptor* field = v1::ServerConfig::descriptor()->FindFieldByName(name);
  return field == nullptr || field->is_repeated() ? nullptr : field;
}

int EditDistance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row[b.size()];
}

std::string NearestFlag(std::string_view name) {
  std::string best;
  int best_distance = static_cast<int>(name.size() / 2) + 1;
  auto consider = [&](std::string_view candidate) {
    const int distance = EditDistance(name, candidate);
    if (distance >= best_distance) return;
    best_distance = distance;
    best = candidate;
  };
  for (const ConfigField& field : ConfigFields()) consider(field.name);
  for (std::string_view other : {"config", "check_config", "print_metrics", "help", "version"})
    consider(other);
  return best;
}

absl::Status Wrong(const std::string& place, const std::string& field, const std::string& expected,
                   const std::string& got) {
  const std::string where = place.empty() ? field : place + ": " + field;
  return Error(v1::INVALID_FIELD, where + ": expected " + expected + ", got " + got,
               {{"field", field}, {"expected", expected}, {"got", got}});
}

// Sets one field of the message from a flag's text.
absl::Status SetFromFlag(const FieldDescriptor* field, const std::string& value,
                         v1::ServerConfig* message) {
  const google::protobuf::Reflection* reflection = message->GetReflection();
  const std::string name(field->name());
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      reflection->SetString(message, field, value);
      return absl::OkStatus();
    case FieldDescriptor::CPPTYPE_BOOL:
      if (value != "true" && value != "false") {
        return Wrong("--" + name, name, "true or false", "\"" + value + "\"");
      }
      reflection->SetBool(message, field, value == "true");
      return absl::OkStatus();
    default: {
      uint32_t number = 0;
      const char* end = value.data() + value.size();
      const auto parsed = std::from_chars(value.data(), end, number);
      if (parsed.ec != std::errc() || parsed.ptr != end || value.empty()) {
        return Wrong("--" + name, name, "a whole number from 0 to 4294967295", "\"" + value + "\"");
      }
      reflection->SetUInt32(message, field, number);
      return absl::OkStatus();
    }
  }
}

struct Flag {
  std::string name;
  std::optional<std::string> value;
};

absl::StatusOr<Flag> SplitFlag(const std::string& argument) {
  if (argument.size() < 3 || argument.compare(0, 2, "--") != 0) {
    return Error(v1::INVALID_FIELD, "argument: expected --flag=value, got \"" + argument + "\"");
  }
  Flag flag;
  const size_t equals = argument.find('=');
  flag.name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
  std::replace(flag.name.begin(), flag.name.end(), '-', '_');
  if (equals != std::string::npos) flag.value = argument.substr(equals + 1);
  return flag;
}

absl::Status UnknownFlag(const std::string& name) {
  std::string message = "unknown flag --" + name;
  if (const std::string nearest = NearestFlag(name); !nearest.empty()) {
    message += "; did you mean --" + nearest + "?";
  } else {
    message += "; --help lists the flags";
  }
  return Error(v1::INVALID_FIELD, message, {{"field", name}});
}

absl::Status ReadConfigFile(const std::string& file, CommandLine* line) {
  std::ifstream in(file, std::ios::binary);
  std::stringstream text;
  if (!in || !(text << in.rdbuf())) {
    return Wrong("--config", "config", "a readable file",
                 "\"" + file + "\" (" + std::strerror(errno != 0 ? errno : EIO) + ")");
  }
  return ParseConfigText(text.str(), file, &line->message, &line->places);
}

// The flags that are no fields of the message. Returns whether `flag` is one.
absl::StatusOr<bool> TakeOwnFlag(const Flag& flag, CommandLine* line) {
  bool* target = flag.name == "help"            ? &line->help
                 : flag.name == "version"       ? &line->version
                 : flag.name == "check_config"  ? &line->check_config
                 : flag.name == "print_metrics" ? &line->print_metrics
                                                : nullptr;
  if (target == nullptr) return false;
  if (flag.value.has_value() && *flag.value != "true" && *flag.value != "false") {
    return Wrong("--" + flag.name, flag.name, "true or false", "\"" + *flag.value + "\"");
  }
  *target = flag.value.value_or("true") == "true";
  return true;
}

// Collects the checks of ResolveConfig: the first failure is kept.
class Resolver {
 public:
  explicit Resolver(const ConfigPlaces& places) : places_(places) {}

  void Fail(const std::string& field, const std::string& expected, const std::string& got) {
    if (!status_.ok()) return;
    const auto place = places_.find(field);
    status_ = Wrong(place == places_.end() ? "" : place->second, field, expected, got);
  }

  // `value`, or `fallback` when it was left at 0.
  int64_t Number(const char* field, uint32_t value, int64_t fallback, int64_t low, int64_t high) {
    const int64_t number = value == 0 ? fallback : value;
    if (number < low || number > high) {
      Fail(field, std::to_string(low) + " to " + std::to_string(high), std::to_string(number));
    }
    return number;
  }

  absl::Duration Milliseconds(const char* field, uint32_t value, int64_t fallback_ms) {
    return absl::Milliseconds(Number(field, value, fallback_ms, 0, kMaxDurationMs));
  }

  int64_t Bytes(const char* field, const std::string& text, int64_t fallback, int64_t low,
                int64_t high) {
    if (text.empty()) return fallback;
    const absl::StatusOr<int64_t> bytes = ParseBytes(text);
    if (!bytes.ok()) {
      Fail(field, "bytes, such as 64MiB or 1GiB", "\"" + text + "\"");
      return fallback;
    }
    if (*bytes < low || *bytes > high) {
      Fail(field, std::to_string(low) + " to " + std::to_string(high) + " bytes",
           "\"" + text + "\" (" + std::to_string(*bytes) + " bytes)");
    }
    return *bytes;
  }

  std::string Address(const char* field, const std::string& text, const std::string& fallback,
                      bool unix_allowed) {
    std::string address = text.empty() ? fallback : text;
    if (address.empty()) return address;
    if (unix_allowed && address.compare(0, 5, "unix:") == 0 && address.size() > 5) return address;
    const size_t colon = address.rfind(':');
    uint16_t port = 0;
    const char* end = address.data() + address.size();
    const auto parsed = colon == std::string::npos
                            ? std::from_chars_result{end, std::errc::invalid_argument}
                            : std::from_chars(address.data() + colon + 1, end, port);
    const bool well_formed = parsed.ec == std::errc() && parsed.ptr == end && colon > 0;
    if (!well_formed) Fail(field, "host:port, such as 0.0.0.0:7400", "\"" + address + "\"");
    return address;
  }

  const absl::Status& status() const { return status_; }

 private:
  const ConfigPlaces& places_;
  absl::Status status_;
};

// That this process may run on: a container or taskset may leave it few of the machine's.
int64_t Cores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::max(1u, std::thread::hardware_concurrency());
}

int Threads(Resolver& check, const char* field, uint32_t value) {
  return static_cast<int>(check.Number(field, value, Cores(), 1, 1024));
}

// Whichever thread gets an event first wakes another to wait for the next one; where CPUs are few
// that one takes the time of the first. 0: as gRPC chooses.
int NetworkThreads(const v1::ServerConfig& message, Resolver& check, absl::Duration spin) {
  constexpr int64_t kFewCpus = 4;
  const bool one = spin > absl::ZeroDuration() || Cores() <= kFewCpus;
  return static_cast<int>(
      check.Number("network_threads", message.network_threads(), one ? 1 : 0, 0, 64));
}

void ResolveShard(const v1::ServerConfig& message, Resolver& check, ShardOptions* shard) {
  constexpr int64_t kMaxBytes = int64_t{1} << 50;
  shard->page_bytes = check.Bytes("page_bytes", message.page_bytes(), 32 << 10, 4 << 10, 2 << 20);
  if ((shard->page_bytes & (shard->page_bytes - 1)) != 0) {
    check.Fail("page_bytes", "a power of two", "\"" + message.page_bytes() + "\"");
  }
  shard->arena_bytes = check.Bytes("arena_bytes", message.arena_bytes(), int64_t{1} << 30,
                                   shard->page_bytes, kMaxBytes);
  shard->residency_bytes =
      check.Bytes("residency_bytes", message.residency_bytes(), 64 << 20, 0, kMaxBytes);
  shard->build_threads = Threads(check, "build_threads", message.build_threads());
  shard->select_threads = Threads(check, "select_threads", message.select_threads());
  shard->max_sequences = check.Number("max_sequences", message.max_sequences(), 4096, 1, 1 << 24);
  shard->max_attachments =
      check.Number("max_attachments", message.max_attachments(), 1024, 1, 1 << 24);
  shard->max_sequence_tokens =
      check.Number("max_sequence_tokens", message.max_sequence_tokens(), 4 << 20, 1, 1 << 30);
  shard->max_queued_selects =
      check.Number("max_queued_selects", message.max_queued_selects(), 4096, 1, 1 << 24);
  shard->session_ttl = check.Milliseconds("session_ttl_ms", message.session_ttl_ms(), 30'000);
  shard->attachment_ttl =
      check.Milliseconds("attachment_ttl_ms", message.attachment_ttl_ms(), 300'000);
  shard->verify_recalls = message.verify_recalls();
}

void ResolveLog(const v1::ServerConfig& message, Resolver& check, Config* config) {
  const std::string& level = message.log_level();
  if (level == "debug") {
    config->log_level = LogLevel::kDebug;
  } else if (level.empty() || level == "info") {
    config->log_level = LogLevel::kInfo;
  } else if (level == "warning") {
    config->log_level = LogLevel::kWarning;
  } else if (level == "error") {
    config->log_level = LogLevel::kError;
  } else {
    check.Fail("log_level", "debug, info, warning or error", "\"" + level + "\"");
  }
  const std::string& format = message.log_format();
  if (!format.empty() && format != "json" && format != "text") {
    check.Fail("log_format", "json or text", "\"" + format + "\"");
  }
  config->log_format = format == "text" ? LogFormat::kText : LogFormat::kJson;
}

void ResolveTls(const v1::ServerConfig& message, Resolver& check, TlsOptions* tls) {
  tls->certificate_file = message.tls_certificate_file();
  tls->key_file = message.tls_key_file();
  tls->client_ca_file = message.tls_client_ca_file();
  tls->client_certificate_optional = message.tls_client_certificate_optional();
  if (tls->enabled() && tls->key_file.empty()) {
    check.Fail("tls_key_file", "a file, as tls_certificate_file is set", "none");
  }
  if (!tls->enabled() && !(tls->key_file.empty() && tls->client_ca_file.empty())) {
    check.Fail("tls_certificate_file", "a file, as another one of tls is set", "none");
  }
  if (tls->client_ca_file.empty() && tls->client_certificate_optional) {
    check.Fail("tls_client_ca_file", "a file, as tls_client_certificate_optional is set", "none");
  }
}

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

bool IsTenantName(const std::string& name) {
  const bool letters = std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-';
  });
  return letters && !name.empty() && name.size() <= 63;
}

void ResolveTenants(const v1::ServerConfig& message, Resolver& check, Config* config) {
  constexpr int64_t kMaxBytes = int64_t{1} << 50;
  constexpr int64_t kMaxCount = std::numeric_limits<uint32_t>::max();
  std::set<std::string> names, identities;
  for (const v1::TenantConfig& tenant : message.tenants()) {
    TenantOptions options;
    options.name = tenant.name();
    options.identities.assign(tenant.identities().begin(), tenant.identities().end());
    if (!IsTenantName(options.name)) {
      check.Fail("tenants", "a name of a-z, 0-9 and '-', 1 to 63", "\"" + options.name + "\"");
    }
    if (!names.insert(options.name).second) {
      check.Fail("tenants", "each name once", "\"" + options.name + "\" twice");
    }
    for (const std::string& identity : options.identities) {
      if (!identity.empty() && identities.insert(identity).second) continue;
      check.Fail("tenants", "each identity once, and none empty", "\"" + identity + "\"");
    }
    options.arena_bytes = check.Bytes("tenants", tenant.arena_bytes(), 0, 1, kMaxBytes);
    options.calls_per_second = check.Number("tenants", tenant.calls_per_second(), 0, 0, kMaxCount);
    options.ingest_bytes_per_second =
        check.Bytes("tenants", tenant.ingest_bytes_per_second(), 0, 1, kMaxBytes);
    options.weight = check.Number("tenants", tenant.weight(), 1, 1, 1000);
    config->tenants.push_back(std::move(options));
  }
  config->admin_identities = Split(message.admin_identities());
  // A tenant's certificate would open the admin port to it, and with that all other tenants.
  const bool by_certificate = !config->tls.client_ca_file.empty();
  if (!config->tenants.empty() && by_certificate && config->admin_identities.empty()) {
    check.Fail("admin_identities", "who may administer, as there are tenants", "none");
  }
  if (!config->admin_identities.empty() && !by_certificate) {
    check.Fail("tls_client_ca_file", "a file, as admin_identities are set", "none");
  }
}

// Whether others can use it as it stands: not every address of this machine, and not any port.
bool IsReachable(const std::string& address) {
  const size_t colon = address.rfind(':');
  const std::string host = address.substr(0, colon);
  return IsShardAddress(address) && host != "0.0.0.0" && host != "[::]" && host != "unix";
}

void ResolveEtcd(const v1::ServerConfig& message, Resolver& check, Config* config) {
  for (const std::string& endpoint : Split(message.etcd_endpoints())) {
    if (!IsShardAddress(endpoint) || endpoint.find('/') != std::string::npos) {
      check.Fail("etcd_endpoints", "host:port, comma-separated (no scheme: TLS is etcd_ca_file's)",
                 "\"" + endpoint + "\"");
    }
    config->etcd.endpoints.push_back(endpoint);
  }
  if (!message.etcd_prefix().empty()) config->etcd.prefix = message.etcd_prefix();
  if (!IsEtcdPrefix(config->etcd.prefix)) {
    check.Fail("etcd_prefix", "words of a-z, A-Z, 0-9 and .-_ with / between them",
               "\"" + config->etcd.prefix + "\"");
  }
  config->etcd.tls = {message.etcd_ca_file(), message.etcd_certificate_file(),
                      message.etcd_key_file(), ""};
  const ClientTls& tls = config->etcd.tls;
  if (tls.ca_file.empty() && !(tls.certificate_file.empty() && tls.key_file.empty())) {
    check.Fail("etcd_ca_file", "a file, as another one of etcd's TLS is set", "none");
  }
  if (tls.certificate_file.empty() != tls.key_file.empty()) {
    const bool no_key = tls.key_file.empty();
    check.Fail(no_key ? "etcd_key_file" : "etcd_certificate_file",
               std::string("a file, as ") + (no_key ? "etcd_certificate_file" : "etcd_key_file") +
                   " is set",
               "none");
  }
  constexpr int64_t kShortestMs = 2'000;  // etcd takes no less
  config->etcd_lease_ttl = absl::Milliseconds(check.Number(
      "etcd_lease_ttl_ms", message.etcd_lease_ttl_ms(), 10'000, kShortestMs, kMaxDurationMs));
}

// One source of the list at most.
void ResolveShards(const v1::ServerConfig& message, Resolver& check, Config* config) {
  config->shards_file = message.shards_file();
  config->shard_name = message.shard_name();
  const bool file = !message.shards_file().empty(), etcd = !message.etcd_endpoints().empty();
  if (file && etcd) {
    check.Fail("shards_file", "none, as etcd_endpoints is set", "\"" + config->shards_file + "\"");
  }
  if (!file && !etcd && !config->shard_name.empty()) {
    check.Fail("shards_file", "a file (or etcd_endpoints), as shard_name is set", "none");
  }
  const std::pair<const char*, bool> of_etcd[] = {
      {"etcd_ca_file", !message.etcd_ca_file().empty()},
      {"etcd_certificate_file", !message.etcd_certificate_file().empty()},
      {"etcd_key_file", !message.etcd_key_file().empty()},
      {"advertise_address", !message.advertise_address().empty()}};
  for (const auto& [field, is_set] : of_etcd) {
    if (is_set && !etcd) {
      check.Fail("etcd_endpoints", std::string("host:port, as ") + field + " is set", "none");
    }
  }
  if (!etcd) return;
  ResolveEtcd(message, check, config);
  config->advertise_address = message.advertise_address();
  if (config->advertise_address.empty()) {
    if (!IsReachable(config->listen)) {
      check.Fail("advertise_address",
                 "host:port, as others cannot use listen=\"" + config->listen + "\"", "none");
    }
  } else if (!IsReachable(config->advertise_address)) {
    check.Fail("advertise_address", "host:port, such as kv-0.example:7400",
               "\"" + config->advertise_address + "\"");
  }
}

}  // namespace

const std::vector<ConfigField>& ConfigFields() {
  static const auto& fields = *new std::vector<ConfigField>{
      {"listen", "0.0.0.0:7400", "host:port (or unix:path) of the data port; port 0: any free one"},
      {"admin_listen", "0.0.0.0:7401", "host:port of admin, health and reflection"},
      {"metrics_listen", "", "host:port of Prometheus' /metrics; empty: none"},
      {"device", "cpu", "what computes: cpu, cuda or cuda:N"},
      {"arena_bytes", "1GiB", "memory for KV and indices, allocated at start"},
      {"page_bytes", "32KiB", "a page of the arena: a power of two, 4KiB to 2MiB"},
      {"build_threads", "0", "threads that cluster; 0: all cores that the process may use"},
      {"select_threads", "0", "threads that answer queries; 0: all cores that the process may use"},
      {"spin_us", "0", "how long an idle stream's thread polls before it sleeps; 0: not at all"},
      {"session_ttl_ms", "30000", "life of a session without heartbeat"},
      {"attachment_ttl_ms", "300000", "life of an attachment without session after its last use"},
      {"default_deadline_ms", "30000", "deadline of calls that bring none"},
      {"drain_delay_ms", "0", "after SIGTERM: how long new calls are still taken"},
      {"drain_timeout_ms", "30000", "then: how long work in flight may take"},
      {"max_chunk_bytes", "1114112", "K and V of one PutKv chunk together"},
      {"max_batch_items", "256", "items of one select"},
      {"max_sequence_tokens", "4194304", "prompt and appended tokens of one sequence"},
      {"max_sequences", "4096", "sequences at a time"},
      {"max_connections", "1024", "open connections; more are closed at once"},
      {"max_attachments", "1024", "attachments at a time"},
      {"residency_bytes", "64MiB", "memory of what is known of the workers' hot caches"},
      {"max_queued_selects", "4096", "selects that may wait for a thread"},
      {"log_level", "info", "debug, info, warning or error"},
      {"log_format", "json", "json or text"},
      {"verify_recalls", "false", "check a page's checksum each time it is read for a recall"},
      {"no_reflection", "false", "do not serve gRPC reflection"},
      {"network_threads", "0",
       "threads that wait for the network; 0: one with spin_us or on up to 4 CPUs, else as gRPC "
       "chooses"},
      {"tls_certificate_file", "", "PEM chain of the server, its own first; empty: no TLS"},
      {"tls_key_file", "", "PEM private key of tls_certificate_file"},
      {"tls_client_ca_file", "",
       "PEM: clients show a certificate that one of these signed; empty: they need none"},
      {"tls_client_certificate_optional", "false", "let clients in that show no certificate"},
      {"health_listen", "", "host:port of health alone, never TLS, for probes; empty: none"},
      {"tenants", "", "who shares the server, each with its quotas; in the file alone"},
      {"admin_identities", "",
       "certificates' identities that the admin port serves, comma-separated; empty: all"},
      {"shards_file", "",
       "lines \"NAME HOST:PORT\" of all shards, read again when it changes; empty: there is one"},
      {"shard_name", "", "of this one, in shards_file or etcd; empty: the host's name"},
      {"etcd_endpoints", "",
       "host:port, comma-separated, of an etcd that lists the shards instead; empty: none"},
      {"etcd_prefix", "clusterkv", "of the shards' keys in etcd"},
      {"etcd_ca_file", "", "PEM: who signed etcd's certificate; empty: no TLS to etcd"},
      {"etcd_certificate_file", "", "PEM: what is shown to etcd; empty: nothing"},
      {"etcd_key_file", "", "PEM private key of etcd_certificate_file"},
      {"etcd_lease_ttl_ms", "10000", "how long the entry in etcd outlives a server that died"},
      {"advertise_address", "",
       "host:port by which others reach the data port; empty: listen, where that is one"},
  };
  return fields;
}

absl::Status ParseConfigText(std::string_view text, const std::string& file,
                             v1::ServerConfig* message, ConfigPlaces* places) {
  FirstError error(file);
  google::protobuf::TextFormat::ParseInfoTree tree;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  parser.WriteLocationsTo(&tree);
  v1::ServerConfig parsed;
  if (!parser.ParseFromString(std::string(text), &parsed)) {
    return Error(v1::INVALID_FIELD, error.text());
  }
  const auto* descriptor = v1::ServerConfig::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (field->is_repeated() && parsed.GetReflection()->FieldSize(parsed, field) == 0) continue;
    const auto location = tree.GetLocation(field, field->is_repeated() ? 0 : -1);
    if (location.line < 0) continue;
    (*places)[std::string(field->name())] =
        file + ":" + std::to_string(location.line + 1) + ":" + std::to_string(location.column + 1);
  }
  message->MergeFrom(parsed);
  return absl::OkStatus();
}

absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments) {
  CommandLine line;
  std::vector<Flag> flags;
  for (size_t i = 0; i < arguments.size(); ++i) {
    CKV_ASSIGN_OR_RETURN(Flag flag, SplitFlag(arguments[i]));
    CKV_ASSIGN_OR_RETURN(const bool own, TakeOwnFlag(flag, &line));
    if (own) continue;
    const FieldDescriptor* field = FindField(flag.name);
    const bool negated =
        field == nullptr && flag.name.compare(0, 2, "no") == 0 && !flag.value.has_value() &&
        FindField(flag.name.substr(2)) != nullptr &&
        FindField(flag.name.substr(2))->cpp_type() == FieldDescriptor::CPPTYPE_BOOL;
    if (negated) flag = {flag.name.substr(2), "false"};
    if (field == nullptr && !negated && flag.name != "config") return UnknownFlag(flag.name);
    if (!flag.value.has_value()) {
      if (field != nullptr && field->cpp_type() == FieldDescriptor::CPPTYPE_BOOL) {
        flag.value = "true";
      } else if (i + 1 < arguments.size()) {
        flag.value = arguments[++i];
      } else {
        return Wrong("--" + flag.name, flag.name, "a value", "none");
      }
    }
    if (flag.name == "config") {
      CKV_RETURN_IF_ERROR(ReadConfigFile(*flag.value, &line));
    } else {
      flags.push_back(std::move(flag));
    }
  }
  for (const Flag& flag : flags) {
    CKV_RETURN_IF_ERROR(SetFromFlag(FindField(flag.name), *flag.value, &line.message));
    line.places[flag.name] = "--" + flag.name;
  }
  return line;
}

absl::StatusOr<Config> ResolveConfig(const v1::ServerConfig& message, const ConfigPlaces& places) {
  Resolver check(places);
  Config config;
  config.listen = check.Address("listen", message.listen(), "0.0.0.0:7400", true);
  config.admin_listen = check.Address("admin_listen", message.admin_listen(), "0.0.0.0:7401", true);
  config.metrics_listen = check.Address("metrics_listen", message.metrics_listen(), "", false);
  config.health_listen =
      check.Address("health_listen", message.health_listen(), "", /*unix_allowed=*/true);
  ResolveTls(message, check, &config.tls);
  ResolveTenants(message, check, &config);
  if (!message.device().empty()) config.device = message.device();
  if (!IsDeviceName(config.device)) {
    check.Fail("device", "cpu, cuda or cuda:N", "\"" + config.device + "\"");
  }
  ResolveShard(message, check, &config.shard);
  config.spin = absl::Microseconds(check.Number("spin_us", message.spin_us(), 0, 0, 1'000'000));
  config.network_threads = NetworkThreads(message, check, config.spin);
  config.default_deadline =
      check.Milliseconds("default_deadline_ms", message.default_deadline_ms(), 30'000);
  config.drain_delay = check.Milliseconds("drain_delay_ms", message.drain_delay_ms(), 0);
  config.drain_timeout = check.Milliseconds("drain_timeout_ms", message.drain_timeout_ms(), 30'000);
  config.max_chunk_bytes =
      check.Number("max_chunk_bytes", message.max_chunk_bytes(), 1'114'112, 4096, 4 << 20);
  config.max_batch_items =
      check.Number("max_batch_items", message.max_batch_items(), 256, 1, 1 << 16);
  config.max_connections =
      check.Number("max_connections", message.max_connections(), 1024, 1, 1 << 20);
  ResolveLog(message, check, &config);
  ResolveShards(message, check, &config);
  config.reflection = !message.no_reflection();
  if (!check.status().ok()) return check.status();
  return config;
}

absl::StatusOr<int64_t> ParseBytes(std::string_view text) {
  int64_t number = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, number);
  const std::string_view suffix(parsed.ptr, static_cast<size_t>(end - parsed.ptr));
  constexpr std::pair<std::string_view, int> kSuffixes[] = {{"", 0},     {"B", 0},    {"KiB", 10},
                                                            {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
  for (const auto& [name, shift] : kSuffixes) {
    if (suffix != name) continue;
    const bool fits = parsed.ec == std::errc() && number >= 0 &&
                      number <= (std::numeric_limits<int64_t>::max() >> shift);
    if (!fits) break;
    return number << shift;
  }
  return absl::InvalidArgumentError("expected bytes, such as 64MiB, got \"" + std::string(text) +
                                    "\"");
}

std::string ConfigHelp() {
  std::ostringstream out;
  out << "clusterkv-server: a KV cache that answers attention queries.\n\n"
         "  clusterkv-server --listen=127.0.0.1:7400 --admin_listen=127.0.0.1:7401 "
         "--arena_bytes=4GiB\n\n"
         "Flags (also fields of the file that --config=FILE names, in protobuf text format):\n";
  for (const ConfigField& field : ConfigFields()) {
    const bool is_flag = FindField(field.name) != nullptr;
    std::string flag = (is_flag ? "  --" : "    ") + std::string(field.name);
    flag.resize(std::max<size_t>(flag.size() + 2, 26), ' ');
    out << flag << field.help;
    if (*field.default_value != '\0') out << " (default " << field.default_value << ")";
    out << "\n";
  }
  out << "\n"
         "  --config=FILE           read this first; flags override it\n"
         "  --check_config          say whether the configuration is good, and end\n"
         "  --print_metrics         describe every metric, one JSON object a line, and end\n"
         "  --version, --help\n\n"
         "SIGTERM and SIGINT drain: health says NOT_SERVING, work in flight ends, exit status 0.\n"
         "Exit status 2: the configuration is wrong. 1: the server could not start.\n";
  return out.str();
}

}  // namespace clusterkv::cache_service
