"""MLflow: the settings that were applied as metrics of a run, and what moved them as tags and a file.

    flyball.attach(optimizer, run="resnet-7", report_to=[MlflowWriter(mlflow.active_run().info.run_id)])

Metrics are called flyball/lr/GROUP and so on. The newest decision, conflict and command stand in the tags
flyball.decision, flyball.conflict and flyball.command; all of them are in the run's file flyball/markers.jsonl once the
governor is closed. A call that blocks (MLflow tries again for minutes where its server is away) delays nothing but this
writer; what it has no time for is dropped and counted in `governor.status.unshown`.

Rule of this module: it writes into the run it is given, by id, and never touches MLflow's active run.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping

from flyball import limits
from flyball.errors import FlyballError
from flyball.sinks import Marker


class MlflowWriter:
    """A `flyball.sinks.Sink`. run_id: the MLflow run's; tracking_uri: where it is, where that is not MLflow's own
    setting. Raises FlyballError where MLflow is not installed."""

    def __init__(self, run_id: str, tracking_uri: str | None = None) -> None:
        try:
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise FlyballError(f"MLflow is not installed ({error}): pip install mlflow-skinny") from error
        self._client, self._metric, self._run = MlflowClient(tracking_uri), Metric, run_id
        self._markers: deque[str] = deque(maxlen=limits.SINK_MARKERS_MAX)

    def settings(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """See `flyball.sinks.Sink`."""
        metrics = [self._metric(f"flyball/{name}", value, int(at * 1000), step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def marker(self, step: int, at: float, marker: Marker) -> None:
        """See `flyball.sinks.Sink`."""
        self._markers.append(json.dumps({"step": step, "at": at, **marker._asdict()}))
        self._client.set_tag(self._run, f"flyball.{marker.kind}", f"step {step}: {marker.code}: {marker.text}")

    def close(self) -> None:
        """See `flyball.sinks.Sink`."""
        if self._markers:
            self._client.log_text(self._run, "\n".join(self._markers) + "\n", "flyball/markers.jsonl")
