// The server's configuration: v1.ServerConfig from a text file and flags, checked and resolved.
//
// Every field of the message but `tenants` is a flag of the same name (--arena_bytes=64MiB); flags
// override the file. Whatever is wrong is refused with its place (file, line and column, or the
// flag), the field, what was expected and what was there. Stateless; thread-safe.
#ifndef CLUSTERKV_CACHE_SERVICE_CONFIG_H_
#define CLUSTERKV_CACHE_SERVICE_CONFIG_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cache_service/shard.h"
#include "cache_service/telemetry/log.h"
#include "cache_service/tenants.h"
#include "clusterkv/v1/config.pb.h"
#include "proto/shard_directory.h"

namespace clusterkv::cache_service {

// The certificates of the data and the admin port.
struct TlsOptions {
  std::string certificate_file, key_file;    // PEM; empty: no TLS
  std::string client_ca_file;                // PEM; empty: clients need no certificate
  bool client_certificate_optional = false;  // those who show none are let in too
  bool enabled() const { return !certificate_file.empty(); }
};

// What the message says, defaults filled in, numbers in their units.
struct Config {
  std::string listen;          // host:port or unix:path; port 0: any free one
  std::string admin_listen;    // likewise
  std::string metrics_listen;  // host:port; empty: no /metrics
  std::string health_listen;   // host:port or unix:path; empty: none
  TlsOptions tls;
  std::string device = "cpu";                 // as MakeShardDevice takes it
  std::vector<TenantOptions> tenants;         // empty: everybody is one and the same
  std::vector<std::string> admin_identities;  // empty: all
  std::string shards_file;                    // as ShardList::Load takes it; empty: none
  std::string shard_name;                     // empty: the host's name
  EtcdOptions etcd;                           // as ShardList::Follow takes it; no endpoints: none
  absl::Duration etcd_lease_ttl = absl::Seconds(10);
  std::string advertise_address;  // host:port, empty: as bound; of this shard among the others
  ShardOptions shard;
  absl::Duration spin = absl::ZeroDuration();
  int network_threads = 0;  // 0: as gRPC chooses; process-wide, set by the program
  absl::Duration default_deadline = absl::Seconds(30);
  absl::Duration drain_delay = absl::ZeroDuration();
  absl::Duration drain_timeout = absl::Seconds(30);
  int64_t max_chunk_bytes = 0;
  int64_t max_batch_items = 0;
  int64_t max_connections = 0;
  LogLevel log_level = LogLevel::kInfo;
  LogFormat log_format = LogFormat::kJson;
  bool reflection = true;
};

// The row of one field: --help, the defaults and the README's table come from here.
struct ConfigField {
  const char* name;
  const char* default_value;  // as it would be written; empty: none
  const char* help;
};
// One row per field of v1.ServerConfig, in the order of its numbers.
const std::vector<ConfigField>& ConfigFields();

// Where each field's value was written ("server.conf:3:1", "--listen"), for messages. By field
// name.
using ConfigPlaces = std::map<std::string, std::string>;

// `text` in protobuf text format into *message. `file` names it in messages.
// Errors: INVALID_FIELD with file, line and column.
absl::Status ParseConfigText(std::string_view text, const std::string& file,
                             v1::ServerConfig* message, ConfigPlaces* places);

struct CommandLine {
  v1::ServerConfig message;
  ConfigPlaces places;
  bool help = false, version = false, check_config = false, print_metrics = false;
};
// Arguments without the program's name: --config=FILE is read first, then the other flags override
// it.
// --flag=value, --flag value, and --flag or --noflag for a bool.
// Errors: INVALID_FIELD: unknown flag (with the nearest known one), a value of wrong form, no such
// file.
absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments);

// Defaults and checks. Errors: INVALID_FIELD naming place, field, expected and got.
absl::StatusOr<Config> ResolveConfig(const v1::ServerConfig& message,
                                     const ConfigPlaces& places = {});

// "64MiB" -> 67108864. Suffixes KiB, MiB, GiB, TiB, B or none.
// Errors: InvalidArgument.
absl::StatusOr<int64_t> ParseBytes(std::string_view text);

// What --help prints.
std::string ConfigHelp();

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_CONFIG_H_
