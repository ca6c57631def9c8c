"""Changes to topic policies, the overview and the metrics."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_ROOM = "test_topics.py::test_T61_only_so_many_workers_hold_leases"
_WAITING = (
    "test_topics.py::test_T61_T4_waiting_claims_are_looked_at_when_the_last_lease_of_a_holder_ends"
)
_TIERS = "test_topics.py::test_T61_priorities_are_those_of_the_tiers"
_AGE = "test_overview.py::test_the_age_counts_from_when_a_task_became_ready"

TOPICS = (
    # --- creates and ends
    Mutant(
        "any-priority",
        "csrc/rule.c",
        "        return CQ_PRIORITY_NO_TIER;",
        "        return CQ_OK;",
        _TIERS,
    ),
    Mutant(
        "priority-zero-without-a-tier",
        "csrc/rule.c",
        "create->priority = __builtin_ctz(policy->tiers);",
        "return CQ_PRIORITY_NO_TIER;",
        _TIERS,
    ),
    Mutant(
        "attempts-of-the-policy-win",
        "csrc/rule.c",
        "    if (create->max_attempts <= 0)\n",
        "    if (create->max_attempts != policy->max_attempts)\n",
        "test_topics.py::test_T61_attempts_are_those_of_the_policy_unless_named",
    ),
    Mutant(
        "refused-create-leaves-its-queue",
        "csrc/task.c",
        "        if (item->code != CQ_OK) {\n            cq_queue_release(engine, queue);\n",
        "        if (item->code != CQ_OK) {\n",
        "test_topics.py::test_T61_a_batch_that_is_refused_whole_leaves_nothing",
    ),
    Mutant(
        "retention-of-the-settings",
        "csrc/task.c",
        "        keep_ms = rule->policy.retention_ms;\n",
        "        keep_ms = keep_ms + 0;\n",
        "test_topics.py::test_T61_T3_ended_tasks_are_kept_as_long_as_the_policy_says",
    ),
    # --- consumers
    Mutant(
        "one-consumer-too-many",
        "csrc/rule.c",
        "queue->consumers < rule->policy.consumers_max ||",
        "queue->consumers <= rule->policy.consumers_max ||",
        _ROOM,
    ),
    Mutant(
        "a-holder-is-not-let-in-again",
        "csrc/rule.c",
        "           find_consumer(engine, queue, worker) != NULL;",
        "           false;",
        _ROOM,
    ),
    Mutant(
        "holders-not-counted-at-the-start",
        "codeq/engine/policies.py",
        "            self._govern(tenant, name, topic.policy)\n",
        "            self._govern(tenant, name, msgspec.structs.replace("
        "topic.policy, max_consumers=9999))\n",
        _ROOM,
    ),
    Mutant(
        "limited-queue-claimed-by-wildcard",
        "csrc/queue.c",
        "bool closed = queue->limited || (",
        "bool closed = (",
        _ROOM,
    ),
    Mutant(
        "a-consumer-stays-after-its-last-lease",
        "csrc/rule.c",
        "    if (--one->leases > 0)\n        return;\n    drop_consumer",
        "    if (--one->leases + 1 > 0)\n        return;\n    drop_consumer",
        "test_topics.py::test_T61_every_end_of_a_lease_makes_room",
    ),
    Mutant(
        "room-for-a-worker-serves-nobody",
        "csrc/rule.c",
        "    drop_consumer(engine, queue, one);\n    if (queue->ready > 0)\n",
        "    drop_consumer(engine, queue, one);\n    if (false)\n",
        _WAITING,
    ),
    Mutant(
        "the-first-of-a-lane-hides-those-let-in",
        "codeq/engine/claims.py",
        "elif key not in admitted and self._engine.limited(*key):",
        "elif False:",
        _WAITING,
    ),
    Mutant(
        "a-wider-limit-serves-nobody",
        "csrc/rule.c",
        "cq_queue_touch(engine, queue); /* others may be let in now */",
        "(void)0;",
        "test_topics.py::test_T61_a_wider_or_no_limit_serves_the_claims_that_wait",
    ),
    # --- the store and the routes
    Mutant(
        "policy-not-kept",
        "codeq/engine/policies.py",
        "self._journal.put(key, entry_value(key, msgspec.msgpack.encode(topic)))",
        "del key",
        "test_topics.py::test_T61_versions_and_times",
    ),
    Mutant(
        "policy-answered-before-its-sync",
        "codeq/engine/policies.py",
        "self._journal.after(lambda: done(topic, known is None))",
        "done(topic, known is None)",
        "test_topics.py::test_T61_a_policy_is_answered_after_its_sync_and_survives_a_crash",
    ),
    Mutant(
        "policy-body-not-strict",
        "codeq/model.py",
        'class TopicBody(Struct, rename="camel", forbid_unknown_fields=True):',
        'class TopicBody(Struct, rename="camel"):',
        "test_topics.py::test_T61_the_body_is_strict_json",
    ),
    Mutant(
        "policy-out-of-bounds",
        "codeq/server/rest_topics.py",
        "    if not least <= number <= most:\n",
        "    if number < least:\n",
        "test_topics.py::test_T61_a_policy_out_of_bounds_is_not_stored",
    ),
    # --- overview and metrics
    Mutant(
        "overview-of-every-tenant",
        "codeq/server/rest_admin.py",
        "    tenant = seen(request, principal)\n    edge.overviews",
        "    tenant = None\n    edge.overviews",
        "test_overview.py::test_T32_T36_admins_see_their_tenant_and_operators_all",
    ),
    Mutant(
        "webhooks-of-every-tenant",
        "codeq/server/overview.py",
        "[one for one in webhooks.exhausted if tenant in (None, one.tenant_id)]",
        "[*webhooks.exhausted]",
        "test_overview.py::test_T32_T36_admins_see_their_tenant_and_operators_all",
    ),
    Mutant(
        "counts-go-with-their-queue",
        "csrc/tally.c",
        "    if (counted > 0 && engine->tallies.count <= CQ_TALLIES_MAX)\n",
        "    if (counted == 0)\n",
        "test_overview.py::test_counts_outlive_a_queue_that_runs_empty",
    ),
    Mutant(
        "counts-without-bound",
        "csrc/tally.c",
        "    if (counted > 0 && engine->tallies.count <= CQ_TALLIES_MAX)\n",
        "    if (counted > 0)\n",
        "test_overview.py::test_T45_counts_of_queues_that_are_gone_are_bounded",
    ),
    Mutant(
        "queues-without-counts-stay",
        "csrc/tally.c",
        "    if (counted > 0 && engine->tallies.count <= CQ_TALLIES_MAX)\n",
        "    if (engine->tallies.count <= CQ_TALLIES_MAX)\n",
        "test_overview.py::test_counts_outlive_a_queue_that_runs_empty",
    ),
    Mutant(
        "dead-letters-counted-as-failed",
        "csrc/tally.c",
        "        tally->dead++;",
        "        tally->failed++;",
        "test_overview.py::test_T66_every_end_is_counted_once_by_queue",
    ),
    Mutant(
        "latency-bounds-belong-to-what-is-above",
        "csrc/tally.c",
        "latency_ms > CQ_LATENCY_MS[bucket]",
        "latency_ms >= CQ_LATENCY_MS[bucket]",
        "test_overview.py::test_every_end_is_counted_by_the_time_since_the_create",
    ),
    Mutant(
        "age-from-the-create",
        "csrc/task.c",
        "    slot->due_ms = due_ms;\n    cq_slot_set_state(engine, slot, CQ_READY);",
        "    cq_slot_set_state(engine, slot, CQ_READY);",
        _AGE,
    ),
    Mutant(
        "age-from-the-create-after-a-start",
        "csrc/recovery.c",
        "    if (slot->state == CQ_DELAYED && slot->due_ms <= now_ms)\n"
        "        slot->state = CQ_READY;",
        "    if (slot->state == CQ_DELAYED && slot->due_ms <= now_ms) {\n"
        "        slot->state = CQ_READY;\n        slot->due_ms = 0;\n    }",
        _AGE,
    ),
    Mutant(
        "age-of-one-that-is-back",
        "csrc/queue.c",
        "        if (i == 0 && level->ring_count == 0)\n",
        "        if (i == 0 && level->back.count > 0)\n",
        "test_overview.py::test_a_task_that_came_back_does_not_hide_the_age_of_the_others",
    ),
    Mutant(
        "ends-by-cancel-not-counted",
        "csrc/task.c",
        "    cq_count_end(slot, how->state, how->now_ms);\n",
        "    if (how->by != NULL)\n        cq_count_end(slot, how->state, how->now_ms);\n",
        "test_metrics.py::test_T66_every_end_on_every_path_is_counted_once",
    ),
    Mutant(
        "age-without-the-others-label",
        "codeq/engine/_counts.pyx",
        "                name = to_text(queue.label.name)\n",
        "                name = to_text(queue.command)\n",
        "test_metrics.py::test_T66_commands_beyond_the_limit_share_a_label",
    ),
)
