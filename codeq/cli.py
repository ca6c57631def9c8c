"""The command ``codeq``. Bad input is one line on standard error and a non-zero exit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from codeq import __version__
from codeq.errors import CodeqError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

HostPort = Annotated[str | None, typer.Option(metavar="HOST:PORT")]
ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML settings")]
DataFolder = Annotated[str | None, typer.Option(metavar="DIR", help="where tasks are kept")]
Token = Annotated[str, typer.Option(metavar="TOKEN")]
Words = Annotated[list[str] | None, typer.Option(metavar="NAME", help="repeatable")]

token = typer.Typer(rich_markup_mode=None, help="Keys and signed tokens to try things with.")
app.add_typer(token, name="token")
settings = typer.Typer(rich_markup_mode=None, help="Settings, without starting a server.")
app.add_typer(settings, name="config")

SettingsFile = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", show_default=False, help="default: $CODEQ_CONFIG_PATH"),
]
DevMode = Annotated[bool, typer.Option("--dev", help="as codeq serve --dev would have them")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"codeq {__version__}")
        raise typer.Exit


@app.callback()
def codeq(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """A durable task queue: server, demo and tools."""


@app.command()
def serve(
    config: ConfigFile = None,
    data: DataFolder = None,
    http: HostPort = None,
    producer_stream: HostPort = None,
    worker_stream: HostPort = None,
    dev: Annotated[
        bool,
        typer.Option(
            "--dev", help="on loopback only, with the two tokens dev-producer and dev-worker"
        ),
    ] = False,
) -> int:
    """Serves until SIGTERM or SIGINT. Prints one line when ready: ready http=... pid=N."""
    from codeq import config as settings
    from codeq.server.app import serve as serve_forever

    flags = _flags(data, http, producer_stream, worker_stream)
    load = settings.dev_config if dev else settings.load
    try:
        tree = load(None if config is None else str(config), os.environ, flags)
    except settings.ConfigError as error:
        return _refuse(str(error))
    return serve_forever(tree)


@app.command()
def demo(
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", show_default=False)] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="use this server, and do not restart it")
    ] = None,
    producer_stream: HostPort = None,
    worker_stream: HostPort = None,
    producer_token: Token = "dev-producer",
    worker_token: Token = "dev-worker",
    workers: Annotated[int, typer.Option(min=2, max=64)] = 3,
) -> int:
    """One task per file under PATH (default: Python's standard library), through two kill -9.

    Worker processes read the files; one of them and the server are killed on the way. Ends with 0
    only when every file has exactly one correct result and tasks were redelivered.
    """
    from codeq import demo as show
    from codeq.client.local import addresses_of

    target = None
    if url is not None:
        target = show.Target(
            *addresses_of(url, producer_stream, worker_stream), producer_token, worker_token
        )
    return show.run(path, target, workers)


@app.command()
def bench(
    surface: Annotated[
        list[str] | None, typer.Option(help="only this one; repeatable; a wrong name lists them")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="of each measurement")] = 10.0,
    runs: Annotated[int, typer.Option(min=1, max=100)] = 1,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.1, help="tasks per second, on a fixed schedule; repeatable"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=1000, help="tasks per call")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="calls under way")] = None,
    streams: Annotated[int | None, typer.Option(min=1, max=1000)] = None,
    payload: Annotated[int, typer.Option(min=64, max=4_000_000, help="bytes")] = 200,
    keys: Annotated[
        bool, typer.Option("--keys", help="over streams: the client makes idempotency keys")
    ] = False,
    sync: Annotated[bool, typer.Option("--sync/--no-sync", help="sync before each ack")] = True,
    retention: Annotated[
        int, typer.Option(min=0, metavar="SECONDS", help="ended tasks go after this; 0 = default")
    ] = 0,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="use this server instead of fresh ones")
    ] = None,
    peer: Annotated[str, typer.Option(help="compare with postgres or redis-streams")] = "",
    producer_stream: HostPort = None,
    worker_stream: HostPort = None,
    producer_token: Token = "dev-producer",
    worker_token: Token = "dev-worker",
    json: Annotated[str, typer.Option(metavar="FILE", help="- = standard output")] = "",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png")] = None,
) -> int:
    """Loads a server of its own through the public client and REST; prints a table."""
    try:
        from codeq.bench.run import Options, run
        from codeq.bench.target import Codeq
    except ModuleNotFoundError as error:
        return _refuse(f"codeq bench needs {error.name}: pip install codeq[bench]")
    from codeq.client.local import addresses_of

    target = None
    if url is not None:
        target = Codeq(
            *addresses_of(url, producer_stream, worker_stream), producer_token, worker_token
        )
    return run(
        Options(
            surfaces=surface or [],
            seconds=seconds,
            runs=runs,
            rates=rate or [],
            batch=batch,
            calls=concurrency,
            streams=streams,
            payload_bytes=payload,
            make_keys=keys,
            sync=sync,
            retention_seconds=retention,
            target=target,
            peer=peer,
            json=json,
            plot=plot,
        )
    )


@token.command("key")
def token_key(
    out: Annotated[Path, typer.Option(metavar="FILE", help="the private key, a new file")],
    alg: Annotated[str, typer.Option(metavar="EdDSA|ES256|RS256")] = "EdDSA",
    jwks: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="the set to add the public key to [FILE.jwks.json]"),
    ] = None,
) -> None:
    """Makes a key to sign tokens with, and the set of public keys (JWKS) that a server reads."""
    from codeq import tokens

    made = tokens.make_key(alg, out, jwks)
    print(f"key {made.kid}\nprivate {made.private}\npublic {made.jwks}")


@token.command("sign")
def token_sign(
    key: Annotated[Path, typer.Option(metavar="FILE", help="the private key (PEM)")],
    subject: Annotated[str, typer.Option(metavar="NAME")],
    issuer: Annotated[str, typer.Option(metavar="NAME")],
    audience: Annotated[str, typer.Option(metavar="NAME")],
    tenant: Annotated[str, typer.Option(metavar="NAME", help="default: the subject")] = "",
    scope: Words = None,
    event_types: Words = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="the six scopes of workers, and all event types")
    ] = False,
    expires: Annotated[str, typer.Option(metavar="DURATION")] = "1h",
    claim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help="repeatable; wins over the rest")
    ] = None,
) -> None:
    """Prints a signed token."""
    from codeq import tokens

    scopes, commands = [*(scope or ())], [*(event_types or ())]
    if worker:
        scopes, commands = [*tokens.WORKER_SCOPES, *scopes], commands or ["*"]
    claims = tokens.Claims(
        subject, issuer, audience, tenant, scopes, commands, expires, claim or ()
    )
    print(tokens.sign(key, claims))


@token.command("show")
def token_show(text: Annotated[str, typer.Argument(metavar="TOKEN")]) -> None:
    """Prints header and claims of a token as JSON. Its signature is not checked."""
    from codeq import tokens

    print(json.dumps(tokens.show(text), indent=2, ensure_ascii=False))


def _flags(
    data: str | None, http: str | None, producer_stream: str | None, worker_stream: str | None
) -> dict[str, str]:
    """The settings that have a flag of their own, as far as they were given."""
    given = {
        "persistenceConfig.path": data,
        "httpAddr": http,
        "producerStreamAddr": producer_stream,
        "workerStreamAddr": worker_stream,
    }
    return {key: value for key, value in given.items() if value is not None}


@settings.command("check")
def config_check(file: SettingsFile = None, dev: DevMode = False) -> int:
    """Says whether a server would start with these settings, and what it would warn of.

    Ends with 0 when it would; else one line names the key.
    """
    from codeq import config
    from codeq.server.app import check

    load = config.dev_config if dev else config.load
    try:
        warnings = check(load(None if file is None else str(file), os.environ))
    except config.ConfigError as error:
        return _refuse(str(error))
    for warning in warnings:
        print(f"warning: {warning}")
    print("good")
    return 0


@settings.command("show")
def config_show(
    file: SettingsFile = None,
    data: Annotated[str | None, typer.Option(metavar="DIR")] = None,
    http: HostPort = None,
    producer_stream: HostPort = None,
    worker_stream: HostPort = None,
    dev: DevMode = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> int:
    """Every key with its value and where it comes from, for the same options as codeq serve.

    That is default, file, environment, flag or (with --dev) development. Secrets are masked.
    """
    from codeq import config

    flags = _flags(data, http, producer_stream, worker_stream)
    try:
        rows = config.explain(None if file is None else str(file), os.environ, flags, dev=dev)
    except config.ConfigError as error:
        return _refuse(str(error))
    if as_json:
        shown = {row.key: {"value": row.value, "source": row.source} for row in rows}
        print(json.dumps(shown, indent=2))
        return 0
    width = max(len(row.key) for row in rows)
    for row in rows:
        value = row.value if isinstance(row.value, str) else json.dumps(row.value)
        print(f"{row.key:<{width}}  {row.source:<11}  {value}".rstrip())
    return 0


@app.command()
def check(
    data: DataFolder = None,
    config: ConfigFile = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="keep what can be kept; accept and list what cannot")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> int:
    """Reads a whole data folder while no server uses it, and says whether it is sound.

    Changes nothing without --repair; with it, the old files stay in a folder beside the new ones.
    Ends with 0 when all is sound or repaired without a loss, with 1 when something is lost.
    """
    from codeq import maintenance

    return maintenance.check(_data_folder(data, config), repair=repair, as_json=as_json)


@app.command()
def backup(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    base_url: Annotated[
        str, typer.Option(envvar="CODEQ_BASE_URL", metavar="URL")
    ] = "http://localhost:8080",
    token: Annotated[
        str,
        typer.Option(
            "--token",
            "--producer-token",
            envvar="CODEQ_PRODUCER_TOKEN",
            metavar="TOKEN",
            help="of a producer with the scope codeq:operator",
        ),
    ] = "",
) -> int:
    """Has a running server copy its store to the folder NAME in its backupDir."""
    from codeq import maintenance

    return maintenance.backup(base_url, token, name)


@app.command()
def restore(
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="the folder of a backup")],
    data: DataFolder = None,
    config: ConfigFile = None,
) -> int:
    """Makes the empty folder --data a copy of BACKUP, for codeq serve to start from."""
    from codeq import maintenance

    return maintenance.restore(backup, _data_folder(data, config))


def _data_folder(data: str | None, config: Path | None) -> Path:
    """Where the tasks are, by flag, file and environment; a bad setting is a usage error."""
    from codeq import config as settings

    flags = {} if data is None else {"persistenceConfig.path": data}
    try:
        tree = settings.load(None if config is None else str(config), os.environ, flags)
    except settings.ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return Path(tree.persistence_config.path)


def _refuse(message: str) -> int:
    print(f"codeq: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USAGE


#: What the command-line library raises for wrong arguments; it does not export the name.
USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if "Click" in base.__name__)


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code of the process."""
    try:
        code = app(list(arguments), prog_name="codeq", standalone_mode=False)
    except USAGE_ERROR as error:
        return _refuse(f"{error.format_message()} (see codeq --help)")
    except CodeqError as error:
        _refuse(error.message)
        return EXIT_FAILED
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the command."""
    sys.exit(run(sys.argv[1:]))
