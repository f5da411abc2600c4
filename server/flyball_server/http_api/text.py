"""Answers as bytes, whatever text is stored.

Rule of this module: what is no text (half a surrogate pair, which is refused on its way in, but may stand in an older
record, or one from elsewhere) becomes a question mark; it never takes the rest of an answer with it.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import JSONResponse


class Json(JSONResponse):
    """JSON in UTF-8."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return encoded(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def encoded(text: str) -> bytes:
    """The text in UTF-8."""
    return text.encode("utf-8", "replace")


def json_line(content: Any) -> bytes:
    """JSON on a line of its own, in ASCII: what a reader takes for the end of a line may stand in a text."""
    text = json.dumps(content, allow_nan=False)
    if "\\ud" in text:  # a pair, or half of one
        text = json.dumps(json.loads(bytes(Json(content).body)), allow_nan=False)
    return text.encode() + b"\n"
