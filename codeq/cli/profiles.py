"""The server a command talks to: flag, environment, profile, default, in this order.

Profiles are in ``config.yaml`` of the folder CODEQ_CONFIG_DIR (``~/.codeq``), which only its owner
can read: it holds tokens.
"""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from codeq.cli.output import MASK, complain, print_fields, print_json, print_table
from codeq.errors import CodeqError

app = typer.Typer(rich_markup_mode=None, help="Servers and their tokens, kept as profiles.")

DEFAULT_PROFILE = "default"
#: Members of a profile by their names in the file
MEMBERS = {
    "baseUrl": "base_url",
    "producerToken": "producer_token",
    "workerToken": "worker_token",
    "caFile": "ca_file",
    "certFile": "cert_file",
    "keyFile": "key_file",
}
ENVIRONMENT = {member: f"CODEQ_{member.upper()}" for member in MEMBERS.values()}
SECRET = ("producer_token", "worker_token")

BaseUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="CODEQ_BASE_URL; http://localhost:8080")
]
ProducerToken = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="CODEQ_PRODUCER_TOKEN; also for admins")
]
WorkerToken = Annotated[str | None, typer.Option(metavar="TOKEN", help="CODEQ_WORKER_TOKEN")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", metavar="NAME", help="CODEQ_PROFILE; default")
]
CaFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="CODEQ_CA_FILE; who may sign for an https server")
]
CertFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="CODEQ_CERT_FILE; a certificate of this client")
]
KeyFile = Annotated[str | None, typer.Option(metavar="FILE", help="CODEQ_KEY_FILE; its key")]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]


