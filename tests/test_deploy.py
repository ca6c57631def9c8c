"""The shipped deployment files fit the server: ports, probes, tokens, deadlines, metric names."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from codeq import Producer, Task, Worker
from codeq.config import load
from codeq.server import app
from codeq.server.http_server import CUT_SECONDS
from tests import shipped
from tests.conftest import ANY_PORT, ROOT, Server, claim, create

#: Metrics of features that are being built, with their labels: shipped files may name them already.
AWAITED: dict[str, set[str]] = {}
#: What Prometheus and the blackbox exporter add
FOREIGN = {"up": set(), "probe_success": set()}
SCRAPE_LABELS = {"job", "instance"}
STOP_SECONDS = (
    app.REST_STOP_SECONDS + CUT_SECONDS + app.STREAMS_STOP_SECONDS + app.STORE_STOP_SECONDS
)


def settings_of(place: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """(arguments of codeq, environment) as a shipped file has them."""
    if place == "compose":
        arguments = json.loads(shipped.instruction("CMD"))
        environ: dict[str, str] = {}
        for name in shipped.compose("codeq")["env_file"]:
            environ.update(shipped.environment(name))
        return arguments, environ
    if place == "systemd":
        name = Path(shipped.unit("EnvironmentFile")).name
        return shlex.split(shipped.unit("ExecStart"))[1:], shipped.environment(name)
    file = folder / "codeq.yaml"
    file.write_text(shipped.kubernetes("ConfigMap")["data"]["codeq.yaml"])
    arguments = shipped.container()["args"]
    assert arguments[-1] == "/etc/codeq/codeq.yaml"
    return [*arguments[:-1], str(file)], dict(shipped.kubernetes("Secret")["stringData"])


PLACES = ["compose", "systemd", "kubernetes"]


@pytest.fixture
def start_shipped(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """A server with the settings of a shipped file; only folder and ports are the test's."""
    running: list[Server] = []

    def start(place: str) -> Server:
        arguments, environ = settings_of(place, tmp_path)
        elsewhere = [
            *("--data", str(tmp_path / "data"), "--http", ANY_PORT),
            *("--producer-stream", ANY_PORT, "--worker-stream", ANY_PORT),
        ]
        environ = {**environ, "LIMITS_DISK_RESERVE_BYTES": "0"}
        running.append(Server(tmp_path, [*arguments, *elsewhere], environ))
        return running[-1]

    yield start
    for one in running:
        one.close()


def tokens_of(place: str, folder: Path) -> tuple[str, str]:
    _, environ = settings_of(place, folder)
    producer, worker = (
        json.loads(environ[f"{role}_AUTH_CONFIG"]) for role in ("PRODUCER", "WORKER")
    )
    return producer["token"], worker["token"]


async def deliver_over_streams(server: Server, producer_token: str, worker_token: str) -> None:
    async with Producer(server.producer, token=producer_token) as producer:
        await producer.produce("greet", {"name": "Ada"})
    worker = Worker(server.worker, token=worker_token, commands=["greet"])

    async def greet(task: Task) -> str:
        worker.stop()
        return f"Hello, {task.json()['name']}!"

    await asyncio.wait_for(worker.run(greet), 30)
    assert worker.counts.finished == 1


@pytest.mark.parametrize("place", PLACES)
def test_T57_the_tokens_of_shipped_files_share_a_tenant_and_deliver_a_task(
    place: str, start_shipped: Callable[[str], Server], tmp_path: Path
) -> None:
    producer_token, worker_token = tokens_of(place, tmp_path)
    server = start_shipped(place)
    producer, worker = server.client(producer_token), server.client(worker_token)
    made = create(producer, "resize")
    got = claim(worker, "resize")
    assert got["id"] == made["id"] and got["tenantId"] == made["tenantId"]
    done = worker.post(f"/tasks/{made['id']}/result", json={"status": "COMPLETED", "result": 1})
    assert done.status_code == 200
    assert producer.get("/admin/queues/resize").json()["inProgress"] == 0
    asyncio.run(deliver_over_streams(server, producer_token, worker_token))
    assert server.terminate() == 0


