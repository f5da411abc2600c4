"""Every limit of the client, in one place."""

from __future__ import annotations

#: Observations in one report. More wait for the next one.
BATCH_MAX = 1024
#: In free-running mode a report leaves when so many observations wait ...
FLUSH_OBSERVATIONS = 64
#: ... or when so much time has passed since the last one, whichever comes first.
FLUSH_INTERVAL_S = 0.05
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
#: Pauses between attempts to connect: doubled from the first to the last, with jitter.
BACKOFF_FIRST_S = 0.05
BACKOFF_LAST_S = 5.0
#: How long one connection attempt or one answer may take before the link tries anew.
CONNECT_S = 5.0
ANSWER_S = 15.0
#: With wait_s=None: a log line each time a step has waited so long.
WAIT_LOG_S = 10.0
#: How long a script that forgot to close its governor is held up at its exit.
EXIT_S = 2.0
#: Different signals of one run besides loss, reward and grad_norm, and the characters of a signal's name.
SIGNALS_MAX = 60
NAME_MAX = 128
#: Rows of a Parquet file that are kept in memory and written together.
PARQUET_ROWS = 65_536
