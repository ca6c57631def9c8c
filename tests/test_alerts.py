"""Each alert fires when it should, and none on a good day: asked of the tool of Prometheus."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import shipped

#: At which minute the alerts are asked for; the series have a sample each minute
LOOK_MINUTES = 60
#: Histogram buckets as (le, increase per minute): all within, and all above a tenth of a second
FAST = ("0.1", 100), ("0.25", 100), ("+Inf", 100)
SLOW = ("0.1", 0), ("0.25", 100), ("+Inf", 100)

Series = dict[str, str]


def histogram(name: str, buckets: tuple[tuple[str, int], ...]) -> Series:
    return {
        f'{name}_bucket{{job="codeq",instance="q",le="{le}"}}': f"0+{step}x{LOOK_MINUTES}"
        for le, step in buckets
    }


def one(name: str, values: str, **labels: str) -> Series:
    text = "".join(f',{key}="{value}"' for key, value in labels.items())
    job = "codeq-ready" if name == "probe_success" else "codeq"
    return {f'{name}{{job="{job}",instance="q"{text}}}': values}


def always(value: float) -> str:
    return f"{value}+0x{LOOK_MINUTES}"


def rising(step: float, start: float = 0) -> str:
    return f"{start}{step:+}x{LOOK_MINUTES}"


GIB = 2**30
WELL: Series = {
    **one("up", always(1)),
    **one("probe_success", always(1)),
    **one("process_start_time_seconds", always(1e9)),
    **one("codeq_disk_free_bytes", always(50 * GIB)),
    **histogram("codeq_sync_seconds", FAST),
    **histogram("codeq_loop_blocked_seconds", FAST),
    **one("codeq_oldest_ready_seconds", always(5), command="resize"),
    **one("codeq_queue_depth", always(10), command="resize", queue="ready"),
    **one("codeq_task_claimed_total", rising(1000), command="resize"),
    **one("codeq_dlq_depth", always(3), command="resize"),
    **one("codeq_lease_expired_total", rising(0.1), command="resize"),
    **one("codeq_task_completed_total", rising(990), command="resize", status="COMPLETED"),
    **one("codeq_task_completed_total", rising(10), command="resize", status="FAILED"),
    **one("codeq_webhooks_pending", always(10)),
    **one(
        *("codeq_webhook_deliveries_total", rising(100)),
        kind="task_result", command="resize", outcome="success",
    ),
    **one("codeq_rate_limit_hits_total", rising(5), scope="producer", operation="create_task"),
    **one("process_open_fds", always(100)),
    **one("process_max_fds", always(65536)),
}  # fmt: skip
#: What is different when the alert fires
ILL: dict[str, Series] = {
    "CodeqDown": one("up", always(0)),
    "CodeqNotReady": one("probe_success", always(0)),
    "CodeqRestarts": one("process_start_time_seconds", rising(60)),
    "CodeqDiskLow": one("codeq_disk_free_bytes", always(2 * GIB)),
    "CodeqDiskFills": one("codeq_disk_free_bytes", rising(-GIB / 8, 50 * GIB)),
    "CodeqSyncSlow": histogram("codeq_sync_seconds", SLOW),
    "CodeqLoopBlocked": histogram("codeq_loop_blocked_seconds", SLOW),
    "CodeqOldestReady": one("codeq_oldest_ready_seconds", always(1000), command="resize"),
    "CodeqNobodyClaims": one("codeq_task_claimed_total", always(1000), command="resize"),
    "CodeqDeadLettersGrow": one("codeq_dlq_depth", rising(1), command="resize"),
    "CodeqLeasesExpire": one("codeq_lease_expired_total", rising(100), command="resize"),
    "CodeqTasksFail": one(
        "codeq_task_completed_total", rising(300), command="resize", status="FAILED"
    ),
    "CodeqWebhooksPending": one("codeq_webhooks_pending", always(5000)),
    "CodeqWebhooksFail": one(
        *("codeq_webhook_deliveries_total", rising(100)),
        kind="task_result", command="resize", outcome="failure",
    ),
    "CodeqRateLimited": one(
        "codeq_rate_limit_hits_total", rising(120), scope="producer", operation="create_task"
    ),
    "CodeqFileDescriptors": one("process_open_fds", always(60000)),
}  # fmt: skip


def scene(ill: Series, firing: list[str]) -> dict[str, object]:
    """Which alerts fire in the end, with these series in the place of those of a good day."""
    series = {**WELL, **ill}
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{LOOK_MINUTES}m",
                "exp_samples": [
                    {"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing
                ],
            }
        ],
    }


def test_each_alert_has_a_scene() -> None:
    assert sorted(ILL) == sorted(shipped.alerts())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here")
def test_each_alert_fires_alone_and_none_on_a_good_day(tmp_path: Path) -> None:
    scenes = [scene({}, []), *(scene(ill, [name]) for name, ill in ILL.items())]
    file = tmp_path / "alerts.test.yml"
    rules = str(shipped.DEPLOY / "alerts.yml")
    file.write_text(yaml.safe_dump({"rule_files": [rules], "tests": scenes}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
