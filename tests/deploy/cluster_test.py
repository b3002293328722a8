#!/usr/bin/env python3
"""Installs the chart on a real cluster and tries what an operator does; cluster.sh test runs it.

Usage: cluster_test.py --image=REPOSITORY:TAG [--bin=DIR] [--ghz=PROGRAM] [--ghz_image=IMAGE]
                       [--containerd=SOCKET] [--etcd=HOST:PORT] [--mutual] [--keep]
                       [--checks=NAME,…]
The cluster is KUBECONFIG's. --bin has ckv and clusterkv-server (default: build/release/bin).
--ghz_image: of ghz alone, to run it in a pod; without it that check is left out.
--containerd: the node's, to kill a server as the kernel would; without it that check is left out.
--etcd: one that pods and this machine reach in plain text; without it that check is left out.
Where there is no ghz or prometheus their checks are left out, and told. --keep: no uninstall.
--mutual: the same with mutual TLS and tenants (ci/mtls-values.yaml), with certificates of its own.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import chart_test
import local_prometheus

ROOT = chart_test.ROOT
NAMESPACE, RELEASE = "clusterkv-test", "test"
NAME = f"{RELEASE}-clusterkv"
LABEL = f"app.kubernetes.io/instance={RELEASE}"
TRACES = [ROOT / "tests/data/moby_dick_8k.layer3.safetensors",
          ROOT / "tests/data/moby_dick_8k.layer6.safetensors"]
DIGESTS = ("index_digest", "selection_digest", "state_digest", "recalled_digest")
# What the Prometheus operator would bring; its own schemas are not checked here.
CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: PLURAL.monitoring.coreos.com}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {plural: PLURAL, singular: SINGULAR, kind: KIND}
  versions:
    - name: v1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"""


class Failure(Exception):
    """A check did not hold; its message says how."""


def expect(condition, message):
    if not condition:
        raise Failure(message)


def run(*command, stdin=None, check=True, timeout=600):
    result = subprocess.run([str(word) for word in command], input=stdin, capture_output=True,
                            text=True, timeout=timeout, check=False)
    if check and result.returncode != 0:
        raise Failure(f"{' '.join(map(str, command[:4]))} … exited {result.returncode}: "
                      f"{(result.stderr or result.stdout).strip()[-1500:]}")
    return result.stdout if check else result


def kubectl(*arguments, **options):
    return run("kubectl", "-n", NAMESPACE, *arguments, **options)


def wait_until(what, condition, seconds=60):
    limit = time.monotonic() + seconds
    while not (value := condition()):
        expect(time.monotonic() < limit, f"{what}: not within {seconds} s")
        time.sleep(0.3)
    return value


def server_pods():
    pods = json.loads(kubectl("get", "pods", "-o", "json", "-l",
                              LABEL + ",app.kubernetes.io/component=shard"))["items"]
    return {pod["metadata"]["name"]: pod for pod in pods}


def is_ready(pod):
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def all_ready(shards):
    pods = server_pods()
    return len(pods) == shards and all(map(is_ready, pods.values()))


def shard_address(shard, port=7400):
    return f"{NAME}-{shard}.{NAME}-peers.{NAMESPACE}.svc.cluster.local:{port}"


def service_address(suffix=""):
    return f"{NAME}{suffix}.{NAMESPACE}.svc.cluster.local:7400"


