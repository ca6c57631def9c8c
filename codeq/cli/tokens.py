"""``codeq token``: keys and signed tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, help="Keys and signed tokens to try things with.")

Words = Annotated[list[str] | None, typer.Option(metavar="NAME", help="repeatable")]


@app.command("key")
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


@app.command("sign")
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


@app.command("show")
def token_show(text: Annotated[str, typer.Argument(metavar="TOKEN")]) -> None:
    """Prints header and claims of a token as JSON. Its signature is not checked."""
    from codeq import tokens

    print(json.dumps(tokens.show(text), indent=2, ensure_ascii=False))
