"""Commands that talk to a server: what they have in common."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from codeq.cli.output import EXIT_CODES, print_json
from codeq.cli.profiles import (
    GIVEN,
    AsJson,
    BaseUrl,
    CaFile,
    CertFile,
    KeyFile,
    ProducerToken,
    ProfileName,
    Server,
    WorkerToken,
    resolve,
)
from codeq.errors import CodeqError

if TYPE_CHECKING:
    from codeq.client.rest import Client

DEFAULT_URL = "http://localhost:8080"
#: How long a command tries what may be repeated; who waits longer starts it again.
RETRY_SECONDS = 3.0
#: Refusals that another try may not meet
PASSING = ("unavailable", "rate-limited", "internal")

Tenant = Annotated[
    str, typer.Option(metavar="NAME", help="for operators: whose queues; default: every tenant's")
]
TaskTenant = Annotated[
    str,
    typer.Option("--tenant", metavar="NAME", help="for operators: whose; default: the own"),
]
Command = Annotated[str, typer.Argument(metavar="COMMAND", help="the name of the queue")]

#: Options of each of them, by the name of the parameter
SHARED = {
    "base_url": BaseUrl,
    "producer_token": ProducerToken,
    "worker_token": WorkerToken,
    "ca_file": CaFile,
    "cert_file": CertFile,
    "key_file": KeyFile,
    "profile": ProfileName,
    "as_json": AsJson,
}


class Call(NamedTuple):
    """What a command works with. ``as_json``: the output is for a program."""

    client: Client
    as_json: bool

    def show(self, body: Any, people: Callable[[], None]) -> None:
        """Prints a REST body as JSON, or does what shows it to people."""
        if self.as_json:
            print_json(body)
        else:
            people()


def remote(
    command: Callable[..., Awaitable[int | None]], options_of: Mapping[str, Any] = SHARED
) -> Callable[..., int]:
    """A command for Typer out of ``async def command(call, ...)``: it has the options of SHARED
    too, and is run with a client of the server they lead to. ``options_of``: those of SHARED, some
    of them in other words."""
    own = inspect.signature(command, eval_str=True)
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "as_json" else None,
            annotation=kind,
        )
        for name, kind in options_of.items()
    ]

    def outside(**options: Any) -> int:
        import asyncio

        flags = {name: options.pop(name) for name in SHARED}
        as_json = flags.pop("as_json") or GIVEN.get().as_json
        server = resolve(
            Server(**{name: flags[name] for name in flags if name != "profile"}),
            flags["profile"],
            GIVEN.get(),
        )

        async def inside() -> int:
            async with client_of(server) as client:
                return await command(Call(client, as_json), **options) or 0

        return asyncio.run(inside())

    parameters = [*list(own.parameters.values())[1:], *shared]
    outside.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters],
        return_annotation=int,
    )
    outside.__annotations__ = {one.name: one.annotation for one in parameters}
    outside.__name__ = command.__name__
    outside.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{EXIT_CODES}"
    return outside


def client_of(server: Server) -> Client:
    """A client of the server; what is wrong with its address is a usage error."""
    from codeq.client.rest import Client
    from codeq.client.tls import Tls

    files = (server.ca_file or "", server.cert_file or "", server.key_file or "")
    try:
        return Client(
            server.base_url or DEFAULT_URL,
            producer_token=server.producer_token or "",
            worker_token=server.worker_token or "",
            credentials=Tls(*files) if any(files) else None,
            retry_seconds=RETRY_SECONDS,
        )
    except CodeqError as error:
        raise typer.BadParameter(f"--base-url or its TLS files: {error.message}") from None


def moment(text: str, option: str) -> datetime | None:
    """A time with its zone, as RFC 3339 has it; None for no text."""
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = datetime.min
    if time.tzinfo is None:
        raise typer.BadParameter(f"{option}: not a time such as 2030-01-31T08:00:00Z: {text!r}")
    return time
