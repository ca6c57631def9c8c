"""A real scrape against the contract: each name, type, label and bucket, in every mode."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from codeq.client.producer import Producer

from .conftest import Server, claim, claimed, create

#: As Prometheus reads them
LATENCY = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, float("inf")]
#: name -> (type, labels)
CONTRACT: dict[str, tuple[str, set[str]]] = {
    "codeq_task_created": ("counter", {"command"}),
    "codeq_task_claimed": ("counter", {"command"}),
    "codeq_task_completed": ("counter", {"command", "status"}),
    "codeq_task_processing_latency_seconds": ("histogram", {"command", "status"}),
    "codeq_lease_expired": ("counter", {"command"}),
    "codeq_webhook_deliveries": ("counter", {"kind", "command", "outcome"}),
    "codeq_rate_limit_hits": ("counter", {"scope", "operation"}),
    "codeq_queue_depth": ("gauge", {"command", "queue"}),
    "codeq_dlq_depth": ("gauge", {"command"}),
    "codeq_subscriptions_active": ("gauge", {"command"}),
    "codeq_commit_seconds": ("histogram", set()),
    "codeq_sync_seconds": ("histogram", set()),
    "codeq_loop_blocked_seconds": ("histogram", set()),
    "codeq_oldest_ready_seconds": ("gauge", {"command"}),
    "codeq_waiting_claims": ("gauge", set()),
    "codeq_streams": ("gauge", {"kind"}),
    "codeq_webhooks_pending": ("gauge", set()),
    "codeq_live_tasks": ("gauge", set()),
    "codeq_disk_free_bytes": ("gauge", set()),
    "codeq_build_info": ("gauge", {"version", "python"}),
}


class Refusing(BaseHTTPRequestHandler):
    """Takes no webhook."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_error(503)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    """URL of a receiver that takes nothing."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def scrape(server: Server) -> dict[str, Metric]:
    answer = httpx.get(f"http://{server.http}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The one sample of this name that has these labels; 0 when there is none."""
    found = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) <= 1, (name, labels)
    return found[0] if found else 0.0


def used(start_server: Callable[..., Server], url: str) -> Server:
    """A server that has done a little of everything."""
    server = start_server(
        WEBHOOKS_ALLOW_PRIVATE_NETWORKS="true",
        RATE_LIMIT_ADMIN_REQUESTS_PER_MINUTE="1",
        RATE_LIMIT_ADMIN_BURST_SIZE="1",
    )
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    task_id = claimed(producer, worker, "job", webhook=url)
    worker.post(f"/tasks/{task_id}/result", json={"status": "COMPLETED"}).raise_for_status()
    assert [producer.post("/admin/tasks/cleanup").status_code for _ in range(2)] == [200, 429]
    worker.post("/workers/subscriptions", json={"eventTypes": ["job"]}).raise_for_status()
    create(producer, "job")
    wait_for(server, "codeq_webhook_deliveries_total", 1)
    return server


def wait_for(server: Server, name: str, least: float, **labels: str) -> None:
    for _ in range(1000):
        if value(scrape(server), name, **labels) >= least:
            return
    pytest.fail(f"{name} does not come to {least}")


def test_T66_every_metric_has_its_name_type_labels_and_buckets(
    start_server: Callable[..., Server], refusing: str
) -> None:
    families = scrape(used(start_server, refusing))
    ours = {name: family for name, family in families.items() if name.startswith("codeq_")}
    assert ours.keys() == CONTRACT.keys()
    for name, (kind, labels) in CONTRACT.items():
        assert ours[name].type == kind and ours[name].documentation, name
        assert ours[name].samples, f"{name} has no sample"
        for sample in ours[name].samples:
            assert sample.labels.keys() - {"le"} == labels, sample
    latency = ours["codeq_task_processing_latency_seconds"].samples
    failed = [s.labels for s in latency if s.labels.get("status") == "FAILED"]
    bounds = [float(labels["le"]) for labels in failed if "le" in labels]
    assert bounds == LATENCY
    assert {s.labels["queue"] for s in ours["codeq_queue_depth"].samples} == {
        "ready", "delayed", "in_progress", "dlq",
    }  # fmt: skip
    assert {s.labels["kind"] for s in ours["codeq_streams"].samples} == {"producer", "worker"}
    assert value(families, "codeq_rate_limit_hits_total", scope="admin", operation="cleanup") == 1
    pending = "codeq_webhooks_pending"
    assert value(families, pending) == 1 and ours["codeq_webhook_deliveries"].samples[0].labels == {
        "kind": "task_result", "command": "job", "outcome": "failure",
    }  # fmt: skip
    assert value(families, "codeq_subscriptions_active", command="job") == 1
    assert value(families, "codeq_disk_free_bytes") > 0
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes"):
        assert value(families, name) > 0
    assert not any("dev" in s.labels.values() for f in ours.values() for s in f.samples), "tenant"


