"""Bounds of a pickle, found from its opcodes before anything is built: depth, values, and nothing inside itself.

A pickle can nest so deeply that freeing it overflows the stack of the interpreter, use one pair so often that comparing it
never ends, or ask for a memo larger than memory. Here its opcodes are followed with the depth and size of each value in the
place of the value.
"""

from __future__ import annotations

import pickletools
from typing import Any

MOST_BYTES = 1 << 30
MOST_VALUES = 50_000_000
"""Values in a pickle, each counted as often as it is used."""
MOST_BITS = 64
LONG_TEXT = 1000
"""Characters or bytes of one value, from which on each counts as a value: a list can be made of them."""
MOST_DEPTH = 16
"""Containers inside each other; published files have three."""

_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
_PLAIN = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "GLOBAL"),
    }
)
_EMPTY = frozenset({"EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", "EMPTY_SET"})
_FROM_MARK = frozenset({"TUPLE", "LIST", "DICT", "FROZENSET", "OBJ", "INST"})
_FROM_TOP = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "STACK_GLOBAL": 2}
_FILLING = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_FILLING_FROM_MARK = frozenset({"APPENDS", "SETITEMS", "ADDITEMS"})


class _Value:
    """Depth and size of a value, and whether the memo has handed it out, after which it may not change."""

    __slots__ = ("depth", "fixed", "size")

    def __init__(self) -> None:
        self.depth, self.size, self.fixed = 1, 1, False

    def take(self, parts: list[Any]) -> None:
        """Hold some values more.

        Raises:
            ValueError: if that is too deep or too large, or this value was used elsewhere before it was finished.
        """
        if self.fixed:
            msg = "it holds a container inside itself, or fills one that is in use already"
            raise ValueError(msg)
        self.depth = max(self.depth, 1 + max((part.depth for part in parts), default=0))
        self.size += sum(part.size for part in parts)
        if self.depth > MOST_DEPTH or self.size > MOST_VALUES:
            msg = f"it holds containers {self.depth:,} deep and {self.size:,} values; expected at most {MOST_DEPTH} and {MOST_VALUES:,}"
            raise ValueError(msg)


_SCALAR = _Value()


def _long(n: int) -> _Value:
    """Return the measure of a text or of bytes so long."""
    value = _Value()
    value.size = n
    return value


class _Machine:
    """The stack and the memo of the reader, with depths and sizes in the place of values."""

    def __init__(self) -> None:
        self.stack: list[_Value | None] = []
        self.memo: dict[int, _Value] = {}

    def pop(self, n: int) -> list[Any]:
        """Take the last values off the stack."""
        if n > len(self.stack) or None in self.stack[-n:]:
            msg = "its opcodes take more from the stack than is there"
            raise ValueError(msg)
        parts = self.stack[-n:]
        del self.stack[-n:]
        return parts

    def pop_to_mark(self) -> list[Any]:
        """Take everything after the last mark, and the mark, off the stack."""
        parts: list[Any] = []
        while self.stack:
            part = self.stack.pop()
            if part is None:
                return parts
            parts.append(part)
        msg = "its opcodes look for a mark that is not there"
        raise ValueError(msg)

    def push(self, parts: list[Any]) -> None:
        """Put a new value that holds others on the stack."""
        value = _Value()
        value.take(parts)
        self.stack.append(value)

    def fill(self, parts: list[Any]) -> None:
        """Put values into the one at the top of the stack."""
        (into,) = self.pop(1)
        if into is _SCALAR:
            msg = "its opcodes fill something that is not a container"
            raise ValueError(msg)
        into.take(parts)
        self.stack.append(into)

    def put(self, place: int, n_opcodes: int) -> None:
        """Keep the value at the top of the stack in the memo."""
        if place > n_opcodes:
            msg = f"it asks for a memo of {place:,} places after {n_opcodes:,} opcodes"
            raise ValueError(msg)
        (self.memo[place],) = top = self.pop(1)
        self.stack += top

    def get(self, place: int) -> None:
        """Put a value of the memo on the stack."""
        if place not in self.memo:
            msg = f"its opcodes ask for place {place:,} of the memo, which is empty"
            raise ValueError(msg)
        value = self.memo[place]
        if value is not _SCALAR:
            value.fixed = True
        self.stack.append(value)


def require_bounded(content: bytes) -> None:
    """Raise if a pickle would build something too deep, too large or inside itself; nothing is built.

    Raises:
        ValueError: saying what was found and what was expected.

    Example:
        >>> require_bounded(b"\\x80\\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
        Traceback (most recent call last):
            ...
        ValueError: it holds containers 17 deep and 17 values; expected at most 16 and 50,000,000
    """
    if len(content) > MOST_BYTES:
        msg = f"it has {len(content):,} bytes; expected at most {MOST_BYTES:,}"
        raise ValueError(msg)
    machine = _Machine()
    for n_opcodes, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if name in _PLAIN:
            if isinstance(argument, int) and argument.bit_length() > MOST_BITS:
                # Such numbers can be chosen to have one hash, which makes a dictionary of them take forever.
                msg = f"it holds a whole number of {argument.bit_length():,} bits; expected at most {MOST_BITS}"
                raise ValueError(msg)
            length = len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0
            machine.stack.append(_long(length) if length > LONG_TEXT else _SCALAR)
        elif name == "MEMOIZE":
            machine.put(len(machine.memo), n_opcodes)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            machine.put(int(argument or 0), n_opcodes)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            machine.get(int(argument or 0))
        elif name == "MARK":
            machine.stack.append(None)
        elif name in _FILLING_FROM_MARK:
            machine.fill(machine.pop_to_mark())
        elif name in _FILLING:
            machine.fill(machine.pop(_FILLING[name]))
        elif name in _EMPTY:
            machine.push([])
        elif name in _FROM_TOP:
            machine.push(machine.pop(_FROM_TOP[name]))
        elif name in _FROM_MARK:
            machine.push(machine.pop_to_mark())
        elif name == "POP":
            # Of a value, or of a mark.
            del machine.stack[-1:]
        elif name == "POP_MARK":
            machine.pop_to_mark()
        elif name not in _IGNORED:
            msg = f"it uses the opcode {name}, which no published file needs"
            raise ValueError(msg)
