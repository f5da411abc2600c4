"""TensorBoard: the settings that were applied as curves, and what moved them as text.

    flyball.attach(optimizer, run="resnet-7", report_to=[TensorBoardWriter("runs/resnet-7")])

Curves are called flyball/lr/GROUP, flyball/momentum/GROUP, flyball/noise_std/GROUP and flyball/control/NAME; decisions,
conflicts and people's commands are the texts flyball/decision, flyball/conflict and flyball/command. Give a folder, or
the `SummaryWriter` that the script has (of torch or tensorboardX), which then stays the script's to close.

Rule of this module: an event carries the time of its step, not of its writing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flyball.errors import FlyballError
from flyball.sinks import Marker


class TensorBoardWriter:
    """A `flyball.sinks.Sink`. where: a folder for event files, or a SummaryWriter. Raises FlyballError where it is a
    folder and TensorBoard is not installed."""

    def __init__(self, where: str | os.PathLike[str] | Any) -> None:
        self._own = isinstance(where, str | os.PathLike)
        self._writer: Any = _EventFile(os.fspath(where)) if self._own else where

    def settings(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """See `flyball.sinks.Sink`."""
        for name, value in values.items():
            self._writer.add_scalar(f"flyball/{name}", value, step, walltime=at)

    def marker(self, step: int, at: float, marker: Marker) -> None:
        """See `flyball.sinks.Sink`. TensorBoard shows texts as Markdown."""
        self._writer.add_text(f"flyball/{marker.kind}", f"`{marker.code}` {marker.text}", step, walltime=at)

    def close(self) -> None:
        """See `flyball.sinks.Sink`."""
        if self._own:
            self._writer.close()
        else:
            self._writer.flush()


class _EventFile:
    """As much of a SummaryWriter as is needed here, without torch."""

    def __init__(self, folder: str) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
            from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise FlyballError(f"TensorBoard is not installed ({error}): pip install tensorboard") from error
        self._event, self._summary, self._file = event_pb2.Event, summary_pb2, EventFileWriter(folder)
        self._tensor, self._shape = tensor_pb2.TensorProto, tensor_shape_pb2.TensorShapeProto
        plugin = summary_pb2.SummaryMetadata.PluginData(
            plugin_name="text", content=TextPluginData(version=0).SerializeToString()
        )
        self._text = summary_pb2.SummaryMetadata(plugin_data=plugin)

    def add_scalar(self, tag: str, value: float, step: int, *, walltime: float) -> None:
        self._add(self._summary.Summary.Value(tag=tag, simple_value=value), step, walltime)

    def add_text(self, tag: str, text: str, step: int, *, walltime: float) -> None:
        shape = self._shape(dim=[self._shape.Dim(size=1)])
        tensor = self._tensor(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        # This is the name under which SummaryWriter.add_text writes, too.
        value = self._summary.Summary.Value(tag=f"{tag}/text_summary", metadata=self._text, tensor=tensor)
        self._add(value, step, walltime)

    def _add(self, value: Any, step: int, walltime: float) -> None:
        summary = self._summary.Summary(value=[value])
        self._file.add_event(self._event(step=step, wall_time=walltime, summary=summary))

    def close(self) -> None:
        self._file.close()
