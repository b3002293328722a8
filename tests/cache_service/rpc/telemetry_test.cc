#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "cache_service/telemetry/log.h"
#include "cache_service/telemetry/server_metrics.h"
#include "prometheus/metric_family.h"

namespace clusterkv::cache_service {
namespace {

using ::testing::HasSubstr;

TEST(LogTest, AJsonLineIsJsonWhateverIsInIt) {
  const std::string line = FormatLogLine(
      absl::FromUnixMicros(1'700'000'000'123'456), LogLevel::kWarning, LogFormat::kJson,
      "a \"quoted\"\nword\\\x01", {{"text", "x\ty"}, {"number", int64_t{-3}}, {"flag", true}});
  EXPECT_EQ(line.back(), '\n');
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["time"], "2023-11-14T22:13:20.123456Z");
  EXPECT_EQ(json["level"], "warning");
  EXPECT_EQ(json["message"], "a \"quoted\"\nword\\\x01");
  EXPECT_EQ(json["text"], "x\ty");
  EXPECT_EQ(json["number"], -3);
  EXPECT_EQ(json["flag"], true);
}

TEST(LogTest, ATextLineIsForPeople) {
  EXPECT_EQ(FormatLogLine(absl::UnixEpoch(), LogLevel::kInfo, LogFormat::kText, "serving",
                          {{"listen", "a:1"}, {"port", 7}}),
            "1970-01-01T00:00:00.000000Z info serving listen=\"a:1\" port=7\n");
}

TEST(BucketHistogramTest, ARecordFallsIntoTheFirstBucketThatHoldsIt) {
  BucketHistogram histogram;
  histogram.Record(absl::Microseconds(5));     // on a bound: inclusive
  histogram.Record(absl::Nanoseconds(5'001));  // just above
  histogram.Record(absl::Seconds(1000));       // above all
  histogram.Record(-absl::Seconds(1));         // a clock that went back
  const BucketHistogram::Snapshot snapshot = histogram.Take();
  EXPECT_EQ(snapshot.count, 4u);
  EXPECT_EQ(snapshot.counts[0], 2u);
  EXPECT_EQ(snapshot.counts[1], 1u);
  EXPECT_EQ(snapshot.counts[BucketHistogram::kBuckets - 1], 1u);
  EXPECT_NEAR(snapshot.sum_seconds, 1000.000010001, 1e-6);
}

TEST(BucketHistogramTest, NoRecordIsLostBetweenThreads) {
  BucketHistogram histogram;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10'000; ++i) histogram.Record(absl::Microseconds(i));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(histogram.Take().count, 40'000u);
}

TEST(ServerMetricsTest, FamiliesAreTheTableInItsOrder) {
  ServerMetrics metrics;
  const auto families = metrics.Families(v1::Stats(), 0);
  ASSERT_EQ(families.size(), MetricTable().size());
  std::set<std::string> names;
  for (size_t i = 0; i < families.size(); ++i) {
    EXPECT_EQ(families[i].name, MetricTable()[i].name);
    EXPECT_FALSE(families[i].help.empty());
    EXPECT_TRUE(names.insert(families[i].name).second) << "a name twice";
  }
}

const prometheus::MetricFamily& Find(const std::vector<prometheus::MetricFamily>& families,
                                     const std::string& name) {
  for (const auto& family : families) {
    if (family.name == name) return family;
  }
  ADD_FAILURE() << name;
  return families.front();
}

TEST(ServerMetricsTest, CallsAreCountedByMethodAndStatus) {
  ServerMetrics metrics;
  metrics.CallStarted(Method::kAttach);
  metrics.CallStarted(Method::kAttach);
  metrics.CallEnded(Method::kAttach, absl::StatusCode::kNotFound, absl::Milliseconds(2));
  EXPECT_EQ(metrics.CallsInFlight(Method::kAttach), 1);
  const auto families = metrics.Families(v1::Stats(), 0);
  const auto& ended = Find(families, "grpc_server_call_duration_seconds");
  ASSERT_EQ(ended.metric.size(), 1u) << "only what happened";
  EXPECT_EQ(ended.metric[0].label[0].value, "clusterkv.v1.CacheService/Attach");
  EXPECT_EQ(ended.metric[0].label[1].value, "NOT_FOUND");
  EXPECT_EQ(ended.metric[0].histogram.sample_count, 1u);
  uint64_t previous = 0;
  for (const auto& bucket : ended.metric[0].histogram.bucket) {
    EXPECT_GE(bucket.cumulative_count, previous);
    previous = bucket.cumulative_count;
  }
  EXPECT_EQ(previous, 1u);
}

TEST(ServerMetricsTest, MapsOfTheStatsAreSeriesByTheirKey) {
  ServerMetrics metrics;
  v1::Stats stats;
  (*stats.mutable_evictions_by_reason())["ttl"] = 3;
  (*stats.mutable_attachments_by_link())["peer"] = 2;
  (*stats.mutable_attachments_by_link())["grpc"] = 7;
  (*stats.mutable_link_failovers())["nccl"] = 1;
  (*stats.mutable_tenants())["red"].set_calls(5);
  const auto families = metrics.Families(stats, 0);
  EXPECT_EQ(Find(families, "clusterkv_evictions_total").metric.at(0).counter.value, 3);
  const auto& links = Find(families, "clusterkv_link_attachments").metric;
  ASSERT_EQ(links.size(), 2u);
  EXPECT_EQ(links[0].label[0].name, "link");
  EXPECT_EQ(links[0].label[0].value, "grpc");
  EXPECT_EQ(links[0].gauge.value, 7);
  EXPECT_EQ(Find(families, "clusterkv_link_failovers_total").metric.at(0).counter.value, 1);
  const auto& calls = Find(families, "clusterkv_tenant_calls_total").metric;
  ASSERT_EQ(calls.size(), 1u);
  EXPECT_EQ(calls[0].label[0].value, "red");
  EXPECT_EQ(calls[0].counter.value, 5);
}

TEST(ServerMetricsTest, EtcdHasFiguresWhereItIsAsked) {
  ServerMetrics metrics;
  v1::Stats stats;
  const auto value = [&](const char* name) {
    return Find(metrics.Families(stats, 0), name).metric.at(0).gauge.value;
  };
  EXPECT_EQ(value("clusterkv_listed_shards"), 0);
  EXPECT_TRUE(Find(metrics.Families(stats, 0), "clusterkv_etcd_connected").metric.empty());
  stats.set_shards(3);
  stats.mutable_etcd()->set_registered(true);
  EXPECT_EQ(value("clusterkv_listed_shards"), 3);
  EXPECT_EQ(value("clusterkv_etcd_connected"), 0);
  EXPECT_EQ(value("clusterkv_etcd_registered"), 1);
}

TEST(ServerMetricsTest, TheArenaIsUsedWhereItIsHeldOrPromised) {
  ServerMetrics metrics;
  v1::Stats stats;
  const auto used = [&] {
    return Find(metrics.Families(stats, 0), "clusterkv_arena_used_ratio").metric.at(0).gauge.value;
  };
  EXPECT_EQ(used(), 0) << "an arena of nothing";
  stats.mutable_pages()->set_total(8);
  stats.mutable_pages()->set_free(6);
  EXPECT_EQ(used(), 0.25);
  stats.set_reserved_pages(4);
  EXPECT_EQ(used(), 0.75);
}

TEST(MetricTableTest, PrintsARowForEachMetric) {
  std::istringstream lines(MetricTableJson());
  size_t rows = 0;
  for (std::string line; std::getline(lines, line); ++rows) {
    const auto row = nlohmann::json::parse(line);
    ASSERT_LT(rows, MetricTable().size());
    EXPECT_EQ(row["name"], MetricTable()[rows].name);
    const std::string help = row["help"];
    EXPECT_EQ(help.back(), '.') << row["name"];
  }
  EXPECT_EQ(rows, MetricTable().size());
}

TEST(ServerMetricsTest, WhatTheServerCountsStandsInTheStats) {
  ServerMetrics metrics;
  metrics.AddStateBytes(1040);
  metrics.CountLinkFallback("nccl: no");
  metrics.CountLinkFallback("nccl: no");
  v1::Stats stats;
  stats.set_state_bytes(7);
  (*stats.mutable_link_fallbacks())["other"] = 1;
  metrics.AddTo(&stats);
  EXPECT_EQ(stats.state_bytes(), 1040u) << "as it went over the wire";
  EXPECT_EQ(stats.link_fallbacks().size(), 1u);
  EXPECT_EQ(stats.link_fallbacks().at("nccl: no"), 2u);
}

std::string HttpGet(int port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in name = {};
  name.sin_family = AF_INET;
  name.sin_port = htons(static_cast<uint16_t>(port));
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof(name)), 0);
  const std::string request = "GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
  EXPECT_EQ(write(fd, request.data(), request.size()), static_cast<ssize_t>(request.size()));
  std::string answer;
  char buffer[4096];
  for (ssize_t got; (got = read(fd, buffer, sizeof(buffer))) > 0;) {
    answer.append(buffer, static_cast<size_t>(got));
  }
  close(fd);
  return answer;
}

TEST(MetricsEndpointTest, ServesTextAndRefusesAPortThatIsTaken) {
  ServerMetrics metrics;
  metrics.RecordStage(Stage::kSelect, absl::Microseconds(30));
  MetricsEndpoint::Source source;
  source.metrics = &metrics;
  source.stats = [] {
    v1::Stats stats;
    stats.mutable_pages()->set_free(17);
    (*stats.mutable_errors())["ARENA_FULL"] = 3;
    return stats;
  };
  source.connections = [] { return int64_t{5}; };
  const auto endpoint = MetricsEndpoint::Start("127.0.0.1:0", source);
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  const std::string text = HttpGet((*endpoint)->port(), "/metrics");
  EXPECT_THAT(text, HasSubstr("clusterkv_arena_pages{state=\"free\"} 17"));
  EXPECT_THAT(text, HasSubstr("clusterkv_errors_total{reason=\"ARENA_FULL\"} 3"));
  EXPECT_THAT(text, HasSubstr("clusterkv_connections 5"));
  EXPECT_THAT(text, HasSubstr("clusterkv_stage_seconds_count{stage=\"select\"} 1"));
  EXPECT_THAT(text, HasSubstr("clusterkv_stage_seconds_bucket{stage=\"select\",le=\"5e-05\"} 1"));
  const auto second =
      MetricsEndpoint::Start("127.0.0.1:" + std::to_string((*endpoint)->port()), source);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace clusterkv::cache_service
