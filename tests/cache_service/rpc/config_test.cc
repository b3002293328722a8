#include "cache_service/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>

#include <fstream>

#include "google/protobuf/descriptor.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::HasSubstr;

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

absl::StatusOr<Config> FromFlags(const std::vector<std::string>& flags) {
  absl::StatusOr<CommandLine> line = ParseCommandLine(flags);
  if (!line.ok()) return line.status();
  return ResolveConfig(line->message, line->places);
}

TEST(ConfigTest, EveryFieldOfTheMessageHasItsRowInOrder) {
  const auto* descriptor = v1::ServerConfig::descriptor();
  ASSERT_EQ(static_cast<int>(ConfigFields().size()), descriptor->field_count());
  for (int i = 0; i < descriptor->field_count(); ++i) {
    EXPECT_EQ(std::string(descriptor->field(i)->name()),
              ConfigFields()[static_cast<size_t>(i)].name);
    const char* dashes = descriptor->field(i)->is_repeated() ? "  " : "--";
    EXPECT_THAT(ConfigHelp(), HasSubstr(dashes + std::string(descriptor->field(i)->name())));
  }
}

TEST(ConfigTest, EveryRowsDefaultIsWhatAnEmptyConfigurationGives) {
  std::vector<std::string> flags;
  for (const ConfigField& field : ConfigFields()) {
    if (*field.default_value != '\0') {
      flags.push_back("--" + std::string(field.name) + "=" + field.default_value);
    }
  }
  const Config written = FromFlags(flags).value();
  const Config empty = ResolveConfig(v1::ServerConfig()).value();
  EXPECT_EQ(written.listen, empty.listen);
  EXPECT_EQ(written.admin_listen, empty.admin_listen);
  EXPECT_EQ(written.metrics_listen, empty.metrics_listen);
  EXPECT_EQ(written.shard.arena_bytes, empty.shard.arena_bytes);
  EXPECT_EQ(written.shard.page_bytes, empty.shard.page_bytes);
  EXPECT_EQ(written.shard.build_threads, empty.shard.build_threads);
  EXPECT_EQ(written.shard.select_threads, empty.shard.select_threads);
  EXPECT_EQ(written.shard.session_ttl, empty.shard.session_ttl);
  EXPECT_EQ(written.shard.attachment_ttl, empty.shard.attachment_ttl);
  EXPECT_EQ(written.shard.max_sequences, empty.shard.max_sequences);
  EXPECT_EQ(written.shard.max_sequence_tokens, empty.shard.max_sequence_tokens);
  EXPECT_EQ(written.shard.max_attachments, empty.shard.max_attachments);
  EXPECT_EQ(written.shard.max_queued_selects, empty.shard.max_queued_selects);
  EXPECT_EQ(written.shard.residency_bytes, empty.shard.residency_bytes);
  EXPECT_EQ(written.default_deadline, empty.default_deadline);
  EXPECT_EQ(written.drain_delay, empty.drain_delay);
  EXPECT_EQ(written.drain_timeout, empty.drain_timeout);
  EXPECT_EQ(written.max_chunk_bytes, empty.max_chunk_bytes);
  EXPECT_EQ(written.max_batch_items, empty.max_batch_items);
  EXPECT_EQ(written.max_connections, empty.max_connections);
  EXPECT_EQ(written.network_threads, empty.network_threads);
  EXPECT_EQ(empty.metrics_listen, "") << "no /metrics unless asked for";
}

TEST(ConfigTest, ThreadsFollowTheProcessorsThatTheProcessMayUse) {
  cpu_set_t all, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &all)) CPU_SET(cpu, &one);
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  const absl::StatusOr<Config> config = FromFlags({});
  ASSERT_EQ(sched_setaffinity(0, sizeof(all), &all), 0);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->shard.select_threads, 1);
  EXPECT_EQ(config->shard.build_threads, 1);
  EXPECT_EQ(config->network_threads, 1);
}

