// ckv status, sequences and drain: one look at a server, or one word to it.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "worker/ckv/command.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/exit_code.h"
#include "worker/ckv/svg.h"
#include "worker/ckv/terminal.h"
#include "worker/decode_session.h"

namespace clusterkv::worker::ckv {
namespace {

using Json = nlohmann::ordered_json;

absl::Status WriteJson(const std::string& path, const Json& json) {
  return path.empty() ? absl::OkStatus() : WriteFile(path, json.dump(2) + "\n");
}

std::string Joined(const google::protobuf::RepeatedPtrField<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

Json ServerJson(const v1::ServerInfo& info) {
  Json links = Json::array();
  for (const int link : info.links()) links.push_back(LinkName(static_cast<v1::Link>(link)));
  Json shards = Json::array();
  for (const v1::Shard& shard : info.shards()) {
    shards.push_back(
        {{"name", shard.name()}, {"address", shard.address()}, {"draining", shard.draining()}});
  }
  char boot_id[17];
  std::snprintf(boot_id, sizeof(boot_id), "%016lx", static_cast<unsigned long>(info.boot_id()));
  return {{"boot_id", boot_id},
          {"version", info.version()},
          {"device", info.device()},
          {"codecs", std::vector<std::string>(info.codecs().begin(), info.codecs().end())},
          {"presets", std::vector<std::string>(info.presets().begin(), info.presets().end())},
          {"links", links},
          {"arena_bytes", info.arena_bytes()},
          {"page_bytes", info.page_bytes()},
          {"max_chunk_bytes", info.max_chunk_bytes()},
          {"max_batch_items", info.max_batch_items()},
          {"max_sequence_tokens", info.max_sequence_tokens()},
          {"draining", info.draining()},
          {"session_ttl_ms", info.session_ttl_ms()},
          {"shard", info.shard()},
          {"shards", shards}};
}

Json EtcdJson(const v1::EtcdStats& etcd) {
  return {{"connected", etcd.connected()},   {"registered", etcd.registered()},
          {"reconnects", etcd.reconnects()}, {"lost_leases", etcd.lost_leases()},
          {"away_ms", etcd.away_ms()},       {"error", etcd.error()}};
}

Json StatsJson(const v1::Stats& stats) {
  const v1::Ledger& pages = stats.pages();
  return {{"uptime_ms", stats.uptime_ms()},
          {"draining", stats.draining()},
          {"pages",
           {{"total", pages.total()},
            {"free", pages.free()},
            {"filling", pages.filling()},
            {"ready", pages.ready()},
            {"recalling", pages.recalling()},
            {"quarantined", pages.quarantined()}}},
          {"reserved_pages", stats.reserved_pages()},
          {"page_bytes", stats.page_bytes()},
          {"device", stats.device()},
          {"device_selects", stats.device_selects()},
          {"device_fallbacks", stats.device_fallbacks()},
          {"standing_links", stats.links()},
          {"link_bytes", stats.link_bytes()},
          {"sequences", stats.sequences()},
          {"attachments", stats.attachments()},
          {"sessions", stats.sessions()},
          {"selects", stats.selects()},
          {"recalled_tokens", stats.recalled_tokens()},
          {"recalled_bytes", stats.recalled_bytes()},
          {"state_bytes", stats.state_bytes()},
          {"hits", stats.hits()},
          {"misses", stats.misses()},
          {"ingested_bytes", stats.ingested_bytes()},
          {"evictions", stats.evictions()},
          {"errors", std::map<std::string, uint64_t>(stats.errors().begin(), stats.errors().end())},
          {"link_fallbacks", std::map<std::string, uint64_t>(stats.link_fallbacks().begin(),
                                                             stats.link_fallbacks().end())},
          {"resident_bytes", stats.resident_bytes()},
          {"device_memory_bytes", stats.device_memory_bytes()},
          {"select_p50_us", stats.select_p50_us()},
          {"select_p99_us", stats.select_p99_us()},
          {"etcd", stats.has_etcd() ? EtcdJson(stats.etcd()) : Json()}};
}

void PrintLine(const char* name, const std::string& value) {
  std::printf("%-12s %s\n", name, value.c_str());
}

void PrintStats(const v1::Stats& stats) {
  const v1::Ledger& pages = stats.pages();
  const double page = static_cast<double>(stats.page_bytes());
  PrintLine("uptime", HumanDuration(absl::Milliseconds(stats.uptime_ms())));
  PrintLine("arena", Bar(pages.total() == 0 ? 0 : 1 - 1.0 * pages.free() / pages.total(), 24) +
                         " " + HumanBytes((pages.total() - pages.free()) * page) + " of " +
                         HumanBytes(pages.total() * page) + ", " +
                         HumanBytes(stats.reserved_pages() * page) + " promised");
  PrintLine("pages", std::to_string(pages.free()) + " free, " + std::to_string(pages.filling()) +
                         " filling, " + std::to_string(pages.ready()) + " ready, " +
                         std::to_string(pages.recalling()) + " recalling, " +
                         std::to_string(pages.quarantined()) + " quarantined");
  PrintLine("in use by", std::to_string(stats.sequences()) + " sequences, " +
                             std::to_string(stats.attachments()) + " attachments, " +
                             std::to_string(stats.sessions()) + " sessions");
  const uint64_t named = stats.hits() + stats.misses();
  PrintLine("selects", HumanCount(stats.selects()) + ", p50 " +
                           HumanDuration(absl::Microseconds(stats.select_p50_us())) + ", p99 " +
                           HumanDuration(absl::Microseconds(stats.select_p99_us())));
  PrintLine("sent", HumanCount(stats.recalled_tokens()) + " records, " +
                        HumanBytes(stats.recalled_bytes()) + ", states " +
                        HumanBytes(stats.state_bytes()) + ", hit rate " +
                        (named == 0 ? "–" : Significant(100.0 * stats.hits() / named, 3) + " %"));
  PrintLine("received", HumanBytes(stats.ingested_bytes()) + ", " +
                            std::to_string(stats.evictions()) + " evictions");
  PrintLine("resident", HumanBytes(stats.resident_bytes()));
  if (stats.has_etcd()) {
    const v1::EtcdStats& etcd = stats.etcd();
    const std::string connection = etcd.connected()
                                       ? Colored("connected", Color::kGreen)
                                       : Colored("away", Color::kYellow) + " for " +
                                             HumanDuration(absl::Milliseconds(etcd.away_ms())) +
                                             ", the list is of before (" + etcd.error() + ")";
    PrintLine("etcd", connection + (etcd.registered() ? ", entered" : ", not entered"));
  }
  for (const auto& [reason, count] : stats.errors()) {
    PrintLine("errors", reason + " " + HumanCount(count));
  }
}

class StatusCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    server_.Register(flags);
    admin_.Register(flags, /*required=*/false, &server_);
    flags.String("json", "FILE", &json_, "write what is shown as JSON; - for standard output");
  }

