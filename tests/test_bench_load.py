"""The load bench, small, so that it never rots; nothing here fails on a time."""

from __future__ import annotations

import json

import pytest

from codeq import cli
from codeq.bench import clients, load


@pytest.mark.parametrize("flag", ["--sync", "--no-sync"])
def test_every_surface_counts_what_it_did(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(load.SURFACES) if flag == "--sync" else ["stream-batch-256"]
    chosen = [word for name in names for word in ("--surface", name)]
    assert cli.run(["bench", "--seconds", "0.3", "--json", flag, *chosen]) == 0
    report = json.loads(capsys.readouterr().out)
    assert ("NOT synced" in report["durability"]) == (flag == "--no-sync")
    assert report["machine"] and report["commit"] and "rocksdict" in report["versions"]
    assert [surface["surface"] for surface in report["surfaces"]] == names
    for surface in report["surfaces"]:
        assert surface["created"] > 0 and surface["refused"] == 0
        if surface["unit"] == "lives":
            assert min(surface["delivered"], surface["finished"], surface["acknowledged"]) > 0
        if surface["surface"] == "latency":
            assert 0 < surface["latency_p50_ms"] <= surface["latency_p99_ms"]


def test_a_payload_has_200_bytes_and_a_result_40() -> None:
    role = load.SURFACES["stream-single"].producers
    payload = clients.payload_of(role, 123456)
    assert 190 <= len(json.dumps(payload, separators=(",", ":"))) <= 210
    result = clients.result_of(payload)
    assert 35 <= len(json.dumps(result, separators=(",", ":"))) <= 45


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    surface = load.SURFACES["stream-batch-1000"]
    first = load.Look(1.0, [0, 0, 0, 0], 1.0, 0)
    last = load.Look(3.0, [2000, 1900, 1800, 1700], 1.5, 1_700_000)
    measured = load.measured(
        surface, first, last, [{"cpu_seconds": 1.0, "refused": 0, "deliveries": []}]
    )
    assert (measured.per_second, measured.written_bytes_each) == (850.0, 1000.0)
    assert measured.server_cpu_seconds_per_100000 == round(0.5 * 100_000 / 1700, 3)
    load.print_table([measured], load.surroundings(True))
    said = capsys.readouterr().out
    assert "stream-batch-1000" in said and "850 lives" in said and "2,000" in said