TEST(ConfigTest, BytesHaveBinarySuffixes) {
  EXPECT_EQ(ParseBytes("17").value(), 17);
  EXPECT_EQ(ParseBytes("17B").value(), 17);
  EXPECT_EQ(ParseBytes("3KiB").value(), 3 << 10);
  EXPECT_EQ(ParseBytes("64MiB").value(), 64 << 20);
  EXPECT_EQ(ParseBytes("2GiB").value(), int64_t{2} << 30);
  EXPECT_EQ(ParseBytes("1TiB").value(), int64_t{1} << 40);
  for (const char* bad : {"", "MiB", "-1", "1.5GiB", "1MB", "1 MiB", "9223372036854775808",
                          "9007199254740992KiB", "8388608TiB"}) {
    EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
  }
}

TEST(ConfigTest, FlagsOverrideTheFileWhereverItStands) {
  const std::string file = ::testing::TempDir() + "config_test.txtpb";
  std::ofstream(file) << "listen: \"127.0.0.1:1\"\narena_bytes: \"2MiB\"\nverify_recalls: true\n";
  const Config config =
      FromFlags({"--arena_bytes=4MiB", "--config", file, "--noverify_recalls"}).value();
  EXPECT_EQ(config.listen, "127.0.0.1:1");
  EXPECT_EQ(config.shard.arena_bytes, 4 << 20);
  EXPECT_FALSE(config.shard.verify_recalls);
}

TEST(ConfigTest, FlagsComeWithEqualsSignOrNextWordWithDashesOrUnderscores) {
  const Config config =
      FromFlags({"--max-batch-items", "7", "--verify_recalls", "--log_level=debug"}).value();
  EXPECT_EQ(config.max_batch_items, 7);
  EXPECT_TRUE(config.shard.verify_recalls);
  EXPECT_EQ(config.log_level, LogLevel::kDebug);
}

TEST(ConfigTest, AnUnknownFlagSaysWhichWasMeant) {
  EXPECT_EQ(MessageOf(FromFlags({"--arena_byte=1MiB"}).status()),
            "unknown flag --arena_byte; did you mean --arena_bytes?");
  EXPECT_EQ(MessageOf(FromFlags({"--zzz=1"}).status()),
            "unknown flag --zzz; --help lists the flags");
  EXPECT_THAT(MessageOf(FromFlags({"listen"}).status()), HasSubstr("expected --flag=value"));
  EXPECT_THAT(MessageOf(FromFlags({"--listen"}).status()), HasSubstr("expected a value"));
}

TEST(ConfigTest, AWrongFileIsRefusedWithLineColumnAndField) {
  v1::ServerConfig message;
  ConfigPlaces places;
  EXPECT_EQ(MessageOf(ParseConfigText("listen: \"a:1\"\n  arena: 3\n", "f", &message, &places)),
            "f:2:8: Message type \"clusterkv.v1.ServerConfig\" has no field named \"arena\".");
  EXPECT_THAT(MessageOf(ParseConfigText("spin_us: -3", "f", &message, &places)),
              HasSubstr("f:1:10: "));
  EXPECT_THAT(MessageOf(ParseConfigText("spin_us", "f", &message, &places)), HasSubstr("f:1:8: "));
}

