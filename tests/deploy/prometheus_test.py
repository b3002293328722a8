#!/usr/bin/env python3
"""A real Prometheus scrapes a loaded server: every panel of the dashboard has data, every alert's
expression is evaluated, and one fires on purpose.

Usage: prometheus_test.py SERVER CKV. Ends with 77 where there is no prometheus or no helm.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import chart_test
import local_prometheus
from ports import free_port

NAMESPACE, POD = "kv", "test-clusterkv-0"


def load(ckv, data):
    def run(*words):
        subprocess.run([ckv, *words], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, timeout=120)

    server = f"--server=127.0.0.1:{data}"
    run("seed", server, "--prefix=demo", "--replace")
    run("bench", server, "--sequences=demo*", "--method=select_and_recall", "--concurrency=2",
        "--duration=1s")
    run("bench", server, "--sequences=demo*", "--concurrency=2", "--duration=1s")
    run("selftest", server)  # with errors, on purpose


def wait_until(what, condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"{what}: not within {seconds} s"
        time.sleep(0.3)


def check(ckv, folder, data, metrics):
    rendered = chart_test.Rendered(alerts__enabled=True, dashboards__enabled=True, shards=1,
                                   alerts__selectP99Seconds=1e-9)
    with local_prometheus.Prometheus(folder, rendered, NAMESPACE, {POD: f"127.0.0.1:{metrics}"},
                                     free_port()) as prometheus:
        wait_until("the target", lambda: prometheus.query("clusterkv_uptime_seconds"))
        load(ckv, data)
        time.sleep(3)  # counters that are new need two scrapes to have a rate
        load(ckv, data)
        time.sleep(2)
        panels, empty = prometheus.check_panels("link_(fallbacks|failovers)|tenant_")
        assert not empty, "panels without data: " + "; ".join(empty)
        wait_until("the alert", lambda: "ClusterKVSelectSlow" in prometheus.firing())
        rules = prometheus.get("rules")["groups"][0]["rules"]
        bad = [rule["name"] for rule in rules if rule["health"] != "ok"]
        assert not bad, f"alerts that are not evaluated: {bad}"
        print(f"{panels} expressions of panels have data, {len(rules)} alerts are evaluated; "
              f"firing: {sorted(prometheus.firing())}")


def main():
    if not shutil.which("prometheus") or not chart_test.HELM:
        print("SKIPPED: no prometheus or no helm here")
        return 77
    server, ckv = sys.argv[1:]
    data, admin, metrics = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
            [server, f"--listen=127.0.0.1:{data}", f"--admin_listen=127.0.0.1:{admin}",
             f"--metrics_listen=127.0.0.1:{metrics}", "--arena_bytes=256MiB"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            check(ckv, pathlib.Path(folder), data, metrics)
        finally:
            process.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
