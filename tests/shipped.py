"""What the files below examples/deploy say, read the way their programs read them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from promql_parser import MatrixSelector, VectorSelector
from promql_parser import parse as parse_promql

from tests.conftest import ROOT

DEPLOY = ROOT / "examples/deploy"
BIN = Path(sys.executable).parent


def read(name: str) -> str:
    """The text of a file below examples/deploy."""
    return (DEPLOY / name).read_text()


def documents(name: str) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(read(name)))


def environment(name: str) -> dict[str, str]:
    """An env file as compose, systemd and a shell read it: one value a line, maybe quoted."""
    found = {}
    for line in read(name).splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            (found[key],) = shlex.split(value)
    return found


def kubernetes(kind: str) -> dict[str, Any]:
    """The one object of this kind."""
    everything = [*documents("kubernetes/codeq.yaml"), *documents("kubernetes/secret.yaml")]
    (found,) = (each for each in everything if each["kind"] == kind)
    return found


def container() -> dict[str, Any]:
    """The container of the StatefulSet."""
    (found,) = kubernetes("StatefulSet")["spec"]["template"]["spec"]["containers"]
    return dict(found)


def compose(service: str) -> dict[str, Any]:
    """One service of the compose file."""
    (tree,) = documents("compose.yaml")
    return dict(tree["services"][service])


def instruction(word: str) -> str:
    """The arguments of the last instruction of this name in the Dockerfile."""
    joined = read("Dockerfile").replace("\\\n", " ")
    return re.findall(rf"^{word} (.*)$", joined, re.MULTILINE)[-1].strip()


def unit(key: str) -> str:
    """The last value of a key in the systemd unit."""
    return re.findall(rf"^{key}=(.*)$", read("systemd/codeq.service"), re.MULTILINE)[-1]


class Selector(NamedTuple):
    """A metric as a query names it, and the labels it asks for."""

    name: str
    labels: frozenset[str]


def selectors(query: str) -> list[Selector]:
    """Every metric of a query. Raises ValueError when it is no PromQL."""
    plain = query.replace("$__rate_interval", "1m").replace("$command", ".*")
    return list(_walk(parse_promql(plain)))


def _walk(node: Any) -> Any:
    if isinstance(node, MatrixSelector):
        node = node.vector_selector
    if isinstance(node, VectorSelector):
        yield Selector(str(node.name), frozenset(m.name for m in node.matchers.matchers))
    for part in ("expr", "lhs", "rhs", "param"):
        if (inner := getattr(node, part, None)) is not None:
            yield from _walk(inner)
    for inner in getattr(node, "args", None) or ():
        yield from _walk(inner)


def alerts() -> dict[str, dict[str, Any]]:
    """The alert rules by name."""
    (tree,) = documents("alerts.yml")
    rules = [rule for group in tree["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule for rule in rules}
