"""Signed heads checked off-line: the signatures, and that stores and export files still hold what was signed.

Rule of this module: it believes a public key and nothing else. Hashes are computed again from the first row on, so a
row that was changed, taken away or written anew with all that follows is found, with the place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from flyball_server.audit.auditing import moment
from flyball_server.audit.heads import FORM, digest
from flyball_server.core.errors import Damaged, Invalid
from flyball_server.exports.form import plain
from flyball_server.exports.read import ExportedRun, scan
from flyball_server.proving import checked
from flyball_server.signing import fingerprint, is_signed
from flyball_server.storage.journal import DELETED, GENESIS, STORE, Journal, Reading

#: A file of heads is no larger; one list has at most some hundred KB.
FILE_MAX = 256 << 20
#: What of a list makes its signature; all else must follow from it.
_SIGNING = ("heads", "key", "signature")
#: Where no head speaks of a run.
_NOTHING = "nothing is proved: none of the heads is of this run"


class Head(NamedTuple):
    """What was signed of a run: its row `seq` had this hash, at this time."""

    seq: int
    hash: str
    at: str


class Found(NamedTuple):
    """What became of a run's signed heads. problem: "" where the journal holds all of them; note: what else to know."""

    run: str
    heads: int
    problem: str
    note: str = ""


def read_heads(path: Path, key: bytes) -> dict[str, list[Head]]:
    """The heads in a file (an answer of GET /v1/heads, or one list a line), by run, in order, STORE included.

    Raises Invalid, naming the list, where the key did not sign one, or one is missing between two others; and where
    there is nothing in it, which would prove nothing.
    """
    found: dict[str, dict[int, Head]] = {}
    before: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(_entries(path), 1):
        what = f"{path}, list {number}"
        heads = _signed(entry, key, what)
        last = before.get(heads["project"])
        if last is not None and heads["number"] > last["number"]:
            if heads["number"] != last["number"] + 1:
                raise Invalid(
                    f"{what}: project {heads['project']!r} has list {heads['number']} behind list {last['number']}: "
                    "one in between is missing; ask for all with since=0"
                )
            if heads["previous"] != digest(last):
                raise Invalid(f"{what}: it names another list before it than the one in the file")
        before[heads["project"]] = heads
        for run, seq, hash_ in [*heads["runs"], [STORE, *heads["store"]]]:
            if seq:
                known = found.setdefault(run, {}).setdefault(seq, Head(seq, hash_, heads["at"]))
                if known.hash != hash_:
                    raise Invalid(f"{what}: row {seq} of {run!r} was signed with another hash at {known.at}")
    if not found:
        raise Invalid(f"{path} holds no signed heads, so nothing is proved: `flyball heads` prints them")
    return {run: [heads[seq] for seq in sorted(heads)] for run, heads in found.items()}


def check_store(journal: Journal, heads: Mapping[str, list[Head]], runs: Collection[str] = ()) -> Iterator[Found]:
    """Whether a store holds what was signed, run by run; runs: of these only."""
    for run in runs or sorted(heads):
        signed = heads.get(run, [])
        if not signed:
            yield Found(run, 0, _NOTHING)
            continue
        record = None if run == STORE else journal.record(run)
        if record is not None and record.status == DELETED:
            note = f"deleted: row {record.seq} of the store's journal says when and why"
            yield Found(run, len(signed), "", note)
            continue
        yield Found(run, len(signed), _compared(journal, run, signed, None))


def check_files(files: Iterable[Path], heads: Mapping[str, list[Head]]) -> Iterator[Found]:
    """Whether export files hold what was signed, file by file. A file may be older than some of the heads."""
    for path in files:
        try:
            export = scan(path)
        except Invalid as error:
            yield Found(str(path), 0, str(error))
            continue
        run, end, written = export.record.run, export.record.seq, export.manifest["exported_at"]
        signed = heads.get(run, [])
        # What was signed later than the file was written may well lie behind its end.
        within = [head for head in signed if head.seq <= end or not _is_later(head.at, written)]
        newer = len(signed) - len(within)
        note = f"{newer} heads are newer than the file, which ends with row {end}" if newer else ""
        problem = _compared(cast("Reading", ExportedRun(export)), run, within, end)
        if not within:
            problem = f"nothing is proved: {note}" if newer else _NOTHING
        yield Found(run, len(within), problem, note)


