"""The application: which commands there are, and how one of them is run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from codeq import __version__
from codeq.cli import (
    dead,
    profiles,
    queues,
    serve,
    settings,
    store,
    tasks,
    tokens,
    top,
    topics,
    workers,
)
from codeq.cli.output import EXIT_CODES, EXIT_INTERRUPTED, complain, exit_code, refuse
from codeq.cli.profiles import (
    GIVEN,
    AsJson,
    BaseUrl,
    CaFile,
    CertFile,
    Given,
    KeyFile,
    ProducerToken,
    ProfileName,
    Server,
    WorkerToken,
)
from codeq.cli.status import status
from codeq.errors import CodeqError

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=f"A durable task queue: server, command line, demo and tools.\n\n{EXIT_CODES}",
)
for name, nouns in {
    "task": tasks.app,
    "worker": workers.app,
    "queue": queues.app,
    "dead": dead.app,
    "topic": topics.app,
    "auth": profiles.app,
    "token": tokens.app,
    "config": settings.app,
}.items():
    app.add_typer(nouns, name=name)
for command in (
    *(serve.serve, serve.demo, serve.bench, status, top.top),
    *(store.check, store.backup, store.restore),
):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"codeq {__version__}")
        raise typer.Exit


@app.callback()
def codeq(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True)
    ] = False,
    base_url: BaseUrl = None,
    producer_token: ProducerToken = None,
    worker_token: WorkerToken = None,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    # Its help is that of the application.
    server = Server(base_url, producer_token, worker_token, ca_file, cert_file, key_file)
    GIVEN.set(Given(server, profile, as_json))


#: What the command-line library raises for wrong arguments; it does not export the name.
USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if "Click" in base.__name__)


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code of the process."""
    try:
        code = app(list(arguments), prog_name="codeq", standalone_mode=False)
    except USAGE_ERROR as error:
        return refuse(f"{error.format_message()} (see codeq --help)")
    except CodeqError as error:
        complain(error.message)
        return exit_code(error)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads the rest
        return 0
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the command."""
    sys.exit(run(sys.argv[1:]))