def test_T66_gauges_exist_before_anything_was_done(start_server: Callable[..., Server]) -> None:
    families = scrape(start_server())
    for name, (kind, labels) in CONTRACT.items():
        assert families[name].type == kind
        if kind != "counter" and "command" not in labels:
            assert families[name].samples, name


def test_T66_every_end_on_every_path_is_counted_once(server: Server, command: str) -> None:
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    items = [{"command": command, "payload": 1, "maxAttempts": 1} for _ in range(6)]
    assert len(producer.post("/tasks/batch", json=items).json()) == 6
    body = {"commands": [command], "count": 4, "leaseSeconds": 60}
    ids = [task["id"] for task in worker.post("/tasks/claim/batch", json=body).json()["tasks"]]
    results = [
        {"taskId": ids[0], "status": "COMPLETED"},
        {"taskId": ids[1], "status": "FAILED", "error": "x"},
        {"taskId": ids[0], "status": "COMPLETED"},
    ]
    worker.post("/tasks/batch/results", json={"results": results}).raise_for_status()
    again = worker.post(f"/tasks/{ids[0]}/result", json={"status": "COMPLETED"})
    assert again.status_code == 200, "a repeat is no end"
    worker.post(f"/tasks/{ids[2]}/nack", json={}).raise_for_status()
    worker.post(f"/tasks/{ids[3]}/heartbeat", json={"extendSeconds": 1}).raise_for_status()
    left = claim(worker, command)["id"]
    worker.post(f"/tasks/{left}/abandon", json={}).raise_for_status()
    producer.post(f"/tasks/{left}/cancel").raise_for_status()
    purged = producer.post(f"/admin/queues/{command}/purge", json={"state": "all"})
    assert purged.json() == {"purged": 1}
    producer.get(f"/tasks/{ids[3]}/result", params={"waitSeconds": 20}).raise_for_status()
    producer.post(f"/admin/queues/{command}/dead/purge", json={}).raise_for_status()
    families = scrape(server)

    def count(name: str, **labels: str) -> float:
        return value(families, name, command=command, **labels)

    assert count("codeq_task_created_total") == 6 and count("codeq_task_claimed_total") == 5
    assert count("codeq_task_completed_total", status="COMPLETED") == 1
    assert count("codeq_task_completed_total", status="FAILED") == 5
    assert count("codeq_lease_expired_total") == 1
    latency = "codeq_task_processing_latency_seconds_count"
    assert (count(latency, status="COMPLETED"), count(latency, status="FAILED")) == (1, 5)
    assert count("codeq_dlq_depth") == 0


def test_T66_depth_and_age_are_those_of_tasks_from_streams_too(
    server: Server, command: str
) -> None:
    async def produce() -> None:
        async with Producer(server.producer, token="dev-producer") as client:
            await client.produce(command, 1)

    asyncio.run(produce())
    families = scrape(server)
    assert value(families, "codeq_queue_depth", command=command, queue="ready") == 1
    assert value(families, "codeq_oldest_ready_seconds", command=command) >= 0
    assert any(
        sample.labels["command"] == command
        for sample in families["codeq_oldest_ready_seconds"].samples
    )


def test_T66_commands_beyond_the_limit_share_a_label(start_server: Callable[..., Server]) -> None:
    server = start_server(METRICS_COMMAND_LABELS_MAX="2")
    producer = server.client("dev-producer")
    for name in ("a", "b", "c", "d"):
        create(producer, name)
    families = scrape(server)
    assert value(families, "codeq_task_created_total", command="a") == 1
    assert value(families, "codeq_task_created_total", command="_other") == 2
    assert value(families, "codeq_queue_depth", command="_other", queue="ready") == 2
    assert {s.labels["command"] for s in families["codeq_oldest_ready_seconds"].samples} == {
        "a", "b", "_other",
    }  # fmt: skip
    wait_for(server, "codeq_oldest_ready_seconds", 0.001, command="_other")