def _compared(journal: Reading, run: str, signed: list[Head], end: int | None) -> str:
    """What is wrong with the first signed head that is not there; "" where all are."""
    at = dict.fromkeys(head.seq for head in signed)
    hashes: dict[int, str] = {}
    newest, problem = 0, ""
    try:
        for row in checked(run, journal.rows(run, until=end), 0, GENESIS):
            newest = row.seq
            if row.seq in at:
                hashes[row.seq] = row.hash.hex()
    except (Damaged, Invalid) as error:
        problem = str(error)
    before = 0
    for head in signed:
        if head.seq > newest and problem:  # what lies behind the damage may well be there
            return problem + (f"; up to row {before} all is as signed" if before else "")
        if head.seq > newest:
            return f"row {head.seq} is missing, which was signed at {head.at}: the journal ends with row {newest}"
        if hashes[head.seq] != head.hash:
            return (
                f"row {head.seq} has another hash than was signed at {head.at}: something in rows {before + 1} to "
                f"{head.seq} was written anew since"
            )
        before = head.seq
    return ""


def _is_later(one: str, other: str) -> bool:
    return (moment("at", one) or 0) > (moment("exported_at", other) or 0)


def _entries(path: Path) -> Iterator[Any]:
    try:
        if path.stat().st_size > FILE_MAX:
            raise Invalid(f"{path} has more than {FILE_MAX} bytes: give it in several files")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"{path} cannot be read as signed heads: {error}") from error
    try:
        whole = json.loads(text)
        yield from whole["heads"] if isinstance(whole.get("heads"), list) else [whole]
        return
    except (ValueError, AttributeError, RecursionError):
        pass
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Invalid(f"{path}, line {number} is no JSON: {error}") from error


def _signed(entry: Any, key: bytes, what: str) -> dict[str, Any]:
    """The list, once its signature is proved."""
    try:
        heads, signer, signature = entry["heads"], bytes.fromhex(entry["key"]), bytes.fromhex(entry["signature"])
        data = plain(heads)
        shape = [heads["form"], heads["project"], heads["previous"], heads["at"]]
        runs = [*heads["runs"], ["", *heads["store"]]]
        right = all(isinstance(word, str) for word in shape) and type(heads["number"]) is int and heads["form"] == FORM
        right = right and all(
            isinstance(run, str) and type(seq) is int and isinstance(hash_, str) for run, seq, hash_ in runs
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Invalid(f"{what}: it is no signed list of heads") from error
    if not right:
        raise Invalid(f"{what}: it is no signed list of heads of the form {FORM!r}")
    if signer != key:
        raise Invalid(f"{what}: signed by {_called(signer)}, and not by the key given, {fingerprint(key)}")
    if not is_signed(key, signature, data):
        raise Invalid(f"{what}: the signature is not that of the key: it was changed")
    # What stands around the signed part for convenience must follow from it, or it could say anything.
    around = {"seq": heads["store"][0] + 1, "project": heads["project"]}
    for name, value in entry.items():
        if name not in _SIGNING and (name not in around or value != around[name] or type(value) is bool):
            wanted = f"it signs {around[name]!r}" if name in around else "no such field belongs there"
            raise Invalid(f"{what}: {name!r:.40} is {value!r:.80}, but {wanted}: it was changed")
    found: dict[str, Any] = heads
    return found


def _called(key: bytes) -> str:
    try:
        return fingerprint(key)
    except ValueError:
        return "something that is no key"
