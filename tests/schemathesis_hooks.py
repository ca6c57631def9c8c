"""What Schemathesis is told beside the description of the API: that no request waits for work, and
of valid requests what JSON Schema has no word for: texts bounded by bytes, printable names, 1.0
that is no integer, hosts that are public."""

from __future__ import annotations

import re
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

from codeq.model import TOPIC_NAME_PATTERN

BYTES_MAX = 200


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    for part in (case.body, case.query):
        if isinstance(part, dict) and isinstance(part.get("waitSeconds"), int | float):
            part["waitSeconds"] = 0
    for name, value in (case.query or {}).items():
        if isinstance(value, list | dict):  # several times the same name
            case.query[name] = ["x", *value]  # the first counts, and an empty one is as none
    if re.fullmatch(TOPIC_NAME_PATTERN, str(case.path_parameters.get("topicName", ""))):
        case.path_parameters["topicName"] = "a-topic"  # whose tiers bind no other queue
    if case.body == b"":  # drawn as bytes that are no JSON, but it counts as {}
        case.body = b"\0"
    if case.meta.generation.mode is GenerationMode.POSITIVE:
        case.path_parameters = said(case.path_parameters)
        if isinstance(case.body, dict | list):
            case.body = said(case.body)
        if case.operation.path.endswith("/admin/backup") and isinstance(case.body, dict):
            case.body["name"] = "".join(filter(str.isalnum, case.body["name"])) or "name"


def said(value: Any, name: str = "") -> Any:
    """The value within the bounds that its schema cannot say."""
    if isinstance(value, dict):
        whole = {key: said(member, key) for key, member in value.items()}
        whole |= {"groupId": "g"} if whole.get("deliveryMode") == "group" else {}
        return whole | ({"error": "broken"} if whole.get("status") == "FAILED" else {})
    if isinstance(value, list) and name == "artifacts":
        return [{**said(item), "name": f"file {at}"} for at, item in enumerate(value)]
    if isinstance(value, list):
        return [said(item, f"{name}{at}") for at, item in enumerate(value)]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    if name in ("webhook", "callbackUrl"):
        return "https://example.com/hook"
    return value if len(value.encode()) <= BYTES_MAX else value[: BYTES_MAX // 4].strip() or "x"