  absl::Status Run() override {
    auto client = ConnectClient(server_, /*session=*/false);
    if (!client.ok()) return client.status();
    const v1::ServerInfo info = (*client)->server_info();
    auto sequences = (*client)->ListSequences("");
    if (!sequences.ok()) return sequences.status();
    Json json = ServerJson(info);
    json["sequences"] = sequences->size();
    uint64_t held = 0;
    for (const v1::Sequence& sequence : *sequences) held += sequence.bytes();
    json["sequence_bytes"] = held;
    v1::Stats stats;
    if (!admin_.admin.empty()) {
      admin_.connect_timeout = server_.connect_timeout;
      auto admin = AdminClient::Connect(admin_);
      if (!admin.ok()) return admin.status();
      auto answer = (*admin)->GetStats();
      if (!answer.ok()) return answer.status();
      stats = *answer;
      json["stats"] = StatsJson(stats);
    }
    if (json_ != "-") Print(info, json, sequences->size(), held, stats);
    return WriteJson(json_, json);
  }

 private:
  void Print(const v1::ServerInfo& info, const Json& json, size_t sequences, uint64_t held,
             const v1::Stats& stats) const {
    PrintLine("server", Colored(server_.server, Color::kBold) + "  " + info.version() + " on " +
                            info.device() + "  " +
                            (info.draining() ? Colored("draining", Color::kYellow)
                                             : Colored("serving", Color::kGreen)));
    PrintLine("boot id", json["boot_id"].get<std::string>());
    PrintLine("arena", HumanBytes(static_cast<double>(info.arena_bytes())) + " in pages of " +
                           HumanBytes(static_cast<double>(info.page_bytes())));
    PrintLine("presets", Joined(info.presets()));
    PrintLine("codecs", Joined(info.codecs()));
    PrintLine("limits", HumanCount(info.max_sequence_tokens()) + " tokens a sequence, " +
                            HumanCount(info.max_batch_items()) + " items a select, chunks of " +
                            HumanBytes(info.max_chunk_bytes()));
    if (info.shards_size() > 0) {
      std::string names;
      for (const v1::Shard& shard : info.shards()) {
        names += " " + shard.name() + (shard.draining() ? " (draining)" : "");
      }
      PrintLine("shard", info.shard() + " of" + names);
    }
    PrintLine("sequences", HumanCount(static_cast<int64_t>(sequences)) + ", " +
                               HumanBytes(static_cast<double>(held)));
    if (json.contains("stats")) PrintStats(stats);
  }

