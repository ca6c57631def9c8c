"""``codeq config``: settings, without starting a server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from codeq.cli.output import refuse
from codeq.cli.profiles import GIVEN, AsJson

app = typer.Typer(rich_markup_mode=None, help="Settings, without starting a server.")

HostPort = Annotated[str | None, typer.Option(metavar="HOST:PORT")]
ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML settings")]
DataFolder = Annotated[str | None, typer.Option(metavar="DIR", help="where tasks are kept")]
SettingsFile = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", show_default=False, help="default: $CODEQ_CONFIG_PATH"),
]
DevMode = Annotated[bool, typer.Option("--dev", help="as codeq serve --dev would have them")]


def flags_of(
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


@app.command("check")
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
        return refuse(str(error))
    for warning in warnings:
        print(f"warning: {warning}")
    print("good")
    return 0


@app.command("show")
def config_show(
    file: SettingsFile = None,
    data: DataFolder = None,
    http: HostPort = None,
    producer_stream: HostPort = None,
    worker_stream: HostPort = None,
    dev: DevMode = False,
    as_json: AsJson = False,
) -> int:
    """Every key with its value and where it comes from, for the same options as codeq serve.

    That is default, file, environment, flag or (with --dev) development. Secrets are masked.
    """
    from codeq import config

    flags = flags_of(data, http, producer_stream, worker_stream)
    try:
        rows = config.explain(None if file is None else str(file), os.environ, flags, dev=dev)
    except config.ConfigError as error:
        return refuse(str(error))
    if as_json or GIVEN.get().as_json:
        shown = {row.key: {"value": row.value, "source": row.source} for row in rows}
        print(json.dumps(shown, indent=2))
        return 0
    width = max(len(row.key) for row in rows)
    for row in rows:
        value = row.value if isinstance(row.value, str) else json.dumps(row.value)
        print(f"{row.key:<{width}}  {row.source:<11}  {value}".rstrip())
    return 0