TEST(ConfigTest, AWrongValueIsRefusedWithItsPlaceAndField) {
  v1::ServerConfig message;
  ConfigPlaces places;
  ASSERT_TRUE(
      ParseConfigText("listen: \"a:1\"\n page_bytes: \"5KiB\"", "f", &message, &places).ok());
  const absl::Status status = ResolveConfig(message, places).status();
  EXPECT_EQ(MessageOf(status), "f:2:2: page_bytes: expected a power of two, got \"5KiB\"");
  EXPECT_EQ(ReasonOf(status), v1::INVALID_FIELD);
  struct Bad {
    const char *flag, *message;
  };
  for (const Bad& bad : std::initializer_list<Bad>{
           {"--arena_bytes=x", "--arena_bytes: arena_bytes: expected bytes"},
           {"--arena_bytes=1KiB", "expected 32768 to"},
           {"--page_bytes=1KiB", "expected 4096 to 2097152 bytes, got \"1KiB\" (1024 bytes)"},
           {"--listen=localhost", "--listen: listen: expected host:port"},
           {"--listen=localhost:99999", "expected host:port"},
           {"--admin_listen=:1", "expected host:port"},
           {"--metrics_listen=unix:x", "expected host:port"},
           {"--device=tpu", "--device: device: expected cpu, cuda or cuda:N, got \"tpu\""},
           {"--log_level=loud", "log_level: expected debug, info, warning or error"},
           {"--log_format=xml", "log_format: expected json or text"},
           {"--max_chunk_bytes=100", "max_chunk_bytes: expected 4096 to 4194304, got 100"},
           {"--spin_us=many", "spin_us: expected a whole number"},
           {"--max_sequences=-1", "max_sequences: expected a whole number"},
           {"--verify_recalls=maybe", "verify_recalls: expected true or false"},
           {"--config=/no/such/file", "expected a readable file, got \"/no/such/file\""},
       }) {
    EXPECT_THAT(MessageOf(FromFlags({bad.flag}).status()), HasSubstr(bad.message)) << bad.flag;
  }
}

TEST(ConfigTest, HelpVersionAndCheckAreTaken) {
  const CommandLine line = ParseCommandLine({"--help", "--version", "--check_config"}).value();
  EXPECT_TRUE(line.help && line.version && line.check_config);
}

TEST(ConfigTest, TenantsComeFromTheFile) {
  const auto resolve = [](const std::string& text) {
    v1::ServerConfig message;
    ConfigPlaces places;
    EXPECT_TRUE(ParseConfigText(text, "server.conf", &message, &places).ok()) << text;
    return ResolveConfig(message, places);
  };
  const Config config =
      resolve(R"(tenants { name: "a" identities: "spiffe://x/a/*" arena_bytes: "64MiB"
                           calls_per_second: 10 ingest_bytes_per_second: "1MiB" weight: 3 }
                 tenants { name: "b" })")
          .value();
  ASSERT_EQ(config.tenants.size(), 2u);
  EXPECT_EQ(config.tenants[0].arena_bytes, 64 << 20);
  EXPECT_EQ(config.tenants[0].ingest_bytes_per_second, 1 << 20);
  EXPECT_EQ(config.tenants[0].weight, 3);
  EXPECT_EQ(config.tenants[1].arena_bytes, 0);
  EXPECT_EQ(config.tenants[1].weight, 1);
  const std::string tls = R"(tls_certificate_file: "c" tls_key_file: "k" tls_client_ca_file: "a" )";
  const struct {
    std::string text, message;
  } bad[] = {
      {R"(tenants { name: "A" })", "tenants: expected a name"},
      {R"(tenants { name: "a" } tenants { name: "a" })", "each name once"},
      {R"(tenants { name: "a" identities: "i" } tenants { name: "b" identities: "i" })",
       "each identity once"},
      {R"(tenants { name: "a" arena_bytes: "much" })", "bytes, such as"},
      {tls + R"(tenants { name: "a" })", "admin_identities"},
      {R"(admin_identities: "me")", "tls_client_ca_file"},
  };
  for (const auto& one : bad) {
    EXPECT_THAT(MessageOf(resolve(one.text).status()), HasSubstr(one.message)) << one.text;
  }
  EXPECT_TRUE(resolve(tls + R"(tenants { name: "a" } admin_identities: "me,you")").ok());
  EXPECT_THAT(MessageOf(FromFlags({"--tenants=a"}).status()), HasSubstr("tenants"));
}

