"""Every setting of codeq as one tree: defaults < YAML file < environment < flags.

The tree is the struct ``Config``; its members' outside names are the keys. The environment name of
a key is its path in upper snake case (``raft.selfId`` is ``RAFT_SELF_ID``). An unknown key, a bad
value or an unknown provider is a ``ConfigError`` that names the key.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import yaml
from msgspec import Meta, Struct, field

INT32_MAX = 2**31 - 1
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Seconds = Annotated[int, Meta(ge=0, le=INT32_MAX)]
PositiveSeconds = Annotated[int, Meta(ge=1, le=INT32_MAX)]
AttemptsMax = Annotated[int, Meta(ge=1, le=INT32_MAX)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
ProviderConfig = str | dict[str, Any] | None


class ConfigError(Exception):
    """A setting that cannot be used; the text is one line that begins with the key's name."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


class TlsListener(Struct, rename="camel", frozen=True):
    """Files of one listener; empty = clear text."""

    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""


class Tls(Struct, rename="camel", frozen=True):
    """TLS per listener."""

    http: TlsListener = TlsListener()
    producer: TlsListener = TlsListener()
    worker: TlsListener = TlsListener()


class Persistence(Struct, rename="camel", frozen=True):
    """The store: its folder, whether commits are synced, and the number of shards."""

    path: str = "./codeq-data"
    fsync_on_commit: bool = True
    num_shards: Annotated[int, Meta(ge=1, le=4096)] = 1


class Limits(Struct, rename="camel", frozen=True):
    """Bounds on memory, disk, batches and bodies; ``live_tasks`` 0 = no limit."""

    live_tasks: Count = 0
    payload_memory_bytes: Count = 512 << 20
    journal_pending_bytes: Positive = 64 << 20
    inflight_bytes: Positive = 512 << 20
    disk_reserve_bytes: Count = 1 << 30
    connections: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    create_batch: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    claim_batch: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    result_batch: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    body_bytes: Annotated[int, Meta(ge=1024, le=2**31)] = 33_554_432
    payload_bytes: Annotated[int, Meta(ge=1, le=2**30)] = 4_128_768
    result_bytes: Annotated[int, Meta(ge=1, le=2**30)] = 4_128_768


class Compat(Struct, rename="camel", frozen=True):
    """Answers that some clients of the reference expect."""

    create_status: Literal[201, 202] = 201
    idempotency_replay: Literal["strict", "lenient"] = "strict"


class Streams(Struct, rename="camel", frozen=True):
    """Bounds of the gRPC streams."""

    send_bytes: Annotated[int, Meta(ge=131_072, le=2**31 - 1)] = 4_194_304
    receive_bytes: Annotated[int, Meta(ge=131_072, le=2**31 - 1)] = 16_777_216
    inflight_bytes: Positive = 8_388_608
    ready_count_max: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    readys_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    inflight_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024
    hello_timeout_seconds: PositiveSeconds = 10
    end_at_token_expiry: bool = False


class Webhooks(Struct, rename="camel", frozen=True):
    """Sending of results to webhooks."""

    allow_private_networks: bool = False
    concurrency: Positive = 64
    per_host: Positive = 8


class RateLimitBucket(Struct, rename="camel", frozen=True):
    """One token bucket; off unless both are above zero."""

    requests_per_minute: Count = 0
    burst_size: Count = 0


class RateLimit(Struct, rename="camel", frozen=True):
    """Token buckets by scope."""

    producer: RateLimitBucket = RateLimitBucket()
    worker: RateLimitBucket = RateLimitBucket()
    webhook: RateLimitBucket = RateLimitBucket()
    admin: RateLimitBucket = RateLimitBucket()


class Metrics(Struct, rename="camel", frozen=True):
    """What the scrape shows."""

    command_labels_max: Annotated[int, Meta(ge=1, le=100_000)] = 1000


class Raft(Struct, rename="camel", frozen=True):
    """Replication."""

    enabled: bool = False
    self_id: str = ""
    bind_addr: str = ""
    bootstrap: bool = False
    peers: dict[str, str] = {}
    mux_enabled: bool = False
    peer_http_addrs: dict[str, str] = field(default_factory=dict, name="peerHTTPAddrs")
    heartbeat_ms: Positive = field(default=1000, name="heartbeatMS")
    election_ms: Positive = field(default=1000, name="electionMS")
    leader_lease_ms: Positive = field(default=500, name="leaderLeaseMS")
    commit_ms: Positive = field(default=50, name="commitMS")
    apply_timeout_seconds: PositiveSeconds = 10
    topic_catalog_protocol: str = ""


