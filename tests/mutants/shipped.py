"""Mutants of what is shipped beside the program: files of examples/, and pages."""

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
    Mutant(
        "receiver-believes-any-signature",
        "examples/webhook_receiver.py",
        "return hmac.compare_digest(expected.encode(), signature.encode())",
        "return bool(expected and signature)",
        "test_examples.py::test_a_receiver_believes_only_signed_webhooks",
    ),
    Mutant(
        "receiver-believes-old-webhooks",
        "examples/webhook_receiver.py",
        "abs(time.time() - int(timestamp)) > AGE_MAX_SECONDS",
        "int(timestamp) < AGE_MAX_SECONDS",
        "test_examples.py::test_a_receiver_believes_only_signed_webhooks",
    ),
    Mutant(
        "next-report-due-at-once",
        "examples/scheduled.py",
        "run_at=due,",
        "run_at=None,",
        "test_examples.py::test_scheduled_work_comes_when_it_is_due",
    ),
    Mutant(
        "table-of-moves-with-another-count",
        "docs/concepts.md",
        "| abandon | leased | ready | -1 |",
        "| abandon | leased | ready | same |",
        "test_concepts.py::test_I1_a_move_of_the_table_is_what_happens",
    ),
    Mutant(
        "page-with-another-answer",
        "README.md",
        "result {'width': 64}",
        "result {'width': 65}",
        "test_docs_code.py::test_T57_the_blocks_of_a_page_do_what_they_say",
    ),
)
