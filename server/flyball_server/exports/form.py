"""The form of an export file: its lines, and how a place in it is named.

Rule of this module: one form. A line that is not, byte for byte, what `line` makes of its contents is refused, so that
no changed bit is read as if it meant nothing. docs/export.md describes the whole file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from flyball_server import limits
from flyball_server.core.errors import Invalid

MAGIC = b"flyball-run 1\n"
_HEX = re.compile(r"[0-9a-f]*")
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


class Part(NamedTuple):
    """Rows first..last of the run, as one segment: `size` bytes from `start` on, behind the header that begins at
    `header`. hash: the last row's."""

    number: int
    first: int
    last: int
    header: int
    start: int
    size: int
    hash: bytes

    def __str__(self) -> str:
        return f"part {self.number} (rows {self.first} to {self.last}), bytes {self.header} to {self.start + self.size}"


def plain(data: Mapping[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no spaces, ASCII, no NaN."""
    return _encode(data).encode()


def line(data: Mapping[str, Any]) -> bytes:
    """A line of the file."""
    return plain(data) + b"\n"


def begun(header: Mapping[str, Any]) -> hashlib._Hash:
    """The sha256 of a part, which its bytes are still to be added to. It covers the header, too, but for itself: so a
    changed header is found in its own part."""
    return hashlib.sha256(line({name: value for name, value in header.items() if name != "sha256"}))


def parsed(text: bytes, what: str) -> dict[str, Any]:
    """The mapping in canonical JSON. Raises Invalid, naming `what`, for anything else."""
    try:
        data = json.loads(text)
        if isinstance(data, dict) and plain(data) == text:
            return data
    except (ValueError, RecursionError):
        pass
    raise Invalid(f"{what}: not the canonical JSON that an export is made of")


def fields(data: Mapping[str, Any], kinds: Mapping[str, int | None], what: str) -> None:
    """Raise Invalid unless the mapping has exactly these keys. kinds: the bytes that the hexadecimal text of each
    stands for, or None for a number, 0 or more."""
    if data.keys() != {"part", *kinds}:
        raise Invalid(f"{what}: has {', '.join(sorted(data))}; it must have part, {', '.join(sorted(kinds))}")
    for name, size in kinds.items():
        value = data[name]
        if size is None:
            if type(value) is not int or not 0 <= value <= limits.INTEGER_MAX:
                raise Invalid(f"{what}: {name} is {value!r:.60}, which is no number of bytes or rows")
        elif not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
            raise Invalid(f"{what}: {name} is {value!r:.80}, which is not {size} bytes in lower-case hexadecimal")


def signed_part(end: Mapping[str, Any]) -> bytes:
    """What the signature covers: the form's name, and the last line without the signature itself."""
    return MAGIC + plain({name: value for name, value in end.items() if name != "signature"})