def test_T56_shipped_settings_ask_for_nothing_that_is_not_there(tmp_path: Path) -> None:
    for place in PLACES:
        arguments, environ = settings_of(place, tmp_path)
        file = arguments[2] if "--config" in arguments else None
        config = load(file, environ)
        assert not config.warnings
        stops, warns = app.unavailable_settings(config)
        assert not stops
        assert all("backupDir" in line for line in warns), warns


def test_shipped_tokens_are_place_holders_and_stay_on_loopback(tmp_path: Path) -> None:
    for place in PLACES:
        assert all(token.startswith("change-me") for token in tokens_of(place, tmp_path))
    for service in ("codeq", "prometheus", "grafana"):
        ports = shipped.compose(service)["ports"]
        assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def probes() -> dict[str, str]:
    """The path each shipped file asks for."""
    ready = shipped.documents("prometheus.yml")[0]["scrape_configs"][1]["static_configs"][0]
    container = shipped.container()
    return {
        "Dockerfile": re.findall(r"8080(/\w+)", shipped.instruction("HEALTHCHECK"))[0],
        "prometheus": ready["targets"][0].partition(":8080")[2],
        **{
            kind: container[f"{kind}Probe"]["httpGet"]["path"]
            for kind in ("startup", "liveness", "readiness")
        },
    }


