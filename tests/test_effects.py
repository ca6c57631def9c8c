"""Every key of the settings acts, and the documents and examples know every key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import codeq
from codeq import config
from codeq.config import load, value_of
from codeq.server.app import shard_settings

from .conftest import ROOT
from .test_config import NEEDED, other_value

INSTALLED = Path(codeq.__file__).parent.parent  # the source, also without the tree it is from
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
COMPLETE = ROOT / "examples/codeq.yaml"
#: Keys that the complete example sets to something
CHOSEN = {"httpAddr", "producerStreamAddr", "workerStreamAddr"} | {
    f"{role}Auth{part}" for role in ("producer", "worker") for part in ("Provider", "Config")
}
SERVER = "codeq/server"
APP, TLS, TRACING = f"{SERVER}/app.py", f"{SERVER}/tls.py", f"{SERVER}/tracing.py"
REST, LEASES, REQUEST = (f"{SERVER}/{name}.py" for name in ("rest_tasks", "rest_leases", "request"))
STREAMS, READYS, GRPC = (f"{SERVER}/{name}.py" for name in ("streams", "readys", "grpc_server"))
CALLBACKS, WEBHOOKS = f"{SERVER}/callbacks.py", f"{SERVER}/webhooks.py"
PROVIDERS, LIMITS = f"{SERVER}/providers.py", f"{SERVER}/limits.py"

#: Where each key acts: file, and what stands there. The longest name that fits a key counts. Keys
#: that the shard takes are found out by asking for its settings.
ACTS: dict[str, tuple[str, str]] = {
    "port": ("codeq/config.py", 'return "0.0.0.0", self.port'),
    "httpAddr": (APP, "config.http_address"),
    "producerStreamAddr": (APP, 'f"{kind}_stream_addr"'),
    "workerStreamAddr": (APP, 'f"{kind}_stream_addr"'),
    "tls.http": (TLS, '"http": files.http'),
    "tls.producer": (TLS, '"producer": files.producer'),
    "tls.worker": (TLS, '"worker": files.worker'),
    "persistenceProvider": ("codeq/config.py", 'Literal["rocksdb", "pebble"]'),
    "env": (TRACING, "config.env"),
    "logLevel": (APP, "config.log_level"),
    "logFormat": (APP, "config.log_format"),
    "limits.inflightBytes": (APP, "InFlight(config.limits.inflight_bytes"),
    "limits.connections": (f"{SERVER}/http_server.py", "limits.connections"),
    "limits.claimBatch": (LEASES, "limits.claim_batch"),
    "limits.bodyBytes": (REQUEST, "limits.body_bytes"),
    "limits.resultBytes": (LEASES, "limits.result_bytes"),
    "compat.createStatus": (REST, "compat.create_status"),
    "streams.sendBytes": (STREAMS, "streams.send_bytes"),
    "streams.receiveBytes": (GRPC, "streams.receive_bytes"),
    "streams.inflightBytes": (STREAMS, "streams.inflight_bytes"),
    "streams.readyCountMax": (READYS, "ready_count_max"),
    "streams.readysMax": (READYS, "streams.readys_max"),
    "streams.inflightMax": (STREAMS, "streams.inflight_max"),
    "streams.helloTimeoutSeconds": (STREAMS, "streams.hello_timeout_seconds"),
    "streams.endAtTokenExpiry": (STREAMS, "streams.end_at_token_expiry"),
    "producerAuthProvider": (PROVIDERS, "config.producer_auth_provider"),
    "producerAuthConfig": (PROVIDERS, "config.producer_auth_config"),
    "workerAuthProvider": (PROVIDERS, "config.worker_auth_provider"),
    "workerAuthConfig": (PROVIDERS, "config.worker_auth_config"),
    "identityJwksUrl": (PROVIDERS, "config.identity_jwks_url"),
    "identityIssuer": (PROVIDERS, "config.identity_issuer"),
    "identityAudience": (PROVIDERS, "config.identity_audience"),
    "identityServiceUrl": (PROVIDERS, "config.identity_service_url"),
    "workerJwksUrl": (PROVIDERS, "config.worker_jwks_url"),
    "workerIssuer": (PROVIDERS, "config.worker_issuer"),
    "workerAudience": (PROVIDERS, "config.worker_audience"),
    "allowedClockSkewSeconds": (PROVIDERS, "allowed_clock_skew_seconds"),
    "allowProducerAsWorker": (PROVIDERS, "config.allow_producer_as_worker"),
    "webhookHmacSecret": (CALLBACKS, "config.webhook_hmac_secret"),
    "resultWebhookMaxAttempts": (WEBHOOKS, "config.result_webhook_max_attempts"),
    "resultWebhookBaseBackoffSeconds": (WEBHOOKS, "config.result_webhook_base_backoff_seconds"),
    "resultWebhookMaxBackoffSeconds": (WEBHOOKS, "config.result_webhook_max_backoff_seconds"),
    "webhooks.concurrency": (CALLBACKS, "config.webhooks.concurrency"),
    "webhooks.perHost": (CALLBACKS, "config.webhooks.per_host"),
    "subscriptionMinIntervalSeconds": (
        f"{SERVER}/rest_subscriptions.py",
        "config.subscription_min_interval_seconds",
    ),
    "rateLimit.producer": (LIMITS, "Buckets(settings.producer)"),
    "rateLimit.worker": (LIMITS, "Buckets(settings.worker)"),
    "rateLimit.webhook": (LIMITS, "Buckets(settings.webhook)"),
    "rateLimit.admin": (LIMITS, "Buckets(settings.admin)"),
    "tracingEnabled": (APP, "config.tracing_enabled"),
    "tracingServiceName": (TRACING, "config.tracing_service_name"),
    "tracingOtlpEndpoint": (TRACING, "config.tracing_otlp_endpoint"),
    "tracingOtlpInsecure": (TRACING, "config.tracing_otlp_insecure"),
    "tracingSampleRatio": (TRACING, "config.tracing_sample_ratio"),
}


def one_changed(path: str) -> config.Config:
    """Settings in which a key has another value than its default, and what it needs beside it."""
    return load(flags={key: other_value(config.KEYS[key]) for key in (*NEEDED, path)})


def longest(names: Any, path: str) -> str | None:
    """The longest of these names that is the key or a group around it."""
    fitting = [name for name in names if path == name or path.startswith(name + ".")]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("path", list(config.KEYS))
def test_T62_every_key_acts_or_says_that_it_does_not(path: str) -> None:
    changed = one_changed(path)
    if longest(config.NOT_AVAILABLE, path) is not None:
        lines = [line for lines in config.unavailable_settings(changed) for line in lines]
        assert any(line.startswith(f"{path}: not available") for line in lines)
        return
    if shard_settings(changed) != shard_settings(load()):
        return
    name = longest(ACTS, path)
    assert name is not None, (
        f"{path}: say in ACTS where it acts, or in NOT_AVAILABLE that it does not"
    )
    file, text = ACTS[name]
    assert text in (INSTALLED / file).read_text(), f"{path} does not act where ACTS says"


def test_T62_what_acts_is_a_key() -> None:
    for name in ACTS:
        assert name in config.KEYS or name in config.GROUPS, name


# --- documents and examples


def documented() -> list[tuple[str, str, str]]:
    """(key, environment name, default) of each row of the tables."""
    text = (ROOT / "docs/configuration.md").read_text()
    row = re.compile(r"^\| `([\w.]+)` \| `(\w+)` \| (?:`(.*?)`)? \| .+ \|$", re.MULTILINE)
    return row.findall(text)


def test_T62_the_documents_list_every_key() -> None:
    expected = []
    for key in config.KEYS.values():
        default = key.default
        shown = default if isinstance(default, str) else json.dumps(default)
        if default is None:
            shown = ""
        expected.append((key.path, config.environment_name(key.path), shown))
    assert sorted(documented()) == sorted(expected)


def leaves(tree: Any, path: str = "") -> list[str]:
    """The dotted keys that a tree of settings sets."""
    if path in config.KEYS or not isinstance(tree, dict):
        return [path]
    return [leaf for name in tree for leaf in leaves(tree[name], f"{path}.{name}".lstrip("."))]


def test_T56_the_complete_example_has_every_key() -> None:
    assert sorted(leaves(yaml.safe_load(COMPLETE.read_text()))) == sorted(config.KEYS)
    loaded = load(str(COMPLETE))
    changed = {path for path, key in config.KEYS.items() if value_of(loaded, path) != key.default}
    assert changed == CHOSEN
    assert config.unavailable_settings(loaded) == ([], [])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_T56_the_shipped_examples_load(path: Path) -> None:
    load(str(path))


def test_the_map_for_those_who_come_from_the_go_server_has_every_key_once() -> None:
    table = (ROOT / "docs/migration.md").read_text().partition("| keys | what")[2]
    found: list[str] = []
    kinds: dict[str, str] = {}
    for keys, fate in re.findall(r"^\| (`.+?`) \| (.+) \|$", table, re.MULTILINE):
        for name in re.findall(r"`([\w.]+?)(?:\.\*)?`", keys):
            found += [key for key in config.KEYS if key == name or key.startswith(name + ".")]
            kinds[name] = fate
    assert sorted(found) == sorted(config.KEYS)
    ignored = {name for name, fate in kinds.items() if fate.startswith("ignored")}
    assert ignored == set(config.IGNORED)
