"""The benches that make tables, at tiny sizes: that they count, and say what they found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benches import changes, figures, growth, targets
from codeq.bench.load import Measured

MARKS = "where", "targets", "loads", "rates", "growth"


def a_page(folder: Path) -> Path:
    page = folder / "page.md"
    page.write_text("".join(f"# {n}\n<!-- {n}: begin -->\nold\n<!-- {n}: end -->\n" for n in MARKS))
    return page


def test_every_axis_of_growth_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ("--waiting", "0", "2500", "--queues", "3", "--payload", "5000", "--streams", "3")
    to = tmp_path / "growth.json"
    assert growth.main([*axes, "--batch", "7", "--seconds", "0.3", "--json", str(to)]) == 0
    points = json.loads(to.read_text())["points"]
    assert [(axis, value) for axis, value, _ in points] == [
        ("waiting", 0), ("waiting", 2500), ("queues", 3), ("payload", 5000), ("streams", 3),
        ("batch", 7),
    ]  # fmt: skip
    shapes = [(done["batch"], done["streams"], done["payload_bytes"]) for _, _, done in points[3:]]
    assert shapes == [(209, 2, 5000), (256, 3, 200), (7, 2, 200)]
    assert all(done["acknowledged"] > 0 and done["faults"] == [] for _, _, done in points)
    table = capsys.readouterr().out
    assert "| tasks waiting in another queue | 0 |" in table and "|  | 2,500 |" in table


def test_figures_go_between_their_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, to, readme = a_page(tmp_path), tmp_path / "figures.json", tmp_path / "readme.md"
    readme.write_text("a\n<!-- bench table: begin -->\n<!-- bench table: end -->\nz\n")
    tiny = ("--runs", "1", "--seconds", "0.3", "--retention", "5")
    parts = ("--parts", "loads", "growth", "--axes", '{"batch":[5]}', "--point-seconds", "0.3")
    assert figures.main([*tiny, *parts, "--into", str(page), "--json", str(to),
                         "--readme", str(readme)]) == 0  # fmt: skip
    text = page.read_text()
    assert "| `stream-batch` | " in text and "| tasks a message | 5 |" in text
    assert "# rates\n<!-- rates: begin -->\nold\n" in text  # was left out
    assert "| restart with 10 million waiting tasks | ≤ 15 s | not measured | | |" in text
    assert "commit" in text and "after 5 s" in text
    short = readme.read_text()
    assert short.count("\n| ") == 1 + len(figures.SURFACES) and "commit" in short
    assert "| 200 tasks/s, create to delivery | p50 " in short
    assert "| lives/s, streams, batch 1,000 | ≥ 400,000 |" in capsys.readouterr().out
    found = json.loads(to.read_text())
    assert len(found["loads"]) == 9 and len(found["growth"]) == 1
    with pytest.raises(ValueError, match="no marks for absent"):
        figures.filled(text, {"absent": ""})


def test_goals_are_answered_from_every_part() -> None:
    found = figures.Found(blocks_p999_ms=5.0)
    found.depth = {
        "memory per further waiting task": 129.0,
        "claims from the deep queue": 95.0,
        "claims from a short queue": 100.0,
        "restart: start of the process to ready": 30.0,
    }
    lines = targets.table(figures.answers(found)).splitlines()
    assert len(lines) == 2 + len(targets.GOALS)
    assert "| blocks of the loop, p99.9 | ≤ 5 ms | 5 |  | yes |" in lines
    assert "| restart with 10 million waiting tasks | ≤ 15 s | 30 |  | no, 200% of it |" in lines
    assert any("| ≥ 90 % | 95 |  | yes |" in line for line in lines)
    assert any("| ≤ 120 B | 129 |  | no, 108% of it |" in line for line in lines)


def test_every_goal_of_a_load_names_a_surface() -> None:
    assert {surface for surface, _ in targets.LOADS.values()} <= set(figures.SURFACES)


def test_changes_are_those_since_the_run_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, server, kept = (tmp_path / name for name in ("parts.json", "server.json", "kept.json"))
    run = dict.fromkeys(Measured.__struct_fields__, None)
    run |= {"surface": "stream", "offered_per_second": 0.0, "per_second": 1000.0}
    run["delivery"] = {"p50_ms": 2.0}
    words = [str(parts), str(server), "--keep", str(kept)]
    for us, per_second in ((2.0, 1000.0), (3.0, 900.0)):
        benches = [
            {"name": "engine", "extra_info": {"us_per_task": us}},
            {"name": "parse", "stats": {"median": 1e-6}},
        ]
        parts.write_text(json.dumps({"benchmarks": benches}))
        run["per_second"] = per_second
        server.write_text(json.dumps({"commit": "abc", "runs": [run]}))
        assert changes.main(words) == 0
    first, second = capsys.readouterr().out.split("commit abc, before: nothing was kept\n")
    assert first.count("new") == 4
    assert "+50.0% of 2" in second and "-10.0% of 1,000" in second and "before: abc" in second
