#!/usr/bin/env python3
"""Tests of the Helm chart as helm renders it: deploy/helm/clusterkv.

Usage: chart_test.py [--server=clusterkv-server] [unittest's arguments]
helm is taken from the environment's HELM or from PATH; without it the test is skipped (status 77).
With --server the rendered configuration is given to the server to check. Alerts are checked by
promtool where there is one.
"""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

SKIPPED = 77
ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/clusterkv"
CI_VALUES = ("default", "minimal", "gpu", "rdma", "mtls", "etcd")
KUBE_VERSION = "1.34.2"
HELM = os.environ.get("HELM") or shutil.which("helm")
SERVER = None
# Added to a copy of the chart: everything it renders, and its values, as one JSON document a line.
JSON_TEMPLATE = """
{{- range splitList "," .Files.Get "files" }}
{{- range $document := splitList "\\n---\\n" (include (print $.Template.BasePath "/" .) $) }}
{{- with fromYaml $document }}
---
{{ toJson . }}
{{- end }}
{{- end }}
{{- end }}
---
{{ dict "notes" (include (print .Template.BasePath "/NOTES.txt") .) | toJson }}
---
{{ dict "values" .Values | toJson }}
"""


@functools.lru_cache(maxsize=1)
def json_chart():
    """A copy of the chart that renders JSON."""
    copy = pathlib.Path(tempfile.mkdtemp(prefix="clusterkv-chart-"))
    shutil.copytree(CHART, copy, dirs_exist_ok=True)
    templates = sorted(str(path.relative_to(copy / "templates"))
                       for path in (copy / "templates").rglob("*.yaml"))
    (copy / "templates/zz_json.yaml").write_text(
        JSON_TEMPLATE.replace('.Files.Get "files"', f'"{",".join(templates)}"'))
    return copy


def run_helm(*arguments):
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False)


def helm_template(chart, *arguments, **values):
    """helm's result with `values` set: a__b=1 for --set-json a.b=1."""
    settings = [f"--set-json={name.replace('__', '.')}={json.dumps(value)}"
                for name, value in values.items()]
    return run_helm("template", "test", str(chart), "--namespace=kv",
                    f"--kube-version={KUBE_VERSION}", *arguments, *settings)


class Rendered:
    """What the chart makes of `values`, on top of one of its ci files."""

    def __init__(self, ci="default", **values):
        run = helm_template(json_chart(), f"--values={CHART}/ci/{ci}-values.yaml",
                            "--show-only=templates/zz_json.yaml", **values)
        if run.returncode != 0:
            raise AssertionError(f"helm template ({ci}, {values}): {run.stderr}")
        documents = [json.loads(line) for line in run.stdout.split("\n") if line.startswith("{")]
        self.notes = next(d["notes"] for d in documents if "notes" in d)
        self.values = next(d["values"] for d in documents if "values" in d)
        self.documents = [d for d in documents if "kind" in d]

    def kinds(self):
        return {document["kind"] for document in self.documents}

    def get(self, kind, suffix=""):
        """The one document of that kind named test-clusterkv + suffix, or None."""
        found = [d for d in self.documents
                 if d["kind"] == kind and d["metadata"]["name"] == "test-clusterkv" + suffix]
        assert len(found) <= 1, f"{kind} {suffix} is there twice"
        return found[0] if found else None

    def pod(self):
        return self.get("StatefulSet")["spec"]["template"]["spec"]

    def container(self):
        return self.pod()["containers"][0]

    def server_conf(self):
        return self.get("ConfigMap")["data"]["server.conf"]


def source(path):
    return (ROOT / path).read_text(encoding="utf-8")


def snake_case(name):
    return re.sub(r"[A-Z]", lambda match: "_" + match.group().lower(), name)


def metric_table():
    """Name, type and labels of every metric that the server has."""
    table = re.findall(r'\{"(\w+)", k(Counter|Gauge|Histogram), "\w+", "([\w,]*)"',
                       source("cache_service/telemetry/metric_table.cc"))
    assert len(table) > 20, "the metric table has another form than this test knows"
    return {name: (kind, set(filter(None, labels.split(",")))) for name, kind, labels in table}


