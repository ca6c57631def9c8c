"""The load bench, small, so that it never rots; nothing here fails on a time."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import msgspec
import pytest

from codeq import cli
from codeq.bench import client, load, plan, report, rest_clients, run, target
from codeq.bench.tally import CREATED, Tally
from codeq.client.local import LocalServer
from codeq.errors import CodeqError

CLOSED = [name for name in plan.SURFACES if name != "latency"]


def bench(*arguments: str) -> int:
    return cli.run(["bench", "--seconds", "0.3", "--json", "-", *arguments])


@pytest.mark.parametrize("name", CLOSED)
def test_every_surface_counts_what_it_did(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--surface", name, "--concurrency", "2") == 0
    [done] = json.loads(capsys.readouterr().out)["runs"]
    assert done["surface"] == name and done["refused"] == 0 and done["faults"] == []
    assert done["created"] > 0 and done["acknowledgement"]["p50_ms"] > 0
    if done["unit"] == "lives":
        assert min(done["delivered"], done["finished"], done["acknowledged"]) > 0
    assert done["server_cpu_seconds_per_100000"] >= 0 and done["written_bytes_each"] >= 0


def test_an_open_loop_times_every_task_from_when_it_was_due(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench("--surface", "latency") == 0
    assert bench("--surface", "rest-batch", "--rate", "500", "--batch", "10") == 0
    said = capsys.readouterr().out
    for text, name, rate in (
        (said[: said.index("\n}\n") + 2], "latency", 200),
        (said[said.index("\n}\n") + 2 :], "rest-batch", 500),
    ):
        [done] = json.loads(text)["runs"]
        assert (done["surface"], done["offered_per_second"], done["faults"]) == (name, rate, [])
        assert 0 < done["delivery"]["p50_ms"] <= done["delivery"]["p999_ms"]
        assert done["created"] > 0


def test_runs_without_sync_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    named = ("--surface", "stream-batch-256", "--streams", "1", "--keys")
    assert bench(*named, "--no-sync", "--runs", "2") == 0
    said = json.loads(capsys.readouterr().out)
    assert "NOT synced" in said["durability"]
    assert said["machine"] and said["commit"] and "rocksdict" in said["versions"]
    assert [done["streams"] for done in said["runs"]] == [1, 1]


def test_a_named_server_is_used_and_left_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(measure: bool) -> None:
        server = LocalServer(tmp_path / "data", tmp_path / "log")
        await server.start()
        streams = ("--producer-stream", server.producer, "--worker-stream", server.worker)
        if measure:
            url = ("--url", f"http://{server.http}", *streams)
            assert await asyncio.to_thread(bench, "--surface", "stream", *url) == 0
        assert await server.stop() == 0

    # The bench runs a loop of its own, in a thread that may not take up signals.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "until_told", lambda work: work)
        asyncio.run(serve(True))
    said = json.loads(capsys.readouterr().out)
    assert said["durability"] == "as the server is set"
    [done] = said["runs"]
    assert done["server_cpu_seconds_per_100000"] is None and done["faults"] == []


def test_a_payload_has_200_bytes_and_a_result_40(tmp_path: Path) -> None:
    Tally(tmp_path / "tally", 2)
    role = plan.SURFACES["stream"].producers
    told = msgspec.structs.replace(role, tally=str(tmp_path / "tally"))

    async def both() -> tuple[bytes, bytes]:
        made = client.Client(told)
        made.built = 123456
        payload = made.payload(1_234_567_890_123_456)
        return msgspec.json.encode(payload), msgspec.json.encode(made.handle(payload))

    payload, result = asyncio.run(both())
    assert 190 <= len(payload) <= 210 and 35 <= len(result) <= 45


@pytest.mark.parametrize(
    ("peer", "program"), [("postgres", "postgres"), ("redis-streams", "redis-server")]
)
def test_a_peer_lives_the_same_life(
    peer: str, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed here")
    assert bench("--peer", peer, "--batch", "50", "--concurrency", "2") == 0
    ours, theirs = json.loads(capsys.readouterr().out)["runs"]
    assert (ours["surface"], theirs["surface"]) == ("stream-batch", peer)
    assert theirs["acknowledged"] > 0 and theirs["faults"] == []
    assert theirs["delivery"]["p50_ms"] > 0 and theirs["server_cpu_seconds_per_100000"] > 0


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--peer", "pigeons") != 0
    assert "no peer 'pigeons'; there are postgres, redis-streams" in capsys.readouterr().err


def test_ratios_are_those_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_ratios([measured(), measured(surface="postgres", per_second=425.0)], "postgres")
    assert "2.00" in capsys.readouterr().out


def measured(**more: object) -> load.Measured:
    surface = plan.SURFACES["stream-batch"]
    first = load.Look(1.0, [0, 0, 0, 0], 10, 1.0, 0)
    last = load.Look(3.0, [2000, 1900, 1800, 1700], 30, 1.5, 1_700_000)
    nothing = client.times().encode().decode()
    seen = {"cpu_seconds": 1.0, "refused": 0}
    reports = [{**seen, "acknowledgements": nothing, "deliveries": nothing}]
    return msgspec.structs.replace(load.measured(surface, first, last, reports, []), **more)


def test_the_figures_are_those_between_two_looks() -> None:
    done = measured()
    assert (done.per_second, done.written_bytes_each, done.syncs_per_second) == (850.0, 1000.0, 10)
    assert done.server_cpu_seconds_per_100000 == round(0.5 * 100_000 / 1700, 3)
    assert done.delivery == load.Times()


def test_the_table_shows_medians_spread_and_faults(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [measured(), measured(per_second=900.0), measured(per_second=700.0, faults=["2 lost"])]
    report.print_table(runs, report.surroundings(True))
    said = capsys.readouterr().out
    assert "850 lives" in said and "700 to 900" in said and "stream-batch: 2 lost" in said


def test_the_json_sums_up_the_runs() -> None:
    runs = [measured(), measured(per_second=900.0), measured(per_second=700.0)]
    [line] = report.summary(runs)
    assert line["runs"] == 3
    assert line["per_second"] == {"median": 850.0, "low": 700.0, "high": 900.0}
    assert line["written_bytes_each"]["median"] == 1000.0


def test_ended_tasks_go_after_the_keeping_time_that_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench("--surface", "stream-batch-256", "--retention", "5") == 0
    assert json.loads(capsys.readouterr().out)["keeping time"] == "5 s"
    assert bench("--url", "http://127.0.0.1:1", "--retention", "5") != 0
    assert "--retention is for servers of the bench's own" in capsys.readouterr().err


def test_a_plot_has_bars_and_curves(tmp_path: Path) -> None:
    times = load.Times(1.0, 2.0, 3.0, 4.0)
    runs = [measured(), *(measured(offered_per_second=r, delivery=times) for r in (10.0, 20.0))]
    report.draw(runs, report.surroundings(True), tmp_path / "drawing.png")
    assert (tmp_path / "drawing.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_add_up_is_a_fault(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "tally", 2)
    tally.put(0, CREATED, 5)
    none = target.Counters(0, 0, 0)
    surface = plan.SURFACES["stream"]
    assert load.disagreements(surface, tally, none, target.Counters(5, 5, 4)) == [
        "5 tasks created, 0 results acknowledged",
        "5 tasks created, 4 counted as completed",
    ]


def test_wishes_change_the_surface() -> None:
    surface = plan.wished(plan.SURFACES["stream-batch"], plan.Wishes(10, 4, 8, 2000, 0.0))
    make, take = surface.producers, surface.workers
    assert (make.batch, make.calls, make.streams, make.payload_bytes) == (10, 8, 8, 2000)
    assert take is not None and (take.batch, take.calls, take.streams) == (10, 8, 8)
    assert plan.wished(surface, plan.Wishes(per_second=5.0)).producers.window == 0


def test_an_unknown_surface_is_refused() -> None:
    with pytest.raises(CodeqError, match="no surface 'pigeon'; there are stream-batch"):
        plan.chosen(["pigeon"])


def test_a_connection_reads_answers_without_a_body() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    async def ask() -> tuple[int, bytes]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        connection = await rest_clients.Connection.open(f"{host}:{port}", "token")
        answered = await connection.post("/tasks/claim", b"")
        connection.close()
        server.close()
        await server.wait_closed()
        return answered

    assert asyncio.run(ask()) == (204, b"")
