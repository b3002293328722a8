// Every metric of the server, described once.
//
// From here come /metrics (server_metrics.h), `clusterkv-server --print_metrics`, and by that the
// table in deploy/README.md and the Grafana dashboard (deploy/metrics.py); tests hold them
// together.
#ifndef CLUSTERKV_CACHE_SERVICE_TELEMETRY_METRIC_TABLE_H_
#define CLUSTERKV_CACHE_SERVICE_TELEMETRY_METRIC_TABLE_H_

#include <string>
#include <vector>

namespace clusterkv::cache_service {

enum class MetricType { kCounter, kGauge, kHistogram };

struct MetricDescriptor {
  const char* name;  // as in /metrics
  MetricType type;
  const char* unit;     // "1", "bytes", "seconds", "pages", "tokens"
  const char* label;    // the labels' names, comma-separated; empty: none
  const char* section;  // of the dashboard and the documentation
  const char* when;     // series only with these: "", "device", "links", "tenants", "etcd"
  const char* help;     // one sentence
};
const std::vector<MetricDescriptor>& MetricTable();

// The table, one JSON object a line.
std::string MetricTableJson();

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TELEMETRY_METRIC_TABLE_H_
