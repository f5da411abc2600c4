"""Aim: the settings that were applied as metrics with the group as their context, and what moved them as texts.

    flyball.attach(optimizer, run="resnet-7", report_to=[AimWriter(aim.Run(repo="."))])

Metrics are called flyball.lr, flyball.momentum, flyball.noise_std and flyball.control, with the context
{"group": GROUP} (or {"control": NAME}); texts flyball.decision, flyball.conflict and flyball.command.

Rule of this module: the Aim run is the script's, which closes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flyball.errors import FlyballError
from flyball.sinks import Marker


class AimWriter:
    """A `flyball.sinks.Sink`. run: an `aim.Run`. Raises FlyballError where Aim is not installed."""

    def __init__(self, run: Any) -> None:
        try:
            from aim import Text
        except ImportError as error:
            raise FlyballError(f"Aim is not installed ({error}): pip install aim") from error
        self._run, self._text = run, Text

    def settings(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """See `flyball.sinks.Sink`. Aim keeps the time of tracking itself."""
        for name, value in values.items():
            kind, _, of = name.partition("/")
            context = {"control" if kind == "control" else "group": of}
            self._run.track(value, name=f"flyball.{kind}", step=step, context=context)

    def marker(self, step: int, at: float, marker: Marker) -> None:
        """See `flyball.sinks.Sink`."""
        self._run.track(self._text(f"{marker.code}: {marker.text}"), name=f"flyball.{marker.kind}", step=step)

    def close(self) -> None:
        """See `flyball.sinks.Sink`."""
