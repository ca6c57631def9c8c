"""``codeq check``, ``codeq backup`` and ``codeq restore``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from codeq.cli.connection import client_of
from codeq.cli.output import print_json, print_text
from codeq.cli.profiles import (
    GIVEN,
    AsJson,
    BaseUrl,
    CaFile,
    CertFile,
    KeyFile,
    ProfileName,
    Server,
    resolve,
)
from codeq.cli.settings import ConfigFile, DataFolder


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

    return maintenance.check(
        _data_folder(data, config), repair=repair, as_json=as_json or GIVEN.get().as_json
    )


async def _backup(server: Server, name: str, *, as_json: bool) -> int:
    async with client_of(server) as client:
        made = await client.backup(name)
    if as_json:
        print_json(made)
    else:
        print_text(f"{made.path} ({made.bytes:,} bytes)")
    return 0


def backup(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    base_url: BaseUrl = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            "--producer-token",
            metavar="TOKEN",
            help="CODEQ_PRODUCER_TOKEN; of a producer with the scope codeq:operator",
        ),
    ] = None,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> int:
    """Has a running server copy its store to the folder NAME in its backupDir."""
    import asyncio

    given = GIVEN.get()
    flags = Server(base_url, token, None, ca_file, cert_file, key_file)
    server = resolve(flags, profile, given)
    return asyncio.run(_backup(server, name, as_json=as_json or given.as_json))


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
