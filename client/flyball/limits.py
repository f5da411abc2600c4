"""Every limit of the client, in one place."""

from __future__ import annotations

#: Observations in one report. More wait for the next one.
BATCH_MAX = 1024
#: In free-running mode a report leaves when so many observations wait: only steps of less than 0.2 ms come to that ...
FLUSH_OBSERVATIONS = 256
#: ... or when so much time has passed since the last one, whichever comes first.
FLUSH_INTERVAL_S = 0.05
#: ... and how often a number that is still on its device is asked for, once the report is due.
DEVICE_POLL_S = 0.005
#: Observations kept while the service cannot be reached; beyond that the oldest are dropped and counted.
BUFFER_MAX = 100_000
#: Receipts kept while the service cannot be reached; beyond that the oldest are dropped and counted.
RECEIPTS_MAX = 10_000
#: Receipts in one report.
RECEIPTS_BATCH_MAX = 1024
#: Settings kept for lag = k: more than any report brings.
CHANGES_MAX = 4096
#: The link counts as down for `on_outage` after so long without an answer that was due.
OUTAGE_AFTER_S = 5.0
#: A job that has nothing to say is heard of, and hears what is new, once in so long: a step may take minutes.
HEARTBEAT_S = 15.0
#: Pauses between attempts to connect: doubled from the first to the last, with jitter.
BACKOFF_FIRST_S = 0.05
BACKOFF_LAST_S = 5.0
#: How long one connection attempt or one answer may take before the link tries anew.
CONNECT_S = 5.0
ANSWER_S = 15.0
#: With wait_s=None: a log line each time a step has waited so long.
WAIT_LOG_S = 10.0
#: Ranks that wait for another one: a log line after WAIT_LOG_S, and then again each time so long has passed.
WAIT_LOG_AGAIN_S = 30.0
#: How long attach waits for all ranks, and an optimizer step for the exchange with another rank: half of what NCCL
#: gives a collective, so that the job is not ended for our sake. `Ranks.timeout_s` says otherwise.
EXCHANGE_S = 300.0
#: How often it is looked whether all ranks are there to attach.
MEETING_POLL_S = 0.05
#: Optimizer steps without a call of governor.step that are worth a log line.
UNREPORTED_STEPS = 100
#: How long a script that forgot to close its governor is held up at its exit.
EXIT_S = 2.0
#: Different signals of one run besides loss, reward and grad_norm, and the characters of a signal's name.
SIGNALS_MAX = 60
NAME_MAX = 128
#: Calls of governor.step without an optimizer step before the log asks whether they are micro-batches (a GradScaler
#: skips a few when it starts), and before it says that there never was an optimizer step.
UNSTEPPED_MAX = 8
NEVER_STEPPED_MAX = 16
#: Micro-batches of one step whose values may be on their way from a device at once; beyond that the loss is not known.
MICRO_PENDING_MAX = 1024
#: Groups whose effective learning rate is told, where an optimizer finds its own.
EFFECTIVE_MAX = 16
#: Declared controls of one run.
CONTROLS_MAX = 32
#: Directives remembered, so that none is carried out twice, and those that may wait for the training thread at once.
DIRECTIVES_MAX = 256
DIRECTIVES_PENDING_MAX = 64
#: How often an answer that the service did not take may be sent once more, where it asks again.
ANSWERS_AGAIN = 2
#: Commands that wait for the first step under them; what comes beyond that is confirmed with a later one.
CONFIRMS_MAX = 64
#: Notices remembered, so that none is logged twice, and the length of a notice or of an answer's note.
NOTICES_MAX = 256
NOTE_CHARS = 500
#: The length of what a receipt says of somebody else who wrote.
CONFLICT_CHARS = 2000
#: Causes of conflicts and of warnings told apart; beyond that they are counted, and neither logged nor reported.
CAUSES_MAX = 1000
#: The steps after attach at which schedulers are looked for, and looked at again: one that went on is named.
BESIDE_STEPS = (4, 8)
#: How often one job looks for who wrote into its optimizer: each look walks through all objects of the process.
WRITER_SEARCHES_MAX = 16
#: Entries that wait for one sink of `report_to`; beyond that the oldest are dropped and counted.
SINK_QUEUE_MAX = 4096
#: A sink is told the settings in force once in so many steps, where nothing changes.
SINK_AGAIN_STEPS = 100
#: Markers that a sink keeps for what it writes when it is closed.
SINK_MARKERS_MAX = 10_000
#: Optimizer steps between two exchanges of ranks, at most.
EVERY_MAX = 4096
#: How long one collective may take in which ranks wait for the service: several are made, so that no watchdog barks.
PAUSE_S = 2.0
#: With wait_s=None: a log line each time all ranks have waited so many pauses.
PAUSES_PER_LOG = 5
#: How often it is looked whether a loss has arrived, or an exchange has ended, where that is waited for.
SETTLE_S = 0.0005
#: The bytes in front of what a rank gives that say how long it is.
SLOT_HEAD = 8
#: Rows of a Parquet file that are kept in memory and written together.
PARQUET_ROWS = 65_536
