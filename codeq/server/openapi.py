"""The description of the REST interface in OpenAPI 3.1, made from the table of routes.

Replies name every member and forbid others; requests may hold members that nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from codeq import __version__, model
from codeq.config import Config
from codeq.errors import RATE_LIMITED, RESULT_ABSENT, TOPIC_INVALID, Refusal
from codeq.server.routes import JSON, OPEN, TABLE, Answer, Open, Parameter, Route, refusals_of

REF = "#/components/schemas/{name}"
#: Types that only the text of a schema names
_NAMED = (model.ArtifactLink, model.CreatedItem, model.ResultItem, model.ItemRefusal)
_NAMED_REQUESTS = (model.CreateBody, model.ResultBody)
_VARIABLE = re.compile(r"\{(\w+)\}")
#: A bound that is the name of a setting
_BOUNDS = frozenset(("maximum", "maxItems"))
_DESCRIPTION = """\
A durable task queue: producers create tasks, workers claim them and send results.

`null` counts as absent and unknown members are ignored. A trailing slash changes nothing. Every
reply has `X-Request-Id`: that of the request, or a new one. Another path or method is 404.
"""
_SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A token of the class that the route names: producer, worker (with a scope),"
        " any, admin or operator. The tenant is that of the token.",
    }
}
_REQUEST_ID = {
    "X-Request-Id": {
        "description": "The request's own, or 32 hexadecimal digits.",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    }
}
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which to ask again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}
_PATHS = {
    "command": {"type": "string", "pattern": model.COMMAND_PATTERN},
    "id": {"type": "string", "minLength": 1},
    "name": {"type": "string", "minLength": 1},
    "topicName": {"type": "string", "pattern": model.TOPIC_NAME_PATTERN},
}


def describe(config: Config) -> dict[str, Any]:
    """The document for a server with these settings; no secret of them is in it."""
    routes: tuple[Route | Open, ...] = (*TABLE, *OPEN)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[method_of(route).lower()] = _operation(route, config)
    document = {
        "openapi": "3.1.0",
        "info": {"title": "codeq", "version": __version__, "description": _DESCRIPTION},
        "paths": paths,
        "components": {"schemas": _components(routes), "securitySchemes": _SECURITY},
    }
    resolved: dict[str, Any] = _resolved(document, config)
    return resolved


def method_of(route: Route | Open) -> str:
    return route.method if isinstance(route, Route) else "GET"


def token_of(route: Route | Open) -> str:
    """The class of token a route asks for, with the scope."""
    if isinstance(route, Open):
        return "none"
    access = route.access
    return f"{access.name}, {access.scope}" if access.scope else access.name


def text_of(row: Refusal) -> str:
    """The text of a refusal, with N for what differs."""
    return row.message.replace("{}", "N")


# --- schemas -------------------------------------------------------------------------------------


def _components(routes: Iterable[Route | Open]) -> dict[str, Any]:
    answers = [answer.type for route in routes for answer in route.answers if answer.type]
    errors = [
        *(model.ErrorBody, model.RateLimitedBody, model.ResultAbsentBody),
        model.UnprocessableBody,
    ]
    _, replies = msgspec.json.schema_components((*answers, *errors, *_NAMED), ref_template=REF)
    takes = [route.takes for route in TABLE if route.takes is not None]
    _, requests = msgspec.json.schema_components((*takes, *_NAMED_REQUESTS), ref_template=REF)
    for schema in replies.values():
        _close(schema)
    for name, schema in requests.items():
        _ask(schema, getattr(getattr(model, name), "needs", ()))
    return replies | requests


def _ask(schema: dict[str, Any], needs: tuple[str, ...]) -> None:
    """Makes the schema of a request ask for what its handler asks for."""
    schema["required"] = [*needs, *schema["required"]]
    for name, member in schema["properties"].items():
        if member.get("default", 0) is None:  # null is absent; it is no value to fill in
            del member["default"]
        if name in needs and "anyOf" in member:
            kinds = [kind for kind in member.pop("anyOf") if kind["type"] != "null"]
            member.update(kinds[0])


def _close(schema: dict[str, Any]) -> None:
    """Makes the schema of a reply refuse members it does not name; those that are left out when
    they are empty are never empty."""
    schema["additionalProperties"] = False
    for member in schema["properties"].values():
        if member.pop("default", None) == "":
            member.setdefault("minLength", 1)


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components((kind,), ref_template=REF)
    return schema


def _resolved(part: Any, config: Config) -> Any:
    """The part with numbers where it names a setting as a bound."""
    if isinstance(part, list):
        return [_resolved(item, config) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        key: _setting(config, value)
        if key in _BOUNDS and isinstance(value, str)
        else _resolved(value, config)
        for key, value in part.items()
    }


def _setting(config: Config, key: str) -> int:
    names = (re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name) for name in key.split("."))
    value: Any = config
    for name in names:
        value = getattr(value, name)
    return int(value)


# --- operations ----------------------------------------------------------------------------------


def _operation(route: Route | Open, config: Config) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{method_of(route).lower()} {route.path}",
        "summary": route.summary,
        "description": f"Token: {token_of(route)}.",
        "security": [],
        "responses": _responses(route, config),
    }
    if isinstance(route, Open):
        return operation
    operation["security"] = [{"bearer": [route.access.scope or route.access.name]}]
    operation["parameters"] = [
        *map(_path_parameter, _VARIABLE.findall(route.path)),
        *map(_parameter, route.parameters),
    ]
    if route.takes is not None:
        content = {"schema": _schema(route.takes), "example": route.sample}
        operation["requestBody"] = {
            "required": not route.body_optional,
            "content": {JSON: content},
        }
    return operation


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _PATHS[name]}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.needed,
        "description": parameter.description,
        "schema": parameter.schema,
    }


def _responses(route: Route | Open, config: Config) -> dict[str, Any]:
    found = {
        _status(route, answer, config): {
            "description": answer.description,
            "headers": _REQUEST_ID,
            **_content(answer),
        }
        for answer in route.answers
    }
    rows = refusals_of(route)
    for status in dict.fromkeys(row.http for row in rows):
        found[str(status)] = _error([row for row in rows if row.http == status])
    return dict(sorted(found.items()))


def _status(route: Route | Open, answer: Answer, config: Config) -> str:
    """The status; creates have the one of the settings."""
    created = route.path.endswith("/tasks") and answer.status == 201
    return str(config.compat.create_status if created else answer.status)


def _content(answer: Answer) -> dict[str, Any]:
    if answer.type is None:
        return {} if answer.media == JSON else {"content": {answer.media: {}}}
    sample = msgspec.json.decode(msgspec.json.encode(answer.sample))
    return {"content": {JSON: {"schema": _schema(answer.type), "example": sample}}}


def _error(rows: list[Refusal]) -> dict[str, Any]:
    """One status with all that it can say."""
    schemas = [_error_schema(kind, some) for kind, some in _kinds(rows)]
    texts = [text_of(row) for row in rows]
    content = {
        "schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas},
        "examples": {
            f"{row.slug}: {text}": {"value": _example(row, text)}
            for row, text in zip(rows, texts, strict=True)
        },
    }
    retry = _RETRY_AFTER if rows[0].http in (429, 503) else {}
    return {
        "description": ", ".join(dict.fromkeys(f"`{text}`" for text in texts)),
        "headers": {**_REQUEST_ID, **retry},
        "content": {JSON: content},
    }


def _kinds(rows: list[Refusal]) -> Iterator[tuple[type[model.ErrorBody], list[Refusal]]]:
    """The rows by the shape of their body."""
    special: dict[Refusal, type[model.ErrorBody]] = {
        RATE_LIMITED: model.RateLimitedBody,
        RESULT_ABSENT: model.ResultAbsentBody,
        TOPIC_INVALID: model.UnprocessableBody,
    }
    if plain := [row for row in rows if row not in special]:
        yield model.ErrorBody, plain
    for row in rows:
        if row in special:
            yield special[row], [row]


def _error_schema(kind: type[model.ErrorBody], rows: list[Refusal]) -> dict[str, Any]:
    """The shape with the slugs and texts that stand in it. The texts of providers and the reasons
    of overload are many; the others are known."""
    said: dict[str, Any] = {"code": {"enum": list(dict.fromkeys(row.slug for row in rows))}}
    if rows[0].http not in (401, 503):
        known = "|".join(_pattern(text) for text in dict.fromkeys(row.message for row in rows))
        said |= {"message": {"pattern": f"^(?:{known})$"}, "error": {"pattern": f"^(?:{known})$"}}
    return {**_schema(kind), "properties": said}


def _pattern(text: str) -> str:
    return ".+".join(re.sub(r"([().*+?\[\]])", r"\\\1", part) for part in text.split("{}"))


def _example(row: Refusal, text: str) -> dict[str, Any]:
    body: dict[str, Any] = {"code": row.slug, "message": text, "error": text}
    if row is RATE_LIMITED:
        body |= {"scope": "producer", "operation": "create_task", "retryAfterSeconds": 1}
    if row is TOPIC_INVALID:
        body["field"] = "maxAttempts"
    if row is RESULT_ABSENT:
        body["status"] = "PENDING"
    return body