def test_T58_shipped_files_probe_healthz_and_readyz(server: Server) -> None:
    assert probes() == {
        "Dockerfile": "/healthz",
        "prometheus": "/readyz",
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    for path in {*probes().values(), "/metrics"}:
        assert httpx.get(f"http://{server.http}{path}").status_code == 200, path


def test_T58_the_health_check_of_the_image_tells_a_server_from_none(server: Server) -> None:
    command = json.loads(shipped.instruction("HEALTHCHECK").partition("CMD ")[2])
    assert command.pop(0) == "python"

    def check(address: str) -> int:
        words = [word.replace("127.0.0.1:8080", address) for word in command]
        return subprocess.run([sys.executable, *words], capture_output=True, timeout=30).returncode

    assert check(server.http) == 0
    assert check("127.0.0.1:1") != 0


def test_ports_are_the_same_everywhere(tmp_path: Path) -> None:
    exposed = set(map(int, shipped.instruction("EXPOSE").split()))
    assert exposed == {8080, 9091, 9092}
    assert {int(port.rpartition(":")[2]) for port in shipped.compose("codeq")["ports"]} == exposed
    assert {port["containerPort"] for port in shipped.container()["ports"]} == exposed
    assert {port["port"] for port in shipped.kubernetes("Service")["spec"]["ports"]} == exposed
    for place in PLACES:
        arguments, environ = settings_of(place, tmp_path)
        config = load(arguments[2] if "--config" in arguments else None, environ)
        addresses = (config.http_addr, config.worker_stream_addr, config.producer_stream_addr)
        assert addresses == ("0.0.0.0:8080", "0.0.0.0:9091", "0.0.0.0:9092")


def test_data_and_backups_are_on_the_volume(tmp_path: Path) -> None:
    volume = shipped.instruction("VOLUME")
    assert shipped.instruction("WORKDIR") == shipped.unit("WorkingDirectory") == volume
    assert volume == f"/var/lib/{shipped.unit('StateDirectory')}"
    assert shipped.compose("codeq")["volumes"] == [f"codeq:{volume}"]
    assert {"name": "data", "mountPath": volume} in shipped.container()["volumeMounts"]
    for place in PLACES:
        arguments, environ = settings_of(place, tmp_path)
        config = load(arguments[2] if "--config" in arguments else None, environ)
        for path in (config.persistence_config.path, config.backup_dir):
            assert (Path(volume) / path).is_relative_to(volume), (place, path)


def test_the_server_is_given_the_time_it_takes_to_stop() -> None:
    pod = shipped.kubernetes("StatefulSet")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > STOP_SECONDS
    assert int(shipped.unit("TimeoutStopSec")) > STOP_SECONDS
    assert int(shipped.compose("codeq")["stop_grace_period"].rstrip("s")) > STOP_SECONDS


def test_a_restart_follows_a_fault_but_not_a_wrong_setting() -> None:
    assert shipped.unit("Restart") == "on-failure"
    assert int(shipped.unit("RestartPreventExitStatus")) == app.EXIT_BAD_SETTING
    assert app.EXIT_STORE_FAULT != app.EXIT_BAD_SETTING


def test_nobody_runs_as_root() -> None:
    user = shipped.instruction("USER")
    pod = shipped.kubernetes("StatefulSet")["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{pod['runAsUser']}:{pod['fsGroup']}" and pod["runAsNonRoot"]
    assert shipped.unit("User") == "codeq"
    assert shipped.container()["securityContext"]["readOnlyRootFilesystem"]
    assert shipped.compose("codeq")["read_only"] and shipped.compose("codeq")["cap_drop"] == ["ALL"]


def test_one_replica_that_no_drain_takes_by_surprise() -> None:
    spec = shipped.kubernetes("StatefulSet")["spec"]
    budget = shipped.kubernetes("PodDisruptionBudget")["spec"]
    assert spec["replicas"] == budget["minAvailable"] == 1
    assert budget["selector"] == spec["selector"]
    assert spec["serviceName"] == shipped.kubernetes("Service")["metadata"]["name"]


def test_images_are_pinned_and_name_no_host() -> None:
    froms = re.findall(r"^FROM (\S+)", shipped.read("Dockerfile"), re.MULTILINE)
    (tree,) = shipped.documents("compose.yaml")
    images = {*froms, *(each["image"] for each in tree["services"].values())}
    for image in images:
        name, _, tag = image.rpartition(":")
        assert name and tag != "latest", image
        assert "." not in name.partition("/")[0], image


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    allowed = {
        line[1:] for line in shipped.read("Dockerfile.dockerignore").splitlines() if line[:1] == "!"
    }
    copied: set[str] = set()
    for words in re.findall(r"^COPY (?!--from)(.*)$", shipped.read("Dockerfile"), re.MULTILINE):
        copied.update(words.split()[:-1])
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


# --- metrics


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every metric of a server under a little load: name in queries -> labels."""
    folder = tmp_path_factory.mktemp("scraped")
    arguments = ["serve", "--dev", "--data", str(folder / "data")]
    for flag in ("--http", "--producer-stream", "--worker-stream"):
        arguments += [flag, ANY_PORT]
    environ = {
        "LIMITS_DISK_RESERVE_BYTES": "0",
        "RATE_LIMIT_PRODUCER_REQUESTS_PER_MINUTE": "1",
        "RATE_LIMIT_PRODUCER_BURST_SIZE": "1",
        "WEBHOOKS_ALLOW_PRIVATE_NETWORKS": "true",
    }
    server = Server(folder, arguments, environ)
    try:
        load_a_little(server)
        text = scrape_with(server, "codeq_webhook_deliveries_total{")
    finally:
        server.close()
    return names_and_labels(text)


def load_a_little(server: Server) -> None:
    """A dead letter with a webhook nobody takes, a refused create, a subscription."""
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    assert worker.post("/workers/subscriptions", json={"eventTypes": ["resize"]}).is_success
    create(producer, "resize", maxAttempts=1, webhook="http://127.0.0.1:1/")
    assert producer.post("/tasks", json={"command": "resize", "payload": 1}).status_code == 429
    task_id = claim(worker, "resize")["id"]
    assert worker.post(f"/tasks/{task_id}/nack", json={}).json()["status"] == "dlq"


def scrape_with(server: Server, sample: str) -> str:
    """The first scrape that has this sample."""
    for _ in range(2000):
        text = httpx.get(f"http://{server.http}/metrics").text
        if f"\n{sample}" in text:
            return text
    pytest.fail(f"no {sample} in {text}")


def names_and_labels(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> list[tuple[str, str]]:
    """(where it stands, query) of alerts and dashboard."""
    found = [(name, rule["expr"]) for name, rule in shipped.alerts().items()]
    board = dashboard()
    for panel in board["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    found += [(note["name"], note["expr"]) for note in board["annotations"]["list"]]
    variable = board["templating"]["list"][1]["query"]["query"]
    return [*found, ("command", variable.removeprefix("label_values(").partition(",")[0])]


def dashboard() -> dict[str, Any]:
    return dict(json.loads(shipped.read("grafana/dashboard.json")))


def test_every_metric_that_is_asked_for_exists(scraped: dict[str, set[str]]) -> None:
    known = {**scraped, **AWAITED, **FOREIGN}
    bad = []
    asked = 0
    for place, query in queries():
        for name, labels in shipped.selectors(query):
            asked += 1
            if name not in known:
                bad.append(f"{place}: no metric {name}")
            elif more := labels - known[name] - SCRAPE_LABELS:
                bad.append(f"{place}: {name} has no label {', '.join(sorted(more))}")
    assert not bad and asked > 40, "\n".join(bad)


def test_labels_that_queries_group_by_exist(scraped: dict[str, set[str]]) -> None:
    known = {**scraped, **AWAITED, **FOREIGN}
    for place, query in queries():
        there = SCRAPE_LABELS.union(*(known[one.name] for one in shipped.selectors(query)))
        for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
            assert {label.strip() for label in group.split(",")} <= there, (place, query)


def test_awaited_metrics_are_not_there_yet(scraped: dict[str, set[str]]) -> None:
    come = AWAITED.keys() & scraped.keys()
    assert not come, f"these are there now; take them off AWAITED: {', '.join(sorted(come))}"


def test_every_metric_of_codeq_is_on_the_dashboard(scraped: dict[str, set[str]]) -> None:
    shown = {re.sub(r"_(bucket|count)$", "", one.name) for _, query in queries()
             for one in shipped.selectors(query)}  # fmt: skip
    ours = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in {*scraped, *AWAITED}
            if name.startswith("codeq_")}  # fmt: skip
    assert ours - shown == {"codeq_build_info"}


def test_the_dashboard_is_in_order() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"] and panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"
    provider = shipped.documents("grafana/provider.yaml")[0]["providers"][0]
    mounts = shipped.compose("grafana")["volumes"]
    assert f"./grafana/dashboard.json:{provider['options']['path']}/dashboard.json:ro" in mounts


def test_every_alert_is_explained_and_every_explanation_has_its_alert() -> None:
    operations = (ROOT / "docs/operations.md").read_text()
    explained = re.findall(r"^\| `(Codeq\w+)` \|", operations, re.MULTILINE)
    assert sorted(explained) == sorted(shipped.alerts())
    for rule in shipped.alerts().values():
        assert rule["annotations"]["summary"] and rule["labels"]["severity"]


# --- linters


def tool(name: str, *arguments: str | Path) -> None:
    """Runs a linter of the environment this test runs in."""
    done = subprocess.run(
        [shipped.BIN / name, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_yaml_files_are_well_formed() -> None:
    rules = "{extends: relaxed, rules: {line-length: {max: 130}, key-duplicates: enable}}"
    tool("yamllint", "--strict", "-d", rules, shipped.DEPLOY, "examples/codeq.yaml")


def test_the_dockerfile_passes_its_linter() -> None:
    tool("hadolint", shipped.DEPLOY / "Dockerfile")


def test_the_compose_file_fits_the_specification() -> None:
    file = shipped.DEPLOY / "compose.yaml"
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


def test_the_manifests_fit_the_schemas_of_kubernetes() -> None:
    folder = shipped.DEPLOY / "kubernetes"
    tool("kubernetes-validate", "--strict", folder / "codeq.yaml", folder / "secret.yaml")


def test_shell_scripts_pass_their_linter() -> None:
    scripts = (*sorted((ROOT / "ci").iterdir()), *ROOT.glob("examples/*.sh"), ROOT / ".ci/run")
    tool("shellcheck", *scripts)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_the_unit_is_well_formed_and_closed(tmp_path: Path) -> None:
    unit = tmp_path / "codeq.service"
    text = shipped.read("systemd/codeq.service")
    unit.write_text(text.replace("/opt/codeq/bin/codeq", str(Path(sys.executable))))
    verify = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert verify.returncode == 0 and "codeq.service" not in verify.stderr, verify.stderr
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=15", unit]
    closed = subprocess.run(security, capture_output=True, text=True)
    assert closed.returncode == 0, closed.stdout[-400:]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here")
def test_prometheus_takes_its_files() -> None:
    for arguments in (["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"]):
        done = subprocess.run(
            ["promtool", *arguments], cwd=shipped.DEPLOY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
