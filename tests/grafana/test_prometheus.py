"""Debian's Prometheus reads a node, and every panel of every dashboard finds its data there."""

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.grafana.node import busy_node
from tests.grafana.test_dashboards import DASHBOARDS, expressions

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus is not installed (apt-get install prometheus)",
)


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus of our own configuration's form, with another target and in a greater hurry."""
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "1s"},
                "rule_files": [str(ROOT / "grafana/alerts.yml")],
                "scrape_configs": [{"job_name": "joulegate", "static_configs": [{"targets": [target]}]}],
            }
        )
    )
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{_address(server, folder / 'log')}/api/v1", timeout=10) as client:
            yield client
    finally:
        server.terminate()
        server.wait(20)


def _address(server: "subprocess.Popen[bytes]", log: Path) -> str:
    """The port is the system's choice: the log says which."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r'msg="Listening on" address=(\S+)', log.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"prometheus did not start:\n{log.read_text()}")


def has_data(client: httpx.Client, expression: str) -> bool:
    """Whether an expression, with its variables as Grafana fills them in, gives at least one number."""
    filled = expression.replace("$__rate_interval", "3s")
    filled = re.sub(r"\$(instance|model|device)", ".*", filled)
    answer = client.get("/query", params={"query": filled})
    assert answer.status_code == 200, f"{filled}\n{answer.text}"
    return any(not math.isnan(float(series["value"][1])) for series in answer.json()["data"]["result"])


def empty(client: httpx.Client, wanted: set[str]) -> set[str]:
    """The expressions that still had no data when time was up."""
    deadline = time.monotonic() + DEADLINE
    missing = set(wanted)
    while missing and time.monotonic() < deadline:
        missing = {expression for expression in missing if not has_data(client, expression)}
        if missing:
            time.sleep(0.25)
    return missing


def test_every_panel_finds_its_data(tmp_path: Path) -> None:
    wanted = {expression for path in DASHBOARDS for expression in expressions(path)}
    with busy_node(tmp_path) as node, prometheus(node, tmp_path) as client:
        assert empty(client, wanted) == set()
        alerts = client.get("/alerts").json()["data"]["alerts"]
    assert [alert["labels"]["alertname"] for alert in alerts] == []


def test_the_rules_and_the_configuration_are_sound() -> None:
    for check in (["rules", "grafana/alerts.yml"], ["config", "grafana/prometheus.yml"]):
        done = subprocess.run(["promtool", "check", *check], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_on_its_trouble_and_none_without() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", "tests/grafana/alerts_test.yml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