def metrics_in(expression):
    """(metric, labels matched) of each selector in a PromQL expression."""
    pattern = r"\b((?:clusterkv|grpc_server)_\w+)(?:\{([^}]*)\})?"
    for name, selector in re.findall(pattern, expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', selector)))


def base_metric(name, table):
    for suffix in ("", "_bucket", "_count", "_sum"):
        if name.endswith(suffix) and name[:len(name) - len(suffix)] in table:
            base = name[:len(name) - len(suffix)]
            if (table[base][0] == "Histogram") == bool(suffix):
                return base
    return None


class LintTest(unittest.TestCase):
    def test_lints_strictly_with_every_ci_file(self):
        for ci in CI_VALUES:
            run = run_helm("lint", "--strict", f"--kube-version={KUBE_VERSION}", str(CHART),
                           f"--values={CHART}/ci/{ci}-values.yaml")
            self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

    def test_every_ci_file_is_listed_here(self):
        files = {path.name.replace("-values.yaml", "") for path in (CHART / "ci").iterdir()}
        self.assertEqual(files, set(CI_VALUES))

    def test_app_version_is_the_project_s(self):
        version = re.search(r"project\(clusterkv VERSION ([\d.]+)", source("CMakeLists.txt"))[1]
        self.assertIn(f"appVersion: {version}\n", source("deploy/helm/clusterkv/Chart.yaml"))


class SchemaTest(unittest.TestCase):
    schema = json.loads(source("deploy/helm/clusterkv/values.schema.json"))

    def objects(self, node, path=""):
        yield path, node
        for name, child in node.get("properties", {}).items():
            yield from self.objects(child, f"{path}.{name}" if path else name)

    def assert_refused(self, message, **values):
        run = helm_template(CHART, **values)
        self.assertNotEqual(run.returncode, 0, f"helm took {values}")
        self.assertRegex(run.stderr, message)

    def test_a_typo_is_refused_at_every_level(self):
        closed = [path for path, node in self.objects(self.schema)
                  if node.get("additionalProperties") is False]
        self.assertGreater(len(closed), 15)
        for path in closed:
            # An array's items have no path to set; they are below.
            key = f"{path}.noSuchKey" if path else "noSuchKey"
            self.assert_refused("noSuchKey", **{key: 1})
        self.assert_refused("noSuchKey", imagePullSecrets=[{"name": "a", "noSuchKey": 1}])

    def test_everything_with_properties_is_closed_and_described(self):
        for path, node in self.objects(self.schema):
            if path:
                self.assertTrue(node.get("description"), f"{path} has no description")
            if "properties" in node and not path.startswith("resources."):
                self.assertIs(node.get("additionalProperties"), False, path)

    def test_schema_and_values_have_the_same_keys(self):
        def keys(values, node, path=""):
            properties = node.get("properties")
            if properties is None or path == "resources":
                return
            names = set(properties) - ({"global"} if not path else set())
            self.assertEqual(set(values) - {"global"}, names, path)
            for name in names:
                if isinstance(values[name], dict):
                    keys(values[name], properties[name], f"{path}.{name}" if path else name)
        keys(Rendered().values, self.schema)

    def test_values_of_wrong_form_are_refused(self):
        for values in ({"shards": 0}, {"shards": "three"}, {"server__arenaBytes": "2Gi"},
                       {"server__logLevel": "loud"}, {"server__maxBatchItems": 0},
                       {"ports__grpc": 80}, {"image__digest": "latest"},
                       {"image__pullPolicy": "Sometimes"}, {"alerts__errorRatio": 2},
                       {"podDisruptionBudget__maxUnavailable": -1}, {"gpu__count": 0},
                       {"topologySpread__whenUnsatisfiable": "Perhaps"},
                       {"resources__limits__memory": "2GB"},
                       {"etcd__endpoints": ["http://etcd:2379"]}, {"etcd__endpoints": ["etcd"]},
                       {"etcd__prefix": "/kv"}, {"etcd__leaseTtlMs": 1000},
                       {"etcd__tls__mode": "on"}, {"autoscaling__mode": "vpa"},
                       {"autoscaling__minShards": 0}, {"autoscaling__arenaUsedRatio": 80},
                       {"autoscaling__keda__prometheusAddress": "prometheus:9090"},
                       {"podLabels": {"a": 1}}):
            name = next(iter(values)).split("__")[-1]
            self.assert_refused(name if name != "podLabels" else "/podLabels/a", **values)


class ValidateTest(unittest.TestCase):
    def assert_refused(self, message, **values):
        run = helm_template(CHART, **values)
        self.assertNotEqual(run.returncode, 0, f"helm took {values}")
        self.assertRegex(run.stderr, message)

    def test_the_grace_period_must_hold_the_drain(self):
        self.assert_refused("shorter than drainDelayMs", terminationGracePeriodSeconds=39)
        self.assert_refused("shorter than drainDelayMs", server__drainTimeoutMs=60000)
        Rendered(terminationGracePeriodSeconds=40)

    def test_the_memory_limit_must_hold_the_arena(self):
        self.assert_refused("would be killed", server__arenaBytes="2GiB")
        self.assert_refused("would be killed", shm__sizeLimit="1Gi")
        self.assert_refused("would be killed", resources__limits__memory=1 << 30)
        limit = (1 << 30) + (64 << 20) + (256 << 20)
        Rendered(resources__limits__memory=limit)
        self.assert_refused("would be killed", resources__limits__memory=limit - 1)

    def test_ports_must_differ(self):
        self.assert_refused("must differ", ports__admin=7400)

    def test_two_monitors_exclude_each_other(self):
        self.assert_refused("twice", metrics__serviceMonitor__enabled=True,
                            metrics__podMonitor__enabled=True)

    def test_what_reads_metrics_needs_them(self):
        for reader in ("metrics__serviceMonitor__enabled", "metrics__podMonitor__enabled",
                       "alerts__enabled", "dashboards__enabled"):
            self.assert_refused("without series", metrics__enabled=False, **{reader: True})

    def test_host_network_needs_rdma_and_no_network_policy(self):
        self.assert_refused("needs rdma.enabled", rdma__hostNetwork=True)
        self.assert_refused("exclude each other", rdma__hostNetwork=True, rdma__enabled=True,
                            networkPolicy__enabled=True)

    def test_what_etcd_needs_is_there_and_nothing_else(self):
        for values in ({"etcd__prefix": "a"}, {"etcd__tls__mode": "tls"},
                       {"etcd__tls__existingSecret": "a"}, {"networkPolicy__etcd": [{}]}):
            self.assert_refused("do nothing without etcd.endpoints", **values)
        self.assert_refused("needs etcd.tls.existingSecret", etcd__endpoints=["a:1"],
                            etcd__tls__mode="tls")
        self.assert_refused("etcd.tls.mode=disabled", etcd__endpoints=["a:1"],
                            etcd__tls__existingSecret="a")

    def test_autoscaling_needs_etcd_and_something_to_go_by(self):
        for mode in ("hpa", "keda"):
            self.assert_refused("needs etcd.endpoints: the list of shards must follow",
                                autoscaling__mode=mode)
        etcd = {"etcd__endpoints": ["a:1"]}
        self.assert_refused("without metrics", **etcd, autoscaling__mode="hpa",
                            metrics__enabled=False)
        self.assert_refused("minShards 11 is more", **etcd, autoscaling__mode="hpa",
                            autoscaling__minShards=11)
        self.assert_refused("nothing to go by", **etcd, autoscaling__mode="hpa",
                            autoscaling__arenaUsedRatio=0, autoscaling__queuedSelects=0)
        self.assert_refused("prometheusAddress", **etcd, autoscaling__mode="keda")
        self.assert_refused("fallback.shards: 2 is not", **etcd, autoscaling__mode="keda",
                            autoscaling__keda__prometheusAddress="http://p:9090",
                            autoscaling__keda__fallback__shards=2)

    def test_tls_has_one_source_and_a_client_to_test_with(self):
        self.assert_refused("needs either", tls__mode="tls")
        self.assert_refused("needs either", tls__mode="tls", tls__existingSecret="a",
                            tls__certManager__enabled=True)
        self.assert_refused("do nothing", tls__existingSecret="a")
        self.assert_refused("issuerRef.name", tls__mode="tls", tls__certManager__enabled=True)
        self.assert_refused("clientSecret", tls__mode="mutual", tls__existingSecret="a")
        Rendered(tls__mode="tls", tls__existingSecret="a")

    def test_tenants_need_certificates_and_somebody_who_administers(self):
        tenants = [{"name": "red", "identities": ["red"]}]
        self.assert_refused("tls.mode=mutual", tenants=tenants)
        self.assert_refused("operatorIdentity", tenants=tenants, tls__mode="mutual",
                            tls__existingSecret="a", tls__clientSecret="b")
        self.assert_refused("only where there are tenants", adminIdentities=["me"])
        for wrong in ({"name": "Red", "identities": ["a"]}, {"name": "red", "identities": []},
                      {"name": "operator", "identities": ["a"]}, {"name": "red"},
                      {"name": "red", "identities": ["a"], "noSuchKey": 1}):
            self.assert_refused("tenants", tenants=[wrong])


class TlsTest(unittest.TestCase):
    def secrets(self, pod):
        return {volume["secret"]["secretName"]: volume["secret"].get("items")
                for volume in pod["volumes"] if "secret" in volume}

    def test_without_tls_there_is_none_of_it(self):
        rendered = Rendered()
        self.assertEqual(self.secrets(rendered.pod()), {})
        self.assertNotIn("volumes", rendered.get("Pod", "-selftest")["spec"])
        self.assertNotIn("Certificate", rendered.kinds())
        self.assertIn("WARNING: the data port speaks plain text", rendered.notes)

    def test_existing_secrets_are_mounted(self):
        rendered = Rendered(ci="mtls")
        self.assertEqual(self.secrets(rendered.pod()), {"clusterkv-shards": None})
        test = rendered.get("Pod", "-selftest")["spec"]
        self.assertEqual(self.secrets(test), {"clusterkv-operator": None})
        for container in test["containers"]:
            self.assertIn("--tls_key=/etc/clusterkv-tls/tls.key", container["args"])

    def test_the_test_of_a_server_that_asks_for_nothing_gets_the_authority_alone(self):
        test = Rendered(tls__mode="tls", tls__existingSecret="shards").get("Pod", "-selftest")
        self.assertEqual(self.secrets(test["spec"]),
                         {"shards": [{"key": "ca.crt", "path": "ca.crt"}]})
        for container in test["spec"]["containers"]:
            self.assertIn("--tls_ca=/etc/clusterkv-tls/ca.crt", container["args"])
            self.assertNotIn("--tls_key=/etc/clusterkv-tls/tls.key", container["args"])

    def test_cert_manager_makes_a_certificate_for_every_address(self):
        rendered = Rendered(tls__mode="mutual", tls__certManager__enabled=True,
                            tls__certManager__issuerRef__name="ca",
                            tenants=[{"name": "red", "identities": ["red"]}])
        shards = rendered.get("Certificate")["spec"]
        domain = "kv.svc.cluster.local"
        for address in (f"test-clusterkv.{domain}", f"test-clusterkv-headless.{domain}",
                        f"*.test-clusterkv-peers.{domain}", "localhost"):
            self.assertIn(address, shards["dnsNames"])
        self.assertEqual(shards["issuerRef"]["name"], "ca")
        operator = rendered.get("Certificate", "-operator")["spec"]
        self.assertIn(f'admin_identities: "{operator["commonName"]}"', rendered.server_conf())
        self.assertEqual(self.secrets(rendered.pod()), {shards["secretName"]: None})
        self.assertEqual(self.secrets(rendered.get("Pod", "-selftest")["spec"]),
                         {operator["secretName"]: None})

    def test_notes_show_the_certificates(self):
        notes = Rendered(ci="mtls").notes
        self.assertIn("get secret clusterkv-operator", notes)
        self.assertIn("--cert tls.crt --key tls.key --call clusterkv.v1.CacheService", notes)
        self.assertIn("--tls_ca=ca.crt --tls_cert=tls.crt --tls_key=tls.key", notes)
        self.assertNotIn("WARNING", notes)


class ServerConfigTest(unittest.TestCase):
    def test_every_field_of_the_configuration_is_set(self):
        message = re.search(r"message ServerConfig \{.*?^\}",
                            source("proto/clusterkv/v1/config.proto"), re.DOTALL | re.MULTILINE)[0]
        fields = set(re.findall(r"^  (?:repeated )?\w+ (\w+) =\s*\d+;", message, re.MULTILINE))
        self.assertGreater(len(fields), 20)
        def written(ci):
            return set(re.findall(r"^(\w+)(?::| \{)", Rendered(ci=ci).server_conf(), re.MULTILINE))
        # "cpu" is all there is; whoever asks for certificates wants them; a name and an address are
        # each pod's own.
        self.assertEqual(written("mtls") | written("etcd"),
                         fields - {"device", "shard_name", "advertise_address",
                                   "tls_client_certificate_optional"})
        plain = written("default")
        self.assertEqual({name for name in written("mtls") - plain if not name.startswith("tls_")},
                         {"health_listen", "tenants", "admin_identities"})
        self.assertEqual(plain - written("etcd"), {"shards_file"})
        self.assertEqual(
            {name for name in written("etcd") - plain if not name.startswith("etcd_")}, set())

    def test_defaults_are_the_server_s(self):
        defaults = dict(re.findall(r'^      \{"(\w+)", "([^"]*)"',
                                   source("cache_service/config.cc"), re.MULTILINE))
        for key, value in Rendered().values["server"].items():
            if key in ("drainDelayMs", "reflection"):  # as Kubernetes wants it; said the other way
                continue
            text = str(value).lower() if isinstance(value, bool) else str(value)
            self.assertEqual(text, defaults[snake_case(key)], key)

    def test_threads_follow_the_cpu_limit(self):
        for limit, threads in (("2", 2), ("1500m", 2), ("250m", 1), (3, 3), ("2.5", 3)):
            conf = Rendered(resources__limits__cpu=limit).server_conf()
            self.assertIn(f"build_threads: {threads}\n", conf)
            self.assertIn(f"select_threads: {threads}\n", conf)
        conf = Rendered(resources__limits__cpu="8", server__selectThreads=5).server_conf()
        self.assertIn("build_threads: 8\n", conf)
        self.assertIn("select_threads: 5\n", conf)
        self.assertIn("build_threads: 0\n", Rendered().server_conf())

    def test_large_numbers_stay_whole(self):
        self.assertIn("max_sequence_tokens: 1073741824\n",
                      Rendered(server__maxSequenceTokens=1 << 30).server_conf())

    def test_reflection_and_metrics_can_be_left_out(self):
        conf = Rendered(ci="minimal").server_conf()
        self.assertIn("no_reflection: true\n", conf)
        self.assertNotIn("metrics_listen", conf)

    def test_the_server_takes_what_is_rendered(self):
        if SERVER is None:
            self.skipTest("no --server given")
        for ci in CI_VALUES:
            rendered = Rendered(ci=ci)
            arguments = [argument.replace("$(POD_NAME)", "test-clusterkv-0")
                         for argument in rendered.container()["args"]]
            with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
                file.write(rendered.server_conf())
                file.flush()
                arguments[0] = f"--config={file.name}"
                run = subprocess.run([SERVER, *arguments, "--check_config"],
                                     capture_output=True, text=True, check=False)
            self.assertEqual(run.returncode, 0, f"{ci}: {run.stderr}")

    def test_the_shards_are_listed_by_the_names_of_their_pods(self):
        rendered = Rendered(shards=4, ports={"grpc": 1111, "admin": 2222, "metrics": 3333},
                            clusterDomain="here.example")
        lines = rendered.get("ConfigMap", "-shards")["data"]["shards"].splitlines()
        name, domain = "test-clusterkv", "test-clusterkv-peers.kv.svc.here.example"
        self.assertEqual(lines, [f"{name}-{i} {name}-{i}.{domain}:1111" for i in range(4)])
        container = rendered.container()
        self.assertIn("--shard_name=$(POD_NAME)", container["args"])
        self.assertEqual(container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"],
                         "metadata.name")
        mount = [m for m in container["volumeMounts"] if m["name"] == "shards"][0]
        self.assertNotIn("subPath", mount, "a file by subPath never changes")
        self.assertIn(f'shards_file: "{mount["mountPath"]}/shards"', rendered.server_conf())

    def test_a_changed_configuration_restarts_the_pods_and_another_shard_does_not(self):
        def checksum(**values):
            template = Rendered(**values).get("StatefulSet")["spec"]["template"]
            return template["metadata"]["annotations"]["checksum/config"]
        self.assertEqual(checksum(), checksum(shards=5))
        self.assertNotEqual(checksum(), checksum(server__spinUs=1))


class EtcdTest(unittest.TestCase):
    """The shards' list in etcd instead of a ConfigMap, and what may then change their number."""
    ETCD = {"etcd__endpoints": ["etcd-0.etcd:2379", "etcd-1.etcd:12379"]}
    KEDA = {**ETCD, "autoscaling__mode": "keda",
            "autoscaling__keda__prometheusAddress": "http://prometheus:9090"}

    def test_the_list_is_etcd_s_and_no_config_map(self):
        rendered = Rendered(**self.ETCD, ports__grpc=1111)
        self.assertIsNone(rendered.get("ConfigMap", "-shards"))
        conf = rendered.server_conf()
        self.assertIn('etcd_endpoints: "etcd-0.etcd:2379,etcd-1.etcd:12379"\n', conf)
        self.assertIn('etcd_prefix: "clusterkv/kv/test-clusterkv"\n', conf)
        self.assertNotIn("shards_file", conf)
        self.assertNotIn("etcd_ca_file", conf)
        container = rendered.container()
        self.assertEqual([m["name"] for m in container["volumeMounts"]], ["config"])
        self.assertIn("--shard_name=$(POD_NAME)", container["args"])
        self.assertIn("--advertise_address=$(POD_NAME).test-clusterkv-peers.kv.svc.cluster.local"
                      ":1111", container["args"])
        self.assertNotIn("advertise", json.dumps(Rendered().container()))
        self.assertIn('etcd_prefix: "mine"\n',
                      Rendered(**self.ETCD, etcd__prefix="mine").server_conf())

    def test_certificates_for_etcd_come_from_their_secret(self):
        def secret(rendered):
            return [v["secret"] for v in rendered.pod()["volumes"] if v["name"] == "etcd"]
        tls = Rendered(**self.ETCD, etcd__tls={"mode": "tls", "existingSecret": "e"})
        self.assertEqual(secret(tls), [{"secretName": "e", "defaultMode": 0o440,
                                        "items": [{"key": "ca.crt", "path": "ca.crt"}]}])
        self.assertIn('etcd_ca_file: "/etc/clusterkv-etcd/ca.crt"\n', tls.server_conf())
        self.assertNotIn("etcd_key_file", tls.server_conf())
        mutual = Rendered(ci="etcd")
        self.assertEqual(secret(mutual), [{"secretName": "clusterkv-etcd", "defaultMode": 0o440}])
        self.assertIn('etcd_key_file: "/etc/clusterkv-etcd/tls.key"\n', mutual.server_conf())
        self.assertEqual(secret(Rendered(**self.ETCD)), [])

    def test_the_network_policy_lets_out_to_etcd_and_the_dns(self):
        spec = Rendered(**self.ETCD, networkPolicy__enabled=True).get("NetworkPolicy")["spec"]
        self.assertEqual(spec["egress"], [
            {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
            {"ports": [{"port": 2379}, {"port": 12379}]}])
        spec = Rendered(ci="etcd").get("NetworkPolicy")["spec"]
        self.assertEqual(spec["egress"][1], {
            "ports": [{"port": 2379}],
            "to": [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "etcd"}}}]})

    def test_alerts_of_etcd_are_there_with_it(self):
        def alerts(**values):
            spec = Rendered(alerts__enabled=True, **values).get("PrometheusRule")["spec"]
            return {rule["alert"] for rule in spec["groups"][0]["rules"]}
        self.assertEqual(alerts(**self.ETCD) - alerts(),
                         {"ClusterKVEtcdAway", "ClusterKVNotEntered"})

    def test_an_autoscaler_has_the_number_of_shards_to_itself(self):
        self.assertEqual(Rendered(shards=4, **self.ETCD).get("StatefulSet")["spec"]["replicas"], 4)
        for values in ({**self.ETCD, "autoscaling__mode": "hpa"}, self.KEDA):
            rendered = Rendered(shards=4, alerts__enabled=True, **values)
            self.assertNotIn("replicas", rendered.get("StatefulSet")["spec"])
            # What is sure is the least.
            self.assertEqual(len(rendered.get("Pod", "-selftest")["spec"]["containers"]), 3)
            self.assertIn("< 3", json.dumps(rendered.get("PrometheusRule")))
            self.assertIn("3 to 10 shards", rendered.notes)
        for ci in CI_VALUES:
            self.assertEqual("HorizontalPodAutoscaler" in Rendered(ci=ci).kinds(), ci == "etcd")
            self.assertNotIn("ScaledObject", Rendered(ci=ci).kinds())

    def test_the_pod_autoscaler_goes_by_our_metrics(self):
        spec = Rendered(**self.ETCD, autoscaling={
            "mode": "hpa", "minShards": 2, "maxShards": 5, "arenaUsedRatio": 0.5,
            "scaleDown": {"shards": 1, "periodSeconds": 300, "stabilizationWindowSeconds": 900},
        }).get("HorizontalPodAutoscaler")["spec"]
        self.assertEqual(spec["scaleTargetRef"], {"apiVersion": "apps/v1", "kind": "StatefulSet",
                                                  "name": "test-clusterkv"})
        self.assertEqual((spec["minReplicas"], spec["maxReplicas"]), (2, 5))
        targets = {m["pods"]["metric"]["name"]: m["pods"]["target"] for m in spec["metrics"]}
        self.assertEqual(targets, {
            "clusterkv_arena_used_ratio": {"type": "AverageValue", "averageValue": "0.5"},
            "clusterkv_queued_selects": {"type": "AverageValue", "averageValue": "8"}})
        self.assertLessEqual(set(targets), set(metric_table()))
        self.assertEqual(spec["behavior"]["scaleDown"], {
            "stabilizationWindowSeconds": 900,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}]})
        one = Rendered(**self.ETCD, autoscaling__mode="hpa", autoscaling__queuedSelects=0)
        self.assertEqual(len(one.get("HorizontalPodAutoscaler")["spec"]["metrics"]), 1)

    def test_keda_asks_prometheus_for_our_metrics(self):
        spec = Rendered(**self.KEDA, autoscaling__keda__authenticationRef="token",
                        autoscaling__keda__fallback={"failureThreshold": 5, "shards": 4},
                        ).get("ScaledObject")["spec"]
        self.assertEqual(spec["scaleTargetRef"]["kind"], "StatefulSet")
        self.assertEqual((spec["minReplicaCount"], spec["maxReplicaCount"]), (3, 10))
        self.assertEqual(spec["fallback"], {"failureThreshold": 5, "replicas": 4,
                                            "behavior": "currentReplicasIfHigher"})
        self.assertEqual(len(spec["triggers"]), 2)
        table = metric_table()
        for trigger, threshold in zip(spec["triggers"], ("0.8", "8")):
            self.assertEqual((trigger["type"], trigger["metricType"]),
                             ("prometheus", "AverageValue"))
            self.assertEqual(trigger["authenticationRef"], {"name": "token"})
            for value in trigger["metadata"].values():
                self.assertIsInstance(value, str)
            self.assertEqual(trigger["metadata"]["threshold"], threshold)
            for name, labels in metrics_in(trigger["metadata"]["query"]):
                self.assertIn(name, table)
                self.assertEqual(labels, {"namespace", "pod"})
        self.assertEqual([trigger["metadata"]["query"].count("clusterkv_arena_used_ratio")
                          for trigger in spec["triggers"]], [1, 0])

    def test_notes_say_how_the_number_changes(self):
        self.assertIn("not by `kubectl scale`", Rendered().notes)
        self.assertIn("scale statefulset/test-clusterkv", Rendered(**self.ETCD).notes)
        self.assertIn("describe hpa", Rendered(ci="etcd").notes)


