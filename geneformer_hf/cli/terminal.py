"""Streams of the terminal that show control characters in names and labels as escapes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..escaping import terminal

_MOVES = re.compile(r"(?:\r|\n|\x1b\[A)*")
"""What progress bars begin with, to draw over themselves."""


class PrintableStream:
    """A stream of text whose control characters are shown as escapes; those that a progress bar begins with pass."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        start = match.end() if (match := _MOVES.match(text)) else 0
        self._stream.write(text[:start] + terminal(text[start:]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable(stream: Any) -> Iterator[Any]:
    """Yield a stream that shows control characters as escapes, and flush it in the end."""
    try:
        yield PrintableStream(stream)
    finally:
        stream.flush()