@dataclass(frozen=True)
class Server:
    """A server and how to get in; None is not said."""

    base_url: str | None = None
    producer_token: str | None = None
    worker_token: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def over(self, other: Server) -> Server:
        """What this says, else what the other one does."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(other, **said)


@dataclass(frozen=True)
class Given:
    """What stood on the command line before the command."""

    server: Server = Server()
    profile: str | None = None
    as_json: bool = False


GIVEN: ContextVar[Given] = ContextVar("given")


def resolve(
    flags: Server, profile: str | None, given: Given, environ: Mapping[str, str] = os.environ
) -> Server:
    """The server of a command with these flags; raises CodeqError or, for a profile that is not
    there, BadParameter."""
    variables = {name: environ.get(variable) for name, variable in ENVIRONMENT.items()}
    said = flags.over(given.server).over(Server(**variables))
    wanted = profile or given.profile or environ.get("CODEQ_PROFILE")
    if wanted is None and said.base_url is not None and said.producer_token is not None:
        profiles: dict[str, Server] = {}  # a broken file is in nobody's way who does not need it
    else:
        profiles = read(config_file(environ))
    if wanted is not None and wanted not in profiles:
        raise typer.BadParameter(f"there is no profile {wanted!r}; codeq auth show lists them")
    return said.over(profiles.get(wanted or DEFAULT_PROFILE, Server()))


# --- the file ------------------------------------------------------------------------------------


def config_file(environ: Mapping[str, str] = os.environ) -> Path:
    folder = environ.get("CODEQ_CONFIG_DIR")
    return Path(folder) / "config.yaml" if folder else Path.home() / ".codeq" / "config.yaml"


def read(file: Path) -> dict[str, Server]:
    """The profiles of a file; none when there is no file."""
    import yaml

    try:
        tree = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _bad(file, " ".join(str(error).split())) from None
    return {str(name): _server(file, name, found) for name, found in _profiles(file, tree).items()}


def _profiles(file: Path, tree: Any) -> dict[Any, Any]:
    profiles = (tree or {}).get("profiles", {}) if isinstance(tree or {}, dict) else None
    if not isinstance(profiles, dict):
        raise _bad(file, "profiles: must be a map of profiles by name")
    return profiles


def _server(file: Path, name: Any, found: Any) -> Server:
    members = found or {}
    if not isinstance(members, dict):
        raise _bad(file, f"profiles.{name}: must be a map")
    for key, value in members.items():
        if key not in MEMBERS or not isinstance(value, str):
            raise _bad(file, f"profiles.{name}.{key}: not a text, or not {', '.join(MEMBERS)}")
    return Server(**{MEMBERS[key]: value for key, value in members.items()})


def _bad(file: Path, why: str) -> CodeqError:
    return CodeqError("validation-error", f"{file}: {why}")


def write(file: Path, profiles: Mapping[str, Server]) -> None:
    """Replaces the file; nobody else can read it, and nobody sees half of it."""
    import yaml

    tree = {
        "profiles": {
            name: {
                key: value
                for key, member in MEMBERS.items()
                if (value := getattr(server, member)) is not None
            }
            for name, server in profiles.items()
        }
    }
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            yaml.safe_dump(tree, out, sort_keys=False, allow_unicode=True)
            out.flush()
            os.fsync(out.fileno())
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise _bad(file, f"cannot be written: {error.strerror}") from None


# --- commands ------------------------------------------------------------------------------------


@app.command("set")
def auth_set(
    base_url: BaseUrl = None,
    producer_token: ProducerToken = None,
    worker_token: WorkerToken = None,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    profile: ProfileName = None,
) -> int:
    """Keeps these in a profile; what is not named stays. A token "-" is read from the input."""
    flags = Server(base_url, producer_token, worker_token, ca_file, cert_file, key_file)
    given = GIVEN.get()
    said = flags.over(given.server)
    if said == Server():
        raise typer.BadParameter("name something to keep, such as --producer-token")
    read_in = {name: _secret(name) for name in SECRET if getattr(said, name) == "-"}
    name = profile or given.profile or DEFAULT_PROFILE
    file = config_file()
    profiles = read(file)
    profiles[name] = replace(said, **read_in).over(profiles.get(name, Server()))
    write(file, profiles)
    return 0


def _secret(name: str) -> str:
    """A token that does not stand on the command line."""
    if sys.stdin.isatty():
        return getpass.getpass(f"{name.replace('_', ' ')}: ").strip()
    return sys.stdin.readline().strip()


@app.command("show")
def auth_show(profile: ProfileName = None, as_json: AsJson = False) -> int:
    """Lists the profiles, with tokens masked."""
    given = GIVEN.get()
    profiles = read(config_file())
    wanted = profile or given.profile
    if wanted is not None:
        if wanted not in profiles:
            raise CodeqError("not-found", f"there is no profile {wanted!r}")
        profiles = {wanted: profiles[wanted]}
    shown = {name: _shown(server) for name, server in profiles.items()}
    if as_json or given.as_json:
        print_json({"file": str(config_file()), "profiles": shown})
    elif wanted is not None:
        print_fields(shown[wanted].items())
    else:
        used = [key for key in MEMBERS if any(key in row for row in shown.values())]
        rows = [(name, *(row.get(key, "") for key in used)) for name, row in shown.items()]
        print_table(("profile", *used), rows)
    return 0


def _shown(server: Server) -> dict[str, str]:
    """The members that are there; a token only by its last characters, if it is long enough."""
    found = {key: getattr(server, member) for key, member in MEMBERS.items()}
    return {
        key: _masked(value) if MEMBERS[key] in SECRET else value
        for key, value in found.items()
        if value is not None
    }


def _masked(token: str) -> str:
    return MASK + token[-4:] if len(token) >= 24 else MASK


@app.command("clear")
def auth_clear(profile: ProfileName = None) -> int:
    """Forgets a profile."""
    name = profile or GIVEN.get().profile or DEFAULT_PROFILE
    file = config_file()
    profiles = read(file)
    if profiles.pop(name, None) is None:
        complain(f"there was no profile {name!r}")
        return 0
    write(file, profiles)
    return 0
