"""``codeq serve``, ``codeq demo`` and ``codeq bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from codeq.cli.output import refuse
from codeq.cli.settings import ConfigFile, DataFolder, HostPort, flags_of

Token = Annotated[str, typer.Option(metavar="TOKEN")]


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

    flags = flags_of(data, http, producer_stream, worker_stream)
    load = settings.dev_config if dev else settings.load
    try:
        tree = load(None if config is None else str(config), os.environ, flags)
    except settings.ConfigError as error:
        return refuse(str(error))
    return serve_forever(tree)


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
        return refuse(f"codeq bench needs {error.name}: pip install codeq[bench]")
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
