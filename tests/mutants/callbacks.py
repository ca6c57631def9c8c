"""Changes to webhooks and subscriptions."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CALLBACKS = (
    # --- webhooks and subscriptions
    Mutant(
        "subscription-names-anything",
        "codeq/server/rest_subscriptions.py",
        "    if not all(map(is_command, commands)):\n",
        "    if commands is None:\n",
        "test_rest_subscriptions.py::"
        "test_T45_T48_what_a_subscription_names_is_bounded_as_commands_are",
    ),
    Mutant(
        "webhook-announced-before-the-sync",
        "codeq/engine/deliveries.py",
        'self._journal.after(partial(self._announce, last + b"\\0"))',
        'self._announce(last + b"\\0")',
        "test_deliveries.py::test_an_entry_is_announced_after_the_sync_and_not_before",
    ),
    Mutant(
        "log-cut-under-a-pending-webhook",
        "codeq/engine/retention.py",
        "self._engine.trim(now_ms, keep)",
        "self._engine.trim(now_ms)",
        "test_deliveries.py::test_T18_the_log_is_held_until_the_copy_is_committed",
    ),
    Mutant(
        "copies-looked-for-before-removals-are-written",
        "codeq/engine/deliveries.py",
        "        self._journal.after(\n            lambda: self._runner.read(",
        "        (lambda look: look())(\n            lambda: self._runner.read(",
        "test_deliveries.py::test_a_removal_not_yet_written_is_not_undone_by_a_look_for_copies",
    ),
    Mutant(
        "pending-webhooks-not-taken-up-at-start",
        "codeq/server/webhooks.py",
        "self._committed(self._deliveries.end)",
        "self._at = self._deliveries.end",
        "test_webhooks.py::test_T18_kill_while_webhooks_are_pending",
    ),
    Mutant(
        "webhook-given-up-after-one-try",
        "codeq/server/webhooks.py",
        "if failure and pending.tries < self._tries_max:",
        "if failure and pending.tries < 1:",
        "test_webhooks.py::test_T18_pending_webhooks_go_on_after_a_restart",
    ),
    Mutant(
        "no-webhook-of-a-dead-letter",
        "csrc/task.c",
        "if (slot->flags & CQ_FLAG_WEBHOOK)",
        "if (slot->flags & CQ_FLAG_WEBHOOK && how->state != CQ_DEAD)",
        "test_deliveries.py::test_T15_every_end_leaves_a_delivery",
    ),
    Mutant(
        "address-of-a-connection-not-checked",
        "codeq/server/callbacks.py",
        "_, address = info\n        self.check(address[0])",
        "_, address = info",
        "test_targets.py::test_T38_a_literal_is_checked_at_the_connection_too",
    ),
    Mutant(
        "addresses-of-a-name-not-checked",
        "codeq/server/callbacks.py",
        "in found:\n            self.check(address[0])",
        "in found:",
        "test_targets.py::test_T38_a_name_that_turns_private_is_refused_at_the_next_connection",
    ),
    Mutant(
        "redirects-followed",
        "codeq/server/callbacks.py",
        "allow_redirects=False",
        "allow_redirects=True",
        "test_targets.py::test_T38_a_redirect_is_not_followed",
    ),
    Mutant(
        "translated-addresses-pass",
        "codeq/engine/targets.py",
        "found.ipv4_mapped or _embedded(found)",
        "found.ipv4_mapped",
        "test_targets.py::test_T38_private_addresses",
    ),
    Mutant(
        "subscription-of-any-tenant",
        "codeq/engine/subscriptions.py",
        "return one.tenant == tenant and one.expires_ms > now_ms",
        "return one.expires_ms > now_ms",
        "test_rest_subscriptions.py::test_T40_event_types_of_the_token_and_the_tenant",
    ),
    Mutant(
        "told-beyond-the-event-types-of-the-token",
        "codeq/engine/subscriptions.py",
        "if n and may(name)]",
        "if n]",
        "test_rest_subscriptions.py::test_T40_event_types_of_the_token_and_the_tenant",
    ),
    Mutant(
        "event-types-not-checked",
        "codeq/server/rest_subscriptions.py",
        "if not commands or not allowed:",
        "if not commands:",
        "test_rest_subscriptions.py::test_T40_event_types_of_the_token_and_the_tenant",
    ),
    Mutant(
        "one-line-for-all-webhook-hosts",
        "codeq/server/webhooks.py",
        "self._callbacks.places.submit(pending.host,",
        'self._callbacks.places.submit("",',
        "test_webhooks.py::test_T52_a_slow_host_delays_no_other_host_and_no_result",
    ),
    Mutant(
        "one-host-may-fill-the-window",
        "codeq/server/webhooks.py",
        "if host.more is None and host.count < self._host_max:",
        "if host.more is None:",
        "test_webhooks.py::test_T52_a_slow_host_delays_no_other_host_and_no_result",
    ),
    Mutant(
        "one-line-for-all-callback-hosts",
        "codeq/server/subscriptions.py",
        "self._callbacks.places.submit(host_of(url),",
        'self._callbacks.places.submit("",',
        "test_rest_subscriptions.py::test_T52_a_slow_subscriber_delays_no_other",
    ),
    Mutant(
        "group-tells-the-same-member-always",
        "codeq/engine/subscriptions.py",
        "member = next(later, members[0])",
        "member = members[0]",
        "test_subscriptions.py::test_T63_a_group_is_told_one_member_after_the_other",
    ),
    Mutant(
        "member-in-its-interval-is-passed-over",
        "codeq/engine/subscriptions.py",
        "elif len(member.waiting) < WAITING_MAX:",
        "elif False:",
        "test_subscriptions.py::test_T63_the_interval_is_that_of_the_member",
    ),
    Mutant(
        "hash-tells-the-first",
        "codeq/engine/subscriptions.py",
        "hashed[now_ms // MINUTE_MS % len(hashed)]",
        "hashed[0]",
        "test_subscriptions.py::test_T63_hash_reaches_the_member_of_the_minute",
    ),
    Mutant(
        "subscription-not-stored",
        "codeq/engine/subscriptions.py",
        "self._put(made)",
        "pass",
        "test_subscriptions.py::test_T64_subscriptions_survive_a_restart",
    ),
    Mutant(
        "interval-not-kept",
        "codeq/engine/subscriptions.py",
        "member.next_ms = self._clock.now_ms() + one.interval_ms",
        "member.next_ms = self._clock.now_ms()",
        "test_subscriptions.py::test_T64_the_interval_coalesces_and_loses_nothing",
    ),
)
