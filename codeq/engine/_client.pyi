"""What a client does for each task: creates, handlers and results, whole messages at a time."""

from asyncio import Future
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, final, overload

from codeq.engine._wire import ClientTask
from codeq.errors import CodeqError

_T = TypeVar("_T")

#: Larger creates are refused before they are sent: no server takes a message that long.
ITEM_BYTES_MAX: Final[int]
#: No server takes a longer result either.
RESULT_BYTES_MAX: Final[int]
#: The outcome of a task whose handler was not called
UNTRIED: Final[object]

@final
class Item:
    """A create as the codec takes it."""

    #: Bytes that count while it is unacknowledged
    weight: Final[int]

def item_of(task: object, made_key: bytes) -> Item:
    """From a NewTask or a pair (command, payload); ``made_key`` is for a task without a key.
    Raises CodeqError for what can be told without a server."""

@final
class Group:
    """The creates of one message, from the call to the last acknowledgement.

    ``done``: a future that gets None once every create has its result. ``singles``: each create
    has a future of its own, which gets the id or the CodeqError.
    """

    number: Final[int]
    #: By place: the id of the task, the refusal, or None as long as neither is known
    results: Final[list[str | CodeqError]]
    #: Creates without a result
    left: Final[int]
    #: Bytes that count while it is unacknowledged
    weight: Final[int]
    #: Whether it was asked for its message
    sent: Final[bool]
    #: What ``fill`` took from the tasks and had no room for
    over: Final[Item | None]
    #: For the caller: how often it was sent again
    resends: int
    done: Final[Future[None]]

    def __init__(self, number: int, done: Future[None], *, singles: bool) -> None: ...
    def has_room(self, item: Item) -> bool: ...
    def add(self, item: Item, waiter: Future[str]) -> None: ...
    def fill(self, tasks: Iterator[object], keys: Iterator[bytes], over: Item | None) -> bool:
        """Takes in ``over``, then tasks as long as there is room; returns whether there are no
        more. What cannot be a task gets its refusal as result at once."""

    def message(self) -> bytes:
        """The one message with all creates; after the first time, with those that have a key and
        no result."""

    def settle_rest(self, error: CodeqError, *, keep_keyed: bool = False) -> None:
        """Gives the error to all creates without a result, ``keep_keyed``: that have no key."""

def producer_event(
    message: bytes, sent: dict[int, Group], refusal_of: Callable[[str], CodeqError]
) -> tuple[int, object]:
    """As decode_producer_server_event, but acknowledgements are given to the groups, which stand
    in ``sent`` by number; the answer has those that were taken out, since nothing of them is open
    any more. Raises WireError."""

@final
class Task(ClientTask):
    """One task as its handler sees it. Fields are read from the message when asked for.

    ``payload``: the bytes that the producer sent. ``attempts``: how often the task was claimed,
    this time included. ``lease_until``: RFC 3339, whole seconds; heartbeats make the lease longer
    than this. ``created_ms``: milliseconds since the epoch.
    """

    @overload
    def json(self) -> Any: ...
    @overload
    def json(self, type: type[_T]) -> _T:
        """The payload read as JSON, as a value of ``type`` (a msgspec Struct, a dataclass, ...).
        Raises msgspec.DecodeError when it is something else."""

@final
class Counts:
    """What a worker has done since it was made."""

    delivered: int  # tasks received
    finished: int  # results made by handlers
    returned: int  # nacks and abandons
    acknowledged: int  # results, nacks and abandons the server has accepted
    refused: int  # ... and refused

@final
class Results:
    """Results in the order in which they were found, until the server has acknowledged them.

    ``counts``: kept up to date. ``merge``: results go together in messages.
    """

    #: Whether handlers are not to be called any more
    abandoning: bool
    #: Results without an acknowledgement
    count: Final[int]

    def __init__(self, counts: Counts, *, merge: bool) -> None: ...
    def work(
        self,
        tasks: list[Task],
        place: int,
        handler: Callable[[Task], object],
        lost: set[str],
        until_s: float,
    ) -> tuple[int, object]:
        """Calls the handler for the tasks from ``place`` on and keeps what it returns.

        Ends early at a place where the handler returned something to await or an exception, or
        raised one, which is the second value; and with UNTRIED at a place where it was not called,
        because ``until_s`` of time.monotonic is over, the task is in ``lost`` or all are to be
        abandoned. Behind the last place nothing is left.
        """

    def complete(self, task: Task, outcome: object) -> None:
        """The task is COMPLETED with this result, None = without one. Raises what the JSON encoder
        raises, ValueError when it is too large."""

    def fail(self, task: Task, error: bytes) -> None:
        """The task is FAILED with this text."""

    @property
    def waiting(self) -> bool:
        """Whether ``messages`` has something to say."""

    def messages(self, bytes_max: int) -> list[bytes]:
        """What is new since the last call, in messages of at most about this size."""

    def tell_again(self) -> None:
        """Everything without an acknowledgement is new again."""

def worker_event(message: bytes, results: Results) -> tuple[int, object]:
    """As decode_worker_server_event, but tasks come as a list of Task, and acknowledgements of
    results are given to ``results``; the answer has the id and reason of each refusal. Raises
    WireError."""
