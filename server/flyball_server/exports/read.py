"""An export file read: first its form and signature, then its rows, as a journal of one run.

Rule of this module: a stranger wrote the file. Sizes are checked before memory is taken for them, and whatever does not
fit is refused with its part, its rows and its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from flyball_server import limits, records
from flyball_server.checks import spec_from
from flyball_server.core.commands import RULING
from flyball_server.core.errors import Damaged, Invalid
from flyball_server.core.events import Spec
from flyball_server.core.folded import Rules, under
from flyball_server.core.steering import plan_text
from flyball_server.exports.form import MAGIC, Part, begun, fields, parsed, signed_part
from flyball_server.loading import parent_of
from flyball_server.messages import Attach
from flyball_server.rules import PLAN, rules_of
from flyball_server.signing import is_signed
from flyball_server.storage.audit import Noted, noted
from flyball_server.storage.blocks import SEGMENT, Stored, store, unpack_segment
from flyball_server.storage.journal import Row, RunRecord, Snapshot

_MANIFEST = {"bytes": None, "sha256": 32}
_ROWS = {"first": None, "last": None, "hash": 32, **_MANIFEST}
_END = {"bytes": None, "rows": None, "head": 32, "sha256": 32, "key": 32, "signature": 64}
_ABOUT = {"run", "specification", "versions", "policies", "record", "exported_at"}
_CHUNK = 1 << 20


class Export(NamedTuple):
    """A file whose form, checksums and signature are right; what its rows say is not looked at yet.

    key: the public key that signed it.
    """

    path: Path
    manifest: dict[str, Any]
    record: RunRecord
    parts: tuple[Part, ...]
    key: bytes


def scan(path: Path) -> Export:
    """Read the file once, in bounded memory. Raises Invalid, with the place, where a single byte is wrong."""
    try:
        with path.open("rb") as file:
            return _Scan(file).whole(path)
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}") from error


class _Scan:
    """One pass over a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._at = 0

    def whole(self, path: Path) -> Export:
        if self._read(len(MAGIC)) != MAGIC:
            raise Invalid(f"bytes 0 to {len(MAGIC)}: the first line is not {MAGIC.decode().strip()!r}: no export")
        about, record = self._manifest()
        parts: list[Part] = []
        while True:
            start, before = self._at, self._digest.hexdigest()
            what = f"part {len(parts) + 2} (behind row {parts[-1].last if parts else 0}), its header from byte {start}"
            header = self._header(what)
            if header.get("part") == "end":
                break
            parts.append(self._rows(header, start, what, parts))
        self._end(header, start, before, parts)
        if (record.seq, record.hash) != (parts[-1].last, parts[-1].hash):
            raise Invalid("part 1 (manifest): its record is not of the newest row")
        return Export(path, about, record, tuple(parts), bytes.fromhex(header["key"]))

    def _manifest(self) -> tuple[dict[str, Any], RunRecord]:
        start = self._at
        what = f"part 1 (manifest), its header from byte {start}"
        header = self._header(what)
        if header.get("part") != "manifest":
            raise Invalid(f"{what}: is no manifest")
        fields(header, _MANIFEST, what)
        what = f"part 1 (manifest), bytes {start} to {self._at + header['bytes']}"
        about = parsed(self._payload(header, what, keep=True), what)
        if about.keys() != _ABOUT:
            raise Invalid(
                f"{what}: has {', '.join(sorted(about)) or 'nothing'}; it must have {', '.join(sorted(_ABOUT))}"
            )
        try:
            record = RunRecord(**{**about["record"], "hash": bytes.fromhex(about["record"]["hash"])})
        except (TypeError, ValueError, KeyError) as error:
            raise Invalid(f"{what}: its record is none") from error
        if record.run != about["run"]:
            raise Invalid(f"{what}: it is of {about['run']!r:.60}, its record of {record.run!r:.60}")
        return about, record

    def _rows(self, header: dict[str, Any], start: int, what: str, parts: list[Part]) -> Part:
        if header.get("part") != "rows":
            raise Invalid(f"{what}: is neither rows nor the end")
        fields(header, _ROWS, what)
        behind = parts[-1].last if parts else 0
        first, last, hash_ = header["first"], header["last"], bytes.fromhex(header["hash"])
        part = Part(len(parts) + 2, first, last, start, self._at, header["bytes"], hash_)
        self._payload(header, str(part), keep=False)
        if first != behind + 1 or not first <= last < first + limits.EXPORT_ROWS_MAX:
            raise Invalid(
                f"{part}: behind row {behind} comes row {behind + 1}, and at most {limits.EXPORT_ROWS_MAX} rows are in "
                "one part"
            )
        return part

    def _end(self, end: dict[str, Any], start: int, digest: str, parts: list[Part]) -> None:
        what = f"the last line, bytes {start} to {self._at}"
        fields(end, _END, what)
        if self._file.read(1):
            raise Invalid(f"byte {self._at}: something stands behind the last line")
        if not parts:
            raise Invalid(f"{what}: no rows stand before it")
        for part in parts[:-1]:
            if part.first == part.last:
                raise Invalid(f"{part}: only the last part may be a single row")
        for name, found in (
            ("bytes", start), ("rows", parts[-1].last), ("head", parts[-1].hash.hex()), ("sha256", digest)
        ):  # fmt: skip
            if end[name] != found:
                raise Invalid(f"{what}: {name} is {end[name]}, and that of bytes 0 to {start} is {found}")
        if not is_signed(bytes.fromhex(end["key"]), bytes.fromhex(end["signature"]), signed_part(end)):
            raise Invalid(f"{what}: the signature is not that of the key in the file")

    def _header(self, what: str) -> dict[str, Any]:
        text = self._file.readline(limits.EXPORT_LINE_MAX + 1)
        if not text:
            raise Invalid(f"{what}: the file ends before it")
        if not text.endswith(b"\n"):
            raise Invalid(f"{what}: the file ends within it, or it is longer than {limits.EXPORT_LINE_MAX} bytes")
        self._count(text)
        return parsed(text[:-1], what)

    def _payload(self, header: dict[str, Any], what: str, *, keep: bool) -> bytes:
        """The bytes behind a header, checked against it."""
        size = header["bytes"]
        if size > limits.EXPORT_PART_MAX:
            raise Invalid(f"{what}: {size} bytes are more than a part may have ({limits.EXPORT_PART_MAX})")
        digest, kept, left = begun(header), [], size
        while left:
            piece = self._read(min(left, _CHUNK))
            if not piece:
                raise Invalid(f"{what}: the file ends within it, at byte {self._at}")
            digest.update(piece)
            left -= len(piece)
            if keep:
                kept.append(piece)
        if digest.hexdigest() != header["sha256"]:
            raise Invalid(f"{what}: they do not have the sha256 that stands in the part's header")
        end = self._read(1)
        if end != b"\n":
            raise Invalid(f"{what}: byte {self._at - len(end)} behind it is no line end")
        return b"".join(kept)

    def _read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self._count(piece)
        return piece

    def _count(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._at += len(piece)


class ExportedRun:
    """The rows of a scanned file, read like a journal's (`verify.verify` takes it for one).

    Once `rows` was read to its end, its record is proved to be what the rows say, and `segments` can be inserted.
    """

    def __init__(self, export: Export) -> None:
        self._export = export
        self._found: list[tuple[Part, Stored]] = []
        self._noted: list[Noted] = []

    @property
    def audit(self) -> ExportedRun:
        """Itself: see `of`."""
        return self

    def of(self, run: str, *, after: int = 0, until: int | None = None) -> Iterator[Noted]:
        """What is noted of the rows read; a file keeps nothing of it apart from them."""
        return iter(self._noted)

    def rows(self, run: str, *, after: int = 0, until: int | None = None) -> Iterator[Row]:
        """All rows, in order, or (after) those behind the newest. Raises Invalid or Damaged, with the place, where they
        are not what the file says."""
        newest = self._export.record.seq
        assert (after, until) in ((0, None), (0, newest)) or after == newest
        if after:
            return
        followed = _Followed()
        self._found, self._noted = [], []
        with self._export.path.open("rb") as file:
            for part in self._export.parts:
                steps: list[int] = []
                row = None
                for row in unpack_segment(run, _segment(file, part)):
                    if row.seq == 1 and row.meta.get("spec") != self._export.manifest["specification"]:
                        raise Invalid("part 1 (manifest): its specification is not the one in row 1")
                    followed.take(row)
                    if found := noted(row):
                        self._noted.append(Noted(run, self._export.record.project, found))
                    steps += [step for step in (row.first_step, row.last_step) if step is not None]
                    yield row
                assert row is not None
                low, high = (min(steps), max(steps)) if steps else (None, None)
                stored = Stored(part.first, part.last, SEGMENT, row.attempt, low, high, "", row.at, b"", row.hash)
                self._found.append((part, stored))
        for name, right in followed.record._asdict().items():
            said = getattr(self._export.record, name)
            if said != right or type(said) is not type(right):
                raise Invalid(f"part 1 (manifest): its record's {name} is {said!r:.80}, and the rows say {right!r:.80}")

    def record(self, run: str) -> RunRecord | None:
        """The projection, as the manifest has it."""
        return self._export.record if run == self._export.record.run else None

    def snapshot(self, run: str, *, until: int | None = None) -> Snapshot | None:
        """There is none: a fold begins at the first row."""
        return None

    def snapshots(self, run: str) -> list[int]:
        """There are none."""
        return []

    def segments(self) -> Iterator[Stored]:
        """What a journal inserts, read anew part by part."""
        with self._export.path.open("rb") as file:
            for part, stored in self._found:
                segment = _segment(file, part)
                if part.first == part.last:
                    yield store(next(iter(unpack_segment(self._export.record.run, segment))))
                else:
                    yield stored._replace(payload=segment.payload)


def _segment(file: IO[bytes], part: Part) -> Stored:
    """A part as its segment; what it unpacks to is bounded."""
    file.seek(part.start)
    payload = file.read(part.size)
    try:
        size = zstandard.frame_content_size(payload)
    except zstandard.ZstdError as error:
        raise Damaged(f"{part}: {error}") from error
    if not 0 <= size <= limits.EXPORT_UNPACKED_MAX:
        raise Invalid(f"{part}: unpacked it claims {size} bytes; at most {limits.EXPORT_UNPACKED_MAX}")
    return Stored(part.first, part.last, SEGMENT, 0, None, None, "", 0, payload, part.hash)


class _Followed:
    """The record that the engine kept while these rows were written."""

    def __init__(self) -> None:
        self._seen = False
        self._spec: Spec
        self._rules: Rules
        self.record: RunRecord

    def take(self, row: Row) -> None:
        """Go on by one row."""
        if row.seq == 1:
            self._begin(row)
        if row.kind == "attached":
            if row.meta["restored"] is not None:
                self._seen = row.meta["restored"]["observations"] > 0
            step = row.meta["from_step"] - 1 if self._seen else None
            self.record = self.record._replace(status="active", attempt=row.attempt, step=step)
        elif row.kind == "observed":
            self._seen = True
            self.record = self.record._replace(step=row.last_step)
        elif row.kind == "ended":
            self.record = self.record._replace(status=row.meta["outcome"])
        elif row.kind == "commanded" and row.meta["kind"] in RULING:
            self._switch(row)
        self.record = self.record._replace(updated_at=row.at, seq=row.seq, hash=row.hash)

    def _begin(self, row: Row) -> None:
        self._spec = spec = records.spec_of(row)
        _check_asked(spec, row)
        self._rules = rules_of(spec)
        tag = self._rules.policy.tag
        self.record = RunRecord(
            spec.run, spec.project, spec.name, "created", tag, spec.labels, 0, None, row.at, row.at, 1, row.hash,
            parent_of(records.origin_of(row)),
        )  # fmt: skip

    def _switch(self, row: Row) -> None:
        """Go on under the rules that a command brings."""
        plan = row.meta["args"].get("plan")
        if not isinstance(plan, dict) or plan.keys() != set(PLAN):
            raise Invalid(f"row {row.seq}: the plan of the {row.meta['kind']} must have {', '.join(PLAN)}")
        _check_asked(self._spec._replace(**plan), row)
        tag = under(self._rules, plan_text(row.meta["args"])).policy.tag
        self.record = self.record._replace(policy=tag)


def _check_asked(spec: Spec, row: Row) -> None:
    """What no job could have asked for, no file may bring."""
    asked = Attach(
        spec.project, spec.name, "import", spec.labels, spec.groups, spec.policy, spec.base, spec.guard, spec.mode,
        spec.seed, None, False, None, None, 0, "", "",
        {name: {**one["policy"], "base": one["base"]} for name, one in spec.shadows.items()},
    )  # fmt: skip
    if spec_from(asked, {}).run != spec.run:
        raise Invalid(f"row {row.seq}: the run {spec.run!r:.60} is not called after its project and name")
