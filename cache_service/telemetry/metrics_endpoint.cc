#include <exception>
#include <utility>

#include "cache_service/telemetry/server_metrics.h"
#include "prometheus/collectable.h"
#include "prometheus/exposer.h"
#include "prometheus/metric_family.h"

namespace clusterkv::cache_service {
namespace {

class SourceCollectable : public prometheus::Collectable {
 public:
  explicit SourceCollectable(MetricsEndpoint::Source source) : source_(std::move(source)) {}
  std::vector<prometheus::MetricFamily> Collect() const override {
    return source_.metrics->Families(source_.stats(), source_.connections());
  }

 private:
  MetricsEndpoint::Source source_;
};

}  // namespace

struct MetricsEndpoint::Impl {
  std::shared_ptr<SourceCollectable> collectable;
  std::unique_ptr<prometheus::Exposer> exposer;
  int port = 0;
};

MetricsEndpoint::MetricsEndpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
MetricsEndpoint::~MetricsEndpoint() = default;
int MetricsEndpoint::port() const { return impl_->port; }

absl::StatusOr<std::unique_ptr<MetricsEndpoint>> MetricsEndpoint::Start(const std::string& address,
                                                                        Source source) {
  auto impl = std::make_unique<Impl>();
  impl->collectable = std::make_shared<SourceCollectable>(std::move(source));
  try {  // the library reports a port in use by an exception
    impl->exposer = std::make_unique<prometheus::Exposer>(address, 2);
  } catch (const std::exception& failure) {
    return absl::UnavailableError("metrics_listen: cannot listen on " + address + ": " +
                                  failure.what());
  }
  impl->exposer->RegisterCollectable(impl->collectable);
  const std::vector<int> ports = impl->exposer->GetListeningPorts();
  impl->port = ports.empty() ? 0 : ports.front();
  return std::unique_ptr<MetricsEndpoint>(new MetricsEndpoint(std::move(impl)));
}

}  // namespace clusterkv::cache_service
