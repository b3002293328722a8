"""A Prometheus of the test's own, with the chart's alerts and the dashboard's expressions."""

import json
import re
import subprocess
import urllib.parse
import urllib.request


class Prometheus:
    """Scrapes `targets` ({pod: host:port}), with the rendered chart's alerts; a context manager."""

    def __init__(self, folder, rendered, namespace, targets, port=19090):
        self.folder, self.rendered, self.namespace = folder, rendered, namespace
        self.targets, self.port = targets, port

    def __enter__(self):
        spec = self.rendered.get("PrometheusRule")["spec"]
        for rule in spec["groups"][0]["rules"]:
            rule.pop("for", None)  # at once
            rule["expr"] = (rule["expr"].replace('"kv"', f'"{self.namespace}"')
                            .replace("[5m]", "[30s]"))
        (self.folder / "rules.json").write_text(json.dumps(spec))
        # Targets by hand: Debian's Prometheus is built without discovery by Kubernetes.
        targets = [{"targets": [address], "labels": {"namespace": self.namespace, "pod": pod}}
                   for pod, address in self.targets.items()]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(self.folder / "rules.json")],
            "scrape_configs": [{"job_name": "clusterkv", "static_configs": targets}]}
        (self.folder / "prometheus.json").write_text(json.dumps(config))
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={self.folder}/prometheus.json",
             f"--storage.tsdb.path={self.folder}/tsdb",
             f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"],
            stderr=(self.folder / "prometheus.log").open("w", encoding="utf-8"))
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=60)

    def get(self, path, **parameters):
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?" + urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def query(self, expression):
        try:
            result = self.get("query", query=expression)["result"]
        except OSError:
            return []
        return [float(row["value"][1]) for row in result]

    def check_panels(self, without):
        """How many expressions of panels there are, and those that no data answers; those that
        match `without` need have none, nor those of etcd."""
        dashboard = json.loads(
            self.rendered.get("ConfigMap", "-dashboards")["data"]["clusterkv.json"])
        count, empty = 0, []
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                expression = (target["expr"].replace("$__rate_interval", "30s")
                              .replace("$namespace", self.namespace).replace("$pod", ".+"))
                count += 1
                without_data = re.search(without + "|clusterkv_etcd_", expression)
                if not without_data and not self.query(expression):
                    empty.append(f"{panel['title']}: {expression}")
        return count, empty

    def firing(self):
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"]
                if alert["state"] == "firing"}
