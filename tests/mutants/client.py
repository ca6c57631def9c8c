"""Changes to the client: what a broken connection, a lease or a refusal must not do (T65)."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CLIENT = (
    Mutant(
        "made-key-not-used",
        "codeq/client/producer.py",
        '_random_keys() if make_keys else itertools.repeat(b"")',
        'itertools.repeat(b"")',
        "test_client.py::test_T65_creates_without_a_key_get_one_and_are_sent_again_under_it",
    ),
    Mutant(
        "keyed-create-not-sent-again",
        "codeq/client/producer.py",
        "keep_keyed=group.resends <= RESENDS_MAX",
        "keep_keyed=False",
        "test_client.py::test_T65_after_a_break_only_keyed_creates_are_sent_again",
    ),
    Mutant(
        "closed-producer-leaves-calls-waiting",
        "codeq/client/producer.py",
        '        self._fail("the producer was closed")\n',
        "",
        "test_client.py::test_T65_closing_during_a_send_is_safe",
    ),
    Mutant(
        "token-function-asked-once",
        "codeq/client/stream.py",
        "return self._opened_at is None  # the next token may be better",
        "return True",
        "test_client.py::test_T65_a_token_that_cannot_be_had_is_asked_for_again",
    ),
    Mutant(
        "worker-sends-no-heartbeat",
        "codeq/client/worker.py",
        "self._beats.append(_wire.encode_heartbeat(task.id, self._lease_seconds))",
        "pass",
        "test_client_worker.py::test_T65_a_long_handler_is_kept_alive_by_heartbeats",
    ),
    Mutant(
        "unacknowledged-result-not-said-again",
        "codeq/client/worker.py",
        "self._results.tell_again()",
        "pass",
        "test_client_worker.py::test_T65_results_without_acknowledgement_are_sent_again",
    ),
    Mutant(
        "acknowledgement-out-of-order-not-found",
        "codeq/engine/_client.pyx",
        "return self.by_id.pop(str_of(task_id), -1)",
        "return -1",
        "test_client_results.py::test_T65_results_are_kept_until_they_are_acknowledged",
    ),
    Mutant(
        "refused-result-not-reported",
        "codeq/client/worker.py",
        "self._on_refused(task_id, refusal_of(text))",
        "pass",
        "test_client_worker.py::test_T65_refused_results_are_reported",
    ),
    Mutant(
        "batch-cancelled-only-when-the-whole-message-is-lost",
        "codeq/client/worker.py",
        "all(task.id in self.lost for task in self.at_once)",
        "all(task.id in self.lost for task in self.tasks)",
        "test_client_handlers.py::test_T65_heartbeats_and_lost_leases_of_a_message_with_batches",
    ),
    Mutant(
        "plain-handlers-on-the-event-loop",
        "codeq/sync.py",
        "return await asyncio.wrap_future(self.threads.begin(function, *arguments))",
        "return function(*arguments)",
        "test_sync.py::test_T65_handlers_in_threads_keep_their_leases",
    ),
    Mutant(
        "moved-clock-jumps-to-the-end",
        "codeq/testing.py",
        "clock.advance(max(0, when_ms - clock.now_ms()))",
        "clock.advance(end_ms - clock.now_ms())",
        "test_testing.py::test_T65_delays_leases_and_retries_come_due_when_the_clock_is_moved",
    ),
)
