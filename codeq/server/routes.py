"""The table of routes: what each asks of the token, takes and answers, and what does it.

rest.py serves from it, openapi.py describes it. A new route is a row here and a handler.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, Struct

from codeq import errors as no
from codeq import model
from codeq.errors import Refusal
from codeq.model import PREFIX
from codeq.server import (
    auth,
    rest_admin,
    rest_leases,
    rest_operator,
    rest_subscriptions,
    rest_tasks,
    rest_topics,
    samples,
)
from codeq.server.auth import Auth, Principal
from codeq.server.request import Edge, Reply, Request

JSON = "application/json"

Handler = Callable[[Edge, Request, Principal], Awaitable[Reply]]
Admit = Callable[[Auth, str], Principal]
Refusals = tuple[Refusal, ...]


class Access(NamedTuple):
    """A class of token: its name, its scope if it needs one, and how it is let in or refused."""

    name: str
    admit: Admit
    refusals: Refusals
    scope: str = ""


class Parameter(NamedTuple):
    """A query parameter or a header that a route reads."""

    name: str
    schema: dict[str, Any]
    description: str = ""
    place: str = "query"
    needed: bool = False


class Answer(NamedTuple):
    """What is answered when nothing is wrong. ``type`` is that of the body, None if it has none;
    bodies of another ``media`` than JSON are described by it alone."""

    status: int
    description: str
    type: Any = None
    sample: Any = None
    media: str = JSON


class Route(Struct, frozen=True, eq=False):
    """One route. ``path`` is whole, with its variable parts by name in braces.

    ``takes`` is the type of the body, None if it is not looked at; ``refusals`` are those beside
    what the class of token, the body and any route may bring.
    """

    method: str
    path: str
    summary: str
    access: Access
    handle: Handler
    answers: tuple[Answer, ...]
    takes: Any = None
    sample: Any = None
    refusals: Refusals = ()
    parameters: tuple[Parameter, ...] = ()
    #: Whether the body may be left out, and whether one is read at all
    body_optional: bool = False
    body_read: bool = True


class Open(Struct, frozen=True, eq=False):
    """A GET route that asks for no token; rest.py and pages.py answer it by its path."""

    path: str
    summary: str
    answers: tuple[Answer, ...]
    refusals: Refusals = ()


# --- classes of tokens ---------------------------------------------------------------------------

_TOKEN = (no.HEADER_MISSING, no.FORMAT_INVALID, no.TOKEN_INVALID, no.TENANT_INVALID)
_PRODUCER = (*_TOKEN, no.PRODUCERS_OFF, no.KEYS_UNAVAILABLE)
_WORKER = (
    *(*_TOKEN, no.SUBJECT_MISSING, no.EVENT_TYPES_MISSING, no.SCOPES_MISSING, no.SCOPE_DENIED),
    *(no.WORKERS_OFF, no.KEYS_UNAVAILABLE),
)


def _worker(scope: str) -> Access:
    return Access("worker", lambda known, token: known.worker(token, scope), _WORKER, scope)


PRODUCER = Access("producer", Auth.producer, _PRODUCER)
CLAIM = _worker(auth.SCOPE_CLAIM)
HEARTBEAT = _worker(auth.SCOPE_HEARTBEAT)
ABANDON = _worker(auth.SCOPE_ABANDON)
NACK = _worker(auth.SCOPE_NACK)
RESULT = _worker(auth.SCOPE_RESULT)
SUBSCRIBE = _worker(auth.SCOPE_SUBSCRIBE)
ANY = Access(
    "any",
    Auth.any,
    (no.TOKEN_INVALID, no.TENANT_INVALID, no.PRODUCERS_OFF, no.KEYS_UNAVAILABLE),
)
ADMIN = Access("admin", Auth.admin, (*_PRODUCER, no.ADMIN_ONLY))
OPERATOR = Access("operator", Auth.operator, (*_PRODUCER, no.OPERATOR_ONLY))

#: One of each class; those of workers differ in their scope only
ACCESSES = (PRODUCER, CLAIM, ANY, ADMIN, OPERATOR)

# --- parts of rows -------------------------------------------------------------------------------


_CREATED_LIST = Annotated[list[Any], Meta(extra_json_schema=model.CREATED_ITEMS)]
_CREATE_LIST = Annotated[list[Any], Meta(extra_json_schema=model.CREATES)]
_CREATE_REFUSALS = (
    *(no.COMMAND_INVALID, no.WEBHOOK_INVALID, no.RUN_AT_INVALID, no.DELAY_INVALID),
    *(no.PRIORITY_INVALID, no.PRIORITY_NO_TIER, no.KEY_INVALID),
)
_LEASE_REFUSALS = (no.WORKER_ID_INVALID, no.NOT_FOUND, no.NOT_IN_PROGRESS, no.NOT_OWNER)
_BUSY = (no.UNAVAILABLE, no.BYTES_SPENT)
_TRACE = (
    Parameter("traceparent", {"type": "string"}, "Kept with the task.", "header"),
    Parameter("tracestate", {"type": "string"}, "Kept with the task.", "header"),
)
_TENANT = Parameter(
    "tenant",
    {"type": "string", "pattern": f"^$|{model.TENANT_PATTERN}"},
    "Operators only: the tenant that is meant; without it all.",
)
_TENANT_CHANGED = _TENANT._replace(
    description="Operators only: the tenant whose queue is meant; without it the own."
)
_TENANT_OF_TASK = _TENANT._replace(
    description="Operators only: the tenant whose task it is; without it the own."
)
_PAGE = (
    Parameter("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
    Parameter(
        "cursor", {"type": "string", "pattern": "^(?:[0-9a-f]{12})?$"}, "nextCursor of a page."
    ),
    _TENANT,
)
_PAGE_REFUSALS = (no.LIMIT_INVALID, no.CURSOR_INVALID)


def _queue_change(what: str, summary: str, handle: Handler, *, paused: bool) -> Route:
    """A row of pause or resume."""
    return Route(
        "POST",
        f"{PREFIX}/admin/queues/{{command}}/{what}",
        summary,
        ADMIN,
        handle,
        (Answer(200, "How it is now.", model.QueuePause, model.QueuePause("send", paused)),),
        refusals=(no.COMMAND_INVALID, no.UNAVAILABLE),
        parameters=(_TENANT_CHANGED,),
        body_optional=True,
    )


def _dead_change(what: str, summary: str, handle: Handler, kind: Any, sample: Any) -> Route:
    """A row of requeue or purge of dead letters."""
    return Route(
        "POST",
        f"{PREFIX}/admin/queues/{{command}}/dead/{what}",
        summary,
        ADMIN,
        handle,
        (Answer(200, "How many.", kind, sample),),
        takes=model.DeadBody,
        sample={"limit": 100},
        refusals=(no.COMMAND_INVALID, no.BATCH_TOO_LARGE, no.LIMIT_INVALID, no.UNAVAILABLE),
        parameters=(_TENANT_CHANGED,),
        body_optional=True,
    )


# --- the table -----------------------------------------------------------------------------------

_PRODUCERS = (
    Route(
        "POST",
        f"{PREFIX}/tasks",
        "Create a task",
        PRODUCER,
        rest_tasks.create,
        (Answer(201, "The task, or the one its key made before.", model.Task, samples.TASK),),
        takes=model.CreateBody,
        sample=samples.CREATE,
        refusals=(
            *(*_CREATE_REFUSALS, no.KEY_CONFLICT, no.PAYLOAD_TOO_LARGE, no.RATE_LIMITED),
            *_BUSY,
        ),
        parameters=_TRACE,
    ),
    Route(
        "POST",
        f"{PREFIX}/tasks/batch",
        "Create many tasks in one commit",
        PRODUCER,
        rest_tasks.create_batch,
        (
            Answer(
                200,
                "What became of each item, in the shape of the request.",
                _CREATED_LIST | model.CreatedItems,
                samples.CREATED_ITEMS,
            ),
        ),
        takes=_CREATE_LIST | model.RawCreateBatchBody,
        sample={"tasks": [samples.CREATE, samples.CREATE]},
        refusals=(no.BATCH_TOO_LARGE, no.RATE_LIMITED, *_BUSY),
        parameters=_TRACE,
    ),
    Route(
        "POST",
        f"{PREFIX}/tasks/{{id}}/cancel",
        "End a task that nobody has claimed",
        PRODUCER,
        rest_tasks.cancel,
        (Answer(200, "The task, FAILED with error CANCELLED.", model.Task, samples.CANCELLED),),
        refusals=(no.TASK_ABSENT, no.NOT_PENDING, no.UNAVAILABLE),
        parameters=(_TENANT_OF_TASK,),
        body_optional=True,
    ),
)
_CLAIMS = (
    Route(
        "POST",
        f"{PREFIX}/tasks/claim",
        "Claim a task, or wait for one",
        CLAIM,
        rest_leases.claim,
        (
            Answer(200, "The task, leased.", model.Task, samples.CLAIMED),
            Answer(204, "Nothing was ready within the wait."),
        ),
        takes=model.ClaimBody,
        sample=samples.CLAIM,
        refusals=(
            *(no.COMMAND_INVALID, no.WORKER_ID_INVALID, no.EVENT_TYPE_DENIED, no.RATE_LIMITED),
            *_BUSY,
        ),
        body_optional=True,
    ),
    Route(
        "POST",
        f"{PREFIX}/tasks/claim/batch",
        "Claim many tasks in one commit, or wait for the first",
        CLAIM,
        rest_leases.claim_batch,
        (
            Answer(200, "The tasks, leased.", model.Tasks, model.Tasks([samples.CLAIMED])),
            Answer(204, "Nothing was ready within the wait."),
        ),
        takes=model.ClaimBatchBody,
        sample={**samples.CLAIM, "count": 100},
        refusals=(
            *(no.COUNT_TOO_LARGE, no.COMMAND_INVALID, no.WORKER_ID_INVALID, no.EVENT_TYPE_DENIED),
            *(no.RATE_LIMITED, *_BUSY),
        ),
    ),
)
_LEASES = (
    Route(
        "POST",
        f"{PREFIX}/tasks/{{id}}/heartbeat",
        "Set the end of a lease to now and some seconds",
        HEARTBEAT,
        rest_leases.heartbeat,
        (Answer(200, "The lease goes on.", model.LeaseKept, model.LeaseKept(True)),),
        takes=model.HeartbeatBody,
        sample={"workerId": "worker-1", "extendSeconds": 60},
        refusals=(*_LEASE_REFUSALS, no.UNAVAILABLE),
        body_optional=True,
    ),
    Route(
        "POST",
        f"{PREFIX}/tasks/{{id}}/abandon",
        "Give a task back untried; the attempt does not count",
        ABANDON,
        rest_leases.abandon,
        (Answer(200, "It is ready again.", model.GivenBack, model.GivenBack("requeued")),),
        takes=model.LeaseBody,
        sample={"workerId": "worker-1"},
        refusals=(*_LEASE_REFUSALS, no.UNAVAILABLE),
        body_optional=True,
    ),
    Route(
        "POST",
        f"{PREFIX}/tasks/{{id}}/nack",
        "Give a task back after a failed try",
        NACK,
        rest_leases.nack,
        (
            Answer(
                200,
                "It comes again after that delay, or was the last attempt.",
                model.Nacked,
                model.Nacked("requeued", 30),
            ),
        ),
        takes=model.NackBody,
        sample={"workerId": "worker-1", "delaySeconds": 30, "reason": "mail server is away"},
        refusals=(*_LEASE_REFUSALS, no.UNAVAILABLE),
        body_optional=True,
    ),
    Route(
        "POST",
        f"{PREFIX}/tasks/{{id}}/result",
        "End a task with its result",
        RESULT,
        rest_leases.result,
        (Answer(200, "The result as it is kept.", model.ResultRecord, samples.RECORD),),
        takes=model.ResultBody,
        sample=samples.RESULT,
        refusals=(
            *(no.STATUS_INVALID, no.ERROR_REQUIRED, no.RESULT_JSON_INVALID, no.ARTIFACT_INVALID),
            *(no.WORKER_ID_INVALID, no.RESULT_TOO_LARGE, no.TASK_NOT_FOUND, no.NOT_IN_PROGRESS),
            *(no.NOT_OWNER, no.UNAVAILABLE),
        ),
    ),
    Route(
        "POST",
        f"{PREFIX}/tasks/batch/results",
        "End many tasks with their results in one commit",
        RESULT,
        rest_leases.result_batch,
        (
            Answer(
                200,
                "What became of each item, in the order of the request.",
                model.ResultItems,
                samples.RESULT_ITEMS,
            ),
        ),
        takes=model.RawResultBatchBody,
        sample={"results": [{"taskId": samples.ID, **samples.RESULT}], "workerId": "worker-1"},
        refusals=(no.BATCH_TOO_LARGE, no.WORKER_ID_INVALID, no.UNAVAILABLE),
    ),
)
_SUBSCRIPTIONS = (
    Route(
        "POST",
        f"{PREFIX}/workers/subscriptions",
        "Be told when queues have work",
        SUBSCRIBE,
        rest_subscriptions.subscribe,
        (Answer(200, "The subscription.", model.Subscribed, samples.SUBSCRIBED),),
        takes=model.SubscribeBody,
        sample={"eventTypes": ["send"], "ttlSeconds": 300},
        refusals=(
            *(no.CALLBACK_INVALID, no.MODE_INVALID, no.GROUP_REQUIRED, no.GROUP_INVALID),
            *(no.COMMAND_INVALID, no.EVENT_TYPE_DENIED, no.SUBSCRIPTIONS_FULL, no.UNAVAILABLE),
        ),
        body_optional=True,
    ),
    Route(
        "POST",
        f"{PREFIX}/workers/subscriptions/{{id}}/heartbeat",
        "Keep a subscription, and wait for work with it",
        SUBSCRIBE,
        rest_subscriptions.heartbeat,
        (Answer(200, "What has work.", model.SubscriptionKept, samples.SUBSCRIPTION_KEPT),),
        takes=model.SubscriptionHeartbeatBody,
        sample={"ttlSeconds": 300, "waitSeconds": 30},
        refusals=(no.NOT_FOUND, no.UNAVAILABLE),
        body_optional=True,
    ),
)
_READS = (
    Route(
        "GET",
        f"{PREFIX}/tasks/{{id}}",
        "Read a task",
        ANY,
        rest_tasks.get_task,
        (Answer(200, "The task as it is now.", model.Task, samples.TASK),),
        refusals=(no.TASK_ABSENT, no.BYTES_SPENT),
        parameters=(_TENANT_OF_TASK,),
        body_read=False,
    ),
    Route(
        "GET",
        f"{PREFIX}/tasks/{{id}}/result",
        "Read the result of a task, or wait for it",
        ANY,
        rest_tasks.get_result,
        (Answer(200, "Task and result.", model.TaskResult, samples.TASK_RESULT),),
        refusals=(no.TASK_NOT_FOUND, no.RESULT_ABSENT, *_BUSY),
        parameters=(
            Parameter(
                "waitSeconds",
                {"type": ["integer", "string"], "default": 0},
                "0 to 60; more is cut, nonsense is 0.",
            ),
            _TENANT_OF_TASK,
        ),
        body_read=False,
    ),
    Route(
        "GET",
        f"{PREFIX}/tasks/{{id}}/artifacts/{{name}}",
        "Fetch a file of a result",
        ANY,
        rest_tasks.get_artifact,
        (Answer(200, "The file, of the type its worker said.", media="*/*"),),
        refusals=(no.TASK_ABSENT, *_BUSY),
        body_read=False,
    ),
    Route(
        "GET",
        f"{PREFIX}/raft/status",
        "Read the state of replication, which is off",
        ANY,
        rest_tasks.raft_status,
        (Answer(200, "The state.", model.RaftStatus, model.RaftStatus(False, 0)),),
        body_read=False,
    ),
)
_QUEUES = (
    Route(
        "GET",
        f"{PREFIX}/admin/queues",
        "List the queues that hold something",
        ADMIN,
        rest_admin.queues,
        (Answer(200, "The queues.", model.Queues, model.Queues([samples.QUEUE])),),
        parameters=(_TENANT,),
        body_read=False,
    ),
    Route(
        "GET",
        f"{PREFIX}/admin/queues/{{command}}",
        "Read the depths of a queue",
        ADMIN,
        rest_admin.queue_stats,
        (Answer(200, "The depths; zeros for an unknown queue.", model.QueueStats, samples.QUEUE),),
        refusals=(no.COMMAND_INVALID,),
        parameters=(_TENANT,),
        body_read=False,
    ),
    _queue_change("pause", "Stop claims from a queue", rest_admin.pause, paused=True),
    _queue_change("resume", "Let claims from a queue go on", rest_admin.resume, paused=False),
    Route(
        "POST",
        f"{PREFIX}/admin/queues/{{command}}/purge",
        "End the waiting tasks of a queue",
        ADMIN,
        rest_admin.purge_waiting,
        (Answer(200, "How many.", model.Purged, model.Purged(3)),),
        takes=model.PurgeBody,
        sample={"state": "all"},
        refusals=(no.COMMAND_INVALID, no.STATE_INVALID, no.UNAVAILABLE),
        parameters=(_TENANT_CHANGED,),
    ),
    Route(
        "GET",
        f"{PREFIX}/admin/queues/{{command}}/dead",
        "List the dead letters of a queue",
        ADMIN,
        rest_admin.dead,
        (Answer(200, "A page of them.", model.TaskPage, samples.DEAD_PAGE),),
        refusals=(no.COMMAND_INVALID, *_PAGE_REFUSALS),
        parameters=_PAGE,
        body_read=False,
    ),
    _dead_change(
        *("requeue", "Make dead letters ready again", rest_admin.requeue),
        *(model.Requeued, model.Requeued(3)),
    ),
    _dead_change(
        *("purge", "Take dead letters away", rest_admin.purge_dead),
        *(model.Purged, model.Purged(3)),
    ),
)
_ADMIN = (
    Route(
        "GET",
        f"{PREFIX}/admin/overview",
        "Read the state of everything in one answer",
        ADMIN,
        rest_admin.overview,
        (Answer(200, "As of now.", model.Overview, samples.OVERVIEW),),
        refusals=(no.LIMIT_INVALID, no.BYTES_SPENT),
        parameters=(
            Parameter(
                "limit",
                {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": rest_admin.OVERVIEW_QUEUES_MAX,
                    "default": rest_admin.OVERVIEW_QUEUES_MAX,
                },
                "So many queues.",
            ),
            _TENANT,
        ),
        body_read=False,
    ),
    Route(
        "GET",
        f"{PREFIX}/admin/tasks",
        "List tasks",
        ADMIN,
        rest_admin.tasks,
        (Answer(200, "A page of them.", model.TaskPage, samples.PAGE),),
        refusals=(no.STATUS_INVALID, no.COMMAND_INVALID, *_PAGE_REFUSALS),
        parameters=(
            Parameter("status", {"type": "string", "enum": [*rest_admin.STATES]}),
            Parameter("command", {"type": "string", "pattern": f"^$|{model.COMMAND_PATTERN}"}),
            *_PAGE,
        ),
        body_read=False,
    ),
    Route(
        "POST",
        f"{PREFIX}/admin/tasks/cleanup",
        "Remove ended tasks whose keeping time is over",
        ADMIN,
        rest_admin.cleanup,
        (Answer(200, "How many.", model.Cleaned, samples.CLEANED),),
        takes=model.CleanupBody,
        sample={"limit": 1000},
        refusals=(no.BEFORE_INVALID, no.RATE_LIMITED, no.UNAVAILABLE),
        parameters=(_TENANT_CHANGED,),
        body_optional=True,
    ),
    Route(
        "POST",
        f"{PREFIX}/admin/backup",
        "Make a consistent copy of the store while it serves",
        OPERATOR,
        rest_operator.backup,
        (Answer(201, "Where it is.", model.BackupMade, samples.BACKUP),),
        takes=model.BackupBody,
        sample={"name": "monday"},
        refusals=(no.BACKUP_NAME_INVALID, no.BACKUP_EXISTS, no.UNAVAILABLE),
    ),
)


_TOPIC = f"{PREFIX}/admin/topics/{{topicName}}"
_TOPICS = (
    Route(
        "PUT",
        _TOPIC,
        "Lay down the policy of a topic",
        ADMIN,
        rest_topics.put,
        (
            Answer(200, "The topic, known before.", model.TopicShown, samples.TOPIC),
            Answer(201, "The topic, new.", model.TopicShown, samples.TOPIC),
        ),
        takes=model.TopicBody,
        sample={"priorityTiers": [0, 5], "maxAttempts": 3, "deadLetterTopicRef": "send-dead"},
        refusals=(no.TOPIC_BODY_INVALID, no.TOPIC_INVALID, no.TOPICS_UNAVAILABLE),
        parameters=(_TENANT_CHANGED,),
    ),
    Route(
        "GET",
        _TOPIC,
        "Read the policy of a topic",
        ADMIN,
        rest_topics.get,
        (Answer(200, "The topic.", model.TopicShown, samples.TOPIC),),
        refusals=(no.TOPIC_ABSENT, no.TOPIC_INVALID, no.TOPICS_UNAVAILABLE),
        parameters=(_TENANT_CHANGED,),
        body_read=False,
    ),
    Route(
        "DELETE",
        _TOPIC,
        "Take the policy of a topic away",
        ADMIN,
        rest_topics.delete,
        (Answer(204, "There is none now."),),
        refusals=(no.DELETION_POLICY_REQUIRED, no.TOPIC_INVALID, no.TOPICS_UNAVAILABLE),
        parameters=(
            Parameter("deletionPolicy", {"const": "Delete"}, needed=True),
            _TENANT_CHANGED,
        ),
        body_optional=True,
    ),
)


_HEALTHY = Answer(200, "It does, or they are.", model.Health, model.Health("ok"))
#: Routes with a token, all below the prefix
TABLE: tuple[Route, ...] = (
    *_PRODUCERS,
    *_CLAIMS,
    *_LEASES,
    *_SUBSCRIPTIONS,
    *_READS,
    *_QUEUES,
    *_ADMIN,
    *_TOPICS,
)
#: Routes without a token
OPEN = (
    Open("/healthz", "Tell whether the process runs", (_HEALTHY,)),
    Open("/readyz", "Tell whether creates and claims are served", (_HEALTHY,), (no.UNAVAILABLE,)),
    Open(
        "/metrics",
        "Read counters and gauges, for Prometheus",
        (Answer(200, "The text format of Prometheus.", media="text/plain"),),
        (no.INTERNAL,),
    ),
    Open(
        "/openapi.json",
        "Read this description",
        (Answer(200, "OpenAPI 3.1.", dict[str, Any], {"openapi": "3.1.0"}),),
    ),
    Open("/docs", "Read this description as a page", (Answer(200, "A page.", media="text/html"),)),
    Open("/ui", "Watch and steer the server", (Answer(200, "A page.", media="text/html"),)),
)


def refusals_of(route: Route | Open) -> list[Refusal]:
    """Every error the route may answer, by status, without repetition."""
    rows = [*route.refusals, no.HEADERS_TOO_LARGE]
    if isinstance(route, Route):
        rows += [*route.access.refusals, no.INTERNAL]
        if route.body_read:
            # A body that is only dropped can end early or have malformed chunks, too
            rows += [no.BODY_INVALID, no.BODY_TOO_LARGE, no.BODY_STALLED, no.BYTES_SPENT]
        if any(parameter.name == _TENANT.name for parameter in route.parameters):
            rows.append(no.TENANT_NAME_INVALID)
    return sorted(dict.fromkeys(rows), key=lambda row: row.http)