  ServerFlags server_;
  AdminFlags admin_;
  std::string json_;
};

class SequencesCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    server_.Register(flags);
    flags.String("prefix", "NAME", &prefix_, "only sequences whose names begin so");
    flags.String("json", "FILE", &json_, "write them as JSON; - for standard output");
  }

  absl::Status Run() override {
    auto places = Places::Connect(server_, /*session=*/false);
    if (!places.ok()) return places.status();
    auto sequences = (*places)->ListSequences(prefix_);
    if (!sequences.ok()) return sequences.status();
    Json rows = Json::array();
    Table table({"name", "state", "tokens", "layers", "size", "preset", "codec", "attached"}, 2);
    for (const v1::Sequence& sequence : *sequences) {
      rows.push_back({{"name", sequence.handle().name()},
                      {"state", StateName(sequence.state())},
                      {"tokens", sequence.tokens()},
                      {"layers", sequence.shape().layers()},
                      {"bytes", sequence.bytes()}});
      table.AddRow({sequence.handle().name(), StateName(sequence.state()),
                    HumanCount(sequence.tokens()), std::to_string(sequence.shape().layers()),
                    HumanBytes(static_cast<double>(sequence.bytes())), sequence.preset(),
                    sequence.codec(), std::to_string(sequence.attachments())});
    }
    if (json_ != "-") {
      std::printf("%s", table.Text().c_str());
      if (rows.empty()) std::printf("%s\n", Colored("no sequences", Color::kDim).c_str());
    }
    return WriteJson(json_, {{"sequences", rows}});
  }

 private:
  PlaceFlags server_;
  std::string prefix_;
  std::string json_;
};

class DrainCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    admin_.Register(flags, /*required=*/true);
    flags.Duration("connect_timeout", &admin_.connect_timeout, "how long to wait for a connection");
    flags.Duration("timeout", &timeout_, "how long to wait for work in flight");
  }

  absl::Status Run() override {
    auto admin = AdminClient::Connect(admin_);
    if (!admin.ok()) return admin.status();
    auto drained = (*admin)->Drain(timeout_);
    if (!drained.ok()) return drained.status();
    std::printf("draining: no new sequences are taken; %u sequences and %u attachments are left\n",
                drained->sequences(), drained->attachments());
    return absl::OkStatus();
  }

 private:
  AdminFlags admin_;
  absl::Duration timeout_ = absl::Seconds(30);
};

}  // namespace

std::unique_ptr<Command> MakeStatusCommand() { return std::make_unique<StatusCommand>(); }
std::unique_ptr<Command> MakeSequencesCommand() { return std::make_unique<SequencesCommand>(); }
std::unique_ptr<Command> MakeDrainCommand() { return std::make_unique<DrainCommand>(); }

}  // namespace clusterkv::worker::ckv