class Config(Struct, rename="camel", frozen=True):
    """All settings. ``warnings`` is no key: lines to log once logging is set up."""

    port: Port = 8080
    http_addr: str = ""
    producer_stream_addr: str = ""
    worker_stream_addr: str = ""
    tls: Tls = Tls()
    persistence_provider: Literal["rocksdb", "pebble"] = "rocksdb"
    persistence_config: Persistence = Persistence()
    env: str = "prod"
    log_level: Literal["debug", "info", "warn", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"
    default_lease_seconds: PositiveSeconds = 300
    lease_max_seconds: PositiveSeconds = 86_400
    max_attempts_default: AttemptsMax = 5
    backoff_policy: Literal[
        "fixed", "linear", "exponential", "exp_equal_jitter", "exp_full_jitter"
    ] = "exp_full_jitter"
    backoff_base_seconds: Seconds = 5
    backoff_max_seconds: Seconds = 900
    nack_delay_max_seconds: Seconds = 86_400
    idempotency_window_seconds: PositiveSeconds = 86_400
    retention_seconds: Seconds = 86_400
    dead_retention_seconds: Seconds = 604_800
    lease_grace_seconds: Seconds = 10
    limits: Limits = Limits()
    compat: Compat = Compat()
    streams: Streams = Streams()
    backup_dir: str = "./codeq-backups"
    producer_auth_provider: str = ""
    producer_auth_config: ProviderConfig = None
    worker_auth_provider: str = ""
    worker_auth_config: ProviderConfig = None
    identity_jwks_url: str = ""
    identity_issuer: str = ""
    identity_audience: str = ""
    identity_service_url: str = ""
    worker_jwks_url: str = ""
    worker_issuer: str = ""
    worker_audience: str = "codeq-worker"
    allowed_clock_skew_seconds: Seconds = 60
    allow_producer_as_worker: bool = False
    webhook_hmac_secret: str = ""
    result_webhook_max_attempts: AttemptsMax = 5
    result_webhook_base_backoff_seconds: Seconds = 2
    result_webhook_max_backoff_seconds: Seconds = 60
    webhooks: Webhooks = Webhooks()
    subscription_min_interval_seconds: Seconds = 5
    subscription_cleanup_interval_seconds: PositiveSeconds = 60
    rate_limit: RateLimit = RateLimit()
    metrics: Metrics = Metrics()
    tracing_enabled: bool = False
    tracing_service_name: str = "codeq"
    tracing_otlp_endpoint: str = "localhost:4317"
    tracing_otlp_insecure: bool = False
    tracing_sample_ratio: Ratio = 1.0
    raft: Raft = Raft()
    warnings: tuple[str, ...] = ()

    @property
    def http_address(self) -> tuple[str, int]:
        """(host, port) of the REST listener."""
        if self.http_addr:
            return parse_address("httpAddr", self.http_addr)
        return "0.0.0.0", self.port


#: Keys of the reference that mean nothing here: ignored with a warning.
IGNORED = (
    "localArtifactsDir",
    "redisAddr",
    "redisPassword",
    "sharding",
    "cluster",
    "timezone",
    "requeueInspectLimit",
    "identityServiceApiKey",
)
#: Environment names beside the regular ones.
ALIASES = {
    "OTEL_SERVICE_NAME": "tracingServiceName",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "tracingOtlpEndpoint",
    "OTEL_EXPORTER_OTLP_INSECURE": "tracingOtlpInsecure",
}
#: Keys (or groups of keys) whose feature this release does not have. True: any value but the
#: default stops the start, because the server would not do what it asks for. False: alone it asks
#: for nothing, so it is taken with a warning. The longest name that fits a key counts.
NOT_AVAILABLE: dict[str, bool] = {
    "raft": False,
    "raft.enabled": True,
}
PROVIDERS = ("static", "jwks", "multi")


class Key(NamedTuple):
    """One leaf of the tree: its dotted path, type and default."""

    path: str
    type: Any
    default: Any


def _keys(struct: type[Struct], prefix: str = "") -> list[Key]:
    found: list[Key] = []
    for member in msgspec.structs.fields(struct):
        path = prefix + member.encode_name
        if path == "warnings":
            continue
        if isinstance(member.type, type) and issubclass(member.type, Struct):
            found += _keys(member.type, path + ".")
        else:
            has_factory = member.default is msgspec.NODEFAULT
            default = member.default_factory() if has_factory else member.default
            found.append(Key(path, member.type, default))
    return found


KEYS: dict[str, Key] = {key.path: key for key in _keys(Config)}
GROUPS = {path[:end] for path in KEYS for end in range(len(path)) if path[end] == "."}


def environment_name(path: str) -> str:
    """``raft.selfId`` -> ``RAFT_SELF_ID``, ``raft.peerHTTPAddrs`` -> ``RAFT_PEER_HTTP_ADDRS``."""
    words = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", path)
    return words.replace(".", "_").upper()


def load(
    path: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The settings of file, environment and flags (dotted key -> value), in rising order.

    ``path`` None takes the environment's ``CODEQ_CONFIG_PATH``, whose file may be missing; a file
    named by ``path`` must exist. Raises ConfigError.
    """
    return Given.of(path, environ or {}, flags or {}).build()


DEV_TENANT = "dev"
DEV_PRODUCER = {
    "token": "dev-producer",
    "subject": "dev-producer",
    "scopes": ["codeq:admin"],
    "raw": {"tenantId": DEV_TENANT},
}
DEV_WORKER = {
    "token": "dev-worker",
    "subject": "dev-worker",
    "scopes": [
        "codeq:claim",
        "codeq:heartbeat",
        "codeq:abandon",
        "codeq:nack",
        "codeq:result",
        "codeq:subscribe",
    ],
    "eventTypes": ["*"],
    "raw": {"tenantId": DEV_TENANT},
}
DEV_TOKENS: dict[str, Any] = {
    "producerAuthProvider": "static",
    "producerAuthConfig": DEV_PRODUCER,
    "workerAuthProvider": "static",
    "workerAuthConfig": DEV_WORKER,
}
DEV_DEFAULTS: dict[str, Any] = {
    "producerStreamAddr": "127.0.0.1:9092",
    "workerStreamAddr": "127.0.0.1:9091",
    "logFormat": "text",
}


def dev_config(
    path: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """As ``load``, for trying codeq out: three listeners on 127.0.0.1 and the two static tokens
    ``dev-producer`` and ``dev-worker`` of tenant ``dev``, whatever file and environment say of
    tokens. An address that is not loopback is a ConfigError: these tokens are no secrets."""
    return _dev(Given.of(path, environ or {}, flags or {}))


def _dev(given: Given) -> Config:
    values = given.values
    if not values.get("httpAddr"):  # an empty one would mean all interfaces
        given.set("httpAddr", f"127.0.0.1:{values.get('port', 8080)}", "development")
    for key, value in {**DEV_DEFAULTS, **DEV_TOKENS}.items():
        if key in DEV_TOKENS or key not in values:
            given.set(key, value, "development")
    config = given.build()
    for key in ("httpAddr", "producerStreamAddr", "workerStreamAddr"):
        _require_loopback(key, value_of(config, key))
    return config


class Setting(NamedTuple):
    """One key as it counts. ``source``: default, file, environment, flag or development."""

    key: str
    value: Any
    source: str


def explain(
    path: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    dev: bool = False,
) -> list[Setting]:
    """Every key as ``load``, or ``dev_config``, would have it; secrets are masked."""
    given = Given.of(path, environ or {}, flags or {})
    config = _dev(given) if dev else given.build()
    return [
        Setting(key, _masked(key, value_of(config, key)), given.sources.get(key, "default"))
        for key in KEYS
    ]


def value_of(config: Config, path: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, _attribute(type(value), name))
    return value


def unavailable_settings(config: Config) -> tuple[list[str], list[str]]:
    """(what stops the start, what is only to be warned of): one line per setting of a feature that
    this release does not have."""
    stops: list[str] = []
    warns: list[str] = []
    for key in KEYS.values():
        names = [n for n in NOT_AVAILABLE if key.path == n or key.path.startswith(n + ".")]
        if not names or value_of(config, key.path) == key.default:
            continue
        lines = stops if NOT_AVAILABLE[max(names, key=len)] else warns
        lines.append(f"{key.path}: not available in this release")
    return stops, warns


def parse_address(key: str, text: str) -> tuple[str, int]:
    """(host, port) of ``HOST:PORT``, ``[IPV6]:PORT``, ``:PORT`` (all interfaces) or ``PORT``."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(key, f"not an address (HOST:PORT): {text!r}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5) or int(port) > 65535:
        raise ConfigError(key, f"not an address (HOST:PORT): {text!r}")
    try:
        host.encode("idna")  # what every look-up of the name does first
    except UnicodeError:
        raise ConfigError(key, f"not the name of a host: {host!r}") from None
    return host or "0.0.0.0", int(port)


class Given:
    """What is set anywhere, by dotted key, and where; lines to warn with."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.warnings: list[str] = []

    @classmethod
    def of(cls, path: str | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Given:
        """What file, environment and flags say; the later ones win."""
        given = cls()
        _read_file(path, environ.get("CODEQ_CONFIG_PATH", ""), given)
        _read_environment(environ, given)
        for key, value in flags.items():
            given.set(key, value, "flag")
        return given

    def set(self, path: str, value: Any, source: str) -> None:
        """Files a value under its key; mappings of a group are taken apart."""
        if path in IGNORED:
            self.warnings.append(f"{path}: has no meaning here, ignored")
        elif path in GROUPS:
            if not isinstance(value, dict | None):
                raise ConfigError(path, "must be a mapping of keys to values")
            for name, inner in (value or {}).items():
                self.set(f"{path}.{name}", inner, source)
        elif path in KEYS:
            self.values[path] = _convert(KEYS[path], value)
            self.sources[path] = source
        else:
            raise ConfigError(path, "unknown key")

    def build(self) -> Config:
        """The tree, once more than single values was looked at."""
        config: Config = _struct(Config, {**self.values, "warnings": tuple(self.warnings)}, "")
        _check(config)
        return config


def _attribute(struct: type[Struct], name: str) -> str:
    for member in msgspec.structs.fields(struct):
        if member.encode_name == name:
            return member.name
    raise KeyError(name)


def _read_file(path: str | None, fallback: str, given: Given) -> None:
    name = path or fallback
    if not name:
        return
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        if path:
            raise ConfigError(name, "no such file") from None
        return
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(name, f"cannot be read: {error}") from None
    try:
        tree = yaml.safe_load(text)
    except Exception as error:  # a date that is none, or deep nesting, is no YAMLError
        raise ConfigError(name, "not YAML: " + " ".join(str(error).split())) from None
    if tree is None:
        return
    if not isinstance(tree, dict):
        raise ConfigError(name, "must be a mapping of keys to values")
    for key, value in tree.items():
        given.set(str(key), value, "file")


def _read_environment(environ: Mapping[str, str], given: Given) -> None:
    """Groups first, so that ``LIMITS_CREATE_BATCH`` wins over ``LIMITS``."""
    names = [(environment_name(path), path) for path in (*sorted(GROUPS), *KEYS, *IGNORED)]
    for name, key in (*ALIASES.items(), *names):
        if name in environ:
            given.set(key, _from_text(name, key, environ[name]), "environment")


def _from_text(name: str, key: str, text: str) -> Any:
    """A value from the environment: JSON for nested values, else the text itself."""
    nested = key in GROUPS or key in ("raft.peers", "raft.peerHTTPAddrs")
    if not nested and not (key in KEYS and KEYS[key].type == ProviderConfig):
        return text
    if not nested and not text.lstrip().startswith("{"):
        return text
    if key.startswith("raft.peer") and not text.lstrip().startswith("{"):
        return _pairs(name, text)
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(name, "must be a JSON object") from None


def _pairs(name: str, text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not sign or not left.strip() for left, sign, _ in pairs):
        raise ConfigError(name, "must be id=addr,id=addr")
    return {left.strip(): right.strip() for left, _, right in pairs}


def _convert(key: Key, value: Any) -> Any:
    """The value in the key's type; text counts as a number, as the environment has only text."""
    if value is None:
        return key.default
    if key.type is bool:
        return _boolean(key.path, value)
    if key.type is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and key.type != ProviderConfig:
        value = value.strip()
    try:
        return msgspec.convert(value, key.type, strict=isinstance(value, bool))
    except msgspec.ValidationError as error:
        raise ConfigError(key.path, f"bad value {_shown(key, value)}: {error}") from None


def _boolean(path: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "1", "yes"):
        return True
    if text in ("false", "0", "no", ""):
        return False
    raise ConfigError(path, f"bad value {value!r}: must be true or false")


#: Shown in place of a secret
MASK = "***"
#: Members of a provider's settings that are no secrets
_PLAIN = frozenset(
    {
        *("type", "subject", "email", "scopes", "eventTypes", "raw"),
        *("jwksUrl", "issuer", "audience", "clockSkew", "httpTimeout"),
    }
)
_USER_INFO = re.compile(r"(://)[^/@]*@")


def _masked(key: str, value: Any) -> Any:
    """The value without what must not be seen: tokens, keys, passwords in URLs."""
    if not value:
        return value
    if KEYS[key].type == ProviderConfig:
        return _masked_provider(value)
    if "secret" in key.lower():
        return MASK
    return _USER_INFO.sub(rf"\1{MASK}@", value) if isinstance(value, str) else value


def _masked_provider(value: Any) -> Any:
    if isinstance(value, list):
        return [_masked_provider(item) for item in value]
    if not isinstance(value, dict):
        return MASK
    return {name: _masked_member(name, inner) for name, inner in value.items()}


def _masked_member(name: str, value: Any) -> Any:
    if name in ("config", "providers"):
        return _masked_provider(value)
    if name not in _PLAIN:
        return MASK
    return _USER_INFO.sub(rf"\1{MASK}@", value) if isinstance(value, str) else value


def _shown(key: Key, value: Any) -> str:
    """A value for an error line, but never a secret."""
    if key.type == ProviderConfig or "secret" in key.path.lower():
        return "(not shown)"
    return repr(value)


def _struct(struct: type[Struct], values: dict[str, Any], prefix: str) -> Any:
    members: dict[str, Any] = {}
    for member in msgspec.structs.fields(struct):
        path = prefix + member.encode_name
        if path in GROUPS:
            members[member.name] = _struct(member.type, values, path + ".")
        elif path in values:
            members[member.name] = values[path]
    return struct(**members)


def _check(config: Config) -> None:
    """What no single value shows."""
    for key in ("httpAddr", "producerStreamAddr", "workerStreamAddr"):
        if value_of(config, key):
            parse_address(key, value_of(config, key))
    for role in ("producer", "worker"):
        _check_provider(config, role)
    for listener in ("http", "producer", "worker"):
        _check_tls(value_of(config, f"tls.{listener}"), f"tls.{listener}")
    if not config.persistence_config.path:
        raise ConfigError("persistenceConfig.path", "must not be empty")
    if config.limits.payload_bytes > config.streams.send_bytes - 65_536:
        raise ConfigError("limits.payloadBytes", "must stay 65536 below streams.sendBytes")
    if config.default_lease_seconds > config.lease_max_seconds:
        raise ConfigError("defaultLeaseSeconds", "must not be above leaseMaxSeconds")


def _check_tls(files: TlsListener, key: str) -> None:
    """Whether the files make a pair is seen when they are read, at the start."""
    if files.cert_file and not files.key_file:
        raise ConfigError(f"{key}.keyFile", "is missing beside certFile")
    for name, path in (("keyFile", files.key_file), ("clientCaFile", files.client_ca_file)):
        if path and not files.cert_file:
            raise ConfigError(f"{key}.certFile", f"is missing beside {name}")


def _check_provider(config: Config, role: str) -> None:
    provider = value_of(config, f"{role}AuthProvider")
    settings = value_of(config, f"{role}AuthConfig")
    if provider and provider not in PROVIDERS:
        raise ConfigError(f"{role}AuthProvider", f"unknown provider {provider!r}")
    if settings and not provider:
        raise ConfigError(f"{role}AuthConfig", f"is set without {role}AuthProvider")
    if value_of(config, f"{role}StreamAddr") and not (provider or _jwks_url(config, role)):
        raise ConfigError(f"{role}StreamAddr", f"is set without a provider of {role} tokens")


def _jwks_url(config: Config, role: str) -> str:
    if role == "worker":
        return config.worker_jwks_url
    return config.identity_jwks_url or config.identity_service_url


def _require_loopback(key: str, address: str) -> None:
    if not address:
        return
    host, _ = parse_address(key, address)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(key, f"must be a loopback address in development mode, not {address}")