TEST(ConfigTest, TlsIsWholeOrAbsent) {
  const auto fault = [](std::vector<std::string> flags) {
    const auto line = ParseCommandLine(flags);
    return std::string(ResolveConfig(line.value().message, line->places).status().message());
  };
  EXPECT_EQ(fault({"--tls_certificate_file=c", "--tls_key_file=k", "--tls_client_ca_file=a"}), "");
  EXPECT_THAT(fault({"--tls_certificate_file=c"}), HasSubstr("tls_key_file"));
  EXPECT_THAT(fault({"--tls_client_ca_file=a"}), HasSubstr("tls_certificate_file"));
  EXPECT_THAT(
      fault({"--tls_certificate_file=c", "--tls_key_file=k", "--tls_client_certificate_optional"}),
      HasSubstr("tls_client_ca_file"));
}

TEST(ConfigTest, TheShardsComeFromAFileOrFromEtcd) {
  const auto fault = [](std::vector<std::string> flags) {
    return MessageOf(FromFlags(std::move(flags)).status());
  };
  const Config config =
      FromFlags({"--etcd_endpoints=a:1,b:2", "--etcd_prefix=kv/one", "--etcd_lease_ttl_ms=3000",
                 "--etcd_ca_file=ca", "--etcd_certificate_file=c", "--etcd_key_file=k",
                 "--shard_name=kv-0", "--advertise_address=kv-0.kv:7400"})
          .value();
  EXPECT_THAT(config.etcd.endpoints, ::testing::ElementsAre("a:1", "b:2"));
  EXPECT_EQ(config.etcd.prefix, "kv/one");
  EXPECT_EQ(config.etcd.tls.key_file, "k");
  EXPECT_EQ(config.etcd_lease_ttl, absl::Seconds(3));
  EXPECT_EQ(config.advertise_address, "kv-0.kv:7400");
  // An address of its own that others can use needs no other.
  EXPECT_EQ(fault({"--etcd_endpoints=a:1", "--listen=10.0.0.1:7400"}), "");
  EXPECT_EQ(fault({"--etcd_endpoints=a:1", "--listen=127.0.0.1:0"}), "") << "as bound";
  const struct {
    std::vector<std::string> flags;
    const char* message;
  } bad[] = {
      {{"--shards_file=f", "--etcd_endpoints=a:1"}, "shards_file: expected none"},
      {{"--shard_name=a"}, "shards_file: expected a file (or etcd_endpoints)"},
      {{"--etcd_ca_file=f"}, "etcd_endpoints: expected host:port, as etcd_ca_file is set"},
      {{"--advertise_address=a:1"}, "as advertise_address is set"},
      {{"--etcd_endpoints=http://a:1", "--listen=b:1"}, "etcd_endpoints: expected host:port"},
      {{"--etcd_endpoints=a", "--listen=b:1"}, "got \"a\""},
      {{"--etcd_endpoints=a:1", "--etcd_prefix=/kv", "--listen=b:1"}, "etcd_prefix: expected"},
      {{"--etcd_endpoints=a:1", "--etcd_certificate_file=c", "--listen=b:1"},
       "etcd_ca_file: expected a file"},
      {{"--etcd_endpoints=a:1", "--etcd_ca_file=a", "--etcd_key_file=k", "--listen=b:1"},
       "etcd_certificate_file: expected a file, as etcd_key_file is set"},
      {{"--etcd_endpoints=a:1", "--etcd_ca_file=a", "--etcd_certificate_file=c", "--listen=b:1"},
       "etcd_key_file: expected a file"},
      {{"--etcd_endpoints=a:1", "--etcd_lease_ttl_ms=10", "--listen=b:1"},
       "etcd_lease_ttl_ms: expected 2000 to"},
      {{"--etcd_endpoints=a:1"}, "advertise_address: expected host:port, as others cannot use"},
      {{"--etcd_endpoints=a:1", "--listen=unix:/tmp/s"}, "advertise_address: expected host:port"},
      {{"--etcd_endpoints=a:1", "--advertise_address=[::]:1"}, "got \"[::]:1\""},
  };
  for (const auto& one : bad) {
    EXPECT_THAT(fault(one.flags), HasSubstr(one.message)) << one.message;
  }
}

}  // namespace
}  // namespace clusterkv::cache_service