class PodTest(unittest.TestCase):
    def test_runs_without_rights(self):
        for ci in CI_VALUES:
            rendered = Rendered(ci=ci)
            for pod in (rendered.pod(), rendered.get("Pod", "-selftest")["spec"]):
                self.assertIs(pod["automountServiceAccountToken"], False)
                self.assertIs(pod["securityContext"]["runAsNonRoot"], True)
                self.assertEqual(pod["securityContext"]["runAsUser"], 65532)
                self.assertEqual(pod["securityContext"]["seccompProfile"],
                                 {"type": "RuntimeDefault"})
                for container in pod["containers"]:
                    context = container["securityContext"]
                    self.assertIs(context["readOnlyRootFilesystem"], True)
                    self.assertIs(context["allowPrivilegeEscalation"], False)
                    self.assertEqual(context["capabilities"]["drop"], ["ALL"])

    def test_probes_ask_the_admin_port_for_different_things(self):
        container = Rendered(ports__admin=9001).container()
        services = {name: container[name + "Probe"]["grpc"]
                    for name in ("startup", "readiness", "liveness")}
        self.assertEqual(services, {"startup": {"port": 9001, "service": "liveness"},
                                    "readiness": {"port": 9001, "service": "readiness"},
                                    "liveness": {"port": 9001, "service": "liveness"}})
        for name in services:
            self.assertGreater(container[name + "Probe"]["failureThreshold"], 1)

    def test_with_certificates_probes_ask_the_health_port(self):
        container = Rendered(ci="mtls", ports__health=9003).container()
        for name in ("startup", "readiness", "liveness"):
            self.assertEqual(container[name + "Probe"]["grpc"]["port"], 9003)
        self.assertIn({"name": "health", "containerPort": 9003}, container["ports"])
        self.assertNotIn("health", {port["name"] for port in Rendered().container()["ports"]})

    def test_gpu_is_a_resource_named_by_a_value(self):
        rendered = Rendered(gpu__enabled=True, gpu__resourceName="example.com/gpu", gpu__count=2,
                            gpu__runtimeClassName="nvidia")
        limits = rendered.container()["resources"]["limits"]
        self.assertEqual(limits["example.com/gpu"], 2)
        self.assertEqual(limits["memory"], "2Gi")
        self.assertEqual(rendered.pod()["runtimeClassName"], "nvidia")
        self.assertIn('device: "cuda"', rendered.server_conf())
        self.assertNotIn("device:", Rendered().server_conf())
        self.assertEqual(set(Rendered().container()["resources"]["limits"]), {"memory"})
        self.assertNotIn("runtimeClassName", Rendered().pod())

    def test_rdma_is_a_resource_and_ipc_lock_alone(self):
        rendered = Rendered(ci="rdma")
        container = rendered.container()
        self.assertEqual(container["resources"]["limits"]["rdma/hca_shared_devices_a"], 1)
        self.assertEqual(container["securityContext"]["capabilities"],
                         {"drop": ["ALL"], "add": ["IPC_LOCK"]})
        self.assertNotIn("hostNetwork", rendered.pod())
        self.assertNotIn("add", Rendered().container()["securityContext"]["capabilities"])
        on_host = Rendered(rdma__enabled=True, rdma__hostNetwork=True).pod()
        self.assertIs(on_host["hostNetwork"], True)
        self.assertEqual(on_host["dnsPolicy"], "ClusterFirstWithHostNet")

    def test_shared_memory_is_sized_only_where_asked_for(self):
        pod = Rendered(ci="gpu").pod()
        self.assertIn({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
                      pod["volumes"])
        self.assertIn({"name": "shm", "mountPath": "/dev/shm"},
                      pod["containers"][0]["volumeMounts"])
        self.assertNotIn("shm", json.dumps(Rendered().pod()))

    def test_spreads_only_where_asked_for(self):
        constraint = Rendered().pod()["topologySpreadConstraints"][0]
        self.assertEqual(constraint["labelSelector"]["matchLabels"],
                         Rendered().get("StatefulSet")["spec"]["selector"]["matchLabels"])
        self.assertNotIn("topologySpreadConstraints",
                         Rendered(topologySpread__enabled=False).pod())

    def test_placement_and_names_are_passed_on(self):
        rendered = Rendered(nodeSelector={"pool": "kv"}, priorityClassName="high",
                            tolerations=[{"key": "a", "operator": "Exists"}],
                            affinity={"nodeAffinity": {}}, podLabels={"team": "a"},
                            podAnnotations={"note": "b"}, imagePullSecrets=[{"name": "s"}],
                            terminationGracePeriodSeconds=77, podManagementPolicy="OrderedReady",
                            updatePartition=2)
        pod = rendered.pod()
        self.assertEqual(pod["nodeSelector"], {"pool": "kv"})
        self.assertEqual(pod["priorityClassName"], "high")
        self.assertEqual(pod["tolerations"], [{"key": "a", "operator": "Exists"}])
        self.assertEqual(pod["affinity"], {"nodeAffinity": {}})
        self.assertEqual(pod["imagePullSecrets"], [{"name": "s"}])
        self.assertEqual(pod["terminationGracePeriodSeconds"], 77)
        spec = rendered.get("StatefulSet")["spec"]
        self.assertEqual(spec["podManagementPolicy"], "OrderedReady")
        self.assertEqual(spec["updateStrategy"]["rollingUpdate"], {"partition": 2})
        self.assertEqual(spec["template"]["metadata"]["labels"]["team"], "a")
        self.assertEqual(spec["template"]["metadata"]["annotations"]["note"], "b")

    def test_the_image_is_named_by_tag_or_digest(self):
        self.assertEqual(Rendered().container()["image"], "clusterkv:0.1.0")
        self.assertEqual(Rendered(image__repository="r/c", image__tag="x").container()["image"],
                         "r/c:x")
        digest = "sha256:" + "0" * 64
        rendered = Rendered(image__digest=digest, image__pullPolicy="Never")
        self.assertEqual(rendered.container()["image"], f"clusterkv@{digest}")
        self.assertEqual(rendered.container()["imagePullPolicy"], "Never")
        test = rendered.get("Pod", "-selftest")["spec"]["containers"][0]
        self.assertEqual(test["image"], f"clusterkv@{digest}")


class ObjectsTest(unittest.TestCase):
    def test_selectors_find_the_pods_and_nothing_else(self):
        for ci in CI_VALUES:
            rendered = Rendered(ci=ci)
            labels = rendered.get("StatefulSet")["spec"]["template"]["metadata"]["labels"]
            test_labels = rendered.get("Pod", "-selftest")["metadata"]["labels"]
            services = [d for d in rendered.documents if d["kind"] == "Service"]
            for service in services:
                selector = service["spec"]["selector"]
                self.assertLessEqual(selector.items(), labels.items())
                self.assertFalse(selector.items() <= test_labels.items())
                self.assertNotIn("app.kubernetes.io/version", selector)
                self.assertNotIn("helm.sh/chart", selector)

    def test_names_are_short_enough(self):
        rendered = Rendered(fullnameOverride="n" * 63)
        for document in rendered.documents:
            self.assertLessEqual(len(document["metadata"]["name"]), 61, document["kind"])

    def test_clients_find_ready_shards_and_names_find_all(self):
        rendered = Rendered()
        headless = rendered.get("Service", "-headless")["spec"]
        peers = rendered.get("Service", "-peers")["spec"]
        admin = rendered.get("Service", "-admin")["spec"]
        self.assertEqual((headless["clusterIP"], peers["clusterIP"], admin["clusterIP"]),
                         ("None", "None", "None"))
        self.assertNotIn("publishNotReadyAddresses", headless)
        self.assertIs(peers["publishNotReadyAddresses"], True)
        self.assertIs(admin["publishNotReadyAddresses"], True)
        self.assertEqual(rendered.get("StatefulSet")["spec"]["serviceName"], "test-clusterkv-peers")

    def test_switches_make_and_unmake_their_objects(self):
        for kind, suffix, on, off in (
                ("Service", "", {}, {"service__enabled": False}),
                ("ServiceAccount", "", {}, {"serviceAccount__create": False}),
                ("PodDisruptionBudget", "", {}, {"podDisruptionBudget__enabled": False}),
                ("NetworkPolicy", "", {"networkPolicy__enabled": True}, {}),
                ("ServiceMonitor", "", {"metrics__serviceMonitor__enabled": True}, {}),
                ("PodMonitor", "", {"metrics__podMonitor__enabled": True}, {}),
                ("PrometheusRule", "", {"alerts__enabled": True}, {}),
                ("ConfigMap", "-dashboards", {"dashboards__enabled": True}, {})):
            self.assertIsNotNone(Rendered(**on).get(kind, suffix), kind)
            self.assertIsNone(Rendered(**off).get(kind, suffix), kind)

    def test_minimal_is_minimal(self):
        self.assertEqual(Rendered(ci="minimal").kinds(),
                         {"ConfigMap", "Service", "StatefulSet", "Pod"})
        self.assertEqual(Rendered(ci="minimal").pod()["serviceAccountName"], "default")

    def test_ports_are_the_same_everywhere(self):
        rendered = Rendered(ports={"grpc": 1111, "admin": 2222, "metrics": 3333},
                            networkPolicy__enabled=True)
        ports = {port["name"]: port["containerPort"] for port in rendered.container()["ports"]}
        self.assertEqual(ports, {"grpc": 1111, "admin": 2222, "metrics": 3333})
        for line in ('listen: "0.0.0.0:1111"', 'admin_listen: "0.0.0.0:2222"',
                     'metrics_listen: "0.0.0.0:3333"'):
            self.assertIn(line, rendered.server_conf())
        for service in (d for d in rendered.documents if d["kind"] == "Service"):
            for port in service["spec"]["ports"]:
                self.assertEqual(port["port"], ports[port["name"]])
                self.assertEqual(port["targetPort"], port["name"])
        rules = rendered.get("NetworkPolicy")["spec"]["ingress"]
        self.assertEqual([rule["ports"][0]["port"] for rule in rules], [1111, 2222, 3333])

    def test_the_network_policy_lets_in_who_is_named_and_the_test(self):
        rendered = Rendered(networkPolicy={
            "enabled": True, "clients": [{"podSelector": {"matchLabels": {"role": "decode"}}}],
            "admins": [], "scrapers": []})
        spec = rendered.get("NetworkPolicy")["spec"]
        self.assertEqual(spec["policyTypes"], ["Ingress", "Egress"])
        self.assertEqual(spec["egress"], [])
        test = {"podSelector": {
            "matchLabels": rendered.get("Pod", "-selftest")["metadata"]["labels"]}}
        self.assertEqual([rule["from"] for rule in spec["ingress"]],
                         [[{"podSelector": {"matchLabels": {"role": "decode"}}}, test], [test]])

    def test_the_test_asks_every_shard(self):
        pod = Rendered(shards=4, clusterDomain="example.org").get("Pod", "-selftest")
        self.assertEqual(pod["metadata"]["annotations"]["helm.sh/hook"], "test")
        self.assertEqual(len(pod["spec"]["containers"]), 4)
        domain = "test-clusterkv-peers.kv.svc.example.org"
        self.assertEqual(pod["spec"]["containers"][3]["args"],
                         ["selftest", f"--server=test-clusterkv-3.{domain}:7400",
                          f"--admin=test-clusterkv-3.{domain}:7401"])

    def test_monitors_select_the_shards(self):
        labels = Rendered().get("Service", "-admin")["metadata"]["labels"]
        monitor = Rendered(ci="gpu").get("ServiceMonitor")
        self.assertLessEqual(monitor["spec"]["selector"]["matchLabels"].items(), labels.items())
        self.assertEqual(monitor["metadata"]["labels"]["release"], "prometheus")
        others = [d for d in Rendered().documents if d["kind"] == "Service"
                  and d["metadata"]["name"] != "test-clusterkv-admin"]
        for service in others:
            self.assertFalse(monitor["spec"]["selector"]["matchLabels"].items()
                             <= service["metadata"]["labels"].items())
        pods = Rendered(ci="rdma")
        selector = pods.get("PodMonitor")["spec"]["selector"]["matchLabels"]
        self.assertLessEqual(
            selector.items(),
            pods.get("StatefulSet")["spec"]["template"]["metadata"]["labels"].items())


class NotesTest(unittest.TestCase):
    def test_print_the_lines_to_run(self):
        notes = Rendered(ports__grpc=7777).notes
        self.assertIn("ghz --insecure --call clusterkv.v1.CacheService/SelectClusters", notes)
        self.assertIn("127.0.0.1:7777", notes)
        self.assertIn("ckv status --server=127.0.0.1:7777 --admin=127.0.0.1:7401", notes)
        self.assertIn("test-clusterkv-headless.kv.svc.cluster.local:7777", notes)
        self.assertIn("helm -n kv test test", notes)

    def test_warn_of_plain_text(self):
        self.assertIn("WARNING", Rendered().notes)
        self.assertIn("networkPolicy.enabled=true", Rendered().notes)
        self.assertNotIn("networkPolicy.enabled=true", Rendered(ci="rdma").notes)

    def test_without_reflection_name_the_proto_file(self):
        self.assertIn("--proto=clusterkv/v1/cache_service.proto", Rendered(ci="minimal").notes)
        self.assertNotIn("--proto=", Rendered().notes)


class ObservabilityTest(unittest.TestCase):
    def dashboards(self):
        data = Rendered(dashboards__enabled=True).get("ConfigMap", "-dashboards")["data"]
        return {name: json.loads(text) for name, text in data.items()}

    def expressions(self):
        for name, dashboard in self.dashboards().items():
            for panel in dashboard["panels"]:
                for target in panel.get("targets", []):
                    yield f"{name}: {panel['title']}", target["expr"]
        for rule in self.rules():
            yield rule["alert"], rule["expr"]

    def rules(self):
        groups = Rendered(alerts__enabled=True).get("PrometheusRule")["spec"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def test_every_metric_that_is_asked_for_exists(self):
        table = metric_table()
        free = {"namespace", "pod", "le"}  # from the scrape, and of every histogram
        for where, expression in self.expressions():
            self.assertTrue(list(metrics_in(expression)), where)
            for name, labels in metrics_in(expression):
                base = base_metric(name, table)
                self.assertIsNotNone(base, f"{where}: no metric {name}")
                self.assertLessEqual(labels - free, table[base][1], f"{where}: {name}")

    def test_every_metric_has_a_panel(self):
        table = metric_table()
        shown = {base_metric(name, table)
                 for dashboard in self.dashboards().values() for panel in dashboard["panels"]
                 for target in panel.get("targets", [])
                 for name, _ in metrics_in(target["expr"])}
        self.assertEqual(set(table) - shown, set())

    def test_panels_do_not_overlap(self):
        for dashboard in self.dashboards().values():
            cells = [(panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
                     for panel in dashboard["panels"]
                     for x in range(panel["gridPos"]["w"]) for y in range(panel["gridPos"]["h"])]
            self.assertEqual(len(cells), len(set(cells)))
            self.assertLess(max(x for x, _ in cells), 24)

    def test_alerts_say_what_is_wrong_and_what_helps(self):
        for rule in self.rules():
            self.assertIn(rule["labels"]["severity"], ("critical", "warning", "info"))
            self.assertTrue(rule["annotations"]["summary"], rule["alert"])
            self.assertTrue(rule["annotations"]["description"], rule["alert"])

    def test_thresholds_are_the_values(self):
        rules = Rendered(alerts={"enabled": True, "arenaUsedRatio": 0.5, "errorRatio": 0.25,
                                 "selectP99Seconds": 0.125, "queueP99Seconds": 7}, shards=9)
        text = json.dumps(rules.get("PrometheusRule"))
        for threshold in ("> 0.5\"", "> 0.25\"", "> 0.125\"", "> 7\"", "< 9\""):
            self.assertIn(threshold, text)

    def test_promtool_takes_the_alerts(self):
        promtool = shutil.which("promtool")
        if promtool is None:
            self.skipTest("no promtool here")
        spec = Rendered(alerts__enabled=True).get("PrometheusRule")["spec"]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(spec, file)
            file.flush()
            run = subprocess.run([promtool, "check", "rules", file.name], capture_output=True,
                                 text=True, check=False)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        self.assertIn(f"{len(self.rules())} rules found", run.stdout)


def main():
    global SERVER
    arguments = []
    for argument in sys.argv[1:]:
        if argument.startswith("--server="):
            SERVER = argument.split("=", 1)[1]
        else:
            arguments.append(argument)
    if HELM is None or shutil.which(HELM) is None:
        print("SKIPPED: no helm here (set HELM or PATH); nothing of the chart was tested")
        return SKIPPED
    try:
        result = unittest.main(argv=[sys.argv[0], *arguments], exit=False).result
    finally:
        if json_chart.cache_info().currsize:
            shutil.rmtree(json_chart())
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
