"""Mutants of the files below examples/deploy."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

SHIPPED = (
    Mutant(
        "shipped-tokens-of-two-tenants",
        "examples/deploy/codeq.env",
        '"eventTypes": ["*"], "raw": {"tenantId": "acme"}',
        '"eventTypes": ["*"], "raw": {"tenantId": "umbra"}',
        "test_deploy.py::test_T57_the_tokens_of_shipped_files_share_a_tenant_and_deliver_a_task",
    ),
    Mutant(
        "shipped-probe-of-no-route",
        "examples/deploy/kubernetes/codeq.yaml",
        "path: /readyz",
        "path: /ready",
        "test_deploy.py::test_T58_shipped_files_probe_healthz_and_readyz",
    ),
    Mutant(
        "shipped-health-check-that-always-says-yes",
        "examples/deploy/Dockerfile",
        "r.urlopen('http",
        "r.Request('http",
        "test_deploy.py::test_T58_the_health_check_of_the_image_tells_a_server_from_none",
    ),
    Mutant(
        "alert-on-a-metric-of-another-name",
        "examples/deploy/alerts.yml",
        "codeq_webhooks_pending",
        "codeq_webhook_pending",
        "test_deploy.py::test_every_metric_that_is_asked_for_exists",
    ),
)
