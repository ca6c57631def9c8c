"""Small changes, such as somebody might make, each with a test that must notice it."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.traps import TRAPS

POWER_LOSS = "test_crash.py::test_T17_power_loss_after_an_acknowledgement_loses_nothing"
SYNC_STARTS = "self._runner.run(lambda: self._store.sync(sequence), self._synced)"
ACK_FIRST = (
    "(self._runner.run(lambda: self._store.sync(sequence), lambda _: None), "
    "self._runner.soon(lambda: self._synced(None)))"
)
#: Those that the crash harness must notice too, and whether it takes a loss of power for it
CRASHED = {
    "ack-before-sync": True,
    "sync-left-out": True,
    "ack-before-write": False,
    "group-not-atomic": False,
    "deliver-before-commit": True,
    "chunk-removed-too-early": False,
    "directory-written-too-early": False,
    "straggler-left-behind": False,
    "key-not-checked-while-pending": False,
    "key-not-written": False,
    "lease-not-reloaded": False,
    "lease-timer-not-reloaded": False,
    "attempts-not-reloaded": False,
    "id-clock-not-kept": False,
    "one-attempt-too-many": False,
    "given-back-goes-to-the-end": False,
    "priority-order-reversed": False,
}
MUTANTS = (
    *TRAPS,
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
        'self.fail(f"write to the store failed: {error}")',
        "self._answer(waiting)",
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
        "codeq/engine/recovery.py",
        "if found < synced:",
        "if found < 0:",
        "test_shard.py::test_a_lost_log_is_noticed",
    ),
    # --- removal
    Mutant(
        "chunk-removed-too-early",
        "csrc/log.c",
        "&& log->segments[gone].expires_ms <= now_ms)",
        "&& log->segments[gone].expires_ms != now_ms)",
        "test_removal.py::test_T3_nothing_goes_a_millisecond_before_its_keeping_time_is_over",
    ),
    Mutant(
        "chunk-removed-one-ms-early",
        "csrc/log.c",
        "&& log->segments[gone].expires_ms <= now_ms)",
        "&& log->segments[gone].expires_ms <= now_ms + 1)",
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
        "self._open.get(hashed) or _decode(",
        "_decode(",
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
        '_hash(tenant.encode() + b"\\0" + key)',
        "_hash(key)",
        "test_shard.py::test_T29_two_tenants_may_use_one_key",
    ),
    Mutant(
        "request-not-compared",
        "codeq/engine/keys.py",
        "return self._lenient or request == other",
        "return True",
        "test_shard.py::test_T30_same_key_with_other_content_is_refused",
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
    # --- artifacts
    Mutant(
        "artifact-name-may-hold-a-path",
        "codeq/server/artifacts.py",
        'and not any(char in "/\\\\" or not char.isprintable() for char in name)',
        "and all(char.isprintable() for char in name)",
        "test_artifacts.py::test_T39_a_refused_artifact_stores_nothing",
    ),
    Mutant(
        "artifact-content-not-kept",
        "codeq/server/artifacts.py",
        "found.append(Kept(name, content_base64=text, content_type=content_type))",
        "found.append(Kept(name, content_type=content_type))",
        "test_artifacts.py::"
        "test_T32_T60_artifacts_of_a_batch_survive_a_restart_and_keep_to_their_tenant",
    ),
    # --- tokens
    Mutant(
        "subject-of-a-worker-not-required",
        "codeq/server/auth.py",
        "    if not principal.subject:\n",
        "    if principal.subject is None:\n",
        "test_auth.py::test_T37_incomplete_worker_tokens",
    ),
    Mutant(
        "event-types-in-any-case",
        "codeq/server/auth.py",
        "dict.fromkeys(name.encode() for name in names if name and name != WILDCARD)",
        "dict.fromkeys(name.lower().encode() for name in names if name and name != WILDCARD)",
        "test_auth.py::test_T43_event_types_are_compared_as_commands_are",
    ),
    Mutant(
        "static-token-compared-early-out",
        "codeq/server/providers.py",
        "if hmac.compare_digest(token.strip().encode(), self._token):",
        "if token.strip().encode() == self._token:",
        "test_auth.py::test_T42_tokens_are_compared_in_constant_time",
    ),
    Mutant(
        "stream-outlives-its-token",
        "codeq/server/streams.py",
        "        if left_ms <= 0:\n",
        "        if left_ms <= -86400_000:\n",
        "test_jwks_live.py::test_T42_streams_end_with_their_token_when_so_set",
    ),
    Mutant(
        "token-without-exp-lasts",
        "codeq/server/jwks.py",
        'raise unauthenticated("missing exp")',
        "return TIME_MS_MAX",
        "test_jwks.py::test_T41_claims_that_are_refused",
    ),
    Mutant(
        "token-without-kid-taken",
        "codeq/server/jwks.py",
        'if not header.get("kid"):',
        'if not header.setdefault("kid", "k1"):',
        "test_jwks.py::test_T41_tokens_without_a_key_id_are_refused",
    ),
    Mutant(
        "skew-forgotten-at-exp",
        "codeq/server/jwks.py",
        'end_ms = _time_ms(claims["exp"]) + self._skew_ms',
        'end_ms = _time_ms(claims["exp"])',
        "test_jwks.py::test_T41_skew_to_the_millisecond",
    ),
    Mutant(
        "signature-not-checked",
        "codeq/server/jwks.py",
        '_jws.decode_complete(text, key, algorithms=[header["alg"]])',
        '_jws.decode_complete(text, options={"verify_signature": False})',
        "test_jwks.py::test_T41_a_public_key_is_no_shared_secret",
    ),
    Mutant(
        "any-algorithm-for-any-key",
        "codeq/server/jwks.py",
        "return allowed if named is None else tuple(name for name in allowed if name == named)",
        "return tuple(SIGNED_WITH)",
        "test_jwks.py::test_T41_the_type_of_the_key_decides_the_algorithm",
    ),
    Mutant(
        "fetch-per-unknown-kid",
        "codeq/server/jwks.py",
        "self._now_ms() - tried_ms >= RETRY_MS",
        "self._now_ms() - tried_ms >= 0",
        "test_jwks.py::test_T41_a_thousand_unknown_kids_make_one_fetch",
    ),
    Mutant(
        "outage-locks-everybody-out",
        "codeq/server/jwks.py",
        "usable = age_ms < OUTAGE_MS",
        "usable = age_ms < KEPT_MS",
        "test_jwks.py::test_T41_a_short_outage_locks_nobody_out",
    ),
    Mutant(
        "old-keys-serve-for-ever",
        "codeq/server/jwks.py",
        "usable = age_ms < OUTAGE_MS",
        "usable = age_ms < TIME_MS_MAX",
        "test_jwks.py::test_T41_a_short_outage_locks_nobody_out",
    ),
    Mutant(
        "token-outlives-its-key",
        "codeq/server/jwks.py",
        "if self._generation == self._source.generation and self._lives(known):",
        "if self._lives(known):",
        "test_jwks.py::test_T41_withdrawn_keys_die_with_the_tokens_they_signed",
    ),
    Mutant(
        "unknown-key-of-a-provider-ignored",
        "codeq/server/providers.py",
        "        if name not in names:\n",
        "        if name in ():\n",
        "test_providers.py::test_T62_bad_jwks_settings_name_their_key",
    ),
    Mutant(
        "development-tokens-of-two-tenants",
        "codeq/config.py",
        '    "eventTypes": ["*"],\n    "raw": {"tenantId": DEV_TENANT},',
        '    "eventTypes": ["*"],\n    "raw": {"tenantId": "other"},',
        "test_config.py::test_T57_development_mode_has_two_tokens_of_one_tenant",
    ),
    Mutant(
        "signed-tokens-without-their-tenant",
        "codeq/tokens.py",
        'payload["tenantId"] = claims.tenant',
        'payload["tenant"] = claims.tenant',
        "test_tokens.py::test_T57_the_tokens_of_the_page_share_a_tenant_and_deliver_a_task",
    ),
    # --- rate limits
    Mutant(
        "batch-pays-for-one",
        "codeq/server/rest_tasks.py",
        "edge.limits.admit(CREATE_TASK, principal, len(items))",
        "edge.limits.admit(CREATE_TASK, principal)",
        "test_limits.py::test_T53_batches_over_rest_pay_for_every_task",
    ),
    Mutant(
        "large-batch-pays-the-burst",
        "codeq/server/limits.py",
        "self._refilled(bucket, now_ms) - count * TOKEN",
        "self._refilled(bucket, now_ms) - min(count * TOKEN, self._full)",
        "test_limits.py::test_T53_a_batch_above_the_burst_needs_a_full_bucket_and_leaves_a_debt",
    ),
)
