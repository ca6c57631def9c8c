"""Settings: where they come from, what is refused, development mode."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from codeq import config
from codeq.config import ConfigError, dev_config, environment_name, load, value_of
from codeq.server.app import shard_settings

_PAIR = ("certFile", "keyFile")
#: A value for each key that is not its default
OTHER: dict[str, Any] = {
    "httpAddr": "127.0.0.1:1",
    "persistenceProvider": "pebble",
    "logLevel": "debug",
    "logFormat": "text",
    "backoffPolicy": "fixed",
    "compat.createStatus": 202,
    "compat.idempotencyReplay": "lenient",
    "producerStreamAddr": "127.0.0.1:2",
    "workerStreamAddr": "127.0.0.1:3",
    "producerAuthProvider": "static",
    "workerAuthProvider": "static",
    "producerAuthConfig": {"token": "p"},
    "workerAuthConfig": {"token": "w"},
    "tracingSampleRatio": 0.5,
    "raft.peers": {"a": "host:1"},
    "raft.peerHTTPAddrs": {"a": "http://host:1"},
    "streams.sendBytes": 8_388_608,
    "limits.payloadBytes": 1_000_000,
}
#: Keys that other keys cannot do without
NEEDED = [
    *(name for name in OTHER if "Auth" in name),
    *(f"tls.{name}.{file}" for name in ("http", "producer", "worker") for file in _PAIR),
]


def other_value(key: config.Key) -> Any:
    if key.path in OTHER:
        return OTHER[key.path]
    if key.type is bool:
        return not key.default
    if key.type is str:
        return "text"
    return key.default + 1


def refused(call: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- every key


def test_T56_every_key_can_be_written_in_yaml(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    for key in config.KEYS.values():
        place = tree
        *groups, name = key.path.split(".")
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = other_value(key)
    loaded = load(write(tmp_path / "c.yaml", json.dumps(tree)))
    for key in config.KEYS.values():
        assert value_of(loaded, key.path) == other_value(key), key.path


@pytest.mark.parametrize("path", list(config.KEYS))
def test_T56_every_key_works_from_the_environment(path: str) -> None:
    value = other_value(config.KEYS[path])
    environ = {environment_name(name): _text(other_value(config.KEYS[name])) for name in NEEDED}
    environ[environment_name(path)] = _text(value)
    assert value_of(load(environ=environ), path) == value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_defaults_are_those_of_the_contract() -> None:
    loaded = load()
    expected: Mapping[str, Any] = {
        "port": 8080,
        "producerStreamAddr": "",
        "persistenceConfig.path": "./codeq-data",
        "persistenceConfig.fsyncOnCommit": True,
        "persistenceConfig.numShards": 1,
        "env": "prod",
        "defaultLeaseSeconds": 300,
        "leaseMaxSeconds": 86400,
        "maxAttemptsDefault": 5,
        "backoffPolicy": "exp_full_jitter",
        "idempotencyWindowSeconds": 86400,
        "deadRetentionSeconds": 604800,
        "limits.liveTasks": 0,
        "limits.payloadMemoryBytes": 536870912,
        "limits.connections": 10000,
        "limits.createBatch": 1000,
        "limits.bodyBytes": 33554432,
        "limits.payloadBytes": 4128768,
        "streams.sendBytes": 4194304,
        "streams.readysMax": 10000,
        "workerAudience": "codeq-worker",
        "compat.createStatus": 201,
        "raft.leaderLeaseMS": 500,
        "raft.commitMS": 50,
    }
    for path, value in expected.items():
        assert value_of(loaded, path) == value, path
    assert loaded.http_address == ("0.0.0.0", 8080)


def test_T42_no_default_names_a_host() -> None:
    for key in config.KEYS.values():
        if isinstance(key.default, str) and key.default:
            assert "://" not in key.default, key.path
            assert ":" not in key.default or key.default.startswith("localhost:"), key.path


def test_environment_names() -> None:
    names = {
        "port": "PORT",
        "raft.selfId": "RAFT_SELF_ID",
        "raft.peerHTTPAddrs": "RAFT_PEER_HTTP_ADDRS",
        "raft.heartbeatMS": "RAFT_HEARTBEAT_MS",
        "identityJwksUrl": "IDENTITY_JWKS_URL",
        "tls.http.clientCaFile": "TLS_HTTP_CLIENT_CA_FILE",
        "rateLimit.producer.requestsPerMinute": "RATE_LIMIT_PRODUCER_REQUESTS_PER_MINUTE",
    }
    assert {path: environment_name(path) for path in names} == names


# --- precedence


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "port: 1\nlimits: {createBatch: 1, claimBatch: 1}\n")
    environ = {"LIMITS_CREATE_BATCH": "2", "PORT": "2", "CODEQ_CONFIG_PATH": path}
    loaded = load(environ=environ, flags={"port": 3})
    limits = loaded.limits
    assert (loaded.port, limits.create_batch, limits.claim_batch) == (3, 2, 1)


def test_the_file_of_the_environment_may_be_missing(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    assert load(environ={"CODEQ_CONFIG_PATH": missing}).port == 8080
    assert refused(lambda: load(missing)).key == missing


def test_groups_as_json_in_the_environment() -> None:
    environ = {"LIMITS": '{"createBatch": 7, "claimBatch": 7}', "LIMITS_CREATE_BATCH": "8"}
    limits = load(environ=environ).limits
    assert (limits.create_batch, limits.claim_batch) == (8, 7)
    assert refused(lambda: load(environ={"LIMITS": "7"})).key == "limits"
    assert refused(lambda: load(environ={"LIMITS": "{"})).key == "LIMITS"
    assert refused(lambda: load(environ={"LIMITS": '{"x": 1}'})).key == "limits.x"


def test_peers_as_pairs() -> None:
    peers = load(environ={"RAFT_PEERS": "a=host:1, b=host:2"}).raft.peers
    assert peers == {"a": "host:1", "b": "host:2"}
    assert refused(lambda: load(environ={"RAFT_PEERS": "a"})).key == "RAFT_PEERS"


def test_open_telemetry_names() -> None:
    environ = {"OTEL_SERVICE_NAME": "queue", "OTEL_EXPORTER_OTLP_ENDPOINT": "host:4317"}
    loaded = load(environ=environ)
    assert (loaded.tracing_service_name, loaded.tracing_otlp_endpoint) == ("queue", "host:4317")


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("YES", True), ("0", False), ("No", False)]
)
def test_booleans(text: str, value: bool) -> None:
    assert load(environ={"ALLOW_PRODUCER_AS_WORKER": text}).allow_producer_as_worker is value


# --- refusals


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("colour: red", "colour"),
        ("limits: {colour: red}", "limits.colour"),
        ("limits: 5", "limits"),
        ("Port: 1", "Port"),
        ("port: -1", "port"),
        ("port: 70000", "port"),
        ("port: true", "port"),
        ("port: 1.5", "port"),
        ("port: [1]", "port"),
        ("httpAddr: nowhere", "httpAddr"),
        ("httpAddr: 'host:port'", "httpAddr"),
        ("httpAddr: '::1:80'", "httpAddr"),
        ("httpAddr: 'a..b:80'", "httpAddr"),
        (f"httpAddr: 'localhost:{'9' * 5000}'", "httpAddr"),
        ("persistenceConfig: {path: ' '}", "persistenceConfig.path"),
        ("logLevel: loud", "logLevel"),
        ("defaultLeaseSeconds: 0", "defaultLeaseSeconds"),
        ("defaultLeaseSeconds: 100000", "defaultLeaseSeconds"),
        ("leaseMaxSeconds: 99999999999", "leaseMaxSeconds"),
        ("compat: {createStatus: 200}", "compat.createStatus"),
        ("allowProducerAsWorker: maybe", "allowProducerAsWorker"),
        ("limits: {payloadBytes: 4194304}", "limits.payloadBytes"),
        ("persistenceProvider: postgres", "persistenceProvider"),
        ("producerAuthProvider: magic", "producerAuthProvider"),
        ("producerAuthConfig: token", "producerAuthConfig"),
        ("producerStreamAddr: ':9092'", "producerStreamAddr"),
        ("workerStreamAddr: ':9091'", "workerStreamAddr"),
        ("tracingSampleRatio: 2", "tracingSampleRatio"),
    ],
)
def test_T62_bad_settings_name_their_key(tmp_path: Path, text: str, key: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    assert refused(lambda: load(path)).key == key


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- a\n- b",
        "text",
        "\x00",
        "a: !!python/object:os.x {}",
        "logLevel: 2026-13-45",
        "a: !!timestamp x",
        "a: " + "[" * 5000,
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    assert refused(lambda: load(path)).key == path


def test_secrets_are_not_shown() -> None:
    environ = {"PRODUCER_AUTH_CONFIG": '{"token": "hush"'}
    assert "hush" not in str(refused(lambda: load(environ=environ)))


def test_an_empty_file_is_fine(tmp_path: Path) -> None:
    assert load(write(tmp_path / "c.yaml", "# nothing\n")).port == 8080


def test_ignored_keys_warn(tmp_path: Path) -> None:
    text = "redisAddr: host:1\nsharding: {a: 1}\ntimezone: UTC\n"
    loaded = load(write(tmp_path / "c.yaml", text))
    assert [line.split(":")[0] for line in loaded.warnings] == ["redisAddr", "sharding", "timezone"]


def test_settings_of_missing_features() -> None:
    environ = {
        "RAFT_ENABLED": "true",
        "RAFT_SELF_ID": "n1",
    }
    stops, warns = config.unavailable_settings(load(environ=environ))
    assert [line.partition(":")[0] for line in stops] == ["raft.enabled"]
    assert [line.partition(":")[0] for line in warns] == ["raft.selfId"]
    assert config.unavailable_settings(load()) == ([], [])


def test_names_of_missing_features_are_keys() -> None:
    for name in config.NOT_AVAILABLE:
        assert name in config.KEYS or name in config.GROUPS, name


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        (":80", ("0.0.0.0", 80)),
        ("80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert config.parse_address("httpAddr", text) == address


def test_the_shard_gets_its_settings() -> None:
    flags = {
        "limits.liveTasks": 5,
        "limits.payloadBytes": 6,
        "compat.idempotencyReplay": "lenient",
        "persistenceConfig.path": "/somewhere",
        "leaseGraceSeconds": 7,
    }
    settings = shard_settings(load(flags=flags))
    assert (settings.live_tasks_max, settings.payload_bytes_max) == (5, 6)
    assert settings.idempotency_lenient and settings.lease_grace_seconds == 7
    assert settings.path == Path("/somewhere")


# --- development mode


def test_T57_development_mode_has_two_tokens_of_one_tenant() -> None:
    loaded = dev_config()
    assert loaded.http_address == ("127.0.0.1", 8080)
    assert loaded.producer_stream_addr == "127.0.0.1:9092"
    assert loaded.worker_stream_addr == "127.0.0.1:9091"
    assert loaded.producer_auth_config == config.DEV_PRODUCER
    assert config.DEV_PRODUCER["raw"] == config.DEV_WORKER["raw"] == {"tenantId": "dev"}


def test_development_mode_takes_other_settings() -> None:
    environ = {"LOG_FORMAT": "json", "PRODUCER_AUTH_PROVIDER": "jwks", "PORT": "1234"}
    flags = {"workerStreamAddr": "[::1]:5", "logLevel": "error"}
    loaded = dev_config(environ=environ, flags=flags)
    assert loaded.http_address == ("127.0.0.1", 1234)
    assert (loaded.worker_stream_addr, loaded.log_level) == ("[::1]:5", "error")
    assert loaded.producer_auth_provider == "static"


@pytest.mark.parametrize("key", ["httpAddr", "producerStreamAddr", "workerStreamAddr"])
@pytest.mark.parametrize("address", [":80", "0.0.0.0:80", "192.168.0.1:80", "example.com:80"])
def test_development_mode_is_for_loopback(key: str, address: str) -> None:
    assert refused(lambda: dev_config(flags={key: address})).key == key


def test_development_mode_without_an_address_stays_on_loopback() -> None:
    """An empty address of REST means all interfaces elsewhere."""
    assert dev_config(flags={"httpAddr": ""}).http_address == ("127.0.0.1", 8080)
    environ = {"HTTP_ADDR": "", "PORT": "1234"}
    assert dev_config(environ=environ).http_address == ("127.0.0.1", 1234)
