"""Every limit of the service, in one place. A request beyond one is refused with the limit in the message."""

from __future__ import annotations

#: Observations in one report.
BATCH_MAX = 4096
#: Receipts in one report.
RECEIPTS_MAX = 4096
#: Bytes in one HTTP request body or gRPC message.
BODY_BYTES_MAX = 4 * 1024 * 1024
#: Different signals of one run.
SIGNALS_MAX = 64
#: Shadow policies of one run.
SHADOWS_MAX = 3
#: Observations that a what-if folds again in one request; `flyball-server replay` has no such limit.
WHAT_IF_OBSERVATIONS_MAX = 2_000_000
#: What-ifs computed at the same time; more are asked to come again.
WHAT_IFS_MAX = 1
#: Controls that one run may declare.
CONTROLS_MAX = 32
#: Commands of one run that are not over, and its open proposals, in all and of one proposer.
COMMANDS_MAX = 32
PROPOSALS_MAX = 64
PROPOSALS_OF_ONE_MAX = 8
#: Of a run's signals these are left for the driver's own, however many others report.
DRIVER_SIGNALS = 16
#: How far away the end of a command may be: ten years.
EXPIRES_MAX_S = 3650 * 86400.0
#: Runs that one fleet command or canary may mean, and how many of them are worked on at the same time.
FLEET_MAX = 2000
FLEET_PARALLEL = 32
#: Bytes of a command as JSON, without the runs it is for.
COMMAND_BYTES_MAX = 64 * 1024
#: Idempotency keys of fleet commands that are remembered, the newest.
FLEET_KEYS_KEPT = 10_000
#: Characters of a selector.
SELECTOR_MAX = 2000
#: How often the store's journal is looked at for a freeze or a canary that another process made known.
TAIL_POLL_S = 0.5
#: Thaws whose reason is remembered for runs that come back later, the newest.
THAWS_KEPT = 256
#: Canaries that may be open at a time, those that are remembered, and how often runs that came later are looked for.
CANARIES_OPEN_MAX = 32
CANARIES_KEPT = 256
CANARY_EVERY_S = 2.0
#: Runs of one arm of a canary that are compared, those first by hash; what is read at a time; newest losses of each;
#: observations that a smoothed loss is the median of.
CANARY_COMPARED_MAX = 500
CANARY_READS = 4
CANARY_LOSSES_MAX = 20_000
CANARY_WINDOW = 64
#: Bytes of a directive's arguments as JSON.
DIRECTIVE_BYTES_MAX = 4096
#: How long one request may wait for a command to be over, and how often a change by another replica is looked for.
WAIT_MAX_S = 60.0
WAIT_POLL_S = 1.0
#: How often commands that end at a time are looked for.
EXPIRE_EVERY_S = 1.0
#: People whose approval a project may demand for a proposed command.
APPROVALS_MAX = 10
#: Bytes as JSON of policy, base, guard and shadows, each, that an attach may carry.
SPEC_BYTES_MAX = 256 * 1024
#: Parameter groups of one run.
GROUPS_MAX = 256
#: Labels of one run.
LABELS_MAX = 32
#: Characters in a name: project, run, group, signal, label key or value.
NAME_MAX = 128
#: Any step, number or seed: what a float, and so every JSON reader, still holds exactly.
INTEGER_MAX = 2**53
#: Requests that may wait for one run at a time.
INBOX_MAX = 64
#: Runs kept folded in memory; the least recently used leave first and are folded again when asked for.
LIVE_RUNS_MAX = 20_000
#: Observations between two snapshots of a run.
SNAPSHOT_EVERY = 10_000
#: Times an append is tried again after another replica was faster.
APPEND_TRIES = 8
#: Newest attempts whose sessions are remembered: none of these may open another one.
ATTEMPTS_CHECKED = 16
#: Journal rows looked through for the decisions of steps that a client sends again.
RESENT_ROWS_MAX = 512
#: Runs in one page of a listing.
PAGE_MAX = 500
#: Decisions in one page.
DECISIONS_MAX = 10_000
#: Points of one series.
POINTS_MAX = 20_000
#: Series in one request.
SERIES_MAX = 32
#: A run without news for so long is called stale, and lost; its job goes on as if nothing had been, when it comes back.
STALE_AFTER_S = 60.0
LOST_AFTER_S = 900.0
#: How often the store is told of a job that lives and has nothing to add to the journal.
HEARD_EVERY_S = 20.0
#: Streams at a time; each is one training job.
STREAMS_MAX = 20_000
#: Time that requests in flight get to finish when the service is told to stop.
DRAIN_S = 10.0
#: Bytes of an HTTP request's first line and header fields together, and the time they may take to come.
HEAD_BYTES_MAX = 64 * 1024
HEAD_S = 10.0
#: HTTP connections at a time, and requests under way; more are answered with 503.
CONNECTIONS_MAX = STREAMS_MAX
#: How long an HTTP connection may idle before it is closed.
KEEP_ALIVE_S = 120
#: What is kept free of the disk under the store, unless the setting `disk_free_min` says otherwise.
DISK_FREE_MIN_BYTES = 64 << 20
#: A store is nearly full at this share of its limit, and where the disk has less than so many times the minimum.
NEARLY_FULL = 0.9
DISK_NEARLY_FULL = 4
#: So far below these limits a store must come before it is better again, or every commit would change it; and the
#: write-ahead log, which counts, may take this share of the limit before it is cut back.
ROOM_AGAIN = 0.1
#: A run that was found damaged is examined again when it is asked for after this time, or after so many times as
#: long as examining it took.
DAMAGE_RECHECK_S = 3.0
DAMAGE_RECHECK_SHARE = 20.0
#: Rows that the scrub checks at a time, its share of one core, and the runs it remembers to have checked.
SCRUB_ROWS = 256
SCRUB_SHARE = 0.2
SCRUBBED_MAX = 100_000
#: Characters in a reason, in a note, and in a directive's answer.
REASON_MAX = 500
#: Characters in what a receipt says of somebody else who wrote: it may name several groups.
CONFLICT_MAX = 2000
#: Times that a row of the store's journal is tried again: nothing spreads these writers, as runs do those of runs.
LEDGER_TRIES = 64
#: Tokens that may be valid at a time, projects of one, and the longest time that one may be said to live.
TOKENS_MAX = 10_000
TOKEN_PROJECTS_MAX = 64
TOKEN_LIFE_MAX_S = 10 * 366 * 86400
#: What another process wrote about tokens is known after this time.
TOKENS_FRESH_S = 0.5
#: Requests a second of one token, or of one address where nobody is asked for a token; as many may come at once.
REQUESTS_PER_S = 5000.0
#: Requests without a valid token that one address may send within this time before it is told to wait.
FAILURES_MAX = 20
FAILURES_WITHIN_S = 60.0
#: Tokens or addresses whose rates are remembered.
CALLERS_MAX = 10_000
#: How often the same peer and reason come to the record of what was refused, and how many of them at a time.
REFUSED_EVERY_S = 60.0
REFUSED_PEERS_MAX = 64
#: Rows of the store's journal that are read at a time.
LEDGER_PAGE = 1000
#: Tombstones in one page.
TOMBSTONES_MAX = 1000
#: Rows, observations and bytes of rows in one part of an export; the last row may go beyond the latter two.
EXPORT_ROWS_MAX = 4096
EXPORT_OBSERVATIONS_MAX = 16384
EXPORT_ROWS_BYTES = 8 << 20
#: Bytes of one part of an export and what it may unpack to, and of one line between the parts.
EXPORT_PART_MAX = 32 << 20
EXPORT_UNPACKED_MAX = 64 << 20
EXPORT_LINE_MAX = 4096
#: Bytes of an export that may be sent for import, and imports at a time.
IMPORT_BYTES_MAX = 1 << 30
IMPORTS_MAX = 2
#: Values of settings applied that a table or a schedule keeps in memory, at 8 bytes each.
APPLIED_VALUES_MAX = 1 << 25
#: Rows of a run in one page of its journal, and rows looked through for them: a page may be short of matches.
JOURNAL_ROWS_MAX = 1000
JOURNAL_LOOKED_MAX = 20_000
#: Entries in one page of the audit.
AUDIT_ROWS_MAX = 1000
#: Runs in one signed list of heads, and lists in one page.
HEADS_RUNS_MAX = 2000
HEADS_LISTS_MAX = 1000
#: How often the heads of runs that moved are signed, unless the setting `heads_every_s` says otherwise.
HEADS_EVERY_S = 3600.0
#: Webhooks; deliveries of one that may wait, and that are read at a time; deliveries in one page.
HOOKS_MAX = 32
HOOK_PENDING_MAX = 10_000
HOOK_BATCH = 32
DELIVERIES_MAX = 1000
#: How long a receiver may take; the first and the longest wait behind a failed attempt; when a delivery is given up;
#: and how often one is sent that the receiver refuses for good.
HOOK_TIMEOUT_S = 10.0
HOOK_BACKOFF_S = 1.0
HOOK_BACKOFF_MAX_S = 300.0
HOOK_GIVE_UP_S = 86_400.0
HOOK_REFUSED_TRIES = 3
#: How often runs are looked for that went silent.
HOOK_SWEEP_S = 10.0