class Certificates:
    """An authority of our own, the shards' certificate, and those of clients, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.sign("ca", "test authority", "basicConstraints=critical,CA:TRUE", own=True)
        domain = f"{NAMESPACE}.svc.cluster.local"
        names = [f"{NAME}.{domain}", f"{NAME}-headless.{domain}", f"*.{NAME}-peers.{domain}",
                 "localhost"]
        self.sign("shards", "shards", "subjectAltName=" + ",".join(f"DNS:{n}" for n in names))
        self.sign("operator", "operator", "extendedKeyUsage=clientAuth")
        self.sign("blue", "blue-decode", "extendedKeyUsage=clientAuth")
        self.sign("nobody", "nobody", "extendedKeyUsage=clientAuth")

    def path(self, name, kind="crt"):
        return self.folder / f"{name}.{kind}"

    def sign(self, name, common_name, extension, own=False):
        authority = [] if own else ["-CA", self.path("ca"), "-CAkey", self.path("ca", "key")]
        run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", f"/CN={common_name}", "-addext", extension,
            "-keyout", self.path(name, "key"), "-out", self.path(name), *authority)

    def make_secret(self, secret, name):
        rendered = run("kubectl", "create", "secret", "generic", secret, "--dry-run=client", "-o",
                       "yaml", f"--from-file=tls.crt={self.path(name)}",
                       f"--from-file=tls.key={self.path(name, 'key')}",
                       f"--from-file=ca.crt={self.path('ca')}")
        kubectl("apply", "-f", "-", stdin=rendered)

    def ckv(self, name="operator"):
        return [f"--tls_ca={self.path('ca')}", f"--tls_cert={self.path(name)}",
                f"--tls_key={self.path(name, 'key')}"]

    def ghz(self):
        return [f"--cacert={self.path('ca')}", f"--cert={self.path('operator')}",
                f"--key={self.path('operator', 'key')}"]


class Cluster:
    """The checks, in order; each returns what it saw."""

    def __init__(self, options):
        self.options = options
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="clusterkv-cluster-test-"))
        repository, _, tag = options.image.rpartition(":")
        self.values = self.folder / "values.json"
        self.values.write_text(json.dumps({
            "image": {"repository": repository, "tag": tag},
            "server": {"arenaBytes": "256MiB"},
            "resources": {"requests": {"cpu": "50m", "memory": "600Mi"},
                          "limits": {"memory": "600Mi"}}}))
        self.value_files = ["-f", self.values]
        self.settings = {}
        self.certificates = None
        if options.mutual:
            self.certificates = Certificates(self.folder)
            self.value_files = ["-f", chart_test.CHART / "ci/mtls-values.yaml", "-f", self.values]

    def ckv(self, command, *arguments, identity="operator", **options):
        tls = self.certificates.ckv(identity) if self.certificates else []
        return run(self.options.bin / "ckv", command, *tls, *arguments, **options)

    def ghz_tls(self):
        return self.certificates.ghz() if self.certificates else ["--insecure"]

    def helm(self, verb, *arguments, **options):
        return run(chart_test.HELM, verb, "-n", NAMESPACE, RELEASE, *arguments, **options)

    def upgrade(self, **settings):
        """With these settings and those of the upgrades before."""
        self.settings |= settings
        self.helm("upgrade", chart_test.CHART, *self.value_files, "--wait", "--timeout=300s",
                  *[f"--set={name.replace('__', '.')}={value}"
                    for name, value in self.settings.items()])

    def ghz(self, address, *arguments):
        """Runs ghz's call of SelectClusters; its report."""
        out = run(self.options.ghz, *self.ghz_tls(), "-O", "json",
                  "--call=clusterkv.v1.CacheService/SelectClusters", "-D",
                  self.folder / "select.json", *arguments, address)
        return json.loads(out)

    @contextlib.contextmanager
    def ghz_load(self, address, seconds, call="SelectClusters", rps=50):
        """ghz in the background while the body runs; yields a list that gets the report."""
        data = "{}" if call == "GetServerInfo" else (self.folder / "select.json").read_text()
        reports, out = [], self.folder / f"load-{time.monotonic()}.json"
        process = subprocess.Popen(
            [self.options.ghz, *self.ghz_tls(), "-O", "json", "-o", out, "-c", "4",
             "--connections=2", f"--rps={rps}", f"--duration={seconds}s", "--duration-stop=wait",
             "--count-errors", f"--call=clusterkv.v1.CacheService/{call}", "-d", data, address],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(1)
            yield reports
            process.wait(timeout=seconds + 60)
            reports.append(json.loads(out.read_text()))
        finally:
            process.kill()
            process.wait()

    # Checks.

    def manifests(self):
        """The API server takes everything that every ci file renders"""
        self.helm("uninstall", "--ignore-not-found", "--wait")  # of a run that was cut off
        run("kubectl", "create", "namespace", NAMESPACE, check=False)
        for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule"):
            plural = kind.lower() + "s"
            if run("kubectl", "get", "crd", f"{plural}.monitoring.coreos.com",
                   check=False).returncode != 0:
                run("kubectl", "apply", "-f", "-", stdin=CRD.replace("PLURAL", plural)
                    .replace("SINGULAR", kind.lower()).replace("KIND", kind))
                run("kubectl", "wait", "--for=condition=Established", "--timeout=30s",
                    f"crd/{plural}.monitoring.coreos.com")
        count = 0
        files = sorted((chart_test.CHART / "ci").glob("*-values.yaml"))
        for ci in files:
            # Without the test's pod: a pod is taken only where its service account is.
            rendered = run(chart_test.HELM, "template", "probe", chart_test.CHART, "-n", NAMESPACE,
                           "--no-hooks", f"--kube-version={chart_test.KUBE_VERSION}",
                           f"--values={ci}")
            taken = kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-",
                            stdin=rendered)
            count += taken.count("(server dry run)")
        return f"{len(files)} files, {count} objects"

    def install(self):
        """helm install: three shards become ready"""
        if self.certificates:
            self.certificates.make_secret("clusterkv-shards", "shards")
            self.certificates.make_secret("clusterkv-operator", "operator")
        begin = time.monotonic()
        notes = self.helm("install", chart_test.CHART, *self.value_files, "--wait",
                          "--timeout=300s")
        expect(all_ready(3), f"pods: {list(server_pods())}")
        expect("--cacert ca.crt" in notes if self.certificates else "ghz --insecure" in notes,
               "the notes have no ghz line")
        return f"{time.monotonic() - begin:.1f} s"

    def names(self):
        """Every shard and every service resolves"""
        ready = {row[4][0] for row in socket.getaddrinfo(
            service_address("-headless").split(":")[0], 7400, socket.AF_INET)}
        expect(len(ready) == 3, f"headless: {ready}")
        shards = [socket.gethostbyname(shard_address(i).split(":")[0]) for i in range(3)]
        expect(set(shards) == ready, f"{shards} are not {ready}")
        return ", ".join(shards)

    def helm_test(self):
        """helm test: ckv selftest on every shard, from a pod"""
        begin = time.monotonic()
        self.helm("test", "--timeout=300s")
        return f"{time.monotonic() - begin:.1f} s"

    def image(self):
        """The image runs its programs and has no shell; the pod has no token"""
        inside = ["exec", f"{NAME}-0", "--"]
        version = kubectl(*inside, "/usr/bin/clusterkv-server", "--version").split("\n")[0]
        for shell in ("/bin/sh", "/usr/bin/sh", "/bin/bash", "/bin/busybox"):
            expect(kubectl(*inside, shell, "-c", "true", check=False).returncode != 0,
                   f"the image has {shell}")
        pod = server_pods()[f"{NAME}-0"]
        mounts = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        wanted = ["/etc/clusterkv", "/etc/clusterkv-shards"] + (
            ["/etc/clusterkv-tls"] if self.certificates else [])
        expect(mounts == wanted, f"mounted: {mounts}")
        return version

    def seed(self):
        """ckv seed and status from outside the pods"""
        for shard in range(3):
            query = self.ckv("seed", f"--server={shard_address(shard)}", "--prefix=demo",
                        "--replace", "--print_query")
        (self.folder / "select.json").write_text(query)
        status = self.ckv("status", f"--server={shard_address(0)}",
                     f"--admin={shard_address(0, 7401)}")
        expect("serving" in status, status)
        return "3 shards"

    def ghz_everywhere(self):
        """ghz reaches every shard, the ClusterIP, and all of them round robin"""
        p99 = []
        for address in [shard_address(i) for i in range(3)] + [service_address()]:
            report = self.ghz(address, "-n", "500", "-c", "4")
            expect(report["statusCodeDistribution"] == {"OK": 500}, f"{address}: "
                   f"{report['statusCodeDistribution']} {report['errorDistribution']}")
            p99.append(next(r["latency"] for r in report["latencyDistribution"]
                            if r["percentage"] == 99) / 1e6)
        report = self.ghz("dns:///" + service_address("-headless"), "-n", "900", "-c", "4",
                          "--lb-strategy=round_robin")
        expect(report["statusCodeDistribution"] == {"OK": 900}, report["statusCodeDistribution"])
        metrics = [self.metric(i, "clusterkv_selects_total") for i in range(3)]
        expect(min(metrics) >= 800, f"not every shard was asked: {metrics}")
        return f"p99 {', '.join(f'{value:.1f}' for value in p99)} ms, selects {metrics}"

    def ghz_pod(self):
        """ghz from a pod, through the ClusterIP"""
        flags, volumes, mounts = ["--insecure"], [], []
        if self.certificates:
            flags = ["--cacert=/tls/ca.crt", "--cert=/tls/tls.crt", "--key=/tls/tls.key"]
            volumes = [{"name": "tls", "secret": {"secretName": "clusterkv-operator"}}]
            mounts = [{"name": "tls", "mountPath": "/tls"}]
        query = (self.folder / "select.json").read_text()
        pod = {"apiVersion": "v1", "kind": "Pod",
               "metadata": {"name": "ghz", "labels": {"clusterkv-role": "client"}},
               "spec": {"restartPolicy": "Never", "volumes": volumes, "containers": [{
                   "name": "ghz", "image": self.options.ghz_image, "imagePullPolicy": "Never",
                   "volumeMounts": mounts,
                   "args": [*flags, "-O", "json", "-n", "500", "-c", "4", "-d", query,
                            "--call=clusterkv.v1.CacheService/SelectClusters",
                            service_address()]}]}}
        kubectl("delete", "pod", "ghz", "--ignore-not-found", "--wait")
        kubectl("apply", "-f", "-", stdin=json.dumps(pod))
        wait_until("ghz in a pod", lambda: kubectl(
            "get", "pod", "ghz", "-o", "jsonpath={.status.phase}") in ("Succeeded", "Failed"), 120)
        report = json.loads(kubectl("logs", "ghz"))
        kubectl("delete", "pod", "ghz", "--wait")
        expect(report["statusCodeDistribution"] == {"OK": 500}, report["errorDistribution"])
        return "500 calls OK"

    def metric(self, shard, name):
        url = f"http://{shard_address(shard, 7402)}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        expect(found, f"{url} has no {name}")
        return float(found[1])

    def replay_json(self, where, tls):
        out = self.folder / "replay.json"
        run(self.options.bin / "ckv", "replay", *tls, where, "--preset=default", "--budget=64",
            f"--json={out}", *TRACES)
        return json.loads(out.read_text())["layers"]

    def replay(self):
        """ckv replay through the headless service: the same bits as from a server here"""
        remote = self.replay_json("--servers=" + service_address("-headless"),
                                  self.certificates.ckv() if self.certificates else [])
        local = subprocess.Popen(
            [self.options.bin / "clusterkv-server", "--listen=127.0.0.1:17400",
             "--admin_listen=127.0.0.1:17401", "--arena_bytes=256MiB"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            here = self.replay_json("--server=127.0.0.1:17400", [])
        finally:
            local.terminate()
            local.wait(timeout=60)
        for mine, other in zip(remote, here, strict=True):
            expect(all(mine[key] == other[key] for key in DIGESTS), f"{mine} is not {other}")
        return "error " + ", ".join(f"{layer['output_error']:.4f}" for layer in remote)

    def shards(self):
        """Sequences lie on the shards that own their names, and another shard says who"""
        where = "--servers=" + service_address("-headless")
        self.ckv("seed", where, "--prefix=placed", "--sequences=9", "--tokens=256", "--replace")
        held = [json.loads(self.ckv("sequences", f"--server={shard_address(i)}", "--json=-",
                                    "--prefix=placed"))["sequences"] for i in range(3)]
        counts = [len(shard) for shard in held]
        expect(sum(counts) == 9 and max(counts) < 9, f"sequences by shard: {counts}")
        everywhere = json.loads(self.ckv("sequences", where, "--json=-", "--prefix=placed"))
        expect(len(everywhere["sequences"]) == 9, everywhere)
        name = next(shard for shard in held if shard)[0]["name"]
        owner = next(i for i, shard in enumerate(held) if name in {s["name"] for s in shard})
        refused = self.ckv("inspect", f"--server={shard_address((owner + 1) % 3)}",
                           f"--sequence={name}", check=False)
        expect(refused.returncode != 0 and "NOT_OWNER" in refused.stderr
               and f"{NAME}-{owner}" in refused.stderr, refused.stderr)
        return f"{counts}; {refused.stderr.strip().splitlines()[0]}"

    def tenants(self):
        """With certificates: none or an unknown one is refused, and a tenant sees its own alone"""
        address = shard_address(0)
        plain = run(self.options.bin / "ckv", "status", f"--server={address}", check=False)
        expect(plain.returncode != 0, "plain text was answered")
        nobody = self.ckv("status", f"--server={address}", identity="nobody", check=False)
        expect("identity: expected" in nobody.stderr, nobody.stderr)
        self.ckv("seed", f"--server={address}", "--prefix=operators", "--tokens=256", "--replace")
        self.ckv("seed", f"--server={address}", "--prefix=blues", "--tokens=256", "--replace",
                 identity="blue")
        seen = {identity: self.ckv("sequences", f"--server={address}", identity=identity)
                for identity in ("operator", "blue")}
        expect("operators-0" in seen["operator"] and "blues-0" not in seen["operator"]
               and "blues-0" in seen["blue"] and "operators-0" not in seen["blue"], seen)
        admin = self.ckv("status", f"--server={address}", f"--admin={shard_address(0, 7401)}",
                         identity="blue", check=False)
        expect(admin.returncode != 0 and "identity: expected" in admin.stderr, admin.stderr)
        return "no certificate, nobody's, blue's on the admin port: refused"

    def kill(self):
        """A server killed under load: the others do not notice, it comes back, errors are typed"""
        ctr = ["ctr", "-a", self.options.containerd, "-n", "k8s.io"]
        pod = server_pods()[f"{NAME}-1"]
        container = pod["status"]["containerStatuses"][0]["containerID"].split("//")[1]
        with self.ghz_load(shard_address(1), 15) as victim, \
                self.ghz_load(shard_address(0), 15) as other:
            run(*ctr, "tasks", "kill", "-s", "KILL", container)
            begin = time.monotonic()
            wait_until("a restart", lambda: server_pods()[f"{NAME}-1"]["status"][
                "containerStatuses"][0]["restartCount"] > 0 and all_ready(3))
            back = time.monotonic() - begin
            self.ckv("seed", f"--server={shard_address(1)}", "--prefix=demo", "--replace")
        codes = other[0]["statusCodeDistribution"]
        expect(set(codes) == {"OK"}, f"shard 0 had {codes}")
        codes = victim[0]["statusCodeDistribution"]
        # Gone, not there yet, being filled again: nothing else.
        typed = {"OK", "Unavailable", "NotFound", "FailedPrecondition"}
        expect(set(codes) <= typed and codes.get("OK", 0) > 0, f"shard 1 had {codes}")
        return f"ready again after {back:.1f} s; the victim's calls: {codes}"

    def restart(self):
        """helm upgrade under load: every shard drains, and whoever asks again is answered"""
        logs = [subprocess.Popen(["kubectl", "-n", NAMESPACE, "logs", "-f", f"{NAME}-{i}"],
                                 stdout=subprocess.PIPE, text=True) for i in range(3)]
        begin = time.monotonic()
        with self.ghz_load("dns:///" + service_address("-headless"), 45, "GetServerInfo") as load:
            self.upgrade(server__spinUs=5)
            took = time.monotonic() - begin
        for log in logs:
            text = log.communicate(timeout=60)[0]
            expect('"message":"draining"' in text and '"drained":true' in text,
                   f"a shard did not drain: {text[-500:]}")
        codes = load[0]["statusCodeDistribution"]
        failed = sum(codes.values()) - codes.get("OK", 0)
        # ghz does not retry, as a client would: a call that comes in the moment of the shutdown is
        # cancelled, one that comes just after it finds nobody.
        expect(set(codes) <= {"OK", "Unavailable", "Canceled"}, codes)
        expect(failed <= 0.01 * sum(codes.values()), codes)
        expect(all_ready(3), "not all are ready")
        return f"{took:.1f} s; calls without any retry: {codes}"

    def scale(self):
        """Three shards become five, then two; none of the three restarts for it"""
        where = "--servers=" + service_address("-headless")
        self.ckv("seed", where, "--prefix=before", "--sequences=6", "--tokens=256", "--replace")
        starts = {name: pod["status"]["startTime"] for name, pod in server_pods().items()}
        for shards in (5, 2):
            if shards == 2:
                drained = self.scale_in(shards)
            else:
                self.upgrade(shards=shards)
                wait_until(f"{shards} shards", lambda n=shards: all_ready(n), 120)
            self.helm("test", "--timeout=300s")
            now = {name: pod["status"]["startTime"] for name, pod in server_pods().items()}
            expect(all(starts[name] == now[name] for name in now.keys() & starts.keys()),
                   f"restarted: {starts}, {now}")
            if shards == 5:
                listed = len(self.listed(where, "before"))
                expect(listed == 6, f"{listed} of 6 sequences are left")
                begin = time.monotonic()  # until the kubelet brings the list to the old pods
                grown = wait_until("sequences on the new shards", lambda: self.grown(where), 180)
                took = time.monotonic() - begin
        return (f"helm test passed with each; after {took:.0f} s 20 new sequences lay on five "
                f"shards as {grown}; {drained}")

    def scale_in(self, shards):
        """Fewer shards, a decode worker attached to the last one: it is served until it leaves."""
        last, address = f"{NAME}-4", shard_address(4)
        self.ckv("seed", f"--server={address}", "--prefix=held", "--tokens=256", "--replace")
        report = self.folder / "worker.json"
        tls = self.certificates.ckv() if self.certificates else []
        worker = subprocess.Popen(
            [self.options.bin / "ckv", "bench", *tls, f"--server={address}", "--sequences=held-0",
             "--method=select_and_recall", "--concurrency=1", "--rps=20", "--duration=25s",
             f"--json={report}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            time.sleep(2)  # it is attached
            self.upgrade(shards=shards)
            wait_until("new work refused", lambda: self.refuses_new(address), 20)
            expect("deletionTimestamp" in server_pods()[last]["metadata"], "it is not ending")
            read = self.ckv("inspect", f"--server={address}", "--sequence=held-0")
            expect("held-0" in read, read)
            expect(worker.poll() is None, "the worker ended before it was looked at")
            told = worker.communicate(timeout=60)[0]
        finally:
            worker.kill()
            worker.wait()
        expect(worker.returncode == 0, f"the attached worker: {told[-800:]}")
        codes = json.loads(report.read_text())["statusCodeDistribution"]
        wait_until(f"{shards} shards", lambda: all_ready(shards), 120)
        return f"a worker of the draining shard: {codes}"

    def refuses_new(self, address):
        refused = self.ckv("seed", f"--server={address}", "--prefix=new", "--tokens=64",
                           "--replace", check=False)
        return refused.returncode != 0 and "draining" in refused.stderr

    def grown(self, where):
        """How 20 new sequences lie on five shards, or nothing while the last two have none."""
        self.ckv("seed", where, "--prefix=after", "--sequences=20", "--tokens=256", "--replace")
        counts = [len(self.listed(f"--server={shard_address(i)}", "after")) for i in range(5)]
        expect(sum(counts) == 20, f"of 20 sequences: {counts}")
        return counts if min(counts[3:]) > 0 else None

    def listed(self, where, prefix):
        return json.loads(self.ckv("sequences", where, "--json=-", f"--prefix={prefix}"))[
            "sequences"]

    def etcd(self):
        """With etcd the shards find each other there: kubectl scale is enough"""
        def names():
            status = json.loads(self.ckv("status", f"--server={shard_address(0)}", "--json=-"))
            return [shard["name"] for shard in status["shards"]]

        wanted = [f"{NAME}-{i}" for i in range(5)]
        directory = f"--servers=etcd://{self.options.etcd}/clusterkv/{NAMESPACE}/{NAME}"
        self.upgrade(shards=3, etcd__endpoints="{" + self.options.etcd + "}")
        wait_until("three shards", lambda: all_ready(3) and names() == wanted[:3], 120)
        self.ckv("seed", directory, "--prefix=entered", "--sequences=9", "--tokens=256",
                 "--replace")
        kubectl("scale", f"statefulset/{NAME}", "--replicas=5")
        wait_until("five shards", lambda: all_ready(5), 120)
        begin = time.monotonic()
        wait_until("five in the list", lambda: names() == wanted)
        took = time.monotonic() - begin
        counts = self.grown("--servers=" + service_address("-headless"))
        expect(counts, "no new sequence lies on the new shards")
        listed = len(self.listed(directory, "entered"))
        expect(listed == 9, f"{listed} of 9 sequences are left")
        self.helm("test", "--timeout=300s")
        kubectl("scale", f"statefulset/{NAME}", "--replicas=2")
        wait_until("two in the list", lambda: names() == wanted[:2], 120)
        wait_until("two shards", lambda: all_ready(2), 120)
        return f"in the list {took:.1f} s after five were ready; 20 new sequences: {counts}"

    def prometheus(self):
        """A real Prometheus: every panel has data, an alert fires on purpose"""
        shards = len(server_pods())
        rendered = chart_test.Rendered(alerts__enabled=True, dashboards__enabled=True,
                                       alerts__selectP99Seconds=1e-9, shards=shards,
                                       fullnameOverride=NAME)
        targets = {f"{NAME}-{shard}": shard_address(shard, 7402) for shard in range(shards)}
        with local_prometheus.Prometheus(self.folder, rendered, NAMESPACE, targets) as prometheus:
            wait_until("targets", lambda: prometheus.query(
                "count(clusterkv_uptime_seconds)") == [float(shards)])
            for shard in range(shards):
                self.ckv("seed", f"--server={shard_address(shard)}", "--prefix=demo",
                    "--replace")
            self.make_all_series(shards)
            time.sleep(3)  # counters that are new need two scrapes to have a rate
            self.make_all_series(shards)
            time.sleep(2)
            # No link but gRPC is there; tenants, where there are some, may not all call.
            panels, empty = prometheus.check_panels("link_(fallbacks|failovers|bytes)|tenant_")
            expect(not empty, f"panels without data: {empty}")
            wait_until("the alert", lambda: "ClusterKVSelectSlow" in prometheus.firing())
            others = prometheus.firing() - {"ClusterKVSelectSlow"}
            return f"{panels} expressions; also firing: {sorted(others) or 'none'}"

    def make_all_series(self, shards):
        for shard in range(shards):
            address = shard_address(shard)
            self.ghz(address, "-n", "200", "-c", "4")
            self.ckv("bench", f"--server={address}", "--method=select_and_recall",
                "--sequences=demo*", "--concurrency=2", "--duration=1s")
            self.ckv("selftest", f"--server={address}")  # with errors, on purpose

    def uninstall(self):
        """helm uninstall leaves nothing behind"""
        self.helm("uninstall", "--wait", "--timeout=180s")
        kinds = "all,configmap,serviceaccount,pdb,networkpolicy,endpointslice,secret,pvc"
        wait_until("everything gone", lambda: not json.loads(
            kubectl("get", kinds, "-l", LABEL, "-o", "json"))["items"], 90)
        if self.certificates:
            kubectl("delete", "secret", "clusterkv-shards", "clusterkv-operator")
        left = kubectl("get", kinds, "-o", "name").split()
        expect(set(left) <= {"configmap/kube-root-ca.crt", "serviceaccount/default"}, left)
        run("kubectl", "delete", "namespace", NAMESPACE, "--timeout=60s")
        return "nothing is left"


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--image", required=True)
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/release/bin")
    parser.add_argument("--ghz", default=os.environ.get("GHZ") or shutil.which("ghz"))
    parser.add_argument("--ghz_image")
    parser.add_argument("--containerd")
    parser.add_argument("--etcd")
    parser.add_argument("--mutual", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--checks", default="", help="only these, comma-separated")
    options = parser.parse_args()
    cluster = Cluster(options)
    without_ghz = {"ghz_everywhere", "kill", "restart", "prometheus"} if not options.ghz else set()
    without_ghz |= set() if options.ghz and options.ghz_image else {"ghz_pod"}
    left_out = set(without_ghz)
    for name, there in (("tenants", options.mutual), ("kill", options.containerd),
                        ("etcd", options.etcd),
                        ("prometheus", shutil.which("prometheus")),
                        ("uninstall", not options.keep)):
        if not there:
            left_out.add(name)
    failed = 0
    for name in ("manifests", "install", "names", "helm_test", "image", "seed", "ghz_everywhere",
                 "ghz_pod", "replay", "shards", "tenants", "kill", "restart", "scale",
                 "etcd", "prometheus", "uninstall"):
        if options.checks and name not in options.checks.split(","):
            continue
        check = getattr(cluster, name)
        title = check.__doc__
        if name in left_out:
            print(f"SKIPPED  {title}", flush=True)
            continue
        begin = time.monotonic()
        try:
            print(f"PASS  {title}: {check()} ({time.monotonic() - begin:.0f} s)", flush=True)
        except (Failure, OSError, subprocess.TimeoutExpired) as failure:
            failed += 1
            print(f"FAIL  {title}: {failure}", flush=True)
            if name in ("manifests", "install"):
                break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
