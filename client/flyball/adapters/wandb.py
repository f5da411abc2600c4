"""Weights & Biases: the settings that were applied beside the run's own charts, and what moved them as text.

    run = wandb.init(project="vision")
    flyball.attach(optimizer, run="resnet-7", report_to=[WandbWriter(run)])

Values are called flyball/lr/GROUP and so on, with flyball/step as their axis; flyball/decision, flyball/conflict and
flyball/command hold words. They ride in the script's next `run.log`: a row of our own would count as a step of the
script's, and W&B drops what is logged with a lower step later. So a chart holds what was in force when the script
logged; the table flyball/history has every change at its step, and is there once the governor is closed.

Rule of this module: it never moves the run's own step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from flyball import limits
from flyball.errors import FlyballError
from flyball.sinks import Marker


class WandbWriter:
    """A `flyball.sinks.Sink`. run: what `wandb.init` returned. Raises FlyballError where wandb is not installed."""

    def __init__(self, run: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise FlyballError(f"Weights & Biases is not installed ({error}): pip install wandb") from error
        if not hasattr(run, "define_metric"):
            raise FlyballError(f"run is {run!r:.80}: give what wandb.init() returned")
        self._run, self._table = run, wandb.Table
        self._rows: deque[tuple[int, float, str, float | None, str]] = deque(maxlen=limits.SINK_MARKERS_MAX)
        run.define_metric("flyball/step", hidden=True)
        run.define_metric("flyball/*", step_metric="flyball/step")

    def settings(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """See `flyball.sinks.Sink`."""
        self._rows.extend((step, at, name, value, "") for name, value in values.items())
        self._log(step, values)

    def marker(self, step: int, at: float, marker: Marker) -> None:
        """See `flyball.sinks.Sink`."""
        self._rows.append((step, at, marker.kind, None, f"{marker.code}: {marker.text}"))
        self._log(step, {marker.kind: f"{marker.code}: {marker.text}"})

    def close(self) -> None:
        """See `flyball.sinks.Sink`. The run stays open: it is the script's."""
        table = self._table(columns=["step", "at", "name", "value", "text"], data=[list(row) for row in self._rows])
        self._run.log({"flyball/history": table}, commit=False)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        named = {f"flyball/{name}": value for name, value in values.items()}
        self._run.log({"flyball/step": step, **named}, commit=False)
