"""``codeq check``, ``codeq backup`` and ``codeq restore``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from codeq.cli.connection import SHARED, Call, remote
from codeq.cli.output import print_text
from codeq.cli.profiles import GIVEN, AsJson
from codeq.cli.settings import ConfigFile, DataFolder

OperatorToken = Annotated[
    str | None,
    typer.Option(
        "--token",
        "--producer-token",
        metavar="TOKEN",
        help="CODEQ_PRODUCER_TOKEN; of a producer with the scope codeq:operator",
    ),
]


def check(
    data: DataFolder = None,
    config: ConfigFile = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="keep what can be kept; accept and list what cannot")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="with --repair: write a sound folder anew as well")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Reads what is kept in a data folder while no server uses it, and says whether it is sound.

    Changes nothing without --repair; with it, the old files stay in a folder beside the new ones.
    Ends with 0 when all is sound or repaired without a loss, with 1 when something is lost.
    """
    if anyway and not repair:
        raise typer.BadParameter("--anyway goes with --repair")
    from codeq import maintenance

    return maintenance.check(
        _data_folder(data, config),
        repair=repair,
        anyway=anyway,
        as_json=as_json or GIVEN.get().as_json,
    )


@partial(remote, options_of={**SHARED, "producer_token": OperatorToken})
async def backup(call: Call, name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Has a running server copy its store to the folder NAME in its backupDir."""
    made = await call.client.backup(name)
    call.show(made, lambda: print_text(f"{made.path} ({made.bytes:,} bytes)"))


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
