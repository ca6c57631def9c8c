"""Small changes, such as somebody might make, each with a test that must notice it."""

from __future__ import annotations

from tests.mutants.callbacks import CALLBACKS
from tests.mutants.client import CLIENT
from tests.mutants.edges import EDGES
from tests.mutants.limits import LIMITS
from tests.mutants.mutant import Mutant
from tests.mutants.operations import OPERATIONS
from tests.mutants.shipped import SHIPPED
from tests.mutants.topics import TOPICS
from tests.mutants.traps import TRAPS

POWER_LOSS = "test_crash.py::test_T17_power_loss_after_an_acknowledgement_loses_nothing"
SYNC_STARTS = "self._runner.run(lambda: self._store.sync(sequence), self._synced)"
ACK_FIRST = (
    "(self._runner.run(lambda: self._store.sync(sequence), lambda _: None), "
    "self._runner.soon(lambda: self._synced(None)))"
)
#: Those that the crash harness must notice too, and whether it takes a loss of power for it. Not
#: "id-clock-not-kept": the clock of a server under it never goes back.
CRASHED = {
    "ack-before-sync": True,
    "sync-left-out": True,
    "ack-before-write": False,
    "group-not-atomic": False,
    "deliver-before-commit": True,
    "chunk-removed-too-early": False,
    "directory-written-too-early": False,
    "key-not-checked-while-pending": False,
    "key-not-written": False,
    "lease-not-reloaded": False,
    "lease-timer-not-reloaded": False,
    "attempts-not-reloaded": False,
    "one-attempt-too-many": False,
    "given-back-goes-to-the-end": False,
    "priority-order-reversed": False,
}
MUTANTS = (
    # --- what is promised before it is on disk
    Mutant(
        "ack-before-sync",
        "codeq/engine/journal.py",
        SYNC_STARTS,
        ACK_FIRST,
        "test_shard.py::test_T17_no_answer_before_the_sync_of_its_group",
    ),
    Mutant(
        "ack-before-sync-seen-by-power-loss",
        "codeq/engine/journal.py",
        SYNC_STARTS,
        ACK_FIRST,
        POWER_LOSS,
    ),
    Mutant(
        "sync-left-out",
        "codeq/engine/store.py",
        "self._db.flush_wal(True)",
        "self._db.flush_wal(False)",
        POWER_LOSS,
    ),
    Mutant(
        "ack-before-write",
        "codeq/engine/journal.py",
        "        self._waiting.append(done)",
        "        self._runner.soon(done)",
        "test_crash.py::test_T17_kill_9_after_an_acknowledgement_loses_nothing",
    ),
    Mutant(
        "deliver-before-commit",
        "codeq/engine/shard.py",
        "self.journal.after(lambda: self._load_bodies(waiter, claim, 1))",
        "self._load_bodies(waiter, claim, 1)",
        "test_stream_life.py::test_I4_no_task_is_assigned_before_its_claim_is_synced",
    ),
    Mutant(
        "create-answered-before-commit",
        "codeq/engine/shard.py",
        "self.journal.after(lambda: done(None))",
        "self._runner.soon(lambda: done(None))",
        "test_stream_life.py::"
        "test_I2_no_task_is_assigned_or_acknowledged_before_its_create_is_synced",
    ),
    Mutant(
        "sync-error-ignored",
        "codeq/engine/journal.py",
        'self.fail(f"sync of the store failed: {error}")',
        "self._answer(self._committing)",
        "test_faults.py::test_T6_a_failed_sync_stops_the_process_and_acknowledges_nothing",
    ),
    Mutant(
        "write-error-ignored",
        "codeq/engine/journal.py",
        'self.fail(f"write to the store failed: {error}")\n            return\n',
        "self._answer(waiting)\n            return\n",
        "test_faults.py::test_T6_a_full_disk_stops_the_process_and_acknowledges_nothing",
    ),
    Mutant(
        "reserve-not-kept",
        "codeq/engine/shard.py",
        "if self._free_bytes < settings.disk_reserve_bytes:",
        "if self._free_bytes < 0:",
        "test_faults.py::test_the_reserve_of_a_full_disk_is_kept_and_service_resumes",
    ),
    Mutant(
        "synced-not-checked",
        "codeq/engine/store.py",
        "if found < synced:",
        "if found < 0:",
        "test_shard.py::test_a_lost_log_is_noticed",
    ),
    Mutant(
        "room-not-reclaimed",
        "codeq/engine/shard.py",
        "            self._retention.reclaim()\n",
        "            pass\n",
        "test_removal.py::test_what_was_removed_leaves_a_full_disk_at_once",
    ),
    # --- removal
    Mutant(
        "chunk-removed-too-early",
        "csrc/log.c",
        "log->segments[segment - log->first_segment].expires_ms <= now_ms)",
        "log->segments[segment - log->first_segment].expires_ms != now_ms)",
        "test_removal.py::test_T3_nothing_goes_a_millisecond_before_its_keeping_time_is_over",
    ),
    Mutant(
        "chunk-removed-one-ms-early",
        "csrc/log.c",
        "log->segments[segment - log->first_segment].expires_ms <= now_ms)",
        "log->segments[segment - log->first_segment].expires_ms <= now_ms + 1)",
        "test_removal.py::test_T3_nothing_goes_a_millisecond_before_its_keeping_time_is_over",
    ),
    Mutant(
        "result-gone-one-ms-early",
        "codeq/engine/reader.py",
        "view.expires_ms <= now_ms",
        "view.expires_ms <= now_ms + 1",
        "test_removal.py::test_T3_results_can_be_read_up_to_the_last_millisecond",
    ),
    Mutant(
        "directory-written-too-early",
        "csrc/log.c",
        "if (--block->open == 0)",
        "if (--block->open == 1)",
        "test_engine_log.py::test_closed_bucket_leaves_memory_and_its_directory_finds_every_task",
    ),
    Mutant(
        "straggler-left-behind",
        "csrc/log.c",
        "slot->created_chunk = log->next_seq;\n    cq_segment *new",
        "cq_segment *new",
        "test_engine_log.py::test_T2_straggler_is_carried_and_holds_no_log",
    ),
    # --- keys
    Mutant(
        "key-not-checked-while-pending",
        "codeq/engine/keys.py",
        "found = [self._open.get(hashed) for hashed in hashes]",
        "found: list[Known | None] = [None for _ in hashes]",
        "test_shard.py::test_I7_T28_concurrent_creates_with_one_key_make_one_task",
    ),
    Mutant(
        "key-not-written",
        "codeq/engine/shard.py",
        "for key, value in self._keys.note(creates, fresh, now_ms):",
        "for key, value in self._keys.note(creates, fresh, now_ms)[:0]:",
        "test_shard.py::test_T31_keys_survive_restart_and_end_with_their_window",
    ),
    Mutant(
        "key-shared-by-tenants",
        "codeq/engine/keys.py",
        'return _hash(tenant + b"\\0" + key)',
        "return _hash(key)",
        "test_shard.py::test_T29_two_tenants_may_use_one_key",
    ),
    Mutant(
        "request-not-compared",
        "codeq/engine/keys.py",
        "return self._lenient or request in (other, UNKNOWN_REQUEST)",
        "return True",
        "test_shard.py::test_T30_same_key_with_other_content_is_refused",
    ),
    Mutant(
        "keys-not-filed-again",
        "codeq/engine/recovery.py",
        "        keys.refile(store, key_window_ms)\n",
        "",
        "test_keys.py::test_I7_T31_keys_are_known_when_the_window_has_changed",
    ),
    Mutant(
        "key-missed-when-the-clock-went-back",
        "codeq/engine/keys.py",
        "for _, hashed, _ in keyed], max(now_ms, self._floor_ms))",
        "for _, hashed, _ in keyed], now_ms)",
        "test_keys.py::test_I7_T31_a_clock_set_back_over_a_restart_loses_no_key",
    ),
    # --- restart
    Mutant(
        "lease-not-reloaded",
        "csrc/recovery.c",
        "slot->state = CQ_LEASED;",
        "slot->state = CQ_READY;",
        "test_engine_log.py::test_T14_every_lease_is_known_to_expiry_after_a_crash",
    ),
    Mutant(
        "lease-timer-not-reloaded",
        "csrc/recovery.c",
        "cq_heap_push(&engine->due, slot->due_ms, cq_id_number(slot->id), &slot->heap_at);",
        "if (slot->state != CQ_LEASED) cq_heap_push(&engine->due, slot->due_ms, "
        "cq_id_number(slot->id), &slot->heap_at);",
        "test_engine_log.py::test_T14_every_lease_is_known_to_expiry_after_a_crash",
    ),
    Mutant(
        "attempts-not-reloaded",
        "csrc/recovery.c",
        "    slot->attempts = record->attempts;\n    slot->updated_ms = record->at_ms;\n"
        "    return set_holder(engine, slot, record, record->tenant);",
        "    slot->updated_ms = record->at_ms;\n"
        "    return set_holder(engine, slot, record, record->tenant);",
        "test_engine_log.py::test_T14_every_lease_is_known_to_expiry_after_a_crash",
    ),
    Mutant(
        "id-clock-not-kept",
        "csrc/task.c",
        "int64_t id_ms = now_ms > engine->last_id_ms ? now_ms : engine->last_id_ms;",
        "int64_t id_ms = now_ms;",
        "test_engine_log.py::"
        "test_ids_are_version_7_and_sort_in_creation_order_whatever_the_clock_does",
    ),
    # --- attempts, leases, order
    Mutant(
        "attempt-not-counted",
        "csrc/claim.c",
        "    slot->attempts++;\n",
        "",
        "test_engine.py::test_claim_leases_and_counts_an_attempt",
    ),
    Mutant(
        "one-attempt-too-many",
        "csrc/task.c",
        "if (slot->attempts >= slot->max_attempts) {\n        status = end(",
        "if (slot->attempts > slot->max_attempts) {\n        status = end(",
        "test_engine.py::test_T12_I5_max_attempts_is_the_number_of_deliveries",
    ),
    Mutant(
        "give-back-forgets-the-attempt",
        "csrc/task.c",
        "return go_back(engine, slot, slot->attempts - 1, 0, slot->error, now_ms);",
        "return go_back(engine, slot, slot->attempts, 0, slot->error, now_ms);",
        "test_engine.py::test_T7_claim_not_delivered_returns_attempt_unused",
    ),
    Mutant(
        "owner-not-checked",
        "csrc/task.c",
        "return owns(*slot, caller->worker, caller) ? CQ_OK : CQ_NOT_OWNER;",
        "return CQ_OK;",
        "test_engine.py::test_T33_I3_worker_id_opens_only_leases_of_its_own_tenant_and_name",
    ),
    Mutant(
        "expiry-not-armed",
        "codeq/engine/shard.py",
        "self._due = (due_ms, self._runner.at(due_ms, self._tick))",
        "self._due = (due_ms, lambda: None)",
        "test_timers.py::test_T23_a_delayed_task_reaches_a_waiting_claim_at_its_millisecond",
    ),
    Mutant(
        "reason-of-a-nack-dropped",
        "csrc/task.c",
        "return go_back(engine, slot, slot->attempts, *delay_ms, error, now_ms);",
        "return go_back(engine, slot, slot->attempts, *delay_ms, (free(error), NULL), now_ms);",
        "test_engine.py::test_T16_nack_reason_is_kept_shown_and_cut_at_a_character",
    ),
    Mutant(
        "result-twice-in-a-batch",
        "codeq/engine/shard.py",
        "elif view.id_bytes not in seen and _repeats(",
        "elif _repeats(",
        "test_shard.py::test_T10_the_same_task_twice_in_one_batch_is_accepted_once",
    ),
    Mutant(
        "priority-order-reversed",
        "csrc/queue.c",
        "cq_heap_push(&queue->levels, rank(priority), 0, &level->heap_at);",
        "cq_heap_push(&queue->levels, -rank(priority), 0, &level->heap_at);",
        "test_engine.py::test_T24_I6_claim_never_empty_and_never_of_lower_priority",
    ),
    Mutant(
        "priority-over-queues-reversed",
        "csrc/claim.c",
        "return a->priority > b->priority;",
        "return a->priority < b->priority;",
        "test_engine.py::test_named_queues_are_taken_in_their_order_or_by_priority",
    ),
    Mutant(
        "delivered-one-ms-early",
        "csrc/task.c",
        "due_ms = cq_plus(now_ms, (int64_t)item->delay_seconds * 1000);",
        "due_ms = cq_plus(now_ms, (int64_t)item->delay_seconds * 1000 - 1);",
        "test_engine.py::test_create_due_later_is_delayed_and_run_at_wins",
    ),
    *TRAPS,
    *CLIENT,
    *OPERATIONS,
    *EDGES,
    *TOPICS,
    *CALLBACKS,
    *LIMITS,
    *SHIPPED,
)
