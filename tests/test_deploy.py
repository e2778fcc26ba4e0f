"""The files under deploy/: what they name exists in the server, and the tools of their makers take them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from flashsloth.serve.app import create_app
from flashsloth.serve.engine import EngineStatistics
from flashsloth.serve.settings import Settings
from flashsloth_cli.commands import serve as serve_command
from flashsloth_cli.main import main

DEPLOY = Path(__file__).parents[1] / "deploy"
METRIC = re.compile(r"\bflashsloth_[a-z_]+")
OF_PROMETHEUS = re.compile(r"_(bucket|count|sum|total)$")


class Idle:
    """An engine that is asked for its numbers only."""

    is_accepting = True

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(*(0 for _ in fields(EngineStatistics)))


def client() -> TestClient:
    return TestClient(create_app(Idle(), Settings()))  # type: ignore[arg-type]


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "flashsloth.json").read_text())


def expressions() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]
    return [rule["expr"] for rule in rules] + [
        target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]
    ]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def pod() -> dict[str, Any]:
    return documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]


def commands() -> dict[str, list[str]]:
    """The words behind `flashsloth serve` in each file."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    unit = (DEPLOY / "flashsloth.service").read_text()
    started = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1])
    assert started[1] == "serve"
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)[1]) == ["flashsloth", "serve"]
    return {
        "Dockerfile": json.loads(re.search(r"^CMD (.*)$", dockerfile, re.MULTILINE)[1]),
        "compose": documents("compose.yaml")[0]["services"]["flashsloth"]["command"],
        "systemd": started[2:],
        "kubernetes": pod()["containers"][0]["args"],
    }


def test_every_metric_of_the_dashboard_and_the_alerts_is_told() -> None:
    with client() as asked:
        told = set(re.findall(r"^# TYPE (\S+)", asked.get("/metrics").text, re.MULTILINE))
    names = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(names) > 10
    unknown = {name for name in names if not {name, OF_PROMETHEUS.sub("", name)} & told}
    assert unknown == set()


def test_the_labels_of_the_dashboard_are_those_of_the_metrics() -> None:
    with client() as asked:
        asked.get("/v1/models")
        lines = asked.get("/metrics").text
    assert 'flashsloth_requests_total{path="/v1/models",status="200"} 1.0' in lines
    used = {name for expression in expressions() for name in re.findall(r"by \(([a-z, ]*)\)", expression)}
    labels = {label.strip() for names in used for label in names.split(",")} - {""}
    assert labels == {"instance", "status", "le", "kind", "stage"}


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("place", ["Dockerfile", "compose", "systemd", "kubernetes"])
def test_the_commands_are_taken(place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """They come as far as the address, which none of them can have here."""
    asked: list[tuple[str, int]] = []

    def refuse(host: str, port: int) -> None:
        asked.append((host, port))
        raise OSError("not here")

    monkeypatch.setattr(serve_command, "listen", refuse)
    assert main(["serve", *commands()[place]]) == 2
    assert "not here" in capsys.readouterr().err
    assert asked == [("127.0.0.1" if place == "systemd" else "0.0.0.0", 8000)]


def test_the_probes_are_answered() -> None:
    container = pod()["containers"][0]
    with client() as asked:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert asked.get(container[probe]["httpGet"]["path"]).status_code == 200
        annotations = documents("kubernetes.yaml")[0]["spec"]["template"]["metadata"]["annotations"]
        assert asked.get(annotations["prometheus.io/path"]).status_code == 200
    assert container["ports"][0]["containerPort"] == 8000
    check = json.loads(
        re.search(r"^HEALTHCHECK .*\\\n\s+CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)[1]
    )
    assert "http://127.0.0.1:8000/ready" in check[-1]
    compile(check[-1], "healthcheck", "exec")


def test_servers_are_stopped_only_when_they_have_drained() -> None:
    drains = {
        place: float(words[words.index("--drain-seconds") + 1])
        for place, words in commands().items()
        if place != "Dockerfile"
    }
    waited = {
        "compose": float(
            documents("compose.yaml")[0]["services"]["flashsloth"]["stop_grace_period"].removesuffix("s")
        ),
        "systemd": float(
            re.search(r"^TimeoutStopSec=(\d+)$", (DEPLOY / "flashsloth.service").read_text(), re.MULTILINE)[1]
        ),
        "kubernetes": pod()["terminationGracePeriodSeconds"] - 5.0,  # preStop
    }
    for place, seconds in drains.items():
        assert waited[place] >= seconds + 10


def test_files_that_are_named_are_there() -> None:
    services = documents("compose.yaml")[0]["services"]
    build = services["flashsloth"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    mounts = [mount.split(":")[0] for service in services.values() for mount in service.get("volumes", ())]
    for mount in mounts:
        assert (
            (DEPLOY / mount).is_file() if mount.startswith(".") else mount in documents("compose.yaml")[0]["volumes"]
        )
    assert (DEPLOY / documents("prometheus.yaml")[0]["rule_files"][0]).is_file()
    (source,) = documents("grafana/datasource.yaml")[0]["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard()["panels"]} == {source["uid"]}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert all((DEPLOY.parent / name).exists() for line in copied for name in line.split())


def test_kubernetes_takes_the_manifest() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in documents("kubernetes.yaml"):
        validate(document, "1.31", strict=True)


def tool(name: str) -> str:
    """A program that many machines lack."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_hadolint_has_nothing_to_say() -> None:
    done = run(tool("hadolint"), str(DEPLOY / "Dockerfile"))
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_takes_its_file() -> None:
    done = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml"))
    assert done.returncode == 0, done.stdout


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    verify = tool("systemd-analyze")
    unit = tmp_path / "flashsloth.service"
    text = (DEPLOY / "flashsloth.service").read_text()
    unit.write_text(text.replace("/opt/flashsloth/bin/flashsloth", "/bin/true"))
    done = run(verify, "verify", "--man=no", str(unit))
    assert (done.returncode, [line for line in done.stderr.splitlines() if "flashsloth.service" in line]) == (0, [])


def test_prometheus_takes_its_files_and_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    promtool = tool("promtool")
    assert run(promtool, "check", "config", str(DEPLOY / "prometheus.yaml")).returncode == 0
    rules = [
        {"record": f"panel:{index}", "expr": expression.replace("$__rate_interval", "1m")}
        for index, expression in enumerate(expressions())
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = run(promtool, "check", "rules", str(tmp_path / "rules.yaml"))
    assert done.returncode == 0, done.stderr
